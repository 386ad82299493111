"""A plain training loop of one screen, with hooks for levers and a place to stop and resume."""

import torch
import torch.nn.functional as F
from torch import nn

from trainonce.levers.base import Stack
from trainonce.levers.infobatch import InfoBatch
from trainonce.levers.optimizer import muon_adamw
from trainonce.wire import encoding

SAMPLES, LENGTH, BATCH, EPOCHS = 40, 8, 8, 4
TOTAL_STEPS = EPOCHS * SAMPLES // BATCH


class Bytes(nn.Module):
    """Next-token model; tokens (B, T) -> logits (B, T, 16)."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(16, 12)
        self.blocks = nn.ModuleList(nn.Linear(12, 12) for _ in range(3))
        self.head = nn.Linear(12, 16)

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = x + F.gelu(block(x)).cumsum(1) / tokens.shape[1]  # cuts change the result
        return self.head(x)


class Training:
    """Model, optimizer, levers, and how far they are."""

    def __init__(self, make_levers, *, muon=True):
        torch.manual_seed(0)
        self.model = Bytes()
        self.optimizer = muon_adamw(self.model, 0.02, enabled=muon)
        self.levers = Stack(**make_levers(self.model, self.optimizer))
        self.tokens = torch.randint(0, 16, (SAMPLES, LENGTH + 1))
        self.step, self.epoch, self.offset = 0, 0, 0

    def order(self, epoch):
        for lever in self.levers.levers.values():
            if isinstance(lever, InfoBatch):
                lever.set_epoch(epoch)
                return list(lever)
        return torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(epoch)).tolist()

    def run(self, until=TOTAL_STEPS):
        while self.epoch < EPOCHS and self.step < until:
            order = self.order(self.epoch)
            while self.offset < len(order) and self.step < until:
                self.train_step(torch.tensor(order[self.offset : self.offset + BATCH]))
                self.offset += BATCH
                self.step += 1
            if self.offset >= len(order):
                self.epoch, self.offset = self.epoch + 1, 0
        return self

    def train_step(self, indices):
        self.levers.begin_step(self.step)
        whole = self.tokens[indices]
        inputs, targets = self.levers.shape_batch((whole[:, :-1], whole[:, 1:]))
        with self.levers.autocast():
            logits = self.model(inputs)
            each = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        losses = each.float().view(len(indices), -1).mean(1)
        loss = self.levers.reduce_loss(losses, indices)
        self.levers.scale_loss(loss).backward()
        self.levers.update(self.optimizer)
        self.levers.end_step(self.step)
        self.optimizer.zero_grad(set_to_none=True)

    def save(self):
        """Return everything as bytes, in the form in which the runtime keeps state."""
        return encoding.encode(
            {
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "levers": self.levers.state_dict(),
                "at": [self.step, self.epoch, self.offset],
            }
        )

    def load(self, data):
        saved = encoding.decode(data)
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.levers.load_state_dict(saved["levers"])
        self.step, self.epoch, self.offset = saved["at"]
        return self

    def parameters(self):
        return dict(self.model.named_parameters())


def equal(one, other):
    mine, theirs = one.parameters(), other.parameters()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)
