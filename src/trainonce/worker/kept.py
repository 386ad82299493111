"""What steps and the collectives between them gave, kept for a newcomer that asks again."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

from trainonce.errors import EncodingError
from trainonce.wire import encoding
from trainonce.worker.values import (
    is_complete,
    lost,
    outline,
    pack_value,
    unpack_value,
    with_means,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from trainonce.worker.cursor import Position
    from trainonce.worker.values import LazyMean

# How many recorded values a loop of the user's own keeps, and how many results of collectives.
_MOST = 16
MOST_RESULTS = 64
_LENGTH = struct.Struct("<Q")


class KeptValues:
    """Values by the position of their step, each encoded once, when its step is committed.

    Args:
        refused: Told about a value that has no encoding; a newcomer will find it lost.
    """

    def __init__(self, refused: Callable[[EncodingError], object]) -> None:
        self._refused = refused
        self._values: dict[Position, tuple[bool, Any]] = {}
        self._encoded: dict[Position, bytes] = {}
        self._commits: dict[Position, int] = {}

    def get(self, position: Position) -> tuple[bool, Any]:
        """Return (whether it is known, the value, or its outline where it is not)."""
        return self._values.get(position, (False, None))

    def commits_before(self, place: Position) -> int | None:
        """Return how many steps were committed where the script was at `place`, if it is known."""
        ahead = min((at for at in self._commits if at >= place), default=None)
        if ahead is None:
            return None
        behind = max((at for at in self._commits if at < place), default=None)
        # Between it and the next known step may be iterations that are left out.
        if behind is not None and place[:-1] != ahead[:-1]:
            return self._commits[behind]
        return self._commits[ahead] - 1

    def add(
        self,
        position: Position,
        value: Any,
        is_live: Callable[[Position], bool],
        commits: int | None = None,
    ) -> None:
        """Keep `value`; forget those that nobody can ask for any more.

        Args:
            position: Of the step, or of the collective.
            value: What it gave.
            is_live: Whether a newcomer may come to a position again.
            commits: Committed steps with this one.
        """
        self._values[position] = (True, value)
        if commits is not None:
            self._commits[position] = commits
        steps: list[Position] = []
        results: list[Position] = []
        dead: list[Position] = []
        for each in self._values:
            (dead if not is_live(each) else steps if each[-1] >= 0 else results).append(each)
        for each in (*dead, *steps[:-_MOST], *results[:-MOST_RESULTS]):
            del self._values[each]
            self._encoded.pop(each, None)
            self._commits.pop(each, None)

    def encode(
        self,
        latest: Position | None,
        means: list[LazyMean],
        is_live: Callable[[Position], bool] | None = None,
    ) -> list[bytes]:
        """Return all values, encoded.

        Args:
            latest: The step that is being committed.
            means: Its means, which are not reduced yet. Those of earlier steps are.
            is_live: Whether a newcomer may come to a position again; None: to all.
        """
        found: list[bytes] = []
        for position, (known, value) in self._values.items():
            if is_live is not None and not is_live(position):
                continue
            data = self._encoded.get(position)
            if data is None:
                unsettled = means if position == latest else []
                data = self._encode_one(position, known, value, unsettled)
                if not unsettled:
                    self._encoded[position] = data
            found.append(data)
        return found

    def _encode_one(
        self, position: Position, known: bool, value: Any, means: list[LazyMean]
    ) -> bytes:
        commits = self._commits.get(position)
        try:
            return encoding.encode([position, known, pack_value(value, means), commits])
        except EncodingError as error:
            self._refused(error)
            return encoding.encode([position, False, outline(value), commits])

    def restore(self, encoded: Iterable[memoryview], means: list[LazyMean]) -> None:
        """Take over what `encode` returned in another process."""
        self._encoded.clear()
        self._values, self._commits = {}, {}
        for data in encoded:
            position, known, value, *rest = encoding.decode(data)
            self._values[position] = (known, unpack_value(value, means))
            if rest and rest[0] is not None:  # checkpoints of before have none
                self._commits[position] = rest[0]

    def expect(self, position: Position, shape: Any, commits: int, means: list[LazyMean]) -> None:
        """Know the last commit at `position`, whose value need not be among the restored.

        Args:
            position: Of the last commit.
            shape: Outline of what it returned, with what is known of it.
            commits: Committed steps with it.
            means: Its means: averages are known even so.
        """
        shape = with_means(shape, means)
        value = (True, lost(shape)) if is_complete(shape) else (False, shape)
        self._values.setdefault(position, value)
        self._commits[position] = commits


def join(parts: list[bytes]) -> bytes:
    """Return one piece of bytes that `split` takes apart again."""
    lengths = struct.pack(f"<{len(parts) + 1}Q", len(parts), *map(len, parts))
    return b"".join((lengths, *parts))


def split(data: bytes) -> list[memoryview]:
    """Return views of the parts that `join` put together."""
    view = memoryview(data)
    (count,) = _LENGTH.unpack_from(view)
    offset = _LENGTH.size * (count + 1)
    parts: list[memoryview] = []
    for index in range(count):
        (length,) = _LENGTH.unpack_from(view, _LENGTH.size * (index + 1))
        parts.append(view[offset : offset + length])
        offset += length
    return parts
