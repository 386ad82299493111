import gc
import os
import sqlite3
import weakref

from trainonce.sqlite import Connection


def test_a_forked_child_never_finalises_the_connections_of_its_parent(tmp_path):
    connection = sqlite3.connect(tmp_path / "a", factory=Connection)
    reference = weakref.ref(connection)
    pid = os.fork()
    if pid == 0:
        del connection
        gc.collect()
        os._exit(0 if reference() is not None else 1)
    assert os.waitpid(pid, 0)[1] == 0
    del connection
    gc.collect()
    assert reference() is None  # the parent holds on to nothing
