"""Without faults TrainOnce changes no bit, and a script needs no launcher of ours."""

from pathlib import Path

from trainonce.testing import run_job

SCRIPTS = Path(__file__).parent / "scripts"


def differing_lines():
    plain = (SCRIPTS / "twin_plain.py").read_text().split('"""')[2].splitlines()
    once = (SCRIPTS / "twin_once.py").read_text().split('"""')[2].splitlines()
    return [line for line in once if line and line not in plain]


def test_the_twins_differ_by_six_lines_of_init_protect_and_step():
    # The rank is asked of the run, and the line that records it is the test's own.
    added = [line for line in differing_lines() if "run.rank" not in line]
    assert added == [
        "import trainonce", "run = trainonce.init()",
        "run.protect(model=model, optimizer=optimizer)", "@run.step",
    ]  # fmt: skip


def test_a_run_without_faults_ends_with_the_bits_of_plain_ddp_under_torchrun(calm, tmp_path):
    plain = run_job(SCRIPTS / "twin_plain.py", launcher="torchrun", home=tmp_path / "a")
    # Not the exit code: torch 2.13 can abort in its own teardown, when all is recorded.
    assert len(plain.values("state")) == 2, plain.explain()
    calm("twin_once.py").assert_same_state(plain)


def test_the_same_script_runs_under_torchrun_and_python(calm, tmp_path):
    under_torchrun = run_job(SCRIPTS / "twin_once.py", launcher="torchrun", home=tmp_path / "a")
    assert len(under_torchrun.values("state")) == 2, under_torchrun.explain()
    under_torchrun.assert_same_state(calm("twin_once.py"))
    alone = run_job(SCRIPTS / "twin_once.py", launcher="python", home=tmp_path / "b")
    alone.assert_completed()
    alone.assert_same_state(calm("twin_once.py", world=1))
