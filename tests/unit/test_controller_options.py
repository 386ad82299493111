"""The options of `trainonce run`, against torchrun's own parser."""

import argparse

import pytest

from trainonce.controller import environment
from trainonce.controller.arguments import add_arguments, from_args, stream_modes
from trainonce.controller.options import RunOptions
from trainonce.errors import ConfigError


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "train.py"
    path.write_text("")
    return str(path)


def parse(*args):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return from_args(parser.parse_args(args))


def options_of(parser):
    return {
        name: action
        for action in parser._actions
        for name in action.option_strings or [action.dest]
        if name not in ("-h", "--help")
    }


def test_every_option_of_torchrun_is_taken_with_its_spelling_and_shape():
    from torch.distributed.run import get_args_parser

    ours = argparse.ArgumentParser()
    add_arguments(ours)
    mine, theirs = options_of(ours), options_of(get_args_parser())
    assert set(theirs) - set(mine) == set()
    for name, action in theirs.items():
        assert (mine[name].nargs, mine[name].dest) == (action.nargs, action.dest), name
        if action.choices:
            assert set(action.choices) <= set(mine[name].choices), name
        if action.type in (int, float):
            assert mine[name].type is action.type, name


def test_a_command_line_of_torchrun_means_the_same(script):
    options = parse(
        "--standalone", "--nnodes=1", "--nproc_per_node=4", "--max-restarts", "2", "-r", "1",
        "-t", "0:3,2:1", "--rdzv_id", "x", "--role", "r", script, "--lr", "0.1", "--tee",
    )  # fmt: skip
    assert options.nproc == 4
    assert options.max_restarts == 2
    assert options.redirects == (1, 1, 1, 1)
    assert options.tee == (3, 0, 1, 0)
    assert options.role == "r"
    assert options.script_args == ("--lr", "0.1", "--tee")


def test_defaults_come_from_torchruns_variables(script, monkeypatch):
    monkeypatch.setenv("PET_NPROC_PER_NODE", "3")
    monkeypatch.setenv("PET_NO_PYTHON", "1")
    options = parse(script)
    assert (options.nproc, options.no_python) == (3, True)
    assert parse("--nproc-per-node", "2", script).nproc == 2


def test_options_without_effect_say_so(script):
    notices = parse("--rdzv-backend", "c10d", "--numa-binding", "node", script).notices
    assert len(notices) == 2


def test_the_port_of_a_rendezvous_endpoint_is_used(script):
    assert parse("--rdzv-endpoint", "localhost:29411", script).master_port == 29411
    assert parse("--master-port", "29412", script).master_port == 29412
    assert parse(script).master_port == 0


@pytest.mark.parametrize("text", ["4", "x", "0:5", "0:1,,1:1", ""])
def test_stream_modes_that_torchrun_refuses_are_refused(text):
    with pytest.raises(ConfigError):
        stream_modes("--tee", text, 2)


def test_the_environment_is_that_of_torchrun(script, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    options = RunOptions(script=script, nproc=2, role="r", run_id="id")
    env = environment.environment(
        options, job="j", worker=5, rank=1, slot=3, incarnation=2, store_port=9, max_restarts=3
    )
    expected = {
        "RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
        "GROUP_RANK": "0", "GROUP_WORLD_SIZE": "1", "ROLE_RANK": "1", "ROLE_WORLD_SIZE": "2",
        "ROLE_NAME": "r", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9",
        "TORCHELASTIC_RESTART_COUNT": "2", "TORCHELASTIC_MAX_RESTARTS": "3",
        "TORCHELASTIC_RUN_ID": "id", "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1", "OMP_NUM_THREADS": "1",
        "TRAINONCE_JOB": "j", "TRAINONCE_WORKER": "5", "TRAINONCE_SLOT": "3",
    }  # fmt: skip
    assert {name: env.get(name) for name in expected} == expected


def test_a_virtual_local_rank_sees_its_own_device_first(script, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")

    def env(nproc, rank, slot):
        return environment.environment(
            RunOptions(script=script, nproc=nproc, virtual_local_rank=True), job="j", worker=0,
            rank=rank, slot=slot, incarnation=0, store_port=9, max_restarts=0,
        )  # fmt: skip

    assert (env(2, 1, 1)["LOCAL_RANK"], env(2, 1, 1)["CUDA_VISIBLE_DEVICES"]) == ("0", "6")
    assert env(2, 1, 0)["CUDA_VISIBLE_DEVICES"] == "4"  # as a guest
    assert env(2, 1, 2)["CUDA_VISIBLE_DEVICES"] == "4"  # in the slot of a spare
    with pytest.raises(ConfigError, match="rank 2 has no device"):
        env(3, 0, 0)


def test_commands_run_scripts_modules_and_programs(script):
    assert environment.command(RunOptions(script=script, script_args=("a",)), 0)[1:] == (
        "-u", "-m", "trainonce.worker", script, "a",
    )  # fmt: skip
    assert environment.command(RunOptions(script="pkg.mod", module=True), 0)[3:] == (
        "trainonce.worker", "-m", "pkg.mod",
    )  # fmt: skip
    program = RunOptions(script="prog", no_python=True, script_args=("${local_rank}",))
    assert environment.command(program, 1) == ("prog", "1")
    assert environment.command(program, -1) == ("prog", "${local_rank}")
