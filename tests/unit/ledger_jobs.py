"""Jobs with round numbers, so that every figure of the report can be worked out by hand."""

from pathlib import Path

from trainonce.events import (
    CheckpointSaved,
    ComputeSaved,
    EnergyUsed,
    Event,
    FaultInjected,
    GenerationFormed,
    Incident,
    JobEnded,
    JobStarted,
    LeverApplied,
    ProgressMade,
)
from trainonce.ledger.store import Ledger

START = 1_790_000_000.0  # 2026-09-21


def at(seconds: float) -> dict[str, float]:
    return {"wall_s": START + seconds, "mono_s": 500.0 + seconds}


def incident(number: int, seconds: float, **other) -> Incident:
    fields = {
        "ranks": [1], "cause": "signal", "detail": "SIGKILL", "detected_by": "process exit",
        "served_by": "rebuild", "step": 0, "generation": number,
    }  # fmt: skip
    return Incident(incident=number, **{**fields, **at(seconds), **other})


def checkpoint(seconds: float, step: int, blocked_s: float = 0.0) -> CheckpointSaved:
    return CheckpointSaved(
        path=f"/c/{step}", step=step, size_bytes=10, blocked_s=blocked_s, write_s=1.0,
        reason="interval", **at(seconds),
    )  # fmt: skip


def begin(job: str, **other) -> list[Event]:
    fields = {"script": "train.py", "command": [], "world_size": 4, "spares": 1, "host": "gpu-1"}
    return [
        JobStarted(job=job, **{**fields, **at(0), **other}),
        GenerationFormed(
            generation=0, incarnation=0, pids=[1, 2, 3, 4], newcomers=[], step=0, **at(10)
        ),
    ]


def progress(seconds: float, step: int) -> ProgressMade:
    return ProgressMade(
        step=step, samples=32 * step, tokens=0, ranks_alive=4, spares_ready=1, step_s=0.5,
        **at(seconds),
    )  # fmt: skip


def end(seconds: float, steps: int, outcome: str = "completed") -> JobEnded:
    code = 0 if outcome == "completed" else 1
    return JobEnded(outcome=outcome, exit_code=code, steps=steps, **at(seconds))


def golden_job() -> list[Event]:
    return [
        *begin("golden", project="nlp"),
        *(progress(seconds, seconds + seconds // 2) for seconds in range(20, 400, 20)),
        checkpoint(100, 100, blocked_s=2.0),
        incident(
            1, 150, step=180, pause_s=3.0, micro_batches_recomputed=1, bytes_moved=1_200_000,
            digest_before="ab" * 16, digest_after="ab" * 16,
        ),
        incident(
            2, 200, step=240, cause="hang", detail="no progress for 12.0 s",
            detected_by="progress", detected_s=12.0, pause_s=5.0, waited_for_spare_s=2.0,
        ),
        FaultInjected(fault="kill", rank=0, step=300, point="begin", pid=9, **at(250)),
        incident(3, 250, step=300, pause_s=4.0, chaos=True),
        incident(4, 260, step=310, cause="migration", planned=True, served_by="migration"),
        ComputeSaved(node="tok", key="k", saved_s=3600.0, read_s=36.0, **at(300)),
        ComputeSaved(node="tok", key="k", saved_s=3600.0, read_s=1.0, **at(301)),
        LeverApplied(lever="bf16", expected_share=0.5, basis="benchmarks/levers", **at(10)),
        EnergyUsed(energy_j=3.6e6, source="nvml", is_estimate=False, **at(200)),
        EnergyUsed(energy_j=3.6e6, source="nvml", is_estimate=False, **at(400)),
        end(400, 600),
    ]  # fmt: skip


def write(home: Path, **jobs: list[Event]) -> Ledger:
    ledger = Ledger.open(home)
    for job, events in jobs.items():
        for event in events:
            ledger.append(job, event)
    ledger.close()
    return Ledger.open(home)
