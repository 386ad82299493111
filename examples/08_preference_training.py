"""Preference training whose reference log-probabilities are computed once, for every run.

A small language model over the standard library's text is the reference. Policies learn to
prefer real lines to shuffled ones by direct preference optimisation (Rafailov et al., 2023),
once for each beta; the loss needs what the frozen reference makes of each pair, which is the
same in every epoch of every run. Run it twice: the second run computes none of it.

    python examples/08_preference_training.py
"""

import argparse
import copy
import inspect
import json.decoder
import textwrap

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import trainonce as once

NUM_CHARS = 48
BETAS = (0.05, 0.1, 0.3)


class CharacterModel(nn.Module):
    """A small causal transformer over bytes: tokens (batch, time) -> logits (batch, time, 128)."""

    def __init__(self, width=64, layers=2):
        super().__init__()
        self.embed = nn.Embedding(128, width)
        self.place = nn.Embedding(NUM_CHARS, width)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True)
        self.blocks = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, 128)

    def forward(self, tokens):
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        hidden = self.embed(tokens) + self.place(torch.arange(tokens.shape[1]))
        return self.head(self.blocks(hidden, mask=mask, is_causal=True))


class LogProbabilities(nn.Module):
    """Sequence log-probabilities of two continuations: (batch, 2, time) -> (batch, 2)."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pairs):
        tokens = pairs.flatten(0, 1)
        logits = self.model(tokens[:, :-1]).log_softmax(-1)
        return logits.gather(-1, tokens[:, 1:, None])[..., 0].sum(-1).view(-1, 2)


def preference_pairs(count):
    """Real lines of the standard library against the same with words in another order."""
    modules = (argparse, json.decoder, textwrap)
    text = "".join(map(inspect.getsource, modules)).encode("ascii", "ignore")
    chance = np.random.default_rng(0)
    pairs = np.zeros((count, 2, NUM_CHARS), np.int64)
    for number, start in enumerate(chance.integers(0, len(text) - NUM_CHARS, count)):
        good = text[start : start + NUM_CHARS]
        words = good.split(b" ")
        bad = b" ".join([words[place] for place in chance.permutation(len(words))])
        pairs[number] = [list(good), list(bad)]
    return torch.from_numpy(pairs)


def train_reference(pairs):
    """Return a model that knows a little of the language."""
    torch.manual_seed(0)
    model = CharacterModel()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for tokens in pairs[:, 0].split(64):
        nn.functional.cross_entropy(model(tokens[:, :-1]).mT, tokens[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval().requires_grad_(False)


def policy_of(reference):
    """Return a policy to be trained: it begins as the reference."""
    return LogProbabilities(copy.deepcopy(reference).requires_grad_(True))


def preference_loss(logs, reference_logs, beta):
    """Return the loss of direct preference optimisation; logs are (batch, 2), the better first."""
    margin = (logs - reference_logs) @ torch.tensor([1.0, -1.0])
    return -nn.functional.logsigmoid(beta * margin).mean()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=512)
    parser.add_argument("--epochs", type=int, default=2)
    options = parser.parse_args()
    pairs = preference_pairs(options.pairs)
    reference = train_reference(pairs)
    frozen = LogProbabilities(reference).eval()
    for beta in BETAS:
        # What enters the reference is replaced by what it makes of it; the second copy passes.
        rows = once.features(frozen, TensorDataset(pairs, pairs), batch_size=128)
        loader = DataLoader(rows, batch_size=128, shuffle=True, collate_fn=rows.collate)
        policy = policy_of(reference)
        optimizer = torch.optim.Adam(policy.parameters(), lr=1e-3)
        for _ in range(options.epochs):
            for reference_logs, tokens in loader:
                loss = preference_loss(policy(tokens), reference_logs, beta)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        print(f"beta {beta}: loss {loss.item():.4f}; reference: {rows.report.computed} computed, "
              f"{rows.report.hits} found")  # fmt: skip


if __name__ == "__main__":
    main()
