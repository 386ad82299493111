"""Ways to train that people use, each a few steps, one after the other.

Each variant builds its own models and returns what is to be protected, and a step function
that takes the number of the step. Named on the command line, all by default.
"""

import contextlib
import sys

import torch
import torch.distributed as dist
from pieces import WIDTH, batch, loss_of, mlp
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook as powerSGD
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.nn.parallel import DistributedDataParallel as DDP

import trainonce
from trainonce.testing import record, state_digests

STEPS = 6
VARIANTS = {}
run = trainonce.init(seed=7)


def variant(function):
    VARIANTS[function.__name__] = function
    return function


def small_ddp(module, **options):
    return DDP(module, bucket_cap_mb=0.005, **options)


def plain_loop(model, optimizer):
    def step(i):
        loss = loss_of(model, i, run.rank)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return {"model": model, "optimizer": optimizer}, step


def sgd(module):
    return torch.optim.SGD(module.parameters(), lr=0.01, momentum=0.9)


def adamw(module):
    return torch.optim.AdamW(module.parameters(), lr=1e-3)


@variant
def batchnorm_dropout():
    model = small_ddp(mlp(1, torch.nn.BatchNorm1d(48), torch.nn.Dropout(0.2)))
    return plain_loop(model, adamw(model))


@variant
def buffers_not_broadcast():
    model = small_ddp(mlp(1, torch.nn.BatchNorm1d(48)), broadcast_buffers=False)
    return plain_loop(model, sgd(model))


class SometimesUnused(torch.nn.Module):
    """Its second branch has gradients in odd steps only."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.odd = mlp(), mlp(), False

    def forward(self, x):
        return self.first(x) + self.second(x) if self.odd else self.first(x)


@variant
def find_unused():
    model = small_ddp(SometimesUnused(), find_unused_parameters=True)
    optimizer = adamw(model)
    objects, step = plain_loop(model, optimizer)

    def odd_step(i):
        model.module.odd = i % 2 == 1
        return step(i)

    return objects, odd_step


@variant
def static_graph():
    model = small_ddp(mlp(), static_graph=True)
    return plain_loop(model, adamw(model))


@variant
def bucket_view():
    model = small_ddp(mlp(), gradient_as_bucket_view=True)
    optimizer = sgd(model)

    def step(i):
        loss = loss_of(model, i, run.rank)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        return loss.detach()

    return {"model": model, "optimizer": optimizer}, step


@variant
def no_sync_inside():
    model = small_ddp(mlp())
    optimizer = adamw(model)

    def step(i):
        for part in range(3):
            with contextlib.nullcontext() if part == 2 else model.no_sync():
                loss_of(model, 100 * part + i, run.rank).backward()
        optimizer.step()
        optimizer.zero_grad()

    return {"model": model, "optimizer": optimizer}, step


@variant
def no_sync_across():
    model = small_ddp(mlp())
    optimizer = adamw(model)

    def step(i):
        last = i % 3 == 2
        with contextlib.nullcontext() if last else model.no_sync():
            loss = loss_of(model, i, run.rank)
            loss.backward()
        if last:
            optimizer.step()
            optimizer.zero_grad()
        return loss.item()

    return {"model": model, "optimizer": optimizer}, step


@variant
def clipping():
    model = small_ddp(mlp())
    optimizer = adamw(model)

    def step(i):
        loss_of(model, i, run.rank).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
        return norm

    return {"model": model, "optimizer": optimizer}, step


@variant
def amp_scaler():
    model = small_ddp(mlp())
    optimizer = adamw(model)
    # Overflows at first, so that steps are skipped and the scale moves.
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126, growth_interval=2)

    def step(i):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(model, i, run.rank)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        return loss.detach()

    return {"model": model, "optimizer": optimizer, "scaler": scaler}, step


@variant
def schedulers():
    model = small_ddp(mlp())
    optimizer = sgd(model)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    scheduler = torch.optim.lr_scheduler.SequentialLR(optimizer, [warmup, cosine], [3])

    objects, inner = plain_loop(model, optimizer)

    def step(i):
        loss = inner(i)
        scheduler.step()
        return loss

    return {**objects, "scheduler": scheduler}, step


@variant
def comm_hook():
    model = small_ddp(mlp())
    model.register_comm_hook(None, fp16_compress_hook)
    return plain_loop(model, sgd(model))


@variant
def powersgd_hook():
    model = DDP(mlp())
    state = powerSGD.PowerSGDState(None, start_powerSGD_iter=2, min_compression_rate=0.5)
    model.register_comm_hook(state, powerSGD.powerSGD_hook)
    return plain_loop(model, sgd(model))


@variant
def gan():
    judge, maker = small_ddp(mlp()), small_ddp(mlp(WIDTH))
    judge_optimizer, maker_optimizer = adamw(judge), sgd(maker)

    def step(i):
        x, _ = batch(i, run.rank)
        fake = maker(x)
        judge_loss = judge(fake.detach()).mean() - judge(x).mean()
        judge_optimizer.zero_grad()
        judge_loss.backward()
        judge_optimizer.step()
        maker_loss = -judge(maker(x)).mean()
        maker_optimizer.zero_grad()
        maker_loss.backward()
        maker_optimizer.step()
        return judge_loss.detach(), {"maker": maker_loss.detach()}

    return {
        "judge": judge, "maker": maker,
        "judge_optimizer": judge_optimizer, "maker_optimizer": maker_optimizer,
    }, step  # fmt: skip


@variant
def sam():
    model = small_ddp(mlp())
    optimizer = sgd(model)

    def step(i):
        loss_of(model, i, run.rank).backward()
        with torch.no_grad():
            moves = [0.05 * parameter.grad for parameter in model.parameters()]
            for parameter, move in zip(model.parameters(), moves, strict=True):
                parameter.add_(move)
        optimizer.zero_grad()
        loss = loss_of(model, i, run.rank)
        loss.backward()
        with torch.no_grad():
            for parameter, move in zip(model.parameters(), moves, strict=True):
                parameter.sub_(move)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return {"model": model, "optimizer": optimizer}, step


@variant
def lbfgs():
    model = small_ddp(mlp())
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3, history_size=2)

    def step(i):
        def closure():
            optimizer.zero_grad()
            loss = loss_of(model, i, run.rank)
            loss.backward()
            # LBFGS keeps the loss and decides by it when to stop: it must be that of all.
            shared = loss.detach().clone()
            dist.all_reduce(shared, dist.ReduceOp.AVG)
            return shared

        return optimizer.step(closure)

    return {"model": model, "optimizer": optimizer}, step


@variant
def own_collectives():
    """Before the update, of many kinds, sync and async."""
    model = small_ddp(mlp())
    objects, inner = plain_loop(model, sgd(model))

    def step(i):
        mine = torch.tensor([float(run.rank + i)])
        work = dist.all_reduce(mine, async_op=True)
        told = [None] * run.world_size
        dist.all_gather_object(told, {"rank": run.rank, "step": i})
        dist.barrier()
        cast = [f"from {run.rank}"]
        dist.broadcast_object_list(cast, 1)
        every = [torch.zeros(2) for _ in range(run.world_size)]
        dist.all_gather(every, torch.full((2,), float(run.rank)))
        part = torch.zeros(2)
        dist.reduce_scatter_tensor(part, torch.arange(2.0 * run.world_size) * (run.rank + 1))
        swapped = torch.zeros(run.world_size)
        dist.all_to_all_single(swapped, torch.arange(float(run.world_size)) + 10 * run.rank)
        work.wait()
        inner(i)
        seen = [float(mine), told, cast, torch.stack(every).tolist(), part.tolist()]
        return repr([*seen, swapped.tolist()])

    return objects, step


@variant
def late_collectives():
    """After the update, sync and async."""
    model = small_ddp(mlp())
    objects, inner = plain_loop(model, adamw(model))

    def step(i):
        loss = inner(i)
        total = loss.clone()
        dist.all_reduce(total)
        highest = loss.clone()
        work = dist.all_reduce(highest, dist.ReduceOp.MAX, async_op=True)
        work.wait()
        return total, highest

    return objects, step


@variant
def by_hand():
    """No DDP and no optimizer: gradients reduced and applied by hand."""
    model = mlp()

    def step(i):
        loss = loss_of(model, i, run.rank)
        loss.backward()
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad)
            with torch.no_grad():
                parameter.sub_(parameter.grad, alpha=1e-3)
            parameter.grad = None
        return loss.detach()

    return {"model": model}, step


@variant
def moving_average():
    model = small_ddp(mlp())
    average = torch.optim.swa_utils.AveragedModel(model.module)
    objects, inner = plain_loop(model, adamw(model))

    def step(i):
        loss = inner(i)
        average.update_parameters(model.module)
        return run.mean(loss)

    return {**objects, "average": average}, step


def main():
    names = sys.argv[1:] or list(VARIANTS)
    torch.manual_seed(0)
    built = {name: VARIANTS[name]() for name in names}
    run.protect(**{name: objects for name, (objects, _) in built.items()})
    steps = {name: run.step(function) for name, (_, function) in built.items()}
    for name in names:
        for i in range(STEPS):
            value = steps[name](i)
            if value is not None and value is not trainonce.LOST:
                run.state.setdefault("last", {})[name] = str(value)
    record(
        run.rank,
        state={name: state_digests(**objects) for name, (objects, _) in built.items()},
        values=run.state["last"],
        steps=run.step_index,
    )


main()
