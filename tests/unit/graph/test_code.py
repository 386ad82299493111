"""What a change of code does to a fingerprint: every real one shows, no harmless one does."""

import importlib
import importlib.metadata
import sys
import textwrap

import numpy as np
import pytest

from trainonce.errors import UnhashableError
from trainonce.graph import packages
from trainonce.graph.code import fingerprint
from trainonce.graph.packages import origin_of

BASE = {
    "main": """
        import math
        import helpers
        from helpers import scale as resize
        from models import Child

        LIMIT = 3
        TABLE = {"double": lambda x: x * 2}

        def make(k):
            def inner(x):
                return x + k
            return inner

        adder = make(5)

        def unrelated(x):
            return x

        def root(x, default=7, *, key="a"):
            child = Child()
            steps = [helpers.clean(x), resize(x), TABLE["double"](x), adder(x)]
            return child.run(math.sqrt(LIMIT)), steps
    """,
    "helpers": """
        from deep import floor as bottom

        FACTOR = 2

        def clean(x):
            return bottom(x) + 1

        def scale(x):
            return x * FACTOR

        def never_reached(x):
            return x
    """,
    "deep": """
        def floor(x):
            return x // 1
    """,
    "models": """
        class Parent:
            size = 4
            def run(self, x):
                return self.help(x)
            def help(self, x):
                return x

        class Child(Parent):
            @property
            def name(self):
                return "child"
            @staticmethod
            def make():
                return Child()
    """,
}


@pytest.fixture
def project(tmp_path, monkeypatch):
    """Return a function that writes the modules and returns the fingerprint of `main.root`."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def take(files, root="root", *, edits=()):
        files = {name: textwrap.dedent(text) for name, text in files.items()}
        for name, old, new in edits:
            assert old in files[name], f"the edit does not apply: {old!r} in {name}"
            files[name] = files[name].replace(old, new)
        for name, text in files.items():
            (tmp_path / f"{name}.py").write_text(text)
            sys.modules.pop(name, None)
        importlib.invalidate_caches()
        origin_of.cache_clear()
        return fingerprint(getattr(importlib.import_module("main"), root))

    yield take
    for name in ("main", "helpers", "deep", "models"):
        sys.modules.pop(name, None)


STALE = {
    "helper edited": ("helpers", "bottom(x) + 1", "bottom(x) + 1000"),
    "helper of a helper edited": ("deep", "x // 1", "x // 2"),
    "imported under another name": ("helpers", "x * FACTOR", "x * FACTOR + 1"),
    "global of a helper": ("helpers", "FACTOR = 2", "FACTOR = 3"),
    "own global": ("main", "LIMIT = 3", "LIMIT = 4"),
    "global of another type": ("main", "LIMIT = 3", "LIMIT = 3.0"),
    "closure value": ("main", "make(5)", "make(6)"),
    "code in a closure": ("main", "x + k", "x - k"),
    "function in a registry": ("main", "x * 2", "x * 20"),
    "default": ("main", "default=7", "default=8"),
    "keyword default": ("main", 'key="a"', 'key="b"'),
    "method of a base class": ("models", "return x\n", "return -x\n"),
    "property": ("models", '"child"', '"kid"'),
    "static method": ("models", "return Child()\n", "return Child\n"),
    "class attribute": ("models", "size = 4", "size = 5"),
    "base class gone": ("models", "class Child(Parent)", "class Child(object)"),
    "library function": ("main", "math.sqrt", "math.floor"),
    "constant of another type": ("deep", "x // 1", "x // 1.0"),
    "constant sign": ("helpers", "bottom(x) + 1", "bottom(x) + -1"),
}
HARMLESS = {
    "comment": ("helpers", "def clean(x):", "# a comment\n\n\ndef clean(x):  # another"),
    "docstring": ("deep", "def floor(x):", 'def floor(x):\n    """Say what it does."""'),
    "class docstring": ("models", "class Parent:", 'class Parent:\n    """Words."""\n'),
    "module docstring": ("helpers", "from deep", '"""Words."""\nfrom deep'),
    "unrelated function": (
        "main",
        "def unrelated(x):\n    return x",
        "def unrelated(x):\n    pass",
    ),
    "unreached function of a helper": ("helpers", "never_reached(x)", "never_reached(x, y=1)"),
    "new function": ("helpers", "FACTOR = 2", "FACTOR = 2\ndef new():\n    pass\n"),
    "formatting": ("deep", "return x // 1", "return (\n        x // 1\n    )"),
}


@pytest.mark.parametrize("name", STALE)
def test_a_real_edit_changes_the_fingerprint(project, name):
    assert project(BASE).digest != project(BASE, edits=[STALE[name]]).digest


@pytest.mark.parametrize("name", HARMLESS)
def test_a_harmless_edit_does_not(project, name):
    assert project(BASE).digest == project(BASE, edits=[HARMLESS[name]]).digest


def test_the_changed_part_is_named_with_its_place(project):
    before = project(BASE)
    after = project(BASE, edits=[STALE["helper edited"]])
    changed = {name for name in before.parts if before.parts[name] != after.parts.get(name)}
    assert changed == {"helpers.clean"}
    assert after.places["helpers.clean"] == "helpers.py:6"


def test_getattr_widens_to_the_module_and_what_it_imports(project):
    files = {
        **BASE,
        "main": "import helpers\ndef root(x):\n    return getattr(helpers, 'cle' + 'an')(x)\n",
    }
    base = project(files)
    assert any("all of main counts" in note for note in base.notes)
    for edit in (
        ("helpers", "bottom(x) + 1", "bottom(x) + 2"),
        ("deep", "x // 1", "x // 2"),
        ("helpers", "never_reached(x)", "never_reached(x, y=1)"),
    ):
        assert project(files, edits=[edit]).digest != base.digest
    harmless = ("helpers", "def clean(x):", "def clean(x):\n    # why\n")
    assert project(files, edits=[harmless]).digest == base.digest


LIVE = {
    "getattr of a module": "import deep\ndef root(name): return getattr(deep, name)",
    "a module in a container": "import deep\nALL = [deep]\ndef root(): return ALL[0].VALUE",
    "a module's dictionary": "import deep\ndef root(name): return deep.__dict__[name]",
    "a module as a default": "import deep\ndef root(module=deep): return module.VALUE",
}
LIVE_OWN = {
    "globals": "VALUE = [1]\ndef root(name): return globals()[name]",
    "sys.modules": "import sys\nVALUE = [1]\ndef root(): return sys.modules[__name__].VALUE",
}


@pytest.mark.parametrize("name", [*LIVE, *LIVE_OWN])
def test_of_a_module_used_as_a_value_its_globals_count_as_they_are_now(project, name):
    own = name in LIVE_OWN
    files = {"deep": "VALUE = [1]\n", "main": LIVE_OWN[name] if own else LIVE[name]}
    before = project(files)
    sys.modules["main" if own else "deep"].VALUE[0] = 2
    assert fingerprint(sys.modules["main"].root).digest != before.digest


def test_modules_looked_up_by_name_leave_no_fingerprint(project):
    for text in (
        "import sys\ndef root(): return sys.modules['deep'].floor(1)",
        "from sys import modules as m\ndef root(): return m['deep'].floor(1)",
    ):
        with pytest.raises(UnhashableError, match=r"sys\.modules at main\.py:2"):
            project({**BASE, "main": text})


def test_classes_found_by_their_base_leave_no_fingerprint(project):
    text = "from models import Parent\ndef root():\n    return Parent.__subclasses__()\n"
    with pytest.raises(UnhashableError, match=r"__subclasses__ in main\.py:2 reaches code"):
        project({**BASE, "main": text})


def test_implementations_of_a_generic_function_count(project):
    text = """
        import functools
        @functools.singledispatch
        def area(x):
            return 0
        @area.register
        def _(x: int):
            return x + 1
        def root(x):
            return area(x)
    """
    before = project({"main": text})
    sys.modules["main"].root(3)
    assert fingerprint(sys.modules["main"].root).digest == before.digest
    for edit in (("main", "x + 1", "x + 2"), ("main", "return 0", "return 1")):
        assert project({"main": text}, edits=[edit]).digest != before.digest


def test_star_imports_are_followed(project):
    files = {**BASE, "main": "from helpers import *\ndef root(x):\n    return clean(x)\n"}
    assert project(files).digest != project(files, edits=[STALE["helper edited"]]).digest


def test_imports_within_a_function_are_followed(project):
    for line in (
        "import helpers; return helpers.clean(x)",
        "import helpers as h; return h.clean(x)",
        "from helpers import clean; return clean(x)",
        "from helpers import clean as c; return [c(y) for y in x]",
    ):
        files = {**BASE, "main": f"def root(x):\n    {line}\n"}
        assert project(files).digest != project(files, edits=[STALE["helper edited"]]).digest


def test_code_run_by_a_name_known_only_at_run_time_has_no_fingerprint(project):
    files = {**BASE, "main": "def root(x):\n    return eval(x)\n"}
    with pytest.raises(UnhashableError, match="eval"):
        project(files)


def test_a_global_without_a_digest_is_refused_and_named(project):
    files = {**BASE, "main": "SOURCE = iter([1])\ndef root():\n    return next(SOURCE)\n"}
    with pytest.raises(UnhashableError, match=r"SOURCE.*main\.py:3"):
        project(files)


def test_a_file_edited_after_its_import_is_not_mistaken_for_what_runs(project, tmp_path):
    before = project(BASE)
    text = (tmp_path / "helpers.py").read_text()
    (tmp_path / "helpers.py").write_text(text.replace("+ 1", "+ 2"))
    assert fingerprint(sys.modules["main"].root).digest == before.digest

    files = {**BASE, "main": "import helpers\ndef root(x):\n    return vars(helpers)\n"}
    project(files)
    (tmp_path / "helpers.py").write_text(text.replace("+ 1", "+ 2"))
    with pytest.raises(UnhashableError, match="edited after it was imported"):
        fingerprint(sys.modules["main"].root)


def test_an_upgraded_library_changes_the_fingerprint(project, monkeypatch):
    files = {**BASE, "main": "import numpy as np\ndef root(x):\n    return np.concatenate(x)\n"}
    before = project(files)
    assert before.parts["package numpy"] == np.__version__
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "99.0")
    packages._package.cache_clear()
    assert project(files).digest != before.digest
    packages._package.cache_clear()


def test_functions_made_at_run_time_have_a_fingerprint():
    def make(text):
        scope = {"__name__": "made"}
        exec(text, scope)
        return fingerprint(scope["f"]).digest

    assert make("def f(x): return x") == make("def f(x):\n  # c\n  return x")
    assert make("def f(x): return x") != make("def f(x): return x + 1")


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from time import time as now\ndef root(): return now()", "time.time reads a clock"),
        ("def root():\n import time\n return time.time()", "time.time reads a clock"),
        ("import datetime as d\ndef root(): return d.datetime.now()", "datetime.datetime.now"),
        ("import os\ndef root(): return os.environ['A']", "os.environ reads the environment"),
        ("import os\ndef help(): return os.urandom(4)\ndef root(): return help()", "urandom"),
        ("import uuid\ndef root(): return uuid.uuid4()", "uuid.uuid4 reads entropy"),
        ("from os import environ as e\ndef root(): return e['A']", "os.environ reads"),
        ("import time\ndef root(now=time.time): return now()", "time.time reads a clock, by way"),
        ("import time\nNOW = [time.time]\ndef root(): return NOW[0]()", "time.time reads a clock"),
        ("import numpy as np\ndef root(): return np.random.default_rng()", "unseeded"),
        ("import numpy as np\ndef root(): return np.random.default_rng(None)", "unseeded"),
        ("import numpy as np\ndef root(): return np.random.RandomState(seed=None)", "unseeded"),
        ("import random\ndef root(): return random.Random().random()", "unseeded"),
        ("import random\ndef root(): return random.Random(None).random()", "unseeded"),
        ("def root(g): return g.seed()", "seed() draws entropy at main.py:1"),
        ("import os\ndef root(): return os.path.expandvars('$A')", "the environment"),
    ],
)
def test_clocks_entropy_environment_and_unseeded_generators_are_seen(project, source, found):
    assert any(found in reason for reason in project({"main": source}).impure)


def test_seeded_generators_sleep_and_prints_are_not_impure(project):
    source = """
        import random, time
        import numpy as np
        def root():
            time.sleep(0)
            print("x")
            return np.random.default_rng(3).random() + random.Random(5).random()
    """
    assert project({"main": source}).impure == []


COUNTING = """
    import queue
    CALLS, SEEN, TABLE, DONE = [], set(), {"n": 0}, queue.Queue()
    number = 0

    def note(x):
        global number
        number += 1
        CALLS.append((x, [x]))
        TABLE["n"] += 1
        DONE.put(x)

    def make():
        calls = []
        def root(x):
            note(x)
            SEEN.add(x)
            calls.append(x)
            return x
        return root

    root = make()
"""


def test_what_is_only_added_to_cannot_reach_the_result(project):
    before = project({"main": COUNTING})
    sys.modules["main"].root(3)
    assert fingerprint(sys.modules["main"].root).digest == before.digest


CLASS_COUNTER = """
    class Model:
        calls, seen = 0, []
        def run(self, x):
            type(self).calls += 1
            Model.seen.append(x)
            return x
    def root(x):
        return Model().run(x)
"""


def test_a_counter_in_a_class_counts_only_where_it_is_read(project):
    for read, counts in (("x", False), ("self.calls", True), ("len(Model.seen)", True)):
        before = project({"main": CLASS_COUNTER.replace("return x\n", f"return {read}\n")})
        sys.modules["main"].root(3)
        assert (fingerprint(sys.modules["main"].root).digest != before.digest) is counts


@pytest.mark.parametrize(
    "read",
    [
        "len(CALLS)", "CALLS[-1]", "TABLE['n']", "number", "SEEN.add(x) or SEEN", "list(CALLS)",
        "[CALLS.append(x), CALLS]", "CALLS.append(x) or CALLS.pop()",
    ],
)  # fmt: skip
def test_what_is_also_read_can(project, read):
    text = COUNTING.replace("return x\n", f"return {read}\n")
    before = project({"main": text})
    sys.modules["main"].root(3)
    assert fingerprint(sys.modules["main"].root).digest != before.digest


def test_a_value_stored_elsewhere_is_read(project):
    text = """
        SOURCE, OUT = {"a": 1}, {}
        def root(x):
            x["a"] = SOURCE["a"]
            OUT["a"] = SOURCE
            return x
    """
    before = project({"main": text})
    sys.modules["main"].SOURCE["a"] = 2
    assert fingerprint(sys.modules["main"].root).digest != before.digest


def test_a_module_that_a_closure_holds_counts_like_a_global_one():
    import time as clock

    def read():
        return clock.time()

    def through():
        return read()

    for function in (read, through):
        assert any("time.time reads a clock" in reason for reason in fingerprint(function).impure)
