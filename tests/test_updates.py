"""Adam's update without its surroundings is Adam's update, and gives way where somebody watches."""

import copy

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from genfast.training.steps import updates
from genfast.training.steps.updates import clear_gradients, update


def _trained(step, network, make, steps=3):
    network = copy.deepcopy(network)
    optimizer = make(network)
    torch.manual_seed(1)
    for i in range(steps):
        for p in network.parameters():
            p.grad = torch.randn_like(p)
        if i == 1:
            network[0].bias.grad = None  # Its count of steps falls behind.
        step(optimizer)
    return network.state_dict(), optimizer.state_dict()["state"]


@pytest.fixture
def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))


OPTIMIZERS = {
    "fused": dict(fused=True),
    "settings": dict(fused=True, betas=(0.5, 0.9), weight_decay=0.1, eps=1e-3, maximize=True),
    "amsgrad": dict(fused=True, amsgrad=True),
    "not fused": dict(),
    "rate on the device": dict(fused=True, lr=torch.tensor(0.1)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_same_bits(name, kind, network):
    def make(n):
        first, second = n
        groups = [dict(params=first.parameters()), dict(params=second.parameters(), eps=1e-2)]
        return kind(groups, **{"lr": 0.1, **OPTIMIZERS[name]})

    plain, ours = (_trained(f, network, make) for f in (lambda o: o.step(), update))
    torch.testing.assert_close(ours, plain, rtol=0, atol=0)


def test_the_usual_optimizer_takes_the_short_way(network, monkeypatch):
    optimizer = torch.optim.Adam(network.parameters(), fused=True)
    network(torch.randn(2, 5)).sum().backward()
    update(optimizer)  # The first step also makes the state.
    monkeypatch.setattr(torch.optim.Adam, "step", None)
    before = [p.clone() for p in network.parameters()]
    update(optimizer)
    assert not any(map(torch.equal, before, network.parameters()))
    assert all(optimizer.state[p]["step"] == 2 for p in network.parameters())


def test_whoever_watches_is_called(network):
    calls = []
    optimizer = torch.optim.Adam(network.parameters(), fused=True)
    network(torch.randn(2, 5)).sum().backward()
    update(optimizer)
    handles = [
        optimizer.register_step_post_hook(lambda *_: calls.append("own")),
        register_optimizer_step_pre_hook(lambda *_: calls.append("all")),
    ]
    update(optimizer)
    assert calls == ["all", "own"]
    for handle in handles:
        handle.remove()
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    update(optimizer)
    schedule.step()  # Warns, an error here, where it has not seen the optimizer step.
    assert updates._fused_calls(optimizer) is None


def test_gradients_are_cleared(network):
    class Own(torch.optim.Adam):
        def zero_grad(self, set_to_none=True):
            self.asked = set_to_none

    for kind in (torch.optim.Adam, Own):
        network(torch.randn(2, 5)).sum().backward()
        optimizer = kind(network.parameters())
        clear_gradients(optimizer)
        if kind is Own:
            assert optimizer.asked is True
        else:
            assert all(p.grad is None for p in network.parameters())
