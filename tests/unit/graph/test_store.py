"""The store: what is kept, evicted, bound to a tenant, forgotten, and healed."""

import enum
import importlib
import importlib.util
import random
import shutil
import time
from collections import Counter, defaultdict, deque
from fractions import Fraction
from uuid import UUID

import numpy as np
import pyarrow as pa
import pytest
import torch

import trainonce as once
from trainonce.cli import main
from trainonce.errors import (
    DamagedError,
    EncodingError,
    LeaseLostError,
    StoreError,
    UnhashableError,
)
from trainonce.graph import codecs, upkeep
from trainonce.graph.digest import digest
from trainonce.graph.index import Entry
from trainonce.graph.numerics import _DEFAULTS, _flags
from trainonce.graph.places import filesystem_of, place_of
from trainonce.graph.store import Store


@once.node(version="1")
def square(n):
    return np.arange(n) ** 2


@once.node(version="1")
def total(array, factor=1):
    return int(array.sum()) * factor


@pytest.fixture
def store(tmp_path):
    return once.open_store(tmp_path / "store")


def commit(store, key, value, seconds=1.0, **options):
    entry = Entry(key=key, node="n", output=digest(value), seconds=seconds)
    claim = store.claim(key, "test")
    return store.commit(entry, value, claim=claim, **options)


def load(store, key):
    entry = store.lookup(key)
    loaded = store.load(entry) if entry else None
    return loaded.value if loaded else None


# ---------------------------------------------------------------- encodings


class Access(enum.Flag):
    READ = 1
    WRITE = 2


def values():
    structured = np.zeros(3, dtype=[("a", "<f4"), ("b", "<i8", (2,))])
    return [
        None, True, 0, -5, 10**30, 1.5, float("inf"), "é", b"\x00", bytearray(b"x"), 1 + 2j,
        [1, [2, (3,)]], {"a": {"b": [1.0]}, 3: None}, {1, 2}, frozenset({"x"}),
        np.arange(5), np.zeros((0, 3)), np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        np.float32(2), np.array(["ab", "c"]), np.array(3), structured, np.datetime64("2020-01-01"),
        torch.arange(3), torch.zeros(2, 0), torch.ones(2, dtype=torch.bfloat16),
        torch.nn.Parameter(torch.ones(2)), torch.ones(2, requires_grad=True), torch.tensor(True),
        torch.nn.Linear(2, 2).state_dict(), pa.table({"a": [1, None], "b": ["x", "y"]}),
        Counter("abca"), defaultdict(list, a=[1]), deque([1, 2], maxlen=5), range(1, 9, 2),
        Fraction(1, 3), UUID(int=5), slice(1, None, 2), np.ma.array([1, 2], mask=[False, True]),
        np.array(["a", None, 3], dtype=object), torch.Size([2, 3]), torch.bfloat16,
        torch.device("cpu"), Access.READ | Access.WRITE, torch.arange(6).view(2, 3)[:1, 1],
    ]  # fmt: skip


def frames():
    found = []
    if pd := optional("pandas"):
        index = pd.MultiIndex.from_tuples([("a", 1), ("b", 2)], names=["x", "y"])
        kinds = pd.Categorical(["u", "v"], categories=["v", "u"], ordered=True)
        when = pd.date_range("2020", periods=2, tz="UTC")
        found += [
            pd.DataFrame({"a": [1.0, float("nan")], "k": kinds, "t": when}, index=index),
            pd.Series([1, 2], name="s"), pd.Series(["x", None]), pd.DataFrame(index=index),
        ]  # fmt: skip
    if pl := optional("polars"):
        found.append(pl.DataFrame({"a": [1, None], "b": ["x", "y"]}))
    if datasets := optional("datasets"):
        made = datasets.Dataset.from_dict({"a": [1, 2, 3], "b": ["x", "y", "z"]})
        found += [made, made.select([2, 0]), made.with_format("numpy", columns=["a"])]
    return found


def optional(name):
    return importlib.import_module(name) if importlib.util.find_spec(name) else None


@pytest.mark.parametrize("value", frames(), ids=lambda v: type(v).__module__)
def test_frames_and_datasets_come_back_equal_where_their_library_is_installed(value):
    back = codecs.decode(bytearray(codecs.encode(value)))
    assert type(back) is type(value)
    assert digest(back) == digest(value)


def test_an_array_with_gaps_between_its_fields_comes_back_equal_or_is_refused():
    gaps = np.zeros(2, np.dtype([("a", "u1"), ("b", "<i4")], align=True))
    with pytest.raises(EncodingError, match="come back equal"):
        codecs.encode(gaps)
    overlapping = np.dtype({"names": ["a", "b"], "formats": ["<i4", "<i4"], "offsets": [0, 2]})
    with pytest.raises(UnhashableError, match="fields overlap"):
        digest(np.zeros(2, overlapping))


@pytest.mark.parametrize("value", values(), ids=lambda v: type(v).__name__)
def test_a_value_comes_back_equal_writable_and_of_the_same_type(value):
    if isinstance(value, dict) and "weight" in value:
        value = {name: tensor.detach() for name, tensor in value.items()}
    data = codecs.encode(value)
    back = codecs.decode(bytearray(data))
    assert type(back) is type(value)
    assert digest(back) == digest(value)
    assert codecs.encode(back) == data
    if isinstance(back, np.ndarray) and back.size:
        assert back.flags.writeable


@pytest.mark.parametrize(
    "value",
    [lambda: 1, object(), np.array([iter([])]), torch.ones(1, requires_grad=True) * 2, iter([])],
)
def test_what_has_no_safe_encoding_is_refused(value):
    with pytest.raises(EncodingError, match="result"):
        codecs.encode({"a": [value]})


def test_bytes_that_name_other_classes_are_refused():
    for tree in ('["dataclass","os:system",[]]', '["enum","builtins:int","x"]', '["call","x"]'):
        data = codecs.MAGIC + len(tree).to_bytes(8, "little") + tree.encode()
        with pytest.raises(EncodingError):
            codecs.decode(bytearray(data))


def test_pickles_are_not_results():
    with pytest.raises(EncodingError):
        codecs.decode(bytearray(b"\x80\x04K\x01."))


# ---------------------------------------------------------------- commits


def test_the_first_committed_result_stands(store):
    first = commit(store, "k", [1])
    entry = Entry(key="k", node="n", output=digest([2]))
    assert store.commit(entry, [2], claim=None) == first
    assert load(store, "k") == [1]
    assert store.commit(entry, [2], claim=None, replace=True).output == digest([2])
    assert load(store, "k") == [2]


def test_a_fenced_owner_commits_nothing(tmp_path):
    store = Store(place_of(tmp_path), expiry_s=0.0)
    slow = store.claim("k", "slow")
    store.claim("k", "watches")
    fast = store.claim("k", "fast")
    with pytest.raises(LeaseLostError):
        store.commit(Entry(key="k", node="n", output="x"), [1], claim=slow)
    assert store.lookup("k") is None
    store.commit(Entry(key="k", node="n", output=digest([2])), [2], claim=fast)
    assert load(store, "k") == [2]


def test_a_budget_evicts_what_saves_the_fewest_seconds_per_byte(tmp_path):
    store = once.open_store(tmp_path, budget_bytes=40_000)
    commit(store, "cheap", np.zeros(2000), seconds=0.1)
    commit(store, "dear", np.ones(2000), seconds=10.0)
    commit(store, "pinned", np.full(500, 2), seconds=0.0)
    store.pin("pinned")
    commit(store, "new", np.full(2000, 3), seconds=1.0)
    assert load(store, "cheap") is None
    assert store.lookup("cheap").output == digest(np.zeros(2000))  # outlives its bytes
    assert load(store, "dear") is not None
    assert load(store, "pinned") is not None
    assert load(store, "new") is not None
    store.unpin("pinned")
    assert upkeep.collect(store, budget_bytes=0).left_bytes == 0
    assert load(store, "dear") is None


def test_equal_results_of_two_nodes_are_kept_once(store):
    commit(store, "a", np.arange(100))
    commit(store, "b", np.arange(100))
    assert len(list(store.blobs.names())) == 1


# ---------------------------------------------------------------- faults


def flip(path, chance):
    data = bytearray(path.read_bytes())
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    path.write_bytes(data)


def test_a_flipped_bit_in_any_file_never_gives_a_wrong_result(tmp_path):
    chance = random.Random(1)
    store = once.open_store(tmp_path / "live")
    nodes = [total(square(n), factor) for n in (50, 60) for factor in (1, 2)]
    expected = once.compute(nodes, store=store)
    logged = tmp_path / "logged"  # with a log that is not merged yet, as after a crash
    shutil.copytree(store.root, logged)
    merged = tmp_path / "merged"
    store.index.db.connection().execute("PRAGMA wal_checkpoint(TRUNCATE)")
    shutil.copytree(store.root, merged)
    found = {"damaged": 0}
    for origin in (logged, merged):
        for path in [path for path in origin.rglob("*") if path.is_file()]:
            for _ in range(15 if path.name.startswith("index") else 2):
                copy = tmp_path / "copy"
                shutil.rmtree(copy, ignore_errors=True)
                shutil.copytree(origin, copy)
                if path.stat().st_size:
                    flip(copy / path.relative_to(origin), chance)
                outcome = after_damage(copy, nodes, expected)
                found[outcome] = found.get(outcome, 0) + 1
    assert found["damaged"]
    with (merged / "index.db").open("r+b") as file:
        file.write(b"X")  # the first byte of what makes it a database
    assert after_damage(merged, nodes, expected) == "unharmed"


def test_a_damaged_index_is_made_again_and_every_result_is_found(tmp_path):
    store = once.open_store(tmp_path)
    nodes = [square(n) for n in range(5)]
    expected = [value.tolist() for value in once.compute(nodes, store=store)]
    keys = {entry.key for entry in store.index.entries()}
    store.index.db.connection().execute("PRAGMA wal_checkpoint(TRUNCATE)")
    store.close()
    (tmp_path / "index.db").write_bytes(b"no database" * 1000)
    with pytest.raises(DamagedError, match="open the store for writing"):
        once.open_store(tmp_path, read_only=True)
    again = once.open_store(tmp_path)
    assert any("made again from the journal" in trouble for trouble in again.troubles)
    assert {entry.key for entry in again.index.entries()} == keys
    plan = once.compute(nodes, store=again, dry_run=True)
    assert {step.action for step in plan.steps} == {"hit"}
    assert [value.tolist() for value in once.compute(nodes, store=again)] == expected


def test_an_index_that_is_damaged_in_use_is_made_again_and_old_claims_are_fenced(tmp_path):
    store = once.open_store(tmp_path)
    expected = once.compute(square(9), store=store).tolist()
    (entry,) = store.index.entries()
    claim = store.claim("k", "a")
    store.index.db.connection().execute("PRAGMA wal_checkpoint(TRUNCATE)")
    store.close()
    page = 4096
    data = bytearray((tmp_path / "index.db").read_bytes())
    data[page:] = b"\xff" * (len(data) - page)  # the schema is intact: it opens
    (tmp_path / "index.db").write_bytes(data)
    assert store.lookup(entry.key) == entry
    assert once.compute(square(9), store=store).tolist() == expected
    assert store.claim("k", "b") is not None
    with pytest.raises(LeaseLostError):
        claim.local.commit()


def test_a_new_index_brings_nothing_back_that_was_forgotten(tmp_path):
    store = once.open_store(tmp_path / "store")
    source = tmp_path / "source"
    source.write_text("abc")

    @once.node(version="1")
    def size(path):
        with open(path) as file:
            return len(file.read())

    once.compute(size(once.File(source)), square(3), store=store)
    upkeep.forget(store, sources=[str(source)])
    upkeep.collect(store)  # the journal is written anew
    shutil.copytree(store.root, tmp_path / "copy")
    (tmp_path / "copy" / "index.db").write_bytes(b"no database" * 1000)
    again = once.open_store(tmp_path / "copy")
    assert [entry.node for entry in again.index.entries()] == [square.name]
    assert len(upkeep.tombstones(again)) == len(upkeep.tombstones(store)) > 0


def after_damage(folder, nodes, expected):
    """Return what came of it: "damaged" (and healed), "refused" with a word, or "unharmed"."""
    try:
        store = once.open_store(folder)
        damaged = upkeep.verify(store).damaged
        assert once.compute(nodes, store=store) == expected
        assert upkeep.verify(store).damaged == []
        store.close()
    except StoreError as error:
        text = str(error)
        assert "cannot be used" in text or "this version reads format" in text
        return "refused"
    return "damaged" if damaged else "unharmed"


def test_a_damaged_blob_is_a_miss_that_heals(store):
    once.compute(square(9), store=store)
    entry = store.index.entries()[0]
    path = store.blobs._path(entry.blob)
    path.write_bytes(b"x" * path.stat().st_size)
    reopened = once.open_store(store.root)
    assert reopened.load(entry) is None
    assert once.compute(square(9), store=reopened).tolist() == [n * n for n in range(9)]
    assert reopened.load(entry) is not None


def test_a_forged_row_is_a_miss(store):
    once.compute(square(9), store=store)
    with store.index.db.transaction() as connection:
        connection.execute("UPDATE actions SET record=replace(record, 'tolerant', 'intolerant')")
    assert store.index.entries() == []
    assert len(upkeep.verify(store).damaged) == 1
    assert upkeep.verify(store).damaged == []


def test_a_newer_format_is_refused_with_a_word(store):
    with store.index.db.transaction() as connection:
        connection.execute("UPDATE meta SET value='99' WHERE name='format'")
    with pytest.raises(StoreError, match=r"format 99.*\nhint: use the newer trainonce"):
        once.open_store(store.root)


def test_a_clock_that_jumps_changes_nothing(tmp_path, monkeypatch):
    chance = random.Random(3)
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + chance.uniform(-1e9, 1e9))
    monkeypatch.setattr(time, "time_ns", lambda: int(time.time() * 1e9))
    path = tmp_path / "f"
    store = once.open_store(tmp_path / "store")
    for text in ("a", "b", "a"):
        path.write_text(text)
        assert store.file_digest(path) == store.file_digest(path, strict=True)
    claim = store.claim("k", "a")
    assert store.claim("k", "b") is None
    store.release(claim)
    assert [once.compute(total(square(n)), store=store) for n in (3, 4, 3)] == [5, 14, 5]


def test_a_read_only_store_gives_hits_and_is_left_as_it_was(tmp_path):
    once.compute(square(4), store=tmp_path)
    store = once.open_store(tmp_path, read_only=True)
    before = sorted(path.name for path in tmp_path.rglob("*") if not path.name.endswith("-shm"))
    assert once.compute(square(4), square(5), store=store)[1].tolist() == [0, 1, 4, 9, 16]
    store.close()
    after = sorted(path.name for path in tmp_path.rglob("*") if not path.name.endswith("-shm"))
    assert [n for n in after if "wal" not in n] == [n for n in before if "wal" not in n]
    assert len(once.open_store(tmp_path).index.entries()) == 1
    with pytest.raises(StoreError, match="no store"):
        once.open_store(tmp_path / "none", read_only=True)


# ---------------------------------------------------------------- tenants and forgetting


def test_tenants_share_nothing_in_one_folder(tmp_path):
    stores = [once.open_store(tmp_path, tenant=name) for name in ("a", "b", None)]
    for store in stores:
        assert store.index.entries() == []
        once.compute(square(6), store=store)
        assert len(store.index.entries()) == 1
    keys = {store.index.entries()[0].key for store in stores}
    blobs = {store.index.entries()[0].blob for store in stores}
    outputs = {store.index.entries()[0].output for store in stores}
    assert len(keys) == len(blobs) == len(outputs) == 3
    shared = set(stores[0].index.entries()[0].parts.values())
    assert not shared & set(stores[2].index.entries()[0].parts.values())
    again = once.open_store(tmp_path, tenant="a")
    assert again.load(again.index.entries()[0]) is not None


def test_forgetting_a_source_erases_what_came_of_it_and_keeps_it_away(tmp_path):
    source, other = tmp_path / "source", tmp_path / "other"
    source.write_text("1 2 3")
    other.write_text("4 5")

    @once.node(version="1")
    def read(path):
        with open(path) as file:
            return np.array([int(word) for word in file.read().split()])

    store = once.open_store(tmp_path / "store")
    array = once.compute(read(once.File(source)), store=store)
    once.compute(total(read(once.File(source))), total(read(once.File(other))), store=store)
    once.compute(total(array, 7), store=store)  # went on as a plain value
    assert len(store.index.entries()) == 5
    done = upkeep.forget(store, sources=[str(source)])
    assert (len(done.entries), done.left) == (3, 0)
    assert total.name in done.descendants
    assert [list(e.sources) for e in store.index.entries(read.name)] == [[str(other)]]
    assert upkeep.verify(store).missing == []
    # It can still be computed, but nothing of it is kept again.
    assert once.compute(total(read(once.File(source))), store=store) == 6
    assert len(store.index.entries()) == 2
    assert upkeep.tombstones(store)


# ---------------------------------------------------------------- places and numerics


def test_network_file_systems_are_found_by_their_mounts(tmp_path):
    mounts = f"/dev/a / ext4 rw\nserver:/x {tmp_path} nfs4 rw\n/dev/b {tmp_path}/local xfs rw\n"
    assert filesystem_of(tmp_path / "deep" / "er", mounts) == "nfs4"
    assert filesystem_of(tmp_path / "local" / "x", mounts) == "xfs"
    assert filesystem_of(tmp_path.parent, mounts) == "ext4"


def test_a_folder_on_a_network_file_system_gets_a_local_front(tmp_path, monkeypatch):
    from trainonce.graph import places

    monkeypatch.setenv("TRAINONCE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(places, "filesystem_of", lambda folder: "lustre")
    store = once.open_store(tmp_path / "shared")
    assert store.remote is not None
    assert "lustre" in store.place.reason
    assert store.root.is_relative_to(tmp_path / "home")
    once.compute(square(3), store=store)
    assert any((tmp_path / "shared" / "entries").rglob("*"))


def test_torch_starts_with_the_numerics_that_are_assumed_without_it():
    assert _flags() == _DEFAULTS


# ---------------------------------------------------------------- command line


def test_the_command_line_lists_explains_collects_checks_and_forgets(tmp_path, capsys):
    source = tmp_path / "source"
    source.write_text("x")

    @once.node(version="1")
    def size(path, unit):
        with open(path) as file:
            return len(file.read()) * unit

    folder = tmp_path / "store"
    once.compute([size(once.File(source), unit) for unit in (1, 2)], store=folder)

    def run(*arguments):
        code = main.main(["graph", *arguments, "--store", str(folder)])
        return code, capsys.readouterr().out

    code, out = run("ls")
    assert (code, out.count(size.name)) == (0, 2)
    key = out.split()[0]
    assert f"source {source}" in run("show", key)[1]
    assert "argument unit changed: " in run("why", key)[1]
    assert "0 damaged" in run("verify")[1]
    assert "0 bytes left" in run("gc", "--budget", "0")[1]
    code, out = run("forget", "--source", str(source))
    assert (code, "2 results" in out, "0 left" in out) == (0, True, True)
    assert str(source) in run("forget", "--list")[1]
    for command in (["ls"], ["gc"], ["verify"], ["forget", "--list"]):
        code, out = run(*command, "--json")
        assert code == 0
        assert out[0] in "[{"
    assert main.main(["graph", "show", "zz", "--store", str(folder)]) == 2
