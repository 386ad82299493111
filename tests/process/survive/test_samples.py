"""Each sample exactly once an epoch, whatever fails."""

import pytest

SAMPLES = 45
EPOCHS = 3


def assert_each_sample_once(result):
    """Check both accounts: the script's `run.state`, and what each execution of a step saw."""
    for epoch in range(EPOCHS):
        kept = [i for state in result.values("state").values() for i in state["seen"][str(epoch)]]
        assert sorted(kept) == list(range(SAMPLES))
    executed = {}
    for rank, records in result.records.items():
        for each in records:
            if "ids" in each:
                place = (rank, each["step"])
                # A step that is executed again on a rebuilt rank sees the same samples.
                assert executed.setdefault(place, each) == each
    for epoch in range(EPOCHS):
        seen = [i for each in executed.values() if each["epoch"] == epoch for i in each["ids"]]
        assert sorted(seen) == list(range(SAMPLES))


def test_each_sample_is_trained_on_once_an_epoch_under_kills(calm, shaken):
    # An epoch is 6 batches of 2 ranks x 4, and an evaluation.
    faults = [
        "kill rank=1 step=2 point=loader", "kill rank=0 step=4 point=backward",
        "kill rank=1 step=6 point=collective", "kill rank=0 step=7 point=loader",
        "kill rank=1 step=9 point=commit", "kill rank=0 step=13 point=begin",
        "kill rank=1 step=15 point=updated", "kill rank=0 step=20 point=between",
    ]  # fmt: skip
    assert_each_sample_once(calm("loader.py"))
    assert_each_sample_once(shaken("loader.py", faults=faults))


def test_augmentation_in_loader_workers_is_the_same_after_kills(calm, shaken):
    faults = ["kill rank=1 step=3 point=backward", "kill rank=0 step=10 point=loader"]
    result = shaken("loader.py", "--workers", 1, faults=faults)
    assert_each_sample_once(result)
    # Augmentation does not depend on where it is done.
    result.assert_same_state(calm("loader.py"))


@pytest.mark.parametrize(
    "faults",
    [
        # A fold has 6 steps of a loader an epoch and 6 of one of its own. 36, then 6, 5 and 3.
        ["kill rank=1 step=4 point=backward", "kill rank=0 step=15 point=loader",
         "kill rank=1 step=20 point=begin", "kill rank=0 step=38 point=commit",
         "kill rank=1 step=43 point=begin", "migrate rank=0 step=48"],
        ["kill rank=0 step=3 point=begin", "kill rank=1 step=28 point=updated",
         "kill rank=0 step=35 point=commit", "kill rank=1 step=40 point=begin",
         "kill rank=0 step=47 point=loader"],
    ],
)  # fmt: skip
def test_a_loader_and_a_step_an_epoch_deal_each_sample_once_and_go_away(calm, shaken, faults):
    without = calm("loader_an_epoch.py")
    for result in (without, shaken("loader_an_epoch.py", faults=faults)):
        assert result.values("seen") == without.values("seen"), result.explain()
        for living in result.values("living").values():
            assert living <= 3  # an epoch's, the one before until then, and the fold's
        assert result.values("left") == {0: 0, 1: 0}
        assert result.values("watched") == {0: 0, 1: 0}
        assert result.values("profiles") == {0: 1, 1: 1}
    dealt = without.values("seen")
    for place in dealt[0]:
        if place != "last":
            ids = [i for seen in dealt.values() for batch in seen[place] for i in batch]
            assert sorted(ids) == list(range(24)), place


@pytest.mark.slow
@pytest.mark.parametrize("point", ["loader", "begin", "collective", "updated", "commit"])
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_each_sample_is_trained_on_once_with_three_ranks(shaken, point, rank):
    # 4 batches of 3 ranks x 4 an epoch, and an evaluation: the last batch of an epoch, the first
    # of the next, and the evaluation after that.
    steps = (3, 5, 9)
    if point in ("loader", "updated"):  # an evaluation takes no batch, and updates nothing
        steps = (3, 5, 8)
    faults = [f"kill rank={rank} step={step} point={point}" for step in steps]
    assert_each_sample_once(shaken("loader.py", faults=faults, world=3))
