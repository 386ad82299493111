"""What `run.protect` takes, in a process of its own."""

import subprocess
import sys

SCRIPT = """
import torch, trainonce
from torch.utils.data import TensorDataset
run = trainonce.init()
model = torch.nn.Linear(2, 1)
optimizers = [torch.optim.SGD(model.parameters(), lr=0.1)]
data = TensorDataset(torch.randn(8, 2))
loaders = {name: run.dataloader(data, batch_size=2) for name in ("train", "test")}
run.protect(model=model, optimizers=optimizers, loaders=loaders)
print(sum(len(list(run.batches(loader))) for loader in loaders.values()))
"""


def test_loaders_may_be_in_lists_and_dicts_as_optimizers_may():
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.strip() == "8"
