"""What the user sees, and what is told about memory kills."""

import io

from trainonce.clock import FakeClock
from trainonce.controller import oom
from trainonce.controller.incidents import duration
from trainonce.controller.live import LiveView, Snapshot


class Terminal(io.StringIO):
    def isatty(self):
        return True


def snapshot(step, **fields):
    return Snapshot(
        **{"step": step, "ranks_alive": 2, "world_size": 2, "spares_ready": 1, "spares": 1,
           "incidents": 0, **fields}
    )  # fmt: skip


def test_a_plain_line_appears_every_few_seconds_with_rates():
    clock, out = FakeClock(), io.StringIO()
    view = LiveView(out, clock)
    for step in range(0, 101, 10):
        view.show(snapshot(step, samples=step * 64, tokens=step * 1000, incidents=1, loss=1.5))
        clock.advance(1.0)
    lines = out.getvalue().splitlines()
    assert lines == [
        (
            "trainonce: step 50 · 10 steps/s · 640 samples/s · 10 k tokens/s · loss 1.5"
            " · 2/2 ranks · 1/1 spares ready · 1 incident"
        ),
        (
            "trainonce: step 100 · 10 steps/s · 640 samples/s · 10 k tokens/s · loss 1.5"
            " · 2/2 ranks · 1/1 spares ready · 1 incident"
        ),
    ]


def test_utilisation_is_shown_where_operations_and_peak_are_known():
    clock = FakeClock()
    view = LiveView(io.StringIO(), clock)
    for step in range(11):
        view.show(snapshot(step, flops_per_step=3 * 10**12, peak_flops=10 * 10**12))
        clock.advance(1.0)
    assert "3 TFLOP/s · MFU 30.0%" in view.line()


def test_rates_start_anew_after_a_restart_from_a_checkpoint():
    clock = FakeClock()
    view = LiveView(io.StringIO(), clock)
    view.show(snapshot(100))
    clock.advance(1)
    view.show(snapshot(40))
    assert "steps/s" not in view.line()


def test_a_terminal_gets_one_reserved_row_and_is_given_back(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("LINES", "24")
    clock, out = FakeClock(), Terminal()
    view = LiveView(out, clock)
    view.show(snapshot(3))
    assert "\x1b[1;23r" in out.getvalue()
    assert "step 3" in out.getvalue()
    view.close()
    assert "\x1b[r" in out.getvalue()


def test_a_terminal_that_went_away_does_not_disturb_training():
    out = io.StringIO()
    view = LiveView(out, FakeClock())
    out.close()
    view.say("anything")


def test_durations_read_like_people_write_them():
    assert [duration(s) for s in (0.0614, 2.44, 200)] == ["61 ms", "2.4 s", "3.3 min"]


def test_kills_for_memory_are_counted_in_both_versions_of_control_groups(tmp_path, monkeypatch):
    monkeypatch.setattr(oom, "_ROOT", tmp_path)
    (tmp_path / "job").mkdir()
    (tmp_path / "memory/job").mkdir(parents=True)
    two, one = tmp_path / "job/memory.events", tmp_path / "memory/job/memory.oom_control"
    two.write_text("low 0\noom 2\noom_kill 2\n")
    one.write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 3\n")
    assert [oom._count(p) for p in oom._events_files("0::/job")] == [2, 0]
    assert [oom._count(p) for p in oom._events_files("4:cpu,memory:/job")] == [3]
