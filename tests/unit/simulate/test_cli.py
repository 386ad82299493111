"""`trainonce simulate` as a user calls it."""

import contextlib
import io
import itertools
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainonce.cli.main import main
from trainonce.simulate.policies import POLICIES

QUICK = ["simulate", "--seeds", "2", "--days", "30"]


def test_default_table_compares_all_policies(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*QUICK, "--gpus", "1024"]) == 0
    out = capsys.readouterr().out
    assert "a failure every 28.8 h" in out
    for name in ("restart-naive", "restart-tuned", "replica-drop", "live-migration", "trainonce"):
        assert f"\n{name} " in out


def test_json_holds_the_whole_configuration_and_every_interval(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([*QUICK, "--policy", "trainonce,restart-tuned", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["scenario"]["num_gpus"] == 2048
    assert record["scenario"]["rates"]["name"] == "rsc-1"
    assert [r["policy"]["name"] for r in record["results"]] == ["trainonce", "restart-tuned"]
    for result in record["results"]:
        assert result["ettr"]["low"] <= result["ettr"]["mean"] <= result["ettr"]["high"]
        assert sum(result["hours"].values()) == pytest.approx(8760)
        assert set(result["policy"]) >= {"live_pause_s", "checkpoint_write_s"}


def test_sweep_doubles_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "sweep.png"
    assert main([*QUICK, "--sweep", "64:256", "--plot", str(picture)]) == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines()[3:]] == ["64", "128", "256"]
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_find_spares_answers_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "spares.svg"
    args = ["--find-spares", "--policy", "trainonce", "--plot", str(picture)]
    assert main([*QUICK, "--gpus", "512", *args]) == 0
    assert "pay off best under trainonce" in capsys.readouterr().out
    assert "<svg" in picture.read_text()


def test_measured_pauses_and_the_file_change_the_policies(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "cluster.toml"
    config.write_text(
        '[scenario]\nnum_gpus = 512\nrepair_h = 48\nrates = "llama3"\n'
        '[policies.mine]\nbase = "restart-tuned"\nrestart_s = 900\n'
    )
    args = ["--config", str(config), "--policy", "mine,trainonce", "--rebuild-pause-s", "3"]
    assert main([*QUICK, *args, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["scenario"]["num_gpus"] == 512
    assert record["scenario"]["rates"]["name"] == "llama3"
    mine, ours = (result["policy"] for result in record["results"])
    assert (mine["name"], mine["restart_s"], mine["detect_exit_s"]) == ("mine", 900, 60.0)
    assert ours["live_pause_s"] == 3


def test_option_goes_before_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "cluster.toml"
    config.write_text("[scenario]\nnum_gpus = 512\n")
    args = ["--config", str(config), "--gpus", "1024", "--policy", "trainonce", "--json"]
    assert main([*QUICK, *args]) == 0
    assert json.loads(capsys.readouterr().out)["scenario"]["num_gpus"] == 1024


def test_share_of_spares_is_taken_of_each_size(capsys: pytest.CaptureFixture[str]) -> None:
    args = ["--sweep", "1024:4096", "--spares", "2%", "--policy", "trainonce", "--json"]
    assert main([*QUICK, *args]) == 0
    results = json.loads(capsys.readouterr().out)["results"]
    assert [result["spares"] for result in results] == [3, 5, 10]


def test_long_work_shows_how_far_it_is_and_keeps_stdout_for_the_data(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = itertools.count(step=10.0)
    monkeypatch.setattr("trainonce.cli.simulate.time.monotonic", lambda: next(clock))
    assert main([*QUICK, "--sweep", "64:128", "--policy", "trainonce", "--json"]) == 0
    out, err = capsys.readouterr()
    assert len(json.loads(out)["results"]) == 2
    assert "simulated 3 of 4 jobs: trainonce on 128 GPUs" in err


def test_interrupted_study_ends_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("trainonce.simulate.study.simulate", interrupt)
    assert main(QUICK) == 130
    assert capsys.readouterr().err == "interrupted\n"


_EXTREME = st.sampled_from(["0.01", "1", "36500", "1e-9", "0.0065", "10", "1e4", "1e300", "nan"])


@settings(max_examples=60, deadline=None)
@given(
    gpus=st.sampled_from([8, 2048, 1_000_000]), days=_EXTREME, rates=_EXTREME, price=_EXTREME,
    pause=_EXTREME, spares=st.sampled_from(["auto", "0", "10", "1000%"]),
    policy=st.sampled_from(sorted(POLICIES)),
)  # fmt: skip
def test_whatever_is_asked_for_is_refused_or_ends_soon_in_finite_numbers(
    gpus: int, days: str, rates: str, price: str, pause: str, spares: str, policy: str
) -> None:
    args = ["simulate", "--seeds", "2", "--json", "--policy", policy, "--gpus", str(gpus),
            "--days", days, "--rates", rates, "--price", price, "--spares", spares,
            "--rebuild-pause-s", pause]  # fmt: skip
    out = io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(io.StringIO()) as err,
    ):
        # The bounds by themselves are tested above; here they are what a test can wait for.
        patch.setattr("trainonce.simulate.study.MAX_STUDY_EVENTS", 20_000)
        code = main(args)
    if code:
        assert (code, "error: " in err.getvalue()) == (2, True)
    else:
        json.loads(out.getvalue(), parse_constant=pytest.fail)


@pytest.mark.parametrize(
    ("args", "says", "hints"),
    [
        (["--gpus", "0"], "1 to 1,000,000 GPUs, not 0", "--gpus 2048"),
        (["--gpus", "-8"], "not -8", "--gpus 2048"),
        (["--gpus", "100"], "100 GPUs do not fill nodes of 8", "take 96 GPUs"),
        (["--days", "0"], "0.01 to 36,500 days", ""),
        (["--days", "nan"], "0.01 to 36,500 days", ""),
        (["--days", "1e-300"], "0.01 to 36,500 days", ""),
        (["--price", "-1"], "must cost more than 0", "dollars"),
        (["--price", "inf"], "must cost more than 0", "dollars"),
        (["--price", "1e300"], "must cost more than 0", "dollars"),
        (["--rates", "meta"], "unknown failure rates 'meta'", "rsc-1"),
        (["--rates", "-0.1"], "rate of 1e-09 to 10000", "node fails"),
        (["--rates", "1e-300"], "rate of 1e-09 to 10000", "node fails"),
        (["--rates", "nan"], "rate of 1e-09 to 10000", "node fails"),
        (["--rates", "1e308"], "rate of 1e-09 to 10000", "node fails"),
        (["--rates", "9000"], "8.41e+08 failures", "simulate 0.87 days"),
        (["--days", "36500", "--gpus", "1000000"], "6.08e+07 false alarms", "check the rates"),
        (["--sweep", "64:524288", "--seeds", "9000"], "in all jobs together", "days or seeds"),
        (["--find-spares", "--gpus", "1000000"], "in all jobs together", "of the days or seeds"),
        (["--rates", "1000", "--days", "1"], "in repair at a time", "repair_h"),
        (["--spares", "many"], "--spares cannot be 'many'", "auto"),
        (["--spares", "nan%"], "make no sense", "auto"),
        (["--spares", "some%"], "--spares cannot be 'some%'", "auto"),
        (["--spares", "-1"], "make no sense", "auto"),
        (["--policy", "hope"], "unknown policy 'hope'", "trainonce"),
        (["--seeds", "1"], "--seeds must lie between 2", "interval"),
        (["--sweep", "64"], "--sweep cannot be '64'", "FROM:TO"),
        (["--sweep", "100:200"], "do not fill nodes", "take 96"),
        (["--sweep", "512:64"], "holds no size", "FROM <= TO"),
        (["--rebuild-pause-s", "-3"], "live_pause_s must be", "docs/simulate.md"),
        (["--config", "/nowhere.toml"], "cannot read /nowhere.toml", ""),
        (["--find-spares", "--policy", "trainonce-low-priority"], "idle spares", "borrow"),
        (["--plot", "/nowhere/x.png", "--days", "1"], "cannot write the plot", ".png"),
    ],
)
def test_impossible_parameters_get_a_clear_word(
    args: list[str], says: str, hints: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["simulate", "--seeds", "2", *args]) == 2
    err = capsys.readouterr().err
    assert says in err
    assert f"hint: {hints}" in err or hints in err.partition("hint:")[2]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("num_gpus = [", "is not TOML"),
        ("[scenery]\n", "unknown setting 'scenery'"),
        ("scenario = 3\n", "must be a table"),
        ("[scenario]\ncolour = 3\n", "unknown setting 'colour'"),
        ('[scenario]\nnum_gpus = "many"\n', "num_gpus cannot be 'many'"),
        ("[scenario]\nnum_gpus = true\n", "num_gpus cannot be True"),
        ("[policies.mine]\nrestart_s = 3\n", "is a new policy and has no base"),
        ('[policies.trainonce]\npredicts = "yes"\n', "predicts cannot be 'yes'"),
        ('[policies.trainonce]\nspare_source = "sky"\n', "spare_source must be"),
        ("[policies.trainonce]\nlive_share = 1.5\n", "live_share must lie between 0 and 1"),
        ("[policies.trainonce]\nlive_share = 1\n", "live_share must be below 1"),
        ("[policies.trainonce]\nreplica_groups = 1\n", "replica_groups must be 0 or at least 2"),
        ("[policies.trainonce]\ncheckpoint_write_s = 0\n", "checkpoint_write_s must be more"),
        ("[policies.trainonce]\ncheckpoint_interval_s = 0\n", "checkpoint_interval_s must be"),
        ("[policies.trainonce]\ncheckpoint_interval_s = 1e-300\n", "must be at least 1"),
        ("[policies.trainonce]\nheal_s = 1e300\n", "heal_s must be a number of seconds"),
        ("[scenario]\nrepair_h = 1e300\n", "repair_h must be 0 to 100,000 hours"),
        ("[scenario]\nfalse_alarms_per_node_day = 1e300\n", "false alarms are expected"),
        ("[scenario]\nfalse_alarms_per_node_day = nan\n", "must be 0 or more"),
        ("[policies.trainonce]\nrestart_s = nan\n", "restart_s must be a number of seconds"),
    ],
)
def test_bad_file_gets_a_clear_word(
    text: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "bad.toml"
    config.write_text(text)
    assert main(["simulate", "--seeds", "2", "--config", str(config)]) == 2
    assert says in capsys.readouterr().err
