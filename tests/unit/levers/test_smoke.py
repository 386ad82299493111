import sys

import pytest

from trainonce.errors import SmokeTestError
from trainonce.levers.smoke import smoke_test

PLAIN = """
import sys, torch
model = torch.nn.Linear(3, 2)
optimizer = torch.optim.{optimizer}(model.parameters(), lr=0.1)
print("arguments", sys.argv[1:])
for step in range({batches}):
    model(torch.randn(5, 3)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    {extra}
open({done!r}, "w").write("finished")
"""


def script(tmp_path, *, optimizer="Adam", batches=1000, extra="", text=PLAIN):
    done = str(tmp_path / "done")
    path = tmp_path / "train.py"
    path.write_text(text.format(optimizer=optimizer, batches=batches, extra=extra, done=done))
    return path


def test_two_batches_of_a_plain_script_run_and_no_more(tmp_path):
    found = smoke_test(script(tmp_path), ["--lr", "1"])
    assert found.num_steps == 2
    assert found.inputs == [[[5, 3]], [[5, 3]]]
    assert found.num_parameters == 8
    assert found.state_bytes == 4 * (8 + 8 + 16) + 4 * 2  # Adam's step counters
    assert found.peak_rss_bytes > 10_000_000
    assert not (tmp_path / "done").exists()


def test_a_script_on_the_runtime_runs_unchanged(tmp_path):
    text = """
import torch, trainonce
run = trainonce.init()
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(3, 2).to(run.device))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
loader = run.dataloader(torch.utils.data.TensorDataset(torch.randn(64, 3)), batch_size=4)
run.protect(model=model, optimizer=optimizer, loader=loader)

@run.step
def train_step(batch):
    model(batch[0]).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()

for batch in run.batches(loader, max_steps=1000):
    train_step(batch)
"""
    path = tmp_path / "train.py"
    path.write_text(text)
    found = smoke_test(path)
    assert (found.num_steps, found.inputs[0]) == (2, [[4, 3]])


def test_the_scripts_own_error_is_shown(tmp_path):
    with pytest.raises(SmokeTestError, match="no such layer") as caught:
        smoke_test(script(tmp_path, extra="raise ValueError('no such layer')"))
    assert "exit code 1" in caught.value.message


def test_parameters_that_are_not_finite_are_found(tmp_path):
    extra = "model.weight.data.fill_(float('inf'))"
    with pytest.raises(SmokeTestError, match="not finite"):
        smoke_test(script(tmp_path, extra=extra))


def test_a_script_that_trains_nothing_is_found(tmp_path):
    with pytest.raises(SmokeTestError, match="without a step"):
        smoke_test(script(tmp_path, batches=0))


def test_state_that_the_device_cannot_hold_is_found(tmp_path):
    with pytest.raises(SmokeTestError, match="the device has 100"):
        smoke_test(script(tmp_path), max_state_bytes=100)


def test_a_script_that_hangs_is_ended(tmp_path):
    with pytest.raises(SmokeTestError, match="did not finish"):
        smoke_test(
            script(tmp_path, extra="import threading; threading.Event().wait()"), timeout_s=8
        )


def test_no_cuda_device_is_seen_and_the_launchers_variables_are_gone(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("TRAINONCE_JOB", "other")
    path = tmp_path / "train.py"
    path.write_text(
        "import os, sys\n"
        'sys.exit(f\'{os.environ.get("RANK")} {os.environ.get("TRAINONCE_JOB")} \'\n'
        "         f'{os.environ[\"CUDA_VISIBLE_DEVICES\"]!r}')\n"
    )
    with pytest.raises(SmokeTestError, match="None None ''"):
        smoke_test(path)


def test_the_interpreter_is_this_one(tmp_path):
    path = tmp_path / "train.py"
    path.write_text("import sys\nsys.exit(sys.executable)\n")
    with pytest.raises(SmokeTestError, match=sys.executable):
        smoke_test(path)


LOADERS = """
import torch
from torch.utils.data import DataLoader, TensorDataset
model = torch.nn.Linear(3, 2)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
data = TensorDataset(torch.randn(20, 3))
for epoch in range(100):
    for (x,) in DataLoader(data, batch_size=5):  # evaluation trains nothing
        model(x)
    for (x,) in DataLoader(data, batch_size=4):
        model(x).square().mean().backward()
        optimizer.step()
open({done!r}, "w").write("finished")
"""


def test_the_first_epoch_alone_can_be_run(tmp_path):
    found = smoke_test(script(tmp_path, text=LOADERS), epoch=True)
    assert found.num_steps == 5
    assert not (tmp_path / "done").exists()
