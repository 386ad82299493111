"""What a rank keeps to itself, and its mirror in shared memory for whoever takes it over.

The values of committed steps, `run.state`, plain variables of the script, buffers that differ by
rank, and the place in the script's loops. Published ahead of each commit, before this rank lets the
others commit, and again at the commit, then with what the step returned.
"""

from __future__ import annotations

import functools
import math
from collections import deque
from typing import TYPE_CHECKING, Any

from trainonce.errors import EncodingError
from trainonce.wire import encoding
from trainonce.wire.messages import Note
from trainonce.worker.copies import assign_tree
from trainonce.worker.kept import MOST_RESULTS, KeptValues, join, split
from trainonce.worker.large import Kept
from trainonce.worker.mirror import Place
from trainonce.worker.operation import OpState
from trainonce.worker.own_mirror import OwnMirror
from trainonce.worker.values import MAX_MEANS, LazyMean, merged, outline
from trainonce.worker.variables import NOTHING, Taken, Variables

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

    from trainonce.wire.progress import Progress
    from trainonce.worker.cursor import Cursor, Position
    from trainonce.worker.loops import Loops
    from trainonce.worker.operation import Op, Outcome
    from trainonce.worker.passes import Passes
    from trainonce.worker.spare import Promotion
    from trainonce.worker.state import Protected

# A larger result of a collective between steps is not kept: it would be written at each commit.
_MOST_RESULT_BYTES = 1 << 20


class LocalState:
    """One rank's own state.

    Args:
        world_size: Number of ranks.
        promotion: The rank, now or later.
        progress: Page on which samples and tokens are counted.
        cursor: The place of the last commit.
        loops: The open loops.
        passes: What DDPs and pipelines of this process have settled.
        notify: Sends a message to the launcher, and descriptors with it.
    """

    def __init__(
        self,
        *,
        world_size: int,
        promotion: Promotion,
        progress: Progress,
        cursor: Cursor,
        loops: Loops,
        passes: Passes,
        notify: Callable[..., object],
    ) -> None:
        self.user: dict[str, Any] = {}
        self.values = KeptValues(self._tell_value_not_kept)
        self.mirror = OwnMirror(world_size, promotion, notify)
        self.payload = b""
        """What was published at the last commit."""
        self._world_size = world_size
        self._promotion = promotion
        self._progress = progress
        self._cursor = cursor
        self._loops = loops
        self._passes = passes
        self._notify = notify
        self._head: tuple[dict[str, Any], Any, bytes] | None = None
        self._collectives: deque[tuple[Position, Op]] = deque(maxlen=MOST_RESULTS)
        self.variables = Variables(self.mirror.keep)
        self._variables = NOTHING
        self._opening: tuple[Position, Taken] | None = None

    # ------------------------------------------------------------------ publishing

    def publish(
        self,
        protected: Protected,
        position: Position | None,
        commits: int,
        means: list[LazyMean],
        *,
        final: bool,
        shares: list[float] | None = None,
        returns: Any = None,
    ) -> None:
        """Write the local state to the mirror.

        Args:
            protected: Knows the buffers that differ by rank.
            position: The last committed step, counting the one in flight.
            commits: Committed steps once `position` is committed.
            means: Of that step.
            final: At the commit; else ahead of it, while what the step returns is not known.
            shares: What is averaged, if that is known of more than of `means`.
            returns: Outline of what it will return, as far as it is known.
        """
        self._keep_results(position)
        if shares is None:
            shares = [mean.local for mean in means]
        head = self._head_of(protected, position, means, shares)
        payload = self._encode(head, position, means, final=final, returns=returns)
        places = [place for *_, place in self.variables.large.present]
        self.mirror.publish(commits, payload, places, final=final)
        if final:
            self.payload = payload

    def keep_value(self, position: Position, value: Any, commits: int) -> None:
        """Keep what the step at `position` returned, which is committed now or next.

        Args:
            position: Of the step.
            value: What it returned.
            commits: Committed steps with it.
        """
        is_live = functools.partial(self._cursor.is_live, latest=position)
        self.values.add(position, value, is_live, commits)

    def take_variables(self, caller: FrameType, position: Position | None = None) -> Taken:
        """Take the script's variables around the call of a step, for the next publication.

        Args:
            caller: Where the step is called.
            position: Of a step that begins.

        Returns:
            What was taken; the same as before where nothing has changed.
        """
        self._variables = self.variables.take(caller, begins=position is not None)
        if position is not None and self._opening is None:
            self._opening = (position, self._variables)
        return self._variables

    def begin_iteration(self) -> None:
        """Note that the next step is the first of an iteration."""
        self._opening = None

    @property
    def opening(self) -> Position | None:
        """Position of the first step of the present iteration."""
        return None if self._opening is None else self._opening[0]

    def snapshot(self, protected: Protected, means: list[LazyMean]) -> bytes:
        """Return what tells whether a step goes on to change local state; `means` are its own."""
        kept = {
            "state": self.user,
            "buffers": protected.local_buffers(),
            "modes": protected.modes.read(),
            "large": self.variables.large.num_changes,
        }
        return encoding.encode(kept) + self._variables.encoded(means)

    def note_collective(self, position: Position, op: Op) -> None:
        """Take note of a collective between steps; its result is kept with the next commit."""
        self._collectives.append((position, op))

    def _keep_results(self, latest: Position | None) -> None:
        """Keep what collectives since the last commit gave; `latest` is the one to come."""
        noted = list(self._collectives)
        self._collectives.clear()
        for position, op in noted:
            if op.state is not OpState.DONE:
                self._collectives.append((position, op))
            elif 0 < sum(result.nbytes for result in op.buffers) <= _MOST_RESULT_BYTES:
                results = [result.clone() for result in op.buffers]
                value = {self._world_size: (op.signature, results)}
                self.values.add(position, value, lambda at: self._cursor.is_live(at, latest))

    def result(self, position: Position) -> Outcome | None:
        """Return what the collective at `position` gave among as many ranks; None if not kept."""
        known, value = self.values.get(position)
        return value.get(self._world_size) if known else None

    def _head_of(
        self,
        protected: Protected,
        position: Position | None,
        means: list[LazyMean],
        shares: list[float],
    ) -> dict[str, Any]:
        return {
            "position": position,
            "opening": self._encode_opening(position, means),
            "state": self.user,
            "buffers": protected.local_buffers() if protected.has_buffers else {},
            "hooks": protected.hooks.read(),
            "modes": protected.modes.read(),
            "large": [[key, name, *place] for key, name, place in self.variables.large.present],
            "loops": self._loops.record(),
            "passes": self._passes.record(),
            "means": shares,
            "samples": self._progress["samples"],
            "tokens": self._progress["tokens"],
        }

    def _encode(
        self,
        head: dict[str, Any],
        position: Position | None,
        means: list[LazyMean],
        *,
        final: bool,
        returns: Any,
    ) -> bytes:
        try:
            encoded = self._encode_head(head, returns)
        except EncodingError as error:
            raise EncodingError(
                f"run.state cannot be kept: {error.message}", hint=error.hint
            ) from error
        # Once this step is committed, nobody comes again to what is past.
        is_live = None if final else functools.partial(self._cursor.is_live, latest=position)
        values = self.values.encode(position, means, is_live)
        return join([encoded, self._variables.encoded(means), *values])

    def _encode_opening(
        self, position: Position | None, means: list[LazyMean]
    ) -> tuple[Position, bytes] | None:
        if self._opening is None:
            return None
        at, variables = self._opening
        return at, b"" if at == position else variables.encoded(means)

    def _encode_head(self, head: dict[str, Any], returns: Any) -> bytes:
        # Mostly the same at the commit as ahead of it. What may have changed in place is not
        # compared, but encoded again.
        plain = not (head["state"] or head["buffers"] or head["hooks"])
        if plain and self._head is not None:
            before, returned, encoded = self._head
            if returned is returns and before == head:
                return encoded
        encoded = encoding.encode({**head, "returns": returns})
        self._head = (head, returns, encoded) if plain else None
        return encoded

    def _tell_value_not_kept(self, error: EncodingError) -> None:
        self._notify(
            Note(
                key="value-not-kept",
                text=f"the return value of a step cannot be kept for a newcomer ({error.message});"
                " it would see trainonce.LOST",
            )
        )

    # ------------------------------------------------------------------ taking over

    def returned(self) -> Any:
        """Return the outline of what the last committed step returned; None if that is lost."""
        position = self._cursor.committed
        return None if position is None else outline(self.values.get(position)[1])

    def return_to_commit(self, caller: FrameType) -> None:
        """Put `run.state` and the script's variables back to those of the last commit.

        Dicts and lists are filled in place, since the script may hold references to them.

        Args:
            caller: Where the step of the last commit is called.
        """
        head, *_ = split(self.payload)
        assign_tree(self.user, encoding.decode(head)["state"])
        self.variables.assign(caller)

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
        head, variables, *values = split(payload)
        record = encoding.decode(head)
        large, values = self._read_large(record.get("large", []), values, commits)
        # Of those that its process did not come to, the others know the average.
        unknown = [math.nan] * (MAX_MEANS - len(record["means"]))
        means = [LazyMean(local, i) for i, local in enumerate((*record["means"], *unknown))]
        at, opening = record.get("opening") or (None, b"")
        self._opening = None if at is None else (at, Taken.of(opening))
        self._variables = Taken.of(variables)
        self.variables.restore(variables, opening, means, large)
        self._cursor.committed = record["position"]
        self._cursor.behind = record["position"] is not None
        self.values.restore(values, means)
        if record["position"] is not None:
            known = record["returns"]
            # None is a number there, or a value that was lost there as well.
            of_scalar = returned is None and type(known) is list
            shape = merged(returned, known) if returned is not None or of_scalar else known
            self.values.expect(record["position"], shape, commits, means)
        assign_tree(self.user, record["state"])
        protected.load_local_buffers(record["buffers"])
        protected.modes.load(record.get("modes", {}))
        if record.get("hooks"):  # checkpoints of before have none
            protected.hooks.load(record["hooks"])
        self._loops.restore(record["loops"])
        self._passes.restore(record.get("passes", {}))
        self._progress["samples"] = record["samples"]
        self._progress["tokens"] = record["tokens"]
        self.payload = payload
        return means

    # ------------------------------------------------------------------ large variables

    def whole_payload(self) -> bytes:
        """Return `payload` with the large variables in it, for where there is no mirror."""
        head, *rest = split(self.payload)
        record = encoding.decode(head)
        large = record.get("large", [])
        if not large or _are_inside(large):
            return self.payload
        record["large"] = [[key, name] for key, name, *_ in large]
        data = [self.mirror.read(Place(*place)) for _, _, *place in large]
        return join([encoding.encode(record), *map(bytes, rest), *data])

    def _read_large(
        self, listed: list[list[Any]], parts: list[memoryview], commits: int
    ) -> tuple[list[Kept], list[memoryview]]:
        """Return the large variables of a record, and the other parts behind its head.

        Args:
            listed: What the record says of them.
            parts: Parts of the payload; they are the last of them if it is a whole one.
            commits: Committed steps of the record.
        """
        found: list[Kept] = []
        if _are_inside(listed):
            count = len(parts) - len(listed)
            for (key, name), data in zip(listed, parts[count:], strict=True):
                found.append(Kept(key, name, bytes(data), None))
            return found, parts[:count]
        for key, name, *at in listed:
            place = Place(*at)
            found.append(Kept(key, name, self.mirror.read(place), place))
        self.mirror.hold(commits, [each.place for each in found if each.place is not None])
        return found, parts


def _are_inside(large: list[list[Any]]) -> bool:
    """Tell whether large variables lie in the payload itself, as their list says."""
    return bool(large) and len(large[0]) == 2
