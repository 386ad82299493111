"""A transformer in two stages on the bytes of Python's standard library survives a lost stage.

    trainonce run --nproc-per-node 4 --spares 1 examples/09_pipeline.py

Two replicas of a pipeline of two stages (1F1B). Kill a worker while it trains, or let a fault
plan do it: `--chaos "kill rank=3 step=20 point=backward"` before the script's name. Its stage
comes from the rank of the other replica that holds the same. At the end each rank prints the
SHA-256 digest of its stage and optimizer state: with and without the kill it is the same.
`torchrun` runs the script too, with nothing to recover from.
"""

import argparse
import hashlib
import sysconfig
from pathlib import Path

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

import trainonce

NUM_BYTE_VALUES = 256
NUM_STAGES = 2


def excerpts(context: int, max_bytes: int = 1_000_000) -> torch.Tensor:
    """Return excerpts of `context + 1` bytes of the standard library's modules, as rows."""
    modules = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = b"".join(module.read_bytes() for module in modules)[:max_bytes]
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).unfold(0, context + 1, context)


class Stage(nn.Module):
    """Tokens or activations in, activations or logits out: [samples, context, ...]."""

    def __init__(self, index: int, context: int, width: int = 96, num_layers: int = 2) -> None:
        super().__init__()
        first, last = index == 0, index == NUM_STAGES - 1
        self.token = nn.Embedding(NUM_BYTE_VALUES, width) if first else None
        self.position = nn.Parameter(torch.zeros(context, width)) if first else None
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, 4, 4 * width, dropout=0.1, batch_first=True, norm_first=True
            )
            for _ in range(num_layers)
        )
        self.head = nn.Linear(width, NUM_BYTE_VALUES) if last else nn.Identity()
        mask = nn.Transformer.generate_square_subsequent_mask(context)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.token is not None:
            x = self.token(x) + self.position
        for block in self.blocks:
            x = block(x, src_mask=self.mask, is_causal=True)
        return self.head(x)


def digest(model: nn.Module, optimizer: torch.optim.Optimizer) -> str:
    state = hashlib.sha256()
    for parameter in model.parameters():
        for tensor in (parameter, *optimizer.state[parameter].values()):
            state.update(tensor.detach().cpu().numpy().tobytes())
    return state.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=16, help="of each replica")
    parser.add_argument("--context", type=int, default=64, help="bytes the model looks back on")
    args = parser.parse_args()

    run = trainonce.init()  # 1. in place of dist.init_process_group
    torch.manual_seed(0)
    shape = (NUM_STAGES, run.world_size // NUM_STAGES)
    mesh = init_device_mesh(run.device.type, shape, mesh_dim_names=("pipe", "replicate"))
    copies, index = mesh["replicate"], mesh.get_local_rank("pipe")
    model = DistributedDataParallel(
        Stage(index, args.context).to(run.device), process_group=copies.get_group()
    )
    stage = PipelineStage(model, index, NUM_STAGES, run.device, group=mesh.get_group("pipe"))
    schedule = Schedule1F1B(
        stage, 4, loss_fn=lambda logits, y: functional.cross_entropy(logits.mT, y)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    run.protect(model=model, optimizer=optimizer, replicas=copies)  # 2. who holds the same
    rows = excerpts(args.context)

    @run.step  # 3. each call happens exactly once
    def train_step(step: int) -> object:
        # The stages of a replica take the same samples.
        draw = torch.Generator().manual_seed(step * copies.size() + copies.get_local_rank())
        chosen = torch.randint(len(rows), (args.batch_size,), generator=draw)
        batch = rows[chosen].long().to(run.device)
        losses: list[torch.Tensor] = []
        last = index == NUM_STAGES - 1
        schedule.step(*([] if index else [batch[:, :-1]]), target=batch[:, 1:], losses=losses)
        optimizer.step()
        optimizer.zero_grad()
        return torch.stack(losses).mean().detach() if last else None

    for step in range(args.steps):
        loss = train_step(step)
        if loss is not None and copies.get_local_rank() == 0 and (step + 1) % 10 == 0:
            print(f"step {step + 1} loss {float(loss):.4f}", flush=True)
    print(f"rank {run.rank} digest {digest(model, optimizer)}", flush=True)


if __name__ == "__main__":
    main()
