"""Names of samples: pinned, equal for equal content, and watched for randomness."""

import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from trainonce.errors import DataError
from trainonce.graph.features import samples, segments
from trainonce.graph.features.selection import Call, Selection, as_tensors

ROOT = Path(__file__).parents[3]


def named(*args, **kwargs):
    return samples.content_digest(as_tensors(Call(args, kwargs)))


def test_digests_are_pinned():
    """A change of one of these orphans every store: bump `sample-1` instead."""
    assert named(torch.arange(3.0)).hex() == "2b59f84fefc84c797432f3521fa471e3"
    assert named(torch.tensor(7), scale=2.5).hex() == "898fdf80ed49ca0a4c4ca152a1291b7f"
    assert (
        samples.named_digests("space", ["a", ("b", 1)]).tobytes().hex()
        == "96de928e456bc65483398610be008ad0a142a8cc04a88738781089378c6ac941"
    )
    assert (
        samples.derived(samples.named_digests("", ["a"]), "x").tobytes().hex()
        == "72f410b9274adeeb9529d01c992704d9"
    )
    row = np.arange(8, dtype=np.uint8)
    assert segments.row_checksum(b"0123456789abcdef", [row]) == 783385991460211451


def test_equal_content_has_one_name_in_any_container():
    x = torch.randn(5, 2, 3)
    by_row = [named(row) for row in x]
    assert samples.array_digests([("0", x)]).tolist() == [name.rstrip(b"\0") for name in by_row]
    assert [named(row.numpy()) for row in x] == by_row
    assert named(x.transpose(1, 2)[0].transpose(0, 1)) == by_row[0], "strides do not count"


def test_dtype_shape_values_and_argument_names_count():
    x = torch.zeros(6)
    names = [named(x), named(x.double()), named(x.view(2, 3)), named(x + 1), named(a=x),
             named(b=x), named(x, x), named(x, a=x)]  # fmt: skip
    assert len(set(names)) == len(names)


def test_drawing_from_any_global_generator_is_noticed():
    for draw in (random.random, np.random.rand, lambda: torch.rand(1)):
        with pytest.raises(DataError, match="random numbers"):
            with samples.no_randomness("it"):
                draw()
    with samples.no_randomness("it"):
        np.random.default_rng(0).random()


def test_seeded_draws_repeat_and_leave_the_generators_as_they_were():
    before = samples.generator_states()
    draws = []
    for seed in (b"a", b"a", b"b"):
        with samples.seeded(seed):
            draws.append((random.random(), float(np.random.rand()), float(torch.rand(1))))
    assert samples.generator_states() == before
    assert draws[0] == draws[1]
    assert all(one != other for one, other in zip(draws[0], draws[2], strict=True))


@pytest.mark.parametrize(
    ("inputs", "sample", "rest", "joined"),
    [
        (None, ("x", "y"), ("y",), ("F", "y")),
        (None, 3.0, None, "F"),
        (1, ("m", "x", "y"), ("m", "y"), ("m", "F", "y")),
        (-1, ("m", "x"), ("m",), ("m", "F")),
        ([0, 2], ("x", "y", "z"), ("y",), ("F", "y")),
        ("x", {"x": 1, "y": 2}, {"y": 2}, {"y": 2, "features": "F"}),
        ({"a": "x"}, {"x": 1}, {}, {"features": "F"}),
    ],
)
def test_features_take_the_place_of_inputs(inputs, sample, rest, joined):
    selection = Selection(inputs)
    assert selection.split(sample)[1] == rest
    assert selection.join("F", rest) == joined


def test_the_program_in_the_docs_runs_and_finds_its_rows_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TRAINONCE_HOME", str(tmp_path))
    monkeypatch.delenv("TRAINONCE_STORE", raising=False)
    page = (ROOT / "docs" / "features.md").read_text()
    (program,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    for _ in range(2):
        exec(compile(program, "docs/features.md", "exec"), {})
    assert capsys.readouterr().out == "300 computed, 0 found\n0 computed, 300 found\n"
