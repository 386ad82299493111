"""Where the output of workers goes: the terminal, files, or both, as torchrun does it."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

from trainonce.controller.options import ERR, OUT

if TYPE_CHECKING:
    from trainonce.controller.options import RunOptions

_POLL_S = 0.1
_READ_BYTES = 1 << 16


@dataclass
class _Tail:
    source: IO[bytes]
    sink: IO[bytes]
    prefix: bytes
    rest: bytes = b""

    def pump(self) -> None:
        """Show the complete lines that were added to the file."""
        while data := self.source.read(_READ_BYTES):
            *lines, self.rest = (self.rest + data).split(b"\n")
            for line in lines:
                self.sink.write(self.prefix + line + b"\n")
        self.sink.flush()

    def finish(self) -> None:
        """Show what is left, and close the file."""
        self.pump()
        if self.rest:
            self.sink.write(self.prefix + self.rest + b"\n")
            self.sink.flush()
        self.source.close()


class LogFiles:
    """Gives each worker its output files, and shows those that are tee'd.

    Files and not pipes: a worker that outlives the launcher to write its checkpoint must be
    able to print.

    Args:
        options: `log_dir`, `redirects`, `tee`, `shown_ranks` and `role` of the job.
        folder: Folder to use where `log_dir` names none.
        run: Name of this run's folder within `log_dir`.
    """

    def __init__(self, options: RunOptions, folder: Path, run: str) -> None:
        self._options = options
        self.folder = options.log_dir / run if options.log_dir else folder
        self._tails: list[_Tail] = []
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def files(self, rank: int, worker: int, attempt: int) -> tuple[Path | None, Path | None]:
        """Return the files for stdout and stderr of a worker; None for the terminal.

        `rank` is -1 for a spare, which keeps its files when it is promoted.
        """
        redirects = self._options.stream_mode(self._options.redirects, rank)
        tee = self._options.stream_mode(self._options.tee, rank)
        shown = self._options.shown_ranks
        hidden = bool(shown) and rank >= 0 and rank not in shown
        name = str(rank) if rank >= 0 else f"spare{worker}"
        folder = self.folder / f"attempt_{attempt}" / name
        found: list[Path | None] = []
        for bit, stream in ((OUT, "stdout"), (ERR, "stderr")):
            if not (redirects | tee) & bit:
                found.append(Path(os.devnull) if hidden else None)
                continue
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"{stream}.log"
            path.touch()
            if tee & bit and not hidden:
                self._show(path, stream, rank if rank >= 0 else worker)
            found.append(path)
        return found[0], found[1]

    def write(self, name: str, text: str) -> Path:
        """Keep `text` beside the workers' output, and return the file."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / name
        path.write_text(text)
        return path

    def close(self) -> None:
        """Show what is left."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        for tail in self._tails:
            with contextlib.suppress(OSError):
                tail.finish()

    def _show(self, path: Path, stream: str, number: int) -> None:
        sink = sys.stdout.buffer if stream == "stdout" else sys.stderr.buffer
        prefix = f"[{self._options.role}{number}]:".encode()
        with self._lock:
            self._tails.append(_Tail(path.open("rb"), sink, prefix))
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="tee", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(_POLL_S):
            with self._lock:
                tails = list(self._tails)
            for tail in tails:
                with contextlib.suppress(OSError):
                    tail.pump()
