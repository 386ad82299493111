"""What all tests share: none writes to the ledger or the store of the user who runs them."""

import os
from pathlib import Path

import pytest


@pytest.fixture(autouse=True, scope="session")
def home_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    os.environ.setdefault("TRAINONCE_HOME", str(home))
    return home
