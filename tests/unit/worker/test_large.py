"""Large variables of a script: when they are copied, and where to."""

import copy
import itertools
import sys

import pytest
import torch

from trainonce.errors import ConfigError
from trainonce.wire import encoding
from trainonce.worker import large
from trainonce.worker.large import Kept, LargeVariables, first_fit
from trainonce.worker.mirror import Place
from trainonce.worker.own_mirror import OwnMirror
from trainonce.worker.variables import Variables


class Rank0:
    rank = 0


class Run:
    """A script in which `call` stands for a step, and a process that may take it over there."""

    # No attributes that would be variables of the script.
    __slots__ = ("_record", "commits", "copies", "kept", "mirror", "taken", "told", "variables")

    def __init__(self, mirror=None, record=()):
        self.told = []
        self.mirror = mirror or OwnMirror(2, Rank0, lambda *message: self.told.append(message))
        self.variables = Variables(self.mirror.keep)
        self.copies = 0
        self._record = record
        keep = self.variables.large._keep

        def counting(data, used):
            self.copies += 1
            return keep(data, used)

        self.variables.large._keep = counting
        self.commits = itertools.count(1)

    def call(self):
        frame = sys._getframe(1)
        if self._record:
            data, kept = self._record
            found = [Kept(key, name, self.mirror.read(at), at) for key, name, at in kept]
            self.variables.restore(data, large=found)
            self.variables.assign(frame)
            self._record = ()
        self.taken = self.variables.take(frame, begins=True).encoded(())
        self.kept = list(self.variables.large.present)
        places = [place for *_, place in self.kept]
        self.mirror.publish(next(self.commits), self.taken, places, final=True)

    def taken_over(self):
        return Run(self.mirror, (self.taken, self.kept))

    @property
    def names(self):
        return [name for _, name, _ in self.kept]


def train(run, steps, begin=0, every=4):
    """Keep the best weights, which are new in some steps, beside a batch that is new in each."""
    model, best, value = torch.nn.Linear(20, 20), None, 0
    torch.nn.init.zeros_(model.weight)
    for step in range(begin, begin + steps):
        batch = torch.full((100,), float(step))
        run.call()
        with torch.no_grad():
            model.weight.fill_(step)
        if step % every == 1:
            best = copy.deepcopy(model.state_dict())
            value = step
    return best["weight"][0, 0].item() if best is not None else None, value, batch[0].item(), best


def test_the_best_weights_come_along_and_are_copied_only_when_they_change():
    run = Run()
    assert train(run, 12)[0] == 9
    assert run.names == ["best"]
    assert run.copies == 3
    newcomer = run.taken_over()
    assert train(newcomer, 2, begin=11)[:3] == (9, 9, 12)
    assert newcomer.copies == 0
    assert newcomer.names == ["best"]
    assert train(newcomer.taken_over(), 2, begin=12)[0] == 13  # and so it goes on


def test_a_module_recognises_the_versions_in_weights_that_came_along():
    run = Run()
    train(run, 3)
    best = train(run.taken_over(), 1, begin=2)[3]
    assert best._metadata[""] == {"version": 1}
    torch.nn.Linear(20, 20).load_state_dict(best)


def test_what_changes_in_every_step_is_not_copied():
    run = Run()
    train(run, 20, every=1000)  # the batch
    assert run.copies == 1  # the weights of step 1
    assert run.names == ["best"]


def test_what_changed_in_two_steps_on_end_is_copied_when_it_rests():
    def script(run, values):
        kept = torch.zeros(100)
        for value in values:
            if value:
                kept = torch.full((100,), float(value))
            run.call()
        return kept[0].item()

    run = Run()
    script(run, [0, 0, 0, 3, 4, 0, 0])
    assert run.names == []
    run = Run()
    script(run, [0, 0, 0, 3, 4, 0, 0, 0])
    assert run.names == ["kept"]
    assert script(run.taken_over(), [0]) == 4


@pytest.mark.parametrize("in_place", [False, True], ids=["new objects", "in place"])
def test_weights_that_are_there_from_the_beginning_are_copied_once_they_change(in_place):
    def script(run, steps, change_at=None):
        best = {f"{i}.weight": torch.full((100,), 0.5) for i in range(3)}
        for step in range(steps):
            if step == change_at:
                if in_place:
                    best["1.weight"].fill_(2.0)
                else:
                    best = {key: value * 2 for key, value in best.items()}
            run.call()
        return best

    run = Run()
    script(run, 5, change_at=5)
    assert run.copies == 0
    run = Run()
    script(run, 5, change_at=3)
    assert run.copies == 1
    found = script(run.taken_over(), 1)
    expected = script(Run(), 5, change_at=3)
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_what_was_copied_is_as_it_was_at_the_call_and_independent():
    def script(run, steps, begin=0):
        kept = None
        for step in range(begin, begin + steps):
            if step == 2:
                kept = {"optimizer": {"state": {0: torch.ones(200)}}, "epoch": step, "of": (1, "a")}
            run.call()
            if kept is not None:
                kept["optimizer"]["state"][0] += 1
        return kept

    run = Run()
    script(run, 3)
    newcomer = run.taken_over()
    found = script(newcomer, 1, begin=3)
    assert found["optimizer"]["state"][0].tolist() == [2.0] * 200
    assert (found["epoch"], found["of"]) == (2, (1, "a"))


def test_what_is_protected_anyway_or_has_gradients_is_not_copied():
    run, model = Run(), torch.nn.Sequential(torch.nn.Linear(20, 20))
    run.variables.large.owned = lambda: frozenset({model[0].weight.untyped_storage().data_ptr()})
    best = weights = None
    for step in range(6):
        run.call()
        if step == 2:
            best = model.state_dict()
            weights = list(model.parameters())
    assert best is not None
    assert weights is not None
    assert run.copies == 0
    assert run.names == []
    newcomer = Run()
    newcomer.variables.restore(run.taken)
    assert newcomer.variables.missing == ["best"]


def test_a_copied_module_is_named_and_what_is_there_from_the_beginning_is_not():
    run, model = Run(), torch.nn.Sequential(torch.nn.Linear(20, 20))
    run.variables.large.owned = lambda: frozenset({model[0].weight.untyped_storage().data_ptr()})
    best, loss_of, teacher = None, torch.nn.MSELoss(), torch.nn.Linear(2, 2)
    for step in range(4):
        run.call()
        for layer in model:
            loss_of = torch.nn.MSELoss() if layer else None
        if step == 1:
            best = copy.deepcopy(model)
    assert None not in (best, loss_of, teacher, layer)
    newcomer = Run()
    newcomer.variables.restore(run.taken)
    assert newcomer.variables.missing == ["best"]


@pytest.mark.parametrize(
    "value", [{"a.weight": torch.ones(200)}, torch.ones(200), [torch.ones(200)], "text" * 2000],
    ids=["weights", "tensor", "list", "text"],
)  # fmt: skip
def test_the_limit_holds_for_all_together(monkeypatch, value):
    monkeypatch.setenv("TRAINONCE_LARGE_VARIABLES_MB", "0.001")
    run, one, other = Run(), None, None
    for step in range(9):
        run.call()
        one = torch.ones(100) if step == 0 else one
        other = value if step == 3 else other
    assert one is not None
    assert other is not None
    assert run.names == ["one"]
    newcomer = Run()
    newcomer.variables.restore(run.taken)
    assert newcomer.variables.missing == ["other"]


@pytest.mark.parametrize("given", ["-1", "many", "nan"])
def test_a_limit_that_is_none_is_refused(monkeypatch, given):
    monkeypatch.setenv("TRAINONCE_LARGE_VARIABLES_MB", given)
    with pytest.raises(ConfigError, match="TRAINONCE_LARGE_VARIABLES_MB") as caught:
        LargeVariables(lambda *_: None)
    assert caught.value.hint


def test_a_copy_that_is_damaged_is_named():
    variables = LargeVariables(lambda *_: None)
    data = encoding.encode(torch.ones(100))
    damaged = data[:50] + bytes([data[50] ^ 1]) + data[51:]
    found = [Kept("s", "a", data, None), Kept("s", "b", damaged, None), Kept("s", "c", b"", None)]
    assert variables.restore(found) == ["b", "c"]
    assert list(variables.of("s")) == ["a"]


def test_copies_whose_scope_was_left_are_let_go(monkeypatch):
    monkeypatch.setattr(large, "_LET_GO_AFTER", 10)

    def left(run):
        kept = None
        for step in range(4):
            run.call()
            kept = torch.ones(1000) if step == 2 else kept
        return kept

    run = Run()
    left(run)
    used = []
    run.variables.large._keep = lambda _data, places: used.append(places)
    later = None
    for step in range(30):
        run.call()
        later = torch.ones(100) if step == 25 else later
    assert later is not None
    assert used == [[]]


def test_another_kind_of_value_is_a_change():
    run, kept = Run(), torch.ones(100)
    for step in range(9):
        run.call()
        kept = [torch.ones(100)] if step == 4 else kept
    assert type(kept) is list
    assert (run.copies, run.names) == (1, ["kept"])


def test_tensors_as_keys_are_a_change():
    run, kept, weight = Run(), {0: torch.ones(100)}, torch.zeros(3)
    for step in range(9):
        run.call()
        kept = {weight: kept[0]} if step == 4 else kept
    assert weight in kept
    assert run.names == []


def test_one_that_is_left_out_is_named_though_another_of_that_name_comes_along(monkeypatch):
    class Keeper:
        best = None

    monkeypatch.setenv("TRAINONCE_LARGE_VARIABLES_MB", "0.001")
    run, keeper, best = Run(), Keeper(), None
    for step in range(6):
        run.call()
        if step == 2:
            best = {"a.weight": torch.ones(1000)}
            keeper.best = {"a.weight": torch.ones(100)}
    assert best is not None
    assert run.names == ["best"]
    newcomer = Run()
    newcomer.variables.restore(run.taken)
    assert newcomer.variables.missing == ["best"]


def test_a_module_that_was_named_is_not_looked_at_again():
    run, looks, best = Run(), [], None
    run.variables.large.owned = lambda: looks.append(1) or frozenset()
    for step in range(8):
        run.call()
        best = torch.nn.Linear(2, 2) if step == 2 else best
    assert best is not None
    assert len(looks) == 1


def test_what_is_restored_is_at_once_what_the_next_record_mentions():
    run = Run()
    train(run, 3)
    ((key, name, place),) = run.kept
    data = run.mirror.read(place)
    for resumed, at in ((Run(run.mirror), place), (Run(), None)):  # taken over; from a checkpoint
        assert resumed.variables.large.restore([Kept(key, name, data, at)]) == []
        ((_, _, found),) = resumed.variables.large.present
        assert resumed.mirror.read(found) == data


def test_places_are_found_in_the_gaps():
    used = [Place(100, 50), Place(0, 40)]
    assert first_fit(used, 60, 200) == Place(40, 60)
    assert first_fit(used, 61, 220) == Place(150, 61)
    assert first_fit(used, 61, 200) is None
    assert first_fit([], 10, 10) == Place(0, 10)
    assert first_fit([Place(0, 10), Place(5, 20)], 5, 30) == Place(25, 5)


def test_a_list_that_grows_in_every_step_is_hardly_looked_at(monkeypatch):
    made = []
    fingerprint = large._Fingerprint
    monkeypatch.setattr(large, "_Fingerprint", lambda value: made.append(1) or fingerprint(value))
    run, losses = Run(), [0.0] * 600
    for _ in range(320):
        losses.append(1.0)
        run.call()
    assert len(made) < 30
    assert run.copies == 0
    for _ in range(40):
        run.call()
    assert (run.copies, run.names) == (1, ["losses"])
