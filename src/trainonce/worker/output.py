"""The output of a script that is kept in files: where these are full, the script goes on."""

from __future__ import annotations

import contextlib
import io
import os
import stat
import sys
from typing import TYPE_CHECKING, Any

from trainonce.errors import is_full

if TYPE_CHECKING:
    from collections.abc import Callable


class _File(io.FileIO):
    """A file that takes what no longer fits, and drops it.

    Args:
        descriptor: Of the file, which stays open.
        name: As the stream calls it.
        tell: Told about each time that something is dropped.
    """

    def __init__(self, descriptor: int, name: str, tell: Callable[[int, OSError], object]) -> None:
        super().__init__(descriptor, "wb", closefd=False)
        self.name = name
        self._tell = tell

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if not is_full(error):
                raise
            self._tell(self.fileno(), error)
            return len(memoryview(data).cast("B"))


def outlive_full_disks(tell: Callable[[str], bool]) -> None:
    """Let what is printed get lost where its file cannot grow, in place of an exception.

    Training is worth more than its log. What code in C and other processes print is theirs.

    Args:
        tell: Shows a line; returns whether it could. Called until it has.
    """
    told = False

    def tell_once(descriptor: int, error: OSError) -> None:
        nonlocal told
        if told:
            return
        where = ""
        with contextlib.suppress(OSError):
            where = f" ({os.readlink(f'/proc/self/fd/{descriptor}')})"
        told = True  # telling may print
        told = tell(
            f"the output of workers no longer fits where it is kept{where}: {error.strerror}."
            " What is printed meanwhile is lost there, and training goes on"
        )

    for name in ("stdout", "stderr"):
        stream: Any = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper) and _is_file(stream):
            raw: Any = _File(stream.fileno(), stream.name, tell_once)
            is_buffered = isinstance(stream.buffer, io.BufferedWriter)
            text = io.TextIOWrapper(
                io.BufferedWriter(raw) if is_buffered else raw,
                encoding=stream.encoding,
                errors=stream.errors,
                line_buffering=stream.line_buffering,
                write_through=stream.write_through,
            )
            setattr(text, "mode", stream.mode)  # noqa: B010 - it is settable, and not in the stubs
            stream.flush()
            setattr(sys, name, text)
            setattr(sys, f"__{name}__", text)


def _is_file(stream: io.TextIOWrapper) -> bool:
    try:
        return stat.S_ISREG(os.fstat(stream.fileno()).st_mode)
    except (OSError, ValueError):
        return False
