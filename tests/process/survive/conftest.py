"""Jobs without faults, each run once for all tests that compare with it."""

from pathlib import Path

import pytest

from trainonce.testing import run_job

SCRIPTS = Path(__file__).parent / "scripts"


@pytest.fixture(scope="session")
def calm(tmp_path_factory):
    """Return a function that gives the result of a script without faults."""
    known = {}

    def find(script, *args, world=2):
        key = (script, *args, world)
        if key not in known:
            home = tmp_path_factory.mktemp("calm")
            known[key] = run_job(SCRIPTS / script, *args, nproc_per_node=world, home=home)
            known[key].assert_completed()
        return known[key]

    return find


@pytest.fixture
def shaken(calm, tmp_path):
    """Return a function that runs a script with faults, and checks what holds for each.

    The job ends well, leaves no process behind, loses no committed step, every fault of the plan
    fired and nothing else failed, every move of it took place (but for so many as
    deaths may put off to the end), and all ranks end bit for bit as without faults.
    """

    def run(script, *args, faults, put_off=0, world=2, spares=2, options=()):
        result = run_job(
            SCRIPTS / script, *args,
            nproc_per_node=world, spares=spares, chaos="; ".join(faults),
            options=options, home=tmp_path / "home",
        )  # fmt: skip
        result.assert_completed()
        assert len(result.faults) == len(faults), result.explain()
        result.assert_nothing_lost()
        own = [one for one in result.incidents if not (one.chaos or one.planned)]
        assert not own, f"failures that nobody injected: {own}\n{result.explain()}"
        moves = sum(fault.fault == "migrate" for fault in result.faults)
        moved = sum(one.chaos and one.served_by == "migration" for one in result.incidents)
        assert 0 <= moves - moved <= put_off, result.explain()
        result.assert_same_state(calm(script, *args, world=world))
        return result

    return run
