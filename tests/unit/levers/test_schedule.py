import math

import pytest
import torch

from trainonce.errors import ConfigError
from trainonce.levers.probe import horizon_ladder, rate_probe
from trainonce.levers.schedule import Schedule


def sgd(*rates):
    return torch.optim.SGD(
        [{"params": [torch.nn.Parameter(torch.ones(1))], "lr": r} for r in rates]
    )


def test_the_rate_rises_stays_level_and_falls_to_zero_after_the_last_update():
    schedule = Schedule(sgd(1.0), 10, warmup=0.2, decay_from=0.5)
    factors = [schedule.factor(step) for step in range(11)]
    assert factors == pytest.approx([1 / 3, 2 / 3, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2, 0.0])


def test_cosine_and_a_floor():
    schedule = Schedule(sgd(1.0), 4, warmup=0.0, decay="cosine", floor=0.1)
    assert schedule.factor(0) == pytest.approx(1)
    assert schedule.factor(2) == pytest.approx(0.1 + 0.9 * 0.5)
    assert schedule.factor(400) == pytest.approx(0.1)


def test_every_group_keeps_its_own_peak():
    optimizer = sgd(1.0, 0.5)
    Schedule(optimizer, 10, warmup=0.0).begin_step(5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.25]


def test_a_schedule_made_after_the_resume_still_knows_the_peaks():
    optimizer = sgd(1.0)
    schedule = Schedule(optimizer, 10, warmup=0.0)
    schedule.begin_step(5)
    saved, resumed_optimizer = schedule.state_dict(), sgd(optimizer.param_groups[0]["lr"])
    resumed = Schedule(resumed_optimizer, 10, warmup=0.0)
    resumed.load_state_dict(saved)
    resumed.begin_step(5)
    assert resumed_optimizer.param_groups[0]["lr"] == 0.5


def test_another_length_is_another_run():
    with pytest.raises(ConfigError, match="schedule of 10 steps"):
        Schedule(sgd(1.0), 20).load_state_dict(Schedule(sgd(1.0), 10).state_dict())


@pytest.mark.parametrize(
    "arguments",
    [{"warmup": 0.5, "decay_from": 0.2}, {"floor": 2}, {"decay": "magic"}, {"total_steps": 0}],
)
def test_schedules_that_make_no_sense_are_refused(arguments):
    with pytest.raises(ConfigError):
        Schedule(sgd(1.0), **{"total_steps": 10, **arguments})


def test_a_rate_held_in_a_tensor_is_written_in_place():
    rate = torch.tensor(1.0)
    parameter = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.Adam([parameter], lr=rate, foreach=False, capturable=False)
    Schedule(optimizer, 10, warmup=0.0).begin_step(5)
    assert optimizer.param_groups[0]["lr"] is rate
    assert rate.item() == 0.5


def valley(best):
    return lambda rate: abs(math.log2(rate / best))


@pytest.mark.parametrize("best", [1e-3, 3e-3, 0.1])
def test_the_probe_walks_to_the_bottom_of_the_valley_and_brackets_it(best):
    choice = rate_probe(valley(best), 3e-3, max_runs=20)
    assert abs(math.log2(choice.value / best)) <= 0.5
    assert "both neighbours are worse" in choice.reason
    assert len(choice.tried) <= 9


def test_a_rate_that_is_known_beforehand_is_left_for_a_clear_gain_only():
    stays = rate_probe(valley(3e-2), 1e-2, max_runs=20, least_gain=0.99)
    assert stays.value == 1e-2
    assert "99% better" in stays.reason
    assert len(stays.tried) >= 3
    assert rate_probe(valley(3e-2), 1e-2, max_runs=20, least_gain=0.01).value > 1e-2


def test_a_rate_that_diverges_is_worse_than_any_that_trains():
    choice = rate_probe(lambda rate: math.nan if rate > 1e-3 else -rate, 0.1, max_runs=20)
    assert choice.value == pytest.approx(0.1 / 2**7)
    assert math.inf in choice.tried.values()


def test_a_probe_in_which_everything_diverges_is_an_error_with_a_hint():
    with pytest.raises(ConfigError, match="diverged at every rate") as caught:
        rate_probe(lambda _rate: math.nan, 0.1)
    assert caught.value.hint


def test_the_ladder_stops_at_the_first_length_that_reaches_the_target():
    lengths = []

    def train(length):
        lengths.append(length)
        return 1 / length

    choice = horizon_ladder(train, target=0.05, longest=64, shortest=4, factor=2)
    assert choice.value == 32
    assert lengths == [4, 8, 16, 32]
    assert choice.tried[16] == 1 / 16


def test_a_target_out_of_reach_gives_the_best_length_and_says_so():
    choice = horizon_ladder(lambda length: 1 / length, target=0.0, longest=10, shortest=9)
    assert choice.value == 10
    assert "none of 2 lengths" in choice.reason
    with pytest.raises(ConfigError, match="diverged"):
        horizon_ladder(lambda _length: math.nan, target=0.0, longest=10, shortest=9)
