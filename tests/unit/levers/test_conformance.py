"""What every lever must do, whatever else it does. A new lever adds a line to LEVERS."""

import json

import pytest
import torch

from trainonce.errors import StateMismatchError
from trainonce.levers import registry
from trainonce.levers.base import Lever, LeverInfo
from trainonce.levers.early_stop import EarlyStop
from trainonce.levers.freeze import Freeze
from trainonce.levers.infobatch import InfoBatch
from trainonce.levers.noise_scale import NoiseScale
from trainonce.levers.precision import Precision
from trainonce.levers.schedule import Schedule
from trainonce.levers.sequence import SequenceWarmup
from trainonce.worker.state import Protected

from .lever_loop import EPOCHS, LENGTH, SAMPLES, TOTAL_STEPS, Training, equal

LEVERS = {
    "schedule": lambda _model, optimizer, **on: Schedule(optimizer, TOTAL_STEPS, **on),
    "bf16": lambda _model, _optimizer, **on: Precision("bf16", **on),
    "fp16": lambda _model, _optimizer, **on: Precision("fp16", **on),
    "sequence-warmup": lambda _model, _optimizer, **on: SequenceWarmup(
        LENGTH, TOTAL_STEPS, ramp=0.6, shortest=2, **on
    ),
    "infobatch": lambda _model, _optimizer, **on: InfoBatch(SAMPLES, EPOCHS, **on),
    "freeze": lambda model, _optimizer, **on: Freeze(
        [model.embed, *model.blocks, model.head], window=2, threshold=0.99, patience=1, **on
    ),
    "noise-scale": lambda _model, optimizer, **on: NoiseScale(
        optimizer, 1, every=3, smoothing=0.5, **on
    ),
    "early-stop": lambda _model, _optimizer, **on: EarlyStop(patience=2, **on),
}
# These watch, and change nothing by themselves.
PASSIVE = {"early-stop"}


def one(name, **on):
    return lambda model, optimizer: {name: LEVERS[name](model, optimizer, **on)}


def together(**on):
    names = [name for name in LEVERS if name != "bf16"]
    return lambda model, optimizer: {n: LEVERS[n](model, optimizer, **on) for n in names}


@pytest.fixture(scope="module")
def plain():
    return Training(lambda _model, _optimizer: {}).run()


@pytest.mark.parametrize("name", LEVERS)
@pytest.mark.parametrize("stop", [3, 7, 13])
def test_a_lever_resumes_bit_identically_in_the_middle_of_anything(name, stop):
    whole = Training(one(name)).run()
    saved = Training(one(name)).run(until=stop).save()
    resumed = Training(one(name)).load(saved).run()
    assert resumed.step == whole.step
    assert equal(resumed, whole)


@pytest.mark.parametrize("name", LEVERS)
def test_a_lever_that_is_on_does_something(name, plain):
    if name in PASSIVE:
        pytest.skip("it only watches")
    assert not equal(Training(one(name)).run(), plain)


@pytest.mark.parametrize("name", LEVERS)
def test_a_lever_that_is_off_is_off(name, plain):
    off = Training(one(name, enabled=False))
    if name == "infobatch":  # it still owns the order, so the plain loop is given that order
        plain = Training(lambda _model, _optimizer: {})
        plain.order = off.order
        plain.run()
        off = Training(one(name, enabled=False))
    assert equal(off.run(), plain)


def test_all_levers_compose_and_resume_together():
    whole = Training(together()).run()
    for stop in (2, 9):
        saved = Training(together()).run(until=stop).save()
        assert equal(Training(together()).load(saved).run(), whole)
    assert all(bool(torch.isfinite(p).all()) for p in whole.parameters().values())


def test_all_levers_off_are_off():
    plain = Training(lambda _model, _optimizer: {})
    off = Training(together(enabled=False))
    plain.order = off.order
    assert equal(Training(together(enabled=False)).run(), plain.run())


def test_what_run_protect_hands_to_a_newcomer_carries_every_lever():
    donor = Training(together()).run(until=9)
    newcomer = Training(together())
    sides = [
        Protected({"model": t.model, "optimizer": t.optimizer, "lever": t.levers})
        for t in (donor, newcomer)
    ]
    sides[0].capture()
    image = sides[0].image()
    for (_, theirs), (_, mine) in zip(
        image.tensors, sides[1].prepare(sides[0].describe(image)), strict=True
    ):
        mine.data.copy_(theirs)
    newcomer.step, newcomer.epoch, newcomer.offset = donor.step, donor.epoch, donor.offset
    assert equal(newcomer.run(), donor.run())


@pytest.mark.parametrize("name", LEVERS)
def test_state_of_another_lever_is_refused(name):
    lever = Training(one(name)).levers.levers[name]
    with pytest.raises(StateMismatchError, match=lever.info.name):
        lever.load_state_dict({"enabled": True, "someone": "else's"})


@pytest.mark.parametrize("name", LEVERS)
def test_state_survives_switching_off(name):
    lever = Training(one(name)).levers.levers[name]
    lever.enabled = False
    other = Training(one(name)).levers.levers[name]
    other.load_state_dict(lever.state_dict())
    assert not other.enabled


def test_every_registered_lever_says_what_it_saves_and_where_it_hurts():
    infos = registry.describe()
    assert [info.name for info in infos] == list(registry.LEVERS)
    for info in infos:
        assert isinstance(info, LeverInfo)
        assert all((info.saves, info.source, info.applies, info.hurts))


def test_every_registered_lever_that_acts_in_the_loop_is_in_this_suite():
    acting = {
        name
        for name in registry.LEVERS
        if isinstance(registry.load(name), type) and issubclass(registry.load(name), Lever)
    }
    covered = {LEVERS[name](*_parts()).info.name for name in LEVERS}
    assert acting == covered


def test_an_unknown_lever_is_refused_with_the_names_there_are():
    with pytest.raises(ValueError, match="no lever") as caught:
        registry.load("magic")
    assert "schedule" in json.dumps(caught.value.hint)


def _parts():
    training = Training(lambda _model, _optimizer: {})
    return training.model, training.optimizer
