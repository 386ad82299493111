"""TrainOnce: You Only Compute Once.

PyTorch training that survives dead, hung and dying processes with no rollback and no
recompute, and computations that are evaluated exactly once.

Importing this package has no side effect and does not import torch: each public name is
loaded when it is first used.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trainonce.errors import TrainOnceError as TrainOnceError
    from trainonce.graph.executor import compute as compute
    from trainonce.graph.features.evaluate import features as features
    from trainonce.graph.features.frames import FrameCache as FrameCache
    from trainonce.graph.features.memoize import memoize as memoize
    from trainonce.graph.features.replay import ReplayValues as ReplayValues
    from trainonce.graph.node import Dir as Dir
    from trainonce.graph.node import File as File
    from trainonce.graph.node import node as node
    from trainonce.graph.store import Store as Store
    from trainonce.graph.store import open_store as open_store
    from trainonce.graph.sweeps.halving import Halving as Halving
    from trainonce.graph.sweeps.segment import Segment as Segment
    from trainonce.graph.sweeps.sweep import sweep as sweep
    from trainonce.ledger.spending import Budget as Budget
    from trainonce.levers.fit import FitResult as FitResult
    from trainonce.levers.fit import fit as fit
    from trainonce.levers.plan_file import Plan as Plan
    from trainonce.levers.planning import plan as plan
    from trainonce.worker.session import Run as Run
    from trainonce.worker.session import init as init
    from trainonce.worker.values import LOST as LOST

__version__ = "0.1.0"

# Public name -> module that defines it. One line a name; the docs list exactly these.
_EXPORTS = {
    "init": "trainonce.worker.session",
    "Run": "trainonce.worker.session",
    "LOST": "trainonce.worker.values",
    "TrainOnceError": "trainonce.errors",
    "features": "trainonce.graph.features.evaluate",
    "memoize": "trainonce.graph.features.memoize",
    "node": "trainonce.graph.node",
    "compute": "trainonce.graph.executor",
    "File": "trainonce.graph.node",
    "Dir": "trainonce.graph.node",
    "Store": "trainonce.graph.store",
    "open_store": "trainonce.graph.store",
    "Segment": "trainonce.graph.sweeps.segment",
    "sweep": "trainonce.graph.sweeps.sweep",
    "Halving": "trainonce.graph.sweeps.halving",
    "plan": "trainonce.levers.planning",
    "Plan": "trainonce.levers.plan_file",
    "fit": "trainonce.levers.fit",
    "FitResult": "trainonce.levers.fit",
    "Budget": "trainonce.ledger.spending",
    "ReplayValues": "trainonce.graph.features.replay",
    "FrameCache": "trainonce.graph.features.frames",
}

__all__ = [
    "Budget",
    "Dir",
    "File",
    "FitResult",
    "FrameCache",
    "Halving",
    "LOST",
    "Plan",
    "ReplayValues",
    "Run",
    "Segment",
    "Store",
    "TrainOnceError",
    "__version__",
    "compute",
    "features",
    "fit",
    "init",
    "memoize",
    "node",
    "open_store",
    "plan",
    "sweep",
]


def __getattr__(name: str) -> object:
    """Load a public name from its module at first use."""
    if name not in _EXPORTS:
        raise AttributeError(f"module 'trainonce' has no attribute {name!r}")
    value = getattr(importlib.import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names, loaded or not."""
    return sorted(__all__)
