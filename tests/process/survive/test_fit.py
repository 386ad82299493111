"""`trainonce.fit` under `trainonce run`: what is killed is rebuilt, and nothing shows it."""

import pytest

KEYS = ("history", "steps", "best", "weights")
# Of the commits, two in three are updates, and the third is a look at the run.
IN_AN_UPDATE = "kill rank=1 step=4 point=backward"
IN_A_LOOK = "kill rank=0 step=20 point=begin"


def check(shaken, calm, faults, levers=("infobatch",)):
    result = shaken("fit_once.py", *levers, faults=faults)
    whole = calm("fit_once.py", *levers)
    assert [result.values(key) for key in KEYS] == [whole.values(key) for key in KEYS]
    assert set(result.values("steps").values()) == {40}
    assert all(result.values("weights").values())


def test_fit_with_its_levers_survives_kills_bit_for_bit(shaken, calm):
    check(shaken, calm, [IN_AN_UPDATE, IN_A_LOOK])


def test_batches_that_the_noise_scale_joins_survive_kills_bit_for_bit(shaken, calm):
    """Up to four batches make an update: the newcomer computes its share of them all again."""
    faults = ["kill rank=1 step=10 point=backward", "kill rank=0 step=14 point=update"]
    check(shaken, calm, faults, ("noise-scale", "recompute"))


@pytest.mark.slow
def test_fit_survives_kills_at_other_points(shaken, calm):
    others = ["kill rank=0 step=12 point=update", "kill rank=0 step=33 point=commit"]
    check(shaken, calm, [IN_AN_UPDATE, *others, "kill rank=1 step=44 point=commit"])


def check_tokens(result):
    for name, least, most in (("to_mean_of_tokens", 0.0, 1e-5), ("to_mean_of_means", 1e-2, 1e9)):
        assert all(least <= found <= most for found in result.values(name).values()), name
    whole = result.values("plain_value")
    assert result.values("value") == pytest.approx(whole, rel=1e-5)


def test_ragged_sequences_on_two_ranks_in_parts_train_as_all_tokens_at_once(calm):
    """Rank and micro-batch have other numbers of tokens each; plain torch has them all."""
    check_tokens(calm("fit_ragged.py"))


@pytest.mark.slow
def test_ragged_sequences_survive_a_kill_bit_for_bit(shaken):
    check_tokens(shaken("fit_ragged.py", faults=["kill rank=1 step=4 point=backward"]))
