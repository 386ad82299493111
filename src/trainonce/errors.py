"""Every error TrainOnce raises, in one tree.

::

    TrainOnceError
    ├── ConfigError (ValueError)            a setting, option or argument that cannot be used
    ├── StateError (RuntimeError)           protected state that cannot be kept or restored
    │   ├── StateMismatchError              it differs where it must be equal
    │   └── EncodingError (TypeError)       a value that has no safe encoding
    ├── StepError (RuntimeError)            `@run.step` used in a way that cannot be exactly once
    ├── CollectiveError (RuntimeError)      ranks disagree about a collective
    ├── RecoveryError (RuntimeError)        what failed could not be rebuilt from living copies
    ├── DataError (ValueError)              a dataset or loader that cannot be sharded or resumed
    ├── CheckpointError (RuntimeError)      a durable checkpoint that cannot be written or read
    ├── LedgerError (RuntimeError)          a ledger that cannot be written or read
    ├── SmokeTestError (RuntimeError)       a script does not survive its first batches
    ├── StudyPausedError (RuntimeError)     a study of levers was stopped between two runs, as asked
    ├── ProbeError (RuntimeError)           a probe of a training run cannot give an answer
    ├── BudgetSpentError (RuntimeError)     a budget was used up before anything could run
    ├── SourceError (OSError)               a source of health signals that cannot be read here
    ├── JobNotFoundError (LookupError)      no such job, or it no longer runs
    ├── GraphError (RuntimeError)           a node of the graph cannot be built or evaluated
    │   ├── UnhashableError (TypeError)     a value that has no digest; `path` says where it sits
    │   ├── LazyNodeError (TypeError)       a lazy node used where its value is needed
    │   ├── InputFileError (OSError)        a file or folder that goes into a node cannot be read
    │   ├── NodeError                       a node's function failed; holds its key and traceback
    │   └── InputMutatedError               a node's function changed one of its inputs
    ├── StoreError (RuntimeError)           a store that cannot be opened, read or written
    │   └── LeaseLostError                  a claim that someone else has taken over meanwhile
    └── WireError (ConnectionError)         a message that does not fit the protocol

An error says what happened, with which values; `hint` says what to do next. Errors survive
pickling. Whether trying again could help is told by type: `misuse` is true of those about how
the script uses the package.
"""

from __future__ import annotations

import errno
from typing import ClassVar


class TrainOnceError(Exception):
    """The root of all errors of this package.

    Args:
        message: What happened, with the values that made it happen.
        hint: What the user can do next; shown on a line of its own.
    """

    misuse: ClassVar[bool] = False
    """The script asks for what cannot be, and would ask for it again."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\nhint: {self.hint}" if self.hint else self.message

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.message, self.hint))


def _rebuild(cls: type[TrainOnceError], message: str, hint: str | None) -> TrainOnceError:
    return cls(message, hint=hint)


class ConfigError(TrainOnceError, ValueError):
    """A setting, option or argument cannot be used."""

    misuse = True


class StateError(TrainOnceError, RuntimeError):
    """Protected state cannot be kept or restored."""

    misuse = True


class StateMismatchError(StateError):
    """State differs where it must be equal: between ranks, or from what was saved."""


class EncodingError(StateError, TypeError):
    """A value has no safe encoding, so it cannot be kept outside the process."""


class StepError(TrainOnceError, RuntimeError):
    """`@run.step` is used in a way that cannot be exactly once."""

    misuse = True


class CollectiveError(TrainOnceError, RuntimeError):
    """Ranks disagree about which collective comes next, or it is not supported."""

    misuse = True


class RecoveryError(TrainOnceError, RuntimeError):
    """What failed could not be rebuilt from the living copies."""


class DataError(TrainOnceError, ValueError):
    """A dataset or loader cannot be sharded or resumed."""

    misuse = True


class CheckpointError(TrainOnceError, RuntimeError):
    """A durable checkpoint cannot be written or read."""


class LedgerError(TrainOnceError, RuntimeError):
    """The ledger cannot be written or read."""


class SmokeTestError(TrainOnceError, RuntimeError):
    """A training script does not survive its first batches on the CPU."""


class StudyPausedError(TrainOnceError, RuntimeError):
    """A study of levers was stopped between two runs, as asked for."""


class ProbeError(TrainOnceError, RuntimeError):
    """A probe of a training run cannot give an answer: a loss is not finite, say."""


class BudgetSpentError(TrainOnceError, RuntimeError):
    """A budget was used up before anything could run."""


class SourceError(TrainOnceError, OSError):
    """A source of health signals cannot be read on this host."""


class JobNotFoundError(TrainOnceError, LookupError):
    """There is no such job, or it no longer runs."""


class WireError(TrainOnceError, ConnectionError):
    """A message between launcher and worker does not fit the protocol."""


class GraphError(TrainOnceError, RuntimeError):
    """A node of the graph cannot be built or evaluated."""

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.message, self.hint), self.__dict__)


class UnhashableError(GraphError, TypeError):
    """A value has no digest, so nothing that depends on it can be cached.

    `path` says where the value sits, for example `config.layers[3].activation`.
    """

    path: str = ""


class LazyNodeError(GraphError, TypeError):
    """A lazy node was used where its value is needed."""


class InputFileError(GraphError, OSError):
    """A file or folder that goes into a node cannot be read."""


class NodeError(GraphError):
    """The function of a node failed.

    `node` is its name, `key` its action key (empty where it has none), `inputs` describes what
    it was called with, and `remote_traceback` is the traceback where it was raised.
    """

    node: str = ""
    key: str = ""
    inputs: str = ""
    remote_traceback: str = ""


class InputMutatedError(GraphError):
    """The function of a node changed one of its inputs, which other nodes share."""


class StoreError(TrainOnceError, RuntimeError):
    """A store cannot be opened, read or written."""


class DamagedError(StoreError):
    """The index of a store is damaged; it is made again from the store's journal."""


class LeaseLostError(StoreError):
    """Someone else has taken this claim over meanwhile, so its result is refused."""


def is_full(error: OSError) -> bool:
    """Tell whether a file system had no room left, or let a file grow no further."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
