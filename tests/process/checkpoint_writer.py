"""Writers of checkpoints that are SIGKILLed; run by test_checkpoint_kill.py.

Usage: python checkpoint_writer.py MODE FOLDER; prints what happened as one JSON object.

Writers are forked from this process, so that a trial costs no import of torch. They write
each commit to a pipe after it was acknowledged: what was acknowledged must be found again.
"""

import json
import os
import random
import resource
import signal
import sys
import time
import traceback

import torch

from trainonce.checkpoint.store import CheckpointStore
from trainonce.clock import FakeClock
from trainonce.errors import CheckpointError


def state_at(step: int, size: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {name: torch.randn(size, generator=generator) for name in ("model.w", "optim.m")}


def save(store: CheckpointStore, step: int, size: int) -> None:
    staging = store.begin(step, 2)
    staging.write_rank(0, b"zero %d" % step)
    staging.write_rank(1, b"one %d" % step)
    staging.write_replicated(state_at(step, size), b"tree %d" % step, model_names=["model.w"])
    staging.commit()


def check(store: CheckpointStore, acknowledged: int, size: int) -> int:
    """Return the newest step, after comparing all of it bit for bit."""
    info, _skipped = store.newest_valid()
    step = -1 if info is None else info.step
    assert step >= acknowledged, (step, acknowledged)
    if info is not None:
        into = {name: torch.zeros(size) for name in ("model.w", "optim.m")}
        loaded = store.load(info, into)
        for name, tensor in state_at(step, size).items():
            assert torch.equal(into[name], tensor), (step, name)
        assert loaded.tree == b"tree %d" % step
        assert loaded.rank_payload(0) == b"zero %d" % step
        assert loaded.rank_payload(1) == b"one %d" % step
    return step


class Writer:
    """A forked process that runs `work(acknowledge)` until it is killed."""

    def __init__(self, work) -> None:
        self._read, write = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                work(lambda step: os.write(write, b"%d\n" % step))
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        os.close(write)

    def wait(self) -> tuple[int, int]:
        """Return (wait status, last acknowledged step or -1)."""
        with os.fdopen(self._read, "rb") as pipe:
            steps = pipe.read().split()
        return os.waitpid(self.pid, 0)[1], int(steps[-1]) if steps else -1


def killed_at_random(folder: str, trials: int = 40, size: int = 200_000) -> dict:
    """Two writers at once on one folder, each killed at a random instant."""
    store = CheckpointStore(folder, keep_last=2)
    generator = random.Random(7)
    acknowledged = -1
    killed = unfinished = 0
    for _ in range(trials):

        def work(acknowledge, first: int = acknowledged + 1) -> None:
            for step in range(first, first + 10_000):
                save(CheckpointStore(folder, keep_last=2), step, size)
                acknowledge(step)

        writers = [Writer(work), Writer(work)]
        for writer in writers:
            time.sleep(generator.random() * 0.1)  # the random instant, not synchronisation
            os.kill(writer.pid, signal.SIGKILL)
        for writer in writers:
            status, step = writer.wait()
            killed += os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
            acknowledged = max(acknowledged, step)
        acknowledged = check(store, acknowledged, size)
        unfinished += len(store.newest_valid(full=False)[1])
    return {"killed": killed, "unfinished": unfinished, "steps": acknowledged + 1}


def killed_at_every_operation(folder: str, size: int = 1000) -> dict:
    """One writer, killed at its first file operation, at its second, and so on to the end."""
    store = CheckpointStore(folder, keep_last=1)
    save(store, 0, size)
    acknowledged, killed, operation = 0, 0, 0
    while True:
        operation += 1

        def work(acknowledge, step: int = acknowledged + 1, at: int = operation) -> None:
            seen = 0

            def count(event: str, _arguments: tuple) -> None:
                nonlocal seen
                if event.startswith(("open", "os.", "fcntl.", "shutil.")):
                    seen += 1
                    if seen == at:
                        os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(count)
            save(CheckpointStore(folder, keep_last=1), step, size)
            acknowledge(step)

        status, step = Writer(work).wait()
        newest = check(store, max(acknowledged, step), size)
        if not os.WIFSIGNALED(status):
            assert os.waitstatus_to_exitcode(status) == 0
            # What was not yet locked when its writer died is cleared away after an hour.
            CheckpointStore(folder, clock=FakeClock(time.time() + 7200)).prune()
            return {"killed": killed, "left": sorted(os.listdir(folder)), "steps": newest + 1}
        killed += 1
        acknowledged = newest


def disk_is_full(folder: str, size: int = 100_000) -> dict:
    """The file system refuses in the middle of the tensors, then in the middle of the rest."""
    store = CheckpointStore(folder)
    save(store, 1, size)
    errors = []
    for limit in (0, 100, 5_000, 300_000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        staging = store.begin(2, 1)
        try:
            with staging:
                staging.write_rank(0, b"x" * 50)
                staging.write_replicated(state_at(2, size), b"y" * 1000)
                staging.commit()
        except CheckpointError as error:
            errors.append(str(error))
        assert os.listdir(folder) == ["step-000000001"], os.listdir(folder)
        check(store, 1, size)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    save(store, 2, size)
    return {"errors": errors, "steps": check(store, 2, size)}


MODES = {
    "random": killed_at_random,
    "every": killed_at_every_operation,
    "full": disk_is_full,
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(MODES[sys.argv[1]](sys.argv[2])))
