"""Where the output of workers goes: the terminal, files, or both, as torchrun does it."""

from __future__ import annotations

import os
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

from trainonce.controller.options import ERR, OUT
from trainonce.errors import ConfigError, is_full

if TYPE_CHECKING:
    from collections.abc import Callable

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
            self._write(b"".join(self.prefix + line + b"\n" for line in lines))

    def finish(self) -> None:
        """Show what is left, and close the file."""
        try:
            self.pump()
            if self.rest:
                self._write(self.prefix + self.rest + b"\n")
        finally:
            self.source.close()

    def _write(self, data: bytes) -> None:
        # Past the buffer: it would keep what cannot be written, and fail at the very end again.
        raw, rest = getattr(self.sink, "raw", self.sink), memoryview(data)
        while rest:
            rest = rest[raw.write(rest) :]


class LogFiles:
    """Gives each worker its output files, and shows those that are tee'd.

    Files and not pipes: a worker that outlives the launcher to write its checkpoint must be
    able to print.

    Args:
        options: `log_dir`, `redirects`, `tee`, `shown_ranks` and `role` of the job.
        folder: Folder to use where `log_dir` names none.
        run: Name of this run's folder within `log_dir`.
        tell: Shows a line; told once of each place that takes no more.
    """

    def __init__(
        self, options: RunOptions, folder: Path, run: str, tell: Callable[[str], object]
    ) -> None:
        self._options = options
        self.folder = options.log_dir / run if options.log_dir else folder
        self._tell = tell
        self._told: set[str] = set()
        self._has_files = False
        self._tails: list[_Tail] = []
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def files(self, rank: int, worker: int, attempt: int) -> tuple[Path | None, Path | None]:
        """Return the files for stdout and stderr of a worker; None for the terminal.

        `rank` is -1 for a spare, which keeps its files when it is promoted.

        Raises:
            ConfigError: No files can be made there at all.
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
            path = folder / f"{stream}.log"
            try:
                folder.mkdir(parents=True, exist_ok=True)
                path.touch()
                if tee & bit and not hidden:
                    self._show(path, stream, rank if rank >= 0 else worker)
            except OSError as error:
                if not self._has_files and not is_full(error):
                    raise ConfigError(
                        f"cannot keep the output of workers in {self.folder}: {error.strerror}",
                        hint="give --log-dir a folder of yours",
                    ) from error
                self._tell_once(
                    "files",
                    f"no files for the output of workers can be made in {self.folder}"
                    f" ({error.strerror}): from here on it is shown and not kept",
                )
                found.append(None)
                continue
            self._has_files = True
            found.append(path)
        return found[0], found[1]

    def write(self, name: str, text: str) -> Path:
        """Keep `text` beside the workers' output, and return the file."""
        path = self.folder / name
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        except OSError as error:
            self._tell_once("notes", f"{path} could not be written: {error.strerror}")
        return path

    def close(self) -> None:
        """Show what is left."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        for tail in self._tails:
            self._try(tail.finish)

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
                self._try(tail.pump)

    def _try(self, show: Callable[[], object]) -> None:
        try:
            show()
        except OSError as error:
            if is_full(error):  # else whoever read it has gone
                self._tell_once(
                    "shown",
                    f"the output of workers can no longer be shown ({error.strerror}): it is kept"
                    f" in {self.folder}, and training goes on",
                )

    def _tell_once(self, what: str, text: str) -> None:
        if what not in self._told:
            self._told.add(what)
            self._tell(text)
