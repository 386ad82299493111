"""How much of training a checkpoint in the background stops, by the way it is written.

One thread stands for training: it does a short fixed piece of Python work over and over. While
a checkpoint of the same tensors is written in the background, its longest stop and the number of
pieces it got done are compared with the same time span without a write, in the same run.
"""

import argparse
import datetime
import json
import os
import platform
import subprocess
import tempfile
import threading
import time
import warnings
from pathlib import Path

import safetensors
import torch
import torch.distributed.checkpoint as dcp

from trainonce.checkpoint.saver import AsyncSaver
from trainonce.checkpoint.store import CheckpointStore


def trainonce_saver(state: dict[str, torch.Tensor], folder: str) -> None:
    saver = AsyncSaver(CheckpointStore(folder))
    saver._buffers = dict(state)  # the copy is training's own time; here it is not measured
    saver._stage = lambda _state: dict(state)
    saver.save(1, rank=0, world_size=1, nonce="a", rank_payload=b"", state=state, model_names=state)
    saver.wait()


def hf_writer(state: dict[str, torch.Tensor], folder: str) -> None:
    dcp.save(state, storage_writer=dcp.HuggingFaceStorageWriter(folder), no_dist=True)


def filesystem_writer(state: dict[str, torch.Tensor], folder: str) -> None:
    dcp.save(state, storage_writer=dcp.FileSystemWriter(folder), no_dist=True)


WAYS = {
    "trainonce (AsyncSaver)": trainonce_saver,
    "dcp HuggingFaceStorageWriter": hf_writer,
    "dcp FileSystemWriter": filesystem_writer,
}


def piece_of_work() -> int:
    return sum(range(2000))


def train_while(alive) -> tuple[int, float, float]:
    """Return (pieces done, longest stop in seconds, span in seconds) until `alive()` is false."""
    begun_s = last_s = time.perf_counter()
    pieces, longest_s = 0, 0.0
    while alive():
        piece_of_work()
        now_s = time.perf_counter()
        longest_s = max(longest_s, now_s - last_s)
        last_s = now_s
        pieces += 1
    return pieces, longest_s, last_s - begun_s


def measure(way, state: dict[str, torch.Tensor]) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        thread = threading.Thread(target=way, args=(state, folder))
        thread.start()
        pieces, longest_s, span_s = train_while(thread.is_alive)
        thread.join()
    end_s = time.perf_counter() + span_s
    alone, longest_alone_s, _ = train_while(lambda: time.perf_counter() < end_s)
    return {
        "write_s": span_s,
        "longest_stop_s": longest_s,
        "longest_stop_without_write_s": longest_alone_s,
        "work_done_share": pieces / alone,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--mib", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--hardware", default=f"{os.cpu_count()}-core-cpu")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    state = {f"model.{i}": torch.randn(1 << 21) for i in range(args.mib // 8)}
    repeats = {name: [] for name in WAYS}
    for _ in range(args.repeats):
        for name, way in WAYS.items():
            repeats[name].append(measure(way, state))
    commit = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], text=True).strip()
    result = {
        "config": vars(args),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "safetensors": safetensors.__version__,
        },
        "commit": commit,
        "repeats": repeats,
    }
    date = datetime.datetime.now(tz=datetime.UTC).date()
    path = Path(__file__).parent / "results" / f"{date}_{args.hardware}_{commit}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    for name, runs in repeats.items():
        longest = sorted(run["longest_stop_s"] for run in runs)[len(runs) // 2]
        share = sorted(run["work_done_share"] for run in runs)[len(runs) // 2]
        write = sorted(run["write_s"] for run in runs)[len(runs) // 2]
        print(f"{name:30} write {write:.2f} s, longest stop {longest * 1e3:.1f} ms, {share:.2f}")


if __name__ == "__main__":
    main()
