"""docs/ledger.md: its program runs, its settings load, its command line parses."""

import re
from pathlib import Path

import pytest

from trainonce.cli.main import main
from trainonce.ledger import prices
from trainonce.ledger.account import CAUSES

from .ledger_jobs import golden_job, write

PAGE = (Path(__file__).parents[2] / "docs" / "ledger.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def test_the_program_prints_the_incidents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, golden=golden_job())
    monkeypatch.setenv("TRAINONCE_HOME", str(tmp_path))
    (program,) = blocks("python")
    exec(program, {})
    assert "golden signal 3.0" in capsys.readouterr().out


def test_the_settings_load(tmp_path: Path) -> None:
    (settings,) = blocks("toml")
    (tmp_path / "settings.toml").write_text(settings)
    found = prices.load(tmp_path)
    assert found.prices_of("nlp").usd_per_gpu_hour == 1.9
    assert found.budgets[0].limit == 1000


def test_every_command_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, golden=golden_job())
    monkeypatch.setenv("TRAINONCE_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    commands = [line.split("#")[0].split()[1:] for line in blocks("")[0].splitlines()]
    assert len(commands) == 7
    for words in commands:
        assert main(words) == 0
    assert (tmp_path / "report.html").exists()


def test_every_cause_of_lost_time_is_defined() -> None:
    for cause in CAUSES:
        assert f"| {cause} |" in PAGE
