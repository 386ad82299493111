"""A worker stands at a commit for as long as an order holds."""

import queue
import threading

import pytest

from trainonce.worker.drain import DrainOrder


def test_without_an_order_nobody_stands():
    order = DrainOrder()
    order.give(1)
    order.withdraw()
    assert not order.heed(lambda _: pytest.fail("there is no order"))


def test_a_worker_stands_until_the_order_is_void_and_answers_each():
    order, answers, stood = DrainOrder(), queue.Queue(), []
    order.give(3)
    worker = threading.Thread(target=lambda: stood.append(order.heed(answers.put)))
    worker.start()
    assert answers.get() == 3
    order.give(4)  # before it has noticed that the one before is void
    assert answers.get() == 4
    assert worker.is_alive()
    assert not stood
    order.withdraw()
    worker.join()
    assert stood == [True]
    assert answers.empty()
