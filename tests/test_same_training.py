"""The comparison that tells whether a captured step is the step notices what it should."""

import pytest
import torch
from same_training import SEED, assert_same_bits, train
from test_graph import Recorder

from genfast.models import VAE, DCGANDiscriminator, DCGANGenerator
from genfast.training import GANStep, VAEStep
from genfast.training.steps.capture import CapturedStep


def gan_step(precision):
    torch.manual_seed(SEED)
    networks = DCGANGenerator(ngf=4, image_size=16), DCGANDiscriminator(ndf=4, image_size=16)
    return GANStep(*networks, latent_shape=(100, 1, 1), precision=precision)


def vae_step(precision):
    torch.manual_seed(SEED)
    return VAEStep(VAE(image_dim=64, hidden_dim=6, latent_dim=2), precision=precision)


STEPS = {"gan": (gan_step, (4, 3, 16, 16)), "vae": (vae_step, (4, 1, 8, 8))}


def captured(step):
    """The step as it runs where it is captured, but for the graph."""
    step._run = CapturedStep(
        step._step_in_precision,
        list(step.modules.values()),
        list(step.optimizers.values()),
        list(step.scalers.values()),
        Recorder(),
    )
    return step


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("name", STEPS)
def test_a_captured_step_is_the_step(name, precision):
    make, shape = STEPS[name]
    ours = train(captured(make(precision)), shape)
    assert ours["losses"].isfinite().all()
    assert_same_bits(ours, train(make(precision), shape))


def test_everything_is_compared():
    """A last bit of any tensor, and any other value, is noticed."""
    make, shape = STEPS["gan"]
    results = train(make("fp16"), shape, steps=2)
    kinds = ("weight", "running_var", "num_batches_tracked", "exp_avg", "exp_avg_sq", "step")
    for kind in (*kinds, "scale", "lr", "losses", "random numbers"):
        assert any(name.endswith(kind) for name in results), kind
    for name, value in results.items():
        other = _nudged(value)
        with pytest.raises(AssertionError) as raised:
            assert_same_bits(results | {name: other}, results)
        assert f"1 of {len(results)} differ: {name}: " in str(raised.value)
    fewer = {name: value for name, value in results.items() if name != "losses"}
    with pytest.raises(AssertionError, match="losses"):
        assert_same_bits(fewer, results)


def _nudged(value):
    if isinstance(value, torch.Tensor):
        value = value.clone()
        last = value[(-1,) * value.dim()]
        last.copy_(last.nextafter(last.new_tensor(9.0)) if value.is_floating_point() else last + 1)
        return value
    return not value if isinstance(value, bool) else (value, "another")


def test_one_step_more_or_another_batch_is_noticed():
    make, shape = STEPS["vae"]
    results = train(make("fp32"), shape, steps=2)
    with pytest.raises(AssertionError, match="losses"):
        assert_same_bits(train(make("fp32"), shape, steps=3), results)
    with pytest.raises(AssertionError, match="model"):
        assert_same_bits(train(make("fp32"), (2, *shape[1:]), steps=2), results)
