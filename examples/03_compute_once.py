"""Compute once: a graph of nodes whose results every later run and process finds again.

    python examples/03_compute_once.py [--store DIR]

Text of the standard library is tokenised, turned into features, and three small heads are
trained on them, to tell code that defines classes from code that does not. The second pass
evaluates nothing; another learning rate evaluates one head; `why` says which field of the key
changed. Run it again with the same --store: then the first pass evaluates nothing, either.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import trainonce as once
from trainonce.graph.why import why

LIBRARY = Path(json.__file__).parent


@once.node
def tokenize(folder: once.Dir, vocab: int) -> list[np.ndarray]:
    """Return the words of each file as numbers below `vocab`; int64, one array a file."""
    files = sorted(Path(folder).rglob("*.py"))
    return [np.array([number(word) % vocab for word in f.read_text().split()]) for f in files]


def number(word: str) -> int:
    """Return a number for a word that is the same in every process (`hash` is not)."""
    return sum(ord(letter) * 31**place for place, letter in enumerate(word[:12]))


@once.node
def features(tokens: list[np.ndarray], vocab: int) -> torch.Tensor:
    """Return how often each word occurs in each window of 50; (window, vocab), float32."""
    words = np.concatenate(tokens)
    windows = words[: len(words) // 50 * 50].reshape(-1, 50)
    counts = np.stack([np.bincount(window, minlength=vocab) for window in windows])
    return torch.from_numpy(counts).float()


@once.node(numerics="exact")
def train_head(x: torch.Tensor, lr: float, steps: int = 200) -> dict[str, float]:
    """Fit a linear head by gradient descent; return its loss at the end.

    x: (window, vocab), float32. The target is whether the word `def` is in a window.
    """
    y = (x[:, number("def") % x.shape[1]] > 0).float()
    weight = torch.zeros(x.shape[1], requires_grad=True)
    for _ in range(steps):
        loss = torch.nn.functional.binary_cross_entropy_with_logits(x @ weight, y)
        (gradient,) = torch.autograd.grad(loss, weight)
        weight = (weight - lr * gradient).detach().requires_grad_()
    return {"lr": lr, "loss": round(float(loss.detach()), 4)}


def heads(rates: list[float]) -> list:
    """Return the graph: nothing runs here."""
    x = features(tokenize(once.Dir(LIBRARY), vocab=512), vocab=512)
    return [train_head(x, lr=lr) for lr in rates]


def show(title: str, rates: list[float], store: once.Store) -> None:
    """Compute the heads and print what had to run for it."""
    plan = once.compute(heads(rates), store=store, dry_run=True)
    num_run = sum(step.action != "hit" for step in plan.steps)
    started = time.perf_counter()
    results = once.compute(heads(rates), store=store)
    seconds = time.perf_counter() - started
    print(f"{title}: {num_run} of {len(plan.steps)} nodes evaluated in {seconds:.2f} s")
    print(f"  {results}")


def main() -> None:
    """Compute, compute again, change one parameter, and ask why."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", help="a folder to keep the results in, for the next run")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        store = once.open_store(args.store or folder)
        show("three heads", [0.1, 0.3, 1.0], store)
        show("the same again", [0.1, 0.3, 1.0], store)
        (other,) = heads([0.2])
        print(why(other, store=store))
        show("one more head", [0.1, 0.2, 0.3, 1.0], store)
        store.close()


if __name__ == "__main__":
    main()
