"""InfoBatch: leave out part of what is learned already, and keep the gradient unbiased."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from trainonce.errors import ConfigError, DataError
from trainonce.levers.base import Lever, LeverInfo
from trainonce.worker.seeds import derive_seed

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


class WithIndex(torch.utils.data.Dataset[tuple[int, Any]]):
    """A dataset that gives each sample with its index: `(index, sample)`.

    torch collates the indices to one int64 tensor, exactly.

    Args:
        dataset: Map-style.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[int, Any]:
        return index, self.dataset[index]


class InfoBatch(Lever):
    """A sampler that prunes well-learned samples anew each epoch, and weighs what it keeps.

    At the start of an epoch, samples whose last loss is below the mean are *easy*. Each of
    them is left out with probability `ratio`; those kept count 1/(1-ratio) in the loss, so
    the expected gradient is that of all samples. The first epoch and the last 1-`anneal` of
    them take everything. (Qin et al., InfoBatch, ICLR 2024.)

    Events: `reduce_loss`. As a sampler it gives the order for all ranks together::

        lever = InfoBatch(len(dataset), num_epochs=16, seed=0)
        loader = run.dataloader(WithIndex(dataset), batch_size=64, sampler=lever)
        run.protect(model=model, optimizer=optimizer, lever=lever)
        for indices, (x, y) in run.batches(loader, max_steps=...):
            losses = cross_entropy(model(x), y, reduction="none")
            lever.reduce_loss(losses, indices).backward()     # inside the step

    In a plain loop it goes to a `DataLoader` as `sampler=lever`, and under plain DDP as
    `sampler=lever.of_rank(rank, world_size)`; call `lever.set_epoch(epoch)` before each epoch,
    as with torch's `DistributedSampler`.

    The order is a function of (seed, epoch, easy samples), where the easy ones are fixed when
    the epoch begins: an epoch goes on after a resume as it began, whatever was learned since.

    Args:
        num_samples: Of the dataset.
        num_epochs: Of the run.
        ratio: Probability with which an easy sample is left out.
        anneal: Share of the epochs after which nothing is pruned any more.
        seed: Of the order.
        group: Ranks that share the data; all if None.
        enabled: False shuffles all samples and weighs them alike.

    Raises:
        ConfigError: The arguments do not fit.
    """

    info = LeverInfo(
        name="infobatch",
        saves="30 % of an epoch's FLOPs on digits, at a higher loss: never chosen there "
        "(benchmarks/levers); 40 % published for CIFAR and ImageNet",
        source="Qin et al., InfoBatch, ICLR 2024",
        applies="eight epochs or more, a loss for each sample",
        hurts="few epochs; nothing gained on top of Muon, which needs few epochs itself",
        reversible=True,
        default_on=False,
    )

    def __init__(
        self,
        num_samples: int,
        num_epochs: int,
        *,
        ratio: float = 0.5,
        anneal: float = 0.875,
        seed: int = 0,
        group: dist.ProcessGroup | None = None,
        enabled: bool = True,
    ) -> None:
        super().__init__(enabled=enabled)
        if num_samples < 1 or num_epochs < 1 or not 0 <= ratio < 1 or not 0 <= anneal <= 1:
            raise ConfigError(
                f"InfoBatch cannot have {num_samples=}, {num_epochs=}, {ratio=}, {anneal=}",
                hint="num_samples and num_epochs >= 1, 0 <= ratio < 1, 0 <= anneal <= 1",
            )
        self.num_samples = num_samples
        self._last_pruned = round(anneal * num_epochs)
        self._ratio = ratio
        self._seed = seed
        self._group = group
        self._scores = torch.full((num_samples,), torch.inf)  # infinite: not seen yet
        self._easy = torch.zeros(num_samples, dtype=torch.bool)
        self._epoch = 0
        self._asked = 0

    # ------------------------------------------------------------------ as a sampler

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch is read next; a new one fixes which samples are easy.

        Epoch 0 can be read again at any time, as it depends on no scores.

        Raises:
            DataError: `epoch` is over, and its scores are gone.
        """
        if epoch > self._epoch:
            self._epoch = epoch
            self._easy = self._find_easy(epoch)
        elif epoch not in (0, self._epoch):
            raise DataError(
                f"epoch {epoch} is over: InfoBatch is in epoch {self._epoch}, and has forgotten "
                "what it left out then",
                hint="load the lever's state of that epoch first",
            )
        self._asked = epoch

    def _find_easy(self, epoch: int) -> torch.Tensor:
        seen = torch.isfinite(self._scores)
        if not self.enabled or epoch >= self._last_pruned or not seen.any():
            return torch.zeros_like(self._easy)
        return seen & (self._scores < self._scores[seen].double().mean())

    def order(self) -> torch.Tensor:
        """Return the indices of the epoch that was asked for, int64, shape (kept,)."""
        seed = derive_seed("infobatch", self._seed, self._asked)
        generator = torch.Generator().manual_seed(seed)
        shuffled = torch.randperm(self.num_samples, generator=generator)
        if self._asked == 0 or not self._easy.any():
            return shuffled
        left_out = self._easy & (torch.rand(self.num_samples, generator=generator) < self._ratio)
        return shuffled[~left_out[shuffled]]

    def __iter__(self) -> Iterator[int]:
        return iter(self.order().tolist())

    def __len__(self) -> int:
        return len(self.order())

    def of_rank(self, rank: int, world_size: int) -> RankShare:
        """Return a sampler of one rank's share, for a plain `DataLoader` under plain DDP."""
        return RankShare(self, rank, world_size)

    # ------------------------------------------------------------------ in the step

    def reduce_loss(self, losses: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """Remember the losses, and return their weighted mean.

        Collective where torch.distributed is initialised: losses of all ranks are gathered,
        so that every rank has all scores.

        Args:
            losses: Shape (samples,).
            indices: Shape (samples,), of an integer dtype.

        Raises:
            ConfigError: They are not one loss a sample.
        """
        if losses.ndim != 1 or losses.shape != indices.shape or indices.is_floating_point():
            raise ConfigError(
                f"InfoBatch needs one loss a sample: losses have shape {list(losses.shape)}, "
                f"indices {list(indices.shape)} of {indices.dtype}",
                hint='compute the loss with reduction="none", mean over all but dim 0, and take '
                "indices from WithIndex",
            )
        if not self.enabled:
            return losses.mean()
        with torch.no_grad():
            everyone, found = self._gather(indices.long(), losses.detach().float())
            self._check_range(everyone)
            self._scores[everyone] = found
            weights = torch.ones_like(losses)
            weights[self._easy[indices.cpu()].to(losses.device)] = 1 / (1 - self._ratio)
        return (losses * weights).mean()

    def _check_range(self, indices: torch.Tensor) -> None:
        if not len(indices):
            return
        least, most = int(indices.min()), int(indices.max())
        if least < 0 or most >= self.num_samples:
            raise ConfigError(
                f"indices reach from {least} to {most}, and InfoBatch was made for "
                f"{self.num_samples} samples",
                hint="give it the length of the dataset that the indices are of",
            )

    def _gather(
        self, indices: torch.Tensor, losses: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return indices and losses of all ranks, on the CPU."""
        if not dist.is_initialized() or dist.get_world_size(self._group) == 1:
            return indices.cpu(), losses.cpu()
        # Shares differ in size by one, and a gather wants equal ones: the rest is index -1. The
        # losses travel as the integers that their bits are, and the indices as they are.
        longest = torch.tensor(len(indices), device=losses.device)
        dist.all_reduce(longest, dist.ReduceOp.MAX, group=self._group)
        mine = torch.full((2, int(longest)), -1, dtype=torch.int64, device=losses.device)
        mine[0, : len(indices)] = indices
        mine[1, : len(indices)] = losses.view(torch.int32).long()
        parts = [torch.empty_like(mine) for _ in range(dist.get_world_size(self._group))]
        dist.all_gather(parts, mine, group=self._group)
        table = torch.cat(parts, dim=1).cpu()
        table = table[:, table[0] >= 0]
        return table[0], table[1].int().view(torch.float32)

    # ------------------------------------------------------------------ state

    def _state(self) -> dict[str, Any]:
        return {"scores": self._scores, "easy": self._easy, "epoch": self._epoch}

    def _load_state(self, state: Mapping[str, Any]) -> None:
        if len(state["scores"]) != self.num_samples:
            raise ConfigError(
                f"the run began with {len(state['scores'])} samples, and there are now "
                f"{self.num_samples}",
                hint="go on with the dataset that the run began with",
            )
        self._scores = state["scores"].clone()
        self._easy = state["easy"].clone()
        self._epoch = self._asked = int(state["epoch"])


class RankShare:
    """One rank's part of InfoBatch's order: every `world_size`-th sample, as many on each.

    Up to `world_size - 1` samples at the end of an epoch's order are left out, and none is
    taken twice.
    """

    def __init__(self, lever: InfoBatch, rank: int, world_size: int) -> None:
        if not 0 <= rank < world_size:
            raise DataError(f"rank {rank} of {world_size} does not exist")
        self._lever = lever
        self._rank = rank
        self._world_size = world_size

    def set_epoch(self, epoch: int) -> None:
        """See `InfoBatch.set_epoch`."""
        self._lever.set_epoch(epoch)

    def __iter__(self) -> Iterator[int]:
        order = self._lever.order()
        end = len(order) - len(order) % self._world_size
        return iter(order[self._rank : end : self._world_size].tolist())

    def __len__(self) -> int:
        return len(self._lever) // self._world_size
