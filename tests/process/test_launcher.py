"""`trainonce run` with real processes and real signals; the workers are fake_train.py."""

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import trainonce

HERE = Path(__file__).parent
# Some tests change the folder: a relative path to the package would be lost.
ENV = {**os.environ, "PYTHONPATH": str(Path(trainonce.__file__).parents[1])}
LAUNCHER = HERE / "run_without_torch.py"
FAKE = HERE / "fake_train.py"


class Worker:
    """The test's end of one fake worker."""

    def __init__(self, sock):
        self._sock = sock
        self._lines = sock.makefile("r")
        self._unread = []
        hello = json.loads(self._lines.readline())
        self.worker, self.pid, self.rank = hello["worker"], hello["pid"], hello["rank"]
        self.pidfd = os.pidfd_open(self.pid)

    def next(self, key):
        """Wait for the next record that has `key`; the others stay for later."""
        for record in self._unread:
            if key in record:
                self._unread.remove(record)
                return record[key]
        for line in self._lines:
            record = json.loads(line)
            if key in record:
                return record[key]
            self._unread.append(record)
        raise EOFError(f"worker {self.worker} ended before it told of {key}")

    def hear(self, kind):
        """Wait until the launcher has sent a message of `kind`."""
        while (record := self.next("heard"))["type"] != kind:
            pass
        return record

    def order(self, **command):
        """Have the worker do something, and wait until it has."""
        self._sock.sendall(json.dumps(command).encode() + b"\n")
        self.next("obeyed")

    def send(self, kind, **fields):
        """Have the worker send a message to the launcher."""
        self.order(send={"type": kind, **fields})

    def commit(self, step):
        self.order(page={"commits": step})

    def wait_end(self):
        select.select([self.pidfd], [], [])

    def close(self):
        if not select.select([self.pidfd], [], [], 0)[0]:
            os.kill(self.pid, signal.SIGKILL)
        os.close(self.pidfd)
        self._lines.close()
        self._sock.close()


class Launched:
    """A running `trainonce run` and the test's end of its workers."""

    def __init__(self, folder, *options, program=LAUNCHER):
        self.env = {**ENV, "TRAINONCE_HOME": str(folder / "home"), "NO_COLOR": "1"}
        self.server = socket.socket(socket.AF_UNIX)
        self.server.bind(str(folder / "test.sock"))
        self.server.listen()
        self.job = f"test-{os.getpid()}-{folder.name}"
        self.process = subprocess.Popen(
            [sys.executable, program, "run", "--job-id", self.job, *options, "--no-python",
             sys.executable, FAKE, folder / "test.sock"],
            env=self.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.workers = []

    def accept(self):
        worker = Worker(self.server.accept()[0])
        self.workers.append(worker)
        return worker

    def ranks(self, count):
        """Take the workers of a start of all ranks, and bring each before its first step."""
        ranks = sorted((self.accept() for _ in range(count)), key=lambda w: w.rank)
        for worker in ranks:
            worker.send("Hello", worker=worker.worker, pid=worker.pid)
            assert worker.hear("Generation")["rank"] == worker.rank
            worker.order(mirror=f"local state of rank {worker.rank}", rank=worker.rank)
            worker.send("Ready")
        return ranks

    def spare(self):
        """Take a spare, and park it."""
        spare = self.accept()
        assert spare.rank == -1
        spare.send("Hello", worker=spare.worker, pid=spare.pid)
        spare.hear("Committed")
        spare.send("Parked", where="loop")
        return spare

    def line(self, text):
        """Wait for a line of the launcher that contains `text`."""
        for line in self.process.stderr:
            if text in line:
                return line
        raise EOFError(f"the launcher ended without saying {text!r}")

    def command(self, *args):
        return subprocess.run(
            [sys.executable, LAUNCHER, *args], env=self.env, capture_output=True, text=True
        )

    def ended(self):
        """Wait for the end; return exit code, stdout and what was left of stderr."""
        out, err = self.process.communicate()
        return self.process.returncode, out, err

    def close(self):
        for worker in self.workers:
            worker.close()
        self.server.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()


@pytest.fixture
def launch(tmp_path):
    made = []

    def start(*options, **kwargs):
        made.append(Launched(tmp_path, *options, **kwargs))
        return made[-1]

    yield start
    for one in made:
        one.close()


def finish(job, workers, step):
    for worker in workers:
        worker.send("Done", step=step)
    return job.ended()


def test_killed_rank_is_taken_over_by_the_spare_with_its_mirror(launch):
    job = launch("--nproc-per-node", "2", "--spares", "1")
    zero, one = job.ranks(2)
    spare = job.spare()
    zero.commit(50)
    one.commit(50)
    os.kill(one.pid, signal.SIGKILL)
    told = spare.hear("Generation")
    assert (told["rank"], told["newcomers"], told["workers"]) == (1, [1], [0, spare.worker])
    assert told["mirror"] == "local state of rank 1"
    assert zero.hear("Generation")["newcomers"] == [1]
    for worker in (zero, spare):
        worker.send("Formed", generation=2, step=50)
        worker.commit(51)
    line = job.line("took its place")
    assert f"rank 1 (pid {one.pid}) died of SIGKILL at step 50; a spare" in line
    code, _out, err = finish(job, (zero, spare), 51)
    assert code == 0, err


def test_children_of_a_killed_worker_die_with_it(launch):
    job = launch("--nproc-per-node", "2", "--spares", "1")
    _zero, one = job.ranks(2)
    spare = job.spare()
    one.order(spawn=True)
    child = os.pidfd_open(one.next("child"))
    os.kill(one.pid, signal.SIGKILL)
    spare.hear("Generation")
    select.select([child], [], [])
    os.close(child)


def test_stopped_rank_is_noticed_killed_and_replaced(launch):
    job = launch("--nproc-per-node", "2", "--spares", "1")
    zero, one = job.ranks(2)
    spare = job.spare()
    os.kill(one.pid, signal.SIGSTOP)
    while Path(f"/proc/{one.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        pass
    assert spare.hear("Generation")["rank"] == 1
    zero.hear("DumpCollectives")
    one.wait_end()
    for worker in (zero, spare):
        worker.send("Formed", generation=2, step=0)
        worker.commit(1)
    assert "hung: stopped for" in job.line("took its place")


def test_ctrl_c_asks_for_a_checkpoint_and_ends_with_130(launch):
    job = launch("--nproc-per-node", "2", "--spares", "1")
    zero, one = job.ranks(2)
    spare = job.spare()
    job.process.send_signal(signal.SIGINT)
    for worker in (zero, one):
        assert worker.hear("Checkpoint")["stop"]
    code, _out, err = job.ended()
    assert code == 130
    assert "interrupted" in err
    spare.wait_end()


def test_second_ctrl_c_ends_workers_that_do_not_listen(launch):
    job = launch("--nproc-per-node", "1", "--grace-s", "1000")
    (zero,) = job.ranks(1)
    os.kill(zero.pid, signal.SIGSTOP)
    job.process.send_signal(signal.SIGINT)
    job.line("again to end at once")
    job.process.send_signal(signal.SIGINT)
    assert job.ended()[0] == 130
    zero.wait_end()


def test_sigterm_ends_with_143(launch):
    job = launch("--nproc-per-node", "1")
    job.ranks(1)
    job.process.send_signal(signal.SIGTERM)
    assert job.ended()[0] == 143


def test_no_process_is_left_when_the_launcher_is_killed(launch):
    job = launch("--nproc-per-node", "3", "--spares", "1", "--chaos", "kill_launcher step=5")
    ranks = job.ranks(3)
    spare = job.spare()
    ranks[0].order(spawn=True)
    child = os.pidfd_open(ranks[0].next("child"))
    ranks[1].commit(5)
    assert job.ended()[0] == -signal.SIGKILL
    # Those that can hear end by themselves; the guard sees to their children.
    for worker in (*ranks, spare):
        assert worker.next("orphaned")
        worker.wait_end()
    select.select([child], [], [])
    os.close(child)


def test_workers_that_do_not_speak_the_protocol_die_with_the_launcher(launch):
    job = launch("--nproc-per-node", "2")
    workers = [job.accept(), job.accept()]
    os.kill(workers[0].pid, signal.SIGSTOP)  # this one cannot even notice
    job.process.kill()
    for worker in workers:
        worker.wait_end()


def _children(pid):
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_the_guard_is_started_again_when_it_is_killed(launch):
    job = launch("--nproc-per-node", "1")
    worker = job.accept()
    (guard,) = set(_children(job.process.pid)) - {worker.pid}
    os.kill(guard, signal.SIGKILL)
    while not (set(_children(job.process.pid)) - {worker.pid, guard}):
        pass
    os.kill(worker.pid, signal.SIGSTOP)
    job.process.kill()
    worker.wait_end()


def let_move(zero, one, spare):
    """Play the workers of a move of rank 1 to the spare, at step 7."""
    order = one.hear("Drain")
    one.send("Drained", step=7, generation=order["generation"])
    assert spare.hear("Generation")["mirror"] == "local state of rank 1"
    for worker in (zero, spare):
        worker.send("Formed", generation=2, step=7)
    one.hear("Exit")


def test_ps_and_migrate_reach_the_running_job(launch):
    job = launch("--nproc-per-node", "2", "--spares", "1")
    zero, one = job.ranks(2)
    spare = job.spare()
    zero.commit(7)
    listed = json.loads(job.command("ps", "--json").stdout)
    (mine,) = [found for found in listed if found["job"] == job.job]
    assert [w["rank"] for w in mine["workers"]] == [0, 1, None]
    assert [w["pid"] for w in mine["workers"]] == [zero.pid, one.pid, spare.pid]
    assert "spare" in job.command("ps", job.job).stdout
    refused = job.command("migrate", job.job, "--rank", "9")
    assert (refused.returncode, refused.stderr) == (
        1, "error: there is no rank 9: the job has ranks 0 to 1\n",
    )  # fmt: skip
    with subprocess.Popen(
        [sys.executable, LAUNCHER, "migrate", job.job, "--rank", "1"],
        env=job.env, stdout=subprocess.PIPE, text=True,
    ) as migrate:  # fmt: skip
        let_move(zero, one, spare)
        job.command("ps", job.job)
        zero.commit(8)
        said = migrate.communicate()[0]
    assert migrate.returncode == 0
    assert f"rank 1 (pid {one.pid}) moved on request at step 7" in said
    assert finish(job, (zero, spare), 8)[0] == 0
    gone = job.command("ps", job.job)
    assert gone.returncode == 1
    assert "no job" in gone.stderr


def test_drain_empties_a_place_and_says_why_it_cannot_empty_the_host(launch):
    job = launch("--nproc-per-node", "2", "--spares", "1")
    zero, one = job.ranks(2)
    spare = job.spare()
    zero.commit(7)
    host = socket.gethostname()

    def drain(where, *options):
        done = job.command("drain", where, "--job", job.job, *options)
        return done.returncode, done.stdout + done.stderr

    code, said = drain(host)
    assert (code, "no other host to move to" in said, "--checkpoint" in said) == (1, True, True)
    code, said = drain("moon")
    assert (code, f"they run on {host}" in said) == (1, True)
    code, said = drain(host, "--device", "gpu77")
    assert (code, "they are on slot0, slot1" in said) == (0, True)
    with subprocess.Popen(
        [sys.executable, LAUNCHER, "drain", host, "--device", "slot1", "--job", job.job],
        env=job.env, stdout=subprocess.PIPE, text=True,
    ) as leaving:  # fmt: skip
        let_move(zero, one, spare)
        assert "slot 1 is lost" in job.command("ps", job.job).stdout
        zero.commit(8)
        said = leaving.communicate()[0]
    assert (leaving.returncode, said) == (0, f"1 of 1 ranks moved away from slot1 of {host}\n")
    code, said = drain(host, "--device", "slot1", "--undo")
    assert (code, "may use slot1" in said) == (0, True)
    assert finish(job, (zero, spare), 8)[0] == 0


def test_a_budget_that_is_used_up_reaches_the_webhook(launch):
    with socket.create_server(("127.0.0.1", 0)) as hook:
        url = f"http://127.0.0.1:{hook.getsockname()[1]}/"
        job = launch("--nproc-per-node", "1", "--max-hours", "1e-7", "--budget-webhook", url)
        with contextlib.suppress(OSError, EOFError):
            job.ranks(1)  # unless the budget ends it before it is ready
        heard = []
        for _ in range(3):  # 50, 80 and 100 %
            connection, _peer = hook.accept()
            with connection:
                data = b""
                while b"}" not in data:
                    data += connection.recv(4096)
                connection.sendall(b"HTTP/1.1 204 No Content\r\n\r\n")
            heard.append(json.loads(data.partition(b"\r\n\r\n")[2]))
        assert job.ended()[0] == 143
    assert {(body["job"], body["budget"]) for body in heard} == {(job.job, "--max-hours")}
    assert sorted(body["threshold"] for body in heard) == [0.5, 0.8, 1.0]


def test_an_id_can_run_only_once_at_a_time(launch):
    job = launch("--nproc-per-node", "1")
    job.ranks(1)
    second = job.command("run", "--job-id", job.job, str(FAKE))
    assert second.returncode == 2
    assert "is running already" in second.stderr


def test_output_is_teed_with_torchruns_prefix_and_kept_in_its_folders(tmp_path):
    script = tmp_path / "hello.sh"
    script.write_text('#!/bin/sh\necho "rank $RANK of $WORLD_SIZE, $1"\n')
    script.chmod(0o755)
    done = subprocess.run(
        [sys.executable, LAUNCHER, "run", "--nproc_per_node=2", "--tee", "3", "--log-dir",
         tmp_path / "logs", "--job-id", "t", "--no-python", script, "local ${local_rank}"],
        env={**ENV, "TRAINONCE_HOME": str(tmp_path / "home")},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == [
        "[default0]:rank 0 of 2, local 0",
        "[default1]:rank 1 of 2, local 1",
    ]
    kept = tmp_path / "logs" / "t" / "attempt_0" / "1" / "stdout.log"
    assert kept.read_text() == "rank 1 of 2, local 1\n"


def test_output_that_can_no_longer_be_shown_is_told_once_and_kept_all_the_same(tmp_path):
    script = tmp_path / "hello.sh"
    script.write_text('#!/bin/sh\nfor each in 1 2 3; do echo "$RANK $each"; sleep 0.2; done\n')
    script.chmod(0o755)
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [sys.executable, LAUNCHER, "run", "--nproc-per-node=2", "--tee", "3", "--log-dir",
             tmp_path / "logs", "--job-id", "t", "--no-python", script],
            env={**ENV, "TRAINONCE_HOME": str(tmp_path / "home")},
            stdout=full, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("can no longer be shown (No space left on device)") == 1
    for rank in "01":
        kept = tmp_path / "logs" / "t" / "attempt_0" / rank / "stdout.log"
        assert kept.read_text() == f"{rank} 1\n{rank} 2\n{rank} 3\n"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--no-such-option", "x.py"], "unrecognized arguments: --no-such-option"),
        (["missing.py"], "there is no script 'missing.py'"),
        (["--nproc-per-node", "0", str(FAKE)], "there is nothing to run"),
        (["--nproc-per-node", "many", str(FAKE)], "--nproc-per-node is 'many'"),
        (["--nnodes", "2", str(FAKE)], "runs on one node"),
        (["--chaos", "melt rank=0", str(FAKE)], "unknown fault 'melt'"),
        (["--chaos", "kill rank=4", str(FAKE)], "--chaos hits rank 4"),
        (["--chaos", "kill_spare step=4", str(FAKE)], "the job keeps none"),
        (["--max-cost-usd", "9", str(FAKE)], "no price is set"),
        (["--max-hours", "-1", str(FAKE)], "limit is -1"),
        (["--hang-timeout-s", "nan", str(FAKE)], "a hang limit must be above 0, not nan"),
        (["--grace-s", "nan", str(FAKE)], "--grace-s is nan"),
        (["--health", "crystal-ball", str(FAKE)], "no source of health signals"),
        (["--tee", "7", str(FAKE)], "--tee '7'"),
        (["--tee", "3", "--log-dir", "/proc/none", str(FAKE)], "cannot keep the output of workers"),
        (["--resume", "nothing", str(FAKE)], "--resume nothing"),
        (["--no-python", "./no-such-program"], "cannot start './no-such-program'"),
        ([], "the following arguments are required"),
    ],
)
def test_unusable_input_is_one_line_and_exit_code_2(tmp_path, args, message):
    done = subprocess.run(
        [sys.executable, LAUNCHER, "run", *args], cwd=tmp_path, capture_output=True, text=True,
        env={**ENV, "TRAINONCE_HOME": str(tmp_path)},
    )  # fmt: skip
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert (done.returncode, len(errors)) == (2, 1), done.stderr
    assert message in errors[0]
    assert "Traceback" not in done.stderr
