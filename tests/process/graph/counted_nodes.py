"""Nodes whose evaluations are counted in a log. Run as a script, or forked by `crash_driver`."""

import os
import sys

import numpy as np

import trainonce as once


@once.node(ignore=["log"])
def base(seed: int, log: str) -> np.ndarray:
    note(log, f"base {seed}")
    return np.random.default_rng(seed).integers(0, 1000, 2000)


@once.node(ignore=["log"])
def total(array: np.ndarray, factor: int, log: str) -> int:
    note(log, f"total {factor}")
    return int(array.sum()) * factor


def note(log: str, line: str) -> None:
    """Append a line in one write, so that lines of many processes do not mix."""
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        os.write(descriptor, f"{line}\n".encode())
    finally:
        os.close(descriptor)


def graph(num: int, log: str) -> list:
    """Return `num` nodes that share one input."""
    shared = base(7, log)
    return [total(shared, factor, log) for factor in range(num)]


def expected(num: int) -> list[int]:
    array = np.random.default_rng(7).integers(0, 1000, 2000)
    return [int(array.sum()) * factor for factor in range(num)]


if __name__ == "__main__":
    store, log, num = sys.argv[1], sys.argv[2], int(sys.argv[3])
    values = once.compute(graph(num, log), store=store, workers=2)
    print(values == expected(num))
