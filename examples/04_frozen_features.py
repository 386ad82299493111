"""Turn a trained classifier into a monotone regression head, and compute its features once.

The convolutions of a digits classifier are frozen. A new head, monotone in every feature,
learns to predict how much ink a digit has; it is trained epoch by epoch on stored rows. Then
four heads train side by side for ten epochs. Run it twice: the second run computes no feature.

    python examples/04_frozen_features.py
"""

import time

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import trainonce as once


class Classifier(nn.Module):
    """8x8 images (batch, 1, 8, 8) to 10 digits."""

    def __init__(self):
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        )  # fmt: skip
        self.head = nn.Linear(64, 10)

    def forward(self, x):
        """Return the scores of ten digits."""
        return self.head(self.convolutions(x))


class MonotoneHead(nn.Module):
    """A regression that never falls when a feature (batch, 64) grows: weights are positive."""

    def __init__(self, width=16):
        super().__init__()
        self.scale = nn.BatchNorm1d(64, affine=False)  # scales each feature by itself
        self.first = nn.Parameter(torch.randn(64, width) * 0.1 - 4)
        self.last = nn.Parameter(torch.randn(width) * 0.1 - 1)
        self.bias = nn.Parameter(torch.linspace(-1, 1, width))
        self.shift = nn.Parameter(torch.zeros(()))

    def forward(self, features):
        """Return one number a row."""
        positive = nn.functional.softplus
        hidden = torch.tanh(self.scale(features) @ positive(self.first) + self.bias)
        return (hidden * positive(self.last)).mean(1) + self.shift


def train_classifier(images, digits, epochs=8):
    torch.manual_seed(0)
    model = Classifier()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    loader = DataLoader(TensorDataset(images, digits), batch_size=128, shuffle=True)
    for _ in range(epochs):
        for x, y in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    return model.eval()


def train_heads(heads, rows, epochs):
    """One pass over the rows an epoch, whatever the number of heads."""
    optimizer = torch.optim.Adam([p for head in heads for p in head.parameters()], lr=1e-2)
    loader = DataLoader(rows, batch_size=128, shuffle=True, collate_fn=rows.collate)
    for epoch in range(epochs):
        losses = torch.zeros(len(heads))
        for features, ink in loader:
            parts = [nn.functional.mse_loss(head(features), ink) for head in heads]
            optimizer.zero_grad()
            torch.stack(parts).sum().backward()
            optimizer.step()
            losses += torch.stack(parts).detach()
        yield epoch, (losses / len(loader)).tolist()


def main():
    data = load_digits()
    images = torch.from_numpy(data.images).float()[:, None] / 16
    model = train_classifier(images, torch.from_numpy(data.target))
    ink = images.mean((1, 2, 3))
    ink = (ink - ink.mean()) / ink.std()

    frozen = model.convolutions.requires_grad_(False)
    rows = once.features(frozen, TensorDataset(images, ink), batch_size=128)
    report = rows.report
    print(f"{len(rows)} rows: {report.hits} found, {report.computed} computed "
          f"({report.proof}; {report.identity})")  # fmt: skip

    print(f"guessing the mean: loss {ink.var():.4f}")
    for epoch, (loss,) in train_heads([MonotoneHead()], rows, epochs=10):
        print(f"monotone head, epoch {epoch}: loss {loss:.4f}")

    started = time.perf_counter()
    heads = [MonotoneHead(width) for width in (4, 8, 16, 32)]
    *_, (_, losses) = train_heads(heads, rows, epochs=10)
    print("4 heads x 10 epochs:", ", ".join(f"{loss:.4f}" for loss in losses),
          f"({time.perf_counter() - started:.1f} s, 0 features computed)")  # fmt: skip

    # The heads are really monotone: more of any feature never means less ink.
    features = rows.batch(range(100))[0]
    for head in heads:
        head.eval()
        assert (head(features + 0.1) >= head(features)).all()


if __name__ == "__main__":
    main()
