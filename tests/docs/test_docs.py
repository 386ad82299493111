"""The docs name everything there is, and nothing that is not."""

import re
from pathlib import Path

import pytest

import trainonce
from trainonce import events, settings
from trainonce.cli.main import COMMANDS

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
TEXT = "\n".join(page.read_text() for page in PAGES)
GUARANTEE = re.compile(r"`((?:unit|process|docs)/[\w/]+\.py)::(test_\w+)`")


def test_every_command_is_documented():
    assert [name for name in COMMANDS if f"trainonce {name}" not in TEXT] == []


def test_every_public_name_is_documented():
    assert [name for name in trainonce.__all__ if f"trainonce.{name}" not in TEXT] == []


def test_every_public_member_of_run_is_documented():
    page = (ROOT / "docs/api.md").read_text()
    members = [name for name in vars(trainonce.Run) if not name.startswith("_")]
    assert members
    assert [name for name in [*members, "state", "seed"] if f"run.{name}" not in page] == []


def test_every_event_is_documented():
    page = (ROOT / "docs/reference.md").read_text()
    assert [kind for kind in events._KINDS if f"`{kind}`" not in page] == []


def test_every_variable_is_documented():
    page = (ROOT / "docs/reference.md").read_text()
    assert [var.name for var in settings.ALL if f"`{var.name}`" not in page] == []


def test_every_test_that_proves_a_guarantee_exists():
    linked = GUARANTEE.findall((ROOT / "docs/protocol.md").read_text())
    assert len(linked) > 20
    missing = [
        f"{path}::{name}"
        for path, name in linked
        if f"def {name}(" not in (ROOT / "tests" / path).read_text()
    ]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_to_a_file_leads_somewhere(page):
    targets = re.findall(r"\]\((?!https?://)([^)#]+)", page.read_text())
    assert [each for each in targets if not (page.parent / each).exists()] == []


def test_every_page_is_in_the_index():
    index = (ROOT / "docs/index.md").read_text()
    pages = [page.name for page in (ROOT / "docs").glob("*.md") if page.name != "index.md"]
    assert [name for name in pages if f"({name})" not in index] == []
