"""Real processes on one store: a crowd evaluates once, SIGKILL and a full disk lose nothing."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

import trainonce

HERE = Path(__file__).parent
SOURCE = Path(trainonce.__file__).parents[1]


def environment():
    paths = [str(SOURCE), str(HERE)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}


def start(*arguments, command=(sys.executable,), **options):
    return subprocess.Popen(
        [*command, *map(str, arguments)],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def finish(process):
    out, err = process.communicate()
    assert process.returncode == 0, f"exit {process.returncode}\n{out}\n{err}"
    return out.split()


@pytest.fixture
def folder(tmp_path):
    """Memory where there is some: SIGKILL loses no written page, and syncs there are free."""
    shared = Path("/dev/shm")
    if not os.access(shared, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=shared) as name:
        yield Path(name)


def test_four_processes_evaluate_each_node_exactly_once(tmp_path):
    log = tmp_path / "log"
    children = [start(HERE / "counted_nodes.py", tmp_path / "store", log, 12) for _ in range(4)]
    assert [finish(child) for child in children] == [["True"]] * 4
    lines = log.read_text().split("\n")[:-1]
    assert sorted(lines) == sorted(["base 7", *(f"total {n}" for n in range(12))])


def test_processes_of_an_executor_run_nodes_that_can_be_imported(tmp_path):
    program = (
        "import sys, counted_nodes, trainonce as once\n"
        "if __name__ == '__main__':\n"
        "    values = once.compute(counted_nodes.graph(3, sys.argv[2]), store=sys.argv[1],\n"
        "                          executor='processes', workers=2)\n"
        "    print(values == counted_nodes.expected(3))\n"
    )
    script = tmp_path / "main.py"
    script.write_text(program)
    assert finish(start(script, tmp_path / "store", tmp_path / "log")) == ["True"]
    assert len((tmp_path / "log").read_text().split("\n")[:-1]) == 4


SPAWNING = """
import dataclasses, multiprocessing, sys, threading
import counted_nodes, trainonce as once
from trainonce.errors import InputMutatedError, NodeError
from concurrent.futures import ProcessPoolExecutor

@dataclasses.dataclass
class Pair:
    left: int
    right: int

class Odd(Exception):
    def __init__(self, left, right):
        super().__init__(f"{left} and {right}")

def helper(x):
    return Pair(x, SHIFT)

SHIFT = 3

@once.node(ignore=["log"])
def pair(x, log):
    counted_nodes.note(log, f"pair {x}")
    return helper(x)

@once.node(ignore=["log"])
def total(p, log):
    counted_nodes.note(log, f"total {p.left}")
    return p.left + p.right

@once.node(ignore=["log"])
def choose(x, log):
    counted_nodes.note(log, f"choose {x}")
    return total(pair(x, log), log)

@once.node(ignore=["log"])
def fail(log):
    raise Odd(1, 2)

@once.node
def spoil(items):
    items.append(4)

@once.node
def lock():
    return threading.Lock()

def ask(store, log):
    return once.compute(choose(1, log), store=store)

if __name__ == "__main__":
    store, log = sys.argv[1:]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=context) as pool:
        values = [pool.submit(ask, store, log).result(), ask(store, log)]
        # Nodes that run in the pool, and one of this script.
        values.append(once.compute(choose(2, log), store=store, executor=pool))
        values.append(once.compute(choose(2, log), store=store, executor=pool))
        for node, kind, word in [
            (fail(log), NodeError, "Odd: 1 and 2"),
            (spoil([3]), InputMutatedError, "spoil changed its input items"),
            (lock(), NodeError, "cannot be sent to another process"),
        ]:
            try:
                once.compute(node, store=store, executor=pool)
            except kind as error:
                assert word in str(error)
                values.append("refused")
        values.append(once.compute(total(Pair(3, 4), log), store=store, executor=pool))
    print(*values)
"""


def test_processes_that_were_spawned_share_the_nodes_of_their_script(tmp_path):
    script, log = tmp_path / "main.py", tmp_path / "log"
    script.write_text(SPAWNING)
    assert finish(start(script, tmp_path / "store", log)) == [*"4455", *["refused"] * 3, "7"]
    lines = sorted(log.read_text().split("\n")[:-1])
    numbered = [f"{name} {x}" for name in ("choose", "pair", "total") for x in (1, 2)]
    assert lines == sorted([*numbered, "total 3"])


POOLING = """
import sys
import counted_nodes, trainonce as once
from joblib.externals.loky import get_reusable_executor

SHIFT = 3

def helper(x):
    return x + SHIFT

@once.node(ignore=["log"])
def shifted(x, log):
    counted_nodes.note(log, f"shifted {x}")
    return helper(x)

@once.node(ignore=["log"])
def choose(x, log):
    counted_nodes.note(log, f"choose {x}")
    return shifted(x, log)

store, log = sys.argv[1:]
pool = get_reusable_executor(2)
for _ in range(2):
    print(*once.compute(choose(1, log), choose(2, log), store=store, executor=pool))
pool.shutdown()
"""


def test_a_pool_that_cannot_import_the_script_gets_its_functions_by_value(tmp_path):
    pytest.importorskip("joblib")
    script, log = tmp_path / "main.py", tmp_path / "log"
    script.write_text(POOLING)
    assert finish(start(script, tmp_path / "store", log)) == [*"4545"]
    lines = sorted(log.read_text().split("\n")[:-1])
    assert lines == ["choose 1", "choose 2", "shifted 1", "shifted 2"]


def test_a_sigkill_at_any_point_of_a_write_loses_nothing_that_was_committed(folder):
    killed, ok = finish(start(HERE / "crash_driver.py", "points", folder))
    assert ok == "ok"
    assert int(killed) > 100


def test_a_sigkill_at_random_instants_loses_nothing_that_was_committed(folder):
    killed, ok = finish(start(HERE / "crash_driver.py", "random", folder, 150))
    assert ok == "ok"
    assert int(killed) > 50


FULL = """
import sys, os, errno
import numpy as np
import trainonce as once
from trainonce.graph import upkeep

@once.node(version="1")
def big(n):
    return np.full(40_000, n)

store = once.open_store(sys.argv[1])
for n in range(12):
    assert once.compute(big(n), store=store)[0] == n
print("full" if any("No space" in t or "is full" in t for t in store.troubles) else store.troubles)
kept = [e for e in store.index.entries() if store.load(e) is not None]
assert all((store.load(e).value == e_n).all() for e in kept for e_n in [store.load(e).value[0]])
assert 0 < len(kept) < 12, len(kept)
assert not upkeep.verify(store).damaged
assert not list((store.root / "tmp").iterdir())
print("ok")
"""


def test_a_full_disk_costs_only_the_caching(tmp_path):
    namespace = ["unshare", "--map-root-user", "--mount"]
    probe = subprocess.run([*namespace, "true"], capture_output=True, check=False)
    if probe.returncode:
        pytest.skip("needs the right to mount a small file system in a namespace of its own")
    (tmp_path / "disk").mkdir()
    (tmp_path / "full.py").write_text(FULL)
    mount = f"mount -t tmpfs -o size=2m none {tmp_path}/disk"
    run = f"{mount} && exec {sys.executable} {tmp_path}/full.py {tmp_path}/disk/store"
    assert finish(start("-c", run, command=[*namespace, "sh"])) == ["full", "ok"]


READ_ONLY = """
import sys, os
import trainonce as once

@once.node(version="1")
def f(n):
    print("run", n)
    return [n]

store = once.open_store(sys.argv[1], read_only=sys.argv[2] == "ro")
print(once.compute(f(1), store=store), once.compute(f(int(sys.argv[3])), store=store))
"""


def test_a_store_on_a_read_only_file_system_is_read_and_misses_are_computed(tmp_path):
    namespace = ["unshare", "--map-root-user", "--mount"]
    probe = subprocess.run([*namespace, "true"], capture_output=True, check=False)
    if probe.returncode:
        pytest.skip("needs the right to mount in a namespace of its own")
    store = tmp_path / "disk" / "store"
    store.parent.mkdir()
    script = tmp_path / "main.py"
    script.write_text(READ_ONLY)
    assert finish(start(script, store, "rw", 1))[:2] == ["run", "1"]
    bind = f"mount --bind {store.parent} {store.parent} && mount -o remount,ro,bind {store.parent}"
    touch = f"if touch {store}/x 2>/dev/null; then echo writable; fi"
    run = f"{bind}; {touch}; exec {sys.executable} {script} {store} ro 2"
    out = finish(start("-c", run, command=[*namespace, "sh"]))
    assert out == ["run", "2", "[1]", "[2]"]
