"""Readings that another program appends to a file, one JSON object a line."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from trainonce.errors import ConfigError, SourceError
from trainonce.fleet.signals import from_record

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from trainonce.fleet.signals import Reading

_MAX_BYTES_A_READ = 1 << 20
_MAX_LINE_BYTES = 1 << 16


class FollowedSource:
    """A file that grows: a monitor of your own, a script, or a test writes it.

    What is in it at the beginning is read as well. A line that is no reading is passed over and
    counted; the file may be missing, and may be cut and begun anew.

    Args:
        path: Of the file.
    """

    name = "file"

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self._rest = b""
        self.num_bad = 0

    def read(self) -> Sequence[Reading]:
        """Return the readings of the lines that were added since the last call.

        Raises:
            SourceError: The file is there and cannot be read.
        """
        try:
            with self._path.open("rb") as file:
                if self._offset > file.seek(0, 2):
                    self._offset, self._rest = 0, b""
                file.seek(self._offset)
                data = file.read(_MAX_BYTES_A_READ)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise SourceError(f"{self._path} is not read: {error.strerror}") from error
        self._offset += len(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > _MAX_LINE_BYTES:
            self._rest = b""
            self.num_bad += 1
        readings: list[Reading] = []
        for line in lines:
            if not line.strip():
                continue
            try:
                readings.append(from_record(json.loads(line)))
            except (ConfigError, ValueError, TypeError, RecursionError):
                self.num_bad += 1
        return readings
