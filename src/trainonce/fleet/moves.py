"""The guard of planned migrations: a move is worth little, so it must never do harm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from trainonce.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class Move:
    """A planned migration that was made: away from the device `place`, at `mono_s`."""

    place: str
    mono_s: float


@dataclass(frozen=True)
class MoveDecision:
    """Whether a move may be made now, and why (not)."""

    allowed: bool
    reason: str


@dataclass(frozen=True, kw_only=True)
class MoveLimits:
    """How many planned moves there may be.

    Args:
        per_h: Moves of a job an hour.
        rest_s: Between two moves of a job.
        per_device_day: Moves away from one device a day; more of them is flapping.
        keep_spares: Spares that are left for failures.
    """

    per_h: int = 4
    rest_s: float = 60.0
    per_device_day: int = 2
    keep_spares: int = 0

    def __post_init__(self) -> None:
        sane = self.per_h >= 1 and self.per_device_day >= 1 and self.keep_spares >= 0
        if not (sane and self.rest_s >= 0):
            raise ConfigError(f"limits of moves cannot be {self}")


def may_move(
    place: str,
    *,
    now_s: float,
    spares_ready: int,
    moves: Sequence[Move],
    limits: MoveLimits | None = None,
) -> MoveDecision:
    """Decide on a planned move away from `place`.

    Args:
        place: The device that will fail, with its host.
        now_s: Now, on the monotonic clock of `moves`.
        spares_ready: Spares that could take over at once.
        moves: The job's planned moves so far.
        limits: How many there may be.
    """
    limits = limits or MoveLimits()
    if spares_ready <= limits.keep_spares:
        return MoveDecision(
            False, f"{spares_ready} spares are ready and {limits.keep_spares} kept for failures"
        )
    last_s = max((move.mono_s for move in moves), default=None)
    if last_s is not None and now_s - last_s < limits.rest_s:
        return MoveDecision(
            False, f"the last move was {now_s - last_s:.0f} s ago, limit {limits.rest_s:.0f} s"
        )
    hour = sum(now_s - move.mono_s < 3600 for move in moves)
    if hour >= limits.per_h:
        return MoveDecision(False, f"{hour} moves in the last hour, limit {limits.per_h}")
    day = sum(move.place == place and now_s - move.mono_s < 86_400 for move in moves)
    if day >= limits.per_device_day:
        return MoveDecision(
            False,
            f"{day} moves away from {place} in a day, limit {limits.per_device_day}: it flaps",
        )
    return MoveDecision(True, f"{spares_ready} spares are ready, {hour} moves in the last hour")
