"""What all tests share: none writes to the ledger or the store of the user who runs them."""

import gc
import os
from collections.abc import Generator
from pathlib import Path

import pytest


@pytest.fixture(autouse=True, scope="session")
def home_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    os.environ.setdefault("TRAINONCE_HOME", str(home))
    return home


@pytest.fixture(autouse=True, scope="module")
def collector_passes_over_what_was_there() -> Generator[None]:
    """Spare full collections the half million objects of torch: they take 0.3 s each."""
    gc.freeze()
    yield
    gc.unfreeze()
