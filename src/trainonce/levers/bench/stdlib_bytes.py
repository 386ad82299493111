"""The bytes of Python's standard library, and a small decoder transformer.

Shapes: B sequences of T bytes, D features, H heads; tokens (B, T), logits (B, T, 256).
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import platform
import random
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from trainonce.levers.harness import Recipe
from trainonce.levers.optimizer import muon_adamw
from trainonce.levers.schedule import Schedule
from trainonce.levers.sequence import SequenceWarmup
from trainonce.worker.seeds import derive_seed

if TYPE_CHECKING:
    from collections.abc import Mapping

    from trainonce.levers.usage import UsageMeter

_CORPUS_BYTES = 3_000_000
_HELD_OUT_BYTES = 150_000
_EVAL_SEQUENCES = 256
_HEADS = 2


@dataclass(frozen=True, kw_only=True)
class BytesRecipe:
    """How to train on bytes.

    Args:
        optimizer: "adam" (no weight decay), "adamw" or "muon".
        lr: Peak rate.
        tokens: Tokens to train on, over the whole run.
        schedule: Warm-up and decay to zero; else a constant rate.
        sequence_warmup: Share of the run with shorter sequences; 0 for none.
        subset: Share of the training bytes, drawn at random in pieces.
        batch: Sequences of an update.
        ns_steps: Newton-Schulz steps of Muon.
    """

    optimizer: str = "adam"
    lr: float = 1e-3
    tokens: int = 300_000
    schedule: bool = False
    sequence_warmup: float = 0.0
    subset: float = 1.0
    batch: int = 16
    ns_steps: int = 5


class Block(nn.Module):
    """Attention with rotary positions, and a two-layer perceptron; both residual."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm_in, self.norm_mid = nn.RMSNorm(dim), nn.RMSNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)
        self.up = nn.Linear(dim, 4 * dim, bias=False)
        self.down = nn.Linear(4 * dim, dim, bias=False)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.down.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (B, T, D) for (B, T, D)."""
        batch, length, dim = x.shape
        shape = (batch, length, 3, _HEADS, dim // _HEADS)
        query, key, value = self.qkv(self.norm_in(x)).view(shape).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(_rotate(query), _rotate(key), value, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, dim))
        return x + self.down(F.gelu(self.up(self.norm_mid(x))))


def _rotate(x: torch.Tensor) -> torch.Tensor:
    """Turn pairs of features of (B, H, T, F) by angles that grow with the position."""
    half = x.shape[-1] // 2
    rates = 10_000.0 ** (-torch.arange(half, device=x.device) / half)
    angles = torch.arange(x.shape[-2], device=x.device)[:, None] * rates
    first, second = x[..., :half], x[..., half:]
    sine, cosine = angles.sin(), angles.cos()
    return torch.cat([first * cosine - second * sine, first * sine + second * cosine], -1)


class BytesNet(nn.Module):
    """A decoder of `layers` blocks over bytes."""

    def __init__(self, dim: int, layers: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, dim)
        self.blocks = nn.ModuleList(Block(dim) for _ in range(layers))
        self.norm = nn.RMSNorm(dim)
        self.head = nn.Linear(dim, 256, bias=False)
        nn.init.normal_(self.embed.weight, std=0.08)
        nn.init.normal_(self.head.weight, std=0.02)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return logits (B, T, 256) of tokens (B, T)."""
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class StdlibBytes:
    """The task; see `trainonce.levers.harness.Task`.

    Args:
        dim: Features of the transformer.
        layers: Its blocks.
        context: Bytes of a sequence.
        split_seed: Order of the files, and so what is for training, tuning and reporting.
    """

    name = "bytes"
    metric = "bits_per_byte"
    margin = 0.02

    def __init__(
        self, dim: int = 32, layers: int = 2, context: int = 64, split_seed: int = 0
    ) -> None:
        data = _corpus(split_seed)
        self._digest = hashlib.sha256(data).hexdigest()
        tokens = torch.frombuffer(bytearray(data), dtype=torch.uint8).long()
        self._splits = {
            "tuning": tokens[-2 * _HELD_OUT_BYTES : -_HELD_OUT_BYTES],
            "reporting": tokens[-_HELD_OUT_BYTES:],
        }
        self._train = tokens[: -2 * _HELD_OUT_BYTES]
        self._dim, self._layers, self._context = dim, layers, context
        self._split_seed = split_seed

    def settings(self) -> dict[str, Any]:
        """Return what the result depends on beside the recipe."""
        return {
            "dim": self._dim,
            "layers": self._layers,
            "context": self._context,
            "split_seed": self._split_seed,
            "corpus": f"Python {platform.python_version()}, sha256 {self._digest[:16]}",
        }

    def shorter(self, recipe: Recipe, share: float) -> Recipe:
        """Return the recipe with fewer tokens."""
        tokens = round(recipe.settings["tokens"] * share)
        return recipe.changed(f"{share:.0%} long", tokens=tokens)

    def subset(self, recipe: Recipe, share: float) -> Recipe:
        """Return the recipe with fewer tokens, as often as before, of fewer bytes."""
        tokens = round(recipe.settings["tokens"] * share)
        return recipe.changed(f"{share:.0%} of data", tokens=tokens, subset=share)

    def train(
        self, recipe: Mapping[str, Any], seed: int, split: str, meter: UsageMeter
    ) -> dict[str, float]:
        """Train once; return bits per byte."""
        how = BytesRecipe(**recipe)
        torch.manual_seed(derive_seed("bytes", seed))
        model = BytesNet(self._dim, self._layers)
        with meter.running():
            self._train_model(model, how, seed, meter)
        return {"bits_per_byte": self._evaluate(model, self._splits[split])}

    def _train_model(self, model: BytesNet, how: BytesRecipe, seed: int, meter: UsageMeter) -> None:
        decay = 0.0 if how.optimizer == "adam" else 0.1
        optimizer = muon_adamw(
            model,
            how.lr,
            enabled=how.optimizer == "muon",
            weight_decay=decay,
            ns_steps=how.ns_steps,
        )
        total = max(how.tokens // (how.batch * self._context), 1)
        schedule = Schedule(optimizer, total, enabled=how.schedule)
        warmup = SequenceWarmup(
            self._context, total, ramp=how.sequence_warmup, enabled=how.sequence_warmup > 0
        )
        generator = torch.Generator().manual_seed(derive_seed("order", seed))
        data = self._part(how.subset, seed)
        window = torch.arange(self._context + 1)

        def update(x: torch.Tensor, y: torch.Tensor) -> None:
            F.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        for step in range(total):
            schedule.begin_step(step)
            warmup.begin_step(step)
            starts = torch.randint(len(data) - self._context, (how.batch, 1), generator=generator)
            pieces = data[starts + window]
            x, y = warmup.shape_batch((pieces[:, :-1], pieces[:, 1:]))
            key = (how.optimizer, *x.shape)
            meter.step(key, lambda x=x, y=y: update(x, y), samples=len(pieces), tokens=x.numel())

    def _part(self, share: float, seed: int) -> torch.Tensor:
        if share == 1:
            return self._train
        pieces = self._train[: len(self._train) // 10_000 * 10_000].view(-1, 10_000)
        generator = torch.Generator().manual_seed(derive_seed("subset", seed))
        chosen = torch.randperm(len(pieces), generator=generator)[: round(share * len(pieces))]
        return pieces[chosen].flatten()

    @torch.no_grad()
    def _evaluate(self, model: BytesNet, data: torch.Tensor) -> float:
        last = len(data) - self._context - 1
        starts = torch.linspace(0, last, _EVAL_SEQUENCES).long()[:, None]
        pieces = data[starts + torch.arange(self._context + 1)]
        losses = [
            F.cross_entropy(model(part[:, :-1]).flatten(0, 1), part[:, 1:].flatten()).item()
            for part in pieces.split(64)
        ]
        return sum(losses) / len(losses) / math.log(2)


def _corpus(split_seed: int) -> bytes:
    """Return the library's top-level modules in an order of the seed, cut to a fixed size."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    random.Random(split_seed).shuffle(files)
    return b"".join(file.read_bytes() for file in files)[:_CORPUS_BYTES]


def _recipe(name: str, **changes: Any) -> Recipe:
    return Recipe(name, dataclasses.asdict(BytesRecipe(**changes)))


def default() -> Recipe:
    """Return what somebody would write without thinking about it."""
    return _recipe("adam 1e-3, 300k tokens")


def baseline(grid: str) -> list[Recipe]:
    """Return AdamW with decay to zero, over rates, batch sizes and horizons."""
    small = [
        _named("adamw", lr, batch, 0.0, thousands)
        for thousands, choices in (
            (300, ((2.5e-3, 2), (5e-3, 2), (1e-2, 2), (2e-2, 2))),
            (100, ((5e-3, 2), (1e-2, 2), (1e-2, 4))),
        )
        for lr, batch in choices
    ]
    if grid == "small":
        return small
    return [
        *small,
        *(_named("adamw", lr, 1, 0.0, 300) for lr in (2.5e-3, 5e-3)),
        *(_named("adamw", lr, 4, 0.0, 300) for lr in (5e-3, 1e-2, 2e-2)),
        *(_named("adamw", lr, 4, 0.0, 100) for lr in (5e-3, 2e-2)),
        *(
            _named("adamw", lr, batch, 0.0, thousands)
            for thousands in (75, 125, 225)
            for lr, batch in ((5e-3, 2), (1e-2, 2), (5e-3, 4), (1e-2, 4), (2e-2, 4))
        ),
        *(_named("adamw", 1e-2, 8, 0.0, thousands) for thousands in (100, 300)),
    ]


def candidates(grid: str) -> list[Recipe]:
    """Return AdamW and Muon, each with sequence-length warm-up, and Muon alone."""
    fewer_steps = [
        _named("muon", lr, 4, 0.7, thousands, ns_steps=3)
        for lr, horizons in (
            (1e-2, (80, 145, 160, 180)),
            (2e-2, (60, 80, 145, 160, 180)),
            (4e-2, (60, 160, 180)),
        )
        for thousands in horizons
    ]
    others = [  # one thing changed at a time
        _named("muon", 2e-2, 4, ramp, 160, ns_steps=steps)
        for ramp, steps in ((0.7, 5), (0.7, 2), (0.4, 3), (1.0, 3))
    ]
    small = [*fewer_steps, *others, _named("muon", 4e-2, 8, 0.7, 170, ns_steps=3)]
    if grid == "small":
        return small
    warmed = [
        _named("muon", lr, batch, 0.4, thousands)
        for thousands in (50, 60, 70, 80, 125, 150, 175, 200)
        for lr, batch in ((2e-2, 4), (4e-2, 4), (4e-2, 8), (4e-2, 2))
    ]
    alone = [_named("muon", 4e-2, 4, 0.0, thousands) for thousands in (70, 150, 175)]
    larger_batch = [
        _named("muon", 4e-2, 8, 0.7, thousands, ns_steps=3) for thousands in (50, 60, 190)
    ]
    by_adamw = [_named("adamw", 1e-2, batch, 0.4, n) for n in (100, 225) for batch in (2, 4)]
    return [*small, *larger_batch, *warmed, *alone, *by_adamw]


def _named(
    optimizer: str, lr: float, batch: int, ramp: float, thousands: int, ns_steps: int = 5
) -> Recipe:
    name = optimizer if ns_steps == 5 else f"{optimizer} ({ns_steps} steps)"
    warmup = f" + sequence warm-up over {ramp:.0%}" if ramp else ""
    return _recipe(
        f"{name} {lr:g}, batch {batch}{warmup}, {thousands}k tokens",
        ns_steps=ns_steps,
        optimizer=optimizer,
        lr=lr,
        batch=batch,
        tokens=thousands * 1000,
        schedule=True,
        sequence_warmup=ramp,
    )
