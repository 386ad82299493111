"""Nodes and `compute`: what runs, how often, and what is refused."""

import concurrent.futures
import copy
import dataclasses
import importlib
import importlib.resources
import os
import pkgutil
import random
import sqlite3
import threading
import time

import numpy as np
import pytest
import torch

import trainonce as once
from trainonce.clock import FakeClock
from trainonce.errors import (
    ConfigError,
    GraphError,
    InputFileError,
    InputMutatedError,
    LazyNodeError,
    NodeError,
)
from trainonce.graph import executor
from trainonce.graph.places import Place
from trainonce.graph.store import Store
from trainonce.graph.why import why

# Nodes count their evaluations here. It is no part of their keys: they reach it by a function of
# this module that `ignore`s nothing but is itself of a declared version.
COUNTS: dict[str, int] = {}
_lock = threading.Lock()


def count(name):
    with _lock:
        COUNTS[name] = COUNTS.get(name, 0) + 1


@once.node(version="1")
def double(x):
    count("double")
    return x * 2


@once.node(version="1")
def add(a, b=0):
    count("add")
    return a + b


@once.node(version="1")
def make(n):
    count("make")
    return np.arange(n, dtype=np.float32)


@pytest.fixture(autouse=True)
def _fresh_counts():
    COUNTS.clear()


@pytest.fixture
def store(tmp_path):
    return once.open_store(tmp_path / "store")


def test_nothing_runs_before_compute_and_each_distinct_node_runs_once(store):
    a = make(4)
    heads = [add(double(a), b) for b in (1, 2, 2)]
    assert COUNTS == {}
    first = once.compute(*heads, store=store)
    assert COUNTS == {"make": 1, "double": 1, "add": 2}
    assert [value.tolist() for value in first] == [[1, 3, 5, 7], [2, 4, 6, 8], [2, 4, 6, 8]]
    again = once.compute([add(double(make(4)), b) for b in (1, 2)], store=store)
    assert COUNTS == {"make": 1, "double": 1, "add": 2}
    assert np.array_equal(again[0], first[0])


def test_defaults_and_names_of_arguments_do_not_make_another_node(store):
    once.compute(add(1), add(1, 0), add(a=1, b=0), add(b=0, a=1), store=store)
    assert COUNTS == {"add": 1}


def test_a_value_and_a_node_that_gives_it_are_the_same_input(store):
    value = once.compute(make(3), store=store)
    once.compute(double(make(3)), double(value), store=store)
    assert COUNTS == {"make": 1, "double": 1}


def test_a_change_upstream_that_gives_the_same_bytes_stops_there(store):
    once.compute(double(add(1, 2)), store=store)
    once.compute(double(add(2, 1)), store=store)
    assert COUNTS == {"add": 2, "double": 1}


def test_inputs_of_a_hit_are_not_read(store):
    node = double(make(5))
    once.compute(node, store=store)
    for name in list(store.blobs.names()):
        if (
            store.blobs.name_of(bytes(store.blobs.get(name)))
            == store.lookup(why(make(5), store=store).key).blob
        ):
            store.blobs.remove(name)
    once.compute(double(make(5)), store=store)
    assert COUNTS == {"make": 1, "double": 1}


def test_containers_and_dataclasses_may_hold_nodes(store):
    @dataclasses.dataclass
    class Pair:
        left: object
        right: object

    @once.node(version="1")
    def total(items, pair, table):
        return sum(items) + pair.left * pair.right + table["x"]

    node = total([add(1, 1), 5], Pair(add(2, 0), 3), {"x": add(0, 100)})
    assert once.compute(node, store=store) == 2 + 5 + 6 + 100
    assert once.compute({"a": [add(1, 1)]}, store=store) == {"a": [2]}


def test_a_lazy_node_has_no_attributes_of_its_value():
    node = make(3)
    with pytest.raises(AttributeError, match=r"no attribute 'shape'; call `once\.compute"):
        _ = node.shape
    assert not hasattr(node, "__array_interface__")
    assert copy.copy(node).bound == node.bound


@pytest.mark.parametrize(
    "use",
    [bool, len, iter, float, int, np.asarray, lambda n: n[0], lambda n: 1 in n, lambda n: [0][n]],
)
def test_a_lazy_node_cannot_be_used_as_a_value(use):
    with pytest.raises(LazyNodeError, match=r"hint: call `once\.compute"):
        use(add(1))


def test_only_the_branch_taken_runs(store):
    @once.node(version="1")
    def choose(flag):
        return [double(add(1, 1)), make(3)] if flag else double(add(1, 1))

    assert once.compute(choose(False), store=store) == 4
    assert COUNTS == {"add": 1, "double": 1}
    value = once.compute(choose(True), store=store)
    assert (value[0], value[1].tolist()) == (4, [0, 1, 2])
    assert COUNTS == {"add": 1, "double": 1, "make": 1}


def test_a_recursion_of_nodes_is_expanded(store):
    @once.node(version="1")
    def factorial(n):
        count("factorial")
        return product(n, factorial(n - 1)) if n > 1 else 1

    @once.node(version="1")
    def product(a, b):
        return a * b

    assert once.compute(factorial(6), store=store) == 720
    assert COUNTS["factorial"] == 6


def test_an_input_changed_by_a_function_fails_the_node(store):
    @once.node(version="1")
    def spoil(x):
        x += 1
        return x

    with pytest.raises(InputMutatedError, match="changed its input x"):
        once.compute(spoil(make(3)), store=store)
    assert once.compute(make(3), store=store).tolist() == [0, 1, 2]


def test_a_failing_node_shows_key_inputs_and_traceback_and_is_not_cached(store):
    calls = []

    @once.node(version="1")
    def fail(x):
        calls.append(x.shape)
        raise ZeroDivisionError("no way")

    for _ in range(2):
        with pytest.raises(NodeError, match="no way") as caught:
            once.compute(fail(make(3)), store=store)
        error = caught.value
        assert len(error.key) == 64
        assert "ndarray((3,), float32)" in error.inputs
        assert "raise ZeroDivisionError" in error.remote_traceback
        assert isinstance(error.__cause__, ZeroDivisionError)
    assert len(calls) == 2
    assert store.index.entries(fail.name) == []


def test_an_input_that_contains_itself_is_refused(store):
    loop: list[object] = []
    loop.append(loop)
    with pytest.raises(GraphError, match="contains itself"):
        once.compute(double(loop), store=store)


def test_what_has_no_digest_is_evaluated_each_time_and_says_why(store):
    @once.node(version="1")
    def first(source):
        count("first")
        return next(source)

    for _ in range(2):
        assert once.compute(first(iter([7])), store=store) == 7
    assert COUNTS["first"] == 2
    explained = why(first(iter([7])), store=store)
    assert explained.status == "uncached"
    assert "source of type builtins.list_iterator has no digest" in explained.reasons[0]


def test_a_result_without_an_encoding_lets_what_follows_hit(store):
    @once.node(version="1")
    def build():
        count("build")
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return torch.nn.Linear(2, 2)

    @once.node(version="1")
    def weight(layer):
        count("weight")
        return layer.weight.detach().sum()

    values = [once.compute(weight(build()), store=store) for _ in range(2)]
    assert values[0] == values[1]
    assert COUNTS["weight"] == 1


@pytest.mark.parametrize(
    ("draw", "name"),
    [(random.random, "Python"), (np.random.rand, "NumPy"), (lambda: torch.rand(1), "torch")],
)
def test_a_run_that_advances_a_global_generator_is_not_cached(store, draw, name):
    @once.node(version="1")
    def noisy():
        count("noisy")
        return float(draw())

    for _ in range(2):
        once.compute(noisy(), store=store)
    assert COUNTS["noisy"] == 2
    assert f"global generator of {name}" in store.reason_uncached(noisy.name)


def test_nodes_that_seed_a_global_generator_do_not_disturb_each_other(tmp_path):
    @once.node
    def seeded(seed):
        values = []
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            for _ in range(200):
                time.sleep(0)  # lets other threads run
                values.append(float(torch.rand(1)))
        return values

    nodes = [seeded(seed) for seed in range(6)]
    alone = [once.compute(n, store=tmp_path / "a", workers=1) for n in nodes]
    assert once.compute(nodes, store=tmp_path / "b", workers=6) == alone
    assert len(once.open_store(tmp_path / "b").index.entries()) == 6


def test_a_compute_within_a_node_does_not_wait_for_itself(store, tmp_path):
    @once.node
    def outer(seed):
        torch.manual_seed(seed)
        return once.compute(add(1, seed), store=tmp_path / "inner") + 1

    assert once.compute(outer(2), store=store) == 4


def test_an_undeclared_file_is_seen_and_a_declared_one_is_not(store, tmp_path):
    path = tmp_path / "data.txt"
    path.write_text("abc")

    @once.node(version="1")
    def read(path):
        count("read")
        with open(path) as file:
            return file.read()

    for _ in range(2):
        once.compute(read(str(path)), store=store)
    assert COUNTS["read"] == 2
    assert f"read {path}" in store.reason_uncached(read.name)
    for _ in range(2):
        assert once.compute(read(once.File(path)), store=store) == "abc"
    assert COUNTS["read"] == 3


def test_what_a_node_writes_and_reads_again_is_its_own(store, tmp_path):
    @once.node(version="1", ignore=["folder"])
    def scratch(folder):
        count("scratch")
        target = os.path.join(folder, "scratch")
        with open(target, "w") as file:
            file.write("x")
        with open(target) as file:
            return file.read()

    for _ in range(2):
        once.compute(scratch(str(tmp_path)), store=store)
    assert COUNTS["scratch"] == 1


def test_data_that_goes_through_the_import_system_is_seen(store, tmp_path, monkeypatch):
    package = tmp_path / "package_with_data"
    package.mkdir()
    (package / "__init__.py").write_text("LAZY = 1\n")
    (package / "data.txt").write_text("abc")
    (package / "lazy.py").write_text("VALUE = 1\n")
    monkeypatch.syspath_prepend(tmp_path)

    @once.node(version="1")
    def by_pkgutil():
        return pkgutil.get_data("package_with_data", "data.txt")

    @once.node(version="1")
    def by_resources():
        return importlib.resources.files("package_with_data").joinpath("data.txt").read_bytes()

    @once.node(version="1")
    def import_only():
        return importlib.import_module("package_with_data.lazy").VALUE

    for node in (by_pkgutil, by_resources):
        once.compute(node(), store=store)
        assert "data.txt, which is no declared input" in store.reason_uncached(node.name)
    once.compute(import_only(), store=store)
    assert store.reason_uncached(import_only.name) is None


def test_a_database_that_is_opened_by_compiled_code_is_seen(store, tmp_path):
    path = tmp_path / "data.db"
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE t(x)")
    connection.close()

    @once.node(version="1")
    def rows(path):
        reader = sqlite3.connect(path)
        try:
            return len(reader.execute("SELECT * FROM t").fetchall())
        finally:
            reader.close()

    @once.node(version="1")
    def scratch(path):
        for _ in range(2):
            sqlite3.connect(path).execute("CREATE TABLE IF NOT EXISTS t(x)").connection.close()

    once.compute(rows(str(path)), scratch(str(tmp_path / "scratch.db")), store=store)
    assert f"read {path}" in store.reason_uncached(rows.name)
    assert store.reason_uncached(scratch.name) is None
    for _ in range(2):
        once.compute(rows(once.File(path)), store=store)
    assert once.compute(rows(once.File(path)), store=store, dry_run=True).steps[0].action == "hit"


def test_a_generator_that_a_library_seeds_from_entropy_is_seen(store):
    def library(seed=None):
        return np.random.default_rng(seed)

    @once.node(version="1")
    def draw(seed):
        return float(library(seed).random())

    once.compute(draw(None), draw(3), store=store)
    plan = once.compute(draw(None), draw(3), store=store, dry_run=True)
    assert [step.action for step in plan.steps] == ["run", "hit"]
    assert "without a seed" in store.reason_uncached(draw.name)


def test_what_a_compute_within_a_node_read_counts_for_the_node(store, tmp_path):
    path = tmp_path / "data.txt"
    path.write_text("abc")

    @once.node(version="1")
    def inner(path):
        with open(path) as file:
            return file.read()

    @once.node
    def clock():
        return time.time_ns()

    @once.node(version="1")
    def over_a_file(path):
        return once.compute(inner(once.File(path)), store=tmp_path / "inner") + "!"

    @once.node(version="1")
    def over_a_clock():
        count("over_a_clock")
        return once.compute(clock(), store=tmp_path / "inner") > 0

    @once.node(version="1")
    def over_a_hit():
        return once.compute(double(2), store=tmp_path / "inner")

    for text in ("abc", "abcd"):
        path.write_text(text)
        assert once.compute(over_a_file(str(path)), store=store) == text + "!"
    assert f"inner read {path}, which is no declared" in store.reason_uncached(over_a_file.name)
    for _ in range(2):
        once.compute(over_a_clock(), store=store)
    assert COUNTS["over_a_clock"] == 2
    once.compute(double(2), store=tmp_path / "inner")
    once.compute(over_a_hit(), store=store)
    assert once.compute(over_a_hit(), store=store, dry_run=True).steps[0].action == "hit"


def test_a_clock_that_comes_with_an_argument_is_seen(store):
    @once.node
    def call(function):
        return function()

    for function in (time.time_ns, lambda: time.time_ns()):
        once.compute(call(function), store=store)
        assert "time.time_ns reads a clock" in store.reason_uncached(call.name)
    assert once.compute(call(dict), store=store) == {}
    assert once.compute(call(dict), store=store, dry_run=True).steps[0].action == "hit"


def test_what_can_be_read_only_once_is_no_result(store):
    @once.node
    def lines():
        return (line for line in ("a", "b"))

    with pytest.raises(NodeError, match="returned a generator, which is empty once"):
        once.compute(lines(), store=store)


def test_a_node_that_is_not_kept_says_why_once(store, caplog):
    @once.node
    def stamp():
        return time.time_ns()

    for _ in range(2):
        once.compute(stamp(), store=store)
    (line,) = [record.getMessage() for record in caplog.records]
    assert "stamp is evaluated each time: time.time_ns reads a clock at test_compute.py" in line


def test_a_socket_is_seen(store):
    import socket

    @once.node(version="1")
    def ask():
        with socket.socket() as s:
            return s.connect_ex(("127.0.0.1", 9)) != 0

    once.compute(ask(), store=store)
    assert "used the network" in store.reason_uncached(ask.name)


def test_files_and_folders_count_by_content(store, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a").write_text("1")

    @once.node(version="1")
    def names(folder):
        count("names")
        return sorted(os.listdir(folder))

    def value():
        return once.compute(names(once.Dir(folder)), store=store)

    assert value() == value() == ["a"]
    (folder / "a").write_text("2")
    value()
    (folder / "b").mkdir()
    assert value() == ["a", "b"]
    assert COUNTS["names"] == 3


def test_folders_count_links_and_refuse_what_they_cannot_read(store, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()

    @once.node(version="1")
    def names(folder):
        count("names")
        return sorted(os.listdir(folder))

    (folder / "link").symlink_to("nowhere")
    assert once.compute(names(once.Dir(folder)), store=store) == ["link"]
    (folder / "link").unlink()
    (folder / "link").symlink_to("elsewhere")
    once.compute(names(once.Dir(folder)), store=store)
    assert COUNTS["names"] == 2
    os.mkfifo(folder / "pipe")
    refused = [
        (once.Dir(folder), "neither a file nor a folder"),
        (once.Dir(tmp_path / "missing"), "No such file"),
        (once.File(tmp_path / "missing"), "No such file"),
        (once.File(tmp_path), "hint: `once.Dir` is for folders"),
    ]
    for given, word in refused:
        with pytest.raises(InputFileError, match=f"(?s)an input of .*names cannot .*{word}") as e:
            once.compute(names(given), store=store)
        assert isinstance(e.value, OSError)
    assert COUNTS["names"] == 2


def test_a_node_that_takes_its_file_away_is_not_kept(store, tmp_path):
    path = tmp_path / "once.txt"

    @once.node(version="1")
    def take(path):
        text = path.path.read_text()
        path.path.unlink()
        return text

    path.write_text("a")
    assert once.compute(take(once.File(path)), store=store) == "a"
    assert "could not be read afterwards" in store.reason_uncached(take.name)
    assert store.index.entries(take.name) == []


def test_a_file_edited_under_unchanged_stamps_is_seen_in_strict_mode(store, tmp_path):
    path = tmp_path / "f"
    path.write_text("a")
    stamp = time.time_ns() - 10_000_000_000
    os.utime(path, ns=(stamp, stamp))
    before = store.file_digest(path)
    path.write_text("b")
    os.utime(path, ns=(stamp, stamp))
    # The change time cannot be forged, so even without strict mode this is noticed.
    assert store.file_digest(path) != before
    assert store.file_digest(path, strict=True) == store.file_digest(path)


def test_refresh_version_and_ignore_override_the_key(store):
    def node(version, **options):
        @once.node(version=version, ignore=["verbose"], **options)
        def f(x, verbose=False):
            count("f")
            return x

        return f

    once.compute(node("1")(3), store=store)
    once.compute(node("1")(3, verbose=True), store=store)
    assert COUNTS["f"] == 1
    once.compute(node("2")(3), store=store)
    assert COUNTS["f"] == 2
    once.compute(node("2")(3), store=store, refresh=True)
    assert COUNTS["f"] == 3
    once.compute(node("2", refresh=True)(3), store=store)
    assert COUNTS["f"] == 4
    with pytest.raises(ConfigError, match="no parameters"):
        once.node(ignore=["nothing"])(lambda x: x)


def test_a_re_evaluation_with_other_bytes_is_noticed_and_downstream_is_computed_again(store):
    values = iter([1.0, 2.0])

    @once.node(version="1")
    def wobbly():
        return next(values)

    assert once.compute(add(wobbly(), 10.0), store=store) == 11.0
    entry = store.index.entries(wobbly.name)[0]
    store.blobs.remove(entry.blob)
    assert once.compute(add(wobbly(), 10.0), store=store) == 11.0  # the output stands
    assert once.compute(add(wobbly(), 20.0), store=store) == 22.0  # now its bytes are needed
    entry = store.index.entries(wobbly.name)[0]
    assert entry.nondeterministic
    assert once.compute(add(wobbly(), 10.0), store=store) == 12.0
    assert any("nondeterministic" in reason for reason in why(wobbly(), store=store).reasons)


def test_numerics_in_force_are_part_of_the_key(store):
    once.compute(double(1.0), store=store)
    torch.set_default_dtype(torch.float64)
    try:
        once.compute(double(1.0), store=store)
    finally:
        torch.set_default_dtype(torch.float32)
    assert COUNTS["double"] == 2
    explained = why(once.node(version="1", numerics="exact")(double.function)(1.0), store=store)
    fields = {change.field for change in explained.changes}
    assert {"numerics device", "numerics threads", "numerics torch build"} <= fields


def test_a_dry_run_lists_what_would_run_with_the_seconds_it_took(store):
    once.compute(double(make(3)), store=store)
    plan = once.compute(add(double(make(3))), double(make(4)), store=store, dry_run=True)
    actions = {(step.node.rpartition(".")[2], step.action) for step in plan.steps}
    assert actions == {
        ("make", "hit"), ("double", "hit"), ("add", "run"), ("make", "run"), ("double", "unknown"),
    }  # fmt: skip
    assert COUNTS == {"make": 1, "double": 1}
    assert plan.seconds > 0
    assert "s last time" in str(plan)


def test_progress_counts_nodes_and_hits(store):
    seen = []
    once.compute(double(make(3)), store=store, progress=seen.append)
    once.compute(double(make(3)), add(1), store=store, progress=seen.append)
    assert (seen[-1].done, seen[-1].total, seen[-1].hits) == (3, 3, 2)


def test_independent_nodes_run_in_parallel_and_resources_limit_them(store):
    barrier = threading.Barrier(2)

    @once.node(version="1")
    def meet(n):
        barrier.wait(timeout=60)
        return n

    assert once.compute(meet(1), meet(2), store=store, workers=2) == (1, 2)

    running = []

    @once.node(version="1", threads=2)
    def alone(n):
        running.append(n)
        assert running == [n]
        running.remove(n)
        return n

    assert once.compute([alone(n) for n in range(5)], store=store, workers=2) == list(range(5))
    with pytest.raises(ConfigError, match="wants 64 GPUs"):
        once.compute(once.node(gpus=64)(lambda: 1)(), store=store)


def test_any_executor_of_the_standard_library_fits(store):
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        assert once.compute(double(add(1, 2)), store=store, executor=pool) == 6
        far = once.node(version="1", gpus=64, threads=999)(lambda x: x)
        assert once.compute(far(7), store=store, executor=pool) == 7  # GPUs are its own affair

        @once.node(version="1")
        def spoil(x):
            x += 1

        with pytest.raises(InputMutatedError, match="changed its input x"):
            once.compute(spoil(make(3)), store=store, executor=pool)
    with pytest.raises(ConfigError, match="none of"):
        once.compute(add(1), store=store, executor="clouds")


def test_functions_that_cannot_be_imported_are_refused_by_processes(store):
    with pytest.raises(GraphError, match="cannot be run by ProcessPoolExecutor"):
        once.compute(once.node(lambda: 1)(), store=store, executor="processes", workers=1)


def test_the_first_use_of_a_result_is_reported_as_saved(tmp_path):
    once.compute(double(make(3)), store=tmp_path)
    events = []
    store = once.open_store(tmp_path, on_event=events.append)
    for _ in range(3):
        once.compute(double(make(3)), store=store)
    assert [event.node.rpartition(".")[2] for event in events] == ["double"]
    assert events[0].saved_s >= 0
    assert events[0].kind == "compute_saved"


def test_a_rank_that_must_not_wait_computes_without_a_claim(tmp_path):
    store = Store(Place(tmp_path), clock=FakeClock())
    node = add(5, 5)
    key = why(node, store=store).key
    claim = store.claim(key, "somebody slow")
    assert claim is not None
    assert once.compute(node, store=store, wait_s=0.0) == 10
    assert store.lookup(key) is not None
    store.release(claim)


def test_a_rank_of_a_process_group_waits_shortly_and_then_computes(store, monkeypatch):
    monkeypatch.setattr(executor, "_is_distributed", lambda: True)
    monkeypatch.setattr(executor, "_RANK_WAIT_S", 0.2)
    node = add(5, 6)
    claim = store.claim(why(node, store=store).key, "a rank that waits for us in a collective")
    assert claim is not None
    started_s = time.monotonic()
    assert once.compute(node, store=store) == 11
    assert time.monotonic() - started_s >= 0.2
    claim.renew()  # it is still the other's
    store.release(claim)
