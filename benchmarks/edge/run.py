"""Heads on cached features and a stream of frames, on one core within limits; see README.md.

python benchmarks/edge/run.py [--quick] [--out FILE]
"""

import argparse
import copy
import datetime
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import trainonce as once
from trainonce.graph.features import tables

sys.path.insert(0, str(Path(__file__).parents[1]))
from harness import commit, machine

BUDGET_BYTES = 3 << 20
MEMORY_BYTES = 64 << 20


def resident():
    """Return the anonymous memory of this process in bytes: what the kernel cannot drop."""
    text = Path("/proc/self/status").read_text()
    return int(text.split("RssAnon:")[1].split()[0]) * 1024


def disk(folder):
    return sum(tables.size_of(path) for path in Path(folder).rglob("*") if path.is_file())


def fine_tune(epochs):
    data = load_digits()
    images = torch.from_numpy(data.images).float()[:, None] / 16
    digits = torch.from_numpy(data.target)
    torch.manual_seed(0)
    backbone = nn.Sequential(
        nn.Upsample(scale_factor=4), nn.Conv2d(1, 32, 3), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
    ).eval().requires_grad_(False)  # fmt: skip
    heads = [nn.Linear(256, 10) for _ in range(3)]

    def train(head, loader, encode):
        torch.manual_seed(1)
        optimizer = torch.optim.Adam(head.parameters(), lr=1e-2)
        for _ in range(epochs):
            for x, y in loader:
                optimizer.zero_grad()
                nn.functional.cross_entropy(head(encode(x)), y).backward()
                optimizer.step()
        return head

    plain = TensorDataset(images, digits)
    started = time.process_time()
    expected = [
        train(copy.deepcopy(h), DataLoader(plain, 64, shuffle=True), lambda x: backbone(x))
        for h in heads
    ]
    plain_s = time.process_time() - started
    with tempfile.TemporaryDirectory() as folder:
        # Tracing the backbone, once for each device, is apart: its memory is torch.export's.
        started = time.process_time()
        first = TensorDataset(images[:2], digits[:2])
        once.features(backbone, first, batch_size=64, store=folder, budget_bytes=BUDGET_BYTES)
        tracing_s, before = time.process_time() - started, resident()
        peak = before
        started = time.process_time()
        got = []
        for head in heads:
            rows = once.features(
                backbone, plain, batch_size=64, store=folder, budget_bytes=BUDGET_BYTES
            )
            loader = DataLoader(rows, 64, shuffle=True, collate_fn=rows.collate)
            got.append(train(copy.deepcopy(head), loader, lambda x: x))
            peak = max(peak, resident())
        ours_s = time.process_time() - started
        found = disk(folder)
    gap = max(
        ((a - b).abs().max() / b.abs().max()).item()
        for one, other in zip(got, expected, strict=True)
        for a, b in zip(one.parameters(), other.parameters(), strict=True)
    )
    return {
        "heads": len(heads), "epochs": epochs, "plain_cpu_s": plain_s, "cached_cpu_s": ours_s,
        "cpu_ratio": plain_s / ours_s, "tracing_once_cpu_s": tracing_s,
        "cpu_ratio_tracing_included": plain_s / (ours_s + tracing_s),
        "budget_bytes": BUDGET_BYTES, "disk_bytes": found, "memory_limit_bytes": MEMORY_BYTES,
        "memory_added_bytes": peak - before, "within_limits": found <= BUDGET_BYTES
        and peak - before <= MEMORY_BYTES, "largest_relative_difference_of_parameters": gap,
    }  # fmt: skip


def stream(num_frames):
    """A camera that mostly sees the same: 12 scenes, each for many frames, some with noise."""
    data = load_digits()
    scenes = torch.from_numpy(data.images[:12]).float()[:, None] / 16
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Upsample(scale_factor=8), nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3),
        nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 10),
    ).eval()  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name, noise, options in (
        ("equal frames", 0.0, {}),
        ("noisy frames, exact", 1e-3, {}),
        ("noisy frames, step 0.05, tolerance 0.05", 1e-3,
         {"step": 0.05, "tolerance": 0.05, "audit": 0.05}),
    ):  # fmt: skip
        chosen = [scenes[(number // 25) % 12] for number in range(num_frames)]
        frames = [s + noise * torch.rand(s.shape, generator=generator) for s in chosen]
        serve = once.FrameCache(model, max_bytes=1 << 20, **options)
        serve(frames[0])  # traces the model
        started = time.process_time()
        served = [serve(frame) for frame in frames]
        cached_s = time.process_time() - started
        started = time.process_time()
        with torch.no_grad():
            plain = [model(frame[None])[0] for frame in frames]
        plain_s = time.process_time() - started
        worst = max(
            ((a - b).abs().max() / b.abs().max()).item() for a, b in zip(served, plain, strict=True)
        )
        report = serve.report
        found[name] = {
            "frames": report.frames, "computed": report.computed, "hits": report.hits,
            "near_hits": report.near_hits, "audited": report.audited,
            "worst_audit": report.worst, "worst_of_all": worst, "ended": report.ended,
            "cpu_ratio": plain_s / cached_s, "bytes": serve.size_bytes,
        }  # fmt: skip
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a small run, to see that it works")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    result = {
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "commit": commit(), "machine": machine(), "config": {"cores": 1},
        "fine_tune": fine_tune(2 if options.quick else 5),
        "stream": stream(100 if options.quick else 600),
    }  # fmt: skip
    print(json.dumps({k: result[k] for k in ("fine_tune", "stream")}, indent=1))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
