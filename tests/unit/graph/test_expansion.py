"""Nodes whose functions return nodes: what they chose is kept, and never a stale choice."""

import dataclasses
import shutil
import threading
import time

import numpy as np
import pytest

import trainonce as once
from trainonce.errors import GraphError
from trainonce.graph import upkeep
from trainonce.graph.why import why

COUNTS: dict[str, int] = {}
_lock = threading.Lock()


def count(name):
    with _lock:
        COUNTS[name] = COUNTS.get(name, 0) + 1


@pytest.fixture(autouse=True)
def _fresh_counts():
    COUNTS.clear()


@pytest.fixture
def store(tmp_path):
    return once.open_store(tmp_path / "store")


@dataclasses.dataclass
class Pair:
    left: object
    right: object


@once.node(version="1")
def make(n):
    count("make")
    return np.arange(n, dtype=np.float64)


@once.node(version="1")
def scaled(x, by):
    count("scaled")
    return x * by


@once.node(version="1")
def summed(items):
    count("summed")
    return float(sum(item.sum() for item in items))


@once.node(version="1")
def choose(x, flag):
    count("choose")
    if not flag:
        return scaled(x, 2)
    first = scaled(x, 3)
    return Pair([scaled(first, 10), x], {"total": summed([first, first, x]), "n": len(x)})


@once.node(version="1")
def choose_all(first, parts, later):
    count("choose_all")
    return [scaled(part, 2) for part in [*parts, first, *later]]


@once.node(version="1")
def read(path):
    count("read")
    with open(path) as file:
        return file.read()


@once.node(version="1")
def choose_read(path, mark=""):
    count("choose_read")
    return read(path)


@once.node(version="1")
def each_file(folder):
    count("each_file")
    names = [name for name, _ in folder.files()]
    return [read(once.File(folder.path / name)) for name in names]


@once.node(version="1")
def joined(*parts):
    count("joined")
    return "".join(map(str, parts))


@once.node(version="1", cache=False)
def uncached(text):
    count("uncached")
    return text.upper()


@once.node(version="1")
def again(n):
    return again(n)


def runs(*nodes, store, **options):
    """Return the values of nodes, and how often each function ran for them."""
    COUNTS.clear()
    return once.compute(*nodes, store=store, **options), dict(COUNTS)


def test_a_function_that_returned_nodes_is_not_called_again(store):
    value, count = runs(choose(make(4), True), store=store)
    assert count == {"make": 1, "choose": 1, "scaled": 2, "summed": 1}
    again, count = runs(choose(make(4), True), store=store)
    assert count == {}
    assert isinstance(again, Pair)
    assert np.array_equal(again.left[0], value.left[0])
    assert np.array_equal(again.left[1], np.arange(4.0))
    assert again.right == value.right == {"total": 42.0, "n": 4}
    _, count = runs(choose(make(4), False), store=store)
    assert count == {"choose": 1, "scaled": 1}


def test_what_lies_below_hits_as_if_its_own_value_were_given(store):
    _, count = runs(joined(choose(make(3), False)), store=store)
    assert count == {"make": 1, "choose": 1, "scaled": 1, "joined": 1}
    assert runs(joined(choose(make(3), False)), store=store)[1] == {}
    assert runs(joined(scaled(make(3), 2)), store=store)[1] == {}


def test_a_dry_run_and_why_look_through_a_known_choice(store):
    node = choose(make(4), False)
    assert why(node, store=store).status == "unknown"
    once.compute(node, store=store)
    plan = once.compute(choose(make(4), False), store=store, dry_run=True)
    assert [(step.node.rpartition(".")[2], step.action) for step in plan.steps] == [
        ("make", "hit"), ("choose", "hit"), ("scaled", "hit"),
    ]  # fmt: skip
    explained = why(choose(make(4), False), store=store)
    assert explained.status == "hit"
    assert "its function is not called" in explained.reasons[0]
    store.index.remove([entry.key for entry in store.index.entries(scaled.name)])
    explained = why(choose(make(4), False), store=store)
    assert explained.status == "unknown"
    assert explained.reasons[1] == f"{scaled.name}, which it needs, would run"
    assert runs(choose(make(4), False), store=store)[1] == {"scaled": 1}


def test_inputs_that_are_passed_on_are_neither_stored_again_nor_read(store):
    once.compute(choose(make(100_000), False), store=store)
    (entry,) = store.index.entries(choose.name)
    assert entry.size_bytes < 1000
    assert entry.shown["returned"] == "1 nodes"
    store.blobs.remove(store.lookup(why(make(100_000), store=store).key).blob)
    assert runs(choose(make(100_000), False), store=store)[1] == {}


def test_inputs_are_told_apart_whether_they_come_as_nodes_or_as_values(store):
    a, b, c = (scaled(np.ones(9), by) for by in (1.0, 2.0, 3.0))
    want = [4.0, 6.0, 2.0, 8.0]

    def value(first):
        found, count = runs(choose_all(first, [b, c], {scaled(1.0, 4.0)}), store=store)
        return [float(np.ravel(part)[0]) for part in found], count.get("choose_all", 0)

    assert value(a) == (want, 1)
    assert value(np.ones(9)) == (want, 0)  # the same key: the value that `a` gives
    assert value(a) == (want, 0)


def test_functions_are_found_in_closures_and_arguments_too(store):
    @once.node(version="1")
    def factorial(n):
        count("factorial")
        return product(n, factorial(n - 1)) if n > 1 else 1

    @once.node(version="1")
    def product(a, b):
        count("product")
        return a * b

    @once.node(version="1")
    def applied(function, x):
        count("applied")
        return function(x, 5)

    assert runs(factorial(6), store=store) == (720, {"factorial": 6, "product": 5})
    assert runs(factorial(6), store=store) == (720, {})
    assert runs(factorial(7), store=store) == (5040, {"factorial": 1, "product": 1})
    assert runs(applied(product, 3), store=store) == (15, {"applied": 1, "product": 1})
    assert runs(applied(product, 3), store=store) == (15, {})


@pytest.mark.parametrize(
    ("make_node", "reason"),
    [
        (lambda: choose_lambda(), "cannot be found by that name"),
        (lambda: choose_by_clock(), "time.time_ns reads a clock"),
        (lambda: choose_unstored(), "no safe encoding is known for its type"),
        (lambda: choose_by_draw(), "global generator of NumPy"),
    ],
)
def test_a_choice_that_cannot_be_kept_is_made_each_time_and_says_why(store, make_node, reason):
    for _ in range(2):
        assert runs(make_node(), store=store)[1]["chosen"] == 1
    assert reason in store.reason_uncached(make_node().name)
    assert store.index.entries(make_node().name) == []


@once.node(version="1")
def choose_lambda():
    count("chosen")
    return once.node(lambda: 1)()


@once.node
def choose_by_clock():
    count_versioned("chosen")
    return make(3 + time.time_ns() % 2)


@once.node(version="1")
def choose_unstored():
    count("chosen")
    return passed(threading.Event())


@once.node(version="1")
def choose_by_draw():
    count("chosen")
    return make(np.random.randint(1, 3))


@once.node(version="1")
def passed(event):
    return event.is_set()


def count_versioned(name):
    COUNTS[name] = COUNTS.get(name, 0) + 1


def test_a_file_of_equal_content_elsewhere_does_not_bring_back_another_path(store, tmp_path):
    first, second = tmp_path / "a.txt", tmp_path / "b.txt"
    first.write_text("one")
    shutil.copy(first, second)
    assert once.compute(choose_read(once.File(first)), store=store) == "one"
    first.write_text("two")
    assert once.compute(choose_read(once.File(second)), store=store) == "one"
    first.unlink()
    assert runs(choose_read(once.File(second)), store=store) == ("one", {})


def test_a_file_that_is_named_below_counts_by_its_content_now(store, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for name in "abc":
        (folder / name).write_text(name)
    assert runs(each_file(once.Dir(folder)), store=store) == (
        ["a", "b", "c"], {"each_file": 1, "read": 3},
    )  # fmt: skip
    assert runs(each_file(once.Dir(folder)), store=store) == (["a", "b", "c"], {})
    (folder / "b").write_text("B")
    assert runs(each_file(once.Dir(folder)), store=store) == (
        ["a", "B", "c"], {"each_file": 1, "read": 1},
    )  # fmt: skip


def test_a_path_that_another_node_gave_is_in_no_key_and_its_choice_not_kept(store, tmp_path):
    (tmp_path / "a").write_text("one")

    @once.node(version="1", ignore=["path"])
    def locate(path):
        return once.File(path)

    for _ in range(2):
        count = runs(choose_read(locate(str(tmp_path / "a"))), store=store)[1]
        assert count["choose_read"] == 1
    assert "is a path that its key does not show" in store.reason_uncached(choose_read.name)


def test_an_ignored_argument_is_not_taken_from_the_next_call(store):
    @once.node(version="1", ignore=["hint"])
    def choose(x, hint):
        count("choose")
        return joined(x, hint)

    mark = "a" * 100
    assert once.compute(choose(1, mark), store=store) == "1" + mark
    assert runs(choose(1, "b" * 100), store=store) == ("1" + mark, {})


def test_a_damaged_record_is_a_miss_that_heals(store):
    once.compute(choose(make(4), True), store=store)
    (entry,) = store.index.entries(choose.name)
    (path,) = store.root.rglob(f"*{entry.blob[8:]}*")
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)
    store = once.open_store(store.root)
    store.blobs.doubt(entry.blob)
    assert runs(choose(make(4), True), store=store)[1] == {"choose": 1}
    assert runs(choose(make(4), True), store=store)[1] == {}


def test_refresh_calls_the_function_again(store):
    for _ in range(2):
        counted = runs(choose(make(4), False), store=store, refresh=True)[1]
        assert counted == {"make": 1, "choose": 1, "scaled": 1}


def test_a_node_that_waits_for_itself_is_refused(store):
    with pytest.raises(GraphError, match="again waits for itself"):
        once.compute(again(1), store=store)


def test_without_a_store_that_can_be_written_nodes_are_expanded_all_the_same(store, tmp_path):
    once.compute(choose(make(4), False), store=store)
    reader = once.open_store(store.root, read_only=True)
    assert runs(choose(make(4), False), store=reader)[1] == {}
    assert runs(choose(make(5), False), store=reader)[1] == {"make": 1, "choose": 1, "scaled": 1}


def test_forgetting_a_source_reaches_beyond_choices_and_what_is_not_kept(store, tmp_path):
    path = tmp_path / "secret.txt"
    path.write_text("secret")
    nodes = [joined(choose_read(once.File(path)), 1), joined(uncached(read(once.File(path))), 2)]
    assert once.compute(nodes, store=store) == ["secret1", "SECRET2"]
    done = upkeep.forget(store, sources=[str(path)])
    assert sorted(done.descendants) == sorted([choose_read.name, joined.name, read.name])
    assert len(done.entries) == 4
    assert (done.left, store.index.entries(), list(store.blobs.names())) == (0, [], [])


def test_a_choice_within_a_node_tells_it_what_it_did(store, tmp_path):
    @once.node(version="1")
    def outer():
        count("outer")
        return once.compute(choose_by_clock(), store=tmp_path / "inner").sum()

    for _ in range(2):
        assert runs(outer(), store=store)[1]["outer"] == 1
    assert "choose_by_clock, which it computes, is not kept" in store.reason_uncached(outer.name)
