"""What a rank keeps to itself, and its mirror in shared memory for whoever takes it over.

The values of committed steps, `run.state`, buffers that differ by rank, and the place in the
script's loops. Published ahead of each commit, before this rank lets the others commit, and
again at the commit, then with what the step returned.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trainonce.errors import EncodingError
from trainonce.wire import encoding
from trainonce.wire.messages import Mirror as MirrorMessage
from trainonce.wire.messages import Note
from trainonce.worker.kept import KeptValues, join, split
from trainonce.worker.mirror import Mirror
from trainonce.worker.values import LazyMean, outline

if TYPE_CHECKING:
    from collections.abc import Callable

    from trainonce.wire.progress import Progress
    from trainonce.worker.cursor import Cursor, Position
    from trainonce.worker.loops import Loops
    from trainonce.worker.spare import Promotion
    from trainonce.worker.state import Protected

_SLACK_BYTES = 64 << 10


class LocalState:
    """One rank's own state.

    Args:
        promotion: The rank, now or later.
        progress: Page on which samples and tokens are counted.
        cursor: The place of the last commit.
        loops: The open loops.
        notify: Sends a message to the launcher, and descriptors with it.
    """

    def __init__(
        self,
        *,
        promotion: Promotion,
        progress: Progress,
        cursor: Cursor,
        loops: Loops,
        notify: Callable[..., object],
    ) -> None:
        self.user: dict[str, Any] = {}
        self.values = KeptValues(self._tell_value_not_kept)
        self.mirror: Mirror | None = None
        self.payload = b""
        """What was published at the last commit."""
        self._payload_commits = 0
        self._promotion = promotion
        self._progress = progress
        self._cursor = cursor
        self._loops = loops
        self._notify = notify
        self._head: tuple[dict[str, Any], bytes] | None = None
        self.passes: Callable[[], dict[str, Any]] = dict
        """Returns what DDPs and pipelines of this process have settled, as plain values."""
        self.passes_before: dict[str, Any] = {}
        """What those of the predecessor had, at its last commit."""

    # ------------------------------------------------------------------ publishing

    def publish(
        self,
        protected: Protected,
        position: Position | None,
        commits: int,
        means: list[LazyMean],
        *,
        final: bool,
        returns: Any = None,
    ) -> None:
        """Write the local state to the mirror.

        Args:
            protected: Knows the buffers that differ by rank.
            position: The last committed step, counting the one in flight.
            commits: Committed steps once `position` is committed.
            means: Of that step.
            final: At the commit; else ahead of it, while what the step returns is not known.
            returns: Outline of what it returned last time.
        """
        payload = self._encode(protected, position, means, final=final, returns=returns)
        if self.mirror is None or not self.mirror.fits(len(payload)):
            self._grow_mirror(len(payload))
        assert self.mirror is not None
        self.mirror.publish(commits, payload, final=final)
        if final:
            self.payload, self._payload_commits = payload, commits

    def _encode(
        self,
        protected: Protected,
        position: Position | None,
        means: list[LazyMean],
        *,
        final: bool,
        returns: Any,
    ) -> bytes:
        head: dict[str, Any] = {
            "position": position,
            "state": self.user,
            "buffers": protected.local_buffers() if protected.has_buffers else {},
            "hooks": protected.hooks.read(),
            "loops": self._loops.record(),
            "passes": self.passes(),
            "means": [mean.local for mean in means],
            "samples": self._progress["samples"],
            "tokens": self._progress["tokens"],
        }
        try:
            encoded = self._encode_head(head, returns)
        except EncodingError as error:
            raise EncodingError(
                f"run.state cannot be kept: {error.message}", hint=error.hint
            ) from error
        return join([encoded, *self.values.encode(position if final else None, means)])

    def _encode_head(self, head: dict[str, Any], returns: Any) -> bytes:
        # Mostly the same at the commit as ahead of it. What may have changed in place is not
        # compared, but encoded again.
        plain = not (head["state"] or head["buffers"] or head["hooks"])
        if plain and self._head is not None and self._head[0] == head:
            return self._head[1]
        encoded = encoding.encode({**head, "returns": returns})
        self._head = (head, encoded) if plain else None
        return encoded

    def _grow_mirror(self, payload_bytes: int) -> None:
        old, self.mirror = self.mirror, Mirror.create(2 * payload_bytes + _SLACK_BYTES)
        if self.payload:
            self.mirror.publish(self._payload_commits, self.payload, final=True)
        message = MirrorMessage(rank=self._promotion.rank, size_bytes=self.mirror.size_bytes)
        self._notify(message, (self.mirror.fd,))
        if old is not None:
            old.close()

    def _tell_value_not_kept(self, error: EncodingError) -> None:
        self._notify(
            Note(
                key="value-not-kept",
                text=f"the return value of a step cannot be kept for a newcomer ({error.message});"
                " it would see trainonce.LOST",
            )
        )

    # ------------------------------------------------------------------ taking over

    def adopt_mirror(self, fd: int) -> None:
        """Go on with the mirror of the process that held this rank."""
        self.mirror = Mirror(fd)

    def find(self, commits: int) -> bytes | None:
        """Return what the predecessor published for `commits` committed steps."""
        found = self.mirror.find(commits) if self.mirror is not None else None
        return None if found is None else found.payload

    def returned(self) -> Any:
        """Return the outline of what the last committed step returned; None if that is lost."""
        position = self._cursor.committed
        known, value = self.values.get(position) if position is not None else (False, None)
        return outline(value) if known else value

    def restore(
        self, protected: Protected, payload: bytes, commits: int, returned: Any = None
    ) -> list[LazyMean]:
        """Take over what a predecessor of this rank published for `commits` committed steps.

        Args:
            protected: Takes the buffers that differ by rank.
            payload: What was published.
            commits: Committed steps.
            returned: Outline of what the last of them returned on another rank.

        Returns:
            The means of its last step.
        """
        head, *values = split(payload)
        record = encoding.decode(head)
        means = [LazyMean(local) for local in record["means"]]
        self._cursor.committed = record["position"]
        self.values.restore(values, means)
        if record["position"] is not None:
            self.values.expect(record["position"], returned or record["returns"])
        self.user.clear()
        self.user.update(record["state"])
        protected.load_local_buffers(record["buffers"])
        if record.get("hooks"):  # checkpoints of before have none
            protected.hooks.load(record["hooks"])
        self._loops.restore(record["loops"])
        self.passes_before = record.get("passes", {})
        self._progress["samples"] = record["samples"]
        self._progress["tokens"] = record["tokens"]
        self.payload, self._payload_commits = payload, commits
        return means
