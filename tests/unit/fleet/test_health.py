"""The health policy on scripted and recorded readings, false-alarm traps included."""

import math
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from trainonce.errors import ConfigError
from trainonce.fleet.health import (
    XIDS_FATAL,
    XIDS_SUSPECT,
    Action,
    HealthLimits,
    Verdict,
    judge,
)
from trainonce.fleet.moves import Move, MoveLimits, may_move
from trainonce.fleet.signals import Reading, RecordedSource, ScriptedSource, from_record, record
from trainonce.fleet.watch import HealthWatch

EVERY_S = 10.0


def readings(count: int, **series: object) -> list[Reading]:
    """Return readings ten seconds apart; a list or function gives a field's value for each."""
    made = []
    for i in range(count):
        values = {
            name: value[i] if isinstance(value, list) else value(i) if callable(value) else value
            for name, value in series.items()
        }
        made.append(Reading(mono_s=1000 + EVERY_S * i, host="gpu-1", device="gpu0", **values))
    return made


def hot(temperature_c: object, count: int = 60) -> Verdict:
    return judge(readings(count, temperature_c=temperature_c, slowdown_c=87.0, shutdown_c=92.0))


def warm_up(rest_c: float, tau_s: float, *, begin: int = 3) -> Callable[[int], float]:
    """Return the temperature of a device that is given work: it nears a rest, ever more slowly."""

    def at(i: int) -> float:
        since_s = max(0.0, (i - begin) * EVERY_S)
        return float(round(rest_c - (rest_c - 38) * math.exp(-since_s / tau_s)))

    return at


# -- migrate now


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"recovery_action": 1}, "the driver advises to reset the GPU"),
        ({"recovery_action": 2}, "the driver advises to reboot the node"),
        ({"recovery_action": 9}, "the driver advises to action 9"),
        ({"row_remap_failed": 1}, "1 memory rows could not be remapped"),
        ({"xids": (79,)}, "XID 79: the GPU needs a reset"),
    ],
)
def test_what_the_vendor_calls_fatal_moves_the_rank_at_once(
    values: dict[str, object], says: str
) -> None:
    verdict = judge(readings(1, **values))
    assert verdict.action is Action.MIGRATE
    assert verdict.reasons[0] == says


def test_steady_ramp_towards_shutdown_moves_the_rank_before_it_gets_there() -> None:
    ramp = readings(60, temperature_c=lambda i: 60 + 0.5 * i, slowdown_c=87.0, shutdown_c=92.0)
    first = next(i for i in range(60) if judge(ramp[: i + 1]).action is Action.MIGRATE)
    temperature_c = ramp[first].temperature_c
    assert temperature_c is not None
    assert temperature_c < 87, "before the device slows down"
    assert "rising 3.0 °C a minute" in judge(ramp[: first + 1]).reasons[0]


def test_ramp_is_seen_through_noise_and_a_broken_reading() -> None:
    noise = [0.0, 0.8, -0.6, 0.3, -0.9, 0.5]
    series = [60 + 0.5 * i + noise[i % 6] for i in range(54)]
    series[50] = 20.0
    series[49] = None  # type: ignore[call-overload]
    assert hot(series, 54).action is Action.MIGRATE


# -- traps: none of these may move a rank


@pytest.mark.parametrize(
    "series",
    [
        pytest.param(lambda i: 84.0, id="warm and steady"),
        pytest.param(lambda i: 84.0 + (i % 2), id="warm and noisy"),
        pytest.param(lambda i: min(84.0, 40 + 3.0 * i), id="warm-up that comes to rest"),
        pytest.param(lambda i: 40.0 if i < 50 else 84.0, id="a load step"),
        pytest.param(lambda i: 120.0 if i == 59 else 60.0, id="one absurd reading, the last"),
        pytest.param(lambda i: 120.0 if i == 30 else 60.0, id="one absurd reading"),
        pytest.param(lambda i: 60 + 0.01 * i, id="a slow day's warming"),
        pytest.param(lambda i: 90 - 0.1 * i if i > 30 else 60.0, id="cooling down"),
        pytest.param(lambda i: 120.0 if i == 59 else 60 + 0.05 * i, id="absurd while warming"),
        pytest.param(lambda i: 255.0 if i in (40, 59) else 60 + 0.1 * i, id="absurd twice"),
        pytest.param(lambda i: None, id="no sensor"),
        pytest.param(lambda i: float("nan"), id="a sensor that gives no number"),
        pytest.param(lambda i: 82 + 4 * ((i // 6) % 2), id="breathing with the load"),
        pytest.param(warm_up(84.0, 30), id="a warm-up in seconds"),
        pytest.param(warm_up(86.0, 60), id="a warm-up to just below slowdown"),
        pytest.param(warm_up(85.0, 180), id="a slow warm-up"),
        pytest.param(warm_up(84.0, 60, begin=30), id="work after a pause"),
    ],
)
def test_temperatures_that_only_look_alarming_move_nothing(series: object) -> None:
    values: dict[str, object] = {"slowdown_c": 87.0, "shutdown_c": 92.0}
    watch, seen = HealthWatch(), set[Action]()
    for reading in readings(120, temperature_c=series, **values):
        seen |= {verdict.action for verdict in watch.observe([reading]).values()}
    assert Action.MIGRATE not in seen, "at no time, and not only at the end"
    assert hot(series).action is Action.NONE


class Oven:
    """A device in simulated time, read when the watch asks for it or at a fixed pace."""

    def __init__(self, at: Callable[[float], float], every_s: float, *, dense: bool) -> None:
        self.at, self.every_s, self.dense = at, every_s, dense
        self.watch = HealthWatch()
        self.num_readings = 0

    def moved_s(self, until_s: float, seed: int = 0) -> float | None:
        """Return when a move was asked for, if before `until_s`; a sensor wavers and rounds."""
        noise = random.Random(seed)
        now_s = 0.0
        while now_s < until_s:
            shown = float(round(self.at(now_s) + noise.gauss(0, 0.5)))
            reading = Reading(mono_s=now_s, host="h", device="gpu0", temperature_c=shown,
                              slowdown_c=87.0, shutdown_c=92.0)  # fmt: skip
            self.num_readings += 1
            if self.watch.observe([reading])["h", "gpu0"].action is Action.MIGRATE:
                return now_s
            now_s += self.watch.next_look_s(self.every_s) if self.dense else self.every_s
        return None


def steep(from_c: float, c_per_min: float, begin_s: float = 605.0) -> Callable[[float], float]:
    """Return a temperature that rests, and from `begin_s` on rises without an end."""
    return lambda now_s: from_c + max(0.0, now_s - begin_s) * c_per_min / 60


@pytest.mark.parametrize("every_s", [10.0, 30.0, 60.0])
@pytest.mark.parametrize("c_per_min", [3.0, 6.0, 12.0, 24.0])
@pytest.mark.parametrize("from_c", [60.0, 78.0])
def test_steep_rise_is_seen_in_time_however_seldom_is_read_at_rest(
    from_c: float, c_per_min: float, every_s: float
) -> None:
    at = steep(from_c, c_per_min)
    lives_s = (92 - from_c) / c_per_min * 60
    dies_s = 605.0 + lives_s
    oven = Oven(at, every_s, dense=True)
    if lives_s < 2 * every_s:
        return  # nothing can be read of it
    moved_s = oven.moved_s(dies_s)
    assert moved_s is not None
    # What is left from slow-down on, less what tells a rise from a wrong reading.
    assert dies_s - moved_s > 0.4 * 5 / c_per_min * 60
    assert oven.num_readings < dies_s / every_s + 80


@pytest.mark.parametrize(("from_c", "c_per_min"), [(60.0, 8.0), (71.0, 10.0), (80.0, 4.0)])
def test_steep_rise_is_seen_in_few_readings_where_there_are_no_more(
    from_c: float, c_per_min: float
) -> None:
    dies_s = 605.0 + (92 - from_c) / c_per_min * 60
    assert Oven(steep(from_c, c_per_min), 30.0, dense=False).moved_s(dies_s) is not None


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("every_s", [10.0, 30.0])
@pytest.mark.parametrize("tau_s", [8.0, 15.0, 40.0, 100.0])
@pytest.mark.parametrize("rest_c", [80.0, 84.0, 86.0])
def test_warm_up_moves_nothing_at_any_pace_of_reading(
    rest_c: float, tau_s: float, every_s: float, dense: bool
) -> None:
    def at(now_s: float) -> float:
        return rest_c - (rest_c - 38) * math.exp(-max(0.0, now_s - 95) / tau_s)

    for seed in range(5):
        assert Oven(at, every_s, dense=dense).moved_s(1800, seed) is None


def test_one_wrong_reading_and_one_that_has_ended_are_no_steep_rise() -> None:
    # From 81 on each step would reach shutdown at the next reading, were it repeated.
    assert hot([75.0, 81.0, 87.0], 3).action is Action.MIGRATE
    assert hot([81.0, 87.0, 87.0], 3).action is not Action.MIGRATE
    assert hot([75.0, 81.0, 87.0, 87.0, 87.0], 5).action is not Action.MIGRATE, "it has ended"
    assert hot([81.0, 81.0, 120.0], 3).action is not Action.MIGRATE
    assert hot([60.0, 120.0, 84.0], 3).action is not Action.MIGRATE
    for wrong in ([72.0, 120.0, 255.0], [0.0, 44.0, 120.0], [0.0, 72.0, 255.0], [0.0, 42.0, 84.0]):
        assert hot(wrong, 3).action is not Action.MIGRATE, "two in a row"
    assert hot([60.0, 75.0, 81.0], 3).action is not Action.MIGRATE, "work may do that"


def told_each_half_minute(temperatures: list[float], watts: list[float]) -> Verdict:
    energy_j, made = 1e6, []
    for i, (temperature_c, power) in enumerate(zip(temperatures, watts, strict=True)):
        energy_j += 30 * power
        made.append(
            Reading(mono_s=30.0 * i, host="h", device="gpu0", temperature_c=temperature_c,
                    energy_j=energy_j, slowdown_c=87.0, shutdown_c=92.0)
        )  # fmt: skip
    return judge(made)


REST = [75.0, 76.0, 75.0, 77.0, 76.0, 75.0]


def test_steep_rise_at_no_more_power_is_seen_at_its_second_reading() -> None:
    verdict = told_each_half_minute([*REST, 79.0, 86.0], [600.0] * 8)
    assert verdict.action is Action.MIGRATE
    said = "86 °C, 7 °C more than before at no more power: shutdown at 92 °C is near"
    assert verdict.reasons == (said,)
    less = [*[600.0] * 6, 500.0, 400.0]  # it protects itself already
    assert told_each_half_minute([*REST, 79.0, 86.0], less).action is Action.MIGRATE


@pytest.mark.parametrize(
    ("temperatures", "watts"),
    [
        pytest.param([*REST, 79.0, 86.0], [*[400.0] * 6, 600.0, 600.0], id="more work"),
        pytest.param([*REST, 75.0, 86.0], [600.0] * 8, id="one reading, which may be wrong"),
        pytest.param([*REST, 79.0, 82.0], [600.0] * 8, id="time is left to look again"),
        pytest.param([*REST, 86.0, 79.0], [600.0] * 8, id="it falls again"),
        pytest.param([*REST, 120.0, 255.0], [600.0] * 8, id="two wrong ones"),
        pytest.param([70.0, 73.0, 76.0, 78.0, 80.0, 82.0, 84.0, 86.0], [600.0] * 8, id="no rest"),
        pytest.param([*REST, 79.0, 86.0], [300.0, 600.0] * 4, id="work that comes and goes"),
        pytest.param([*REST, 79.0, 86.0], [0.0] * 8, id="a counter that stands still"),
        pytest.param([*REST, 79.0, 86.0], [600.0] * 7 + [-3e5], id="a counter that was reset"),
        pytest.param([*REST[3:], 79.0, 86.0], [600.0] * 5, id="too short a rest"),
    ],
)
def test_rise_that_power_or_a_wrong_reading_explains_moves_nothing(
    temperatures: list[float], watts: list[float]
) -> None:
    told = told_each_half_minute(temperatures, watts)
    assert not any("at no more power" in reason for reason in told.reasons)


def test_exporter_that_is_asked_oftener_than_it_is_refreshed_tells_the_same() -> None:
    fresh = zip([*REST, 79.0, 86.0], range(8), strict=True)
    made = [
        Reading(mono_s=30.0 * i + again, host="h", device="gpu0", temperature_c=temperature_c,
                energy_j=1e6 + 18_000.0 * i, slowdown_c=87.0, shutdown_c=92.0)
        for temperature_c, i in fresh for again in (0.0, 10.0, 20.0)
    ]  # fmt: skip
    assert judge(made[:-2]).action is Action.MIGRATE


@pytest.mark.parametrize("begin_c", [36.0, 50.0, 65.0])
@pytest.mark.parametrize("tau_s", [30.0, 60.0, 120.0])
def test_warm_up_after_a_rest_that_wavers_moves_nothing(tau_s: float, begin_c: float) -> None:
    # What wavered before the rise was taken for a part of it, which no curve fitted.
    for rest_c in (84.0, 86.0):

        def at(now_s: float, rest_c: float = rest_c) -> float:
            since_s = max(0.0, now_s - 605)
            return rest_c - (rest_c - begin_c) * math.exp(-since_s / tau_s)

        moved = [Oven(at, 10.0, dense=False).moved_s(1200, seed) for seed in range(8)]
        assert moved.count(None) >= 7, "of eight"


def test_device_at_rest_is_read_no_oftener_and_one_that_fell_silent_asks_for_nothing() -> None:
    watch = HealthWatch()
    watch.observe(readings(20, temperature_c=lambda i: 84.0 - i % 2, slowdown_c=87.0))
    assert watch.next_look_s(10.0) > 5
    watch = HealthWatch()
    watch.observe(readings(20, temperature_c=lambda i: 60.0 + i, slowdown_c=87.0))
    assert watch.next_look_s(10.0) == pytest.approx(80 / 8)
    watch.observe([Reading(mono_s=5000.0, host="gpu-1", device="gpu1")])
    assert watch.next_look_s(10.0) == 10.0
    assert HealthWatch().next_look_s(0.05) == 0.05


def test_lasting_heat_is_suspected_and_a_moment_of_it_is_not() -> None:
    assert hot(lambda i: 88.0).action is Action.SUSPECT
    assert hot([60.0] * 57 + [88.0] * 3).action is not Action.SUSPECT


def test_users_own_faults_are_only_noted() -> None:
    for xid in (13, 31, 43, 45):
        assert judge(readings(3, xids=(xid,))).action is Action.NOTE
    assert not XIDS_FATAL & XIDS_SUSPECT


def test_counters_of_before_are_history() -> None:
    old = {
        "ecc_uncorrected_total": 40,
        "ecc_corrected_total": 10**9,
        "nvlink_errors_total": 10**7,
        "pcie_replays_total": 10**7,
        "link_downed_total": 12,
        "throttled_thermal_s": 1e6,
    }
    assert judge(readings(60, **old)).action is Action.NONE


def test_counter_that_was_reset_has_not_gained_what_it_lost() -> None:
    totals = [10**6 + i for i in range(30)] + list(range(30))
    assert judge(readings(60, nvlink_errors_total=totals)).action is Action.SUSPECT
    totals = [10**6] * 30 + [0] * 30
    assert judge(readings(60, nvlink_errors_total=totals)).action is Action.NONE


@pytest.mark.parametrize(
    ("series", "says"),
    [
        ({"throttled_thermal_s": lambda i: 7.0 * i}, "slowed by thermal protection 69% of 590 s"),
        ({"throttled_brake_s": lambda i: 9.0 * i}, "slowed by the power brake"),
        ({"ecc_uncorrected_total": lambda i: int(i > 40)}, "1 memory errors could not"),
        ({"ecc_corrected_total": lambda i: 5 * i}, "1800 corrected memory errors an hour"),
        ({"nvlink_errors_total": lambda i: i}, "360 NVLink errors an hour, limit 100"),
        ({"pcie_replays_total": lambda i: i}, "360 PCIe replays an hour"),
        ({"link_downed_total": lambda i: i // 30}, "a network port went down 1 times"),
        ({"row_remap_pending": 2}, "2 memory rows wait for a reset"),
        ({"xids": (74,)}, "XID 74 hints at the hardware"),
    ],
)
def test_what_hints_at_the_hardware_is_suspected(series: dict[str, object], says: str) -> None:
    verdict = judge(readings(60, **series))
    assert verdict.action is Action.SUSPECT
    assert says in verdict.reasons[0]


@pytest.mark.parametrize(
    "series",
    [
        {"throttled_thermal_s": lambda i: 5.0 * i},
        {"throttled_thermal_s": lambda i: 10.0 * max(0, i - 40)},
        {"ecc_corrected_total": lambda i: i},
        {"nvlink_errors_total": lambda i: i // 10},
    ],
)
def test_little_is_not_too_much(series: dict[str, object]) -> None:
    assert judge(readings(60, **series)).action is Action.NONE


def test_burst_in_the_first_seconds_is_no_rate() -> None:
    assert judge(readings(3, nvlink_errors_total=[0, 2, 3])).action is Action.NONE


def test_full_host_is_noted() -> None:
    verdict = judge(readings(1, memory_free_share=0.01, disk_free_share=0.5))
    assert verdict == Verdict(Action.NOTE, ("1.0% of the host's memory is free",))


def test_most_urgent_reason_comes_first_and_all_are_kept() -> None:
    verdict = judge(readings(1, xids=(13, 79), row_remap_pending=1))
    assert verdict.action is Action.MIGRATE
    assert [reason.split()[1] for reason in verdict.reasons] == ["79:", "memory", "13"]


def test_event_is_forgotten_after_the_window() -> None:
    limits = HealthLimits(window_s=100)
    fault = readings(1, xids=(79,)) + readings(30)[5:]
    assert judge(fault[:5], limits).action is Action.MIGRATE
    assert judge(fault, limits).action is Action.NONE


def test_no_reading_says_nothing() -> None:
    assert judge([]) == Verdict(Action.NONE)


def test_watch_keeps_devices_apart_and_drops_what_comes_late() -> None:
    watch = HealthWatch()
    ok, bad = (
        Reading(mono_s=5, host="a", device="gpu0"),
        Reading(mono_s=5, host="a", device="gpu1", recovery_action=1),
    )
    verdicts = watch.observe([ok, bad])
    assert verdicts["a", "gpu0"].action is Action.NONE
    assert verdicts["a", "gpu1"].action is Action.MIGRATE
    assert watch.observe([Reading(mono_s=4, host="a", device="gpu1")]) == {}


@pytest.mark.parametrize("ahead_s", [1e3, 1e15])
def test_clock_that_was_set_back_silences_no_device(ahead_s: float) -> None:
    watch = HealthWatch()
    wrong = Reading(mono_s=ahead_s, host="a", device="gpu0", temperature_c=60.0)
    watch.observe([wrong])
    hot = [Reading(mono_s=5.0 * i, host="a", device="gpu0", lost=1) for i in range(4)]
    seen = [watch.observe([reading]) for reading in hot]
    assert [len(verdicts) for verdicts in seen] == [0, 0, 1, 1]
    assert seen[2]["a", "gpu0"].action is Action.MIGRATE


def test_readings_of_a_second_source_that_come_late_forget_nothing() -> None:
    watch = HealthWatch()
    for i in range(60):
        own = Reading(mono_s=10.0 * i, host="a", device="gpu0", ecc_uncorrected_total=int(i > 0))
        late = [Reading(mono_s=10.0 * i - 5 + k, host="a", device="gpu0") for k in range(4)]
        verdicts = watch.observe([own, *late])
    assert verdicts["a", "gpu0"].action is Action.SUSPECT


def test_device_that_floods_is_kept_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainonce.fleet.watch._MAX_READINGS", 20)
    watch = HealthWatch()
    watch.observe([Reading(mono_s=1.0, host="a", device="gpu0") for _ in range(50)])
    assert len(watch._history["a", "gpu0"]) == 20


@pytest.mark.parametrize("change", [{"window_s": 0}, {"hot_s": -1}, {"free_share": float("nan")}])
def test_impossible_limits_are_refused(change: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="must be more than 0"):
        HealthLimits(**change)


# -- sources


def test_recording_plays_back_what_was_recorded(tmp_path: Path) -> None:
    batches = [[a, b] for a, b in zip(
        readings(3, temperature_c=70.0, xids=(31,)),
        [Reading(mono_s=1000 + EVERY_S * i, host="gpu-1", memory_free_share=0.5) for i in range(3)],
        strict=True,
    )]  # fmt: skip
    path = tmp_path / "signals.jsonl"
    for batch in batches:
        record(batch, path)
    played, scripted = RecordedSource(path), ScriptedSource(batches)
    for batch in batches:
        assert list(played.read()) == list(scripted.read()) == batch
    assert list(played.read()) == list(scripted.read()) == []


def test_recording_with_few_readings_moves_the_failing_device_and_no_other(tmp_path: Path) -> None:
    # Half a minute apart, as a dcgm-exporter tells: a warm-up, one wrong reading, a steep rise.
    series = {
        "gpu0": [62, 62, 71, 77, 80, 83, 84, 85, 86, 86, 85, 86],
        "gpu1": [70, 71, 70, 120, 71, 70, 70, 255, 0, 71, 70, 70],
        "gpu2": [60, 60, 60, 60, 64, 69, 73, 77, 82, 86, 91, 95],
    }
    path = tmp_path / "signals.jsonl"
    for i in range(12):
        record(
            [
                Reading(mono_s=30.0 * i, host="gpu-1", device=device, temperature_c=told[i],
                        slowdown_c=87.0, shutdown_c=92.0)
                for device, told in series.items()
            ],
            path,
        )  # fmt: skip
    played, watch = RecordedSource(path), HealthWatch()
    asked: dict[str, float] = {}
    while batch := played.read():
        for (_, device), verdict in watch.observe(batch).items():
            if verdict.action is Action.MIGRATE:
                asked.setdefault(device, batch[0].mono_s)
    assert asked == {"gpu2": 300.0}, "at 91 degrees, one reading before shutdown"


def test_numbers_that_are_none_are_not_known() -> None:
    reading = from_record(
        {"mono_s": 1.0, "host": "a", "temperature_c": float("nan"), "row_remap_failed": -1,
         "slowdown_c": "hot", "recovery_action": True}
    )  # fmt: skip
    assert reading == Reading(mono_s=1.0, host="a")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[]", "no reading"),
        ('{"host": "a"}', "no reading"),
        ('{"host": "a", "mono_s": "soon"}', "without a time"),
        ('{"host": "a", "mono_s": 1, "colour": 3}', "unknown field 'colour'"),
        ("{", "line 1"),
        ('{"host": "a", "mono_s": 1, "xids": 5}', "line 1"),
    ],
)
def test_bad_recording_gets_a_clear_word(text: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "signals.jsonl"
    path.write_text(text + "\n")
    with pytest.raises(ConfigError, match=says):
        RecordedSource(path)
    with pytest.raises(ConfigError, match="cannot read"):
        RecordedSource(tmp_path / "none.jsonl")


# -- the guard


def test_guard_keeps_spares_for_failures() -> None:
    limits = MoveLimits(keep_spares=1)
    assert may_move("a", now_s=0, spares_ready=2, moves=[], limits=limits).allowed
    refused = may_move("a", now_s=0, spares_ready=1, moves=[], limits=limits)
    assert not refused.allowed
    assert refused.reason == "1 spares are ready and 1 kept for failures"


def test_guard_limits_rate_and_flapping() -> None:
    def decide(now_s: float, *moves: Move) -> str:
        decision = may_move("a", now_s=now_s, spares_ready=9, moves=moves)
        return "" if decision.allowed else decision.reason

    assert "the last move was 50 s ago" in decide(50, Move("b", 0))
    assert decide(200, Move("b", 0)) == ""
    assert "4 moves in the last hour" in decide(1200, *(Move(f"h{i}", 200 * i) for i in range(4)))
    assert decide(9000, *(Move(f"h{i}", 200 * i) for i in range(4))) == ""
    assert "it flaps" in decide(20_000, Move("a", 0), Move("a", 10_000))
    assert decide(90_000, Move("a", 0), Move("a", 10_000)) == ""


def test_impossible_guard_is_refused() -> None:
    with pytest.raises(ConfigError, match="limits of moves"):
        MoveLimits(per_h=0)
