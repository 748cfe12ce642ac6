"""`VAEStep` on VAEs as others write them: what it takes, what it minimises, and what it says."""

import copy
import warnings
from collections import OrderedDict
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from genfast import losses
from genfast.models import VAE, ConvVAE
from genfast.training import VAEStep

SHAPE = (3, 4, 4)
PIXELS = 48


class Plain(nn.Module):
    """A VAE of layers alone on rows of pixels, as many write one; subclasses change a part."""

    def __init__(self, end=None):
        super().__init__()
        self.encoder = nn.Linear(PIXELS, 6)
        self.decoder = nn.Sequential(nn.Linear(3, PIXELS), *([end] if end else []))

    def encode(self, x):
        return self.encoder(x).chunk(2, dim=1)

    def decode(self, z):
        return self.decoder(z)


class Flattening(Plain):
    def encode(self, x):
        return list(super().encode(x.view(len(x), -1)))

    def decode(self, z):
        return super().decode(z).view(-1, *SHAPE)


class Clipping(Plain):
    """To [0, 1]: no probabilities, for 0 and 1 would be among them without a gradient."""

    def decode(self, z):
        return super().decode(z).clamp(0, 1)


class Squashed(Plain):
    def decode(self, z):
        return (super().decode(z).tanh() + 1) / 2


class Maps(nn.Module):
    """Convolutions, batch norms and dropout, with a latent that is a map, and a counter."""

    def __init__(self):
        super().__init__()
        self.calls = 0
        self.encoder = nn.Sequential(
            nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.Dropout(0.2), nn.Conv2d(4, 4, 1)
        )
        self.decoder = nn.Sequential(
            nn.ConvTranspose2d(2, 4, 4, 2, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 3, 1), nn.Tanh()
        )

    def encode(self, x):
        self.calls += 1
        return self.encoder(x).chunk(2, dim=1)

    def decode(self, z):
        return self.decoder(z)


class Named(Plain):
    def __init__(self, form):
        super().__init__(nn.Sigmoid())
        self.form = form

    def encode(self, x):
        return self.form(*super().encode(x))

    def decode(self, z):
        return OrderedDict(layer_1=None, reconstruction=super().decode(z))


def with_part(end=None, **methods):
    """A `Plain` one of whose methods is another."""
    return type("Other", (Plain,), methods)(end)


def images(n=8, dtype=torch.float64):
    return torch.rand(n, *SHAPE, generator=torch.Generator().manual_seed(1), dtype=dtype)


def seeded(make, *args):
    torch.manual_seed(0)
    return make(*args).double()


def train(model, steps=4, **options):
    """The losses of some steps of a copy, and the step."""
    step = VAEStep(copy.deepcopy(model), precision="fp32", **options)
    torch.manual_seed(2)
    return [step(images()).loss.item() for _ in range(steps)], step


def plain_losses(model, likelihood, *, signed, present=lambda x: x, steps=4):
    """Those of a loop as PyTorch's example has it; signed: images are scaled to [-1, 1]."""
    model = copy.deepcopy(model)
    optimizer = torch.optim.Adam(model.parameters(), 2e-4, (0.5, 0.999))
    x = 2 * images() - 1 if signed else images()
    found = []
    torch.manual_seed(2)
    for _ in range(steps):
        optimizer.zero_grad()
        mu, logvar = model.encode(present(x))
        noise = torch.randn(mu.shape, dtype=mu.dtype)
        decoded = model.decode(mu + noise * torch.exp(0.5 * logvar)).flatten(1)
        target = x.flatten(1)
        if likelihood == "gaussian":
            reconstruction = 0.5 * (decoded - target).square().sum()
        elif likelihood == "logits":
            reconstruction = F.binary_cross_entropy_with_logits(decoded, target, reduction="sum")
        else:
            reconstruction = F.binary_cross_entropy(decoded, target, reduction="sum")
        loss = reconstruction - 0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())
        loss.backward()
        optimizer.step()
        found.append(loss.item() / len(x))
    return found


def rows(x):
    return x.flatten(1)


def contiguous(x):
    return x.contiguous()


def channels_last(x):
    return x.contiguous(memory_format=torch.channels_last)


def first_error(model, x=None, error=ValueError, **options):
    with pytest.raises(error) as caught:
        VAEStep(model, precision="fp32", **options)(images(dtype=torch.float32) if x is None else x)
    return str(caught.value)


@pytest.mark.parametrize(
    ("make", "likelihood", "loop", "signed", "present"),
    [
        (partial(Plain, nn.Sigmoid()), "bernoulli", "bernoulli", False, rows),
        (partial(Plain, nn.Tanh()), "gaussian", "gaussian", True, rows),
        (Plain, "gaussian", "gaussian", True, rows),
        (partial(Flattening, nn.Sigmoid()), "bernoulli", "bernoulli", False, contiguous),
        (partial(Flattening, nn.Hardtanh()), "gaussian", "gaussian", True, contiguous),
        (partial(Plain, nn.Softplus()), "gaussian", "gaussian", False, rows),
        (Clipping, "gaussian", "gaussian", False, rows),
        (Squashed, "bernoulli", "bernoulli", False, rows),
        (Maps, "gaussian", "gaussian", True, channels_last),
    ],
)  # fmt: skip
def test_the_step_is_the_plain_one(make, likelihood, loop, signed, present):
    model = seeded(make)
    ours, step = train(model)
    assert step.likelihood == likelihood
    expected = plain_losses(model, loop, signed=signed, present=present)
    assert ours == pytest.approx(expected, rel=1e-12)
    assert ours[0] != ours[-1]


@pytest.mark.parametrize(
    ("end", "likelihood", "loop", "signed"),
    [
        (nn.Sigmoid(), "gaussian", "gaussian", False),
        (None, "bernoulli", "logits", False),
        (None, "gaussian", "gaussian", True),
    ],
)
def test_a_likelihood_that_was_asked_for(end, likelihood, loop, signed):
    model = seeded(Plain, end)
    ours, step = train(model, likelihood=likelihood)
    expected = plain_losses(model, loop, signed=signed, present=rows)
    assert ours == pytest.approx(expected, rel=1e-12)
    assert step.likelihood == likelihood


def test_a_gaussian_likelihood_of_genfast_s_own():
    model = seeded(VAE, PIXELS, 8, 3)
    ours, step = train(model, likelihood="gaussian")
    assert ours == pytest.approx(plain_losses(model, "gaussian", signed=False), rel=1e-12)
    assert step.sample(torch.zeros(2, 3, dtype=torch.float64)).shape == (2, *SHAPE)


@pytest.mark.parametrize(
    "form",
    [
        lambda mu, logvar: [mu, logvar],
        lambda mu, logvar: {"logvar": logvar, "mu": mu, "z": mu},
        lambda mu, logvar: OrderedDict(embedding=mu, log_covariance=logvar),
        lambda mu, logvar: SimpleNamespace(mean=mu, logvar=logvar, std=1),
    ],
)
def test_forms_of_a_posterior(form):
    model = seeded(Named, form)
    ours, _ = train(model)
    assert ours == train(seeded(Plain, nn.Sigmoid()))[0]


def test_an_encoder_and_a_decoder():
    parts = seeded(Named, lambda mu, logvar: {"mu": mu, "logvar": logvar})

    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = parts.encoder

        def forward(self, x):
            return self.layer(x).chunk(2, dim=1)

    pair = nn.ModuleDict({"encoder": Encoder(), "decoder": parts.decoder})
    ours, step = train(pair)
    assert ours == train(seeded(Plain, nn.Sigmoid()))[0]
    assert step.sample(torch.zeros(2, 3, dtype=torch.float64)).shape == (2, *SHAPE)


@pytest.mark.parametrize("end", [nn.Sigmoid(), nn.Tanh()])
def test_an_adapter(end):
    class Forward(nn.Module):
        def __init__(self):
            super().__init__()
            self.vae = Plain(end)

        def forward(self, x):
            mu, logvar = self.vae.encode(x)
            z = mu + torch.randn_like(mu) * torch.exp(0.5 * logvar)
            return self.vae.decode(z), x, mu, logvar, z

    def adapter(model, x):
        reconstruction, _, mu, logvar, _ = model(x)
        return reconstruction, mu, logvar

    ours, step = train(seeded(Forward), adapter=adapter)
    assert ours == pytest.approx(train(seeded(Plain, end))[0], rel=1e-12)
    assert step.latent_shape == (3,)
    with pytest.raises(ValueError, match=r"expected a model with decode\(z\) .*, got a Forward"):
        step.sample(torch.zeros(2, 3))


def test_finding_out_leaves_no_trace():
    """But for one pass's time, a first look changes nothing: not even the next random number."""
    model = seeded(Maps).train()
    model.encoder[1].eval()
    grads = [torch.ones_like(p) for p in model.parameters()]
    for p, grad in zip(model.parameters(), grads, strict=True):
        p.grad = grad
    step = VAEStep(model, precision="fp32")
    state = {name: t.clone() for name, t in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    random = torch.get_rng_state()
    step._look(images())
    assert torch.equal(torch.get_rng_state(), random)
    assert model.calls == 0
    assert [m.training for m in model.modules()] == modes
    assert all(p.grad is g for p, g in zip(model.parameters(), grads, strict=True))
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    assert step.latent_shape == (2, 2, 2)


def test_a_failed_look_leaves_no_trace():
    model = seeded(Maps)
    model.decode = lambda z: 1 / 0
    assert "got ZeroDivisionError" in first_error(model, images())
    assert model.calls == 0
    assert model.encoder[1].num_batches_tracked == 0


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_final_sigmoid_goes_into_the_loss(precision):
    """Saturated pixels keep their loss and gradient, and `decode` stays the user's own."""
    model = Plain(nn.Sigmoid())
    with torch.no_grad():
        model.decoder[0].weight.zero_()
        model.decoder[0].bias.fill_(200.0)
    step = VAEStep(model, precision=precision)
    result = step(torch.zeros(4, *SHAPE))
    assert result.reconstruction.item() == pytest.approx(200 * PIXELS)
    assert (model.decoder[0].bias.grad == 4).all()
    assert model.decode(torch.zeros(1, 3)).max() == 1


def test_probabilities_in_half_precision_are_warned_about():
    model = with_part(decode=lambda self, z: torch.sigmoid(self.decoder(z)))
    with pytest.warns(UserWarning, match="probabilities are torch.bfloat16, in which") as caught:
        VAEStep(model, precision="bf16")(images(dtype=torch.float32))
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        VAEStep(copy.deepcopy(model), precision="fp32")(images(dtype=torch.float32))


def test_a_sigmoid_that_went_away_is_missed():
    model = Plain(nn.Sigmoid())
    step = VAEStep(model, precision="fp32")
    step(images(dtype=torch.float32))
    model.decoder[1] = nn.Identity()
    with pytest.raises(RuntimeError, match="expected the decoder to end in its sigmoid"):
        step(images(dtype=torch.float32))


@pytest.mark.parametrize("end", [nn.Sigmoid(), nn.Tanh(), None])
def test_samples_are_images(end):
    """Of rows too, in [0, 1] whatever the network's range, before the first step if it is told."""
    z = torch.randn(5, 3)
    model = Plain(end)
    told = VAEStep(model, precision="fp32", image_shape=SHAPE)
    decoded = model.decode(z).detach()
    expected = decoded if isinstance(end, nn.Sigmoid) else ((decoded + 1) / 2).clamp(0, 1)
    assert torch.equal(told.sample(z), expected.reshape(5, *SHAPE))
    step = VAEStep(model, precision="fp32")
    with pytest.raises(ValueError, match=r"images or rows of .* step or image_shape .* \(5, 48\)"):
        step.sample(z)
    step(images(dtype=torch.float32))
    after = step.sample(z)
    assert after.shape == (5, *SHAPE)
    assert after.min() >= 0 and after.max() <= 1
    assert step.latent_shape == (3,)


def test_samples_of_logits_are_probabilities():
    model, z = Plain(), torch.randn(5, 3)
    step = VAEStep(model, precision="fp32", likelihood="bernoulli", image_shape=SHAPE)
    torch.testing.assert_close(step.sample(z).flatten(1), torch.sigmoid(model.decode(z)))


def test_sample_leaves_each_layer_its_mode():
    model = Maps()
    model.encoder[1].eval()
    modes = [m.training for m in model.modules()]
    VAEStep(model, precision="fp32").sample(torch.randn(2, 2, 2, 2))
    assert [m.training for m in model.modules()] == modes


def test_a_compiled_step_finds_out_the_latent(monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    results = []
    for compiled in (True, False):
        torch.manual_seed(0)
        step = VAEStep(Plain(nn.Sigmoid()), precision="fp32", compile=compiled)
        torch.manual_seed(2)
        results.append([step(images(dtype=torch.float32)).loss.item() for _ in range(2)])
    assert results[0] == pytest.approx(results[1], rel=1e-5)


def test_the_latent_is_not_known_before():
    step = VAEStep(Plain(), precision="fp32")
    with pytest.raises(ValueError, match="expected a first step, or .* got a Plain without either"):
        _ = step.latent_shape
    assert step.likelihood is None and step.image_shape is None


def test_no_module():
    with pytest.raises(TypeError, match="expected a model that is a module, got a function"):
        VAEStep(images)


def test_parameters_that_take_no_part():
    model = Plain(nn.Tanh())
    model.pseudo_inputs = nn.Linear(2, PIXELS)
    with pytest.warns(UserWarning, match="2 parameters of the Plain, pseudo_inputs.weight"):
        VAEStep(model, precision="fp32")(images(dtype=torch.float32))
    frozen = Plain(nn.Tanh())
    frozen.features = nn.Linear(2, 2).requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        VAEStep(frozen, precision="fp32")(images(dtype=torch.float32))


@pytest.mark.parametrize(
    ("encode", "words"),
    [
        (lambda self, x: self.encoder(x), r"one tensor of shape (8, 6)"),
        (lambda self, x: [self.encoder(x)], "a list of 1: (8, 6)"),
        (lambda self, x: (*self.encoder(x).chunk(2, 1), x), "of 3: (8, 3), (8, 3), (8, 48)"),
        (lambda self, x: self.encoder(x).split([4, 2], 1), "a tuple of 2: (8, 4), (8, 2)"),
        (lambda self, x: {"embedding": self.encoder(x)}, "a dict of embedding"),
        (lambda self, x: torch.distributions.Normal(self.encoder(x), 1.0), "got a Normal"),
        (lambda self, x: None, "got a NoneType"),
        (lambda self, x: [[h] for h in self.encoder(x).chunk(2, 1)], "a list of 2: list, list"),
    ],
)  # fmt: skip
def test_encoders_of_other_things(encode, words):
    message = first_error(with_part(encode=encode))
    assert message.startswith("expected encode to give a mean and a log-variance of one shape")
    assert words in message


@pytest.mark.parametrize("name", ["softmax", "softplus", "exp", "sigmoid"])
def test_a_second_tensor_that_is_no_log_variance(name):
    ends = {"softplus": F.softplus, "exp": torch.exp, "sigmoid": torch.sigmoid}
    positive = ends.get(name, partial(torch.softmax, dim=1))

    def encode(self, x):
        mu, scale = self.encoder(x).chunk(2, 1)
        return mu, positive(scale) + 1e-6

    assert f"got a second tensor that ends in {name};" in first_error(with_part(encode=encode))


@pytest.mark.parametrize(
    ("model", "options", "words"),
    [
        (nn.Linear(2, 2), {}, "expected a model with encode(images) and decode(z), or an adapter "),
        (Plain(), dict(likelihood="laplace"), "expected a likelihood among"),
        (Plain(), dict(compile=True, adapter=print), "encode and decode for compile=True"),
        (Plain(), dict(image_shape=(1, 4, 4)), "images of shape (1, 4, 4), got (3, 4, 4)"),
        (Plain(nn.Tanh()), dict(likelihood="bernoulli"), "that gives other values from -1 on"),
        (Plain(nn.ReLU()), dict(likelihood="bernoulli"), "that gives other values from 0 on"),
        (Plain(), dict(adapter=lambda model, x: x), "(reconstruction, mu, logvar), the last two"),
        (Plain(), dict(adapter=lambda model, x: 1 / 0), "got ZeroDivisionError: division by zero"),
        (with_part(decode=lambda self, z: self.decoder(z[0])), {}, "shape, (8, 3, 4, 4), or rows"),
        (with_part(decode=lambda self, z: self.decoder(z[:, 0])), {}, "decode to take latents"),
        (with_part(decode=lambda self, z: (z, z)), {}, "expected decode to give images, got a tup"),
        (with_part(decode=lambda self, z: z), {}, "rows of 48 values, got shape (8, 3)"),
        (with_part(encode=lambda self, x: self.no), {}, "got AttributeError: 'Other' object has"),
        (with_part(encode=lambda self, x: (x[:4].flatten(1),) * 2), {}, "latent for each of 8 im"),
        (VAE(20), {}, "or rows of pixels, got RuntimeError: "),
    ],
)
def test_models_that_are_none(model, options, words):
    assert words in first_error(model, **options)


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (images(dtype=torch.float32) * 2 - 1, r"expected images in [0, 1], got values from -0.9"),
        (images(dtype=torch.float32) * 255, "to 25"),
        (torch.full((2, *SHAPE), torch.nan), "got values from nan to nan"),
        (torch.zeros(0, *SHAPE), "at least one image"),
    ],
)
def test_wrong_images(x, words):
    assert words in first_error(Plain(), x)


def test_a_gaussian_reconstruction_loss():
    x = images()
    made = torch.randn_like(x)
    expected = -torch.distributions.Normal(made, 1.0).log_prob(x).sum()
    constant = 0.5 * torch.log(torch.tensor(2 * torch.pi, dtype=x.dtype)) * x.numel()
    ours = losses.gaussian_reconstruction_loss(made.flatten(1), x)
    torch.testing.assert_close(ours, expected - constant)
    half = losses.gaussian_reconstruction_loss(made.bfloat16(), x.bfloat16())
    assert half.dtype == torch.float32
    with pytest.raises(ValueError, match="as many values as its images"):
        losses.gaussian_reconstruction_loss(made[:, :1], x)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize(
    "make", [partial(Plain, nn.Sigmoid()), Maps, partial(ConvVAE, 3, 16, 2, 4)]
)
def test_half_precision(make, precision):
    torch.manual_seed(0)
    step = VAEStep(make(), precision=precision)
    x = torch.rand(4, 3, 16, 16) if isinstance(step.model, ConvVAE) else images(4, torch.float32)
    result = step(x)
    assert result.loss.dtype == torch.float32 and result.loss.isfinite()
    assert step.sample(torch.randn(2, *step.latent_shape)).shape == (2, *x.shape[1:])
