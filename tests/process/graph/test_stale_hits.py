"""Every way in which caches are known to serve stale results, each in a process of its own.

What was edited is computed again; what only looks edited is not.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import trainonce

SOURCE = Path(trainonce.__file__).parents[1]

FILES = {
    "main.py": """
import sys
import numpy as np
import trainonce as once
import helpers
from models import Cleaner

SHIFT = 3

def scaled(by):
    def inner(x):
        return x * by
    return inner

twice = scaled(2)

def unrelated(x):
    return x

@once.node
def clean(path: once.File, limit=10):
    with open(path) as file:
        return np.array([helpers.score(line) for line in file], dtype=np.float64)[:limit]

@once.node
def train(data, lr):
    return float(twice(Cleaner().run(data)).sum() * lr + SHIFT)

cleaned = clean(once.File(sys.argv[1] + "/data.txt"))
plan = once.compute(train(cleaned, lr=0.5), store=sys.argv[2], dry_run=True)
print(sum(step.action != "hit" for step in plan.steps), end=" ")
print(once.compute(train(cleaned, lr=0.5), store=sys.argv[2]))
""",
    "helpers.py": """
WEIGHT = 1

def score(line):
    return len(line) * WEIGHT
""",
    "models.py": """
class Base:
    offset = 0.0

    def run(self, x):
        return x + self.offset

class Cleaner(Base):
    pass
""",
    "data.txt": "a\nbb\nccc\n",
}

# Name -> (file, old, new, nodes that must run again).
STALE = {
    "a helper was edited": ("helpers.py", "len(line) * WEIGHT", "len(line) * WEIGHT + 1", 2),
    "a global of an imported module was edited": ("helpers.py", "WEIGHT = 1", "WEIGHT = 2", 2),
    "a closure holds another value": ("main.py", "scaled(2)", "scaled(3)", 1),
    "the code of a closure was edited": ("main.py", "x * by", "x * by + 1", 1),
    "an own global was edited": ("main.py", "SHIFT = 3", "SHIFT = 4", 1),
    "a base class was edited": ("models.py", "offset = 0.0", "offset = 1.0", 1),
    "a parameter changed": ("main.py", "lr=0.5", "lr=0.25", 1),
    "a default changed": ("main.py", "limit=10", "limit=2", 2),
    "a parameter changed its type": ("main.py", "lr=0.5", "lr=np.float32(0.5)", 1),
    "the dtype changed": ("main.py", "np.float64", "np.float32", 2),
    "the data changed": ("data.txt", "ccc", "cccc", 2),
}
HARMLESS = {
    "a comment": ("helpers.py", "def score(line):", "# why\ndef score(line):  # how"),
    "a docstring": ("helpers.py", "def score(line):", 'def score(line):\n    """Score it."""'),
    "an unrelated function": ("main.py", "def unrelated(x):\n    return x", "def other():\n    0"),
    "a blank line": ("models.py", "class Base:", "\n\nclass Base:"),
    "a file was touched": ("data.txt", "a\n", "a\n"),
}


def run(folder, store):
    """Return how many nodes had to run, and the result."""
    done = subprocess.run(
        [sys.executable, "main.py", str(folder), str(store)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(SOURCE), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    count, value = done.stdout.split()
    return int(count), float(value)


def write(folder, edit=None):
    folder.mkdir(exist_ok=True)
    for name, text in FILES.items():
        if edit and edit[0] == name:
            assert edit[1] in text
            text = text.replace(edit[1], edit[2])
        (folder / name).write_text(text)


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    """A store that holds the results of the unedited files, and the value they give."""
    folder = tmp_path_factory.mktemp("project")
    store = tmp_path_factory.mktemp("store")
    write(folder)
    count, value = run(folder, store)
    assert count == 2
    assert run(folder, store) == (0, value)
    return folder, store, value


@pytest.mark.parametrize("name", STALE)
def test_it_is_computed_again_when(known, name, tmp_path):
    folder, store, _ = known
    *edit, num = STALE[name]
    write(folder, edit)
    count, value = run(folder, store)
    assert count == num
    fresh = tmp_path / "fresh"
    assert run(folder, fresh)[1] == value  # what a store without a past gives
    write(folder)


@pytest.mark.parametrize("name", HARMLESS)
def test_it_hits_in_spite_of(known, name):
    folder, store, value = known
    write(folder, HARMLESS[name])
    assert run(folder, store) == (0, value)
    write(folder)


def test_two_versions_of_the_code_at_once_do_not_mix(known, tmp_path):
    folder, store, value = known
    other = tmp_path / "other"
    write(other, STALE["a helper was edited"][:3])
    (other / "data.txt").write_text(FILES["data.txt"])
    versions = {folder: value, other: run(other, tmp_path / "fresh")[1]}
    assert len(set(versions.values())) == 2
    children = {
        path: [
            subprocess.Popen(
                [sys.executable, "main.py", str(path), str(tmp_path / "shared")],
                cwd=path,
                env={**os.environ, "PYTHONPATH": str(SOURCE), "PYTHONDONTWRITEBYTECODE": "1"},
                stdout=subprocess.PIPE,
                text=True,
            )
            for _ in range(2)
        ]
        for path in versions
    }
    for path, group in children.items():
        for child in group:
            out, _ = child.communicate()
            assert child.returncode == 0
            assert float(out.split()[1]) == versions[path]


# ---------------------------------------------------------------- functions that return nodes

CHOOSING = {
    "main.py": """
import sys
import trainonce as once
from branches import left, right, note

@once.node
def choose(path: once.File, flag):
    note("choose")
    return left(path, by=2) if flag else right(path, by=3)

@once.node(version="1")
def choose_declared(path: once.File):
    note("choose_declared")
    return left(path, by=2)

@once.node
def last(x):
    note("last")
    return x + 1

path = once.File(sys.argv[1] + "/data.txt")
which = choose_declared(path) if len(sys.argv) > 3 else choose(path, True)
print(once.compute(last(which), store=sys.argv[2]))
""",
    "branches.py": """
import helpers
import trainonce as once

def note(name):
    with open("calls.log", "a") as file:
        file.write(name + "\\n")

@once.node
def left(path: once.File, by):
    note("left")
    with open(path) as file:
        return helpers.score(file.read()) * by

@once.node
def right(path: once.File, by):
    note("right")
    return by
""",
    "helpers.py": """
import time

def score(text):
    return len(text.strip())
""",
    "data.txt": "abc\n",
}

# Name -> (file, old, new, what is called again, and where the code of `choose` is declared).
CHOICES = {
    "nothing": ("data.txt", "abc\n", "abc\n", "", ""),
    "the code of a branch's helper was edited": (
        "helpers.py", "len(text.strip())", "len(text.strip()) + 1",
        "choose left last", "left last",
    ),
    "an edit of a branch's helper gives the same": (
        "helpers.py", "len(text.strip())", "len(text.strip()) + 0", "choose left", "left",
    ),
    "the file that a branch reads was edited": (
        "data.txt", "abc\n", "abcde\n", "choose left last", "choose_declared left last",
    ),
    "the branch not taken was edited": ("branches.py", "    return by", "    return -by",
                                        "choose", ""),
    "the choice was edited": ("main.py", "by=2) if", "by=4) if", "choose left last", ""),
    "a branch begins to read a clock": (
        "helpers.py", "len(text.strip())", "len(text.strip()) + 0 * time.time_ns()",
        "choose left", "left",
    ),
}  # fmt: skip


def called(folder, store, *, declared=False):
    """Return the functions that were called, and the result."""
    log = folder / "calls.log"
    log.unlink(missing_ok=True)
    done = subprocess.run(
        [sys.executable, "main.py", str(folder), str(store), *(["declared"] if declared else [])],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(SOURCE), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    names = log.read_text().split() if log.exists() else []
    return " ".join(names), int(done.stdout)


@pytest.fixture(scope="module", params=[False, True], ids=["by code", "by version"])
def chosen(request, tmp_path_factory):
    """A store that knows the choice and the branch of the unedited files."""
    folder = tmp_path_factory.mktemp("choosing")
    store = tmp_path_factory.mktemp("store")
    for name, text in CHOOSING.items():
        (folder / name).write_text(text)
    choose = "choose_declared" if request.param else "choose"
    assert called(folder, store, declared=request.param) == (f"{choose} left last", 7)
    return folder, store, request.param


@pytest.mark.parametrize("name", CHOICES)
def test_a_known_choice_is_never_stale_when(chosen, name, tmp_path):
    folder, store, declared = chosen
    file, old, new, by_code, by_version = CHOICES[name]
    assert old in CHOOSING[file]
    (folder / file).write_text(CHOOSING[file].replace(old, new))
    found, value = called(folder, store, declared=declared)
    assert found == (by_version if declared else by_code)
    assert value == called(folder, tmp_path / "fresh", declared=declared)[1]
    (folder / file).write_text(CHOOSING[file])
