"""Fault plans: their text, and what cannot fire."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainonce.errors import ConfigError
from trainonce.wire.faults import ACTIONS, POINTS, WORKER_FAULTS, parse_plan, refuse_impossible


@st.composite
def entries(draw):
    action = draw(st.sampled_from(ACTIONS))
    words = [action]
    if action in (*WORKER_FAULTS, "migrate"):
        words.append(f"rank={draw(st.integers(0, 9))}")
    if action in WORKER_FAULTS:
        words.append(f"point={draw(st.sampled_from(POINTS))}")
        words.append(f"after={draw(st.integers(0, 3))}")
    if action == "random":
        words += [f"every={draw(st.integers(1, 90))}s", f"seed={draw(st.integers(0, 9))}"]
    if action in ("slow", "lose"):
        words.append(f"for={draw(st.sampled_from(['500ms', '2s', '1.5m']))}")
    return " ".join([*words, f"step={draw(st.integers(0, 99))}"])


@given(st.lists(entries(), max_size=4))
def test_a_plan_is_shown_as_text_that_means_the_same(plan):
    faults = parse_plan("; ".join(plan))
    assert parse_plan("; ".join(map(str, faults))) == faults


@pytest.mark.parametrize(
    ("plan", "message", "hint"),
    [
        ("melt rank=0", "unknown fault 'melt'", "kill, lose, stop"),
        ("kill rank=0 point=lunch", "unknown point 'lunch'", "loader, begin, forward"),
        ("kill rank=0 when=5", "unknown field 'when'", "rank, step, point"),
        ("kill step=5", "which rank?", "rank=0"),
        ("kill rank=one", "rank=one is no number", "rank=0"),
        ("kill rank", "rank= is no number", "rank=0"),
        ("kill rank=0 step=-1", "never", "0 or more"),
        ("slow rank=0 step=3", "for how long?", "for=2s"),
        ("random seed=3", "how often?", "every=30s"),
        ("random every=often", "'often' is no duration", "30s"),
    ],
)
def test_what_is_not_understood_is_refused_with_what_is_allowed(plan, message, hint):
    with pytest.raises(ConfigError, match=message) as refused:
        parse_plan(plan)
    assert hint in refused.value.hint


@pytest.mark.parametrize(
    ("plan", "num_ranks", "spares", "message"),
    [
        ("kill rank=0 step=0 point=commit", 2, 1, "before the first"),
        ("kill rank=0; kill rank=7 step=3", 2, 1, r"rank 7 \(kill rank=7 step=3 point=begin\)"),
        ("migrate rank=0 step=4", 1, 1, "wants another rank"),
        ("kill rank=0 point=donate", 1, 1, "wants another rank"),
        ("kill_spare step=2", 2, 0, "the job keeps none"),
        ("kill rank=0 step=2; restore step=3", 2, 1, "loses none"),
    ],
)
def test_a_fault_that_cannot_fire_in_this_job_is_refused(plan, num_ranks, spares, message):
    faults = parse_plan(plan)
    with pytest.raises(ConfigError, match=message) as refused:
        refuse_impossible(faults, num_ranks=num_ranks, spares=spares)
    assert refused.value.hint


def test_what_may_fire_is_left_alone():
    plan = "kill rank=1 step=3; lose rank=0 step=5; restore step=9; kill_spare step=4"
    refuse_impossible(parse_plan(plan), num_ranks=2, spares=1)
    # A worker that is started for the move takes the place of a spare.
    refuse_impossible(parse_plan("migrate rank=1 step=3"), num_ranks=2, spares=0)
