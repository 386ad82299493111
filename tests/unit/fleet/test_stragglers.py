"""The straggler detector on simulated steps."""

import numpy as np
import pytest

from trainonce.errors import ConfigError
from trainonce.fleet.stragglers import StragglerDetector, StragglerSettings

RANKS, SLOW_RANK, BEGIN = 256, 7, 100


def steps(rng: np.random.Generator, count: int, slower: float, ranks: int = RANKS) -> np.ndarray:
    """[count, ranks] busy seconds: 1 % noise, ranks 0.5 % apart, hiccups; one rank slows down."""
    busy = 0.2 * (1 + 0.01 * rng.standard_normal((count, ranks)))
    busy *= 1 + 0.005 * rng.standard_normal(ranks)
    hiccup = rng.random((count, ranks)) < 0.002
    busy[hiccup] *= rng.uniform(1.2, 3, hiccup.sum())
    busy[BEGIN:, SLOW_RANK] *= 1 + slower
    return busy


def found(busy: np.ndarray, settings: StragglerSettings | None = None) -> dict[int, int]:
    """Return rank -> first step at which it was named."""
    detector = StragglerDetector(busy.shape[1], settings)
    first: dict[int, int] = {}
    for step, row in enumerate(busy):
        for straggler in detector.observe(step, row.tolist()):
            first.setdefault(straggler.rank, step)
    return first


@pytest.mark.parametrize("slower", [0.05, 0.1, 0.4])
def test_slow_rank_is_named_within_thirty_steps_and_no_other(slower: float) -> None:
    for seed in range(5):
        first = found(steps(np.random.default_rng(seed), 200, slower))
        assert list(first) == [SLOW_RANK]
        assert first[SLOW_RANK] - BEGIN <= 30


def test_healthy_ranks_are_never_named() -> None:
    for seed in range(5):
        assert found(steps(np.random.default_rng(seed), 400, 0.0)) == {}


def test_everyone_slowing_down_together_names_nobody() -> None:
    busy = steps(np.random.default_rng(0), 300, 0.0)
    busy[BEGIN:] *= 1.5
    assert found(busy) == {}


def test_small_job_names_its_slow_rank_and_a_job_of_two_cannot() -> None:
    assert list(found(steps(np.random.default_rng(0), 200, 0.3, ranks=8))) == [SLOW_RANK]
    busy = np.full((100, 3), 0.2)
    busy[:, 2] *= 1.1
    assert list(found(busy)) == [2]
    assert found(busy[:, 1:]) == {}


def test_report_says_how_slow_and_why() -> None:
    busy = np.full((100, 8), 0.2)
    busy[:, 3] *= 1.2
    detector = StragglerDetector(8)
    reports = [r for step, row in enumerate(busy) for r in detector.observe(step, row.tolist())]
    assert reports[0].rank == 3
    assert reports[0].step == 19 + 2 * 5
    assert reports[0].slower == pytest.approx(0.2)
    assert "rank 3 takes 20.0% longer than the median rank" in reports[0].reason


def test_slow_rank_that_recovers_is_no_longer_named() -> None:
    busy = np.full((200, 8), 0.2)
    busy[:100, 3] *= 1.2
    detector = StragglerDetector(8)
    named = [s for s, row in enumerate(busy) if detector.observe(s, row.tolist())]
    assert named
    assert max(named) < 115


def test_worker_that_takes_a_rank_over_starts_anew() -> None:
    busy = np.full((60, 8), 0.2)
    busy[:, 3] *= 1.2
    detector = StragglerDetector(8)
    for step, row in enumerate(busy):
        detector.observe(step, row.tolist())
    detector.forget(3)
    good = [0.2] * 8
    assert [r for step in range(60, 120) for r in detector.observe(step, good)] == []


def test_times_that_are_not_known_name_nobody() -> None:
    busy = np.full((100, 8), 0.2)
    busy[:, 3] = np.nan
    busy[:, 4] = -1.0
    busy[:, 5] = np.inf
    assert found(busy) == {}
    assert found(np.full((100, 8), np.nan)) == {}


def test_impossible_use_is_refused() -> None:
    with pytest.raises(ConfigError, match="7 times for 8 ranks"):
        StragglerDetector(8).observe(0, [0.1] * 7)
    with pytest.raises(ConfigError, match="at least one rank"):
        StragglerDetector(0)
    with pytest.raises(ConfigError, match="window of 3 steps"):
        StragglerSettings(window=1)
    with pytest.raises(ConfigError, match="more than 0"):
        StragglerSettings(sigmas=0)
