"""The programs of docs/levers.md and docs/plan.md run as they are shown."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch

from trainonce.levers import registry

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.M | re.S)
TRAIN = """
import torch

model = torch.nn.Linear(2, 1)
optimizer = torch.optim.SGD(model.parameters(), 0.1)
for _ in range(5):
    model(torch.randn(4, 2)).square().mean().backward()
    optimizer.step()
"""


def section():
    page = (ROOT / "docs/levers.md").read_text()
    return page.partition("## Each by itself")[2].partition("\n## ")[0]


BEGINNING, *PROGRAMS = BLOCK.findall(section())


def needs(program):
    """Return what a program needs beside trainonce, or "" where it is there."""
    absent = "torchao" if importlib.util.find_spec("torchao") is None else ""
    return absent if "quantized" in program else ""


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda text: text.split()[1].split(".")[-1])
def test_a_lever_works_by_itself_as_the_docs_show(program, tmp_path, monkeypatch):
    if missing := needs(program):
        pytest.skip(f"{missing} is not installed")
    monkeypatch.chdir(tmp_path)
    Path("train.py").write_text(TRAIN)
    torch.manual_seed(0)
    exec(compile(BEGINNING + program, "docs/levers.md", "exec"), {"__name__": "docs"})


def test_every_lever_has_a_program():
    named = set(re.findall(r"\*\*([\w-]+)\*\*", section()))
    assert named == registry.LEVERS.keys()


def test_fit_runs_as_the_docs_show(tmp_path, monkeypatch):
    monkeypatch.setenv("TRAINONCE_HOME", str(tmp_path))
    program = BLOCK.findall((ROOT / "docs/plan.md").read_text())[0]
    scope = {"__name__": "docs"}
    torch.manual_seed(0)
    exec(compile(program, "docs/plan.md", "exec"), scope)
    assert (scope["result"].folder / "plan.toml").exists()
