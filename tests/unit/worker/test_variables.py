"""Variables of a script that a newcomer takes over."""

import sys
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch
from tqdm import tqdm

from trainonce.worker.counters import advance, counters_of
from trainonce.worker.values import LazyMean
from trainonce.worker.variables import Variables


@pytest.fixture(autouse=True)
def no_large_ones(monkeypatch):
    """Keep none: what comes of them is in test_large."""
    monkeypatch.setenv("TRAINONCE_LARGE_VARIABLES_MB", "0")


def no_room(_data, _used):
    """Keep no large variable."""


class Training:
    """A script in which `call` stands for a step, before and after its process was lost."""

    def __init__(self):
        self.variables = Variables(no_room)
        self.taken = b""
        self.takes_over = False

    def call(self, value=None, means=()):
        frame = sys._getframe(1)
        if self.takes_over:
            self.variables.restore(self.taken, means=means)
            self.variables.assign(frame)
            self.takes_over = False
        else:
            self.taken = self.variables.take(frame).encoded(means)
        return value

    def lost(self):
        """Return the training of the process that takes over at this call."""
        newcomer = Training()
        newcomer.takes_over = True
        newcomer.taken = self.taken
        newcomer.variables.restore(self.taken, means=[LazyMean(0.0, 0)])
        return newcomer


def counting(training, steps, begin=0):
    best, losses, sums, where, untouched = 9.0, [], torch.zeros(2), {"a": [0]}, [1]
    mean = np.float64(0)
    alias = losses
    for step in range(begin, begin + steps):
        training.call()
        best = min(best, 1 / (step + 1))
        losses.append(step)
        sums += step
        where["a"][0] += 1
        mean = mean + step
    return best, losses, sums.tolist(), where, float(mean), untouched, alias is losses


def test_a_value_that_cannot_be_encoded_is_left_out_and_named():
    def script(training, steps):
        held, count = [], 0
        for _ in range(steps):
            training.call()
            held[:] = [held, 1]  # holds itself
            count += 1
        return count

    training = Training()
    script(training, 3)
    newcomer = training.lost()
    assert newcomer.variables.missing == ["held"]
    assert script(newcomer, 1) == 3


@pytest.mark.parametrize(
    ("before", "after"), [(0.0, -0.0), ({"a": 1, "b": 2}, {"b": 2, "a": 1})], ids=["zero", "order"]
)
def test_what_only_compares_as_equal_is_another_value(before, after):
    def script(training, values):
        kept = before
        for value in values:
            kept = value
            training.call()
        return repr(kept)

    training = Training()
    script(training, [before, after])
    newcomer = training.lost()

    def again():
        kept = before
        newcomer.call()
        return repr(kept)

    again.__code__ = again.__code__.replace(co_qualname=script.__code__.co_qualname)
    assert again() == repr(after)


def test_variables_of_a_function_are_those_of_the_predecessor():
    training = Training()
    counting(training, 4)  # lost in the last call: three times something had been added
    assert counting(training.lost(), 2, begin=3) == counting(Training(), 5)


def test_what_was_never_changed_stays_the_newcomers_own():
    def script(training, device):
        count = 0
        for _ in range(3):
            training.call()
            count += 1
        return device, count

    training = Training()
    script(training, "cuda:0")
    assert script(training.lost(), "cuda:1")[0] == "cuda:1"


def test_what_a_replay_changed_by_mistake_is_undone():
    def script(training, skipped=0):
        patience = 0
        for _ in range(skipped):
            training.variables.begin(sys._getframe())
            patience += 1  # compared with a value that was lost
        training.call()
        return patience

    training = Training()
    script(training)
    assert script(training.lost(), skipped=3) == 0


class Trainer:
    def __init__(self):
        self.steps, self.model = 0, torch.nn.Linear(1, 1)

    def fit(self, training, steps):
        for _ in range(steps):
            self.one(training)
        return self.steps

    def one(self, training):
        training.call()
        self.steps += 1


def test_attributes_of_the_object_that_calls_come_along():
    training = Training()
    Trainer().fit(training, 4)
    assert Trainer().fit(training.lost(), 2) == 5


def test_nothing_is_kept_alive_by_being_looked_at():
    class Batch:
        pass

    import weakref

    def script(training):
        batch = Batch()
        seen = weakref.ref(batch)
        training.call()
        del batch
        return seen()

    assert script(Training()) is None


class Meter:
    def __init__(self):
        self.total, self.count = 0.0, 0

    def update(self, value):
        self.total += value
        self.count += 1


def test_objects_of_the_scripts_own_classes_come_along():
    def script(training, values):
        meter = Meter()
        for value in values:
            training.call()
            meter.update(value)
        return meter.total, meter.count

    training = Training()
    script(training, [1.0, 2.0, 3.0])
    assert script(training.lost(), [3.0, 4.0]) == (10.0, 4)


def test_large_ones_are_left_out_and_named_if_they_change():
    def script(training):
        files = ["a"] * 1000
        history, step = list(range(1000)), 0
        for _ in range(2):
            training.call()
            step += 1
            history.append(step)
        return len(files), step

    training = Training()
    script(training)
    newcomer = training.lost()
    assert newcomer.variables.missing == ["history"]
    assert script(newcomer)[1] == 3


def test_what_is_too_large_is_named_though_nothing_else_changes():
    training = Training()
    history = list(range(1000))
    training.call()
    history.append(0)
    training.call()
    assert training.lost().variables.missing == ["history"]


def test_what_has_tensors_as_keys_is_passed_over():
    training = Training()
    names, seen = {}, set()
    training.call()
    names[torch.tensor(1)] = 1
    training.call()
    seen.add(torch.tensor(1))
    training.call()


def test_weights_and_too_many_averages_that_a_script_keeps_are_named():
    def script(training, steps):
        best, losses = None, []
        for step in range(steps):
            batch = {"ids": torch.ones(100)}
            training.call()
            losses.append(LazyMean.known(float(step)))
            if step == 1:
                best = {"0.weight": torch.ones(100), "0.bias": torch.ones(2)}
        return best, losses, batch

    training = Training()
    script(training, 1)
    assert training.lost().variables.missing == []
    script(training, 4)
    assert training.lost().variables.missing == ["best"]
    script(training, 510)  # it does not oust others while it is almost too large
    assert training.lost().variables.missing in (["best"], ["best", "losses"])
    script(training, 600)
    assert training.lost().variables.missing == ["best", "losses"]


def averaged(training, steps, begin=0):
    """Keep averages of ten times the step, each of which is there one step later."""
    best, losses, history, pairs = None, [], defaultdict(list), []
    for step in range(begin, begin + steps):
        mean = LazyMean(float(step), 0)
        losses.append(mean)  # in the step itself, ahead of its commit
        training.call(means=[mean])
        mean.resolve(lambda step=step: 10.0 * step)
        history["loss"].append(mean)
        pairs.append((step, mean))
        best = mean if best is None or mean < best else best
    return [
        [each.item() for each in (best, *losses, *history["loss"])],
        [(step, each.item()) for step, each in pairs],
        dict(history).keys(),
    ]


def test_averages_that_a_script_keeps_come_along():
    training, expected = Training(), averaged(Training(), 5)
    averaged(training, 4)
    newcomer = training.lost()
    assert newcomer.variables.missing == []
    assert averaged(newcomer, 2, begin=3) == expected


def test_what_holds_an_average_of_the_step_at_hand_is_encoded_anew_with_the_next():
    variables, means = Variables(no_room), [[LazyMean(1.0, 0)], [LazyMean(2.0, 0)]]
    kept = []
    frame = sys._getframe()
    variables.take(frame)
    kept.append(means[0][0])
    newcomers = [LazyMean(float("nan"), 0)]
    newcomer = Variables(no_room)
    newcomer.restore(variables.take(frame).encoded(means[0]), means=newcomers)
    assert newcomer._restored[scope_key_of(frame)]["kept"] == newcomers
    means[0][0].resolve(lambda: 1.5)
    newcomer.restore(variables.take(frame).encoded(means[1]), means=newcomers)
    (average,) = newcomer._restored[scope_key_of(frame)]["kept"]
    assert average.item() == 1.5


def test_an_average_that_is_there_at_the_first_look_of_a_newcomer_comes_along():
    def script(training, steps):
        metrics = {"loss": LazyMean.known(0.5)}
        for step in range(steps):
            training.call()
            metrics["loss"] = LazyMean.known(0.5 + step // 3)
        return metrics["loss"].item()

    training = Training()
    script(training, 5)
    newcomer = training.lost()
    script(newcomer, 2)
    assert newcomer.lost().variables.missing == []


def test_a_look_does_not_wait_for_averages():
    variables, kept = Variables(no_room), []
    variables.take(sys._getframe())
    mean, read = LazyMean(1.0, 0), []
    mean.resolve(lambda: read.append(True) or 2.0)
    kept.append(mean)
    taken = variables.take(sys._getframe())
    assert not read
    taken.encoded(())
    taken.encoded(())
    assert (read, kept[0].item()) == ([True], 2.0)


def scope_key_of(frame):
    return f"{frame.f_globals['__name__']}.{frame.f_code.co_qualname}"


def test_callbacks_in_a_list_come_along():
    def script(training, values):
        callbacks = [Meter(), Meter()]
        for value in values:
            training.call()
            callbacks[1].update(value)
        return [(each.total, each.count) for each in callbacks]

    training = Training()
    script(training, [1.0, 2.0, 3.0])
    assert script(training.lost(), [3.0, 4.0]) == [(0.0, 0), (10.0, 4)]


@pytest.mark.parametrize("number", range(508, 516))
def test_any_kind_may_be_the_one_that_is_too_many(number):
    training = Training()
    losses, loss, array, scalar = [0.0] * number, torch.zeros(()), np.zeros(2), np.float64(0)
    training.call()
    losses.append(1.0)
    training.call()
    assert (loss, scalar, len(array)) == (0, 0, 2)


def test_what_is_changed_in_place_and_what_lies_within_objects_comes_along():
    class Stopper:
        def __init__(self):
            self.bad = 0

    class Run:
        def __init__(self):
            self.stopper, self.meters = Stopper(), {"loss": Meter()}

    def script(training, values):
        run, array, counts, sums = Run(), np.zeros(3), Counter(), defaultdict(float)
        for value in values:
            training.call()
            array += value
            counts["seen"] += 1
            sums["loss"] += value
            run.stopper.bad += 1
            run.meters["loss"].update(value)
        return array.tolist(), counts, sums, run.stopper.bad, run.meters["loss"].total

    training = Training()
    script(training, [1.0, 2.0, 3.0])
    expected = script(Training(), [1.0, 2.0, 3.0, 4.0])
    assert script(training.lost(), [3.0, 4.0]) == expected


def test_the_dict_that_a_script_got_from_locals_is_left_alone():
    def script(training):
        number = 3
        config = locals()
        training.call()
        return number, config["number"]

    assert script(Training()) == (3, 3)


def test_a_sum_with_what_a_step_returns_is_right():
    def script(training, values):
        total = 0.0
        for value in values:
            if training.takes_over:
                training.variables.anticipate(sys._getframe())
            total += training.call(value)
        return total

    training = Training()
    script(training, [1.0, 2.0, 3.0])
    assert script(training.lost(), [3.0, 4.0]) == 10.0


@pytest.mark.parametrize("value", [torch.zeros(65), torch.zeros(2, requires_grad=True), object()])
def test_others_are_passed_over(value):
    def script(training, kept):
        training.call()
        return kept

    training = Training()
    script(training, value)
    other = object()
    assert script(training.lost(), other) is other


def test_it_can_be_turned_off(monkeypatch):
    monkeypatch.setenv("TRAINONCE_VARIABLES", "0")
    training = Training()
    counting(training, 4)
    assert training.taken == b""


@pytest.mark.parametrize("bar", [lambda items: items, lambda items: tqdm(items, disable=True)])
def test_a_count_goes_on_behind_what_is_left_out(bar):
    def batches():
        for counter in counters_of(items):
            assert advance(counter, 5)
        yield from "ab"

    items = batches()
    assert list(enumerate(bar(items), start=1)) == [(6, "a"), (7, "b")]
    assert list(enumerate("ab")) == [(0, "a"), (1, "b")]
