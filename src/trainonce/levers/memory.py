"""The largest batch that fits, found by trying; and accumulation that keeps the global batch."""

from __future__ import annotations

import contextlib
import copy
import gc
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from trainonce.errors import ConfigError
from trainonce.levers.base import LeverInfo, describes

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator

_CEILING = 1 << 20


@dataclass(frozen=True, kw_only=True)
class BatchSize:
    """What `find_batch_size` found.

    Args:
        micro_batch: Samples a rank can take at once.
        reason: What limited it.
        tried: Size to whether it fitted on all ranks, in order of trial.
    """

    micro_batch: int
    reason: str
    tried: dict[int, bool]


@describes(
    LeverInfo(
        name="batch-size",
        saves="nothing in FLOPs: it fills the device, so that steps take less time a sample",
        source="common practice; bisection over real steps",
        applies="the device is not full, or the batch does not fit",
        hurts="at an equal number of epochs a larger global batch trains worse: keep it, by "
        "accumulation, unless the rate is tuned again",
        reversible=True,
        default_on=True,
    )
)
def find_batch_size(
    trial: Callable[[int], object],
    *,
    maximum: int | None = None,
    start: int = 1,
    keep: Iterable[Any] = (),
    group: dist.ProcessGroup | None = None,
    device: torch.device | str = "cpu",
    agree: bool = True,
) -> BatchSize:
    """Find the largest batch size at which `trial` does not run out of memory.

    Doubles from `start` until a size does not fit, then bisects. After every trial what it
    allocated is freed, the objects in `keep` are as they were, and so are the generators.

    Collective where torch.distributed is initialised: every rank must call it, and all get
    the same answer, the largest size that fits on all of them. They agree after each trial
    and never within one, so a rank that runs out of memory leaves nobody waiting; `trial`
    must not communicate (under DDP, run it on `model.module`).

    Args:
        trial: Runs forward, backward and update with so many samples. Its value is dropped.
        maximum: Not tried beyond this. None: until it does not fit, or 2**20.
        start: First size.
        keep: Modules, optimizers and others with `state_dict` and `load_state_dict` to put
            back after every trial.
        group: Ranks that must agree; all if None.
        device: Where the model is; an accelerator's cache is emptied after each trial.
        agree: False: this rank decides alone, and nothing is collective.

    Raises:
        ConfigError: Not even one sample fits.
    """
    limit = _CEILING if maximum is None else maximum
    if not 1 <= start <= limit:
        raise ConfigError(
            f"no batch size lies between {start=} and {maximum=}", hint="1 <= start <= maximum"
        )
    kept = [(each, copy.deepcopy(each.state_dict())) for each in keep]
    tried: dict[int, bool] = {}

    def fits(size: int) -> bool:
        if size not in tried:
            with _generators_kept(torch.device(device)):
                mine = _try(trial, size)
            for each, state in kept:
                each.load_state_dict(copy.deepcopy(state))
                if isinstance(each, torch.nn.Module):
                    each.zero_grad(set_to_none=True)
            _free()
            tried[size] = _agree(mine, group, torch.device(device)) if agree else mine
        return tried[size]

    size = start
    while not fits(size) and size > 1:
        size //= 2
    if not tried[size]:
        raise nothing_fits()
    while size < limit and tried.get(min(2 * size, limit), True) and fits(min(2 * size, limit)):
        size = min(2 * size, limit)
    low, high = size, min((s for s, ok in tried.items() if not ok), default=limit + 1)
    while high - low > max(1, low // 16):  # the last few percent are not worth their trials
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    reason = f"{low} fits, {high} does not" if high <= limit else f"{low} is the maximum"
    return BatchSize(micro_batch=low, reason=reason, tried=tried)


def nothing_fits() -> ConfigError:
    """Return the error for a model of which not even one sample fits."""
    return ConfigError(
        "a batch of one sample does not fit in memory",
        hint="a smaller model, bf16, recomputed activations, or sharded parameters",
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether `error` says that memory ran out.

    By type: `torch.OutOfMemoryError` from accelerators, `MemoryError` from Python and NumPy.
    torch's CPU allocator raises a bare RuntimeError that only names itself.
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return type(error) is RuntimeError and "DefaultCPUAllocator" in str(error)


def _try(trial: Callable[[int], object], size: int) -> bool:
    try:
        trial(size)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        # The traceback's frames hold the trial's tensors, here and in what it was raised from.
        seen: BaseException | None = error
        while seen is not None:
            seen.__traceback__ = None
            seen = seen.__cause__ or seen.__context__
        return False
    return True


def _free() -> None:
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def _agree(mine: bool, group: dist.ProcessGroup | None, device: torch.device) -> bool:
    if not dist.is_initialized():
        return mine
    flag = torch.tensor(int(mine), device=device)
    dist.all_reduce(flag, dist.ReduceOp.MIN, group=group)
    return bool(flag.item())


@contextlib.contextmanager
def _generators_kept(device: torch.device) -> Generator[None]:
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield


class Accumulation:
    """Several backward passes for one update, as if the batch had been computed at once.

    Losses are divided by the number of samples or tokens of the whole update over all ranks,
    and not averaged over averages: micro-batches and ranks with more tokens weigh more.

    ::

        accumulation = Accumulation(found.micro_batch)
        scale = accumulation.scale(num_tokens)          # of this rank's whole batch
        for micro, sync in accumulation.split(batch, model):
            with sync:
                (loss_sum(model, micro) * scale).backward()
        optimizer.step()

    Args:
        micro_batch: Samples that this rank takes at once.
        group: Ranks whose gradients DDP averages; all if None.

    Raises:
        ConfigError: `micro_batch` is below 1.
    """

    def __init__(self, micro_batch: int, group: dist.ProcessGroup | None = None) -> None:
        if micro_batch < 1:
            raise ConfigError(f"micro_batch is {micro_batch}", hint="at least 1")
        self.micro_batch = micro_batch
        self._group = group

    def scale(self, count: int, device: torch.device | str = "cpu") -> float:
        """Return the factor for a *sum* of losses, so that the update is over their mean.

        Collective where torch.distributed is initialised. DDP divides gradients by the number
        of ranks, which the factor makes good.

        Args:
            count: Samples or tokens that count in this rank's batch.
            device: Of the process group's tensors.

        Raises:
            ConfigError: There is nothing to train on, on any rank.
        """
        total, ranks = torch.tensor(count, dtype=torch.int64, device=device), 1
        if dist.is_initialized():
            dist.all_reduce(total, group=self._group)
            ranks = dist.get_world_size(self._group)
        if not (everywhere := int(total.item())):
            raise ConfigError("no sample or token of this batch counts", hint="check the mask")
        return ranks / everywhere

    def split(
        self, batch: Any, model: torch.nn.Module | None = None
    ) -> Iterator[tuple[Any, contextlib.AbstractContextManager[Any]]]:
        """Yield (micro-batch, context): gradients are reduced within the last context only.

        Args:
            batch: A tensor, or a tuple, list or dict of tensors with samples in dim 0.
            model: Wrapped in DDP, its `no_sync` is the context of all but the last.
        """
        size = _num_samples(batch)
        starts = range(0, size, self.micro_batch)
        for start in starts:
            no_sync = getattr(model, "no_sync", None)
            quiet = no_sync is not None and start != starts[-1]
            part = _slice(batch, start, start + self.micro_batch)
            yield part, no_sync() if quiet and no_sync else contextlib.nullcontext()


def _num_samples(batch: Any) -> int:
    if isinstance(batch, torch.Tensor):
        return len(batch)
    parts: list[Any] = list(batch.values()) if isinstance(batch, dict) else list(batch)
    return _num_samples(parts[0])


def _slice(batch: Any, start: int, end: int) -> Any:
    if isinstance(batch, torch.Tensor):
        return batch[start:end]
    if isinstance(batch, dict):
        return {key: _slice(value, start, end) for key, value in batch.items()}  # pyright: ignore[reportUnknownVariableType]
    return type(batch)(_slice(value, start, end) for value in batch)
