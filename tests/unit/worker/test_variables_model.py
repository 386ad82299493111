"""What is taken of a script's variables, against a model that looks at everything each time."""

import re
import sys
from collections import Counter, OrderedDict, defaultdict, deque

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainonce.wire.encoding import decode, encode
from trainonce.worker.state import copy_tree
from trainonce.worker.variables import Variables


class Thing:
    def __init__(self):
        self.count, self.inner = 0, None

    def work(self, call):
        before = self.count
        self.count += 1
        call()
        return before


class Stateful(Thing):
    def state_dict(self):
        return {}


class TooMany(Exception):
    pass


class NotPlain(Exception):
    pass


NUMBERS = (bool, int, float, complex, type(None))
CONTAINERS = (list, tuple, dict, set, Counter, OrderedDict, defaultdict)


class Model:
    """`Variables.take`, said plainly."""

    def __init__(self):
        self.first, self.changed, self.large, self.left_out = {}, {}, {}, set()

    def take(self, frame):
        looks = [(scope, values, {}) for scope, values in surroundings(frame)]
        for scope, values, sizes in looks:
            for name, value in values.items():
                try:
                    size = 0 if type(value) in NUMBERS else size_of(value, 512)
                    if name[:2] != "__":
                        sizes[name] = size
                        if size > 512:
                            raise TooMany
                except NotPlain:
                    continue
                except TooMany:
                    sizes.pop(name, None)
                    self.leave_out(scope, name, value)
        every = [
            (sizes[n], scope, values[n], sizes, n) for scope, values, sizes in looks for n in sizes
        ]
        every.sort(key=lambda each: -each[0])
        while sum(each[0] for each in every) > 512:
            _, scope, value, sizes, name = every.pop(0)
            del sizes[name]
            self.leave_out(scope, name, value)
        found = {}
        for scope, values, sizes in looks:
            present = {name: value for name, value in values.items() if name in sizes}
            first = self.first.setdefault(scope, copy_tree(present))
            changed = self.changed.setdefault(scope, set())
            changed |= {n for n, v in present.items() if not equal(first.get(n, changed), v)}
            found[scope] = copy_tree({n: present[n] for n in sorted(present) if n in changed})
        return [found, sorted(self.left_out)]

    def leave_out(self, scope, name, value):
        if name[:2] == "__":
            return
        if type(value) in CONTAINERS:
            known = (id(value), len(value))
            if scope not in self.first:
                self.large[scope, name] = known
            if self.large.get((scope, name)) == known:
                return
        self.left_out.add(name)


def surroundings(frame):
    for _ in range(8):
        scope, values = f"{frame.f_globals['__name__']}.{frame.f_code.co_qualname}", frame.f_locals
        yield scope, dict(values)
        for name, value in objects(values, 3):
            yield f"{scope}.{name}", vars(value)
        if values is frame.f_globals:
            return
        frame = frame.f_back


def objects(values, deep):
    found = []
    for name, value in values.items():
        inside = {}
        if type(value) is Thing:
            found.append((name, value))
            inside = vars(value)
        if type(value) is dict and len(value) <= 32:
            inside = value
        if type(value) in (list, tuple) and len(value) <= 32 and type((*value, 0)[0]) is Thing:
            inside = {str(index): each for index, each in enumerate(value)}
        if deep and len(found) < 32:
            found += [(f"{name}.{inner}", each) for inner, each in objects(inside, deep - 1)]
    return found[:32]


def size_of(value, limit):
    kind = type(value)
    if kind in NUMBERS:
        return 1
    if kind in (str, bytes) and len(value) <= 4096:
        return 1
    if kind is torch.Tensor and value.numel() <= 64 and not value.requires_grad:
        return 4
    if isinstance(value, np.ndarray | np.generic) and value.size <= 64:
        if value.dtype.kind in "biufc":
            return 4
    if kind not in CONTAINERS:
        raise NotPlain
    if len(value) > limit:
        raise TooMany
    if getattr(value, "default_factory", None) not in (None, int, float, list, dict, set, str):
        raise NotPlain
    if kind not in (list, tuple) and torch.Tensor in map(type, value):
        raise NotPlain
    total = 1
    items = [part for item in value.items() for part in item] if isinstance(value, dict) else value
    for part in items:
        total += size_of(part, limit - total)
        if total > limit:
            raise TooMany
    return total


def equal(one, other):
    if one is other:  # such as a NaN
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


STATEMENTS = """
call()
X = N
X = N / 3
X = N > 4
X = None
X = N * 1j
X = float("nan")
X = "text" * N
X = "text" * N * 500
X = [1, 2.5, "three"]
X = list(range(N * 60))
X = [[N, "n"]] * (N * 25)
X = [N * 0.5 for _ in range(N)]
X = {"k": N, 5: [N]}
X = {N: torch.zeros(N), "k": {"k": N}}
X = set(range(N))
X = {str(i): i for i in range(N * 20)}
X = Counter("abc" * N)
X = OrderedDict(k=N)
X = defaultdict(list, k=[N])
X = defaultdict(lambda: N)
X = torch.tensor(float(N))
X = torch.zeros(N * 10)
X = torch.zeros(N, requires_grad=True)
X = np.arange(N * 10)
X = np.array(["a"])
X = np.float32(N)
X = deque([N])
X = Thing()
X = Stateful()
X = torch.nn.Linear(1, 1)
X = print
X = lambda: Y
X = {"k": Thing(), "l": {"k": Thing()}}
X = Y
X = [Y, N]
X = (Y, N)
X = {"k": Y}
X += 1
X += Y
X.append(N)
X.append(Y)
X.extend([N] * N)
X.add(N)
X.pop()
X.clear()
X.update(k=N, m=Y)
X[torch.tensor(N)] = N
X[0] = N
X[0] += N
X[0].append(N)
X["k"] = N
X["k"] = Y
X["k"].append(N)
X["k"] += N
X["k"].count += 1
X["l"]["k"].count += 1
del X["k"]
X[:] = [N]
X.fill_(N)
X.resize_(N)
X.requires_grad_()
X.count += 1
X.count = Y
X.inner = Y
X.inner.count = N
X.inner.inner = Thing()
X.__hidden = N
X.work(call)
del X.count
del X
again(N % 3)
""".strip().splitlines()

SCRIPT = """
def again(number):
    a = number
    call()
    if number:
        again(number - 1)
        call()

def outer(b):
    a, c = [], 0
{outer}
    def inner(d=(1, 2)):
        nonlocal c
{inner}
        call()
        return lambda: b
    inner()
    call()

class d:
    a = 1

{before}
call()
outer(1)
outer([2])
{after}
call()
"""


NAMES = st.sampled_from("abcd")


@st.composite
def scripts(draw):
    """Draw a script with calls of `call` in frames of its own."""

    def statements(indent, most):
        lines = []
        for text in draw(st.lists(st.sampled_from(STATEMENTS), max_size=most)):
            chosen = {"X": draw(NAMES), "Y": draw(NAMES), "N": str(draw(st.integers(1, 9)))}
            for letter, choice in chosen.items():
                text = re.sub(rf"\b{letter}\b", choice, text)
            lines += [indent + "try:", f"{indent}    {text}", indent + "except Exception: pass"]
        return "\n".join(lines)

    return SCRIPT.format(
        before="a, b, c = 1, 'b', [3]\n" + statements("", 8),
        outer=statements(" " * 4, 8),
        inner=statements(" " * 8, 6),
        after=statements("", 10),
    )


@settings(max_examples=250, deadline=None, derandomize=True)
@given(scripts())
def test_what_is_taken_is_what_has_changed_since_the_first_look(script):
    variables, model, looks = Variables(), Model(), []

    def call():
        frame = sys._getframe(1)
        found, left_out = decode(variables.take(frame).encoded(()))
        taken = [{scope: dict(sorted(found[scope].items())) for scope in found}, left_out]
        looks.append((taken, decode(encode(model.take(frame)))))

    scope = {"__name__": "script", "call": call, "torch": torch, "np": np}
    exec(script, scope | {each.__name__: each for each in (Thing, Stateful, *CONTAINERS, deque)})
    assert len(looks) >= 6
    for taken, expected in looks:
        assert repr(taken) == repr(expected)  # a NaN too
