import math

import pytest
import torch

from trainonce.worker.kept import KeptValues, join, split
from trainonce.worker.values import LOST, LazyMean, lost, outline


def handed_over(values, latest=None, means=(), restored_means=()):
    newcomer = KeptValues(pytest.fail)
    parts = split(join(values.encode(latest, list(means))))
    newcomer.restore(parts, list(restored_means))
    return newcomer


def test_values_come_back_as_they_were_at_the_commit():
    values = KeptValues(pytest.fail)
    loss = torch.tensor(2.0)
    values.add((0,), {"loss": loss}, lambda _: True)
    values.encode((0,), [])
    loss.add_(1.0)  # the script's own business, after the commit
    known, value = handed_over(values).get((0,))
    assert known
    assert float(value["loss"]) == 2.0


def test_a_value_is_encoded_once():
    values = KeptValues(pytest.fail)
    values.add((0,), torch.ones(3), lambda _: True)
    (first,) = values.encode((0,), [])
    (second,) = values.encode((1,), [])
    assert first is second


def test_means_that_are_not_reduced_yet_are_those_of_the_newcomer():
    values = KeptValues(pytest.fail)
    mean = LazyMean(1.5, 0)
    values.add((0,), (mean, 7), lambda _: True)
    theirs = LazyMean(2.5, 0)
    _, value = handed_over(values, (0,), [mean], [theirs]).get((0,))
    assert value == (theirs, 7)
    _, settled = handed_over(values, (1,), [LazyMean(9.0, 0)]).get((0,))
    assert (settled[0].item(), settled[1]) == (1.5, 7)


def test_of_a_lost_value_the_averages_are_known():
    values = KeptValues(pytest.fail)
    mean = LazyMean(math.nan, 1)
    shape = outline((LazyMean(1.0, 1), 0.5))
    values.expect((0,), shape, 1, [LazyMean(0.0, 0), mean])
    known, value = values.get((0,))
    assert not known
    assert lost(value) == (mean, LOST)
    mean.resolve(lambda: 4.0)
    _, again = handed_over(values, (1,), []).get((0,))
    average, unknown = lost(again)
    assert (average.item(), unknown) == (4.0, LOST)


def test_a_value_without_an_encoding_is_told_and_found_lost():
    told = []
    values = KeptValues(told.append)
    values.add((0,), (object(), 1), lambda _: True)
    known, shape = handed_over(values).get((0,))
    assert (known, shape, len(told)) == (False, (None, None), 1)


def test_only_live_values_are_kept_and_at_most_sixteen():
    values = KeptValues(pytest.fail)
    for step in range(40):
        values.add((step,), step, lambda position: position != (39,))
    assert len(values.encode(None, [])) == 16
    assert values.get((39,)) == (False, None)
    assert values.get((38,)) == (True, 38)


def test_parts_of_any_length_are_taken_apart_again():
    parts = [b"", b"a", bytes(1000), b"last"]
    assert [bytes(part) for part in split(join(parts))] == parts
    assert split(join([])) == []


def test_committed_steps_are_counted_from_the_step_before_where_iterations_are_left_out():
    values = KeptValues(pytest.fail)
    values.add((0, 3, 0), None, lambda _: True, 4)  # the last iteration of a loop that is over
    values.add((1, 1, 0), None, lambda _: True, 6)  # the second of the next, which is under way
    newcomer = handed_over(values)
    found = {at: newcomer.commits_before(at) for at in [(0, 3, 0), (0, 3, 1), (1,), (1, 1, 0)]}
    assert found == {(0, 3, 0): 3, (0, 3, 1): 4, (1,): 4, (1, 1, 0): 5}
    assert newcomer.commits_before((1, 1, 1)) is None  # where the script was last
