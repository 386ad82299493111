"""Sharded jobs without faults under torchrun, each run once for all tests that compare with it."""

import math
from pathlib import Path

import pytest

from trainonce.testing import run_job

# A process of plain torch now and then aborts while it exits, on a loaded machine.
_TORCH_ABORTS = "terminate called without an active exception"
SCRIPTS = Path(__file__).parent / "scripts"


def ranks(axes):
    return math.prod(int(each.split(":")[1]) for each in axes if ":" in each)


@pytest.fixture(scope="session")
def plain(tmp_path_factory):
    """Return a function that gives what plain torch does: the script under torchrun."""
    known = {}

    def find(way, *axes, steps=14, script="sharded.py", arguments=(), num_ranks=0):
        key = (script, way, *axes, steps, *arguments)
        if key not in known:
            known[key] = once(way, axes, steps, script, arguments, num_ranks)
            if _TORCH_ABORTS in known[key].stderr:
                known[key] = once(way, axes, steps, script, arguments, num_ranks)
            known[key].assert_completed()
        return known[key]

    def once(way, axes, steps, script, arguments, num_ranks):
        return run_job(
            SCRIPTS / script, way, *axes, "--steps", steps, *arguments,
            nproc_per_node=num_ranks or ranks(axes), launcher="torchrun",
            home=tmp_path_factory.mktemp("plain"),
        )  # fmt: skip

    return find


@pytest.fixture
def shaken(plain, tmp_path):
    """Return a function that runs the script with faults, and checks what holds for each.

    The job ends well, leaves no process behind, loses no committed step, every fault of the
    plan fired, and all ranks end bit for bit as under torchrun.
    """

    def run(
        way, *axes, faults, steps=14, spares=2, arguments=(), options=(), served_by="rebuild",
        script="sharded.py", num_ranks=0,
    ):  # fmt: skip
        result = run_job(
            SCRIPTS / script, way, *axes, "--steps", steps, *arguments,
            nproc_per_node=num_ranks or ranks(axes), spares=spares, chaos="; ".join(faults),
            options=options, home=tmp_path / "home",
        )  # fmt: skip
        result.assert_completed()
        assert len(result.faults) == len(faults), result.explain()
        for fault in result.faults:
            result.assert_fired(
                fault.fault, rank=fault.rank, step=fault.step, point=fault.point,
                pid=fault.pid, cause="signal", detail="SIGKILL", served_by=served_by,
            )  # fmt: skip
        result.assert_nothing_lost()
        calm = plain(
            way, *axes, steps=steps, script=script, arguments=arguments, num_ranks=num_ranks
        )
        result.assert_same_state(calm)
        return result

    return run
