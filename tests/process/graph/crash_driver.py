"""Forks children that compute on one store, and has them die of SIGKILL; checks what is left.

`points`: a child kills itself at its k-th write to the store, for every k until one survives.
`random`: the parent kills children at random instants.
Prints how many died, then "ok".
"""

import os
import random
import select
import signal
import sys

import counted_nodes

import trainonce as once
from trainonce.graph import blobs, db, upkeep

NUM = 2


def child(store_path, log, pipe, kill_at):
    """Compute node by node; report each result only after `compute` has returned it."""
    if kill_at is not None:
        _kill_at(kill_at)
    store = once.open_store(store_path)
    for factor, node in enumerate(counted_nodes.graph(NUM, log)):
        value = once.compute(node, store=store, workers=1)
        os.write(pipe, f"{factor} {value}\n".encode())
    os._exit(0)


def _kill_at(number):
    """Die at the `number`-th point: a statement of SQLite, or a sync or rename of a file."""
    left = [number]

    def point(*_):
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def around(function):
        def wrapped(*args, **kwargs):
            point()
            result = function(*args, **kwargs)
            point()
            return result

        return wrapped

    connect = db.Database._connect

    def traced(self, options):
        connection = connect(self, options)
        connection.set_trace_callback(point)
        return connection

    db.Database._connect = traced
    blobs.os.fsync = around(os.fsync)
    blobs.os.replace = around(os.replace)


def fork(store_path, log, kill_at):
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        try:
            child(store_path, log, writer, kill_at)
        finally:
            os._exit(70)
    os.close(writer)
    return pid, reader


def finish(pid, reader):
    """Wait for a child; return whether it was killed and what it had reported."""
    text = b""
    while piece := os.read(reader, 65536):
        text += piece
    os.close(reader)
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL, status
    else:
        assert os.WEXITSTATUS(status) == 0, f"exit {status}"
    lines = [line.split() for line in text.decode().splitlines()]
    return os.WIFSIGNALED(status), {int(k): int(v) for k, v in lines}


def check(store_path, reported):
    """Whatever was reported is in the store, whole and right."""
    store = once.open_store(store_path)
    expected = counted_nodes.expected(NUM)
    assert all(expected[factor] == value for factor, value in reported.items())
    entries = [e for e in store.index.entries() if e.node.endswith("total")]
    values = {store.load(entry).value for entry in entries}
    assert {expected[factor] for factor in reported} <= values, "a committed result is lost"
    found = upkeep.verify(store, heal=False)
    assert not found.damaged, found
    assert not found.missing, found
    return store


def points(folder):
    killed = 0
    while True:
        store_path = f"{folder}/store-{killed}"
        died, reported = finish(*fork(store_path, f"{folder}/log", killed))
        if os.path.exists(f"{store_path}/index.db"):
            store = check(store_path, reported)
            if killed % 4 == 0 or not died:
                goes_on(store, folder)
        if not died:
            return killed
        killed += 1


def goes_on(store, folder):
    """What is left of a dead process does not stop the next one, and is swept."""
    nodes = counted_nodes.graph(NUM, f"{folder}/log")
    assert once.compute(nodes, store=store, workers=1) == counted_nodes.expected(NUM)
    upkeep.collect(store)
    assert not list((store.root / "tmp").iterdir())


def at_random(folder, rounds):
    chance, killed = random.Random(0), 0
    for number in range(rounds):
        # A fresh store every few rounds, else all would soon be hits.
        store_path = f"{folder}/random-{number // 3}"
        pid, reader = fork(store_path, f"{folder}/log", None)
        select.select([], [], [], chance.uniform(0, 0.06))
        os.kill(pid, signal.SIGKILL)
        died, reported = finish(pid, reader)
        killed += died
        if os.path.exists(f"{store_path}/index.db"):
            check(store_path, reported)
    return killed


if __name__ == "__main__":
    mode, folder = sys.argv[1:3]
    print(points(folder) if mode == "points" else at_random(folder, int(sys.argv[3])))
    print("ok")
