"""A CNN on scikit-learn's handwritten digits: epochs, and evaluation in a step of its own.

    trainonce run --nproc-per-node 2 --spares 1 examples/02_images.py

Shows what a script with epochs needs: `run.epochs`, a step that only evaluates, BatchNorm, a
learning-rate schedule, and a loop variable that must survive (the best accuracy so far, in
`run.state`).
"""

import argparse

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import TensorDataset

import trainonce


def digits() -> tuple[TensorDataset, TensorDataset]:
    """Return the training and the test set: images (1, 8, 8) float32 in [0, 1], labels int64."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(data.target, dtype=torch.int64)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, test = order[:1440], order[1440:]
    return TensorDataset(images[train], labels[train]), TensorDataset(images[test], labels[test])


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Dropout(0.2), nn.Linear(32 * 4 * 4, 10),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=16, help="of each rank")
    args = parser.parse_args()

    run = trainonce.init(seed=1)
    torch.manual_seed(1)
    train_set, test_set = digits()
    model = DistributedDataParallel(cnn().to(run.device))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)
    train = run.dataloader(train_set, args.batch_size, shuffle=True)
    run.protect(model=model, optimizer=optimizer, schedule=schedule, loader=train)
    run.state["best"] = 0.0

    @run.step
    def train_step(images: torch.Tensor, labels: torch.Tensor) -> object:
        model.train()
        loss = functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return run.mean(loss.detach())

    @run.step
    def end_epoch() -> float:
        """Change the learning rate and return the accuracy on the whole test set."""
        schedule.step()
        model.eval()
        # Each rank takes every world_size-th image; the sums make it the whole set again.
        images, labels = (t[run.rank :: run.world_size].to(run.device) for t in test_set.tensors)
        with torch.no_grad():
            right = (model.module(images).argmax(1) == labels).sum()
        counts = torch.stack([right, right.new_tensor(len(labels))])
        dist.all_reduce(counts)
        return float(counts[0] / counts[1])

    for epoch in run.epochs(args.epochs):
        loss = float("nan")
        for images, labels in run.batches(train):
            loss = train_step(images.to(run.device), labels.to(run.device))
        accuracy = end_epoch()
        run.state["best"] = max(run.state["best"], accuracy)
        if run.rank == 0:
            print(f"epoch {epoch} loss {loss:.4f} accuracy {accuracy:.4f}", flush=True)
    if run.rank == 0:
        print(f"best accuracy {run.state['best']:.4f}", flush=True)


if __name__ == "__main__":
    main()
