"""What the ledger keeps, and what it says when something is wrong with its file."""

import contextlib
import json
import os
import sqlite3
import threading
from pathlib import Path

import pytest

from trainonce.errors import LedgerError
from trainonce.events import Incident, JobEnded, JobStarted, ProgressMade
from trainonce.ledger import database, leftovers
from trainonce.ledger.filesystem import network_filesystem
from trainonce.ledger.identity import Writer, is_alive, this_writer
from trainonce.ledger.intake import FOLDER, Entry, Intake, claim
from trainonce.ledger.store import Ledger


def started(job: str = "j1", **other) -> JobStarted:
    fields = {"script": "train.py", "command": [], "world_size": 2, "spares": 1, "host": "gpu-1"}
    return JobStarted(job=job, **{**fields, **other})


def progress(step: int) -> ProgressMade:
    return ProgressMade(
        step=step, samples=step, tokens=0, ranks_alive=2, spares_ready=1, step_s=0.1
    )


def open_ledger(home: Path) -> tuple[Ledger, list[str]]:
    said: list[str] = []
    return Ledger.open(home, on_error=said.append), said


def dead_writer() -> Writer:
    us = this_writer()
    return Writer(writer="d" * 32, host=us.host, machine=us.machine, pid=us.pid, started="1")


def steps(ledger: Ledger, job: str = "j1") -> list[int]:
    return [event.step for event in ledger.events(job, "progress")]


def test_events_come_back_as_they_went_in_and_in_order(tmp_path: Path) -> None:
    ledger, said = open_ledger(tmp_path)
    sent = [started(wall_s=5.0, mono_s=1.0), *(progress(n) for n in range(50))]
    for event in sent:
        ledger.append("j1", event)
    ledger.append("j2", started("j2"))
    assert ledger.flush()
    found = list(ledger.events("j1"))
    assert found[0] == sent[0]
    assert [event.step for event in found[1:]] == list(range(50))
    assert all(event.wall_s > 0 for event in found)
    assert len(list(ledger.events("j2"))) == 1
    ledger.close()
    assert said == []
    assert list((tmp_path / FOLDER).iterdir()) == []


def test_a_fresh_home_has_no_jobs_and_reading_makes_no_files(tmp_path: Path) -> None:
    home = tmp_path / "none"
    ledger, said = open_ledger(home)
    assert ledger.jobs() == []
    assert list(ledger.events("j1")) == []
    assert not home.exists()
    assert said == []


def test_jobs_are_summed_up_newest_first_with_their_outcome(tmp_path: Path) -> None:
    ledger, _ = open_ledger(tmp_path)
    ledger.append("old", started("old", wall_s=10.0, project="nlp"))
    ledger.append("old", progress(7))
    ledger.append(
        "old",
        Incident(
            incident=1, ranks=[0], cause="signal", detail="SIGKILL", detected_by="process exit",
            served_by="rebuild", step=3, generation=1,
        ),
    )  # fmt: skip
    ledger.append("old", JobEnded(outcome="completed", exit_code=0, steps=9, wall_s=20.0))
    ledger.append("new", started("new", wall_s=30.0))
    new, old = ledger.jobs()
    assert (old.job, old.outcome, old.steps, old.project) == ("old", "completed", 9, "nlp")
    assert (old.num_incidents, old.num_events, old.ended_wall_s) == (1, 4, 20.0)
    assert (new.outcome, new.ended_wall_s) == ("running", None)  # this process lives
    ledger.close()


def test_kinds_of_a_newer_version_are_skipped_and_counted(tmp_path: Path) -> None:
    ledger, _ = open_ledger(tmp_path)
    ledger.append("j1", started())
    ledger.flush()
    with contextlib.closing(database.connect(ledger.path)) as connection:
        rows = [
            {"kind": "telepathy", "wall_s": 1.0},
            {**progress(4).to_record(), "field_of_tomorrow": 1},
        ]
        entries = [
            Entry(n=i, job="j1", kind=row["kind"], wall_s=1.0, record=json.dumps(row))
            for i, row in enumerate(rows)
        ]
        assert database.write(connection, dead_writer(), entries) == 2
    assert [event.kind for event in ledger.events("j1")] == ["job_started", "progress"]
    assert ledger.num_unknown == 1
    ledger.close()


def test_a_newer_format_is_refused_and_new_events_wait(tmp_path: Path) -> None:
    ledger, _ = open_ledger(tmp_path)
    ledger.append("j1", started())
    ledger.close()
    with contextlib.closing(sqlite3.connect(ledger.path)) as connection:
        connection.execute("PRAGMA user_version = 99")
    later, said = open_ledger(tmp_path)
    with pytest.raises(LedgerError, match="format 99, this version reads up to 1") as caught:
        later.jobs()
    assert caught.value.hint
    later.append("j2", started("j2"))
    later.close()
    assert "format 99" in said[0]
    assert "1 events wait" in said[-1]
    assert len(list((tmp_path / FOLDER).glob("*.jsonl"))) == 1
    with contextlib.closing(sqlite3.connect(ledger.path)) as connection:
        connection.execute("PRAGMA user_version = 1")
    assert {job.job for job in Ledger.open(tmp_path).jobs()} == {"j1", "j2"}


def test_a_database_of_something_else_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE mine (x)")
    before = path.read_bytes()
    with pytest.raises(LedgerError, match="something else"):
        Ledger.open(tmp_path).jobs()
    assert path.read_bytes() == before


@pytest.mark.parametrize("damage", ["header", "middle", "cut"])
def test_a_damaged_ledger_is_set_aside_and_what_is_readable_taken_over(
    tmp_path: Path, damage: str
) -> None:
    ledger, _ = open_ledger(tmp_path)
    for step in range(2000):
        ledger.append("j1", progress(step))
    ledger.close()
    data = bytearray(ledger.path.read_bytes())
    if damage == "header":
        data[:100] = os.urandom(100)
    elif damage == "middle":
        middle = len(data) // 2 // 4096 * 4096
        data[middle : middle + 3 * 4096] = os.urandom(3 * 4096)
    else:
        data = data[: len(data) // 3]
    ledger.path.write_bytes(data)
    again, said = open_ledger(tmp_path)
    again.append("j1", progress(9999))
    assert again.flush()
    kept = steps(again)
    again.close()
    asides = [path for path in tmp_path.iterdir() if ".damaged-" in path.name]
    assert [path.read_bytes() for path in asides] == [bytes(data)]
    assert asides[0].name in said[0]
    assert f"{len(kept) - 1} events" in said[0]
    assert 9999 in kept
    if damage == "middle":
        assert len(kept) > 1000
        assert kept[0] == 0
        assert 1999 in kept


def test_events_wait_while_another_process_holds_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "_BUSY_S", 0.05)
    ledger, _ = open_ledger(tmp_path)
    told = threading.Event()
    said: list[str] = []

    def listen(text: str) -> None:
        said.append(text)
        told.set()

    ledger = Ledger.open(tmp_path, on_error=listen)
    ledger.append("j1", started())
    assert ledger.flush()
    with contextlib.closing(sqlite3.connect(ledger.path, isolation_level=None)) as holder:
        holder.execute("BEGIN EXCLUSIVE")
        for step in range(5):
            ledger.append("j1", progress(step))
        assert told.wait(60)
        assert not ledger.flush(0.0)
        holder.execute("ROLLBACK")
    assert ledger.flush(60)
    assert steps(ledger) == list(range(5))
    ledger.close()
    assert len(said) == 2
    assert "locked" in said[0]
    assert "nothing was lost" in said[1]


def test_a_home_that_cannot_be_made_costs_no_exception_and_is_said(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    ledger, said = open_ledger(file / "home")
    ledger.append("j1", started())
    ledger.close()
    assert "cannot be written" in said[0]
    assert "1 events could not be written anywhere" in said[-1]


def test_only_progress_is_dropped_when_too_much_waits(tmp_path: Path) -> None:
    said: list[str] = []
    file = tmp_path / "file"
    file.write_text("")
    ledger = Ledger.open(file, on_error=said.append, max_pending=3)
    for step in range(10):
        ledger.append("j1", progress(step))
    ledger.append("j1", started())
    ledger.close()
    assert any("7 samples of progress were dropped" in line for line in said)
    assert any("4 events could not" in line for line in said)


def test_a_listener_that_raises_does_no_harm(tmp_path: Path) -> None:
    def bad(_: str) -> None:
        raise RuntimeError("listener")

    file = tmp_path / "file"
    file.write_text("")
    ledger = Ledger.open(file, on_error=bad)
    ledger.append("j1", started())
    ledger.append("j1", started(script=object()))
    ledger.close()
    ledger.append("j1", started())


def test_a_side_file_of_a_dead_writer_is_taken_over_once(tmp_path: Path) -> None:
    intake = Intake(tmp_path / FOLDER, dead_writer())
    for n in range(3):
        record = json.dumps(progress(n).to_record())
        intake.write(Entry(n=n, job="j1", kind="progress", wall_s=1.0, record=record))
    ledger, _ = open_ledger(tmp_path)
    assert steps(ledger) == []  # its lock is held: the writer lives
    copy = intake.path.read_bytes()
    intake.close(keep=True)
    with intake.path.open("ab") as file:
        file.write(b'{"n": 3, "job": "j1", "ev')  # torn by a loss of power
    assert steps(ledger) == [0, 1, 2]
    assert intake.path.with_suffix(".torn").exists()
    intake.path.write_bytes(copy)
    assert steps(ledger) == [0, 1, 2]
    assert not intake.path.exists()
    assert [(job.job, job.outcome) for job in ledger.jobs()] == [("j1", "lost")]


def test_an_empty_side_file_of_a_dead_writer_is_removed(tmp_path: Path) -> None:
    ledger, said = open_ledger(tmp_path)
    ledger.append("j1", started())
    ledger.close()
    empty = tmp_path / FOLDER / "e.jsonl"
    empty.write_bytes(b"")
    assert len(ledger.jobs()) == 1
    assert not empty.exists()
    assert said == []


def test_a_side_file_of_a_newer_version_is_left_alone(tmp_path: Path) -> None:
    newer = tmp_path / FOLDER / "n.jsonl"
    newer.parent.mkdir()
    newer.write_text('{"format": 2, "secret": 1}\n')
    ledger, said = open_ledger(tmp_path)
    assert ledger.jobs() == []
    assert newer.read_text() == '{"format": 2, "secret": 1}\n'
    assert "format 2" in said[0]


def test_a_side_file_on_a_disk_without_locks_is_claimed_by_the_pid_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("trainonce.ledger.intake.fcntl.flock", no_locks)
    for writer, mine in ((this_writer(), None), (dead_writer(), True)):
        intake = Intake(tmp_path / FOLDER, writer)
        intake.close(keep=True)
        with claim(intake.path) as found:
            assert (found is not None) is bool(mine)


def test_a_folder_that_cannot_be_written_is_read_through_a_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger, _ = open_ledger(tmp_path)
    ledger.append("j1", progress(1))
    ledger.close()
    intake = Intake(tmp_path / FOLDER, dead_writer())
    record = json.dumps(progress(2).to_record())
    intake.write(Entry(n=1, job="j1", kind="progress", wall_s=1.0, record=record))
    intake.close(keep=True)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    connect = database.connect

    def refuse(path: Path) -> sqlite3.Connection:
        if path == ledger.path:
            raise PermissionError(30, "Read-only file system")
        return connect(path)

    monkeypatch.setattr(database, "connect", refuse)
    assert steps(Ledger.open(tmp_path)) == [1, 2]
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_the_side_file_is_emptied_when_it_has_grown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainonce.ledger.store._CLEAR_BYTES", 2000)
    ledger, said = open_ledger(tmp_path)
    sizes = []
    for step in range(60):
        ledger.append("j1", progress(step))
        assert ledger.flush()
        sizes.append(next((tmp_path / FOLDER).glob("*.jsonl")).stat().st_size)
    assert 0 in sizes
    assert max(sizes) < 3000
    assert steps(ledger) == list(range(60))
    ledger.close()
    assert said == []


def test_network_file_systems_are_told_by_the_mount_that_holds_the_folder(tmp_path: Path) -> None:
    mounts = tmp_path / "mountinfo"
    base = os.path.realpath(tmp_path)
    mounts.write_text(
        "22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n"
        f"40 22 0:50 / {base}/shared rw - nfs4 server:/x rw\n"
        f"41 22 0:51 / {base}/shared/local rw - xfs /dev/sdb rw\n"
        f"42 22 0:52 / {base}/s3 rw shared:4 - fuse.s3fs s3fs rw\n"
        f"43 22 0:53 / {base}/two\\040words rw - lustre x rw\n"
    )
    expected = {
        "shared": "nfs4", "shared/deep/er": "nfs4", "sharedness": "", "shared/local/a": "",
        "s3": "fuse.s3fs", "two words": "lustre", "": "",
    }  # fmt: skip
    for name, kind in expected.items():
        assert network_filesystem(tmp_path / name, mounts) == kind
    assert network_filesystem(tmp_path, tmp_path / "absent") == ""


def test_over_a_network_the_journal_is_no_wal_and_the_caller_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "network_filesystem", lambda _: "nfs4")
    monkeypatch.setattr("trainonce.ledger.store.network_filesystem", lambda _: "nfs4")
    ledger, _ = open_ledger(tmp_path)
    ledger.append("j1", progress(1))
    assert ledger.flush()
    assert not (tmp_path / FOLDER).exists()
    with contextlib.closing(sqlite3.connect(ledger.path)) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("delete",)
    assert steps(ledger) == [1]
    ledger.close()


def test_locally_the_journal_is_a_wal_and_commits_are_synced(tmp_path: Path) -> None:
    with contextlib.closing(database.connect(tmp_path / "ledger.sqlite")) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert connection.execute("PRAGMA synchronous").fetchone() == (2,)


def test_a_reused_process_id_is_not_taken_for_the_writer() -> None:
    assert is_alive(this_writer()) is True
    assert is_alive(dead_writer()) is False
    elsewhere = Writer(writer="x", host="h", machine="another boot", pid=1, started="1")
    assert is_alive(elsewhere) is None


def test_two_readers_and_a_writer_share_the_work_of_taking_over(tmp_path: Path) -> None:
    intake = Intake(tmp_path / FOLDER, dead_writer())
    for n in range(200):
        record = json.dumps(progress(n).to_record())
        intake.write(Entry(n=n, job="j1", kind="progress", wall_s=1.0, record=record))
    intake.close(keep=True)
    results: list[list[int]] = []
    threads = [
        threading.Thread(target=lambda: results.append(steps(Ledger.open(tmp_path))))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with contextlib.closing(database.connect(tmp_path / "ledger.sqlite")) as connection:
        leftovers.take_over(connection, tmp_path, pytest.fail)
    assert steps(Ledger.open(tmp_path)) == list(range(200))
    assert len(results) == 4
