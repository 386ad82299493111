"""What a step returned may die with its process: the newcomer's script goes on all the same."""

from trainonce.testing import run_job

SCRIPT = """
import sys
import torch
from torch.nn.parallel import DistributedDataParallel as DDP
import trainonce

run = trainonce.init()
torch.manual_seed(0)
model = DDP(torch.nn.Linear(2, 2))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
data = torch.utils.data.TensorDataset(torch.randn(64, 2))
loader = run.dataloader(data, batch_size=4)
run.protect(model=model, optimizer=optimizer, loader=loader)

@run.step
def step(x):
    loss = model(x).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return {"loss": loss.detach(), "parts": (len(x), [1.0])}

total = 0.0
for (x,) in run.batches(loader, max_steps=6):
    out = step(x)
    size, parts = out["parts"]
    if out["loss"] is trainonce.LOST:
        assert size is parts is trainonce.LOST
        print(f"LOST at {run.step_index}", flush=True)
    total += size * out["loss"]
"""


def test_a_value_that_is_lost_has_its_form_and_none_is_lost_in_a_first_execution(tmp_path):
    """After the update of a first execution all ranks meet once more: its share is executed."""
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    chaos = "kill rank=1 step=0 point=updated; kill rank=0 step=3 point=updated"
    result = run_job(script, spares=1, chaos=chaos, home=tmp_path / "home")
    result.assert_completed()
    assert len(result.faults) == 2, result.explain()
    result.assert_nothing_lost()
    assert [line for line in result.stdout.splitlines() if "LOST" in line] == ["LOST at 4"]
