"""A small GPT on the bytes of Python's standard library, which survives the death of a rank.

    trainonce run --nproc-per-node 2 --spares 1 examples/01_survive_a_kill.py

Kill a worker while it trains (`trainonce ps` shows their pids), or let a fault plan do it:
`--chaos "kill rank=1 step=100 point=backward"` before the script's name. At the end each rank
prints the SHA-256 digest of its parameters and optimizer state: with and without the kill it
is the same. `python` and `torchrun` run the script too, with nothing to recover from.
"""

import argparse
import hashlib
import sysconfig
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset

import trainonce

NUM_BYTE_VALUES = 256


class Excerpts(Dataset):
    """Excerpts of `context + 1` bytes of the standard library's modules, back to back."""

    def __init__(self, context: int, max_bytes: int = 2_000_000) -> None:
        modules = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
        text = b"".join(module.read_bytes() for module in modules)[:max_bytes]
        self.bytes = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        self.context = context

    def __len__(self) -> int:
        return (len(self.bytes) - 1) // self.context

    def __getitem__(self, index: int) -> torch.Tensor:
        begin = index * self.context
        return self.bytes[begin : begin + self.context + 1].long()


class Block(nn.Module):
    """One layer of a transformer: attention, then a small network."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        wide = 4 * width
        self.mlp = nn.Sequential(nn.Linear(width, wide), nn.GELU(), nn.Linear(wide, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # B batch, T time, C width; queries, keys and values are (B, heads, T, C / heads).
        b, t, c = x.shape
        heads = self.qkv(self.norm1(x)).view(b, t, 3, self.num_heads, c // self.num_heads)
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(b, t, c))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """Predicts the next byte."""

    def __init__(self, context: int, width: int = 96, num_layers: int = 3) -> None:
        super().__init__()
        self.token = nn.Embedding(NUM_BYTE_VALUES, width)
        self.position = nn.Parameter(torch.zeros(context, width))
        self.blocks = nn.Sequential(*(Block(width, num_heads=4) for _ in range(num_layers)))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, NUM_BYTE_VALUES))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.token(tokens) + self.position))


def digest(model: nn.Module, optimizer: torch.optim.Optimizer) -> str:
    tensors = list(model.state_dict().values())
    for state in optimizer.state_dict()["state"].values():
        tensors += state.values()
    return hashlib.sha256(b"".join(each.cpu().numpy().tobytes() for each in tensors)).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=16, help="of each rank")
    parser.add_argument("--context", type=int, default=64, help="bytes the model looks back on")
    parser.add_argument("--log-every", type=int, default=20)
    args = parser.parse_args()

    run = trainonce.init()  # 1. in place of dist.init_process_group
    torch.manual_seed(0)
    model = DistributedDataParallel(GPT(args.context).to(run.device))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loader = run.dataloader(Excerpts(args.context), args.batch_size, shuffle=True)  # 2.
    run.protect(model=model, optimizer=optimizer, loader=loader)  # 3. what must survive

    @run.step  # 4. each call happens exactly once
    def train_step(batch: torch.Tensor) -> object:
        batch = batch.to(run.device)
        loss = functional.cross_entropy(model(batch[:, :-1]).mT, batch[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return run.mean(loss.detach())  # 5. averaged over the ranks, after the commit

    for batch in run.batches(loader, max_steps=args.steps):  # 6. resumes where a rank left off
        loss = train_step(batch)
        if run.step_index % args.log_every == 0 and run.rank == 0:
            print(f"step {run.step_index} loss {loss:.4f}", flush=True)
    print(f"rank {run.rank} digest {digest(model, optimizer)}", flush=True)


if __name__ == "__main__":
    main()
