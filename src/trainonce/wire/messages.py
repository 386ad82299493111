"""The messages between the controller and a worker.

Every message is a frozen dataclass of plain values, carried as one JSON object with its
class name under "type". Unknown fields and unknown types are refused. Descriptors travel
beside a message, never inside it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from trainonce.errors import WireError

# ---------------------------------------------------------------- worker → controller


@dataclass(frozen=True, kw_only=True)
class Hello:
    """The first word of a worker.

    Args:
        worker: Its id.
        pid: Its process id.
        protocol: Version of these messages.
        preloadable: Whether torch was imported in the environment that the launcher gave: then
            workers forked from a process that did the same are no different.
        device: PCI address of its GPU; empty for none.
        stacks_signals: Signals at which it writes the stack of its main thread, and those of all
            threads, to stderr; empty for none.
    """

    worker: int
    pid: int
    protocol: int = 1
    preloadable: bool = False
    device: str = ""
    stacks_signals: list[int] = field(default_factory=lambda: [])


@dataclass(frozen=True, kw_only=True)
class Ready:
    """A worker with a rank has finished its set-up: it stands before its first step.

    Until every rank is ready a death restarts the generation from the beginning of the script.
    After, the dead rank is rebuilt. So each waits for `Begin` there.

    Args:
        mirror_bytes: Memory of the local state's mirror.
        log_bytes: Memory of the collectives' log.
        state_bytes: Protected state that this rank holds.
        resumed: Where it comes from: "shadow", "checkpoint", or empty for the beginning.
    """

    mirror_bytes: int = 0
    log_bytes: int = 0
    state_bytes: int = 0
    resumed: str = ""


@dataclass(frozen=True, kw_only=True)
class Parked:
    """A spare waits for a rank.

    Args:
        where: "loop" (before the first batch, the best place), "section", "rank",
            "collective" or "new_group".
        hint: How the script could let spares get further; empty at the best place.
        rehearsed: How many times the step was rehearsed.
    """

    where: str
    hint: str = ""
    rehearsed: int = 0


@dataclass(frozen=True, kw_only=True)
class Mirror:
    """Comes with one descriptor: shared memory that holds this rank's local state."""

    rank: int
    size_bytes: int


@dataclass(frozen=True, kw_only=True)
class Shadow:
    """Comes with one descriptor: shared memory that holds a copy of this rank's state."""

    rank: int
    size_bytes: int


@dataclass(frozen=True, kw_only=True)
class PeerLost:
    """A collective failed although no new generation was announced."""

    generation: int
    error: str


@dataclass(frozen=True, kw_only=True)
class Formed:
    """This worker has joined a generation: it is consistent and goes on.

    Args:
        generation: Which one.
        step: Committed steps this worker stands at.
        recompute: 1 if this worker recomputes the share of a dead rank in the step in
            flight, else 0.
        bytes_moved: Bytes of state it received.
        digest: Digest of the replicated state a newcomer received, or that a donor gave;
            empty where neither applies.
        error: Why the worker could not be made consistent from living copies; empty where
            all is well.
        parted: Because the ranks took different ways through the script: they would again.
        from_shadow: The state came from the shadow that the rank had left.
    """

    generation: int
    step: int
    recompute: int = 0
    bytes_moved: int = 0
    digest: str = ""
    error: str = ""
    parted: bool = False
    from_shadow: bool = False


@dataclass(frozen=True, kw_only=True)
class FaultFiring:
    """Fault `index` of the plan fires in this worker now; nothing may follow.

    Or it is the launcher's to carry out, and this worker waits for `Begin`.
    """

    index: int
    step: int
    point: str


@dataclass(frozen=True, kw_only=True)
class Drained:
    """Answer to `Drain`: this worker stands at a commit, and goes on with the next `Generation`.

    Args:
        step: Committed steps.
        generation: That of the order.
    """

    step: int
    generation: int


@dataclass(frozen=True, kw_only=True)
class Done:
    """The script ended normally; the worker lingers as a donor until told to exit."""

    step: int


@dataclass(frozen=True, kw_only=True)
class Failed:
    """An exception ended the script.

    `cause` is "exception"; or "misuse" for one of ours about how the script uses the package, or
    "recovery" for one of ours that ended a rank's rebuild.
    """

    step: int
    in_section: bool
    error_type: str
    error: str
    traceback: str
    cause: str = "exception"


@dataclass(frozen=True, kw_only=True)
class Report:
    """An event for the ledger; `event` is `trainonce.events.Event.to_record()`."""

    event: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Note:
    """One line that the launcher shows once per distinct `key`."""

    key: str
    text: str
    level: str = "info"


# ---------------------------------------------------------------- controller → worker


@dataclass(frozen=True, kw_only=True)
class Generation:
    """A new version of the membership. For a newcomer this is its promotion.

    Args:
        generation: Counts up by one or more; older announcements are void.
        rank: The rank of the worker that receives this.
        workers: Worker ids by rank.
        newcomers: Ranks whose worker starts with this generation and needs state.
        store_port: TCPStore of the launcher, on loopback.
        incarnation: Counts restarts of all ranks; keys and groups are scoped by it.
        faults: Remaining entries of the chaos plan for this rank.
        resume: Folder of the durable checkpoint to start from; empty for none.
        mirrors: How many descriptors come along (0 or 1): the mirror of the dead rank.
        shadows: How many come after it (0 or 1): the shadow of its state.
    """

    generation: int
    rank: int
    workers: list[int]
    newcomers: list[int]
    store_port: int
    incarnation: int = 0
    faults: list[dict[str, Any]] = field(default_factory=lambda: [])
    resume: str = ""
    mirrors: int = 0
    shadows: int = 0


@dataclass(frozen=True, kw_only=True)
class Begin:
    """Go on: to the first step, as every rank is ready; or with one, as its fault is carried out.

    A rank waits for it after `Ready`, and after `FaultFiring` of a fault that the launcher carries
    out (`trainonce.wire.faults.AWAITED_FAULTS`).
    """


@dataclass(frozen=True, kw_only=True)
class Committed:
    """To spares: how many steps the job has committed."""

    step: int


@dataclass(frozen=True, kw_only=True)
class Drain:
    """Stop at the next commit, publish what is yours, answer `Drained`.

    Void with the next `Generation`.

    Args:
        generation: The present one.
    """

    generation: int


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Write a durable checkpoint at the next commit; then exit with 0 if `stop`."""

    reason: str
    stop: bool = False


@dataclass(frozen=True, kw_only=True)
class DumpCollectives:
    """Write what torch has recorded of the latest collectives to the file `path`."""

    path: str


@dataclass(frozen=True, kw_only=True)
class Exit:
    """All are done: leave."""


Message = (
    Hello | Ready | Parked | Mirror | Shadow | PeerLost | Formed | FaultFiring | Drained | Done
    | Failed | Report | Note | Generation | Begin | Committed | Drain | Checkpoint
    | DumpCollectives | Exit
)  # fmt: skip

_TYPES: dict[str, type[Any]] = {
    cls.__name__: cls
    for cls in (
        Hello, Ready, Parked, Mirror, Shadow, PeerLost, Formed, FaultFiring, Drained, Done,
        Failed, Report, Note, Generation, Begin, Committed, Drain, Checkpoint,
        DumpCollectives, Exit,
    )
}  # fmt: skip


def encode(message: Message) -> bytes:
    """Return `message` as one line of JSON, newline included."""
    record = {"type": type(message).__name__, **vars(message)}
    return json.dumps(record, separators=(",", ":")).encode() + b"\n"


def decode(line: bytes) -> Message:
    """Return the message in one line of JSON.

    Raises:
        WireError: It is no JSON object, or its type or fields are unknown.
    """
    try:
        record = json.loads(line)
        cls = _TYPES[record.pop("type")]
        return cls(**record)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WireError(f"not a message of this protocol: {line[:200]!r} ({error})") from error
