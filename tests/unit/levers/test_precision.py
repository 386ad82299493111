import pytest
import torch

from trainonce.errors import ConfigError
from trainonce.levers.precision import Precision


def test_a_mode_is_taken_from_the_cluster_default_where_none_is_given(monkeypatch):
    monkeypatch.setenv("TRAINONCE_PRECISION", "bf16")
    assert Precision().mode == "bf16"
    assert Precision("fp32-strict").mode == "fp32-strict"
    monkeypatch.setenv("TRAINONCE_PRECISION", "fp7")
    with pytest.raises(ConfigError, match="fp7.*TRAINONCE_PRECISION"):
        Precision()


def test_autocast_computes_in_the_dtype_and_only_inside():
    layer = torch.nn.Linear(4, 4)
    for mode, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("tf32", torch.float32)):
        with Precision(mode).autocast():
            assert layer(torch.ones(1, 4)).dtype == dtype
    assert layer(torch.ones(1, 4)).dtype == torch.float32


@pytest.mark.parametrize("mode", ["fp32-strict", "tf32"])
def test_flags_hold_within_and_are_given_back(mode):
    def flags():
        return (
            torch.backends.cuda.matmul.fp32_precision,
            torch.backends.cudnn.conv.fp32_precision,
            torch.are_deterministic_algorithms_enabled(),
        )

    before = flags()
    inside = None

    def fail_within():
        nonlocal inside
        with Precision(mode).flags():
            inside = flags()
            raise KeyError

    with pytest.raises(KeyError):
        fail_within()
    strict = mode == "fp32-strict"
    expected = "ieee" if strict else "tf32"
    assert inside == (expected, expected, strict)
    assert flags() == before
    with Precision(mode, enabled=False).flags():
        assert flags() == before


def test_strict_refuses_operations_that_differ_from_run_to_run():
    with Precision("fp32-strict").flags(), pytest.raises(RuntimeError, match="determinis"):
        torch.ones(4).put_(torch.tensor([0, 0]), torch.tensor([1.0, 2.0]), accumulate=False)


def test_an_overflowing_fp16_gradient_is_skipped_and_the_scale_comes_down():
    parameter = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    precision = Precision("fp16")
    scale = precision.state_dict()["scaler"]["scale"]
    precision.scale_loss(parameter.sum() * float("inf")).backward()
    assert precision.update(optimizer)
    assert parameter.item() == 1.0
    assert precision.state_dict()["scaler"]["scale"] == scale / 2
    optimizer.zero_grad()
    precision.scale_loss(parameter.sum()).backward()
    precision.unscale(optimizer)
    assert parameter.grad.item() == 1.0
    precision.update(optimizer)
    assert parameter.item() == 0.0


class FakeTime:
    """Makes a step in each mode take as long as the test says."""

    def __init__(self, monkeypatch, step_s):
        self.now_s, self.step_s, self.order = 0.0, step_s, []
        monkeypatch.setattr("trainonce.levers.usage.time.perf_counter", lambda: self.now_s)

    def step(self, precision):
        self.order.append(precision.mode)
        self.now_s += self.step_s[precision.mode]
        return torch.tensor(1.0)


@pytest.mark.parametrize(("bf16_s", "chosen"), [(0.5, "bf16"), (0.99, "tf32"), (1.4, "tf32")])
def test_auto_takes_what_is_clearly_faster_for_this_step(monkeypatch, bf16_s, chosen):
    fake = FakeTime(monkeypatch, {"tf32": 1.0, "bf16": bf16_s})
    restored = []
    precision = Precision("auto")
    assert precision.undecided
    choice = precision.choose(fake.step, repeats=3, restore=lambda: restored.append(True))
    assert (choice.mode, precision.mode, precision.undecided) == (chosen, chosen, False)
    assert choice.step_s == pytest.approx({"tf32": 1.0, "bf16": bf16_s})
    assert choice.mode in choice.reason
    assert fake.order == ["tf32", "bf16"] * 4  # turns, so that a changing load hits both
    assert restored == [True]


def test_auto_never_takes_a_mode_whose_loss_is_not_finite():
    def step(precision):
        return torch.tensor(torch.nan if precision.mode == "bf16" else 1.0)

    assert Precision("auto").choose(step).mode == "tf32"
    with pytest.raises(ConfigError, match="not finite in any"):
        Precision("auto").choose(lambda _precision: torch.tensor(torch.inf))


def test_a_given_mode_is_not_measured():
    choice = Precision("bf16").choose(lambda _precision: pytest.fail("was run"))
    assert choice.mode == "bf16"


def test_a_decision_survives_a_resume():
    precision = Precision("auto")
    precision.choose(lambda _p: torch.tensor(1.0), modes=("bf16",))
    resumed = Precision("auto")
    resumed.load_state_dict(precision.state_dict())
    assert resumed.mode == "bf16"
    assert not resumed.undecided
