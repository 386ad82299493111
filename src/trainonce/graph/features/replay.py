"""Values of a frozen network over a replay buffer, each distinct observation once.

The next state of one transition is the state of the following one, and batches are drawn with
repeats, so that a target network or a frozen encoder sees the same observation many times before
it changes. Observations are named by their content when they are added, and their values are
kept under (network digest, observation digest) until the network's weights change.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from trainonce.errors import ConfigError, DataError
from trainonce.graph.features.compute import name_outputs
from trainonce.graph.features.evaluate import store_folder
from trainonce.graph.features.fingerprint import Fingerprint, Versions, fingerprint
from trainonce.graph.features.rows import RowTable
from trainonce.graph.features.samples import array_digests
from trainonce.graph.features.segments import Column, Rows

if TYPE_CHECKING:
    import os

    from numpy.typing import NDArray

    from trainonce.graph.store import Store


@dataclass
class ReplayReport:
    """What was asked for, and what it took.

    Args:
        requested: Rows that were asked for.
        computed: Rows that the network was called on.
        loaded: Rows that came from the store.
        observations: Distinct observations that were added.
        repeated: Observations that were added and known already.
        networks: Versions of the network's weights that were met.
    """

    requested: int = 0
    computed: int = 0
    loaded: int = 0
    observations: int = 0
    repeated: int = 0
    networks: int = 0


class ReplayValues:
    """Outputs of a frozen network for the observations of a replay buffer.

    ::

        values = once.ReplayValues(target, capacity=50_000)
        number = values.add(observation)           # when it is put into the buffer
        next_q = values(next_numbers).amax(1)      # in place of target(next_observations)

    Pays where the network changes seldom (hard updates) or never (an encoder), and a call of it
    costs clearly more than a look-up. With averaged (Polyak) targets every step has another
    network: nothing hits, so use the network itself.

    Args:
        network: Takes a batch of observations and returns one tensor with a row for each. In the
            mode in which it is to be evaluated; refused if it draws or changes buffers.
        capacity: How many observations are kept. What `add` returned is good until half as many
            others were added after it, and is refused once it was overwritten: 4 times the
            transitions of the buffer is always enough, and little more than twice in practice.
        store: Folder in which values are kept for other runs, for networks that never change;
            in memory only if None.

    Raises:
        ConfigError: The capacity does not fit.
    """

    def __init__(
        self,
        network: torch.nn.Module,
        *,
        capacity: int,
        store: Store | str | os.PathLike[str] | None = None,
    ) -> None:
        if capacity < 2:
            raise ConfigError(f"capacity={capacity}: at least 2 observations")
        self.network = network
        self.report = ReplayReport()
        self._capacity = capacity
        self._folder = store_folder(store) if store is not None else None
        self._number_of: dict[bytes, int] = {}
        self._names = np.zeros(capacity, "S16")
        self._numbers = np.full(capacity, -1, np.int64)
        self._next = 0
        self._observations: torch.Tensor | None = None
        self._values: torch.Tensor | None = None
        self._known_at = np.full(capacity, -1, np.int64)
        self._version = -1
        self._versions: Versions | None = None
        self._digest = ""
        self._table: RowTable | None = None
        self._fresh: list[NDArray[np.int64]] = []

    def add(self, observation: Any) -> int:
        """Keep an observation, and return the number by which its value is asked for.

        Args:
            observation: A tensor or array, of the same shape and dtype each time.
        """
        tensor = torch.as_tensor(observation)
        name = bytes(array_digests([("0", tensor[None])])[0])
        number = self._number_of.get(name)
        # One that will soon be overwritten is added anew.
        if number is not None and self._next - number <= self._capacity // 2:
            self.report.repeated += 1
            return number
        if self._observations is None:
            self._observations = torch.empty((self._capacity, *tensor.shape), dtype=tensor.dtype)
        number, slot = self._next, self._next % self._capacity
        self._next += 1
        if number >= self._capacity:
            before = bytes(self._names[slot])
            if self._number_of.get(before) == self._numbers[slot]:
                del self._number_of[before]
        self._observations[slot] = tensor
        self._names[slot], self._numbers[slot] = name, number
        self._number_of[name] = number
        self._known_at[slot] = -1
        self.report.observations += 1
        return number

    def observations(self, numbers: Any) -> torch.Tensor:
        """Return observations as one CPU tensor.

        Raises:
            DataError: Some were overwritten.
        """
        return self._rows(self._slots(numbers))

    def __call__(self, numbers: Any) -> torch.Tensor:
        """Return the network's outputs for these observations; no gradient flows through them.

        Raises:
            DataError: Nothing was added, some were overwritten, or the network is not
                deterministic.
        """
        places = self._slots(numbers)
        if self._observations is None:
            raise DataError("no observation was added", hint="call add(observation) first")
        self._check_network()
        missing = np.unique(places[self._known_at[places] != self._version])
        if len(missing) and self._table is not None:
            missing = self._load(missing)
        if len(missing):
            self._compute(missing)
        self.report.requested += len(places)
        assert self._values is not None
        return self._values[torch.from_numpy(places).to(self._values.device)]

    def flush(self) -> None:
        """Commit values to the store, if there is one."""
        if self._table is None or not self._fresh or self._values is None:
            return
        slots = np.unique(np.concatenate(self._fresh))
        slots = slots[self._known_at[slots] == self._version]
        self._fresh = []
        values = self._values[torch.from_numpy(slots).to(self._values.device)].cpu()
        column = Column("", str(values.dtype).removeprefix("torch."), tuple(values.shape[1:]))
        self._table.put(Rows(self._names[slots], (column,), (values,)))

    # ------------------------------------------------------------ inside

    def _slots(self, numbers: Any) -> NDArray[np.int64]:
        asked = np.asarray(numbers, np.int64)
        slots = asked % self._capacity
        gone = int(np.count_nonzero(self._numbers[slots] != asked))
        if gone and self._observations is not None:
            raise DataError(
                f"{gone} of {len(asked)} observations were overwritten by later ones",
                hint=f"raise capacity (now {self._capacity}) to 4 times the buffer's transitions",
            )
        return slots

    def _rows(self, slots: NDArray[np.int64]) -> torch.Tensor:
        assert self._observations is not None
        return self._observations[torch.from_numpy(slots)]

    def _check_network(self) -> None:
        """Begin anew where the network's weights are others than before.

        In-place changes are noticed; writes through `.data` or NumPy are not.
        """
        if self._versions is not None and not self._versions.changed():
            return
        self.flush()
        named = self._fingerprint()
        self._versions = Versions(lambda: (*self.network.parameters(), *self.network.buffers()))
        if named.digest == self._digest:
            return  # the same values were written again
        self._digest = named.digest
        self._version += 1
        self.report.networks += 1
        if self._folder is not None:
            self._table = RowTable(self._folder / named.digest[:40], named.digest)

    def _fingerprint(self) -> Fingerprint:
        assert self._observations is not None
        example = self._observations[:2].to(self._device())
        memo = None if self._folder is None else self._folder / "graphs"
        return fingerprint(self.network, (torch.zeros_like(example),), memo=memo)

    def _device(self) -> torch.device:
        state = next(self.network.parameters(), None)
        return torch.device("cpu") if state is None else state.device

    def _load(self, missing: NDArray[np.int64]) -> NDArray[np.int64]:
        """Take values from the store; return the slots that it does not have."""
        assert self._table is not None
        found = self._table.locate(self._names[missing])
        if len(self._table.damaged(found[found >= 0])):
            found = self._table.locate(self._names[missing])
        stored = missing[found >= 0]
        if len(stored):
            rows: Any = self._table.take(found[found >= 0])[0]
            self._put(stored, rows)
            self.report.loaded += len(stored)
        return missing[found < 0]

    def _compute(self, missing: NDArray[np.int64]) -> None:
        # A single row is computed beside itself: kernels for one row may be others.
        wanted = missing if len(missing) > 1 else np.repeat(missing, 2)
        inputs = self._rows(wanted).to(self._device())
        with torch.no_grad():
            named = name_outputs(self.network(inputs))
        if list(named) != [""]:
            raise DataError(
                f"the network returns {sorted(named)}, not one tensor",
                hint="wrap it in a module that chooses one output",
            )
        self._put(missing, named[""][: len(missing)])
        self._fresh.append(missing)
        self.report.computed += len(missing)

    def _put(self, slots: NDArray[np.int64], values: torch.Tensor) -> None:
        if self._values is None:
            self._values = torch.empty(
                (self._capacity, *values.shape[1:]), dtype=values.dtype, device=self._device()
            )
        places = torch.from_numpy(slots).to(self._values.device)
        self._values[places] = values.to(self._values.device)
        self._known_at[slots] = self._version
