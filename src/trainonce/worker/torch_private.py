"""Every private attribute of torch that this package touches, and why.

Checked by `tests/process/test_torch_private.py`, which fails loudly on a torch that changed
them.

DistributedDataParallel settles on the order of its gradient buckets after the first backward
pass: rank 0 broadcasts the order, and every rank rebuilds. A process that joins later must
end with the same buckets. `Reducer._push_all_rebuilt_params` and `Reducer._rebuild_buckets`,
which torch's own `Join` uses, do that without a backward pass, given the broadcast.

A scheduler of learning rates warns where it is stepped first before its optimizer, by
`Optimizer._opt_called`. A process that takes a rank over may come to a scheduler's first step
before it has stepped the optimizer itself, although the rank has.

A DTensor's part on this rank is its `_local_tensor`: `to_local` gives a tensor of autograd's,
and takes a dispatch. FSDP2 keeps gradients that wait for their reduction in its parameter
groups, where `parameter.grad` does not show them.

The flight recorders of the backends are read through `torch._C._distributed_c10d`, as JSON: the
public `_dump_nccl_trace` pickles. A build without NCCL lacks the first.

The stages of a pipeline (`torch.distributed.pipelining`) tell each other the shapes of what they
exchange before their first pass, within the first call of `step`, and again when a schedule
changes between training and evaluation. A process that joins later does so when the others
do not, so that part, `_initialize_pp_stages`, is surrounded. Schedules are counted where they are
made, in `_PipelineSchedule.__init__`.

While a compiled model runs, torch.compile takes every Python frame for one to compile, those of our
group that C++ calls included: so when a compiled DDP orders its buckets. `set_code_exec_strategy`
tells it which to leave alone, without importing the compiler as `torch.compiler.disable` does.
"""

from __future__ import annotations

import functools
import json
import sys
import weakref
from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
import torch.autograd.graph
import torch.distributed.distributed_c10d as c10d
from torch._C._dynamo.eval_frame import (
    _FrameAction,
    _FrameExecStrategy,
    set_code_exec_strategy,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager
    from types import FrameType

_DDP_INIT = DistributedDataParallel.__init__.__code__
_DDP_PRE_FORWARD = DistributedDataParallel._pre_forward.__code__
_BACKWARD = torch.autograd.graph._engine_run_backward.__code__
_DDP_BUFFERS = DistributedDataParallel._sync_buffers.__code__
# A collective of DDP's own is at most this many Python frames above us.
_MAX_FRAMES = 14


@functools.cache
def hide_from_compiler(kind: type) -> None:
    """Let the methods of `kind`, and what they call, run as they are in a compiled model."""
    strategy = _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.SKIP)
    for base in kind.__mro__:
        for each in vars(base).values():
            if base.__module__.startswith("trainonce.") and hasattr(each, "__code__"):
                set_code_exec_strategy(each.__code__, strategy)


def _find(code: Any) -> FrameType | None:
    frame: FrameType | None = sys._getframe(2)
    for _ in range(_MAX_FRAMES):
        if frame is None:
            return None
        if frame.f_code is code:
            return frame
        frame = frame.f_back
    return None


def constructing_ddp() -> DistributedDataParallel | None:
    """Return the DDP whose constructor called us on this thread, if one did."""
    frame = _find(_DDP_INIT)
    return frame.f_locals["self"] if frame else None


def rebuilding_ddp() -> DistributedDataParallel | None:
    """Return the DDP that is rebuilding its buckets on this thread, if one is.

    Its buffers are synchronised below `_pre_forward` too; those calls are not meant.
    """
    frame: FrameType | None = sys._getframe(1)
    for _ in range(_MAX_FRAMES):
        if frame is None or frame.f_code is _DDP_BUFFERS:
            return None
        if frame.f_code is _DDP_PRE_FORWARD:
            return frame.f_locals["self"]
        frame = frame.f_back
    return None


def reduces_bucket(tensor: torch.Tensor) -> bool:
    """Tell whether our caller was called by DDP's reducer, with one of its gradient buckets.

    The reducer takes the result from the future, and never waits for the work. On the CPU it
    runs in C++ right below the backward pass. What else calls from there (compiled functional
    collectives) waits for the work.
    """
    return (
        tensor.dim() == 1
        and tensor.is_floating_point()
        and tensor.device.type == "cpu"
        and sys._getframe(2).f_code is _BACKWARD
    )


def watch_new_groups(told: Callable[[Sequence[int]], object]) -> None:
    """Call `told` with the global ranks of each group that is made, on members and others.

    Every rank has to call `new_group`, but torch makes a group on its members only.
    """
    make = c10d._new_process_group_helper

    @functools.wraps(make)
    def watched(
        group_size: int, group_rank: int, ranks: Sequence[int], *args: Any, **kwargs: Any
    ) -> Any:
        made = make(group_size, group_rank, ranks, *args, **kwargs)
        told(ranks)
        return made

    c10d._new_process_group_helper = watched


def watch_meshes(explain: Callable[[str], Exception]) -> None:
    """Raise what `explain` makes of the error where a mesh is not of the job's size.

    That is where it cannot be made, or where a rank that it leaves out asks for a group of it.
    """
    make, get_group = DeviceMesh.__init__, DeviceMesh.get_group

    @functools.wraps(make)
    def made(self: DeviceMesh, *args: Any, **kwargs: Any) -> None:
        try:
            make(self, *args, **kwargs)
        except (RuntimeError, ValueError) as error:
            raise explain(f"a mesh cannot be made: {error}") from error

    @functools.wraps(get_group)
    def got_group(self: DeviceMesh, *args: Any, **kwargs: Any) -> Any:
        if self.get_coordinate() is None:
            raise explain(f"a mesh of {self.mesh.numel()} ranks leaves out this one")
        return get_group(self, *args, **kwargs)

    DeviceMesh.__init__ = made
    DeviceMesh.get_group = got_group


def hook_states(ddp: DistributedDataParallel) -> list[Any]:
    """Return what was registered as the state of the communication hooks of `ddp`."""
    return [
        state
        for _hook, state in ddp._comm_hooks
        if state is not None and not isinstance(state, torch.distributed.ProcessGroup)
    ]


class DdpRegistry:
    """The DDP instances of this process, in order of construction."""

    def __init__(self) -> None:
        self._instances: list[weakref.ref[DistributedDataParallel]] = []

    def ordinal(self, ddp: DistributedDataParallel) -> int:
        """Return the place of `ddp`, registering it if it is new."""
        for index, reference in enumerate(self._instances):
            if reference() is ddp:
                return index
        self._instances.append(weakref.ref(ddp))
        return len(self._instances) - 1

    def living(self) -> list[tuple[int, DistributedDataParallel]]:
        """Return (place, instance) of those that still exist."""
        found = [(index, reference()) for index, reference in enumerate(self._instances)]
        return [(index, ddp) for index, ddp in found if ddp is not None]


def mark_all_parameters_ready(ddp: DistributedDataParallel) -> None:
    """Let the next forward pass of `ddp` rebuild its buckets, as after a backward pass."""
    ddp.reducer._push_all_rebuilt_params()


def syncs_buffers_next(ddp: DistributedDataParallel) -> bool:
    """Tell whether the next pass of `ddp` broadcasts buffers: not after one without gradients."""
    return bool(ddp.require_forward_param_sync)


def sync_buffers_next(ddp: DistributedDataParallel, syncs: bool) -> None:
    """Set what `syncs_buffers_next` tells."""
    ddp.require_forward_param_sync = syncs


def forget_passes(ddp: DistributedDataParallel) -> None:
    """Bring `ddp` where it was before its first pass, whatever a rehearsal left unfinished."""
    ddp.reducer._reset_state()


def rebuild_buckets(ddp: DistributedDataParallel) -> None:
    """Rebuild the buckets of `ddp` now; its broadcasts go through its process group."""
    ddp.reducer._push_all_rebuilt_params()
    ddp.reducer._rebuild_buckets()


def was_stepped(optimizer: torch.optim.Optimizer) -> bool:
    """Tell whether a scheduler of learning rates has seen a step of `optimizer`."""
    return getattr(optimizer, "_opt_called", False)


def set_stepped(optimizer: torch.optim.Optimizer, stepped: bool) -> None:
    """Have schedulers take `optimizer` for one that has been stepped, or has not."""
    optimizer._opt_called = stepped  # pyright: ignore[reportAttributeAccessIssue]


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return what this rank holds of `tensor`: a DTensor's local part, or the tensor itself."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def version_of(tensor: torch.Tensor) -> int:
    """Return a number that grows whenever `tensor` is written to.

    An operation on a DTensor counts at the wrapper, one on its local part counts there.
    """
    if isinstance(tensor, DTensor):
        return tensor._version + tensor._local_tensor._version
    return tensor._version


def shards_parameters(module: torch.nn.Module) -> bool:
    """Tell whether FSDP2 shards any parameters of `module`."""
    return any(isinstance(each, FSDPModule) for each in module.modules())


def visible_modules(module: torch.nn.Module) -> list[torch.nn.Module]:
    """Return `module` and what is below it, less what is below a compiled module.

    What is traced into a compiled module does not call hooks that are registered later.
    """
    if module._compiled_call_impl is not None:
        return []
    below = [each for child in module.children() for each in visible_modules(child)]
    return [module, *below]


def unreduced_gradients(module: torch.nn.Module) -> bool:
    """Tell whether FSDP2 holds gradients of `module` that were not reduced yet."""
    for each in module.modules():
        if not isinstance(each, FSDPModule):
            continue
        state: Any = each._get_fsdp_state()
        for group in state._fsdp_param_groups:
            if group._partial_reduce_output is not None:
                return True
            for parameter in group.fsdp_params:
                unsharded = getattr(parameter, "_unsharded_param", None)
                if parameter.unsharded_accumulated_grad is not None or (
                    unsharded is not None and unsharded.grad is not None
                ):
                    return True
    return False


def recorded_collectives() -> dict[str, dict[str, Any]]:
    """Return what torch's flight recorders hold, oldest first: of NCCL, and of other backends."""
    core: Any = torch._C
    found: dict[str, dict[str, Any]] = {}
    for backend, name in (("nccl", "_dump_nccl_trace_json"), ("other", "_dump_fr_trace_json")):
        dump = getattr(core._distributed_c10d, name, None)
        if dump is not None:
            found[backend] = json.loads(dump(includeCollectives=True, onlyActive=False))
    return found


_SCHEDULES = "torch.distributed.pipelining.schedules"


class PipelineRegistry:
    """The schedules of this process, and how often the stages of each got ready.

    Args:
        around: Surrounds the part in which they do, or would if they were not; takes the
            schedule, whether they are ready, and the stages on this rank. What it yields says
            whether they get ready all the same.
    """

    def __init__(
        self, around: Callable[[Any, bool, list[Any]], AbstractContextManager[bool]]
    ) -> None:
        self._around = around
        self._names: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()
        self._counts: Counter[str] = Counter()
        self.closed = False
        """From now on new schedules get no name."""
        self.turns: dict[str, list[Any]] = {}
        """Name to how often its stages got ready, and whether for training the last time."""

    def watch(self) -> None:
        """Watch the schedules that are made from now on; once is enough."""
        module = sys.modules.get(_SCHEDULES)
        if module is None or not pipelines_unwatched():
            return
        base = module._PipelineSchedule
        make, prepare, around = base.__init__, base._initialize_pp_stages, self._around

        @functools.wraps(make)
        def made(schedule: Any, *args: Any, **kwargs: Any) -> None:
            make(schedule, *args, **kwargs)
            self._add(schedule)

        @functools.wraps(prepare)
        def prepared(
            schedule: Any, stages: list[Any], args: Any, kwargs: Any, target: Any,
            fwd_initialized: bool, bwd_initialized: bool, **rest: Any,
        ) -> Any:  # fmt: skip
            ready = fwd_initialized and bwd_initialized == schedule._has_backward
            with around(schedule, ready, stages) as anyway:
                again = ready and anyway
                return prepare(
                    schedule, stages, args, kwargs, target,
                    fwd_initialized and not again, bwd_initialized and not again, **rest,
                )  # fmt: skip

        base.__init__ = made
        base._initialize_pp_stages = prepared

    def _add(self, schedule: Any) -> None:
        kind = f"{type(schedule).__name__}/{schedule._n_microbatches}"
        if not self.closed:
            self._names[schedule] = f"{kind}/{self._counts[kind]}"
            self._counts[kind] += 1

    def name(self, schedule: Any) -> str:
        """Return the same for the schedules of all stages of one pipeline; empty for a late one.

        Schedules of one kind are told apart by the order in which they are made.
        """
        return self._names.get(schedule, "")


def pipelines_unwatched() -> bool:
    """Tell whether there may be pipelines of which no `PipelineRegistry` knows."""
    module = sys.modules.get(_SCHEDULES)
    return module is not None and not hasattr(
        module._PipelineSchedule._initialize_pp_stages, "__wrapped__"
    )


def is_traced(stage: Any) -> bool:
    """Tell whether a stage comes from `torch.distributed.pipelining.pipeline`.

    Such stages exchange something when they first get ready, and nothing when they do so again.
    """
    return isinstance(stage, sys.modules["torch.distributed.pipelining.stage"]._PipelineStage)


def trains(schedule: Any) -> bool:
    """Tell whether a schedule is to run backward passes now."""
    return schedule._has_backward
