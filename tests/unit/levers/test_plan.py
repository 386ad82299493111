"""`trainonce.plan` on models and data of several kinds, and the file it writes."""

import dataclasses
import math
import os
import re
import subprocess
import sys
import tomllib

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import trainonce
from trainonce.errors import BudgetSpentError, ConfigError, DataError, ProbeError
from trainonce.ledger.spending import Budget
from trainonce.levers import gates, registry
from trainonce.levers.plan_file import parse_plan, read_plan
from trainonce.levers.probe import expected_rate


class Tokens(nn.Module):
    """A causal language model over 16 tokens."""

    def __init__(self, positions=0):
        super().__init__()
        self.embed = nn.Embedding(16, 16)
        self.positions = nn.Embedding(positions, 16) if positions else None
        self.hidden = nn.Linear(16, 16)
        self.head = nn.Linear(16, 16)

    def forward(self, tokens):
        x = self.embed(tokens)
        if self.positions is not None:
            x = x + self.positions(torch.arange(tokens.shape[1]))
        return self.head(F.gelu(self.hidden(x.cumsum(1))))


def text(samples=64, length=32):
    tokens = torch.randint(0, 16, (samples, length + 1), generator=torch.Generator().manual_seed(0))
    return tokens[:, :-1], tokens[:, 1:]


def token_loss(out, batch):
    return F.cross_entropy(out.transpose(1, 2), batch[1], reduction="none").mean(1)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 16), nn.GELU(), nn.Linear(16, 16), nn.Linear(16, 1))


def points(samples=200):
    x = torch.randn(samples, 4, generator=torch.Generator().manual_seed(1))
    return x, x.sum(1, keepdim=True).tanh()


def square(out, batch):
    return (out - batch[1]).square().mean(1)


@pytest.fixture(scope="module")
def probed():
    """A plan with all probes, and what the model was before and after."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model = net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    made = trainonce.plan(model, points(), square, epochs=70)
    torch.set_num_threads(threads)
    return made, model, before, random


def test_every_lever_is_in_the_plan_and_says_why_and_what_it_is_expected_to_save(probed):
    made = probed[0]
    assert list(made.levers) == list(registry.LEVERS)
    for lever in made.levers.values():
        assert lever.why
        assert "source: " in lever.expected


def test_probes_leave_model_and_generators_as_they_were(probed):
    made, model, before, random = probed
    assert made.probes.steps > 50
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), random)
    assert model.training


def test_the_plan_counts_what_its_probes_cost_and_measures_an_arm_without_levers(probed):
    made = probed[0]
    assert made.probes.share == pytest.approx(made.probes.steps / made.run.steps, abs=1e-4)
    assert made.probes.share < 0.3
    assert len(made.probes.off_arm) == 3
    assert len(set(made.probes.off_arm)) == 3  # seeds differ, or there is no noise to measure
    assert len(made.probes.tried_lr) >= 3


def test_the_rate_is_what_the_width_lets_expect_or_half_way_to_one_clearly_better(probed):
    made, model = probed[0], probed[1]
    tried = made.probes.tried_lr
    epochs = made.run.steps * made.run.batch_size / 200
    start = expected_rate(model, made.run.steps, samples=200, epochs=epochs)
    best = min(tried, key=tried.get)
    gain = 1 - tried[best] / tried[f"{start:.4g}"]
    wanted = math.sqrt(float(best) * start) if gain > 0.5 else start
    assert made.run.lr == pytest.approx(wanted, rel=0.01)
    assert made.levers["rate-probe"].settings["lr"] == made.run.lr


def test_the_expected_rate_falls_with_width_and_length_and_for_what_was_trained_before():
    def wide(width):
        return nn.Sequential(
            nn.Embedding(9999, width), nn.Linear(width, width), nn.LayerNorm(width)
        )

    assert expected_rate(wide(128), 500) == pytest.approx(0.01)
    assert expected_rate(wide(1024), 500) == pytest.approx(0.01 / 8)
    assert expected_rate(wide(1024), 500, pretrained=True) == pytest.approx(0.001 / 8)
    assert expected_rate(wide(128), 500 * 2**10) == pytest.approx(0.01 / 2**3.2, rel=0.01)
    assert expected_rate(nn.Conv2d(64, 8, 5), 500) == pytest.approx(0.02)
    assert expected_rate(nn.Linear(1, 1), 500) == expected_rate(nn.LayerNorm(4), 500) == 0.05


def test_the_expected_rate_is_lower_for_few_samples_that_are_seen_often():
    model = nn.Linear(128, 128)
    for samples, epochs, share in ((800, 20, 1.0), (800, 40, 0.25), (10**6, 1, 1.0), (50, 50, 0.1)):
        found = expected_rate(model, 500, samples=samples, epochs=epochs)
        assert found == pytest.approx(0.01 * share)


def test_a_plan_file_is_commented_toml_and_says_the_same_when_it_is_read(probed, tmp_path):
    path = probed[0].write(tmp_path / "plan.toml")
    text = path.read_text()
    assert text.startswith("# A plan of trainonce")
    assert tomllib.loads(text)["levers"]["schedule"]["on"] is True
    assert read_plan(path) == probed[0]


def test_odd_text_and_numbers_survive_the_file(probed):
    odd = dataclasses.replace(
        probed[0].probes, off_arm=[math.inf, 1e-30], notes=['a "quoted"\n# line', "ü"]
    )
    made = dataclasses.replace(probed[0], probes=odd)
    assert parse_plan(made.to_toml()) == made


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("format = 1", "format = 7", "no plan of format"),
        ("[run]", "[walk]", "missing"),
        ("steps = ", "stepps = ", "unknown"),
        ("on = true", 'on = "yes"', "on is 'yes'"),
        ("on = true", "on = ", "no TOML"),
        ("[levers.schedule]", "[levers.magic]", "no such lever"),
        ("guard_step = ", "guard_step = 0.5 #", "guard_step is 0.5"),
        ("off_arm = [", 'off_arm = ["much", ', "off_arm is"),
        ("micro_batch = ", "micro_batch = -", "no run has"),
        ("lr = ", "lr = nan #", "lr=nan"),
    ],
)
def test_a_file_that_is_no_plan_is_refused_with_what_is_wrong(probed, old, new, words):
    with pytest.raises(ConfigError, match=words) as caught:
        parse_plan(probed[0].to_toml().replace(old, new, 1))
    assert caught.value.hint


def test_a_plan_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path, tmp_path / "binary.toml", tmp_path / "nowhere.toml"):
        with pytest.raises(ConfigError, match="cannot be read") as caught:
            read_plan(path)
        assert caught.value.hint


def test_a_choice_can_be_overridden_and_says_so(probed):
    made = probed[0].override("precision", mode="bf16").override("schedule", on=False)
    assert made.settings("precision")["mode"] == "bf16"
    assert not made.is_on("schedule")
    assert made.levers["schedule"].why.startswith("overridden; it was on")
    with pytest.raises(ConfigError, match="no lever 'magic'"):
        made.override("magic", on=True)


def test_a_language_model_is_known_by_what_it_does():
    made = trainonce.plan(Tokens(), text(), token_loss)
    assert made.fingerprint.task == "language-model"
    assert made.is_on("sequence-warmup")
    assert made.is_on("optimizer") == ("limit" in made.levers["optimizer"].why and
                                       made.levers["optimizer"].why < "it adds 1")  # fmt: skip
    assert "nobody gave a length" in made.run.why


def test_learned_positions_and_what_sees_the_future_get_no_sequence_warmup():
    learned = trainonce.plan(Tokens(positions=32), text(), token_loss)
    assert "learns its positions" in learned.levers["sequence-warmup"].why

    class Bidirectional(Tokens):
        def forward(self, tokens):
            x = self.embed(tokens)
            return self.head(x + x.mean(1, keepdim=True))

    both = trainonce.plan(Bidirectional(), text(), token_loss)
    assert both.fingerprint.task == "other"
    assert not both.is_on("sequence-warmup")


def test_a_dict_batch_enters_the_model_by_parameter_names():
    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return 40

        def __getitem__(self, index):
            return {"input": torch.full((4,), float(index)), "weight": torch.tensor(1.0)}

    made = trainonce.plan(net(), Rows(), lambda out, batch: out[:, 0].square() * batch["weight"])
    assert made.fingerprint.batch_shapes == [[4, 4], [4]]

    class Wrong(nn.Linear):
        def forward(self, pixels):
            return super().forward(pixels)

    with pytest.raises(ConfigError, match="pixels"):
        trainonce.plan(Wrong(4, 1), Rows(), lambda out, batch: out[:, 0])


def test_infobatch_is_on_for_many_epochs_of_a_model_without_muon_and_shortens_the_run():
    thin = nn.Sequential(nn.Linear(4, 16), nn.GELU(), nn.Linear(16, 1))  # no hidden matrix
    many = trainonce.plan(thin, points(64), square, epochs=16)
    assert many.is_on("infobatch")
    share = gates.infobatch_share(many.settings("infobatch"))
    assert 0.6 < share < 0.9
    whole = trainonce.plan(thin, points(64), square, steps=many.run.steps)
    assert "number of updates is given" in whole.levers["infobatch"].why
    few = trainonce.plan(thin, points(64), square, epochs=3)
    assert "3 epochs" in few.levers["infobatch"].why
    scalar = trainonce.plan(thin, points(64), lambda o, b: square(o, b).mean(), epochs=16)
    assert "the loss is a scalar" in scalar.levers["infobatch"].why
    assert many.run.steps == round(share * scalar.run.steps)


def test_a_model_that_was_trained_before_is_fine_tuned():
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 8), nn.Linear(8, 1))
    assert not trainonce.plan(model, points(), square, steps=20).is_on("freeze")
    model(points()[0])  # the norm counts it
    made = trainonce.plan(model, points(), square, steps=20)
    assert made.fingerprint.task == "finetune"
    assert made.is_on("freeze")
    assert not made.is_on("optimizer")


def test_the_callers_optimizer_is_neither_replaced_nor_probed():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    made = trainonce.plan(model, points(), square, epochs=70, optimizer=optimizer)
    assert not made.is_on("optimizer")
    assert not made.is_on("rate-probe")
    assert made.run.lr == 0.0
    assert "caller" in made.probes.notes[0]


def test_a_budget_shortens_the_run_to_what_it_allows():
    model = net()
    own = torch.optim.SGD(model.parameters(), lr=0.1)  # else the probes of a long run are long

    def steps(wanted, hours):
        budget = Budget(max_hours=hours)
        return trainonce.plan(model, points(), square, steps=wanted, budget=budget, optimizer=own)

    assert steps(100_000, 500).run.steps == 100_000
    cut = steps(10**9, 1e-3)
    assert 1 <= cut.run.steps < 10**9
    assert "cut from 1000000000" in cut.run.why


def test_a_precision_for_the_whole_cluster_is_taken(monkeypatch):
    monkeypatch.setenv("TRAINONCE_PRECISION", "bf16")
    made = trainonce.plan(net(), points(), square, steps=20)
    assert made.settings("precision")["mode"] == "bf16"


def nan_in_first_rows():
    x, y = points()
    x[:3] = math.nan
    return x, y


def test_a_model_with_nothing_to_train_is_refused():
    for model in (net().requires_grad_(False), nn.GELU()):
        with pytest.raises(ConfigError, match="no parameter that is trained") as caught:
            trainonce.plan(model, points(), square)
        assert caught.value.hint


def test_a_loss_that_is_nan_at_every_rate_is_an_error_of_the_probe():
    def loss(out, batch):  # finite until the first update
        return square(out, batch) + (math.nan if moved(out, batch) else 0.0)

    def moved(out, batch):
        with torch.no_grad():
            return len(out) == len(batch[0]) and not torch.allclose(out, start(batch[0]))

    start, model = net(), net()
    with pytest.raises(ProbeError, match="diverged at every rate") as caught:
        trainonce.plan(model, points(), loss, steps=500)
    assert caught.value.hint


def test_one_sample_is_a_dataset():
    assert trainonce.plan(net(), points(1), square, steps=3).run.batch_size == 1


def ones(batch):
    return torch.ones(len(batch[0]), dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"loss": lambda out, batch: (out - batch[1]).square()}, ConfigError, r"shape \[4, 1\]"),
        ({"loss": lambda out, batch: 3.0}, ConfigError, "returned float"),
        ({"loss": lambda out, batch: square(out, batch) * math.nan}, ProbeError, "before any"),
        ({"loss": lambda out, batch: square(out, batch).detach()}, ConfigError, "depend on what"),
        ({"train": (points()[0], points(5)[1])}, DataError, r"\[5, 200\] samples"),
        ({"train": ["a", "b"]}, ConfigError, "no tensor"),
        ({"train": nan_in_first_rows(), "eval": points(40)}, ProbeError, "before any"),
        ({"steps": "3"}, ConfigError, "no numbers"),
        ({"train": []}, DataError, "empty"),
        ({"train": iter([1])}, DataError, "map-style|__len__"),
        ({"steps": 3, "epochs": 2}, ConfigError, "both given"),
        ({"steps": 0}, ConfigError, "nothing to do"),
        ({"epochs": math.nan}, ConfigError, "no length"),
        ({"epochs": math.inf}, ConfigError, "no length"),
        ({"task": "magic"}, ConfigError, "no task"),
        ({"world_size": 500}, ConfigError, "too few"),
        ({"count": lambda batch: batch[0].sum(1)}, ConfigError, "float32 of shape .4. for 4"),
        ({"count": lambda batch: 4}, ConfigError, "returned int"),
        ({"count": lambda batch: torch.ones(4, 1)}, ConfigError, r"shape \[4, 1\]"),
        (
            {"loss": lambda out, batch: square(out, batch).mean(), "count": ones},
            ConfigError,
            "a count was given",
        ),
    ],
)
def test_bad_input_is_refused_with_a_hint(arguments, error, words):
    given = {"train": points(), "loss": square, **arguments}
    train, loss = given.pop("train"), given.pop("loss")
    with pytest.raises(error, match=words) as caught:
        trainonce.plan(net(), train, loss, **given)
    assert caught.value.hint


def test_a_batch_that_does_not_fit_is_accumulated_and_one_that_never_fits_is_refused():
    class Hungry(nn.Linear):
        most = 5

        def forward(self, x):
            if len(x) > self.most:
                raise torch.OutOfMemoryError("no memory")
            return super().forward(x)

    made = trainonce.plan(Hungry(4, 1), points(), square, steps=20)
    assert made.run.micro_batch == 5
    assert made.run.batch_size == 12
    assert "accumulates" in made.levers["batch-size"].why
    Hungry.most = 0
    with pytest.raises(ConfigError, match="one sample does not fit"):
        trainonce.plan(Hungry(4, 1), points(), square, steps=20)


def test_a_budget_of_nothing_is_refused():
    with pytest.raises(ConfigError, match="max_hours is 0"):
        Budget(max_hours=0)
    assert issubclass(BudgetSpentError, RuntimeError)


_HUNGRY = """
import resource, sys, torch, trainonce
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x):  # keeps 16 MiB a sample, twice, for the backward pass
        return x + (x.repeat(1, 1 << 20) * self.scale).tanh().mean(1, keepdim=True)

model = nn.Sequential(*(Block() for _ in range(16)), nn.Linear(4, 1))
data = torch.randn(64, 4), torch.randn(64, 1)
how = dict(loss=lambda out, batch: (out - batch[1]).square().mean(1), steps=2)
# What is imported and started at the first call is no part of what activations may take.
trainonce.fit(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1)), data, folder=sys.argv[3], **how)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (300 << 20), -1))
made = trainonce.plan(model, data, **how)
print(made.is_on("recompute"), made.run.micro_batch, made.levers["recompute"].why)
print(any("forward" in vars(block) for block in model))
print(trainonce.fit(model, data, plan=made, folder=sys.argv[1], **how).steps)
try:
    trainonce.fit(model, data, plan=made.override("recompute", on=False), folder=sys.argv[2], **how)
except RuntimeError as error:
    print("allocate" in str(error))
"""


@pytest.mark.slow
def test_where_not_one_sample_fits_activations_are_recomputed(tmp_path):
    command = [
        sys.executable,
        "-c",
        _HUNGRY,
        *map(str, (tmp_path / "on", tmp_path / "off", tmp_path / "first")),
    ]
    # Large blocks go back to the system when they are freed, instead of falling to pieces.
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1",
           "MALLOC_MMAP_THRESHOLD_": str(1 << 20),
           "TRAINONCE_PRECISION": "tf32",
           "TRAINONCE_HOME": str(tmp_path)}  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    first, *rest = done.stdout.splitlines()
    assert re.match(r"True [1-4] not even one sample fits", first)
    assert rest == ["False", "2", "True"]
