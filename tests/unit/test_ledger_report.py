"""The report's figures, worked out again by hand, and what it says to bad input."""

import dataclasses
import json
from pathlib import Path

import pytest

from trainonce.cli.main import main
from trainonce.errors import JobNotFoundError
from trainonce.events import Event, FaultInjected, GuestsChanged, Incident, JobStarted
from trainonce.ledger import prices
from trainonce.ledger.guarantee import classify, clopper_pearson, is_resolved, judge
from trainonce.ledger.page import page
from trainonce.ledger.prices import Contract, EconomicsSettings, Prices
from trainonce.ledger.report import Report, build, find_job, to_json
from trainonce.ledger.text import render

from .ledger_jobs import START, at, begin, checkpoint, end, golden_job, incident, progress, write

NOW = START + 86400.0
PRICED = EconomicsSettings(prices=Prices(usd_per_gpu_hour=3.0, country="FRA", pue=1.2))


def report_of(home: Path, settings: EconomicsSettings = PRICED, **choice) -> Report:
    from trainonce.ledger.store import Ledger

    return build(Ledger.open(home), settings, NOW, **choice)


def test_time_of_the_golden_job_is_as_worked_out_by_hand(tmp_path: Path) -> None:
    write(tmp_path, golden=golden_job())
    time = report_of(tmp_path).jobs[0].time
    # 10 s start-up; 3 s pause with one share of 0.5 s in it; 12 s until the hang was seen,
    # then 5 s pause with 2 s of waiting; 4 s of chaos; 2 s blocked by the checkpoint.
    assert time.lost_s == pytest.approx(
        {
            "start-up": 10.0,
            "detection": 12.0,
            "pause": 2.5 + 3.0 + 4.0,
            "waiting for a worker": 2.0,
            "recompute in flight": 0.5,
            "rollback": 0.0,
            "checkpoint blocking": 2.0,
        }
    )
    assert time.productive_s == pytest.approx(400 - 38 + 2)
    assert time.ettr == pytest.approx(364 / 400)
    assert time.goodput == pytest.approx(600 * 0.5 / 400)


def test_money_of_the_golden_job_is_as_worked_out_by_hand(tmp_path: Path) -> None:
    write(tmp_path, golden=golden_job())
    money = report_of(tmp_path).jobs[0].economics
    assert money.cost_usd == pytest.approx(5 * 400 / 3600 * 3)
    assert money.spare_cost_usd == pytest.approx(400 / 3600 * 3)
    assert money.lost_cost_usd == pytest.approx(36 * 4 / 3600 * 3)
    first, second, chaos, planned = money.audits
    assert (first.base_step, first.base) == (100, "/c/100")
    assert first.saved_s == pytest.approx((0 + 10 + (180 - 100) * 0.5) - 3)
    assert second.saved_s == pytest.approx((12 + 10 + (240 - 100) * 0.5) - (12 + 5))
    assert (chaos.saved_s, chaos.counts) == (0.0, "chaos")
    assert (planned.saved_s, planned.counts) == (0.0, "planned move")
    assert money.saved_gpu_hours == pytest.approx((47 + 75) * 4 / 3600)
    assert money.saved_cost_usd == pytest.approx((47 + 75) * 4 / 3600 * 3)
    # The first use of a stored result counts, less the time to read it, on one device.
    assert money.graph_saved_gpu_hours == pytest.approx((3600 - 36) / 3600)
    assert money.expected_gpu_hours == {"bf16": pytest.approx(364 * 4 / 3600)}
    assert money.energy.it_kwh == pytest.approx(2.0)
    assert money.energy.facility_kwh == pytest.approx(2.4)
    assert money.energy.co2_kg == pytest.approx(2.4 * 0.056039)
    assert (money.energy.is_estimate, money.energy.source) == (False, "nvml")


def test_mfu_waits_and_use_of_devices_are_as_worked_out_by_hand(tmp_path: Path) -> None:
    samples = [
        dataclasses.replace(
            progress(s, s), loader_s=0.125, device_use=use, flops_per_step=flops, peak_flops=peak
        )
        for s, use, flops, peak in (
            (50, None, 0, 0), (60, 0.5, 8000, 100_000), (70, 0.9, 8000, 100_000),
        )
    ]  # fmt: skip
    write(tmp_path, j=[*begin("j"), *samples, end(100, 150)])
    report = report_of(tmp_path, job="j")
    (job,) = report.jobs
    # 150 steps of 8,000 operations in 100 s on devices that could do 100,000 a second.
    assert job.time.mfu == pytest.approx(150 * 8000 / (100 * 100_000))
    assert report.totals.mfu == pytest.approx(0.12)
    assert job.facts.device_use == pytest.approx(0.7)
    for text in (render(report, detailed=True), page(report)):
        assert "MFU 12.0" in text
        assert "A step takes 0.500 s and waits 0.125 s for its batch (20.0" in text
        assert "devices busy: 70.0" in text
    assert report_of(tmp_path, job="j").jobs[0].time.mfu == job.time.mfu
    write(tmp_path / "none", golden=golden_job())
    assert report_of(tmp_path / "none").jobs[0].time.mfu is None


def test_nothing_is_claimed_of_a_plain_scripts_time(tmp_path: Path) -> None:
    restarted = incident(1, 50, supported=False, served_by="restart", pause_s=8.0)
    over = dataclasses.replace(end(100, 0), supported=False)
    write(tmp_path, plain=[begin("plain")[0], restarted, over], j=golden_job())
    report = report_of(tmp_path)
    job = next(one for one in report.jobs if one.facts.summary.job == "plain")
    assert (job.time.ettr, job.time.lost_s["start-up"], job.time.lost_s["pause"]) == (None, 0, 8)
    assert report.totals.ettr == pytest.approx(364 / 400)
    said = "nobody knows what was lost, not counted: run without trainonce.init"
    assert said in render(report_of(tmp_path, job="plain"), detailed=True)
    assert said in page(report)


def test_clock_that_is_set_while_a_job_runs_moves_no_incident(tmp_path: Path) -> None:
    def set_back(event: Event) -> Event:
        return dataclasses.replace(event, wall_s=event.wall_s - 3600)

    events = [checkpoint(50, 50), incident(1, 60, step=80, pause_s=2.0), checkpoint(61, 81)]
    calm = [*begin("j"), *events, progress(150, 50), end(200, 100)]
    shaken = [*begin("j"), *map(set_back, calm[2:])]
    for home, jobs in (("calm", calm), ("shaken", shaken)):
        write(tmp_path / home, j=jobs)
    first, second = (report_of(tmp_path / home).jobs[0] for home in ("calm", "shaken"))
    assert second.time == first.time
    assert second.economics.audits == first.economics.audits
    assert first.economics.audits[0].base_step == 50


def test_time_on_shared_devices_is_told_and_counts_as_productive(tmp_path: Path) -> None:
    guests = [
        GuestsChanged(ranks=[1], hosts=[0], step=100, **at(100)),
        GuestsChanged(ranks=[1, 2], hosts=[0, 3], step=120, **at(120)),
        GuestsChanged(ranks=[], hosts=[], step=150, **at(150)),
        GuestsChanged(ranks=[3], hosts=[0], step=380, **at(390)),
    ]
    served = incident(1, 99, step=100, pause_s=1.0, served_by="guest")
    write(tmp_path, shared=[*begin("shared"), served, *guests, end(400, 600)])
    report = report_of(tmp_path)
    (job,) = report.jobs
    assert job.facts.reduced_s == pytest.approx(50 + 10)
    assert job.time.productive_s == pytest.approx(400 - 10 - 1)
    assert job.incidents[0].resolved
    said = render(report, detailed=True)
    assert "served by guest" in said
    assert (
        "at reduced speed, on shared devices: rank 1 on that of rank 0, rank 2 on that of rank 3,"
        " rank 3 on that of rank 0" in said
    )


def test_planned_faults_that_did_not_fire_are_told(tmp_path: Path) -> None:
    over = dataclasses.replace(end(100, 50), unfired=["kill rank=1 step=500 point=begin"])
    write(tmp_path, j=[*begin("j"), over])
    report = report_of(tmp_path)
    assert "a planned fault did not fire: kill rank=1 step=500" in render(report, detailed=True)
    (job,) = to_json(report)["jobs"]
    assert job["facts"]["unfired"] == over.unfired


def test_only_unplanned_failures_count_for_the_guarantee(tmp_path: Path) -> None:
    write(tmp_path, golden=golden_job())
    guarantee = report_of(tmp_path).guarantee
    assert (guarantee.n, guarantee.resolved, guarantee.verdict) == (2, 2, "kept")
    assert guarantee.apart == {
        "chaos": 1, "planned move": 1, "exception in user code": 0, "misuse of trainonce": 0,
        "run without trainonce.init": 0,
    }  # fmt: skip
    assert guarantee.by_cause == {"signal": (1, 1), "hang": (1, 1)}


def test_the_interval_is_the_textbook_one() -> None:
    # 9 of 10 and 10 of 10, from tables; and the rule 1 - (alpha / 2) ** (1 / n).
    assert clopper_pearson(9, 10) == pytest.approx((0.5550, 0.9975), abs=1e-4)
    assert clopper_pearson(10, 10) == pytest.approx((0.025**0.1, 1.0))
    assert clopper_pearson(0, 10) == pytest.approx((0.0, 1 - 0.025**0.1))


@pytest.mark.parametrize(
    ("good", "bad", "verdict", "credit"),
    [(9, 1, "kept", 0.0), (8, 1, "missed", 250.0), (0, 0, "no failures", 0.0)],
)
def test_the_credit_is_due_exactly_below_the_guaranteed_share(
    good: int, bad: int, verdict: str, credit: float
) -> None:
    incidents = [incident(1, 0) for _ in range(good)]
    incidents += [incident(1, 0, steps_lost=3, served_by="checkpoint") for _ in range(bad)]
    found = judge(incidents, Contract(fee_usd=1000.0), NOW)
    assert (found.n, found.verdict, found.credit_usd) == (good + bad, verdict, credit)


def test_a_credit_goes_by_all_jobs_and_not_by_those_that_were_chosen(tmp_path: Path) -> None:
    failed = {"served_by": "checkpoint", "steps_lost": 9}
    write(tmp_path, a=[*begin("a"), incident(1, 50, **failed), end(100, 50)], b=golden_job())
    contract = EconomicsSettings(contract=Contract(fee_usd=1000.0))
    whole = report_of(tmp_path, contract)
    assert (whole.guarantee.verdict, whole.guarantee.credit_usd) == ("missed", 250.0)
    part = report_of(tmp_path, contract, job="a")
    assert (part.guarantee.verdict, part.guarantee.credit_usd) == ("missed", None)
    assert "credit due" in render(whole, detailed=False)
    assert "credit due" not in render(part, detailed=True)
    assert "the jobs shown only" in render(part, detailed=True)


def test_incidents_of_another_contract_year_do_not_count() -> None:
    import datetime

    contract = Contract(start=datetime.date(2025, 9, 21))
    begin_s, end_s = contract.year(NOW)
    assert (end_s - begin_s) == 365 * 86400
    assert begin_s <= NOW < end_s
    inside, before = incident(1, 0, wall_s=begin_s + 1), incident(2, 0, wall_s=begin_s - 1)
    assert judge([inside, before], contract, NOW).n == 1
    leap = Contract(start=datetime.date(2024, 2, 29))
    assert leap.year(NOW)[0] < NOW < leap.year(NOW)[1]


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({}, "failure"),
        ({"chaos": True}, "chaos"),
        ({"planned": True, "cause": "migration"}, "planned move"),
        ({"cause": "exception", "detail": "ValueError: x"}, "exception in user code"),
        ({"cause": "misuse", "detail": "StepError: x"}, "misuse of trainonce"),
        ({"cause": "recovery", "detail": "RecoveryError: x"}, "failure"),
        ({"supported": False}, "run without trainonce.init"),
        ({"cause": "exception", "detail": "CUDA out of memory. NCCL"}, "exception in user code"),
        ({"cause": "exception", "detail": "CUDA error: uncorrectable ECC error"}, "failure"),
        ({"cause": "exception", "detail": "NCCL error: unhandled system error"}, "failure"),
        ({"cause": "oom"}, "failure"),
    ],
)
def test_what_an_incident_counts_as_does_not_depend_on_how_it_ended(
    fields: dict[str, object], kind: str
) -> None:
    for served_by in ("rebuild", "none"):
        assert classify(incident(1, 0, served_by=served_by, **fields)) == kind


@pytest.mark.parametrize(
    ("fields", "resolved"),
    [
        ({}, True),
        ({"served_by": "none"}, False),
        ({"steps_lost": 1}, False),
        ({"served_by": "checkpoint", "steps_lost": 0}, True),
        ({"digest_before": "aa", "digest_after": "ab"}, False),
        ({"digest_before": "aa"}, True),
    ],
)
def test_resolved_means_served_nothing_repeated_and_equal_digests(
    fields: dict[str, object], resolved: bool
) -> None:
    assert is_resolved(incident(1, 0, **fields)) is resolved


def test_incidents_that_overlap_are_charged_once(tmp_path: Path) -> None:
    both = [
        *begin("j"),
        incident(1, 100, step=10, pause_s=6.0),
        incident(2, 102, step=10, pause_s=6.0, ranks=[2]),
        progress(150, 50),
        end(200, 100),
    ]
    write(tmp_path, j=both)
    job = report_of(tmp_path).jobs[0]
    assert job.time.lost_s["pause"] == pytest.approx(8.0)  # from 100 to 108
    assert [one.counts for one in job.economics.audits] == ["", "same step as an earlier one"]


def test_a_hang_that_began_before_an_incident_within_it_is_charged_in_full(tmp_path: Path) -> None:
    # Silent from 75 on, seen at 105, over at 125; meanwhile another rank died at 100.
    died = incident(1, 100, step=10, pause_s=10.0)
    hung = incident(2, 105, step=10, ranks=[2], detected_s=30.0, pause_s=20.0)
    for name, some in (("a", [died, hung]), ("b", [hung, died])):
        write(tmp_path / name, j=[*begin("j"), *some, progress(150, 50), end(200, 100)])
        lost_s = report_of(tmp_path / name).jobs[0].time.lost_s
        assert lost_s["detection"] == pytest.approx(30.0)
        assert lost_s["pause"] == pytest.approx(20.0)


def test_a_failure_before_the_first_checkpoint_is_measured_from_the_beginning(
    tmp_path: Path,
) -> None:
    events = [*begin("j"), incident(1, 60, step=80, pause_s=1.0), checkpoint(61, 81)]
    write(tmp_path, j=[*events, progress(150, 50), end(200, 100)])
    (audit,) = report_of(tmp_path).jobs[0].economics.audits
    assert (audit.base_step, audit.base) == (0, "start of the job")
    assert audit.saved_s == pytest.approx(10 + 80 * 0.5 - 1)


def test_a_failure_that_did_lose_progress_saves_that_much_less(tmp_path: Path) -> None:
    served = {"served_by": "checkpoint", "steps_lost": 80, "pause_s": 30.0}
    write(tmp_path, j=[*begin("j"), incident(1, 60, step=80, **served), progress(150, 9)])
    job = report_of(tmp_path).jobs[0]
    assert job.time.lost_s["rollback"] == pytest.approx(40.0)
    assert job.economics.saved_gpu_hours == pytest.approx((50 - 70) * 4 / 3600)  # a loss


def _lost_job() -> list:
    return [*begin("lost"), checkpoint(100, 100), *(progress(s, s) for s in (50, 100, 180))]


def _as_left_by_a_dead_launcher(home: Path, **jobs: list) -> None:
    """Write jobs whose launcher no longer lives."""
    import sqlite3
    from contextlib import closing

    ledger = write(home, **jobs)
    with closing(sqlite3.connect(ledger.path)) as connection, connection:
        connection.execute("UPDATE writers SET started = '1'")


def test_a_dead_launcher_counts_as_a_failure_with_lost_progress(tmp_path: Path) -> None:
    _as_left_by_a_dead_launcher(tmp_path, lost=_lost_job())
    report = report_of(tmp_path)
    job = report.jobs[0]
    assert job.facts.summary.outcome == "lost"
    assert job.facts.elapsed_s == pytest.approx(180)
    (implied,) = job.incidents
    assert (implied.event.cause, implied.event.steps_lost) == ("launcher", 80)
    assert (report.guarantee.n, report.guarantee.resolved) == (1, 0)
    assert job.time.lost_s["rollback"] == pytest.approx(80 * 0.5)
    assert [one.counts for one in job.economics.audits] == ["not served"]


def test_a_lost_job_that_was_resumed_is_counted_once(tmp_path: Path) -> None:
    heir = [
        *begin("heir", resumed_from="/c/100"),
        incident(1, 20, cause="launcher", served_by="checkpoint", steps_lost=80),
        end(300, 400),
    ]
    _as_left_by_a_dead_launcher(tmp_path, lost=_lost_job(), heir=heir)
    assert report_of(tmp_path).guarantee.n == 1
    assert report_of(tmp_path, job="lost").guarantee.n == 0


def test_a_launcher_killed_by_the_fault_plan_is_chaos(tmp_path: Path) -> None:
    fault = FaultInjected(fault="kill_launcher", rank=-1, step=1, point="", pid=1, **at(190))
    _as_left_by_a_dead_launcher(tmp_path, lost=[*_lost_job(), fault])
    guarantee = report_of(tmp_path).guarantee
    assert (guarantee.n, guarantee.apart["chaos"]) == (0, 1)


def test_a_running_job_is_reported_up_to_now(tmp_path: Path) -> None:
    write(tmp_path, j=[*begin("j"), progress(50, 100)])
    job = report_of(tmp_path, job="last").jobs[0]
    assert job.facts.summary.outcome == "running"
    assert job.time.elapsed_s == 86400.0


def test_a_job_with_nothing_but_its_first_event_is_all_start_up(tmp_path: Path) -> None:
    _as_left_by_a_dead_launcher(tmp_path, j=begin("j")[:1])
    job = report_of(tmp_path).jobs[0]
    assert (job.time.elapsed_s, job.time.ettr, job.time.goodput) == (0.0, None, None)
    assert "JOB" in render(report_of(tmp_path), detailed=False)
    assert page(report_of(tmp_path))


def test_jobs_are_chosen_by_id_prefix_last_project_and_age(tmp_path: Path) -> None:
    later = [dataclasses.replace(one, wall_s=one.wall_s + 3600) for one in begin("b-2")]
    write(
        tmp_path,
        **{"a-1": golden_job(), "b-1": begin("b-1"), "b-2": later},
    )
    assert [job.facts.summary.job for job in report_of(tmp_path, job="a").jobs] == ["a-1"]
    assert [job.facts.summary.job for job in report_of(tmp_path, job="last").jobs] == ["b-2"]
    assert [job.facts.summary.job for job in report_of(tmp_path, project="nlp").jobs] == ["a-1"]
    recent = report_of(tmp_path, since_wall_s=START + 1)
    assert [job.facts.summary.job for job in recent.jobs] == ["b-2"]
    with pytest.raises(JobNotFoundError, match="2 jobs begin with 'b-'") as several:
        report_of(tmp_path, job="b-")
    assert "b-1" in str(several.value.hint)
    with pytest.raises(JobNotFoundError, match="no job 'zzz'") as none:
        report_of(tmp_path, job="zzz")
    assert "b-2" in str(none.value.hint)


def test_a_job_called_last_can_be_reached(tmp_path: Path) -> None:
    ledger = write(tmp_path, last=begin("last"), newer=[])
    assert find_job(ledger.jobs(), "last", ledger).job == "last"


def test_totals_by_project_add_up(tmp_path: Path) -> None:
    write(tmp_path, a=golden_job(), b=[*begin("b"), progress(50, 9), end(100, 50)])
    report = report_of(tmp_path)
    assert set(report.by_project) == {"nlp", "default"}
    for name in ("gpu_hours", "lost_gpu_hours", "cost_usd", "saved_cost_usd"):
        parts = [getattr(one, name) for one in report.by_project.values()]
        assert sum(parts) == pytest.approx(getattr(report.totals, name))
    assert report.totals.ettr == pytest.approx((364 + 90) / 500)
    assert report.totals.jobs_without_energy == 1


def test_the_json_is_strict_and_holds_what_the_text_says(tmp_path: Path) -> None:
    nan = dataclasses.replace(progress(60, 90), loss=float("nan"))
    write(tmp_path, golden=[*golden_job(), nan])
    text = json.dumps(to_json(report_of(tmp_path)), allow_nan=False)
    found = json.loads(text)
    assert found["jobs"][0]["incidents"][0]["event"]["cause"] == "signal"
    assert found["jobs"][0]["incidents"][0]["counts_as"] == "failure"
    assert found["guarantee"]["n"] == 2
    assert found["totals"]["cost_usd"] == pytest.approx(5 * 400 / 3600 * 3)


def test_the_audit_can_be_followed_by_hand(tmp_path: Path) -> None:
    write(tmp_path, golden=golden_job())
    text = render(report_of(tmp_path), detailed=True, audit=True)
    assert "detected 12 + restart 10 + (240 - 100) x step 0.5 = 92 s" in text
    assert "saved   = 92 - 17 = 75 s x 4 ranks / 3600 = 0.0833333 GPU-h ($0.25)" in text
    assert "saved   = 0: chaos" in text


def test_the_page_is_self_contained_and_escapes_what_it_shows(tmp_path: Path) -> None:
    script = "<script>alert(1)</script>"
    evil = [*begin("evil", script=script, project='"<b>'), progress(20, 1), progress(30, 2)]
    evil.append(incident(1, 25, detail=script))
    write(tmp_path, evil=evil, golden=golden_job())
    text = page(report_of(tmp_path))
    assert "<script" not in text
    assert "http" not in text.replace("https://", "http")
    assert text.count("<svg") == text.count("</svg>") >= 4
    import xml.etree.ElementTree as ElementTree

    for part in text.split("<svg")[1:]:
        svg = "<svg" + part.split("</svg>")[0] + "</svg>"
        root = ElementTree.fromstring(svg)
        assert root.attrib["aria-label"]


# ---------------------------------------------------------------- the command


def _run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = main(["report", *words])
    out = capsys.readouterr()
    return code, out.out, out.err


def test_an_empty_ledger_gets_a_clear_word_and_a_hint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    home = str(tmp_path / "none")
    code, out, _ = _run(capsys, "--home", home)
    assert code == 0
    assert "No jobs" in out
    assert "hint: start one" in out
    code, out, _ = _run(capsys, "--home", home, "--json")
    assert (code, json.loads(out)["jobs"]) == (0, [])
    code, _, err = _run(capsys, "last", "--home", home)
    assert code == 1
    assert "hint:" in err
    assert not (tmp_path / "none").exists()


def test_the_command_prints_text_json_and_a_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, golden=golden_job())
    home = str(tmp_path)
    code, out, _ = _run(capsys, "gold", "--home", home, "--usd-per-gpu-hour", "3")
    assert code == 0
    assert "1. step 180: rank 1 failed (signal: SIGKILL)" in out
    assert "Cost $1.67" in out
    target = tmp_path / "r.html"
    code, out, err = _run(capsys, "--home", home, "--json", "--html", str(target))
    assert json.loads(out)["totals"]["cost_usd"] is None
    assert target.read_text().startswith("<!doctype html>")
    assert str(target) in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--since", "soon"], "neither a date nor a length of time"),
        (["--since", "0001-01-01"], "neither a date nor a length of time"),
        (["--country", "ATL"], "no carbon intensity is known"),
        (["--pue", "0.5"], "pue is 0.5"),
        (["--usd-per-gpu-hour", "nan"], "usd_per_gpu_hour is nan"),
        (["--html", "/proc/none/x.html"], "cannot be written"),
    ],
)
def test_bad_options_are_told_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    write(tmp_path, golden=golden_job())
    code, _, err = _run(capsys, "--home", str(tmp_path), *words)
    assert code == 2
    assert said in err


def test_settings_come_from_the_file_and_flags_go_over_them(tmp_path: Path) -> None:
    (tmp_path / "settings.toml").write_text(
        "[economics]\nusd_per_gpu_hour = 2.5\ncountry = 'swe'\npue = 1.3\n"
        "[economics.projects.nlp]\nusd_per_gpu_hour = 1\n"
        "[contract]\nstart = 2026-01-01\nfee_usd = 100\n"
        "[[budget]]\nname = 'b'\nmetric = 'gpu_hours'\nlimit = 3\n[other]\nx = 1\n"
    )
    found = prices.load(tmp_path, {"pue": 1.1, "country": None})
    assert found.prices_of("nlp").usd_per_gpu_hour == 1
    assert found.prices_of("cv").usd_per_gpu_hour == 2.5
    assert found.prices.intensity_g_per_kwh == 40.695
    assert found.prices.pue == 1.1
    assert found.contract.fee_usd == 100
    assert found.budgets[0].thresholds == (0.5, 0.8, 1.0)


@pytest.mark.parametrize(
    "text",
    [
        "economics = 3", "[economics]\nprice = 1", "[economics]\nusd_per_gpu_hour = 'x'",
        "[economics]\nusd_per_gpu_hour = -1", "[[budget]]\nname = 'b'", "not toml",
        "[[budget]]\nname='b'\nmetric='x'\nlimit=1", "[contract]\nshare = 2",
        "[contract]\nstart = 'May'", "budget = 3", "budget = [3]",
        "[[budget]]\nname='b'\nmetric='gpu_hours'\nlimit=1\nthresholds=3",
        "[contract]\nstart = 2026-01-01T10:00:00", "[economics.projects]\nnlp = 3",
        "[[budget]]\nname='b'\nmetric='gpu_hours'\nlimit=1\nwebhook='file:///etc'",
    ],
)  # fmt: skip
def test_bad_settings_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    (tmp_path / "settings.toml").write_text(text)
    code, _, err = _run(capsys, "--home", str(tmp_path))
    assert code == 2
    assert err.startswith("error: ")


def test_incident_and_job_started_keep_the_fields_the_report_reads() -> None:
    # An older ledger must stay readable: these names are its format.
    assert {"steps_lost", "pause_s", "detected_s", "digest_before", "chaos", "planned"} <= {
        field.name for field in dataclasses.fields(Incident)
    }
    assert {"resumed_from", "project"} <= {field.name for field in dataclasses.fields(JobStarted)}
