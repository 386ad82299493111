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
