"""Where the reports of a step come from is found out in its executions."""

import math
import sys
import threading

import torch

from trainonce.worker.foreseen import Foreseen, reports_of, stood_in_variables
from trainonce.worker.values import LazyMean, outline


class Job:
    """Executes a step as a runner does, and keeps what was known before its last collective."""

    def __init__(self):
        self.foreseen = Foreseen()
        self.means = []
        self.returns = None

    def look(self):
        self.seen = self.foreseen.look(self.caller, self.thread)
        self.published = self.foreseen.means(self.seen, [mean for mean, _ in self.means])
        self.known = self.foreseen.returned(self.seen, self.returns)

    def mean(self, value):
        value = value.detach() if isinstance(value, torch.Tensor) else value
        self.means.append((LazyMean(float(value), len(self.means)), value))

    def execute(self, step, *args):
        self.means, self.thread, self.caller = [], threading.get_ident(), sys._getframe()
        value = step(self, *args)
        self.foreseen.learn(self.seen, reports_of(self.means, value))
        self.returns = outline(value)
        return value


def squared(job, x):
    loss = torch.tensor(x, requires_grad=True) ** 2
    job.look()
    job.mean(loss)
    return {"loss": loss.detach(), "item": loss.item()}


def test_a_tensor_is_known_from_the_second_execution_on():
    job = Job()
    job.execute(squared, 0.3)
    assert not job.published
    value = job.execute(squared, 0.4)
    assert job.published == [value["item"]]
    assert job.known == {"loss": [value["loss"]], "item": [value["item"]]}
    assert not job.known["loss"][0].requires_grad


def test_a_number_that_could_be_equal_by_chance_is_known_when_it_has_changed():
    def step(job, x):
        one = x
        job.look()
        return one

    job = Job()
    for x in (1.0, 1.0):
        job.execute(step, x)
        assert job.known is None
    job.execute(step, 2.0)
    job.execute(step, 1.0)
    assert job.known == [1.0]


def test_what_was_equal_by_chance_is_given_up():
    def step(job, x, scale):
        job.look()
        return 2 * x

    job = Job()
    job.execute(step, 0.1, 0.2)
    job.execute(step, 0.3, 0.4)
    assert job.known == [0.4]  # it was twice the other in the only execution so far
    job.execute(step, 0.1, 0.2)
    assert job.known is None


def test_of_variables_that_were_equal_so_far_none_is_taken_once_they_differ():
    def step(job, x, auxiliary):
        loss = torch.tensor(x)
        total = loss + auxiliary
        job.look()
        return total.item()

    job = Job()
    job.execute(step, 0.1, 0.0)
    job.execute(step, 0.3, 0.0)
    assert job.known == [torch.tensor(0.3).item()]
    job.execute(step, 0.1, 0.5)
    assert job.known is None
    value = job.execute(step, 0.3, 0.5)
    assert job.known == [value]


def test_the_tensor_itself_is_taken_and_not_its_equal():
    def step(job, x, auxiliary):
        loss = torch.tensor(x)
        total = loss + auxiliary
        job.look()
        return total

    job = Job()
    job.execute(step, 0.1, 0.0)
    value = job.execute(step, 0.1, 0.5)
    assert job.known == [value]


def test_a_variable_that_changes_after_the_look_is_not_taken():
    def step(job, x):
        loss = torch.tensor(x)
        job.look()
        loss.mul_(3)
        return loss

    job = Job()
    for x in (0.1, 0.2, 0.3, 0.4, 0.5):
        job.execute(step, x)
        assert job.known is None


def test_entries_of_dicts_and_objects_are_variables_too():
    class Trainer:
        pass

    def step(job, x):
        trainer, metrics = Trainer(), {"norm": torch.tensor(x)}
        trainer.loss = x / 3
        job.look()
        return trainer.loss, metrics["norm"]

    job = Job()
    job.execute(step, 0.1)
    job.execute(step, 0.7)
    assert job.known == ([0.7 / 3], [torch.tensor(0.7)])


def test_a_successor_knows_what_its_predecessor_has_learned():
    job, successor = Job(), Job()
    job.execute(squared, 0.3)
    successor.foreseen.load(job.foreseen.to_record())
    successor.returns = job.returns
    value = successor.execute(squared, 0.5)
    assert successor.published == [value["item"]]
    assert successor.known["item"] == [value["item"]]


def test_the_variables_of_another_thread_are_seen():
    def step(job, x):
        loss = x
        there = threading.Thread(target=job.look)
        there.start()
        there.join()
        return loss

    job = Job()
    job.execute(step, 0.1)
    job.execute(step, 0.3)
    assert job.known == [0.3]


def test_a_share_that_is_not_known_is_a_nan():
    def step(job, x):
        loss = x / 3
        job.look()
        job.mean(5 * x)
        job.mean(loss)

    job = Job()
    for x in (0.1, 0.2, 0.3, 0.4):
        job.execute(step, x)
    missing, known = job.published
    assert math.isnan(missing)
    assert known == 0.4 / 3


def test_looking_keeps_no_tensor_alive():
    def step(job):
        large = torch.zeros(1000)
        loss = large.sum()
        job.look()
        count = sys.getrefcount(large)
        del large
        return loss, count

    job = Job()
    assert [job.execute(step)[1] for _ in range(3)] == [2, 2, 2]


def test_what_stood_in_no_variable_is_told_from_what_did():
    loss = torch.tensor(0.3)
    seen = Job().foreseen.look(sys._getframe().f_back, threading.get_ident())
    assert stood_in_variables(seen, [], (loss, {"loss": loss.item()}, None))
    assert stood_in_variables(seen, [(LazyMean(loss.item(), 0), loss)], None)
    assert not stood_in_variables(seen, [(LazyMean(0.6, 0), 2 * loss)], None)
    assert not stood_in_variables(seen, [], 2 * loss)
    assert not stood_in_variables(seen, [], [loss])
    assert not stood_in_variables(seen, [], loss.new_zeros(2))
    assert not stood_in_variables(seen, [], "text")
    one = 1.0
    seen = Job().foreseen.look(sys._getframe().f_back, threading.get_ident())
    assert not stood_in_variables(seen, [], one)  # equal by chance, perhaps
