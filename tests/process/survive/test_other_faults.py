"""What is not a kill of one rank: hangs, exceptions, moves, resets, several at once."""


def test_hangs_exceptions_exits_resets_and_moves_in_one_job(shaken):
    result = shaken(
        "basic.py",
        faults=[
            "stop rank=1 step=2 point=backward", "raise rank=0 step=5 point=forward",
            "exit rank=1 step=8 point=collective", "reset step=11",
            "migrate rank=0 step=13", "slow rank=1 step=17 point=forward for=3s",
        ],
    )  # fmt: skip
    result.assert_fired("stop", rank=1, cause="hang", detected_by="stopped process")
    result.assert_fired("raise", rank=0, cause="exception", served_by="rebuild")
    result.assert_fired("exit", rank=1, cause="exit", served_by="rebuild")
    result.assert_fired("reset", cause="connection", served_by="reform")
    result.assert_fired("migrate", rank=0, cause="migration", planned=True)
    # A slow rank is waited for, not replaced: no incident beyond the five.
    assert len(result.incidents) == 5, result.explain()


def test_two_ranks_lost_at_once_are_rebuilt_from_the_third(shaken):
    result = shaken(
        "basic.py", world=3,
        faults=["kill rank=0 step=5 point=collective", "kill rank=2 step=5 point=collective",
                "kill rank=1 step=9 point=update", "kill rank=2 step=9 point=backward"],
    )  # fmt: skip
    assert {rank for incident in result.incidents for rank in incident.ranks} == {0, 1, 2}


def test_spares_that_die_before_and_during_their_promotion_are_replaced(shaken):
    result = shaken(
        "basic.py",
        faults=["kill_spare step=3", "slow rank=1 step=4 point=forward for=4s",
                "kill rank=1 step=7 point=backward",
                "kill rank=1 step=7 point=promotion", "kill rank=0 step=12 point=collective",
                "kill rank=0 step=12 point=updated"],
    )  # fmt: skip
    result.assert_fired("kill", rank=1, point="promotion", cause="signal")
    result.assert_fired("kill", rank=0, point="updated", cause="signal")


def test_kills_during_a_recovery_are_survived_where_a_copy_is_left(shaken):
    result = shaken(
        "basic.py", world=3,
        # Ranks may be one commit behind the one that dies.
        faults=["kill rank=2 step=5 point=backward", "kill rank=1 step=4 point=recovery",
                "kill rank=1 step=11 point=collective", "kill rank=0 step=10 point=donate"],
    )  # fmt: skip
    result.assert_fired("kill", rank=1, point="recovery", cause="signal")
    result.assert_fired("kill", rank=0, point="donate", cause="signal")


def test_a_kill_while_replicas_are_compared_does_not_hold_up_the_recovery(shaken):
    shaken("basic.py", "--verify", 2, faults=["kill rank=1 step=4 point=commit"], spares=1)
