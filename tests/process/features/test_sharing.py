"""Several processes at one row store: each row is computed once, and death does no harm."""

import multiprocessing
import os
import random
import signal
import time

import numpy as np
import pytest
import torch
from torch import nn

from trainonce.graph.features.evaluate import features
from trainonce.graph.features.rows import RowTable
from trainonce.graph.features.samples import array_digests

NUM = 4096
X = torch.randn(NUM, 8, generator=torch.Generator().manual_seed(0))
CONTEXT = multiprocessing.get_context("fork")


def encoder():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 16)).eval()


@pytest.fixture(autouse=True)
def one_thread():
    """Forked children must not inherit a thread pool."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def truth():
    with torch.no_grad():
        return encoder()(X)


def run(target, *args):
    """Start a child that returns a value through a queue."""
    queue = CONTEXT.SimpleQueue()
    process = CONTEXT.Process(target=lambda: queue.put(target(*args)))
    process.start()
    return process, queue


def report_of(store, start, stop, begin):
    begin.wait()
    report = features(encoder(), X[start:stop], batch_size=16, store=store).report
    return report.hits, report.computed, report.computed_elsewhere


def together(store, *parts):
    begin = CONTEXT.Event()
    children = [run(report_of, store, start, stop, begin) for start, stop in parts]
    begin.set()
    reports = [queue.get() for _, queue in children]
    for process, _ in children:
        process.join()
        assert process.exitcode == 0
    return reports


def assert_all_rows_are_true(store, truth):
    rows = features(encoder(), X, batch_size=16, store=store)
    torch.testing.assert_close(rows.batch(range(NUM)), truth)
    assert rows._table.damaged_rows == 0
    return rows.report


def test_four_processes_that_want_the_same_rows_compute_each_once(tmp_path, truth):
    features(encoder(), X[:2], store=tmp_path / "warm")  # children find the trace in memory
    reports = together(tmp_path, *[(0, NUM)] * 4)
    assert sum(computed for _, computed, _ in reports) == NUM
    assert all(sum(report) == NUM for report in reports)
    assert assert_all_rows_are_true(tmp_path, truth).computed == 0


def test_overlapping_sets_are_computed_once_too(tmp_path, truth):
    reports = together(tmp_path, (0, 2500), (1000, 3500), (2000, NUM))
    assert sum(computed for _, computed, _ in reports) == NUM
    assert assert_all_rows_are_true(tmp_path, truth).computed == 0


class Stopping(nn.Module):
    """Says that it is being called, and then never returns."""

    def __init__(self, fd):
        super().__init__()
        self.layers = encoder()
        self.fd = fd

    def forward(self, x):
        os.write(self.fd, b"!")
        signal.pause()
        return self.layers(x)


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = encoder()

    def forward(self, x):
        return self.layers(x)


Plain.__qualname__ = Stopping.__qualname__


def test_rows_claimed_by_a_process_that_was_killed_are_computed_by_another(
    tmp_path, truth, monkeypatch
):
    from trainonce.graph.features import dataset

    # The comparison of rows would call the module before any row is claimed.
    monkeypatch.setattr(dataset, "check_rows_independent", lambda *_: None)
    read_fd, write_fd = os.pipe()
    child, _ = run(
        lambda: features(Stopping(write_fd), X, batch_size=16, store=tmp_path, version="1")
    )
    assert os.read(read_fd, 1) == b"!", "the child is inside a chunk that it claimed"
    assert len(list(tmp_path.rglob("*.claim"))) == 1
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    assert child.exitcode == -signal.SIGKILL
    rows = features(Plain(), X, batch_size=16, store=tmp_path, version="1")
    assert rows.report.computed == NUM
    torch.testing.assert_close(rows.batch(range(NUM)), truth)
    assert not list(tmp_path.rglob("*.claim"))
    os.close(read_fd)
    os.close(write_fd)


def kill_often(tmp_path, truth, num_kills, seed):
    """Kill writers at random instants; return how many died before they were done."""
    generator = random.Random(seed)
    features(encoder(), X[:2], store=tmp_path / "warm")  # traced before the first fork
    started = time.perf_counter()
    name = features(encoder(), X, batch_size=16, store=tmp_path / "whole").fingerprint.digest
    usual_s = time.perf_counter() - started
    died = 0
    for turn in range(num_kills):
        # Two lives for each store, so that every other one finds what its forerunner left.
        store = tmp_path / f"store{turn // 2}"
        process, _ = run(lambda at: features(encoder(), X, batch_size=16, store=at).report, store)
        time.sleep(generator.uniform(0.0, 0.6 * usual_s))  # the random instant itself
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        died += process.exitcode == -signal.SIGKILL
        assert_what_is_there_is_true(RowTable(store / "rows" / name[:40], name), truth)
    for store in sorted(tmp_path.glob("store*")):
        assert_all_rows_are_true(store, truth)
    return died


def assert_what_is_there_is_true(table, truth):
    slots = table.locate(array_digests([("0", X)]))
    there = np.flatnonzero(slots >= 0)
    if len(there):
        assert len(table.damaged(slots[there])) == 0
        torch.testing.assert_close(table.take(slots[there])[0], truth[torch.from_numpy(there)])


def test_a_kill_at_any_instant_leaves_only_true_rows(tmp_path, truth):
    assert kill_often(tmp_path, truth, 16, seed=1) >= 4, "most were killed while at work"


@pytest.mark.slow
def test_hundreds_of_kills_leave_only_true_rows(tmp_path, truth):
    assert kill_often(tmp_path, truth, 300, seed=2) >= 75
