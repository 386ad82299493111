"""What a script counts by itself starts anew in a newcomer: it is told so."""

from trainonce.testing import run_job

SCRIPT = """
import sys
import torch
from torch.nn.parallel import DistributedDataParallel as DDP
import trainonce

run = trainonce.init()
model = DDP(torch.nn.Linear(2, 2))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
data = torch.utils.data.TensorDataset(torch.randn(64, 2))
loader = run.dataloader(data, batch_size=4)
run.protect(model=model, optimizer=optimizer, loader=loader)

@run.step
def step(x):
    model(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()

batches = run.batches(loader)
for item in enumerate(batches) if "count" in sys.argv else batches:
    step(item[-1][0] if "count" in sys.argv else item[0])
"""


def test_a_script_that_enumerates_its_batches_is_warned(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    told = "enumerate(run.batches(...)) counts from 0 again"
    counting = run_job(script, "count", home=tmp_path / "counting")
    counting.assert_completed()
    assert counting.stderr.count(told) == 1
    plain = run_job(script, home=tmp_path / "plain")
    plain.assert_completed()
    assert told not in plain.stderr


AFTER_THE_LOOP = """
import torch
from torch.nn.parallel import DistributedDataParallel as DDP
import trainonce

run = trainonce.init()
model = DDP(torch.nn.Linear(2, 2))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
data = torch.utils.data.TensorDataset(torch.randn(64, 2))
loader = run.dataloader(data, batch_size=8)
run.protect(model=model, optimizer=optimizer, loader=loader)

@run.step
def train(x):
    loss = model(x).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()

@run.step
def evaluate():
    return 1.0

for epoch in run.epochs(3):
    for (x,) in run.batches(loader):
        loss = train(x)
    evaluate()
    print(f"epoch {epoch} loss {loss}")
"""


def test_a_script_that_needs_what_a_completed_loop_left_behind_is_told_how(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(AFTER_THE_LOOP)
    # Four training steps and the evaluation: then the loop of this epoch is completed.
    result = run_job(script, spares=1, chaos="kill rank=1 step=5 point=commit", home=tmp_path)
    assert result.exit_code == 1
    assert result.stderr.count("what code after them needs (a last loss, say) belongs") == 1
