import copy
import functools
import math
import random
import struct
from collections import Counter, OrderedDict, defaultdict, namedtuple
from enum import IntEnum

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from trainonce.errors import EncodingError
from trainonce.wire.encoding import decode, encode, flatten, unflatten


def same(left: object, right: object) -> bool:
    """Equal in type, value, order and bits."""
    if type(left) is not type(right):
        return False
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and left.shape == right.shape and raw(left) == raw(right)
    if isinstance(left, np.ndarray | np.generic):
        return (
            left.dtype == right.dtype
            and left.shape == right.shape
            and left.tobytes() == right.tobytes()
        )
    if isinstance(left, float):
        return struct.pack("d", left) == struct.pack("d", right)
    if isinstance(left, complex):
        return same(left.real, right.real) and same(left.imag, right.imag)
    if isinstance(left, dict):
        return (
            len(left) == len(right)
            and all(map(same, left.keys(), right.keys()))
            and all(map(same, left.values(), right.values()))
            and getattr(left, "default_factory", 0) is getattr(right, "default_factory", 0)
        )
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, set | frozenset):
        return len(left) == len(right) and all(any(same(a, b) for b in right) for a in left)
    return left == right


def raw(tensor: torch.Tensor) -> bytes:
    dense = tensor.resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
    return dense.reshape(-1).view(torch.uint8).numpy().tobytes()


@st.composite
def scalars(draw: st.DrawFn) -> object:
    return draw(_SCALARS)


@st.composite
def keys(draw: st.DrawFn) -> object:
    return draw(_KEYS)


_SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(63, 700).map(lambda bits: 5 - (1 << bits))
    | st.floats()
    | st.complex_numbers()
    | st.text(st.characters(exclude_categories=()), max_size=5)
    | st.sampled_from(["$", "\ud800\udc00", "\ud800", "", "a"])
    | st.binary(max_size=5)
    | st.sampled_from([torch.float32, torch.bfloat16, torch.device("cpu"), torch.device("cuda", 1)])
    | st.just(torch.Size([2, 3]))
)
_KEYS = st.recursive(
    scalars(), lambda key: st.lists(key, max_size=2).map(tuple) | st.frozensets(key, max_size=2)
)
DTYPES = [
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.bool,
    torch.uint8, torch.int64, torch.complex64, torch.complex128, torch.uint16,
]  # fmt: skip


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    dtype = draw(st.sampled_from(DTYPES))
    count = math.prod(shape) * dtype.itemsize
    data = draw(st.binary(min_size=count, max_size=count))
    if dtype == torch.bool:
        data = bytes(byte & 1 for byte in data)
    if not count:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(data), dtype=dtype).reshape(shape)


TREES = st.recursive(
    scalars() | tensors(),
    lambda tree: (
        st.lists(tree, max_size=4)
        | st.lists(tree, max_size=4).map(tuple)
        | st.dictionaries(st.text(max_size=3), tree, max_size=4)
        | st.dictionaries(keys(), tree, max_size=4)
        | st.dictionaries(keys(), tree, max_size=4).map(OrderedDict)
        | st.dictionaries(keys(), tree, max_size=4).map(lambda pairs: defaultdict(list, pairs))
        | st.sets(keys(), max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(TREES)
def test_any_supported_tree_comes_back_equal_in_type_order_and_bits(value: object) -> None:
    assert same(decode(encode(value)), value)


@settings(max_examples=100, deadline=None)
@given(TREES)
def test_a_flattened_tree_is_json_and_comes_back_with_the_very_same_tensors(value: object) -> None:
    tree, found = flatten(value)
    again = unflatten(tree, found)
    assert same(again, value)
    assert [tensor.data_ptr() for tensor in flatten(again)[1]] == [t.data_ptr() for t in found]


def test_equal_values_give_equal_bytes_whatever_order_a_set_was_filled_in() -> None:
    names = [f"name{i}" for i in range(50)]
    shuffled = random.Random(1).sample(names, 50)
    assert encode({"seen": set(names)}) == encode({"seen": set(shuffled)})


@pytest.mark.parametrize(
    "value",
    [
        Counter({"a": 3, 4: 1}),
        defaultdict(None, {1: 2}),
        defaultdict(dict, {0: {"step": torch.tensor(3.0)}}),
        np.float32(1.5),
        np.int64(-3),
        np.bool_(True),
        np.str_("text"),
        np.datetime64("2020-01-02"),
        np.arange(6, dtype=">i4").reshape(2, 3),
        np.arange(12.0).reshape(3, 4)[:, ::2],
        np.asfortranarray(np.ones((2, 3))),
        np.array(2.5),
        np.empty((0, 3)),
        np.array(["ab", "c"]),
        torch.arange(24).reshape(4, 6)[1:3, ::2],
        torch.arange(6.0).reshape(2, 3).T,
        torch.tensor([1 + 2j]).conj(),
        torch.tensor([1 + 2j]).conj().imag,
        torch.tensor(7),
        torch.ones(2, 3).expand(4, 2, 3),
        np.random.RandomState(3).get_state(),
        random.Random(5).getstate(),
        float("nan"),
        struct.unpack(">d", bytes.fromhex("7ff0000000000001"))[0],
        -0.0,
        5e-324,
        1 << 70000,
        {"$": {"$": "tuple", "v": []}},
        {True: 1, 2: "two"},
        "x" * 100_000,
    ],
    ids=lambda value: type(value).__name__,
)
def test_values_of_the_scientific_stack_come_back_exactly(value: object) -> None:
    assert same(decode(encode(value)), value)


def test_optimizer_and_scheduler_state_comes_back_and_loads() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedulers = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step),
        torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10),
        torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer),
        torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 5]),
        torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=20),
    ]
    model(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    for part in (model, optimizer, torch.amp.GradScaler("cpu"), *schedulers):
        state = part.state_dict()
        again = decode(encode(state))
        assert same(again, state)
        part.load_state_dict(again)
    assert decode(encode(model.state_dict()))._metadata == model.state_dict()._metadata


def test_a_parameter_becomes_its_plain_tensor() -> None:
    again = decode(encode(torch.nn.Parameter(torch.ones(2))))
    assert type(again) is torch.Tensor
    assert not again.requires_grad


def test_decoded_tensors_are_writable_and_do_not_alias_the_bytes() -> None:
    data = encode([torch.zeros(3), torch.zeros(3)])
    first, second = decode(data)
    first += 1
    assert second.tolist() == [0, 0, 0]
    assert decode(data)[0].tolist() == [0, 0, 0]


class Colour(IntEnum):
    RED = 1


Point = namedtuple("Point", "x y")
LOOP: list[object] = []
LOOP.append(LOOP)


@pytest.mark.parametrize(
    ("value", "path", "hint"),
    [
        ({"sched": {"lr_lambdas": [lambda step: step]}}, "sched.lr_lambdas[0]: a lambda", ""),
        ({"a": ({"b c": same},)}, "a[0]['b c']: a function", ""),
        ({3: object()}, "[3]: a value of type builtins.object", "state_dict"),
        (functools.partial(same, 1), "the value: a value of type functools.partial", ""),
        ({"p": Point(1, 2)}, "p: the named tuple Point", "_asdict"),
        ([1, Colour.RED], "[1]: a value of type", ""),
        ({"model": torch.nn.Linear(1, 1)}, "model: a value of type torch.nn", "state_dict()"),
        ({"x": {torch.ones(1): 1}}, "x[tensor([1.])]: a tensor as a key", ""),
        ({"x": [np.array([object()])]}, "x[0]: NumPy data of dtype object", ""),
        ({"x": torch.eye(2).to_sparse()}, "x: a tensor without plain bytes", "dense"),
        ({"x": torch.empty(2, device="meta")}, "x: a tensor without plain bytes", ""),
        ({"x": defaultdict(lambda: 1)}, "x: a defaultdict of a lambda", "builtin"),
        ({"x": int}, "x: the class int", ""),
        ({"x": {object()}}, "x: a value of type builtins.object", ""),
        (LOOP, "contains itself", "cycle"),
    ],
)  # fmt: skip
def test_what_has_no_encoding_is_refused_by_its_path(value: object, path: str, hint: str) -> None:
    with pytest.raises(EncodingError) as caught:
        encode(value)
    assert path in caught.value.message
    assert hint in str(caught.value.hint)


GOLDEN_VALUE = {
    "step": 3,
    "lr": 0.1,
    "state": {0: {"exp_avg": torch.tensor([1.0, -2.0])}},
    "none": (None, True, b"\x00\xff", float("inf"), 1 << 64),
    "rows": np.array([[1, 2]], dtype="<i2"),
}
GOLDEN_XXH3 = "5372ededbaf71260"
GOLDEN_HEAD = "5431450a01000000"


def test_the_bytes_of_format_1_do_not_change() -> None:
    data = encode(GOLDEN_VALUE)
    assert data[:8].hex() == GOLDEN_HEAD
    assert len(data) == 520
    assert xxhash.xxh3_64_hexdigest(data) == GOLDEN_XXH3


def test_another_format_version_is_refused_with_a_hint() -> None:
    data = bytearray(encode(1))
    data[4] = 2
    with pytest.raises(EncodingError, match="format 2.*format 1"):
        decode(data)


def test_every_flipped_bit_and_every_cut_is_seen() -> None:
    data = encode(GOLDEN_VALUE)
    for position in range(len(data)):
        damaged = bytearray(data)
        damaged[position] ^= 1 << (position % 8)
        with pytest.raises(EncodingError):
            decode(damaged)
        with pytest.raises(EncodingError):
            decode(data[:position])
    with pytest.raises(EncodingError):
        decode(data + b"\0")


@settings(max_examples=200, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=3),
        lambda tree: (
            st.lists(tree, max_size=3)
            | st.builds(
                lambda tag, v: {"$": tag, "v": v},
                st.sampled_from(
                    ["tuple", "set", "dict", "tensor", "ndarray", "dtype", "bytes", "no"]
                ),
                tree,
            )
        ),
        max_leaves=6,
    )
)
def test_a_forged_tree_gives_a_plain_value_or_an_error_of_ours(tree: object) -> None:
    try:
        value = unflatten(copy.deepcopy(tree), [])
    except EncodingError:
        return
    flatten(value)


def test_a_forged_dtype_name_reaches_no_other_attribute_of_torch() -> None:
    with pytest.raises(EncodingError, match="no dtype"):
        unflatten({"$": "dtype", "v": "load"}, [])
