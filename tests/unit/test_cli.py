"""What the command line says to words it does not know."""

import pytest

from trainonce.cli.main import COMMANDS, EXIT_INTERRUPTED, main


@pytest.mark.parametrize(
    ("line", "unknown", "help_of"),
    [
        ("--bogus", "--bogus", "trainonce"),
        ("--bogus run --spares 1 train.py", "--bogus", "trainonce"),
        ("run --bogus train.py", "--bogus", "trainonce run"),
        ("ps --bogus", "--bogus", "trainonce ps"),
        ("migrate job --rank 1 --bogus", "--bogus", "trainonce migrate"),
        ("drain host --bogus", "--bogus", "trainonce drain"),
        ("report last --bogus", "--bogus", "trainonce report"),
        ("bench levers --bogus", "--bogus", "trainonce bench"),
        ("simulate --bogus 7", "--bogus 7", "trainonce simulate"),
        ("graph ls node --bogus", "--bogus", "trainonce graph ls"),
        ("graph --bogus ls", "--bogus", "trainonce graph"),
        ("fleet health --bogus", "--bogus", "trainonce fleet health"),
    ],
)
def test_an_unknown_option_gets_the_hint_of_its_own_command(line, unknown, help_of, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(line.split())
    said = capsys.readouterr().err
    assert said == f"error: unrecognized arguments: {unknown}\n\nhint: see `{help_of} --help`\n"


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_every_command_has_a_help(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([*command.split(), "--help"])
    assert f"usage: trainonce {command}" in capsys.readouterr().out


def test_a_mistyped_option_is_told_what_it_is_close_to(capsys):
    with pytest.raises(SystemExit, match="2"):
        main("run --sparse 1 train.py".split())
    assert "hint: did you mean --spares?" in capsys.readouterr().err


def test_the_help_of_run_lists_the_faults_and_points_of_a_plan(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["run", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "Faults of --chaos: kill, lose, stop" in said
    assert "loader, begin, forward" in said


def test_ctrl_c_while_a_command_loads_is_no_traceback(monkeypatch, capsys):
    def interrupted(_command):
        raise KeyboardInterrupt

    monkeypatch.setattr("trainonce.cli.main._parser", interrupted)
    assert main(["ps"]) == EXIT_INTERRUPTED
    assert capsys.readouterr().err == "interrupted\n"


def test_ps_says_who_leaves_and_which_ranks_wait_and_reads_older_launchers(monkeypatch, capsys):
    worker = {"worker": 0, "pid": 7, "phase": "between", "step": 3, "slot": 0, "guest_of": None,
              "parked": ""}  # fmt: skip
    job = {
        "job": "j", "pid": 1, "script": "train.py", "step": 3, "generation": 1, "incidents": 1,
        "lost_ranks": [1], "short": 0, "lost_slots": [],
        "workers": [{**worker, "rank": 0}, {**worker, "rank": None},
                    {**worker, "rank": None, "leaving": True}],
    }  # fmt: skip
    monkeypatch.setattr("trainonce.cli.ps.control_socket.request", lambda *_, **__: job)
    assert main(["ps", "j"]) == 0
    said = capsys.readouterr().out
    assert "waits for a worker for rank 1" in said
    assert [line.split()[0] for line in said.splitlines()[3:]] == ["0", "spare", "leaves"]
