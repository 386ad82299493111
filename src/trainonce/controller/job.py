"""The running job as the parts of the launcher share it: workers, membership, and who to tell."""

from __future__ import annotations

import dataclasses
import selectors
from typing import TYPE_CHECKING, Protocol

from trainonce.controller import environment
from trainonce.controller.handle import WorkerHandle
from trainonce.controller.held import Held
from trainonce.controller.incidents import IncidentTracker
from trainonce.controller.membership import Membership
from trainonce.controller.policy import SpareStatus
from trainonce.controller.slots import Slots, guests
from trainonce.controller.timers import Timers
from trainonce.engines.base import LaunchSpec
from trainonce.wire.messages import Exit, Generation

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from trainonce.clock import Clock
    from trainonce.controller.handle import Reserve
    from trainonce.controller.logs import LogFiles
    from trainonce.controller.options import RunOptions
    from trainonce.controller.policy import Death, SlotStatus
    from trainonce.controller.slots import Place
    from trainonce.controller.store import Store
    from trainonce.engines.base import Engine
    from trainonce.events import Event, Incident
    from trainonce.wire.faults import Fault

DEFAULT_RESTARTS = 3
# How long a worker that waits at a commit, or for a rank, may take to leave.
_LEAVE_S = 5.0


class Ledger(Protocol):
    """Where events are kept."""

    def append(self, job_id: str, event: Event, /) -> None:
        """Keep `event`; thread-safe, and never raises into the control loop."""
        ...


class View(Protocol):
    """Where the user watches."""

    def say(self, text: str) -> None:
        """Show one line."""
        ...


class Job:
    """State and small operations that every part of the launcher needs.

    Args:
        options: What to run.
        job_id: Its id.
        folder: `<home>/jobs/<job>`.
        engine: Starts workers.
        clock: Measures time.
        ledger: Keeps events.
        view: Shows lines.
        logs: Decides where a worker's output goes.
        store: The store for rendezvous; not owned.
        resume: Folder of the checkpoint to start from; empty for none.
    """

    def __init__(
        self, options: RunOptions, *, job_id: str, folder: Path, engine: Engine, clock: Clock,
        ledger: Ledger, view: View, logs: LogFiles, store: Store, resume: str = "",
    ) -> None:  # fmt: skip
        self.options = options
        self.id = job_id
        self.folder = folder
        self.engine = engine
        self.clock = clock
        self.view = view
        self.logs = logs
        self.timers = Timers(clock)
        self.selector = selectors.DefaultSelector()
        self.membership = Membership(workers=())
        self.workers: dict[int, WorkerHandle] = {}
        self.reserve: Reserve | None = None
        self.mirrors = Held()
        self.shadows = Held()
        self.slots = Slots(count=options.nproc + options.spares, host=engine.host)
        self.short = 0
        self.incidents = IncidentTracker(clock, engine.host, self._incident_closed)
        self.deaths: list[Death] = []
        self.fired: set[int] = set()
        self.awaited: dict[int, WorkerHandle] = {}
        """Faults of the plan by index, each with the worker that waits for it."""
        self.step = 0
        self.done_ranks: set[int] = set()
        self.uses_trainonce = False
        self.all_ready = False
        self.restarting = False
        self.restarted = False
        """All ranks were started again, and have not formed yet."""
        self.resumed = ""
        self.stopping = 0
        self.exit_code: int | None = None
        self.outcome = ""
        self.reason = ""
        self.forming_since_s = clock.mono_s()
        self.on_formed: Callable[[], None] = lambda: None
        self.on_incident: Callable[[Incident, str], None] | None = None
        self.is_unfit: Callable[[Place], bool] = lambda _: False
        self.device_use: Callable[[], float | None] = lambda: None
        self._ledger = ledger
        self.store = store
        self.resume_from = ""
        self._initial_resume = resume
        self._next_worker = 0
        self._said: set[str] = set()

    # ------------------------------------------------------------------ telling

    def say(self, text: str, *, once: str = "") -> None:
        """Show `text`; only the first time for each value of `once`."""
        if once and once in self._said:
            return
        self._said.add(once)
        self.view.say(text)

    def record(self, event: Event) -> None:
        """Stamp `event` where it has no time yet, and keep it."""
        if not event.wall_s:
            event = dataclasses.replace(
                event, wall_s=self.clock.wall_s(), mono_s=self.clock.mono_s()
            )
        self._ledger.append(self.id, event)

    def _incident_closed(self, event: Incident, sentence: str) -> None:
        event = dataclasses.replace(event, supported=self.uses_trainonce)
        self.record(event)
        self.say(sentence)
        if self.on_incident is not None:
            self.on_incident(event, sentence)

    # ------------------------------------------------------------------ workers

    @property
    def checkpoints(self) -> Path:
        """Where the workers of this job keep durable checkpoints."""
        return self.folder / "checkpoints"

    def find_resume(self) -> str:
        """Return the folder that a start of all ranks resumes from; empty for the beginning."""
        if self.checkpoints.is_dir() and any(self.checkpoints.iterdir()):
            return str(self.checkpoints)
        return self._initial_resume

    @property
    def max_restarts(self) -> int:
        """How many times all ranks may be started again."""
        if self.options.max_restarts is not None:
            return self.options.max_restarts
        return DEFAULT_RESTARTS if self.uses_trainonce else 0

    @property
    def unfired(self) -> list[Fault]:
        """The faults of the plan that have not fired."""
        return [fault for fault in self.options.chaos if fault.index not in self.fired]

    @property
    def is_ending(self) -> bool:
        """Whether the outcome is settled and only the workers have to go."""
        return self.exit_code is not None

    def start_worker(self, slot: int, rank: int = -1) -> WorkerHandle:
        """Start a worker for `rank`, or a spare, in `slot`."""
        worker = self._next_worker
        self._next_worker += 1
        process = self.engine.start(self._spec(worker, rank, slot))
        handle = WorkerHandle(worker=worker, process=process, rank=rank, slot=slot)
        self.workers[worker] = handle
        self.selector.register(process.exit_fd, selectors.EVENT_READ, ("exit", handle))
        self.selector.register(process.dying_fd, selectors.EVENT_READ, ("dying", handle))
        self.selector.register(process.channel.fileno(), selectors.EVENT_READ, ("message", handle))
        return handle

    def _spec(self, worker: int, rank: int, slot: int) -> LaunchSpec:
        stdout, stderr = self.logs.files(rank, worker, self.membership.incarnation)
        return LaunchSpec(
            worker=worker,
            command=environment.command(self.options, rank),
            env=environment.environment(
                self.options,
                job=self.id,
                worker=worker,
                rank=rank,
                slot=slot,
                incarnation=self.membership.incarnation,
                store_port=self.store.port,
                max_restarts=self.max_restarts,
            ),
            stdout=stdout,
            stderr=stderr,
        )

    def preload(self) -> None:
        """Let the engine prepare for the start of spares."""
        self.engine.preload(self._spec(self._next_worker, -1, 0))

    def dismiss(self, handle: WorkerHandle, *, leave_s: float = _LEAVE_S) -> None:
        """Tell a worker to leave, and kill it if it has not after `leave_s`."""
        handle.dismissed = True
        handle.send(Exit())
        self.timers.after(leave_s, handle.kill)

    def forget(self, handle: WorkerHandle) -> None:
        """Release a worker that was reaped."""
        self.selector.unregister(handle.process.exit_fd)
        self.stop_watching_threads(handle)
        self.disconnect(handle)
        handle.process.close()
        del self.workers[handle.worker]

    def stop_watching_threads(self, handle: WorkerHandle) -> None:
        """Wait for the whole end of a worker."""
        if handle.watched:
            handle.watched = False
            self.selector.unregister(handle.process.dying_fd)

    def disconnect(self, handle: WorkerHandle) -> None:
        """Stop listening to a worker."""
        if handle.connected:
            handle.connected = False
            self.selector.unregister(handle.process.channel.fileno())

    def ranked(self) -> list[WorkerHandle]:
        """Return the workers that hold a rank in the current membership, by rank."""
        found = [
            self.workers.get(worker)
            for rank, worker in enumerate(self.membership.workers)
            if rank not in self.membership.lost
        ]
        return [handle for handle in found if handle is not None]

    def read_step(self) -> int:
        """Read the ranks' pages; return the most steps that a rank has committed."""
        if not self.restarting:
            commits = [handle.process.progress["commits"] for handle in self.ranked()]
            self.step = max([self.step, *commits])
        return self.step

    def holder(self, rank: int) -> WorkerHandle | None:
        """Return the worker that holds `rank`; None if it is lost."""
        if rank in self.membership.lost or rank >= len(self.membership.workers):
            return None
        return self.workers.get(self.membership.workers[rank])

    def spares(self) -> list[WorkerHandle]:
        """Return the workers without a rank that are to stay."""
        return [
            handle
            for handle in self.workers.values()
            if handle.rank < 0 and not handle.dismissed and handle.ended is None
        ]

    def spare_statuses(self) -> list[SpareStatus]:
        """Return where the spares stand, as the policy wants to know it."""
        return [
            SpareStatus(
                worker=handle.worker,
                where=handle.parked,
                connected=handle.said_hello,
                stopped=handle.process.is_stopped(),
                fit=not (self.is_unfit(handle.place) or self.slots.is_closed(handle.place)),
            )
            for handle in self.spares()
        ]

    def slot_statuses(self) -> list[SlotStatus]:
        """Return where the slots stand, as the policy wants to know it."""
        return self.slots.statuses(self.workers.values())

    def guests(self) -> dict[int, int]:
        """Return the ranks that share another rank's slot, each with that rank."""
        return guests(self.ranked())

    # ------------------------------------------------------------------ generations

    @property
    def has_shadows(self) -> bool:
        """Whether there is a shadow of every rank's state."""
        return len(self.shadows) == self.options.nproc

    def send_generation(self, rank: int) -> None:
        """Tell the worker of `rank` the current membership."""
        handle = self.holder(rank)
        if handle is None:
            return
        membership = self.membership
        newcomer = rank in membership.newcomers
        mirror = self.mirrors.of(rank) if newcomer else ()
        starts = newcomer or (membership.generation == 1 and self.has_shadows)
        shadow = self.shadows.of(rank) if starts else ()
        message = Generation(
            generation=membership.generation,
            rank=rank,
            workers=list(membership.workers),
            newcomers=sorted(membership.newcomers),
            store_port=self.store.port,
            incarnation=membership.incarnation,
            faults=[fault.to_record() for fault in self.unfired if fault.meets == rank],
            resume="" if self.all_ready else self.resume_from,
            mirrors=len(mirror),
            shadows=len(shadow),
        )
        handle.send(message, (*mirror, *shadow))
