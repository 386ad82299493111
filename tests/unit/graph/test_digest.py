"""Digests are equal for equal values, different for different ones, and pinned."""

import copy
import dataclasses
import datetime
import enum
import json
import subprocess
import sys
from collections import OrderedDict, namedtuple
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainonce.errors import UnhashableError
from trainonce.graph.codecs import encode
from trainonce.graph.digest import checksum, combine, digest, digest_bytes, digest_file, register

GOLDEN = json.loads((Path(__file__).parent / "golden_digests.json").read_text())
Pair = namedtuple("Pair", "a b")


class Color(enum.Enum):
    RED = 1
    BLUE = 2


@dataclasses.dataclass
class Config:
    width: int
    name: str = "x"


class Slotted:
    __slots__ = ("a",)

    def __init__(self, a):
        self.a = a


def golden_values():
    """Values whose digests are part of the format: docs/graph-format.md."""
    return {
        "none": None,
        "true": True,
        "int": 12345678901234567890,
        "negative": -1,
        "float": 1.5,
        "nan": float("nan"),
        "complex": 1 - 2j,
        "str": "é\n",
        "bytes": b"\x00\xff",
        "list": [1, "a", None],
        "tuple": (1, (2,)),
        "dict": {"a": 1, "b": [2.0]},
        "set": {3, 1, 2},
        "array": np.arange(6, dtype="<f4").reshape(2, 3),
        "scalar": np.float32(0.5),
        "tensor": torch.arange(4, dtype=torch.bfloat16),
        "date": datetime.date(2020, 2, 29),
    }


@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_digest_of_the_format_is_pinned(name):
    assert digest(golden_values()[name]) == GOLDEN[name]


def test_the_action_key_is_pinned():
    parts = [("argument x", "0" * 64), ("node", "1" * 64)]
    assert combine("action-1", parts) == (
        "a3b065ee20b9e1f8beaa7bffc607791a490d7da2e4c20aecfd87a7237532c80b"
    )


def test_the_encoding_of_a_blob_is_pinned():
    tree = b'["dict",["a",["array","<i2",[2],4]]]'
    head = b"TRAINONCE-BLOB-1" + len(tree).to_bytes(8, "little") + tree
    padding = b"\0" * (-len(head) % 64)
    assert encode({"a": np.arange(2, dtype="<i2")}) == head + padding + b"\0\0\1\0"


def test_every_pinned_value_has_a_golden_digest():
    assert set(golden_values()) == set(GOLDEN)


def test_values_that_differ_have_different_digests():
    base = np.arange(6.0)
    values = [
        None, True, False, 0, 1, -1, 255, 256, -256, 0.0, -0.0, 1.0, "1", b"1", bytearray(b"1"),
        "", b"", [], (), {}, set(), frozenset(), [1], (1,), {1}, frozenset({1}), [[1]], [1, []],
        {1: 2}, {2: 1}, {"a": 1, "b": 2}, {"b": 2, "a": 1}, 1j, range(3), range(0, 3, 2),
        slice(1, 2), (1, 2), Path("a"), "a",
        base, base.astype("f4"), base.reshape(2, 3), base.reshape(3, 2), base[:0], base.tolist(),
        torch.arange(6.0), torch.arange(6.0).double(), torch.arange(6.0, requires_grad=True),
        torch.nn.Parameter(torch.arange(6.0)), np.float32(1), np.float64(1),
        np.ma.masked_array(base, mask=[1, 0, 0, 0, 0, 0]), OrderedDict(a=1),
        pa.table({"a": [1]}), pa.table({"a": [2]}), torch.float32, np.dtype("f4"),
    ]  # fmt: skip
    digests = [digest(value) for value in values]
    assert len(set(digests)) == len(digests)


def test_layout_of_an_array_is_not_part_of_its_digest():
    array = np.arange(24, dtype=np.int16).reshape(4, 6)
    assert digest(np.asfortranarray(array)) == digest(array)
    assert digest(array[::2, ::3]) == digest(array[::2, ::3].copy())
    tensor = torch.from_numpy(array)
    assert digest(tensor.T) == digest(tensor.T.contiguous())
    z = torch.randn(3, dtype=torch.complex64)
    assert digest(z.conj()) == digest(z.conj().clone().resolve_conj())


def test_set_order_does_not_matter_and_processes_agree():
    program = (
        "from trainonce.graph.digest import digest; print(digest({str(i) for i in range(50)}))"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert outputs == {digest({str(i) for i in range(50)}) + "\n"}


@pytest.mark.parametrize(
    ("value", "path"),
    [
        ({"a": [1, iter([2])]}, "value['a'][1]"),
        ([torch.zeros(2).to_sparse()], "value[0]"),
        (torch.zeros(2, requires_grad=True) * 2, "value"),
        (iter([1]), "value"),
    ],
)
def test_what_has_no_digest_is_named(value, path):
    with pytest.raises(UnhashableError) as caught:
        digest(value)
    assert caught.value.path == path
    assert path in str(caught.value)


def test_a_value_that_contains_itself_is_refused():
    loop: list = []
    loop.append(loop)
    with pytest.raises(UnhashableError, match="contains itself"):
        digest(loop)


def test_a_subclass_of_a_builtin_is_not_taken_for_its_base():
    class Odd(dict):
        pass

    with pytest.raises(UnhashableError):
        digest(Odd(a=1))


def test_gradients_count_since_an_optimizer_would_read_them():
    a, b = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    b.sum().backward()
    assert digest(a) != digest(b)


def test_everything_that_decides_what_a_module_computes_counts():
    def build():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return torch.nn.Sequential(
                torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3), torch.nn.Dropout(0.5)
            )

    def changed(change):
        module = build()
        change(module)
        return digest(module)

    def buffer(module):
        module[1].running_mean += 1

    changes = [
        lambda m: None,
        buffer,
        lambda m: m[0].weight.data.mul_(2),
        lambda m: m[0].weight.data.neg_(),
        lambda m: m.eval(),
        lambda m: m[2].eval(),
        lambda m: setattr(m[2], "p", 0.25),
        lambda m: setattr(m[1], "eps", 1e-3),
        lambda m: m[0].requires_grad_(False),
        lambda m: m.append(torch.nn.ReLU()),
        lambda m: m.half(),
        lambda m: m[0].register_forward_hook(lambda module, args, out: out * 2),
        lambda m: m[0].register_buffer("scale", torch.ones(1)),
    ]
    digests = [changed(change) for change in changes]
    assert digests[0] == digest(build())
    assert len(set(digests)) == len(digests)


def test_registered_types_have_a_digest():
    class Source:
        __slots__ = ("inner", "name")

        def __init__(self, name):
            self.name, self.inner = name, iter([])

    register(Source, lambda source: source.name)
    assert digest(Source("a")) == digest(Source("a")) != digest(Source("b"))


def test_digest_of_a_file_is_that_of_its_bytes(tmp_path):
    data = bytes(range(256)) * 9000
    (tmp_path / "f").write_bytes(data)
    assert digest_file(tmp_path / "f") == digest_bytes(data)
    assert digest_bytes(data, key=b"k" * 32) != digest_bytes(data)
    assert digest_file(tmp_path / "f", key=b"k" * 32) == digest_bytes(data, key=b"k" * 32)
    assert checksum(data) != checksum(data[:-1])


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.tuples(inner) | st.dictionaries(st.text(), inner),
    max_leaves=12,
)


@given(plain, plain)
def test_equal_representation_means_equal_digest(a, b):
    assert (digest(a) == digest(b)) == (repr(a) == repr(b))


def test_copying_an_object_leaves_the_digest_of_its_class():
    @dataclasses.dataclass
    class Fresh:
        a: int

    before = digest(Fresh(1)), digest(Fresh)
    copy.copy(Fresh(1))
    assert "__slotnames__" in vars(Fresh)  # what the copy left there
    assert (digest(Fresh(1)), digest(Fresh)) == before
