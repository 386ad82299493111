"""Files with what one host measured: written by it, and read by others that do not trust it."""

from __future__ import annotations

import ipaddress
import json
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar

from trainonce.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

R = TypeVar("R")


def read_record(
    path: Path, parse: Callable[[Any], R], *, form: str, command: str, max_bytes: int
) -> R:
    """Read a record, in which nothing is trusted unchecked.

    Args:
        path: Of the file.
        parse: Makes the record; raises KeyError, TypeError or ValueError for what is none.
        form: Format that the record must name.
        command: Which command writes such files.
        max_bytes: A larger file is not read.

    Raises:
        ConfigError: The file cannot be read, or holds anything but a record.
    """
    try:
        with path.open("rb") as file:  # its size says nothing where it is no plain file
            data = file.read(max_bytes + 1)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    if len(data) > max_bytes:
        raise ConfigError(f"{path} is larger than a record may be")
    try:
        raw = json.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
    try:
        if raw["format"] != form:
            raise ValueError(f"its format is {raw['format']!r}, not {form!r}")
        if raw["stamps"] not in ("kernel", "user"):
            raise ValueError(f"unknown stamps {raw['stamps']!r}")
        return parse(raw)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"{path} is not a record of `{command}`: {error}",
            hint="pass the files that its --out wrote, one of each host",
        ) from error


class Record:
    """What one host measured, as a file."""

    FORMAT: ClassVar[str]
    COMMAND: ClassVar[str]
    MAX_FILE_BYTES: ClassVar[int]

    def write(self, path: Path) -> None:
        """Write the record as JSON.

        Raises:
            ConfigError: The file cannot be written.
        """
        text = json.dumps({"format": self.FORMAT, **self._to_raw()}, separators=(",", ":"))
        try:
            path.write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"cannot write {path}: {error.strerror}") from error

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a record and check every value in it.

        Raises:
            ConfigError: The file cannot be read, or holds anything but a record.
        """
        return read_record(
            path,
            cls._from_raw,
            form=cls.FORMAT,
            command=cls.COMMAND,
            max_bytes=cls.MAX_FILE_BYTES,
        )

    def _to_raw(self) -> dict[str, Any]:
        return vars(self)

    @classmethod
    def _from_raw(cls, raw: Any) -> Self:
        raise NotImplementedError


def address(value: Any) -> str:
    """Return an IPv4 address.

    Raises:
        ValueError: `value` is none.
    """
    return str(ipaddress.IPv4Address(str(value)))


def count(value: Any, *, most: int = 1 << 53) -> int:
    """Return a number of things.

    Raises:
        ValueError: `value` is none, or more than `most`.
    """
    if type(value) is not int or not 0 <= value <= most:
        raise ValueError(f"a number of things {value!r:.60}")
    return value


def finite(value: Any) -> float:
    """Return a number that is neither infinite nor none.

    Raises:
        ValueError: `value` is no such number.
    """
    if type(value) not in (int, float) or not -1e300 < value < 1e300:
        raise ValueError(f"{value!r:.60} is no number")
    return float(value)
