"""What a spare withholds, and what it publishes once it has a rank."""

import ctypes
import os

from trainonce.worker.spare import RANK_VARIABLES, publish_rank, withhold_rank


def in_c():
    """Return the variables as code that is not Python sees them."""
    pointers = ctypes.POINTER(ctypes.c_char_p).in_dll(ctypes.CDLL(None), "environ")
    found = []
    while pointers[len(found)] is not None:
        found.append(pointers[len(found)])
    return dict(each.decode(errors="replace").split("=", 1) for each in found)


def test_a_rank_is_published_without_moving_the_environment_that_others_may_read(monkeypatch):
    for name in RANK_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    asked = []
    withhold_rank(lambda where: asked.append(where))
    try:
        before = in_c()
        assert os.environ.get("RANK") is None
        assert asked == ["rank"]
    finally:
        publish_rank(3)
    # As many as before: the C library would otherwise allocate a longer list and free this one.
    assert in_c().keys() == before.keys()
    assert {name: in_c()[name] for name in RANK_VARIABLES} == {
        "RANK": "3", "LOCAL_RANK": "3", "GROUP_RANK": "0", "ROLE_RANK": "3"
    }  # fmt: skip
    assert (os.environ["RANK"], os.environ["GROUP_RANK"]) == ("3", "0")
    for name in RANK_VARIABLES:
        del os.environ[name]
