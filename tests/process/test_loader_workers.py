"""Loader workers as real processes: killed, abandoned, cleaned up."""

import os
import signal
import subprocess
import sys
import textwrap

import psutil
import pytest
import torch

from trainonce.worker.loader import ShardedLoader


class KillsItsWorker:
    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> int:
        if index == 9 and torch.utils.data.get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return index


def test_a_killed_loader_worker_is_an_error_and_loading_goes_on_where_it_was() -> None:
    loader = ShardedLoader(KillsItsWorker(), 4, seed=0, world_size=1, rank=0, num_workers=2)
    seen: list[int] = []
    offset = 0
    with pytest.raises(RuntimeError, match="killed by signal|exited unexpectedly"):  # noqa: PT012
        for batch, next_offset in loader.iterate(0):
            seen += batch.tolist()
            offset = next_offset
    alone = ShardedLoader(KillsItsWorker(), 4, seed=0, world_size=1, rank=0)
    seen += [index for batch, _ in alone.iterate(0, offset) for index in batch.tolist()]
    assert seen == list(range(40))


@pytest.mark.parametrize("persistent", [False, True])
def test_closing_an_iterator_ends_its_workers(persistent: bool) -> None:
    loader = ShardedLoader(
        list(range(4000)), 2, seed=0, world_size=1, rank=0, num_workers=2,
        persistent_workers=persistent,
    )  # fmt: skip
    before = set(psutil.Process().children())
    steps = loader.iterate(0)
    next(steps)
    workers = set(psutil.Process().children()) - before
    assert len(workers) == 2
    steps.close()
    if persistent:
        assert all(worker.is_running() for worker in workers)
        del loader, steps
    _gone, alive = psutil.wait_procs(list(workers), timeout=120)
    assert alive == []


@pytest.mark.parametrize("ending", ["break", "keep", "error", "exit"])
def test_a_script_that_leaves_workers_behind_ends_at_once_and_in_silence(ending: str) -> None:
    script = textwrap.dedent(
        """
        import sys
        from trainonce.worker.loader import ShardedLoader

        loader = ShardedLoader(list(range(4000)), 2, seed=0, world_size=1, rank=0, num_workers=2)
        steps = loader.iterate(0)
        for batch, offset in steps:
            break
        ending = sys.argv[1]
        if ending == "break":
            del steps
        elif ending == "error":
            steps.throw(KeyError("mine"))
        elif ending == "exit":
            sys.exit(3)
        """
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script, ending],
        capture_output=True, text=True, check=False, timeout=250,
    )  # fmt: skip
    assert done.returncode == {"error": 1, "exit": 3}.get(ending, 0)
    if ending == "error":
        assert done.stderr.splitlines()[-1] == "KeyError: 'mine'"
        assert done.stderr.count("Traceback") == 1
    else:
        assert done.stderr == ""
