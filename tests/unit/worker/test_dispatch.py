"""What goes out on the inner groups of one generation after another, and what becomes of it."""

import socket
import threading
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from trainonce.wire.messages import Generation, PeerLost
from trainonce.wire.progress import Progress
from trainonce.worker.dispatch import Dispatcher
from trainonce.worker.inner import InnerGroup
from trainonce.worker.journal import Journal
from trainonce.worker.operation import RECEIVE, SEND, Op, OpState
from trainonce.worker.work import OnceWork

NO_WAIT = pytest.mark.timeout(60, method="thread")  # a wait that nothing ends is the failure


class Wire:
    """Stands in for an inner group: completes or fails what is issued when the test says so."""

    def __init__(self):
        self.futures = []

    def carry(self):
        future = torch.futures.Future()
        self.futures.append(future)
        return SimpleNamespace(get_future=lambda: future, wait=future.wait)


def operation(kind="all_reduce", buffers=()):
    return Op(
        kind, kind, lambda wire: (wire.carry(), [torch.zeros(2)]), lambda result: None, ["value"],
        torch.futures.Future(), buffers=list(buffers),
    )  # fmt: skip


def generation(number, store_port=0):
    return Generation(
        generation=number, rank=0, workers=[0, 1], newcomers=[], store_port=store_port
    )


class Worker:
    """Rank 0 of two, with what it has told the controller."""

    def __init__(self):
        self.told = []
        self.journal = Journal(2)
        self.journal.start_at(0)
        self.dispatcher = Dispatcher(self.journal, Progress.create_private(), self.told.append)

    def submit(self, log, op):
        with self.journal.lock:
            self.journal.add(log, op, None)
            self.dispatcher.dispatch(log, op)
        return op

    def connect(self, number, inner, store_port=0):
        with self.journal.lock:
            self.dispatcher.connect(generation(number, store_port), inner)

    def disconnect(self):
        with self.journal.lock:
            return self.dispatcher.disconnect()


def test_what_is_submitted_between_generations_goes_out_in_the_next():
    worker, wire = Worker(), Wire()
    ops = [operation() for _ in range(2)]
    futures = [worker.submit(worker.journal.world, op).future for op in ops]
    assert not any(op.attempt for op in ops)
    worker.connect(1, wire)
    for future in wire.futures:
        future.set_result(None)
    assert [future.wait() for future in futures] == [["value"]] * 2
    assert worker.journal.unfinished() == []


@NO_WAIT
@pytest.mark.parametrize("first", [True, False], ids=["waits first", "asks afterwards"])
def test_a_caller_whose_tensor_does_not_take_the_result_is_told(first):
    worker, wire, told = Worker(), Wire(), []
    worker.connect(1, wire)
    op, crowded = operation(), torch.zeros(1).expand(2)
    op.deliver = lambda result: crowded.copy_(result[0])
    work = OnceWork(worker.submit(worker.journal.world, op).future, lambda waits: None)

    def wait():
        with pytest.raises(RuntimeError, match="single memory location"):
            work.wait()
        told.append(True)

    caller = threading.Thread(target=wait)
    if first:
        caller.start()
    wire.futures[0].set_result(None)
    if not first:
        caller.start()
    caller.join()
    assert told
    assert worker.journal.unfinished() == []
    assert op.state is OpState.DONE  # others can be served with it


def test_a_late_result_of_an_abandoned_generation_is_not_used():
    worker, old, new = Worker(), Wire(), Wire()
    worker.connect(1, old)
    op = worker.submit(worker.journal.world, operation())
    future = op.future
    assert worker.disconnect() == ([old], [])
    old.futures[0].set_result(None)
    assert not future.done()
    worker.connect(2, new)
    new.futures[0].set_result(None)
    assert future.wait() == ["value"]


def test_a_lost_peer_is_told_once_a_generation_and_not_after_its_end():
    worker, wires = Worker(), [Wire(), Wire()]
    for number, wire in enumerate(wires, start=1):
        worker.connect(number, wire)
        for _ in range(2):
            worker.submit(worker.journal.world, operation())
        for future in wire.futures[:2]:
            future.set_exception(RuntimeError("Connection closed by peer"))
        worker.disconnect()
    assert worker.told == [
        PeerLost(generation=number, error="Connection closed by peer") for number in (1, 2)
    ]


def test_who_waits_for_a_message_gets_it_in_whichever_generation_it_comes():
    worker, wires = Worker(), [Wire(), Wire()]
    channel = worker.journal.channel(worker.journal.world, 1, 0, 0, sends=False, stages="")
    worker.connect(1, wires[0])
    op = worker.submit(channel, operation(RECEIVE))
    future = op.future
    waiting = threading.Thread(target=worker.dispatcher.wait, args=(channel, op))
    waiting.start()
    _, works = worker.disconnect()
    assert len(works) == 1
    wires[0].futures[0].set_exception(RuntimeError("Connection closed by peer"))
    worker.connect(2, wires[1])
    wires[1].futures[0].set_result(None)
    waiting.join()
    assert future.wait() == ["value"]
    assert worker.told == []


def test_what_others_lack_is_issued_again_and_delivered_once():
    worker, wires = Worker(), [Wire(), Wire()]
    worker.connect(1, wires[0])
    op = operation()
    op.kept = [torch.zeros(1)]
    worker.submit(worker.journal.world, op)
    wires[0].futures[0].set_result(None)
    worker.disconnect()
    worker.journal.world.again.add(op.name)
    worker.connect(2, wires[1])
    wires[1].futures[0].set_result(None)
    assert len(wires[1].futures) == 1
    assert op.state is OpState.DONE


def test_a_message_is_complete_for_its_sender_before_it_goes_out():
    worker, wire = Worker(), Wire()
    channel = worker.journal.channel(worker.journal.world, 0, 1, 0, sends=True, stages="")
    op = operation(SEND, [torch.zeros(2)])
    future = op.future
    with worker.journal.lock:
        assert worker.journal.add(channel, op, None)
        worker.dispatcher.dispatch(channel, op)
    worker.dispatcher.finish(channel, op)
    assert future.wait() == ["value"]
    worker.connect(1, wire)
    assert op.work is not None


@pytest.fixture
def store():
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


@NO_WAIT
def test_a_group_that_still_forms_goes_down_with_its_generation(store):
    worker = Worker()
    worker.connect(1, Wire(), store.port)
    with worker.journal.lock:
        worker.dispatcher.form(worker.journal.add_group("world/pair", [0, 1]))
    (forming,) = [each for each in threading.enumerate() if each.name == "form-world/pair"]
    for inner in worker.disconnect()[0]:
        if isinstance(inner, InnerGroup):
            inner.abort()
    forming.join()  # its other member never comes
    assert worker.told == []


@NO_WAIT
def test_a_group_that_was_aborted_before_it_began_to_form_does_not_wait(store):
    inner = InnerGroup(0, 2)
    inner.abort()
    with pytest.raises(RuntimeError, match="aborted"):
        inner.form(store.port, "alone")


def test_a_group_that_forms_although_it_was_aborted_shuts_down_nobodys_connection(
    store, monkeypatch
):
    inner, next_generations = InnerGroup(0, 2), []

    class Formed:
        _Options = dist.ProcessGroupGloo._Options
        create_device = staticmethod(dist.ProcessGroupGloo.create_device)

        def __init__(self, *_):
            inner.abort()
            next_generations.extend(connected_pair())

    monkeypatch.setattr(dist, "ProcessGroupGloo", Formed)
    with pytest.raises(RuntimeError, match="aborted"):
        inner.form(store.port, "pair")
    ours, theirs = next_generations
    ours.sendall(b"!")
    assert theirs.recv(1) == b"!"
    for each in next_generations:
        each.close()


def connected_pair():
    with socket.create_server(("127.0.0.1", 0)) as server:
        ours = socket.create_connection(server.getsockname())
        theirs, _ = server.accept()
    return ours, theirs
