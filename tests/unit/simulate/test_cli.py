"""`trainonce simulate` as a user calls it."""

import json
from pathlib import Path

import pytest

from trainonce.cli.main import main

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


@pytest.mark.parametrize(
    ("args", "says", "hints"),
    [
        (["--gpus", "0"], "1 to 1,000,000 GPUs, not 0", "--gpus 2048"),
        (["--gpus", "-8"], "not -8", "--gpus 2048"),
        (["--gpus", "100"], "100 GPUs do not fill nodes of 8", "take 96 GPUs"),
        (["--days", "0"], "more than 0", ""),
        (["--days", "nan"], "more than 0", ""),
        (["--price", "-1"], "must cost more than 0", "dollars"),
        (["--price", "inf"], "must cost more than 0", "dollars"),
        (["--price", "1e300"], "must cost more than 0", "dollars"),
        (["--rates", "meta"], "unknown failure rates 'meta'", "rsc-1"),
        (["--rates", "-0.1"], "rate of at least 1e-09", "node fails"),
        (["--rates", "1e-300"], "rate of at least 1e-09", "node fails"),
        (["--rates", "nan"], "rate of at least 1e-09", "node fails"),
        (["--rates", "1e9"], "failures are expected", "fewer days"),
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
        ("[policies.mine]\nrestart_s = 3\n", "unknown policy 'mine'"),
        ('[policies.trainonce]\npredicts = "yes"\n', "predicts cannot be 'yes'"),
        ('[policies.trainonce]\nspare_source = "sky"\n', "spare_source must be"),
        ("[policies.trainonce]\nlive_share = 1.5\n", "live_share must lie between 0 and 1"),
        ("[policies.trainonce]\nlive_share = 1\n", "live_share must be below 1"),
        ("[policies.trainonce]\nreplica_groups = 1\n", "replica_groups must be 0 or at least 2"),
        ("[policies.trainonce]\ncheckpoint_write_s = 0\n", "checkpoint_write_s must be more"),
        ("[policies.trainonce]\ncheckpoint_interval_s = 0\n", "checkpoint_interval_s must be"),
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
