# ruff: noqa: D102 - the methods are torch's, and documented there
# pyright: reportIncompatibleMethodOverride=false, reportPrivateImportUsage=false
# (torch calls them by position, with other names than its stubs have)
"""Collectives whose result is the same on all ranks, so that any survivor can serve it.

All-reduce, broadcast, all-gather, barrier. The inner group works on a copy of the input, in
memory of the pool, and that copy becomes the logged result; the caller's tensor is read when the
operation is issued, once more where that has to be repeated, and written when it is delivered.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from trainonce.errors import CollectiveError
from trainonce.worker import torch_private
from trainonce.worker.operation import Op
from trainonce.worker.work import OnceWork, future_for

if TYPE_CHECKING:
    from collections.abc import Callable

    from trainonce.worker.fabric import Fabric
    from trainonce.worker.oplog import GroupLog

    Launch = Callable[[Any], tuple[Any, list[torch.Tensor]]]
    Deliver = Callable[[list[torch.Tensor]], None]


class SymmetricGroup(dist.ProcessGroup):
    """A process group over the fabric, as far as results are the same on all its ranks.

    Args:
        fabric: Carries out and logs the operations.
        log: The group's place in the fabric.
        rank: Rank within the group; a hot spare calls it with whatever it may turn out to be,
            and `current_rank` tells the truth once it is known.
        current_rank: Returns the rank within the group, waiting for a promotion if need be.
        emulate: Returns whether to answer an operation locally instead of issuing it.
        orders_buckets: Returns whether a DDP is settling its bucket order on this thread.
        waiting: Told when a caller begins and ends to wait.
    """

    def __init__(
        self,
        fabric: Fabric,
        log: GroupLog,
        rank: int,
        *,
        current_rank: Callable[[], int],
        emulate: Callable[[str, list[torch.Tensor]], bool],
        orders_buckets: Callable[[], bool],
        waiting: Callable[[bool], None],
    ) -> None:
        super().__init__(rank, len(log.ranks))  # pyright: ignore[reportCallIssue]
        self._fabric = fabric
        self._journal = fabric.journal
        self._log = log
        self._size = len(log.ranks)
        self._current_rank = current_rank
        self._emulate = emulate
        self._orders_buckets = orders_buckets
        self._waiting = waiting
        self._name = log.key

    # ------------------------------------------------------------------ as torch calls them

    def allreduce(self, tensors: list[torch.Tensor], opts: Any = None) -> OnceWork:
        opts = opts or dist.AllreduceOptions()
        if len(tensors) != 1:
            return self.all_of([self.allreduce([each], opts) for each in tensors], tensors)
        (tensor,) = tensors
        check_dense(tensor)
        if self._emulate("all_reduce", tensors):
            return self.done(tensors)
        if torch_private.reduces_bucket(tensor):
            return self._reduce_bucket(tensor, opts)

        def deliver(result: list[torch.Tensor]) -> None:
            copy_to(tensor, result[0])

        return self.reduce_all("all_reduce", tensor, opts, deliver, tensors)

    def _reduce_bucket(self, tensor: torch.Tensor, opts: Any) -> OnceWork:
        """DDP takes its result from the future: it need not be copied back into the bucket."""
        result: list[torch.Tensor] = []
        work = self.reduce_all("all_reduce", tensor, opts, result.extend, result)
        work.before_return = lambda: copy_to(tensor, result[0])
        return work

    def broadcast(self, tensors: list[torch.Tensor], opts: Any = None) -> OnceWork:
        root = opts.rootRank if opts is not None else 0
        (tensor,) = tensors
        check_dense(tensor)
        if self._emulate("broadcast", tensors):
            return self.done(tensors)
        from_ddp = root == 0 and tensor.dtype == torch.int32 and self._orders_buckets()

        def launch(inner: Any) -> tuple[Any, list[torch.Tensor]]:
            inner_opts = dist.BroadcastOptions()
            # A newcomer at rank 0 has no order of its own to give.
            inner_opts.rootRank = self._fabric.order_root(self._log) if from_ddp else root
            copy = self.copy_of(tensor)
            return inner.pg.broadcast([copy], inner_opts), [copy]

        return self.submit(
            "broadcast",
            signature_of("broadcast", tensor, root),
            launch,
            lambda result: copy_to(tensor, result[0]),
            tensors,
        )

    def allgather(
        self, outputs: list[list[torch.Tensor]], inputs: list[torch.Tensor], opts: Any = None
    ) -> OnceWork:
        (tensor,), (output,) = inputs, outputs

        def deliver(result: list[torch.Tensor]) -> None:
            for target, value in zip(output, result, strict=True):
                copy_to(target, value)

        return self.gather_all(tensor, deliver, outputs)

    def _allgather_base(
        self, output: torch.Tensor, tensor: torch.Tensor, opts: Any = None
    ) -> OnceWork:
        def deliver(result: list[torch.Tensor]) -> None:
            flat = output.view(-1)
            for index, value in enumerate(result):
                copy_to(flat[index * value.numel() : (index + 1) * value.numel()], value.view(-1))

        return self.gather_all(tensor, deliver, [output])

    def barrier(self, opts: Any = None) -> OnceWork:
        if self._emulate("barrier", []):
            return self.done([])

        def launch(inner: Any) -> tuple[Any, list[torch.Tensor]]:
            nothing = torch.zeros(1)
            return inner.pg.allreduce([nothing]), [nothing]

        return self.submit("barrier", "barrier", launch, lambda _: None, [])

    # ------------------------------------------------------------------ what others build on

    def reduce_all(
        self, kind: str, tensor: torch.Tensor, opts: Any, deliver: Deliver, value: list[Any]
    ) -> OnceWork:
        """Issue an all-reduce of `tensor`; `deliver` gets the sum over all ranks."""

        def launch(inner: Any) -> tuple[Any, list[torch.Tensor]]:
            copy = self.copy_of(tensor)
            return inner.pg.allreduce([copy], opts), [copy]

        signature = signature_of(kind, tensor, opts.reduceOp.op.name)
        return self.submit(kind, signature, launch, deliver, value)

    def gather_all(self, tensor: torch.Tensor, deliver: Deliver, value: list[Any]) -> OnceWork:
        """Issue an all-gather of `tensor`; `deliver` gets what each rank put in."""
        check_dense(tensor)
        if self._emulate("all_gather", [tensor]):
            deliver([tensor] * self._size)
            return self.done(value)
        # In place of the result, which is as large as all inputs together.
        kept = [self.copy_of(tensor)] if self._fabric.early else []
        source = kept[0] if kept else tensor

        def launch(inner: Any) -> tuple[Any, list[torch.Tensor]]:
            mine = source.detach().contiguous().cpu()
            with self._journal.lock:
                parts = [self._journal.pool.take(mine) for _ in range(self._size)]
            return inner.pg.allgather([parts], [mine]), parts

        signature = signature_of("all_gather", tensor)
        return self.submit("all_gather", signature, launch, deliver, value, kept=kept)

    def submit(
        self,
        kind: str,
        signature: str,
        launch: Launch,
        deliver: Deliver,
        value: list[Any],
        *,
        kept: list[torch.Tensor] | None = None,
    ) -> OnceWork:
        """Issue a collective of this group; the arguments are those of `Op`."""
        future = future_for(value)
        op = Op(kind, signature, launch, deliver, value, future, kept=kept or [])
        self._fabric.submit(self._log, op)
        return OnceWork(future, self._waiting)

    def copy_of(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a copy of `tensor` in CPU memory of the pool."""
        with self._journal.lock:
            return self._journal.pool.take(tensor).copy_(tensor.detach())

    def done(self, value: list[Any]) -> OnceWork:
        """Return the handle of an operation that was answered locally."""
        future: torch.futures.Future[Any] = torch.futures.Future()
        future.set_result(value)
        return OnceWork(future, self._waiting)

    def then(self, work: OnceWork, finish: Callable[[], object], value: list[Any]) -> OnceWork:
        """Return the handle of an operation that calls `finish` where `work` is complete."""

        def complete(done: torch.futures.Future[Any]) -> list[Any]:
            done.value()
            finish()
            return value

        return OnceWork(work.get_future().then(complete), self._waiting)

    def all_of(self, works: list[OnceWork], value: list[Any]) -> OnceWork:
        """Return the handle of an operation that consists of `works`."""
        futures = [work.get_future() for work in works]

        def complete(_: Any) -> list[Any]:
            for future in futures:
                future.value()
            return value

        return OnceWork(torch.futures.collect_all(futures).then(complete), self._waiting)


@functools.lru_cache(maxsize=4096)
def _signature(kind: str, dtype: torch.dtype, shape: tuple[int, ...], extra: object) -> str:
    name = str(dtype).removeprefix("torch.")
    suffix = f",{extra}" if extra != "" else ""
    return f"{kind}({name}{list(shape)}{suffix})"


def signature_of(kind: str, tensor: torch.Tensor, extra: str | int = "") -> str:
    """Return what all ranks must agree on of a collective."""
    return _signature(kind, tensor.dtype, tensor.shape, extra)


def copy_to(target: torch.Tensor, value: torch.Tensor) -> None:
    """Copy a result to the caller's tensor, of any device; done when this returns."""
    # Through `.data`: torch's own collectives are invisible to autograd's version counters.
    target.data.copy_(value)
    if target.is_cuda:
        torch.cuda.current_stream(target.device).synchronize()


def check_dense(tensor: torch.Tensor) -> None:
    """Refuse sparse tensors.

    Raises:
        CollectiveError: `tensor` is one.
    """
    if tensor.layout is not torch.strided:
        raise CollectiveError(
            f"a collective on a tensor of layout {tensor.layout} cannot be replayed",
            hint="use dense gradients (sparse=False in nn.Embedding)",
        )
