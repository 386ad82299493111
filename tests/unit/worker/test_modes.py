"""Flags and plain attributes of modules that a script changes on the way."""

import torch

from trainonce.worker.modes import Modes


class Backbone(torch.nn.Module):
    def __init__(self, place="here"):
        super().__init__()
        self.body = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
        self.frozen, self.temperature, self.place = True, 4.0, place
        self.cache = None


def modes_of(module):
    return Modes(
        ((f"net.{name}", each) for name, each in module.named_modules()),
        ((f"net.{name}", each) for name, each in module.named_parameters()),
    )


def test_what_has_changed_comes_along_and_nothing_else():
    net, twin = Backbone("one"), Backbone("other")
    modes, theirs = modes_of(net), modes_of(twin)
    assert modes.read() == {}
    net.body[1].eval()
    net.body[0].weight.requires_grad_(False)
    net.frozen, net.temperature = False, 2.0
    net.cache = torch.ones(3)  # no plain value any more
    theirs.load(modes.read())
    assert (twin.training, twin.body[0].training, twin.body[1].training) == (True, True, False)
    assert [each.requires_grad for each in twin.parameters()] == [False, True, True, True]
    assert (twin.frozen, twin.temperature, twin.place, twin.cache) == (False, 2.0, "other", None)
    assert theirs.read() == modes.read()


def test_what_code_on_the_way_changed_is_put_back():
    net = Backbone()
    modes = modes_of(net)
    modes.load({"net..temperature": 3.0, "net.unknown": 1})
    net.temperature = 1.0
    net.eval()
    modes.return_to_commit()
    assert (net.training, net.body[1].training, net.temperature) == (True, True, 3.0)
    assert not hasattr(net, "unknown")


def test_what_was_changed_back_is_told_as_well():
    net = Backbone()
    modes = modes_of(net)
    net.eval()
    assert set(modes.read().values()) == {False}
    net.train()
    assert set(modes.read().values()) == {True}
