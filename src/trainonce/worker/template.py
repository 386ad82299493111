"""A process that has torch imported, from which workers are forked.

Run as `python -m trainonce.worker.template FD script.py args…`. Over the descriptor, a
sequenced-packet socket, it says `{"ready": true}` once the imports are done, and then serves
one request at a time:

- `{"fork": {…}}` with descriptors (control, progress[, stdout][, stderr]): forks a worker that
  goes on as `python -m trainonce.worker script.py args…` would; answers `{"pid": …}`.
- `{"reap": pid}`: waits for the worker's end; answers `{"code": …, "signum": …}`.

It ends when the connection does. Nothing but imports happens here: no tensor is touched, no
thread is started, no device is initialised.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import socket
import sys
from typing import Any

from trainonce import settings

_REQUEST_BYTES = 1 << 20


def main() -> None:
    """Import, then serve until the launcher goes away."""
    sock = socket.socket(fileno=int(sys.argv[1]))
    _import()
    if len(os.listdir("/proc/self/task")) > 1:
        # Only the thread that forks lives on in the child; what others hold stays locked.
        _answer(sock, {"ready": False})
        return
    gc.collect()
    gc.freeze()  # the collector would write to pages that are shared
    serve(sock)


def serve(sock: socket.socket) -> None:
    """Say that all is imported, then fork workers until the launcher goes away."""
    _answer(sock, {"ready": True})
    while True:
        data, fds, _flags, _address = socket.recv_fds(sock, _REQUEST_BYTES, 4)
        if not data:
            return
        request = json.loads(data)
        if "reap" in request:
            _answer(sock, _reap(request["reap"]))
            continue
        begun, begins = os.pipe()
        pid = os.fork()
        if pid == 0:
            sock.close()
            os.close(begun)
            os.setsid()
            os.close(begins)
            _become_worker(request["fork"], fds)
        for fd in (*fds, begins):
            os.close(fd)
        os.read(begun, 1)  # until it leads a group of its own, which can be signalled
        os.close(begun)
        _answer(sock, {"pid": pid})


def _import() -> None:
    # The session imports torch, and of it what a data-parallel script does. What torch itself
    # imports with the first optimizer, DDP or `fully_shard` takes half as long again.
    for name in ("trainonce.worker.session", "torch._dynamo"):
        importlib.import_module(name)


def _answer(sock: socket.socket, answer: dict[str, Any]) -> None:
    sock.sendall(json.dumps(answer).encode())


def _reap(pid: int) -> dict[str, int]:
    info = os.waitid(os.P_PID, pid, os.WEXITED)
    assert info is not None
    exited = info.si_code == os.CLD_EXITED
    return {"code": info.si_status if exited else 0, "signum": 0 if exited else info.si_status}


def _become_worker(request: dict[str, Any], fds: list[int]) -> None:
    """Be what a fresh interpreter would be."""
    import numpy as np

    from trainonce.worker.__main__ import main as work

    control, progress, *outputs = fds
    for number, fd in zip(request["outputs"], outputs, strict=True):
        os.dup2(fd, number)
        os.close(fd)
    os.environ.clear()
    os.environ.update(request["env"])
    os.environ[settings.CONTROL_FD.name] = str(control)
    os.environ[settings.PROGRESS_FD.name] = str(progress)
    # Python's own generator is seeded anew by its fork hook; torch's begins with a constant.
    np.random.seed()
    del sys.argv[1]
    try:
        work()
    finally:
        os._exit(1)  # never back into the loop above


if __name__ == "__main__":
    main()
