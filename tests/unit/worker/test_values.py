"""What stands for values that went down with a process, and for means not yet reduced."""

import copy
import math
from collections import Counter, defaultdict

import pytest
import torch

import trainonce
from trainonce.errors import StepError
from trainonce.wire.encoding import decode, encode
from trainonce.worker.values import (
    LOST,
    LazyMean,
    is_complete,
    lost,
    merged,
    outline,
    pack_value,
    unpack_value,
    with_means,
)


def test_lost_lets_logging_go_on():
    assert math.isnan(float(LOST))
    assert math.isnan(LOST.item())
    assert f"{LOST:.3f}" == "nan"
    assert list(LOST) == []
    assert not LOST
    assert trainonce.LOST is LOST
    assert math.isnan(1 + LOST)
    assert math.isnan(LOST * 2)
    assert math.isnan(sum([1.0, LOST]))
    assert not LOST < 1
    assert not LOST > 1
    assert LOST["loss"][0] is LOST
    assert math.isnan(LOST.detach().cpu().item())
    assert copy.deepcopy([LOST])[0] is LOST


def test_lost_is_a_nan_to_functions_of_torch():
    assert not torch.isfinite(LOST)
    assert torch.stack([torch.tensor(1.0), LOST]).isnan().tolist() == [False, True]
    assert (torch.ones(2) * LOST).isnan().all()
    assert torch.ones(2).add(LOST, alpha=2).isnan().all()
    correct = torch.tensor(7)
    correct += LOST
    assert math.isnan(correct)


def test_nothing_is_trained_by_lost():
    weight = torch.ones(2, requires_grad=True)
    with pytest.raises(StepError, match="a step computes with it"):
        weight.mul(LOST)
    with pytest.raises(AttributeError, match=r"run\.state"):
        LOST.index_select(0, torch.tensor([1]))


def test_a_lost_value_has_the_form_of_the_one_before():
    loss, info = lost(outline((0.5, {"accuracy": 1.0, "ids": [1, 2]})))
    assert loss is LOST
    assert info == {"accuracy": LOST, "ids": LOST}


def test_means_are_kept_by_their_place_and_old_ones_by_their_value():
    new, old = LazyMean(1.0, 0), LazyMean(2.0, 1)
    packed = pack_value({"new": new, "old": (old, 3)}, [new])
    again = LazyMean(1.0, 0)
    unpacked = unpack_value(packed, [again])
    assert unpacked["new"] is again
    average, three = unpacked["old"]
    assert (type(average), average.item(), three) == (LazyMean, 2.0, 3)


def test_lists_of_means_and_what_holds_them_are_of_their_kind_again():
    new, old = LazyMean(1.0, 0), LazyMean(2.0, 1)
    old.resolve(lambda: 2.5)
    history = defaultdict(list, loss=[old, new, old], other=[])
    packed = decode(encode(pack_value({"history": history, "count": Counter("aab")}, [new])))
    again = unpack_value(packed, [LazyMean(7.0, 0)])
    assert [mean.item() for mean in again["history"]["loss"]] == [2.5, 7.0, 2.5]
    assert again["history"]["new"] == []
    assert again["count"] == Counter(a=2, b=1)


def test_a_mean_shows_its_local_value_until_it_is_reduced():
    mean = LazyMean(1.5, 0)
    assert float(mean) == 1.5
    mean.resolve(lambda: 4.0)
    assert f"{mean:.1f}" == "4.0"
    assert mean.item() == pytest.approx(4.0)


def test_what_is_known_of_a_lost_value_is_not_lost():
    shape, known = outline((0.5, {"loss": 2.0}, None)), (None, {"loss": [2.5]}, [None])
    assert lost(merged(shape, known)) == (LOST, {"loss": 2.5}, None)
    assert merged(outline((0.5,)), known) == (None,)  # of another form: not the same step
    assert not is_complete(merged(shape, known))
    assert is_complete(merged(outline(0.5), [0.5]))


def test_that_none_is_returned_again_is_a_guess():
    assert merged(outline((0.5, None)), ([0.25], [None])) == ([0.25], [None])
    assert merged(outline((0.5, 0.5)), ([0.25], [None])) == ([0.25], None)
    assert merged(outline((0.5, None)), ([0.25], [0.75])) == ([0.25], None)
    assert not is_complete(merged(outline(0.5), outline(None)))
    assert is_complete(merged(outline(None), outline(None)))


def test_a_mean_is_complete_with_its_share():
    means = [LazyMean(1.0, 0), LazyMean(math.nan, 1)]
    assert is_complete(with_means(0, means))
    assert not is_complete(with_means((0, 1), means))
