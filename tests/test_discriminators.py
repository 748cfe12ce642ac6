"""A GAN step of discriminators, generators and optimizers as people write them."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.data import DataLoader, TensorDataset

import genfast
from genfast import use_backend
from genfast.models import GANDiscriminator, GANGenerator
from genfast.nn import DiscriminatorBlock
from genfast.training import GANStep
from genfast.training.steps.judge import Judge
from genfast.training.steps.stock import StockGANStep

LATENT = (4, 1, 1)
ENDS_IN_SIGMOID = "genfast: the discriminator ends in a Sigmoid"


def _layers(*end):
    return (
        nn.Conv2d(1, 4, 4, 2, 1, bias=False),
        nn.LeakyReLU(0.2, inplace=True),
        nn.Conv2d(4, 6, 4, 2, 1, bias=False),
        nn.BatchNorm2d(6),
        nn.LeakyReLU(0.2, inplace=True),
        nn.Conv2d(6, 1, 2, 1, 0, bias=False),
        *end,
    )


class Example(nn.Module):
    """Built as the discriminator of PyTorch's public DCGAN example is."""

    def __init__(self):
        super().__init__()
        self.main = nn.Sequential(*_layers(nn.Sigmoid()))

    def forward(self, x):
        return self.main(x).view(-1, 1).squeeze(1)


class Gated(nn.Module):
    """One Sigmoid serves a gate and, at another call, the end."""

    def __init__(self):
        super().__init__()
        self.main, self.sigmoid = nn.Sequential(*_layers()), nn.Sigmoid()
        self.gate = nn.Parameter(torch.tensor(0.3))

    def forward(self, x):
        return self.sigmoid(self.main(x * self.sigmoid(self.gate))).flatten(1).float()


class ByKeyword(Example):
    """Names what its Sigmoid takes."""

    def forward(self, x):
        for layer in self.main[:-1]:
            x = layer(x)
        return self.main[6](input=x).flatten()


class Ending(nn.Module):
    """Ends in a function of what its layers return."""

    def __init__(self, end, *layers):
        super().__init__()
        self.main, self.end = nn.Sequential(*(layers or _layers())), end

    def forward(self, x):
        return self.end(self.main(x))


def _block():
    end = DiscriminatorBlock(6, 1, 2, 1, 0, bias=True, norm=False, activation="sigmoid")
    return nn.Sequential(*_layers()[:-1], end)


def _generator(channels=1):
    return nn.Sequential(nn.ConvTranspose2d(4, channels, 8, 1, 0), nn.Tanh())


def _step(discriminator, generator=None, **options):
    options = dict(latent_shape=LATENT, precision="fp32") | options
    return GANStep(generator or _generator(), discriminator, **options)


def _images(n=6, channels=1):
    return torch.rand(n, channels, 8, 8) * 2 - 1


def _state(*modules):
    return [t.clone() for m in modules for t in m.state_dict().values()]


def _bce_losses(generator, discriminator, images, steps):
    """The losses of PyTorch's DCGAN example, which takes BCELoss of probabilities."""
    networks = generator, discriminator
    optimizers = [torch.optim.Adam(m.parameters(), 2e-4, (0.5, 0.999)) for m in networks]
    step = StockGANStep(*networks, optimizers, latent_shape=LATENT)
    return [[loss.item() for loss in step(images)] for _ in range(steps)]


PROBABILISTIC = {
    "example": (Example, "main.6"),
    "flattened": (lambda: nn.Sequential(*_layers(nn.Sigmoid(), nn.Flatten(0))), "6"),
    "gated": (Gated, "sigmoid"),
    "by keyword": (ByKeyword, "main.6"),
    "block": (_block, "5"),
    "mlp": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Sigmoid(), nn.Linear(8, 1),
                                  nn.Sigmoid()), "4"),
}  # fmt: skip


@pytest.mark.parametrize("how", ["plain", "two passes", "accelerated"])
@pytest.mark.parametrize("name", PROBABILISTIC)
def test_a_final_sigmoid_is_taken_off(name, how):
    make, where = PROBABILISTIC[name]
    torch.manual_seed(0)
    ours = _generator(), make()
    plain, images = copy.deepcopy(ours), _images()
    if how == "accelerated":
        genfast.accelerate(ours[1])
    step = _step(ours[1], ours[0], merge=False if how == "two passes" else None)
    torch.manual_seed(1)
    with pytest.warns(UserWarning, match=f"{ENDS_IN_SIGMOID}, {where}"):
        losses = [[t.item() for t in step(images)]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        losses += [[t.item() for t in step(images)] for _ in range(9)]
    assert step.final_sigmoid == where
    torch.manual_seed(1)
    torch.testing.assert_close(losses, _bce_losses(*plain, images, 10), rtol=1e-4, atol=0)
    torch.testing.assert_close(_state(*ours), _state(*plain), rtol=1e-3, atol=4e-4)
    assert len({loss for _, loss in losses}) == 10
    # Nothing stays behind: it returns probabilities as before.
    assert not any(m._forward_hooks for m in ours[1].modules())
    outputs = copy.deepcopy(ours[1]).eval()(images)
    torch.testing.assert_close(outputs, plain[1].eval()(images), rtol=1e-3, atol=1e-3)


@pytest.mark.kernels
@pytest.mark.parametrize("name", ["example", "block"])
def test_a_final_sigmoid_on_the_kernels(name, device):
    torch.manual_seed(0)
    make, where = PROBABILISTIC[name]
    discriminator, images = make().to(device), _images(2).to(device)
    expected = Judge(copy.deepcopy(discriminator))
    expected.sigmoid = where
    genfast.accelerate(discriminator)
    with use_backend("triton"), pytest.warns(UserWarning, match=ENDS_IN_SIGMOID):
        judge = Judge(discriminator)
        judge.look(images)
        logits = judge(images)
    torch.testing.assert_close(logits, expected(images), rtol=1e-4, atol=1e-5)
    assert judge.sigmoid == where and logits.min() < 0


def test_what_a_first_batch_tells_survives_capture(capture_anyway):
    losses, images = [], _images()
    for captured in (False, True):
        if captured:
            capture_anyway()
        torch.manual_seed(0)
        step = _step(Example())
        with pytest.warns(UserWarning, match=ENDS_IN_SIGMOID):
            losses.append([t.item() for _ in range(4) for t in step(images)])
        assert (step.why_not_captured, step.why_not_merged) == (
            None if captured else "only a GPU has graphs, and the device is cpu",
            None,
        )
    assert losses[0] == losses[1]


BOUND = {
    "torch.sigmoid": Ending(lambda x: torch.sigmoid(x).flatten()),
    "mean of probabilities": Ending(lambda x: x.mean((2, 3)), nn.Conv2d(1, 1, 4), nn.Sigmoid()),
    "1 - probability": Ending(lambda x: 1 - x, *_layers(nn.Sigmoid())),
    "hardsigmoid": Ending(lambda x: x, *_layers(nn.Hardsigmoid())),
    "tanh, shifted": Ending(lambda x: (x.tanh() + 1) / 2),
    "one of two classes": Ending(lambda x: torch.stack([x, -x]).softmax(0)[0]),
}


@pytest.mark.parametrize("zero", [False, True], ids=["", "of weights 0"])
@pytest.mark.parametrize("name", BOUND)
def test_other_probabilities_are_refused(name, zero):
    generator, discriminator = _generator(), copy.deepcopy(BOUND[name])
    if zero:
        for p in discriminator.parameters():
            nn.init.zeros_(p)
    step, before = _step(discriminator, generator), _state(generator, discriminator)
    images, rng = _images(), torch.get_rng_state()
    with pytest.raises(ValueError, match=r"expected a discriminator that returns logits, got one "):
        step(images)
    assert all(map(torch.equal, _state(generator, discriminator), before))
    assert torch.equal(torch.get_rng_state(), rng)
    # They are taken all the same from whoever vouches for them.
    step = _step(discriminator, generator, output="logits")
    assert all(t.isfinite() for t in step(images))
    assert step.final_sigmoid is None


@pytest.mark.parametrize("end", [nn.Identity(), nn.ReLU()], ids=["logits", "relu"])
@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_logits_may_happen_to_lie_between_0_and_1(value, end):
    layer = nn.Linear(64, 1)
    nn.init.zeros_(layer.weight)
    nn.init.constant_(layer.bias, value)
    discriminator = nn.Sequential(nn.Flatten(), layer, end)
    for n in (1, 6):
        _step(discriminator, output=None)(_images(n))
        nn.init.zeros_(layer.weight)
        nn.init.constant_(layer.bias, value)


def test_the_first_look_leaves_no_trace():
    outcomes, images = [], _images()
    for looked in (False, True):
        torch.manual_seed(0)
        step = _step(Ending(lambda x: x, *_layers(nn.Dropout(0.5))))
        if looked:
            before = _state(*step.modules.values()), torch.get_rng_state()
            step._look(images)
            after = _state(*step.modules.values()), torch.get_rng_state()
            torch.testing.assert_close(after, before, rtol=0, atol=0)
        else:
            step._look, step.why_not_merged = lambda images: None, None
        torch.manual_seed(1)
        outcomes.append([t.item() for _ in range(3) for t in step(images)])
    assert outcomes[0] == outcomes[1]


class TwoHeads(nn.Module):
    def __init__(self, make=lambda validity, label: (validity, label)):
        super().__init__()
        self.main, self.make = nn.Sequential(*_layers(nn.Flatten())), make
        self.validity = nn.Sequential(nn.Linear(1, 1), nn.Sigmoid())
        self.label = nn.Linear(1, 10)

    def forward(self, x):
        x = self.main(x)
        return self.make(self.validity(x), self.label(x))


class Autoencoder(nn.Module):
    def __init__(self, channels=1):
        super().__init__()
        self.main = nn.Conv2d(channels, channels, 3, 1, 1)

    def forward(self, x):
        return self.main(x)


@pytest.mark.parametrize(
    ("discriminator", "got"),
    [
        (TwoHeads(), "a tuple of 2;"),
        (TwoHeads(lambda v, x: dict(logits=v, label=x)), "a dict of 'logits', 'label';"),
        (TwoHeads(lambda v, x: x), r"a tensor of shape \(6, 10\) for 6 images;"),
        (TwoHeads(lambda v, x: v.mean()), r"a tensor of shape \(\) for 6 images;"),
        (TwoHeads(lambda v, x: v > 0), r"a tensor of shape \(6, 1\) and dtype torch.bool;"),
        (Autoencoder(), r"a tensor of shape \(6, 1, 8, 8\), the shape of its images, as an auto"),
        (Autoencoder(3), r"a tensor of shape \(6, 3, 8, 8\), the shape of its images, as an auto"),
    ],
)
def test_what_is_no_logits_is_refused(discriminator, got):
    channels = 3 if "6, 3" in got else 1
    step = _step(discriminator, _generator(channels))
    with pytest.raises(
        (ValueError, TypeError), match=f"^expected .* logits, .*, got {got}.*output="
    ):
        step(_images(channels=channels))


def test_output_chooses_the_logits():
    torch.manual_seed(0)
    images, losses = _images(), []
    ours = _generator(), TwoHeads()
    plain = copy.deepcopy(ours)
    step = _step(ours[1], ours[0], output=lambda returned: returned[0])
    torch.manual_seed(1)
    with pytest.warns(UserWarning, match=f"{ENDS_IN_SIGMOID}, validity.1"):
        losses = [[t.item() for t in step(images)] for _ in range(3)]
    plain[1].make = lambda validity, label: validity
    torch.manual_seed(1)
    torch.testing.assert_close(losses, _bce_losses(*plain, images, 3), rtol=1e-4, atol=0)
    for output in ("logits", lambda features: features):  # Several an image, vouched for.
        assert _step(TwoHeads(lambda v, x: x), output=output)(images).d_loss.isfinite()
    with pytest.raises(ValueError, match='expected output=None, "logits" or a function, got 0'):
        _step(Example(), output=0)


@pytest.mark.parametrize(
    "end", [nn.Identity(), nn.Flatten(0), nn.Flatten(), nn.Unflatten(0, (6, 1))]
)
def test_logits_have_many_shapes(end):
    discriminator = nn.Sequential(*_layers(end))
    if isinstance(end, nn.Unflatten):
        discriminator = nn.Sequential(nn.Conv2d(1, 1, 4, 2, 1))  # A map of them.
    assert all(t.isfinite() for t in _step(discriminator)(_images()))


def test_images_as_loaders_give_them_reach_a_view():
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.main = nn.Linear(192, 1)

        def forward(self, x):
            return self.main(x.view(len(x), -1))

    torch.manual_seed(0)
    step = _step(Flat(), nn.Sequential(nn.Flatten(), nn.Linear(4, 192), nn.Unflatten(1, (3, 8, 8))))
    for _ in range(2):
        step(_images(channels=3))
    assert step.why_not_merged is None


@pytest.mark.parametrize(
    ("optimizers", "message"),
    [
        (lambda g, d: (d, g), "the generator's optimizer .* holds parameters of the discriminator"),
        (lambda g, d: (g, g), "discriminator's optimizer .* holds parameters of the generator"),
        (lambda g, d: (g, None), "an optimizer of the discriminator's parameters, got a NoneType"),
        (lambda g, d: g, "expected optimizers of the generator and of .*, got a SGD"),
        (lambda g, d: (g,), "expected optimizers of the generator .*, got a tuple of 1"),
        (
            lambda g, d: (g, torch.optim.SGD(_generator().parameters())),
            "the discriminator's optimizer to hold .*, got one that holds none",
        ),
    ],
)  # fmt: skip
def test_optimizers_hold_the_networks_parameters(optimizers, message):
    generator, discriminator = _generator(), Example()
    pair = [torch.optim.SGD(m.parameters()) for m in (generator, discriminator)]
    with pytest.raises(ValueError, match=message):
        _step(discriminator, generator, optimizers=optimizers(*pair))


def test_an_optimizer_may_hold_a_part():
    generator, discriminator = _generator(), nn.Sequential(*_layers())
    pair = torch.optim.SGD(generator.parameters()), torch.optim.SGD(discriminator[5].parameters())
    before = discriminator[0].weight.clone(), discriminator[5].weight.clone()
    _step(discriminator, generator, optimizers=pair)(_images())
    assert torch.equal(discriminator[0].weight, before[0])
    assert not torch.equal(discriminator[5].weight, before[1])


def test_networks_without_parameters():
    with pytest.raises(ValueError, match="expected a network with parameters, got a Flatten"):
        _step(nn.Flatten())


def test_the_generators_latent_shape_is_believed():
    generator, discriminator = GANGenerator((1, 8, 8), 7, 8), GANDiscriminator((1, 8, 8), 4, 2)
    step = GANStep(generator, discriminator, precision="fp32")
    assert step.latent_shape == (7,)
    step(_images())
    assert GANStep(generator, discriminator, latent_shape=7).latent_shape == (7,)
    assert GANStep(_generator(), discriminator).latent_shape == (100, 1, 1)
    with pytest.raises(ValueError, match=r"latent_shape to be whole numbers from 1 on, got \(0, 1"):
        GANStep(generator, discriminator, latent_shape=(0, 1))


@pytest.mark.parametrize(
    ("generator", "message"),
    [
        (_generator(), r"noise of this latent_shape alone, .* latent_shape=\(100,\) .* RuntimeErr"),
        (nn.Bilinear(100, 1, 64), r"for latent_shape=\(100,\) and 6 images it raised TypeError"),
        (Ending(lambda x: (x, x), nn.Linear(100, 8)), "that returns images, got a tuple of 2"),
        (nn.Linear(100, 64), r"the generator makes, \(6, 64\), got \(6, 1, 8, 8\)"),
    ],
)
def test_generators_that_do_not_fit(generator, message):
    with pytest.raises((ValueError, TypeError), match=message):
        _step(nn.Sequential(*_layers()), generator, latent_shape=(100,))(_images())


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
def test_scripted_networks():
    step = _step(torch.jit.script(nn.Sequential(*_layers())))
    assert all(t.isfinite() for t in step(_images()))
    with pytest.raises(ValueError, match="got one whose outputs lie in .0, 1. whatever"):
        _step(torch.jit.script(Example()))(_images())


def test_images_wider_than_the_networks():
    with pytest.raises(TypeError, match="networks' dtype torch.float32, got torch.float64"):
        _step(Example())(_images().double())


def test_a_batch_of_none():
    with pytest.raises(ValueError, match=r"at least one image, got shape \(0, 1, 8, 8\)"):
        _step(Example())(_images(0))


def test_a_discriminator_of_more_than_images():
    class Conditional(Autoencoder):
        def forward(self, x, labels):
            return self.main(x)

    message = r"takes images alone, but for images of shape \(6, 1, 8, 8\) it raised TypeError"
    with pytest.raises(ValueError, match=message) as raised:
        _step(Conditional())(_images())
    assert "labels" in str(raised.value.__cause__)


@pytest.mark.parametrize("runs_short", ["generator", "discriminator", "one pass"])
def test_lack_of_memory_is_nobodys_fault(runs_short):
    def take(x):
        if runs_short != "one pass" or len(x) > 6:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return x

    generator, discriminator = _generator(), Ending(take)
    if runs_short == "generator":
        generator = Ending(take, *_generator())
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        _step(discriminator, generator)(_images())


class Deviation(nn.Module):
    """Looks at the batch as a whole, by a part that its weight may switch off."""

    def __init__(self, start=1.0):
        super().__init__()
        self.main, self.scale = nn.Sequential(*_layers()), nn.Parameter(torch.tensor(start))

    def forward(self, x):
        x = self.main(x).flatten()
        return x + self.scale**2 * x.std()


class ByHand(Deviation):
    def forward(self, x):
        return F.batch_norm(self.main(x), None, None, training=True)


class Functional(Deviation):
    def forward(self, x):
        return F.dropout(self.main(F.dropout(x, 0.5, self.training)), 0.5, self.training)


class Counting(Deviation):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        self.calls += 1
        return self.main(x)


class Fixed(Deviation):
    def forward(self, x):
        return self.main(x).view(6, 1)


class BatchInBackward(Deviation):
    def forward(self, x):
        x = self.main(x)
        if x.requires_grad:
            x.register_hook(lambda gradient: gradient / gradient.norm())
        return x


class Residual(Deviation):
    """Treats images one by one, in a forward of its own, with a batch norm and dropout."""

    def __init__(self):
        super().__init__()
        self.drop, self.norm = nn.Dropout2d(0.25), nn.InstanceNorm2d(4)

    def forward(self, x):
        for i, layer in enumerate(self.main):
            x = layer(x) if i != 2 else layer(self.drop(x + self.norm(x)))
        return x.view(x.size(0), -1)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (Residual, None),
        (Example, None),
        (Deviation, "one pass gave other logits than two"),
        (lambda: Deviation(start=0.0), "one pass gave other logits than two"),
        (ByHand, "one pass gave other logits than two"),
        (Functional, "one pass gave other logits than two"),
        (Counting, "one pass gave other counters than two"),
        (BatchInBackward, "one pass gave other gradients than two"),
        (Fixed, "trying raised RuntimeError: shape '[6, 1]' is invalid for input of size 12"),
    ],
)
@pytest.mark.filterwarnings("ignore:genfast. the discriminator ends in a Sigmoid")
def test_merging_a_forward_of_ones_own_is_found_out(make, reason, precision):
    torch.manual_seed(0)
    step = _step(make(), precision=precision)
    assert "may treat a batch as a whole" in step.why_not_merged
    step(_images())
    if reason is None:
        assert step.why_not_merged is None
    else:
        assert step.why_not_merged.startswith("it, a ")
        assert step.why_not_merged.endswith(f", and {reason}")
    decided = step.why_not_merged
    step(_images())
    assert step.why_not_merged == decided


def test_merging_is_not_tried_where_it_cannot_be():
    watched = Residual()
    watched.main[0].register_forward_hook(lambda *_: None)
    normed = Residual()
    spectral_norm(normed.main[0])
    for discriminator, reason in (
        (watched, "its layer main.0 has a hook, which would see one batch for two"),
        (normed, "its layer main.0 has a parametrisation, which may change at each pass"),
        (Residual().to(torch.bfloat16), "its weights are too coarse to tell by trying"),
    ):
        dtype = next(discriminator.parameters()).dtype
        step = _step(discriminator, _generator().to(dtype))
        step(_images().to(dtype))
        assert step.why_not_merged.endswith(reason)
    assert "switched off" in _step(Residual(), merge=False).why_not_merged


def test_merged_by_trial_trains_as_two_passes_do():
    torch.manual_seed(0)
    generator, discriminator = _generator().double(), Residual().double()
    discriminator.drop.p = 0.0
    networks = [(generator, discriminator), copy.deepcopy((generator, discriminator))]
    images, outcomes = _images().double(), []
    for (generator, discriminator), merge in zip(networks, (None, False), strict=True):
        step = _step(discriminator, generator, merge=merge)
        torch.manual_seed(1)
        outcomes.append([[t.item() for t in step(images)] for _ in range(3)])
        outcomes[-1] += _state(generator, discriminator)
        assert (step.why_not_merged is None) == (merge is None)
    torch.testing.assert_close(outcomes[0], outcomes[1], rtol=1e-7, atol=1e-9)


def test_batches_as_loaders_give_them():
    torch.manual_seed(0)
    images = _images(8)
    outcomes = []
    for data in ((images,), (images, torch.zeros(8))):
        torch.manual_seed(0)
        step = _step(nn.Sequential(*_layers()))
        loader = DataLoader(TensorDataset(*data), batch_size=4)
        outcomes.append([step(batch).g_loss.item() for batch in loader])
    assert outcomes[0] == outcomes[1] and len(outcomes[0]) == 2
    for batch, kind in ((images.numpy(), "ndarray"), ([], "list")):
        with pytest.raises(TypeError, match=f"expected a tensor of images, .* got a {kind}"):
            step(batch)
