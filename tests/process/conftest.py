"""What tests with real jobs share."""

import pytest

from trainonce.testing import fork_server


@pytest.fixture(autouse=True, scope="session")
def jobs_start_at_once():
    """Fork jobs: importing torch in each of their processes is most of what they take."""
    with fork_server("torch.distributed.fsdp", "torch.distributed.tensor.parallel"):
        yield
