"""The private parts of torch that this package leans on are there and behave as assumed.

When one of these fails on another torch, read `trainonce.worker.torch_private` first.
"""

import contextlib
import inspect

import pytest
import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe, schedules
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parallel import DistributedDataParallel as DDP

from trainonce.worker import torch_private
from trainonce.worker.faults import FaultInjector


class Recorder(dist.ProcessGroup):
    """A group of two of which one is here; notes what is issued and by whom."""

    def __init__(self, rank, size):
        super().__init__(rank, size)
        self.calls = []

    def getBackendName(self):
        return "recorder"

    @property
    def group_name(self):
        return "recorder"

    def _set_group_name(self, name):
        pass

    def _note(self, kind, tensor, result):
        self.calls.append(
            (kind, tensor.dtype, torch_private.constructing_ddp(), torch_private.rebuilding_ddp())
        )
        future = torch.futures.Future()
        future.set_result(result)
        return Done(future)

    def allreduce(self, tensors, opts=None):
        return self._note("all_reduce", tensors[0], tensors)

    def broadcast(self, tensors, opts=None):
        return self._note("broadcast", tensors[0], tensors)

    def allgather(self, outputs, inputs, opts=None):
        for output in outputs[0]:
            output.copy_(inputs[0])
        return self._note("all_gather", inputs[0], outputs)

    def barrier(self, opts=None):
        return self._note("barrier", torch.zeros(1), [])


class Done(dist._Work):
    def __init__(self, future):
        super().__init__()
        self._future = future

    def wait(self, timeout=None):
        return True

    def get_future(self):
        return self._future


@pytest.fixture
def group():
    made = []

    def create(options, _backend_options):
        # What `trainonce.worker.session` reads of it.
        assert list(options.global_ranks_in_group) in ([], [0, 1])
        assert isinstance(options.group_id, str)
        made.append(Recorder(0, 2))
        return made[-1]

    if not hasattr(dist.Backend, "RECORDER"):
        dist.Backend.register_backend("recorder", create, extended_api=True, devices=["cpu"])
    else:
        entry = dist.Backend._plugins["RECORDER"]
        dist.Backend._plugins["RECORDER"] = entry._replace(creator_fn=create)
    dist.init_process_group("recorder", store=dist.HashStore(), rank=0, world_size=2)
    yield made[0]
    dist.destroy_process_group()


def net():
    layers = [torch.nn.Linear(16, 16) for _ in range(4)]
    return torch.nn.Sequential(*layers[:2], torch.nn.BatchNorm1d(16), *layers[2:])


def train(model):
    model(torch.randn(4, 16)).sum().backward()


def test_collectives_of_the_constructor_are_told_from_others(group):
    model = DDP(net())
    assert group.calls
    assert all(constructing is not None for _, _, constructing, _ in group.calls)
    # The same object: what it is found by is the frame's `self`.
    assert {constructing for _, _, constructing, _ in group.calls} == {model}
    group.calls.clear()
    train(model)
    assert all(constructing is None for _, _, constructing, _ in group.calls)


def orders(group, model):
    """Return the dtypes of broadcasts that were issued while `model` rebuilt its buckets."""
    return [
        dtype
        for kind, dtype, _, rebuilding in group.calls
        if kind == "broadcast" and rebuilding is model
    ]


def test_the_bucket_order_is_broadcast_as_int32_in_the_second_pass_and_only_there(group):
    model = DDP(net(), bucket_cap_mb=0.001)
    for expected in (False, True, False):
        group.calls.clear()
        train(model)
        found = orders(group, model)
        assert bool(found) is expected
        assert set(found) <= {torch.int32}
        # Buffers are broadcast below the same function, and must not be taken for it.
        assert any(k == "broadcast" and r is None for k, _, _, r in group.calls)


def test_a_static_graph_reduces_its_used_map_in_the_first_pass_and_rebuilds_in_the_third(group):
    model = DDP(net(), bucket_cap_mb=0.001, static_graph=True)
    assert model.static_graph is True
    maps, rebuilt = [], []
    for _ in range(4):
        group.calls.clear()
        train(model)
        maps.append(any(k == "all_reduce" and d == torch.int32 for k, d, *_ in group.calls))
        rebuilt.append(bool(orders(group, model)))
    assert maps == [True, False, False, False]
    assert rebuilt == [False, False, True, False]


def test_groups_that_are_made_are_seen_whether_or_not_this_rank_is_a_member(group, monkeypatch):
    monkeypatch.setattr(c10d, "_new_process_group_helper", c10d._new_process_group_helper)
    seen = []
    torch_private.watch_new_groups(seen.append)
    monkeypatch.setattr(c10d, "_store_based_barrier", lambda *_, **__: None)
    assert dist.new_group([1]) is dist.GroupMember.NON_GROUP_MEMBER
    assert seen == [[1]]


def test_a_pass_that_was_broken_off_can_be_forgotten(group):
    ddp = DDP(torch.nn.Linear(2, 2))
    ddp(torch.ones(1, 2))  # waits for its backward pass from here on
    torch_private.forget_passes(ddp)
    torch_private.rebuild_buckets(ddp)
    ddp(torch.ones(1, 2)).sum().backward()
    assert ddp.module.weight.grad is not None


def test_states_of_hooks_are_found_and_groups_are_none(group):
    ddp = DDP(torch.nn.Linear(2, 2))
    state = powerSGD_hook.PowerSGDState(None)
    ddp.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    assert torch_private.hook_states(ddp) == [state]
    other = DDP(torch.nn.Linear(2, 2))
    other.register_comm_hook(dist.group.WORLD, default_hooks.allreduce_hook)
    assert torch_private.hook_states(other) == []


def test_buckets_can_be_rebuilt_without_a_backward_pass(group):
    model = DDP(net(), bucket_cap_mb=0.001)
    group.calls.clear()
    torch_private.rebuild_buckets(model)
    assert [kind for kind, dtype, *_ in group.calls if dtype == torch.int32]
    group.calls.clear()
    for _ in range(3):
        train(model)
    assert not orders(group, model)


def test_marking_all_parameters_ready_makes_the_next_pass_rebuild(group):
    model = DDP(net(), bucket_cap_mb=0.001)
    torch_private.mark_all_parameters_ready(model)
    group.calls.clear()
    train(model)
    assert orders(group, model)


def test_the_functions_that_are_looked_for_on_the_stack_are_plain_python():
    for function in (DDP.__init__, DDP._pre_forward, DDP._sync_buffers):
        assert inspect.isfunction(function)
        assert function.__code__.co_filename.endswith("distributed.py")


def test_a_schedule_asks_its_optimizer_whether_it_was_stepped():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(3))], lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    assert not torch_private.was_stepped(optimizer)
    torch_private.set_stepped(optimizer, True)
    scheduler.step()  # warnings are errors
    optimizer.step()
    assert torch_private.was_stepped(optimizer)


def test_version_counters_count_changes_and_not_those_of_normalisation_layers():
    tensor = torch.zeros(3)
    before = tensor._version
    tensor.add_(1)
    assert tensor._version > before
    norm = torch.nn.BatchNorm1d(4)
    assert isinstance(norm, _NormBase)
    before, mean = norm.running_mean._version, norm.running_mean.clone()
    norm(torch.randn(8, 4))
    assert not torch.equal(norm.running_mean, mean)
    # If this fails, torch counts them now, and the special case in `state` can go.
    assert norm.running_mean._version == before


def test_gloo_takes_its_device_and_timeout_from_private_options():
    options = dist.ProcessGroupGloo._Options()
    options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
    assert hasattr(options, "_timeout")


@pytest.fixture
def alone():
    """A group of one rank."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def sharded(alone):
    """A layer under FSDP2 on a mesh of one rank, and its optimizer."""
    module = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 1))
    mesh = init_device_mesh("cpu", (1,))
    fully_shard(module[0], mesh=mesh)
    fully_shard(module, mesh=mesh)
    return module, torch.optim.AdamW(module.parameters())


def test_the_local_part_of_a_dtensor_is_found_and_every_write_is_counted(sharded):
    module, optimizer = sharded
    weight = module[0].weight
    local = torch_private.local_of(weight)
    assert type(local) is torch.Tensor
    assert torch.equal(local, weight.to_local())
    assert torch_private.local_of(local) is local
    before = torch_private.version_of(weight)
    module(torch.randn(2, 4)).sum().backward()
    assert torch_private.local_of(weight) is local
    assert torch_private.version_of(weight) == before
    gradient = torch_private.version_of(weight.grad)
    module(torch.randn(2, 4)).sum().backward()
    assert torch_private.version_of(weight.grad) > gradient
    optimizer.step()
    assert torch_private.version_of(weight) > before
    with torch.no_grad():
        local.add_(1)
    assert torch_private.version_of(weight) > before + 1


def test_gradients_that_wait_in_fsdp2_for_their_reduction_are_seen(sharded):
    module, _ = sharded
    assert torch_private.shards_parameters(module)
    assert not torch_private.shards_parameters(torch.nn.Linear(1, 1))
    module(torch.randn(2, 4)).sum().backward()
    assert not torch_private.unreduced_gradients(module)
    module.set_requires_gradient_sync(False)
    module(torch.randn(2, 4)).sum().backward()
    assert torch_private.unreduced_gradients(module)
    module.set_requires_gradient_sync(True)
    module(torch.randn(2, 4)).sum().backward()
    assert not torch_private.unreduced_gradients(module)


def test_a_planned_fault_leaves_a_pass_without_gradients_alone(sharded):
    module, _ = sharded
    injector = FaultInjector(lambda _: None, lambda: 0, list)
    injector.arm([{"index": 0, "action": "kill", "point": "backward", "step": 9}])
    x = torch.ones(2, 4)
    with torch.no_grad():
        expected = module(x)
        injector.watch([module])
        assert torch.equal(module(x), expected)


def test_the_part_in_which_the_stages_of_a_pipeline_get_ready_is_surrounded(alone):
    """Whether they do or not, in each mode; and they do so again where that is asked for."""
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    seen, anyway = [], [False]

    @contextlib.contextmanager
    def around(schedule, ready, stages):
        seen.append((pipelines.name(schedule), torch_private.trains(schedule), ready))
        assert [each.submod for each in stages] == [module]
        assert not torch_private.is_traced(stages[0])
        yield anyway[0]

    pipelines = torch_private.PipelineRegistry(around)
    base = schedules._PipelineSchedule
    originals = base.__init__, base._initialize_pp_stages
    assert torch_private.pipelines_unwatched()
    try:
        pipelines.watch()
        pipelines.watch()
        assert not torch_private.pipelines_unwatched()
        stage = PipelineStage(module, 0, 1, torch.device("cpu"), group=dist.group.WORLD)
        first, second = (
            ScheduleGPipe(stage, 2, loss_fn=torch.nn.functional.mse_loss) for _ in range(2)
        )
        pipelines.closed = True
        late = ScheduleGPipe(stage, 2)
        names = [pipelines.name(each) for each in (first, second, late)]
        assert names == ["ScheduleGPipe/2/0", "ScheduleGPipe/2/1", ""]
        calls = [first.step, first.step, first.eval, first.eval, first.step]
        for call in calls:
            call(torch.randn(4, 2), target=torch.zeros(4, 2))
        passes = [(True, False), (True, True), (False, False), (False, True), (True, False)]
        assert seen == [(names[0], *each) for each in passes]
        anyway[0] = True
        forwards = []
        module.register_forward_hook(lambda *_: forwards.append(1))
        first.step(torch.randn(4, 2), target=torch.zeros(4, 2))
        assert seen[-1] == (names[0], True, True)
        assert len(forwards) == 1 + 2, "one pass to get ready, and one for each micro-batch"
    finally:
        base.__init__, base._initialize_pp_stages = originals


def test_modules_below_a_compiled_one_are_left_out():
    module = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Sequential(torch.nn.GELU()))
    assert len(torch_private.visible_modules(module)) == 4
    module[1].compile(backend="eager")
    assert torch_private.visible_modules(module) == [module, module[0]]
