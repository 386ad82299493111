"""A transformer under HSDP on the bytes of Python's standard library survives a lost shard.

    trainonce run --nproc-per-node 4 --spares 1 examples/07_sharded.py

Two replicas of the model, each split over two ranks. Kill a worker while it trains, or let a
fault plan do it: `--chaos "kill rank=3 step=20 point=backward"` before the script's name. Its
shard comes from the rank of the other replica that holds the same. At the end each rank prints
the SHA-256 digest of its shard and optimizer state: with and without the kill it is the same.
With `--replicas 1` nobody else holds a shard, and it comes from its shadow in memory. `torchrun`
runs the script too, with nothing to recover from.
"""

import argparse
import hashlib
import sysconfig
from pathlib import Path

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional
from torch.utils.data import Dataset

import trainonce

NUM_BYTE_VALUES = 256


class Excerpts(Dataset):
    """Excerpts of `context + 1` bytes of the standard library's modules, back to back."""

    def __init__(self, context: int, max_bytes: int = 1_000_000) -> None:
        modules = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
        text = b"".join(module.read_bytes() for module in modules)[:max_bytes]
        self.bytes = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        self.context = context

    def __len__(self) -> int:
        return (len(self.bytes) - 1) // self.context

    def __getitem__(self, index: int) -> torch.Tensor:
        begin = index * self.context
        return self.bytes[begin : begin + self.context + 1].long()


class GPT(nn.Module):
    """Predicts the next byte."""

    def __init__(self, context: int, width: int = 96, num_layers: int = 3) -> None:
        super().__init__()
        self.token = nn.Embedding(NUM_BYTE_VALUES, width)
        self.position = nn.Parameter(torch.zeros(context, width))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, 4, 4 * width, dropout=0.1, batch_first=True, norm_first=True
            )
            for _ in range(num_layers)
        )
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, NUM_BYTE_VALUES))
        mask = nn.Transformer.generate_square_subsequent_mask(context)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.token(tokens) + self.position
        for block in self.blocks:
            x = block(x, src_mask=self.mask, is_causal=True)
        return self.head(x)


def digest(model: nn.Module, optimizer: torch.optim.Optimizer) -> str:
    state = hashlib.sha256()
    for parameter in model.parameters():
        for tensor in (parameter, *optimizer.state[parameter].values()):
            local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
            state.update(local.detach().cpu().numpy().tobytes())
    return state.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=8, help="of each rank")
    parser.add_argument("--context", type=int, default=64, help="bytes the model looks back on")
    args = parser.parse_args()

    run = trainonce.init()  # 1. in place of dist.init_process_group
    torch.manual_seed(0)
    shape = (args.replicas, run.world_size // args.replicas)
    mesh = init_device_mesh(run.device.type, shape, mesh_dim_names=("replicate", "shard"))
    model = GPT(args.context).to(run.device)
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loader = run.dataloader(Excerpts(args.context), args.batch_size, shuffle=True)  # 2.
    run.protect(model=model, optimizer=optimizer, loader=loader)  # 3. what must survive

    @run.step  # 4. each call happens exactly once
    def train_step(batch: torch.Tensor) -> object:
        batch = batch.to(run.device)
        loss = functional.cross_entropy(model(batch[:, :-1]).mT, batch[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return run.mean(loss.detach())  # 5. averaged over the ranks, after the commit

    for batch in run.batches(loader, max_steps=args.steps):  # 6. resumes where a rank left off
        loss = train_step(batch)
        if run.step_index % 10 == 0 and run.rank == 0:
            print(f"step {run.step_index} loss {loss:.4f}", flush=True)
    print(f"rank {run.rank} digest {digest(model, optimizer)}", flush=True)


if __name__ == "__main__":
    main()
