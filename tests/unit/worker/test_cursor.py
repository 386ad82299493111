"""Where a newcomer enters the script."""

from trainonce.worker.cursor import Cursor


def loop(cursor, iterations):
    loop = cursor.enter_loop()
    begin = iterations if loop.begin is None else loop.begin
    for iteration in range(begin, begin + 1 if loop.is_done else iterations):
        cursor.next_iteration(loop, iteration)
        yield iteration
    cursor.leave_loop(loop)


def run_script(cursor, *, epochs=3, batches=4, crash_after=None, visited=None):
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

    for epoch in loop(cursor, epochs):
        for batch in loop(cursor, batches):
            if visited is not None:
                visited.append((epoch, batch))
            section("train")
        section("evaluate")
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
        second = Cursor(committed=first.committed, done=dict(first.done))
        assert run_script(second) == whole[index + 1 :]


def test_the_last_iteration_of_a_completed_loop_is_visited_again():
    first, visited = Cursor(), []
    try:
        run_script(first, crash_after=(0, 1, 1))  # after the evaluation of the second epoch
    except KeyboardInterrupt:
        pass
    assert first.is_live((0, 1, 0, 3, 0))
    assert not first.is_live((0, 1, 0, 2, 0))
    assert not first.is_live((0, 0, 0, 3, 0))
    run_script(Cursor(committed=first.committed, done=dict(first.done)), visited=visited)
    assert visited == [(1, 3), *((2, batch) for batch in range(4))]


def test_loops_side_by_side_are_taken_up_together():
    def script(cursor, until=None):
        executed = []
        for pair in zip(loop(cursor, 4), loop(cursor, 9), strict=False):
            position = cursor.enter_section()
            if not cursor.is_committed(position):
                executed.append((pair, position))
                cursor.committed = position
                if pair == until:
                    break
        return executed

    whole = script(Cursor())
    assert [pair for pair, _ in whole] == [(0, 0), (1, 1), (2, 2), (3, 3)]
    first = Cursor()
    script(first, until=(2, 2))
    assert script(Cursor(committed=first.committed)) == whole[3:]


def test_collectives_between_sections_have_positions_of_their_own():
    cursor = Cursor()
    assert cursor.enter_collective() == (-1,)
    for _ in loop(cursor, 2):
        assert cursor.enter_collective()[-1] == -1
        assert cursor.enter_section()[-1] == 0
        assert cursor.enter_collective()[-1] == -2
    assert cursor.enter_collective() == (-2,)


def test_positions_follow_program_order():
    positions = [position for _, position in run_script(Cursor())]
    assert positions == sorted(positions)


def test_a_loop_left_by_break_does_not_shift_what_follows():
    cursor = Cursor()
    outer = cursor.enter_loop()
    cursor.next_iteration(outer, 0)
    inner = cursor.enter_loop()
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
