"""Updates and donations keep out of each other's way."""

import threading

import pytest

from trainonce.worker.gate import UpdateGate
from trainonce.worker.host import Superseded


def test_a_donation_waits_for_the_update_under_way():
    gate, order = UpdateGate(), []
    gate.begin_update()
    waiting = threading.Event()

    def donate():
        waiting.set()
        with gate.frozen(lambda: False):
            order.append("donated")

    thread = threading.Thread(target=donate)
    thread.start()
    waiting.wait()
    order.append("updated")
    gate.end_update()
    thread.join()
    assert order == ["updated", "donated"]


def test_an_update_waits_for_the_donation_under_way():
    gate, order = UpdateGate(), []
    with gate.frozen(lambda: False):
        thread = threading.Thread(target=lambda: (gate.begin_update(), order.append("updated")))
        thread.start()
        order.append("donated")
    thread.join()
    assert order == ["donated", "updated"]
    assert gate.updating


def test_a_newer_generation_ends_the_wait():
    gate = UpdateGate()
    gate.begin_update()
    with pytest.raises(Superseded), gate.frozen(lambda: True):
        pass
    assert gate.updating


def test_beginning_twice_and_ending_twice_are_harmless():
    gate = UpdateGate()
    gate.begin_update()
    gate.begin_update()
    gate.end_update()
    gate.end_update()
    assert not gate.updating
