"""The process behind `fork_server`: imports, then forks launchers and templates of workers.

Run as `python -m trainonce.testing.fork_server_process LISTENER ENDS ADDRESS modules…`. Each
connection carries one request and its answer:

- `{"launch": args, "env": …, "cwd": …}` with stdout and stderr: forks what goes on as
  `trainonce args…` would; answers `{"pid": …}`. Its engine asks for a template in turn.
- `{"template": args, "env": …, "cwd": …}` with stdout, stderr and a socket: forks what goes on
  as `python -m trainonce.worker.template` would, but needs to import nothing.
- `{"reap": pid}`: waits for its end; answers `{"returncode": …}`.

It ends when the descriptor ENDS is closed at the other side.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import select
import socket
import sys
from typing import TYPE_CHECKING, Any

from trainonce import settings
from trainonce.controller import launch
from trainonce.engines.local import LocalEngine, LocalProcess
from trainonce.engines.template import Process, Template
from trainonce.testing.fork_server import ForkedProcess, take_name
from trainonce.worker import template

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from trainonce.engines.base import LaunchSpec

_POLL_S = 0.001
# The command line and what it imports late; the session of a worker, and what DDP imports late.
_MODULES = (
    "trainonce.cli.main", "trainonce.cli.run", "trainonce.worker.session", "torch._dynamo",
)  # fmt: skip


class ForkingEngine(LocalEngine):
    """Starts every worker by a fork, also those that a real launcher executes.

    Args:
        address: Of the fork server.
    """

    def __init__(self, address: str) -> None:
        super().__init__()
        self._address = address

    def start(self, spec: LaunchSpec) -> LocalProcess:
        """Start one worker, from a template that is ready at once."""
        self.preload(spec)
        while self.preparing:
            select.select([], [], [], _POLL_S)  # it answers as soon as it is forked
        return super().start(spec)

    def preload(self, spec: LaunchSpec) -> None:
        """Fork the template, if workers like `spec` can have one."""
        if self._template is None and Template.can_run(spec.command):
            self._template = _ForkedTemplate(self._address, spec)


class _ForkedTemplate(Template):
    def __init__(self, address: str, spec: LaunchSpec) -> None:
        self._address = address
        super().__init__(spec.command, spec.env)

    def _start(
        self, python: str, args: tuple[str, ...], env: Mapping[str, str], theirs: socket.socket
    ) -> Process:
        request = {"template": args, "env": dict(env), "cwd": os.getcwd()}
        return ForkedProcess(self._address, request, (1, 2, theirs.fileno()))


def main() -> None:
    """Import, then serve; in a forked process, go on as what was asked for."""
    listener_fd, ends_fd, address, *modules = sys.argv[1:]
    listener, ends = socket.socket(fileno=int(listener_fd)), int(ends_fd)
    for name in (*_MODULES, *modules):
        importlib.import_module(name)
    assert len(os.listdir("/proc/self/task")) == 1, "only the thread that forks would live on"
    gc.collect()
    gc.freeze()  # the collector would write to pages that are shared
    become = _serve(listener, ends)
    listener.close()
    os.close(ends)
    if become is not None:
        become(address)


def _serve(listener: socket.socket, ends: int) -> Callable[[str], None] | None:
    """Serve requests; return None in the end, or in a forked process what it is to become."""
    while True:
        ready, _, _ = select.select([listener, ends], [], [])
        if ends in ready:
            return None
        sock, _ = listener.accept()
        with sock:
            data, fds, _flags, _address = socket.recv_fds(sock, 1 << 20, 4)
            if not data:
                continue  # who asked has been killed
            request = json.loads(data)
            if "reap" in request:
                _, status = os.waitpid(request["reap"], 0)
                answer = {"returncode": os.waitstatus_to_exitcode(status)}
            else:
                pid = os.fork()
                if pid == 0:
                    become = _launcher if "launch" in request else _template
                    return lambda address: become(request, fds, address)
                for fd in fds:
                    os.close(fd)
                answer = {"pid": pid}
            sock.sendall(json.dumps(answer).encode())


def _launcher(request: dict[str, Any], fds: list[int], address: str) -> None:
    _take_over(request, fds)
    launch.LocalEngine = lambda: ForkingEngine(address)
    sys.exit(importlib.import_module("trainonce.cli.main").main(request["launch"]))


def _template(request: dict[str, Any], fds: list[int], _address: str) -> None:
    os.setsid()
    *outputs, theirs = fds
    _take_over(request, outputs)
    sys.argv = ["template", "0", *request["template"]]
    template.serve(socket.socket(fileno=theirs))


def _take_over(request: dict[str, Any], outputs: list[int]) -> None:
    """Take environment, folder and outputs of who asked."""
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    for number, fd in zip((1, 2), outputs, strict=True):
        os.dup2(fd, number)
        os.close(fd)
    take_name(os.environ[settings.HOME.name])


if __name__ == "__main__":
    main()
