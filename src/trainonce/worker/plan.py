"""Decide how a generation becomes consistent. Pure: every rank computes the same plan.

Each rank reports what it has; the plan says who sends what to whom. The rules are those of
docs/protocol.md, "Recovery".
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from trainonce.errors import CollectiveError, RecoveryError
from trainonce.worker.operation import SETUP, UNSHARED, Known

OpName = tuple[str, int, int]  # key of a group or channel, interval, sequence number


@dataclass(frozen=True, kw_only=True)
class RankReport:
    """What one rank has.

    Args:
        fresh: It joins with this generation and has no state.
        commits: Committed steps.
        donor: It can give the state as of `commits`, complete and unchanged.
        original: It has been there from the beginning, so its DDPs know their bucket order.
        groups: Group key to the global ranks of its members.
        channels: Channel key to the global ranks of its source and its target.
        ops: Name of each operation it knows to (signature, what it can give of it: `Known`).
        shards: Shard key of each rank, as settled at `protect`; empty where nothing is split,
            and in newcomers.
        shadows: Of a newcomer: numbers of committed steps of which its predecessor left a whole
            shadow.
        dropped: Results that a newcomer would ask for are no longer kept anywhere: there were too
            many operations outside of steps.
        since: Committed steps with which this process began: what came before, it has no log of.
        messages: It was agreed that there are messages between single ranks.
    """

    fresh: bool
    commits: int
    donor: bool
    original: bool = True
    groups: dict[str, list[int]] = field(default_factory=lambda: {})
    channels: dict[str, list[int]] = field(default_factory=lambda: {})
    ops: dict[OpName, tuple[str, int]] = field(default_factory=lambda: {})
    shards: list[str] = field(default_factory=lambda: [])
    shadows: list[int] = field(default_factory=lambda: [])
    dropped: bool = False
    since: int = 0
    messages: bool = False

    def to_record(self) -> dict[str, Any]:
        """Return the report as plain JSON values."""
        return {
            "fresh": self.fresh,
            "commits": self.commits,
            "donor": self.donor,
            "original": self.original,
            "groups": self.groups,
            "channels": self.channels,
            "ops": [[*name, *value] for name, value in self.ops.items()],
            "shards": self.shards,
            "shadows": self.shadows,
            "dropped": self.dropped,
            "since": self.since,
            "messages": self.messages,
        }

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> RankReport:
        """Return the report in `record`."""
        ops = {
            (str(group), int(interval), int(seq)): (str(signature), int(known))
            for group, interval, seq, signature, known in record["ops"]
        }
        fields: dict[str, Any] = {**record, "ops": ops}
        return cls(**fields)


@dataclass(frozen=True, kw_only=True)
class Donation:
    """State of the last commit, from ranks that hold it to newcomers that are to hold the same.

    Args:
        sources: Each gives one part of it, in this order.
        targets: Newcomers that get all of it.
    """

    sources: tuple[int, ...]
    targets: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class ResultTransfer:
    """One logged result, from the rank that has it to those that lack it."""

    name: OpName
    signature: str
    source: int
    targets: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How to become consistent.

    Args:
        commits: Committed steps of the job; newcomers start from there.
        donations: Who gives which newcomers their state.
        shards: Shard key of each rank; empty where nothing is split.
        catch_up: Ranks that have to commit one more step before they can give their part of the
            state, which nobody else holds. They get the results they lack; then all plan again.
        restores: Newcomers that go on from their shadow, with the committed steps of it: where
            that is one fewer, they execute their share of one more step, served from the log.
        results: Logged results to hand over, in this order.
        again: Operations that those who have a result issue once more, from the inputs that they
            kept, for those who have none.
        taken: Messages that their targets have, and that their sources need not send again.
        order_ranks: All ranks; the first of a group's is whose bucket order holds, where none
            was settled yet.
    """

    commits: int
    donations: tuple[Donation, ...]
    shards: tuple[str, ...]
    catch_up: tuple[int, ...] = ()
    restores: dict[int, int] = field(default_factory=lambda: {})
    results: tuple[ResultTransfer, ...]
    again: tuple[OpName, ...] = ()
    taken: tuple[OpName, ...] = ()
    order_ranks: tuple[int, ...]

    def num_recomputed(self, rank: int) -> int:
        """Return how many shares of a step a newcomer computes again."""
        return 1 + self.commits - self.restores.get(rank, self.commits)


def plan_recovery(reports: list[RankReport]) -> Plan:
    """Return the plan for these reports, indexed by rank.

    Raises:
        RecoveryError: No living copy of something that is needed.
        CollectiveError: Ranks issued different operations under the same name.
    """
    survivors = [rank for rank, report in enumerate(reports) if not report.fresh]
    if not survivors:
        raise RecoveryError("no rank survived, so there is no living copy of the state")
    commits = max(reports[rank].commits for rank in survivors)
    behind = [rank for rank in survivors if reports[rank].commits < commits - 1]
    if behind:
        raise RecoveryError(
            f"ranks {behind} are more than one step behind step {commits}",
            hint="collectives inside a step must be issued by every rank",
        )
    if len(survivors) < len(reports) and any(report.dropped for report in reports):
        raise RecoveryError(
            "collectives outside of steps were too many for their results to be kept",
            hint="evaluate in functions under @run.step",
        )
    shards = next((reports[r].shards for r in survivors if reports[r].shards), [])
    catch_up = _find_laggards(reports, commits, shards)
    served = survivors if catch_up else list(range(len(reports)))
    donations: tuple[Donation, ...] = ()
    restores: dict[int, int] = {}
    if not catch_up:
        try:
            donations = _plan_donations(reports, commits, shards)
        except RecoveryError:
            restores = _plan_restores(reports, commits)
            if not restores:
                raise
    starts = {rank: restores.get(rank, commits) for rank in range(len(reports))}
    results, again, taken = _plan_results(reports, starts, served)
    return Plan(
        commits=commits,
        donations=donations,
        restores=restores,
        shards=tuple(shards),
        catch_up=catch_up,
        results=results,
        again=again,
        taken=taken,
        order_ranks=tuple(
            sorted(range(len(reports)), key=lambda r: (reports[r].fresh, not reports[r].original))
        ),
    )


def _find_laggards(reports: list[RankReport], commits: int, shards: list[str]) -> tuple[int, ...]:
    """Return the ranks one step behind that alone hold what a newcomer needs."""
    if not shards:
        return ()
    found: set[int] = set()
    for key in {shards[rank] for rank, report in enumerate(reports) if report.fresh}:
        alike = [r for r, each in enumerate(reports) if not each.fresh and shards[r] == key]
        if alike and all(reports[r].commits < commits for r in alike):
            found.update(alike)
    return tuple(sorted(found))


def _plan_donations(
    reports: list[RankReport], commits: int, shards: list[str]
) -> tuple[Donation, ...]:
    newcomers: dict[str, list[int]] = {}
    for rank, report in enumerate(reports):
        if report.fresh:
            newcomers.setdefault(shards[rank] if shards else "", []).append(rank)
    donations: list[Donation] = []
    for key, targets in newcomers.items():
        alike = [
            rank
            for rank, report in enumerate(reports)
            if not report.fresh and (not shards or shards[rank] == key)
        ]
        donors = [r for r in alike if reports[r].commits == commits and reports[r].donor]
        if not donors:
            raise _no_donor(targets, alike, commits)
        # What everybody holds comes from one rank: the others need not stop for it.
        donations.append(
            Donation(sources=tuple(donors) if key else (donors[0],), targets=tuple(targets))
        )
    return tuple(donations)


def _plan_restores(reports: list[RankReport], commits: int) -> dict[int, int]:
    """Return the newcomers and the committed steps of the shadows that they all go on from.

    The same for all: what one executes again may need another's share of the same step. And a
    step of which a survivor has no log, having begun after it, cannot be executed again.
    """
    fresh = [rank for rank, report in enumerate(reports) if report.fresh]
    begun = max(report.since for report in reports if not report.fresh)
    for start in (commits, commits - 1):
        if start >= begun and all(start in reports[rank].shadows for rank in fresh):
            return dict.fromkeys(fresh, start)
    return {}


def _no_donor(targets: list[int], alike: list[int], commits: int) -> RecoveryError:
    if not alike:
        return RecoveryError(
            f"no living rank holds the part of the state that ranks {targets} held",
            hint="give the mesh a replicate axis, so that every shard has a second copy",
        )
    return RecoveryError(
        f"no rank holds the state as of step {commits} unchanged",
        hint="a collective came after the update for the first time; the step is now"
        " known to do so. run.mean(x) reduces metrics without this risk",
    )


@dataclass(frozen=True)
class _Held:
    """What the ranks have of one operation.

    Attributes:
        signature: As the first rank issued it that knows it.
        first: That rank.
        results: Ranks that can give the result.
        inputs: Ranks that kept their part of the input in place of it.
        arrived: Ranks that have received the message, and can give nothing.
    """

    signature: str
    first: int
    results: list[int] = field(default_factory=lambda: [])
    inputs: list[int] = field(default_factory=lambda: [])
    arrived: list[int] = field(default_factory=lambda: [])

    def add(self, rank: int, known: int) -> None:
        """Take note of what `rank` can give."""
        match known:
            case Known.RESULT:
                self.results.append(rank)
            case Known.INPUT:
                self.inputs.append(rank)
            case Known.TAKEN:
                self.arrived.append(rank)
            case _:
                pass

    @property
    def ranks(self) -> set[int]:
        """Those that need nothing of it."""
        return {*self.results, *self.inputs, *self.arrived}


def _find_held(reports: list[RankReport]) -> dict[OpName, _Held]:
    found: dict[OpName, _Held] = {}
    for rank, report in enumerate(reports):
        for name, (signature, known) in report.ops.items():
            held = found.setdefault(name, _Held(signature, rank))
            if held.signature != signature:
                raise CollectiveError(
                    f"ranks disagree about operation {name[2]}: rank {held.first} issued"
                    f" {held.signature}, rank {rank} issued {signature}",
                    hint="every rank must issue the same collectives in the same order",
                )
            held.add(rank, known)
    return found


def _plan_results(
    reports: list[RankReport], starts: dict[int, int], served: list[int]
) -> tuple[tuple[ResultTransfer, ...], tuple[OpName, ...], tuple[OpName, ...]]:
    """Return which results move, what is issued again, and which messages need not be sent.

    Args:
        reports: Indexed by rank.
        starts: Committed steps that each rank goes on from.
        served: Ranks that get results now.
    """
    members: dict[str, list[int]] = {}
    for report in reports:
        members |= report.groups
        members |= report.channels
    transfers: list[ResultTransfer] = []
    again: list[OpName] = []
    taken: list[OpName] = []
    for name, held in sorted(_find_held(reports).items()):
        log, interval, _ = name
        have = held.ranks
        if not have:
            continue
        targets = tuple(
            rank
            for rank in members[log]
            if rank in served and rank not in have and _wants(reports[rank], interval, starts[rank])
        )
        if not targets:
            continue
        if held.results:
            transfers.append(
                ResultTransfer(
                    name=name, signature=held.signature, source=held.results[0], targets=targets
                )
            )
        elif held.inputs:
            again.append(name)
        else:
            taken.append(name)
    return tuple(transfers), tuple(again), tuple(taken)


def _wants(report: RankReport, interval: int, start: int) -> bool:
    """Tell whether a rank that goes on from `start` commits comes to operations of `interval`."""
    if interval == UNSHARED:
        return False
    if report.fresh:
        return interval <= SETUP or interval >= start
    return interval >= report.commits or interval <= SETUP
