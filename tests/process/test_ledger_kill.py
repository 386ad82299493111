"""The ledger under real SIGKILL, real concurrent writers and a really full disk."""

import contextlib
import os
import random
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from trainonce.ledger.store import Ledger

_WRITER = """
import os, sys
from pathlib import Path
from trainonce.events import ProgressMade
from trainonce.ledger.store import Ledger

def say(*words):  # one write a line: two threads speak
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())

home, job, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
ledger = Ledger.open(home, on_error=lambda text: say("said", text))
for step in range(count):
    ledger.append(job, ProgressMade(step=step, samples=0, tokens=0, ranks_alive=1,
                                    spares_ready=0, step_s=0.1))
    say(step)
    if step % 40 == 39:
        ledger.flush(0.1)
ledger.close()
"""


def _start(home: Path, job: str, count: int, **options) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", _WRITER, str(home), job, str(count)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **options)


def _steps(home: Path, job: str) -> list[int]:
    said: list[str] = []
    found = [event.step for event in Ledger.open(home, on_error=said.append).events(job)]
    assert said == []
    return found


def test_what_append_took_survives_sigkill_at_any_instant(tmp_path: Path) -> None:
    generator = random.Random(3)
    for round_number in range(36):
        job = f"job{round_number}"
        writer = _start(tmp_path, job, 1_000_000)
        assert writer.stdout is not None
        last = generator.randrange(0, 120)
        for line in writer.stdout:
            if int(line) >= last:
                break
        writer.kill()
        acknowledged = [last, *(int(line) for line in writer.stdout if line.endswith("\n"))][-1]
        assert writer.wait() == -signal.SIGKILL
        writer.stdout.close()
        found = _steps(tmp_path, job)
        assert found == list(range(len(found)))
        assert len(found) >= acknowledged + 1
    summaries = Ledger.open(tmp_path).jobs()
    assert [one.outcome for one in summaries] == ["lost"] * 36
    with contextlib.closing(sqlite3.connect(tmp_path / "ledger.sqlite")) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert list((tmp_path / "ledger.intake").iterdir()) == []


def test_many_launchers_write_at_once_from_the_very_beginning(tmp_path: Path) -> None:
    writers = [_start(tmp_path, f"job{number}", 400) for number in range(4)]
    outputs = [writer.communicate()[0] for writer in writers]
    assert [writer.returncode for writer in writers] == [0] * 4
    assert not any("said" in output for output in outputs)
    for number in range(4):
        assert _steps(tmp_path, f"job{number}") == list(range(400))


def test_two_processes_may_write_about_one_job(tmp_path: Path) -> None:
    writers = [_start(tmp_path, "job", 200) for _ in range(2)]
    for writer in writers:
        writer.communicate()
    assert sorted(_steps(tmp_path, "job")) == sorted([*range(200), *range(200)])


def test_a_full_disk_is_said_once_and_what_had_room_is_kept(tmp_path: Path) -> None:
    def limit() -> None:
        # Files may not grow beyond this: writes fail with EFBIG, as on a full disk.
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (120_000, 120_000))

    writer = _start(tmp_path, "job", 3000, preexec_fn=limit, env={**os.environ})
    output = writer.communicate()[0].splitlines()
    assert writer.returncode == 0
    said = [line for line in output if line.startswith("said")]
    assert len([line for line in output if not line.startswith("said")]) == 3000
    assert any("cannot be written" in line for line in said)
    assert any("could not be written anywhere" in line for line in said)
    assert len(said) <= 4
    found = _steps(tmp_path, "job")
    assert found == list(range(len(found)))
    lost = next(int(line.split()[1]) for line in said if "anywhere" in line)
    assert len(found) == 3000 - lost
    assert found


def test_a_file_system_without_room_is_said_once_and_nothing_breaks(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(small)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"no right to mount: {mounted.stderr.decode().strip()}")
    try:
        writer = _start(small, "job", 3000)
        said = [line for line in writer.communicate()[0].splitlines() if "said" in line]
        assert writer.returncode == 0
        assert any("disk is full" in line for line in said)
        assert len(said) <= 4
        lost = [int(line.split()[1]) for line in said if "anywhere" in line]
        home = tmp_path / "roomy"
        shutil.copytree(small, home)  # what an administrator would do
        found = _steps(home, "job")
        assert found == list(range(3000 - sum(lost)))
        assert found
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_a_kill_while_another_launcher_writes_leaves_that_one_untouched(tmp_path: Path) -> None:
    survivor = _start(tmp_path, "survivor", 600)
    for number in range(5):
        victim = _start(tmp_path, f"victim{number}", 1_000_000)
        assert victim.stdout is not None
        victim.stdout.readline()
        victim.kill()
        assert victim.wait() == -signal.SIGKILL
        victim.stdout.close()
    assert "said" not in survivor.communicate()[0]
    assert _steps(tmp_path, "survivor") == list(range(600))
