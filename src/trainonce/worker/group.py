# ruff: noqa: D102 - the methods are torch's, and documented there
# pyright: reportIncompatibleMethodOverride=false, reportPrivateImportUsage=false
# (torch calls them by position, with other names than its stubs have)
"""The process group that user code sees, and that stays valid whatever fails.

A Python `torch.distributed.ProcessGroup`, registered as the backend "trainonce". It carries
out each collective on an inner group that lives for one generation. Operations whose
result differs by rank (gather, scatter, reduce-scatter, all-to-all) are carried out as ones
whose result is the same everywhere (`symmetric.py`). A message from one rank to another is
logged by its sender.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from trainonce.errors import CollectiveError
from trainonce.worker.operation import RECEIVE, SEND, Op
from trainonce.worker.symmetric import SymmetricGroup, check_dense, copy_to
from trainonce.worker.transfer import as_bytes
from trainonce.worker.work import OnceWork, future_for

if TYPE_CHECKING:
    from trainonce.worker.channel import Channel

BACKEND = "trainonce"


class OnceGroup(SymmetricGroup):
    """All that torch and scripts ask of a process group; the arguments are its base's."""

    # ------------------------------------------------------------------ names as torch calls them

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

    # ------------------------------------------------------------------ to or from one rank

    def reduce(self, tensors: list[torch.Tensor], opts: Any) -> OnceWork:
        (tensor,) = tensors
        copy = tensor.clone()
        every = dist.AllreduceOptions()
        every.reduceOp = opts.reduceOp
        return self.then(
            self.allreduce([copy], every),
            lambda: self._current_rank() == opts.rootRank and copy_to(tensor, copy),
            tensors,
        )

    def gather(
        self, outputs: list[list[torch.Tensor]], inputs: list[torch.Tensor], opts: Any
    ) -> OnceWork:
        (tensor,) = inputs

        def deliver(result: list[torch.Tensor]) -> None:
            for target, value in zip(outputs[0] if outputs else [], result, strict=False):
                copy_to(target, value)

        return self.gather_all(tensor, deliver, outputs)

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
        return self.then(
            self.broadcast([stacked], cast), lambda: copy_to(output, stacked[mine]), outputs
        )

    # ------------------------------------------------------------------ to each rank its part

    def reduce_scatter(
        self, outputs: list[torch.Tensor], inputs: list[list[torch.Tensor]], opts: Any = None
    ) -> OnceWork:
        (output,) = outputs
        sizes = [value.numel() for value in inputs[0]]
        flat = torch.cat([value.reshape(-1) for value in inputs[0]])
        return self._reduce_part(output, flat, sizes, opts)

    def _reduce_scatter_base(
        self, output: torch.Tensor, tensor: torch.Tensor, opts: Any = None
    ) -> OnceWork:
        sizes = [output.numel()] * self._size
        return self._reduce_part(output, tensor.reshape(-1), sizes, opts)

    def _reduce_part(
        self, output: torch.Tensor, flat: torch.Tensor, sizes: list[int], opts: Any
    ) -> OnceWork:
        """Reduce all of `flat`, and take this rank's part of `sizes` elements."""
        every: Any = dist.AllreduceOptions()
        if opts is not None:
            every.reduceOp = opts.reduceOp
        mine = self._current_rank()
        begin = sum(sizes[:mine])

        def deliver(result: list[torch.Tensor]) -> None:
            copy_to(output, result[0][begin : begin + sizes[mine]].view(output.shape))

        check_dense(flat)
        if self._emulate("reduce_scatter", [flat]):
            deliver([flat])
            return self.done([output])
        return self.reduce_all("reduce_scatter", flat, every, deliver, [output])

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
                copy_to(outputs[source], part.view(outputs[source].shape))

        return self.gather_all(packed, deliver, outputs)

    # ------------------------------------------------------------------ several at once

    def allreduce_coalesced(self, tensors: list[torch.Tensor], opts: Any = None) -> OnceWork:
        return self.all_of([self.allreduce([each], opts) for each in tensors], tensors)

    def allgather_into_tensor_coalesced(
        self, outputs: list[torch.Tensor], inputs: list[torch.Tensor], opts: Any = None
    ) -> OnceWork:
        works = [self._allgather_base(o, i, opts) for o, i in zip(outputs, inputs, strict=True)]
        return self.all_of(works, outputs)

    def reduce_scatter_tensor_coalesced(
        self, outputs: list[torch.Tensor], inputs: list[torch.Tensor], opts: Any = None
    ) -> OnceWork:
        works = [
            self._reduce_scatter_base(o, i, opts) for o, i in zip(outputs, inputs, strict=True)
        ]
        return self.all_of(works, outputs)

    # Names that torch 2.13 gave them.
    all_gather_single: Any = SymmetricGroup._allgather_base
    reduce_scatter_single: Any = _reduce_scatter_base
    all_to_all_single: Any = alltoall_base
    all_gather_single_coalesced: Any = allgather_into_tensor_coalesced
    reduce_scatter_single_coalesced: Any = reduce_scatter_tensor_coalesced

    # ------------------------------------------------------------------ messages

    def send(self, tensors: list[torch.Tensor], rank: int, tag: int) -> OnceWork:
        """Complete at once: what is sent is copied to the log."""
        (tensor,) = tensors
        check_dense(tensor)
        if self._emulate(SEND, tensors):
            return self.done(tensors)
        channel = self._channel(self._current_rank(), rank, tag)
        message = self.copy_of(as_bytes(tensor))

        def launch(inner: Any) -> tuple[Any, list[torch.Tensor]]:
            return inner.pg.send([message], rank, channel.tag), [message]

        future = future_for(tensors)
        signature = channel.signature(message.numel())
        op = Op(SEND, signature, launch, lambda _: None, tensors, future, buffers=[message])
        self._fabric.submit(channel, op)
        return OnceWork(future, self._waiting)

    def recv(self, tensors: list[torch.Tensor], rank: int, tag: int) -> OnceWork:
        (tensor,) = tensors
        check_dense(tensor)
        if self._emulate(RECEIVE, tensors):
            tensor.data.zero_()
            return self.done(tensors)
        channel = self._channel(rank, self._current_rank(), tag)
        like = torch.empty(tensor.numel() * tensor.element_size(), dtype=torch.uint8, device="meta")
        future = future_for(tensors)

        def launch(inner: Any) -> tuple[Any, list[torch.Tensor]]:
            with self._journal.lock:
                message = self._journal.pool.take(like)
            return inner.pg.recv([message], rank, channel.tag), [message]

        def deliver(result: list[torch.Tensor]) -> None:
            if result[0].numel() != like.numel():
                raise _other_size(result[0].numel(), like.numel(), rank)
            copy_to(tensor, result[0].view(tensor.dtype).view(tensor.shape))

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


def _other_size(sent: int, wanted: int, source: int) -> CollectiveError:
    return CollectiveError(
        f"a message of {sent} bytes came from rank {source} of the group, into a tensor of"
        f" {wanted} bytes",
        hint="receive into a tensor as large as the one that is sent",
    )
