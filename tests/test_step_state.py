"""A step's state: saved and loaded, somebody's own loop goes on as if it had never stopped."""

import pytest
import torch
from torch import nn

from genfast.models import VAE, DCGANDiscriminator, DCGANGenerator
from genfast.training import GANStep, VAEStep


def _gan(seed, precision="fp32", make_optimizers=None):
    torch.manual_seed(seed)
    networks = DCGANGenerator(5, 4, 1, 16), DCGANDiscriminator(1, 4, 16)
    optimizers = make_optimizers and [make_optimizers(n.parameters()) for n in networks]
    return GANStep(*networks, precision=precision, optimizers=optimizers)


STEPS = {
    "gan": _gan,
    "gan in fp16": lambda seed: _gan(seed, "fp16"),
    "gan by SGD": lambda seed: _gan(seed, make_optimizers=lambda p: torch.optim.SGD(p, 0.1, 0.9)),
    "vae": lambda seed: torch.manual_seed(seed) and VAEStep(VAE(256, 8, 2), precision="fp32"),
}


def _run(step, steps):
    torch.manual_seed(7)
    low, high = step.pixel_range
    images = torch.rand(4, 1, 16, 16) * (high - low) + low
    return [t.item() for _ in range(steps) for t in step(images)]


@pytest.mark.parametrize("name", STEPS)
def test_a_loaded_step_goes_on_to_the_bit(name, tmp_path):
    step = STEPS[name](0)
    for scaler in step.scalers.values():
        scaler._growth_interval = 2  # So that there is something to save.
    _run(step, 3)
    torch.save(step.state_dict(), tmp_path / "step.pt")
    expected = _run(step, 3)
    other = STEPS[name](1)
    assert _run(other, 2) != expected[:4]
    state = torch.load(tmp_path / "step.pt", weights_only=True)
    other.load_state_dict(state)
    assert _run(other, 3) == expected
    assert state.keys() - {"counters"} == {"modules", "optimizers", "scalers"}
    assert set(state["scalers"]) == set(step.scalers)
    for key, tensor in other.modules[min(other.modules)].state_dict().items():
        assert torch.equal(tensor, step.modules[min(step.modules)].state_dict()[key])


def test_learning_rates_are_saved_as_numbers_and_fit_where_they_are_loaded():
    step = _gan(0)
    step.optimizers["generator"].param_groups[0]["lr"] = torch.tensor(0.25)  # As a graph has them.
    state = step.state_dict()
    assert type(state["optimizers"]["generator"]["param_groups"][0]["lr"]) is float
    state["optimizers"]["generator"]["param_groups"][0]["capturable"] = True
    step.load_state_dict(state)
    group = step.optimizers["generator"].param_groups[0]
    assert (group["lr"], group["capturable"]) == (0.25, False)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda s: s.pop("modules"), "it lacks the discriminator among its modules"),
        (lambda s: s["optimizers"].pop("generator"), "it lacks the generator among its optimizers"),
    ],
)
def test_a_state_of_something_else_is_refused(spoil, message):
    step = _gan(0)
    state, weight = step.state_dict(), step.generator.main[0].weight.clone()
    spoil(state)
    other = _gan(1)
    before = other.generator.main[0].weight.clone()
    with pytest.raises(ValueError, match=f"expected the state of a GANStep, {message}"):
        other.load_state_dict(state)
    assert torch.equal(other.generator.main[0].weight, before)
    assert not torch.equal(weight, before)
    with pytest.raises(ValueError, match="expected the state of a VAEStep, it lacks the model"):
        VAEStep(VAE(16)).load_state_dict(_gan(0).state_dict())


def test_wrong_weights_are_named():
    step = GANStep(nn.Linear(4, 4), nn.Linear(4, 1))
    with pytest.raises(RuntimeError, match="Missing key"):
        step.load_state_dict(_gan(0).state_dict())
