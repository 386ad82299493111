# ruff: noqa: D102 - the methods are torch's, and documented there
# pyright: reportIncompatibleMethodOverride=false, reportPrivateImportUsage=false
# (torch calls them by position, with other names than its stubs have)
"""The process group that user code sees, and that stays valid whatever fails.

A Python `torch.distributed.ProcessGroup`, registered as the backend "trainonce". It carries
out each collective on an inner group that lives for one generation. Operations whose
result differs by rank (gather, scatter, reduce-scatter, all-to-all) are carried out as ones
whose result is the same everywhere, so that any survivor can serve it to a newcomer. A message
from one rank to another is logged by its sender.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from trainonce.errors import CollectiveError
from trainonce.worker import torch_private
from trainonce.worker.operation import RECEIVE, SEND, Op
from trainonce.worker.transfer import as_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

    from trainonce.worker.channel import Channel
    from trainonce.worker.fabric import Fabric
    from trainonce.worker.oplog import GroupLog

BACKEND = "trainonce"


class OnceWork(dist._Work):
    """Handle of one operation; completes in whichever generation it succeeds."""

    def __init__(self, future: torch.futures.Future[Any], waiting: Callable[[bool], None]) -> None:
        super().__init__()
        self._future = future
        self._waiting = waiting
        self.before_return: Callable[[], object] | None = None
        """What is left to do for a caller that waits; for one that takes the future, nothing is."""
        self.fetch: Callable[[], object] = future.wait
        """Waits for the result; of a message, by whom it is needed."""

    def wait(self, timeout: Any = None) -> bool:
        """Wait for the result. `timeout` is not applied: hangs are the controller's to judge."""
        if not self._future.done():
            self._waiting(True)
            self.fetch()
            self._waiting(False)
        if self.before_return is not None:
            self.before_return()
        return True

    def is_completed(self) -> bool:
        """Tell whether the result is there."""
        return self._future.done()

    def is_success(self) -> bool:
        """Tell whether the result is there; operations do not fail, they are served again."""
        return self._future.done()

    def get_future(self) -> torch.futures.Future[Any]:
        """Return the future of the result."""
        return self._future

    def result(self) -> list[torch.Tensor]:
        """Wait for and return the result."""
        return self._future.wait()


class OnceGroup(dist.ProcessGroup):
    """One process group over the fabric.

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
        self._log = log
        self._size = len(log.ranks)
        self._current_rank = current_rank
        self._emulate = emulate
        self._orders_buckets = orders_buckets
        self._waiting = waiting
        self._name = log.key

    # Names as torch calls them.

    def getBackendName(self) -> str:
        return BACKEND

    def size(self) -> int:
        return self._size

    def rank(self) -> int:
        return self._current_rank()

    @property
    def group_name(self) -> str:
        return self._name

    def _set_group_name(self, name: str) -> None:
        self._name = name

    # ------------------------------------------------------------------ symmetric operations

    def allreduce(self, tensors: list[torch.Tensor], opts: Any = None) -> OnceWork:
        opts = opts or dist.AllreduceOptions()
        if len(tensors) != 1:
            return self._each(self.allreduce, tensors, opts)
        (tensor,) = tensors
        _check_dense(tensor)
        if self._emulate("all_reduce", tensors):
            return self._done(tensors)
        # DDP takes its result from the future: it need not be copied back into the bucket.
        in_future: list[torch.Tensor] | None = [] if torch_private.reduces_bucket(tensor) else None

        def deliver(result: list[torch.Tensor]) -> None:
            if in_future is None:
                _copy(tensor, result[0])
            else:
                in_future.append(result[0])

        work = self._submit(
            "all_reduce",
            _signature("all_reduce", tensor, opts.reduceOp.op.name),
            lambda inner: _on_copy(self._take(tensor), lambda copy: inner.pg.allreduce(copy, opts)),
            deliver,
            tensors if in_future is None else in_future,
        )
        if in_future is not None:
            work.before_return = lambda: _copy(tensor, in_future[0])
        return work

    def broadcast(self, tensors: list[torch.Tensor], opts: Any = None) -> OnceWork:
        root = opts.rootRank if opts is not None else 0
        (tensor,) = tensors
        _check_dense(tensor)
        if self._emulate("broadcast", tensors):
            return self._done(tensors)
        from_ddp = root == 0 and tensor.dtype == torch.int32 and self._orders_buckets()

        def launch(inner: Any) -> tuple[Any, list[torch.Tensor]]:
            inner_opts = dist.BroadcastOptions()
            # A newcomer at rank 0 has no order of its own to give.
            inner_opts.rootRank = self._fabric.order_root(self._log) if from_ddp else root
            return _on_copy(self._take(tensor), lambda copy: inner.pg.broadcast(copy, inner_opts))

        return self._submit(
            "broadcast",
            _signature("broadcast", tensor, root),
            launch,
            lambda result: _copy(tensor, result[0]),
            tensors,
        )

    def allgather(
        self, outputs: list[list[torch.Tensor]], inputs: list[torch.Tensor], opts: Any = None
    ) -> OnceWork:
        (tensor,), (output,) = inputs, outputs

        def deliver(result: list[torch.Tensor]) -> None:
            for target, value in zip(output, result, strict=True):
                _copy(target, value)

        return self._gather_all(tensor, deliver, outputs)

    def _allgather_base(
        self, output: torch.Tensor, tensor: torch.Tensor, opts: Any = None
    ) -> OnceWork:
        def deliver(result: list[torch.Tensor]) -> None:
            flat = output.view(-1)
            for index, value in enumerate(result):
                _copy(flat[index * value.numel() : (index + 1) * value.numel()], value.view(-1))

        return self._gather_all(tensor, deliver, [output])

    def barrier(self, opts: Any = None) -> OnceWork:
        if self._emulate("barrier", []):
            return self._done([])
        return self._submit(
            "barrier",
            "barrier",
            lambda inner: _on_copy(torch.zeros(1), inner.pg.allreduce),
            lambda _: None,
            [],
        )

    # ------------------------------------------------------------------ by way of those

    def reduce(self, tensors: list[torch.Tensor], opts: Any) -> OnceWork:
        (tensor,) = tensors
        copy = tensor.clone()
        every = dist.AllreduceOptions()
        every.reduceOp = opts.reduceOp
        return self._then(
            self.allreduce([copy], every),
            lambda: self._current_rank() == opts.rootRank and _copy(tensor, copy),
            tensors,
        )

    def gather(
        self, outputs: list[list[torch.Tensor]], inputs: list[torch.Tensor], opts: Any
    ) -> OnceWork:
        (tensor,) = inputs

        def deliver(result: list[torch.Tensor]) -> None:
            for target, value in zip(outputs[0] if outputs else [], result, strict=False):
                _copy(target, value)

        return self._gather_all(tensor, deliver, outputs)

    def scatter(
        self, outputs: list[torch.Tensor], inputs: list[list[torch.Tensor]], opts: Any
    ) -> OnceWork:
        (output,) = outputs
        mine = self._current_rank()
        stacked = output.new_empty((self._size, *output.shape))
        if mine == opts.rootRank:
            for index, value in enumerate(inputs[0]):
                stacked[index].copy_(value)
        cast = dist.BroadcastOptions()
        cast.rootRank = opts.rootRank
        return self._then(
            self.broadcast([stacked], cast), lambda: _copy(output, stacked[mine]), outputs
        )

    def reduce_scatter(
        self, outputs: list[torch.Tensor], inputs: list[list[torch.Tensor]], opts: Any = None
    ) -> OnceWork:
        (output,) = outputs
        sizes = [value.numel() for value in inputs[0]]
        return self._reduce_part(
            output, torch.cat([value.reshape(-1) for value in inputs[0]]), sizes, opts
        )

    def _reduce_scatter_base(
        self, output: torch.Tensor, tensor: torch.Tensor, opts: Any = None
    ) -> OnceWork:
        sizes = [output.numel()] * self._size
        return self._reduce_part(output, tensor.reshape(-1), sizes, opts)

    def alltoall_base(
        self,
        output: torch.Tensor,
        tensor: torch.Tensor,
        output_splits: list[int],
        input_splits: list[int],
        opts: Any = None,
    ) -> OnceWork:
        rows_out = output_splits or [output.shape[0] // self._size] * self._size
        rows_in = input_splits or [tensor.shape[0] // self._size] * self._size
        return self.alltoall(list(output.split(rows_out)), list(tensor.split(rows_in)), opts)

    def alltoall(
        self, outputs: list[torch.Tensor], inputs: list[torch.Tensor], opts: Any = None
    ) -> OnceWork:
        """Everybody gathers everything and takes its part: W times the bytes, replayable."""
        mine = self._current_rank()
        sizes = torch.tensor([value.numel() for value in inputs])
        table = [torch.zeros_like(sizes) for _ in range(self._size)]
        self.allgather([table], [sizes]).wait()
        longest = max(int(row.sum()) for row in table)
        packed = inputs[0].new_zeros(longest)
        flat = torch.cat([value.reshape(-1) for value in inputs])
        packed[: flat.numel()] = flat

        def deliver(result: list[torch.Tensor]) -> None:
            for source, row in enumerate(table):
                begin = int(row[:mine].sum())
                part = result[source][begin : begin + int(row[mine])]
                _copy(outputs[source], part.view(outputs[source].shape))

        return self._gather_all(packed, deliver, outputs)

    def allreduce_coalesced(self, tensors: list[torch.Tensor], opts: Any = None) -> OnceWork:
        return self._each(self.allreduce, tensors, opts)

    def allgather_into_tensor_coalesced(
        self, outputs: list[torch.Tensor], inputs: list[torch.Tensor], opts: Any = None
    ) -> OnceWork:
        works = [self._allgather_base(o, i, opts) for o, i in zip(outputs, inputs, strict=True)]
        return self._all_of(works, outputs)

    def reduce_scatter_tensor_coalesced(
        self, outputs: list[torch.Tensor], inputs: list[torch.Tensor], opts: Any = None
    ) -> OnceWork:
        works = [
            self._reduce_scatter_base(o, i, opts) for o, i in zip(outputs, inputs, strict=True)
        ]
        return self._all_of(works, outputs)

    # Names that torch 2.13 gave them.
    all_gather_single: Any = _allgather_base
    reduce_scatter_single: Any = _reduce_scatter_base
    all_to_all_single: Any = alltoall_base
    all_gather_single_coalesced: Any = allgather_into_tensor_coalesced
    reduce_scatter_single_coalesced: Any = reduce_scatter_tensor_coalesced

    # ------------------------------------------------------------------ messages

    def send(self, tensors: list[torch.Tensor], rank: int, tag: int) -> OnceWork:
        """Complete at once: what is sent is copied to the log."""
        (tensor,) = tensors
        _check_dense(tensor)
        if self._emulate(SEND, tensors):
            return self._done(tensors)
        channel = self._channel(self._current_rank(), rank, tag)
        message = self._take(as_bytes(tensor))

        def launch(inner: Any) -> tuple[Any, list[torch.Tensor]]:
            return inner.pg.send([message], rank, channel.tag), [message]

        future = _future_of(tensors)
        signature = channel.signature(message.numel())
        op = Op(SEND, signature, launch, lambda _: None, tensors, future, buffers=[message])
        self._fabric.submit(channel, op)
        return OnceWork(future, self._waiting)

    def recv(self, tensors: list[torch.Tensor], rank: int, tag: int) -> OnceWork:
        (tensor,) = tensors
        _check_dense(tensor)
        if self._emulate(RECEIVE, tensors):
            tensor.data.zero_()
            return self._done(tensors)
        channel = self._channel(rank, self._current_rank(), tag)
        like = torch.empty(tensor.numel() * tensor.element_size(), dtype=torch.uint8, device="meta")
        future = _future_of(tensors)

        def launch(inner: Any) -> tuple[Any, list[torch.Tensor]]:
            with self._fabric.journal.lock:
                message = self._fabric.journal.pool.take(like)
            return inner.pg.recv([message], rank, channel.tag), [message]

        def deliver(result: list[torch.Tensor]) -> None:
            if result[0].numel() != like.numel():
                raise _other_size(result[0].numel(), like.numel(), rank)
            _copy(tensor, result[0].view(tensor.dtype).view(tensor.shape))

        op = Op(RECEIVE, channel.signature(like.numel()), launch, deliver, tensors, future)
        self._fabric.submit(channel, op)
        work = OnceWork(future, self._waiting)
        work.fetch = lambda: self._fabric.wait(channel, op)
        return work

    def recv_anysource(self, tensors: list[torch.Tensor], tag: int) -> OnceWork:
        raise CollectiveError(
            "dist.recv without a source takes whatever comes first, which differs from one"
            " execution to the next",
            hint="name the source: dist.recv(tensor, src=...)",
        )

    def _channel(self, source: int, target: int, tag: int) -> Channel:
        if source == target:
            raise CollectiveError(
                f"rank {source} of the group sends to itself", hint="keep the tensor"
            )
        return self._fabric.channel(self._log, source, target, tag)

    # ------------------------------------------------------------------ plumbing

    def _gather_all(
        self, tensor: torch.Tensor, deliver: Callable[[list[torch.Tensor]], None], value: list[Any]
    ) -> OnceWork:
        _check_dense(tensor)
        if self._emulate("all_gather", [tensor]):
            deliver([tensor] * self._size)
            return self._done(value)

        # In place of the result, which is as large as all inputs together.
        kept = [self._take(tensor)] if self._fabric.early else []
        source = kept[0] if kept else tensor

        def launch(inner: Any) -> tuple[Any, list[torch.Tensor]]:
            mine = source.detach().contiguous().cpu()
            with self._fabric.journal.lock:
                parts = [self._fabric.journal.pool.take(mine) for _ in range(self._size)]
            return inner.pg.allgather([parts], [mine]), parts

        signature = _signature("all_gather", tensor)
        return self._submit("all_gather", signature, launch, deliver, value, kept)

    def _reduce_part(
        self, output: torch.Tensor, flat: torch.Tensor, sizes: list[int], opts: Any
    ) -> OnceWork:
        every: Any = dist.AllreduceOptions()
        if opts is not None:
            every.reduceOp = opts.reduceOp
        mine = self._current_rank()
        begin = sum(sizes[:mine])

        def deliver(result: list[torch.Tensor]) -> None:
            _copy(output, result[0][begin : begin + sizes[mine]].view(output.shape))

        _check_dense(flat)
        if self._emulate("reduce_scatter", [flat]):
            deliver([flat])
            return self._done([output])
        return self._submit(
            "reduce_scatter",
            _signature("reduce_scatter", flat, every.reduceOp.op.name),
            lambda inner: _on_copy(self._take(flat), lambda copy: inner.pg.allreduce(copy, every)),
            deliver,
            [output],
        )

    def _take(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a copy of `tensor` in CPU memory of the pool."""
        with self._fabric.journal.lock, torch.no_grad():
            return self._fabric.journal.pool.take(tensor).copy_(tensor.detach())

    def _submit(
        self,
        kind: str,
        signature: str,
        launch: Callable[[Any], tuple[Any, list[torch.Tensor]]],
        deliver: Callable[[list[torch.Tensor]], None],
        value: list[Any],
        kept: list[torch.Tensor] | None = None,
    ) -> OnceWork:
        future = _future_of(value)
        op = Op(kind, signature, launch, deliver, value, future, kept=kept or [])
        self._fabric.submit(self._log, op)
        return OnceWork(future, self._waiting)

    def _done(self, value: list[Any]) -> OnceWork:
        future: torch.futures.Future[Any] = torch.futures.Future()
        future.set_result(value)
        return OnceWork(future, self._waiting)

    def _then(self, work: OnceWork, finish: Callable[[], object], value: list[Any]) -> OnceWork:
        def complete(_: Any) -> list[Any]:
            finish()
            return value

        return OnceWork(work.get_future().then(complete), self._waiting)

    def _all_of(self, works: list[OnceWork], value: list[Any]) -> OnceWork:
        every = torch.futures.collect_all([work.get_future() for work in works])
        return OnceWork(every.then(lambda _: value), self._waiting)

    def _each(
        self, operation: Callable[..., OnceWork], tensors: list[torch.Tensor], opts: Any
    ) -> OnceWork:
        return self._all_of([operation([tensor], opts) for tensor in tensors], tensors)


def _signature(kind: str, tensor: torch.Tensor, extra: object = "") -> str:
    dtype = str(tensor.dtype).removeprefix("torch.")
    suffix = f",{extra}" if extra != "" else ""
    return f"{kind}({dtype}{list(tensor.shape)}{suffix})"


def _on_copy(
    copy: torch.Tensor, issue: Callable[[list[torch.Tensor]], Any]
) -> tuple[Any, list[torch.Tensor]]:
    return issue([copy]), [copy]


def _copy(target: torch.Tensor, value: torch.Tensor) -> None:
    # Through `.data`: torch's own collectives are invisible to autograd's version counters.
    target.data.copy_(value)
    if target.is_cuda:
        torch.cuda.current_stream(target.device).synchronize()


def _future_of(value: list[Any]) -> torch.futures.Future[Any]:
    """Return a future that can resolve to `value`."""
    devices = sorted({t.device.index for t in value if _is_cuda(t)})
    return torch.futures.Future(devices=devices or None)


def _is_cuda(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.is_cuda


def _check_dense(tensor: torch.Tensor) -> None:
    if tensor.layout is not torch.strided:
        raise CollectiveError(
            f"a collective on a tensor of layout {tensor.layout} cannot be replayed",
            hint="use dense gradients (sparse=False in nn.Embedding)",
        )


def _other_size(sent: int, wanted: int, source: int) -> CollectiveError:
    return CollectiveError(
        f"a message of {sent} bytes came from rank {source} of the group, into a tensor of"
        f" {wanted} bytes",
        hint="receive into a tensor as large as the one that is sent",
    )
