"""Code between committed steps runs again in a newcomer, and leaves no trace of that."""

from pathlib import Path

import pytest

from trainonce.testing import run_job

SCRIPTS = Path(__file__).parent / "scripts"


@pytest.mark.parametrize(
    "faults",
    [
        # The last commit is an evaluation: the code before it has run on all other ranks too.
        ["kill rank=1 step=6 point=backward", "kill rank=0 step=12 point=begin"],
        # The last commit is an update: what follows it is still to come.
        ["kill rank=0 step=5 point=begin", "migrate rank=1 step=9"],
    ],
)
def test_code_between_steps_has_acted_once(calm, shaken, faults):
    result = shaken("between_steps.py", faults=faults)
    without = calm("between_steps.py")
    for key in ("user", "history"):
        assert result.values(key) == without.values(key), result.explain()


@pytest.mark.parametrize(
    "faults",
    [
        # An epoch has three updates and an evaluation: lost in the middle, and at its end.
        ["kill rank=0 step=1 point=backward", "kill rank=1 step=7 point=begin",
         "kill rank=0 step=12 point=begin"],
        ["kill rank=1 step=3 point=begin", "kill rank=0 step=8 point=begin",
         "kill rank=1 step=15 point=commit"],
        ["kill rank=0 step=4 point=begin", "migrate rank=0 step=8",
         "kill rank=0 step=15 point=begin"],
    ],
)  # fmt: skip
def test_an_epoch_is_taken_up_wherever_it_stands(calm, shaken, faults):
    result = shaken("epochs.py", faults=faults)
    lines, without = result.values("lines"), calm("epochs.py").values("lines")
    assert result.values("line") == calm("epochs.py").values("line"), result.explain()
    for rank, seen in lines.items():
        for epoch, line in seen.items():
            assert line == without[rank][epoch], result.explain()


@pytest.mark.parametrize(
    "faults",
    [
        # 9 steps at the top of the script, 9 in a function, 7 by an object.
        ["kill rank=1 step=4 point=backward", "kill rank=0 step=11 point=begin",
         "kill rank=1 step=21 point=begin"],
        ["kill rank=0 step=6 point=begin", "kill rank=1 step=15 point=commit",
         "migrate rank=0 step=23"],
    ],
)  # fmt: skip
def test_variables_of_the_script_come_along(calm, shaken, faults):
    result = shaken("own_variables.py", faults=faults)
    without = calm("own_variables.py")
    assert without.values("steps") == {0: 25, 1: 25}
    assert result.values("variables") == without.values("variables"), result.explain()


@pytest.mark.parametrize(
    "faults",
    [
        # Lost where an evaluation is the last commit, and right after another such loss.
        ["kill rank=1 step=4 point=begin", "kill rank=1 step=4 point=between",
         "kill rank=0 step=9 point=begin", "migrate rank=1 step=16"],
        ["kill rank=0 step=5 point=begin", "kill rank=1 step=13 point=begin",
         "kill rank=0 step=19 point=begin", "kill rank=1 step=32 point=begin"],
        ["kill rank=1 step=16 point=begin", "kill rank=0 step=17 point=begin",
         "kill rank=1 step=20 point=begin", "kill rank=0 step=33 point=begin"],
    ],
)  # fmt: skip
def test_what_is_done_every_few_steps_is_done_in_the_same_ones(calm, shaken, faults):
    result = shaken("every_few.py", faults=faults)
    without = calm("every_few.py")
    assert result.values("variables") == without.values("variables"), result.explain()


@pytest.mark.parametrize(
    "faults",
    [
        ["kill rank=0 step=6 point=begin", "kill rank=1 step=11 point=backward"],
        ["kill rank=1 step=8 point=begin", "kill rank=0 step=14 point=begin"],
    ],
)
def test_evaluations_between_steps_leave_no_trace_in_buffers(calm, shaken, faults):
    result = shaken("evaluates.py", faults=faults)
    assert result.values("variables") == calm("evaluates.py").values("variables"), result.explain()


def test_ranks_that_leave_a_loop_at_different_times_are_told_so(tmp_path):
    result = run_job(
        SCRIPTS / "stops_early.py", spares=1, chaos="kill rank=1 step=4 point=backward",
        options=("--hang-timeout-s", "3"), env={"TRAINONCE_VARIABLES": "0"}, home=tmp_path,
    )  # fmt: skip
    assert result.exit_code == 1
    assert "whose script ended after 6 steps" in result.stderr, result.explain()
    assert [incident.cause for incident in result.incidents] == ["signal"], result.explain()


def test_a_schedule_goes_on_in_a_newcomer_without_a_warning(shaken):
    # Lost after the fourth update, and before the schedule's first step: the newcomer takes that
    # without ever having stepped its own optimizer.
    result = shaken("scheduled.py", faults=["kill rank=1 step=4 point=commit"], spares=1)
    assert "lr_scheduler.step()" not in result.stderr, result.explain()


@pytest.mark.parametrize(
    "faults",
    [
        ["kill rank=1 step=3 point=updated", "kill rank=0 step=7 point=update"],
        ["kill rank=0 step=2 point=updated", "kill rank=1 step=6 point=reduced",
         "migrate rank=1 step=9"],
    ],
)  # fmt: skip
def test_what_a_step_changes_after_its_last_collective_is_kept(calm, shaken, faults):
    result = shaken("changes_late.py", faults=faults)
    assert result.values("updates") == {0: 12, 1: 12}, result.explain()
    assert result.values_lost == 0


def test_what_changes_between_the_last_collective_and_the_update_is_kept(calm, shaken):
    faults = ["kill rank=1 step=4 point=update", "kill rank=0 step=7 point=updated"]
    result = shaken("changes_before_update.py", faults=faults)
    assert result.values("counts") == {0: [10] * 3, 1: [10] * 3}, result.explain()


@pytest.mark.parametrize(
    "faults",
    [
        ["kill rank=1 step=10 point=commit", "kill rank=0 step=20 point=commit"],
        ["kill rank=1 step=12 point=update", "kill rank=0 step=21 point=updated"],
    ],
)
def test_averages_that_a_script_steers_by_are_known_to_a_newcomer(calm, shaken, faults):
    result = shaken("steered.py", faults=faults)
    expected = calm("steered.py")
    assert result.values("averages") == expected.values("averages"), result.explain()
    assert result.values("seen") == {0: 12, 1: 12}


@pytest.mark.parametrize(
    "faults",
    [
        # 6 steps an epoch, and 6 which keep their averages themselves.
        ["kill rank=1 step=3 point=begin", "kill rank=0 step=8 point=backward",
         "kill rank=1 step=12 point=begin", "migrate rank=0 step=26"],
        ["kill rank=0 step=4 point=reduced", "kill rank=1 step=10 point=update",
         "kill rank=0 step=17 point=updated", "kill rank=1 step=23 point=commit"],
        ["kill rank=1 step=5 point=collective", "kill rank=0 step=11 point=commit",
         "kill rank=1 step=26 point=backward", "kill rank=0 step=28 point=updated"],
    ],
)  # fmt: skip
def test_averages_that_a_script_keeps_come_along(calm, shaken, faults):
    result = shaken("averages.py", faults=faults)
    assert result.values("averages") == calm("averages.py").values("averages"), result.explain()
    assert "cannot come along" not in result.stderr, result.explain()
    assert result.values("late")[0] == [False, False]  # noted ahead of the backward pass
    assert result.values("looks")[0] == [False, True]
