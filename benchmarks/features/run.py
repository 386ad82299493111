"""Measure the row store and what frozen features save; see README.md.

    python benchmarks/features/run.py [--quick] [--only PART] [--out results/NAME.json]

LMDB and Hugging Face datasets are measured where they are installed. All comparisons are
ratios within one run, with the baseline measured in turns with what it is compared to.
"""

import argparse
import copy
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness import default_hardware, read_result, result_path, table, write_result

import trainonce as once
from trainonce.graph.features.rows import RowTable
from trainonce.graph.features.segments import Column, Rows

CONTEXT = multiprocessing.get_context("fork")
BATCH = 256


# ---------------------------------------------------------------- reading


def read_rows(folder, dim, num_rows, repeats):
    """Warm random batches of fp16 rows from several backends, in turns."""
    values = torch.randn(num_rows, dim).half()
    names = np.array([os.urandom(16) for _ in range(num_rows)], "S16")
    readers, first_pass = open_backends(folder, values, names)
    order = np.random.default_rng(1).permutation(num_rows)
    batches = [order[i : i + BATCH] for i in range(0, num_rows - BATCH + 1, BATCH)]
    for name, read in readers.items():
        got = np.asarray(read(batches[0]), np.float16).reshape(BATCH, dim)
        assert np.array_equal(got, values.numpy()[batches[0]]), name
    seconds = {name: [] for name in readers}
    for _ in range(repeats):
        for name, read in readers.items():
            few = batches[: max(4, len(batches) // 10)] if name in SLOW else batches
            # The thread's own time: all is in memory, and other programs are not what is compared.
            started = time.thread_time()
            for batch in few:
                read(batch)
            seconds[name].append((time.thread_time() - started) / (len(few) * BATCH))
    base = seconds["memmap np.take"]
    return {
        "dim": dim,
        "num_rows": num_rows,
        "row_bytes": 2 * dim,
        "rows_first_pass_with_check_relative_to_memmap": statistics.median(base) / first_pass,
        "seconds_per_row": seconds,
        "relative_to_memmap": {
            name: statistics.median(b / s for b, s in zip(base, times, strict=True))
            for name, times in seconds.items()
        },
    }


SLOW = {"arrow take over chunks", "lmdb", "hugging face datasets"}


def open_backends(folder, values, names):
    num_rows, dim = values.shape
    stored = RowTable(folder / "rows", "bench")
    for start in range(0, num_rows, 4096):
        part = slice(start, start + 4096)
        stored.put(Rows(names[part], (Column("", "float16", (dim,)),), (values[part],)))
    slots = stored.locate(names)
    np.save(folder / "memmap.npy", values.numpy())
    mapped = np.load(folder / "memmap.npy", mmap_mode="r")
    mapped[:].sum()
    started = time.thread_time()
    order = np.random.default_rng(0).permutation(num_rows)
    for start in range(0, num_rows, BATCH):
        chosen = slots[order[start : start + BATCH]]
        assert len(stored.damaged(chosen)) == 0
        stored.take(chosen)
    first_pass = (time.thread_time() - started) / num_rows

    def rows(batch):
        chosen = slots[batch]
        stored.damaged(chosen)
        return stored.take(chosen)[0]

    readers = {
        "memmap np.take": lambda batch: np.take(mapped, batch, axis=0, mode="clip"),
        "trainonce rows": rows,
    }
    arrow(folder, values, readers)
    if importlib.util.find_spec("lmdb"):
        lmdb_reader(folder, values, readers)
    if importlib.util.find_spec("datasets"):
        hugging_face(folder, readers)
    return readers, first_pass


def arrow(folder, values, readers):
    import pyarrow as pa

    num_rows, dim = values.shape
    schema = pa.schema([("f", pa.list_(pa.float16(), dim))])
    for name, step in (("one", num_rows), ("many", 1024)):
        with pa.OSFile(str(folder / f"{name}.arrow"), "wb") as sink, \
             pa.ipc.new_file(sink, schema) as writer:  # fmt: skip
            for start in range(0, num_rows, step):
                flat = pa.array(values[start : start + step].reshape(-1).numpy())
                column = pa.FixedSizeListArray.from_arrays(flat, dim)
                writer.write_batch(pa.record_batch([column], schema=schema))
    one, many = (
        pa.ipc.open_file(pa.memory_map(str(folder / f"{name}.arrow"))).read_all().column("f")
        for name in ("one", "many")
    )
    view = one.chunk(0).flatten().to_numpy().reshape(num_rows, dim)
    readers["arrow, one batch as numpy"] = lambda batch: view[batch]
    readers["arrow take over chunks"] = lambda batch: (
        many.take(pa.array(batch)).combine_chunks().flatten().to_numpy()
    )


def lmdb_reader(folder, values, readers):
    import lmdb

    num_rows, dim = values.shape
    environment = lmdb.open(str(folder / "lmdb"), map_size=values.nbytes * 4 + (1 << 28))
    with environment.begin(write=True) as transaction:
        for row in range(num_rows):
            transaction.put(row.to_bytes(8, "big"), values[row].numpy().tobytes())

    def read(batch):
        out = np.empty((len(batch), dim), np.float16)
        with environment.begin(buffers=True) as transaction:
            for place, row in enumerate(batch.tolist()):
                out[place] = np.frombuffer(transaction.get(row.to_bytes(8, "big")), np.float16)
        return out

    readers["lmdb"] = read


def hugging_face(folder, readers):
    import datasets
    import pyarrow as pa

    many = pa.ipc.open_file(pa.memory_map(str(folder / "many.arrow"))).read_all()
    data = datasets.Dataset(datasets.table.InMemoryTable(many)).with_format("arrow")
    readers["hugging face datasets"] = lambda batch: (
        data[batch.tolist()].column("f").combine_chunks().flatten().to_numpy()
    )


# ---------------------------------------------------------------- sharing


def evaluate(values, counter):
    with open(counter, "ab", buffering=0) as file:
        file.write(b"x" * len(values))
    time.sleep(0.02)  # what a batch takes, so that processes meet
    return np.tanh(values)


def share_rows(folder, counter):
    # What is computed is counted by the runtime itself; the encoder is traced by torch.export.
    rows = once.features(
        nn.Sequential(nn.Linear(16, 256), nn.Tanh(), nn.Linear(256, 16)).eval(),
        torch.arange(32 * 64 * 16.0).view(-1, 16), batch_size=32, store=folder,
    )  # fmt: skip
    with open(counter, "ab", buffering=0) as file:
        file.write(b"x" * rows.report.computed)


def share_nothing(folder, counter):
    """The same, each process with a store of its own."""
    own = Path(folder) / str(os.getpid())
    own.mkdir()
    share_rows(str(own), counter)


def share_joblib(folder, counter):
    import joblib

    cached = joblib.Memory(folder, verbose=0).cache(evaluate, ignore=["counter"])
    for part in np.arange(32 * 64 * 16.0).reshape(64, 32, 16):
        cached(part, counter)


def share_hugging_face(folder, counter):
    import datasets

    datasets.disable_progress_bars()
    data = datasets.Dataset.from_file(str(Path(folder) / "data.arrow"))
    data.map(
        lambda part: {"y": evaluate(np.asarray(part["x"]), counter)},
        batched=True, batch_size=32, cache_file_name=str(Path(folder) / "mapped.arrow"),
    )  # fmt: skip


def count_evaluations(folder, target):
    folder.mkdir()
    counter = str(folder / "counter")
    begin = CONTEXT.Event()

    def child():
        torch.manual_seed(0)
        torch.set_num_threads(1)
        begin.wait()
        target(str(folder / "cache"), counter)

    (folder / "cache").mkdir()
    if target is share_hugging_face:
        import datasets

        made = datasets.Dataset.from_dict({"x": np.arange(32 * 64 * 16.0).reshape(-1, 16)})
        made.save_to_disk(str(folder / "made"))
        os.rename(next((folder / "made").glob("*.arrow")), folder / "cache" / "data.arrow")
    processes = [CONTEXT.Process(target=child) for _ in range(4)]
    for process in processes:
        process.start()
    begin.set()
    for process in processes:
        process.join()
    failed = sum(process.exitcode != 0 for process in processes)
    files = [path for path in (folder / "cache").rglob("*") if path.is_file()]
    return {
        "evaluations": os.path.getsize(counter),
        "samples": 32 * 64,
        "failed": failed,
        "bytes_on_disk": sum(path.stat().st_blocks * 512 for path in files),
    }


def sharing(folder):
    targets = {
        "trainonce": share_rows,
        "trainonce, a store for each process": share_nothing,
        "joblib.Memory": share_joblib,
    }
    if importlib.util.find_spec("datasets"):
        targets["hugging face datasets.map"] = share_hugging_face
    found = {}
    for name, target in targets.items():
        found[name] = count_evaluations(folder / name.replace(" ", "_"), target)
        found[name]["per_sample"] = found[name]["evaluations"] / found[name]["samples"]
    return found


# ---------------------------------------------------------------- training on real data


def load_example(name):
    path = Path(__file__).parents[2] / "examples" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"example_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def measured(work):
    """Return what `work` returns, its FLOPs and its CPU seconds, all threads of the process."""
    # Counting FLOPs costs time of its own, so it is a run apart.
    with FlopCounterMode(display=False) as counter:
        work()
    started = time.process_time()
    result = work()
    return result, counter.get_total_flops(), time.process_time() - started


def train(model, loader, loss_of, epochs, seed):
    torch.manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(epochs):
        for batch in loader:
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            optimizer.step()
    return model


def traced(module, dataset, folder):
    """Trace the module before anything is counted; return the CPU seconds that took."""
    started = time.process_time()
    first = TensorDataset(*(tensor[:2] for tensor in dataset.tensors))
    once.features(module, first, batch_size=128, store=tempfile.mkdtemp(dir=folder))
    return time.process_time() - started


def compare(name, recompute, reuse, details):
    (plain, plain_flops, plain_s), (ours, flops, cpu_s) = measured(recompute), measured(reuse)
    gap = max(
        ((a - b).abs().max() / b.abs().max()).item()
        for one, other in zip(ours, plain, strict=True)
        for a, b in zip(one.parameters(), other.parameters(), strict=True)
    )
    print(f"{name}: {plain_flops / flops:.1f}x fewer FLOPs, {plain_s / cpu_s:.1f}x less CPU "
          f"time, parameters differ by {gap:.1e}", flush=True)  # fmt: skip
    return {
        **details,
        "recompute_flops": plain_flops, "reuse_flops": flops, "flops_ratio": plain_flops / flops,
        "recompute_cpu_s": plain_s, "reuse_cpu_s": cpu_s, "cpu_ratio": plain_s / cpu_s,
        "cpu_ratio_tracing_included": plain_s / (cpu_s + details["tracing_once_cpu_s"]),
        "largest_relative_difference_of_parameters": gap,
    }  # fmt: skip


def heads(folder, epochs):
    """4 monotone heads x 10 epochs on frozen convolutions, each head a run of its own."""
    example = load_example("04_frozen_features")
    data = load_digits()
    images = torch.from_numpy(data.images).float()[:, None] / 16
    model = example.train_classifier(images, torch.from_numpy(data.target))
    frozen = model.convolutions.requires_grad_(False)
    dataset = TensorDataset(images, images.mean((1, 2, 3)))
    torch.manual_seed(0)
    fresh = [example.MonotoneHead(width) for width in (4, 8, 16, 32)]

    def recompute():
        def loss_of(head, batch):
            with torch.no_grad():
                features = frozen(batch[0])
            return nn.functional.mse_loss(head(features), batch[1])

        loader = DataLoader(dataset, batch_size=128, shuffle=True)
        return [train(copy.deepcopy(head), loader, loss_of, epochs, 1) for head in fresh]

    def reuse():
        # An empty store each time: what is counted includes computing the features once.
        store = tempfile.mkdtemp(dir=folder)
        trained = []
        for head in fresh:
            rows = once.features(frozen, dataset, batch_size=128, store=store)
            loader = DataLoader(rows, batch_size=128, shuffle=True, collate_fn=rows.collate)
            trained.append(
                train(copy.deepcopy(head), loader,
                      lambda h, b: nn.functional.mse_loss(h(b[0]), b[1]), epochs, 1)
            )  # fmt: skip
        return trained

    details = {"heads": len(fresh), "epochs": epochs,
               "tracing_once_cpu_s": traced(frozen, dataset, folder)}  # fmt: skip
    return compare("heads", recompute, reuse, details)


def distillation(folder, epochs):
    """3 students x 10 epochs on the logits of one teacher."""
    example = load_example("04_frozen_features")
    data = load_digits()
    images = torch.from_numpy(data.images).float()[:, None] / 16
    digits = torch.from_numpy(data.target)
    teacher = example.train_classifier(images, digits).requires_grad_(False)
    dataset = TensorDataset(images, images)
    students = []
    for width in (8, 16, 32):
        torch.manual_seed(width)
        students.append(
            nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))
        )

    def divergence(student, inputs, logits):
        wanted = (logits / 2).softmax(1)
        return -(wanted * (student(inputs) / 2).log_softmax(1)).sum(1).mean()

    def recompute():
        def loss_of(student, batch):
            with torch.no_grad():
                logits = teacher(batch[0])
            return divergence(student, batch[1], logits)

        loader = DataLoader(dataset, batch_size=128, shuffle=True)
        return [train(copy.deepcopy(s), loader, loss_of, epochs, 2) for s in students]

    def reuse():
        store = tempfile.mkdtemp(dir=folder)
        trained = []
        for student in students:
            rows = once.features(teacher, dataset, batch_size=128, store=store)
            loader = DataLoader(rows, batch_size=128, shuffle=True, collate_fn=rows.collate)
            trained.append(
                train(copy.deepcopy(student), loader,
                      lambda s, b: divergence(s, b[1], b[0]), epochs, 2)
            )  # fmt: skip
        return trained

    details = {"students": 3, "epochs": epochs,
               "tracing_once_cpu_s": traced(teacher, dataset, folder)}  # fmt: skip
    return compare("distillation", recompute, reuse, details)


# ---------------------------------------------------------------- preference training


def preference(folder, epochs):
    """3 runs of direct preference optimisation (Rafailov et al., 2023) against one reference."""
    example = load_example("08_preference_training")
    # The fused kernel of transformer layers is not seen by the counter of FLOPs.
    torch.backends.mha.set_fastpath_enabled(False)
    pairs = example.preference_pairs(512)
    reference = example.train_reference(pairs)
    frozen = example.LogProbabilities(reference).eval()
    dataset = TensorDataset(pairs, pairs)
    loss_of = example.preference_loss

    def policies():
        return [(example.policy_of(reference), beta) for beta in example.BETAS]

    def recompute():
        def loss(beta):
            def one(policy, batch):
                with torch.no_grad():
                    logs = frozen(batch[0])
                return loss_of(policy(batch[1]), logs, beta)

            return one

        loader = DataLoader(dataset, batch_size=128, shuffle=True)
        return [train(policy, loader, loss(beta), epochs, 3) for policy, beta in policies()]

    def reuse():
        store = tempfile.mkdtemp(dir=folder)
        trained = []
        for policy, beta in policies():
            rows = once.features(frozen, dataset, batch_size=128, store=store)
            loader = DataLoader(rows, batch_size=128, shuffle=True, collate_fn=rows.collate)
            trained.append(
                train(policy, loader, lambda p, b, beta=beta: loss_of(p(b[1]), b[0], beta),
                      epochs, 3)
            )  # fmt: skip
        return trained

    details = {"runs": len(example.BETAS), "epochs": epochs,
               "tracing_once_cpu_s": traced(frozen, dataset, folder)}  # fmt: skip
    return compare("preference", recompute, reuse, details)


# ---------------------------------------------------------------- all of it


def reading(folder, options):
    found = []
    for dim in (1024, 4096):
        (folder / f"read{dim}").mkdir()
        rows = options.num_rows // (dim // 1024)
        found.append(read_rows(folder / f"read{dim}", dim, rows, options.repeats))
        print(json.dumps(found[-1]["relative_to_memmap"], indent=1), flush=True)
    return found


PARTS = {
    "reading": reading,
    "sharing": lambda folder, options: sharing(folder),
    "heads": lambda folder, options: heads(folder, options.epochs),
    "distillation": lambda folder, options: distillation(folder, options.epochs),
    "preference": lambda folder, options: preference(folder, max(2, options.epochs // 3)),
}


def versions():
    names = ("numpy", "pyarrow", "lmdb", "datasets", "joblib")
    return {n: importlib.metadata.version(n) for n in names if importlib.util.find_spec(n)}


def show(result):
    """Print the tables of the README."""
    if "reading" in result:
        narrow, wide = result["reading"]
        rows = [
            (name, *(f"{part['relative_to_memmap'][name]:.2f}" for part in (narrow, wide)))
            for name in narrow["relative_to_memmap"]
        ]
        checked = "rows_first_pass_with_check_relative_to_memmap"
        rows.append(("trainonce rows, first pass with every row checked",
                     f"{narrow[checked]:.2f}", f"{wide[checked]:.2f}"))  # fmt: skip
        print(table([("backend", "2 KB", "8 KB"), *rows]), end="\n\n")
    if "sharing" in result:
        rows = [
            (name, f"{one['per_sample']:.2f}", f"{one['bytes_on_disk'] / 1e6:.2f} MB")
            for name, one in result["sharing"].items()
        ]
        print(table([("4 processes at once", "evaluations a sample", "on disk"), *rows]))
        print()
    rows = [
        (
            name,
            f"{one['flops_ratio']:.1f}× less",
            f"{one['cpu_ratio']:.1f}× less",
            f"{one['cpu_ratio_tracing_included']:.1f}× less",
            f"{one['largest_relative_difference_of_parameters']:.0e}",
        )
        for name in ("heads", "distillation", "preference")
        if (one := result.get(name))
    ]
    head = ("case", "FLOPs", "CPU time", "with tracing once", "parameters differ by")
    print(table([head, *rows]))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a small run, to see that it works")
    parser.add_argument("--only", choices=PARTS, help="this part; added to the commit's result")
    parser.add_argument("--show", type=Path, help="print the tables of a result, and end")
    parser.add_argument("--out", type=Path, help="where to write the result; results/DATE_...")
    options = parser.parse_args()
    if options.show:
        show(read_result(options.show))
        return
    torch.set_num_threads(1)
    torch.manual_seed(0)
    sizes = (5_000, 3, 2) if options.quick else (50_000, 15, 10)
    options.num_rows, options.repeats, options.epochs = sizes
    path = options.out or result_path(__file__, default_hardware())
    result = read_result(path)
    result["versions"] = versions()
    result["config"] = {
        "batch": BATCH, "num_rows": options.num_rows, "repeats": options.repeats,
        "epochs": options.epochs, "threads": 1,
    }  # fmt: skip
    for name in [options.only] if options.only else PARTS:
        with tempfile.TemporaryDirectory() as folder:
            result[name] = PARTS[name](Path(folder), options)
        write_result(path, result)
    show(result)
    print(path)


if __name__ == "__main__":
    main()
