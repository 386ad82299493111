"""When no living copy is left: durable checkpoints; and copies that are no longer equal."""

import signal
from pathlib import Path

import pytest

from trainonce.events import CheckpointSaved, CheckpointSkipped, ReplicasDiffer
from trainonce.testing import run_job

SCRIPT = Path(__file__).parent / "scripts" / "durable.py"


def checkpoints(result):
    folder = result.home / "jobs" / result.job / "checkpoints"
    return sorted(folder.glob("step-?????????"), key=lambda path: path.name)


def resume(result, *arguments):
    return run_job(SCRIPT, *arguments, options=("--resume", result.job), home=result.home)


def test_all_ranks_lost_at_once_go_on_from_the_last_checkpoint(calm, tmp_path):
    # Without a spare: it could take the first rank over before the second gets to its end.
    result = run_job(
        SCRIPT, "--every", 0.001, "--until-saved", tmp_path, home=tmp_path,
        chaos="kill rank=0 step=250 point=update; kill rank=1 step=250 point=update",
    )  # fmt: skip
    result.assert_completed()
    result.assert_fired("kill", times=2, cause="signal", served_by="checkpoint")
    saved = [event.step for event in result.events if isinstance(event, CheckpointSaved)]
    assert any(0 < step < 250 for step in saved), saved
    lost = sum(incident.steps_lost for incident in result.incidents)
    assert 0 < lost <= 250 - min(step for step in saved if step > 0)
    result.assert_same_state(calm("durable.py"))


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """A job that got SIGTERM on the way, as a spot instance does, and its checkpoint."""
    home = tmp_path_factory.mktemp("interrupted")

    def terminate(process):
        folder = home / "jobs"
        while process.poll() is None:
            if list(folder.glob("*/checkpoints/step-?????????")):
                process.send_signal(signal.SIGTERM)
                return

    result = run_job(SCRIPT, "--steps", 100_000, home=home, watch=terminate)
    assert result.exit_code == 143, result.explain()
    assert not result.leftovers
    reasons = {event.reason for event in result.events if isinstance(event, CheckpointSaved)}
    assert "signal" in reasons, reasons
    return result


@pytest.fixture(scope="module")
def further(interrupted):
    """Options for a run that goes on a little after the last checkpoint of `interrupted`."""
    return "--steps", int(checkpoints(interrupted)[-1].name[-9:]) + 50


def test_a_job_stopped_by_sigterm_resumes_where_it_was(calm, interrupted, further):
    result = resume(interrupted, *further)
    result.assert_completed()
    result.assert_same_state(calm("durable.py", *further))


def test_a_damaged_checkpoint_is_skipped_for_the_one_before(calm, interrupted, further):
    kept = checkpoints(interrupted)
    if len(kept) < 2:
        pytest.skip("only one checkpoint was written before the signal")
    weights = kept[-1] / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-3] ^= 64
    weights.write_bytes(data)
    result = resume(interrupted, *further)
    result.assert_completed()
    skipped = [event for event in result.events if isinstance(event, CheckpointSkipped)]
    assert any(event.path == str(kept[-1]) for event in skipped), result.explain()
    result.assert_same_state(calm("durable.py", *further))


def test_ranks_write_a_checkpoint_when_the_launcher_is_lost(calm, tmp_path):
    result = run_job(SCRIPT, "--every", 1000, home=tmp_path, chaos="kill_launcher step=100")
    assert result.exit_code == -signal.SIGKILL
    assert checkpoints(result), result.explain()
    again = resume(result)
    again.assert_completed()
    again.assert_same_state(calm("durable.py"))


def test_another_number_of_ranks_goes_on_with_each_sample_once_an_epoch(tmp_path):
    first = run_job(SCRIPT, "--steps", 10, home=tmp_path)
    first.assert_completed()
    second = run_job(
        SCRIPT, "--steps", 15, nproc_per_node=3, options=("--resume", first.job), home=tmp_path
    )
    second.assert_completed()
    # 10 steps of 2 × 4 samples are an epoch of 60 (8 steps) and 16 samples of the next. Both
    # jobs wrote to the same records: steps that were executed twice would show.
    ids = [
        id_
        for records in second.records.values()
        for each in records
        for id_ in each.get("ids", ())
    ]
    epochs = len(ids) // 60
    assert epochs >= 2
    counts = {id_: ids.count(id_) for id_ in range(60)}
    assert set(counts.values()) <= {epochs, epochs + 1}, counts


def test_a_replica_with_a_flipped_bit_is_named_and_repaired(calm, tmp_path):
    result = run_job(
        SCRIPT, "--steps", 40, "--verify", 7, nproc_per_node=3, home=tmp_path,
        chaos="flip rank=1 step=21 point=commit",
    )  # fmt: skip
    result.assert_completed()
    result.assert_fired("flip", rank=1)
    found = [event for event in result.events if isinstance(event, ReplicasDiffer)]
    assert [(event.step, event.odd_ranks, event.repaired_from) for event in found] == [(21, [1], 0)]
    assert found[0].names[0].startswith("model.")
    result.assert_same_state(calm("durable.py", "--steps", 40, world=3))


def test_two_replicas_that_differ_are_reported(tmp_path):
    result = run_job(
        SCRIPT, "--steps", 20, "--verify", 5, home=tmp_path,
        chaos="flip rank=1 step=10 point=commit",
    )  # fmt: skip
    result.assert_completed()
    found = [event for event in result.events if isinstance(event, ReplicasDiffer)]
    assert found
    assert (found[0].step, found[0].odd_ranks, found[0].repaired_from) == (10, [0, 1], -1)
