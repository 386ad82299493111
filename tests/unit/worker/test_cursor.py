"""Where a newcomer enters the script."""

from trainonce.worker.cursor import Cursor


def run_script(cursor, *, epochs=3, batches=4, crash_after=None):
    """A script with a step per batch and an evaluation per epoch; returns what it executed."""
    executed = []

    def section(name):
        position = cursor.enter_section()
        if cursor.is_committed(position):
            return
        executed.append((name, position))
        cursor.committed = position
        if position == crash_after:
            raise KeyboardInterrupt

    outer, begin = cursor.enter_loop()
    for epoch in range(begin if begin is not None else epochs, epochs):
        cursor.next_iteration(outer, epoch)
        inner, first = cursor.enter_loop()
        for batch in range(first if first is not None else batches, batches):
            cursor.next_iteration(inner, batch)
            section("train")
        cursor.leave_loop(inner)
        section("evaluate")
    cursor.leave_loop(outer)
    section("final")
    return executed


def test_every_section_is_executed_once_whatever_the_place_of_the_crash():
    whole = run_script(Cursor())
    assert len(whole) == 3 * 4 + 3 + 1
    for index, (_, position) in enumerate(whole):
        first = Cursor()
        try:
            run_script(first, crash_after=position)
        except KeyboardInterrupt:
            pass
        second = Cursor(committed=first.committed)
        assert run_script(second) == whole[index + 1 :]


def test_positions_follow_program_order():
    positions = [position for _, position in run_script(Cursor())]
    assert positions == sorted(positions)


def test_a_loop_left_by_break_does_not_shift_what_follows():
    cursor = Cursor()
    outer, _ = cursor.enter_loop()
    cursor.next_iteration(outer, 0)
    inner, _ = cursor.enter_loop()
    cursor.next_iteration(inner, 0)
    # `break`: the inner loop is never left explicitly.
    cursor.next_iteration(outer, 1)
    assert cursor.enter_section() == (0, 1, 0)


def test_values_stay_asked_for_only_in_iterations_that_hold_the_last_commit():
    cursor = Cursor(committed=(0, 3, 0, 17, 0))
    assert cursor.is_live((0, 3, 0, 17, 0))
    assert cursor.is_live((0, 3, 1))
    assert not cursor.is_live((0, 3, 0, 16, 0))
    assert not cursor.is_live((0, 2, 1))
