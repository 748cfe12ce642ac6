"""The modules, `accelerate` and `restore`, beside PyTorch's own layers."""

import copy
import io
import pickle

import pytest
import torch
from oracle import assert_module
from torch import nn
from torch.nn.utils import parametrizations, spectral_norm

from genfast import accelerate, functional, restore, use_backend
from genfast.launch import start
from genfast.models import weights_init
from genfast.nn import (
    DiscriminatorBlock,
    FusedSequential,
    GaussianSampler,
    GeneratorBlock,
    statistics_groups,
)

pytestmark = pytest.mark.kernels

ACTIVATIONS = {
    "relu": nn.ReLU(),
    "leaky_relu": nn.LeakyReLU(0.3),
    "tanh": nn.Tanh(),
    "sigmoid": nn.Sigmoid(),
    "identity": nn.Identity(),
}


def generator():
    """Three fused runs of transposed convolutions, the last without batch norm."""
    return nn.Sequential(
        nn.ConvTranspose2d(4, 6, 3, 1, 0, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(True),
        nn.ConvTranspose2d(6, 3, 2, 2),
        nn.BatchNorm2d(3, momentum=None),
        nn.ConvTranspose2d(3, 1, 3, 1, 1),
        nn.Tanh(),
    )


def discriminator():
    """Fused runs of convolutions, one of them inside another module."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 2, 2, bias=False),
        nn.LeakyReLU(0.2, True),
        nn.Sequential(nn.Conv2d(4, 5, 3, 1, 1), nn.BatchNorm2d(5), nn.LeakyReLU(0.2)),
        nn.Flatten(),
        nn.Linear(45, 1),
    )


def latent(device):
    return torch.randn(3, 4, 1, 1, device=device)


def image(device):
    return torch.randn(3, 1, 6, 6, device=device)


@pytest.fixture
def fused_runs(monkeypatch):
    """Counts the blocks that run fused."""
    calls = []
    run = functional.chain

    def counting(x, blocks, *args, **kwargs):
        calls.extend(blocks)
        return run(x, blocks, *args, **kwargs)

    monkeypatch.setattr(functional, "chain", counting)
    return calls


@pytest.mark.one_in(2)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_blocks(activation, norm, training, device):
    options = dict(bias=not norm, norm=norm, activation=activation, negative_slope=0.3)
    if norm:
        options |= dict(eps=1e-3, momentum=0.4)
    pairs = (
        (GeneratorBlock(3, 5, 3, 2, 1, 1, **options), (2, 3, 3, 4)),
        (DiscriminatorBlock(3, 5, 3, 2, 1, **options), (2, 3, 6, 7)),
    )
    for block, shape in pairs:
        block = block.to(device).train(training)
        assert type(block.conv) in (nn.ConvTranspose2d, nn.Conv2d)
        assert type(block.norm) is (nn.BatchNorm2d if norm else type(None))
        layers = {"conv": block.conv, "norm": block.norm or nn.Identity()}
        stock = nn.Sequential()
        for name, layer in layers.items():
            stock.add_module(name, copy.deepcopy(layer))
        stock.append(ACTIVATIONS[activation]).train(training)
        assert_module(block, stock, torch.randn(shape, device=device))


def test_blocks_default_to_dcgan(device):
    up, down = GeneratorBlock(3, 5).to(device), DiscriminatorBlock(5, 3).to(device)
    assert up(torch.randn(2, 3, 4, 4, device=device)).shape == (2, 5, 8, 8)
    assert down(torch.randn(2, 5, 8, 8, device=device)).shape == (2, 3, 4, 4)
    for block, activation in ((up, "relu"), (down, "leaky_relu")):
        assert (block.activation, block.negative_slope) == (activation, 0.2)
        assert block.conv.bias is None
        assert (block.norm.eps, block.norm.momentum) == (1e-5, 0.1)
    keys = ["conv.weight"]
    keys += [f"norm.{name}" for name in nn.BatchNorm2d(1).state_dict()]
    assert list(up.state_dict()) == list(down.state_dict()) == keys


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("build", "sample", "runs"), [(generator, latent, 3), (discriminator, image, 2)]
)
def test_accelerate_changes_the_execution_and_nothing_else(
    build, sample, runs, training, device, fused_runs
):
    stock = build().to(device).train(training)
    model = copy.deepcopy(stock)
    keys, parameters = list(model.state_dict()), list(map(id, model.parameters()))
    report = accelerate(model)
    assert list(model.state_dict()) == keys
    assert list(map(id, model.parameters())) == parameters
    assert sum(entry.fused for entry in report) == len(report) == runs
    for _ in range(2):  # the second step starts from running statistics that moved
        model.load_state_dict(stock.state_dict())
        fused_runs.clear()
        assert_module(model, stock, sample(device))
        assert len(fused_runs) == runs
    restore(model)
    assert repr(model) == repr(stock)
    assert [type(m) for m in model.modules()] == [type(m) for m in stock.modules()]
    assert [vars(m).keys() for m in model.modules()] == [vars(m).keys() for m in stock.modules()]
    fused_runs.clear()
    x = sample(device)
    assert torch.equal(model.eval()(x), model(x))
    assert not fused_runs


def test_fused_sequential_is_a_sequential(device, fused_runs):
    stock = generator().to(device)
    model = FusedSequential(*copy.deepcopy(stock))
    assert isinstance(model, nn.Sequential)
    assert list(model.state_dict()) == list(stock.state_dict())
    assert_module(model, stock, latent(device))
    assert len(fused_runs) == 3
    assert len(model[3:]) == 4


def test_reference_backend_is_pytorch(device, fused_runs):
    stock = generator().to(device)
    model = copy.deepcopy(stock)
    accelerate(model)
    x = latent(device)
    with use_backend("reference"):
        assert torch.equal(model(x), stock(x))
    assert not fused_runs


@pytest.mark.parametrize("training", [True, False])
def test_reference_blocks_are_pytorch(training, device):
    block = GeneratorBlock(3, 5, activation="leaky_relu").to(device).train(training)
    stock = nn.Sequential(*copy.deepcopy([block.conv, block.norm]), nn.LeakyReLU(0.2))
    x = torch.randn(2, 3, 3, 3, device=device)
    with use_backend("reference"):
        torch.testing.assert_close(block(x), stock.train(training)(x))
    for name, buffer in block.norm.named_buffers():
        assert torch.equal(buffer, stock[1].get_buffer(name)), name


def hooked(layer=None):
    layer = layer or nn.Conv2d(3, 3, 3, 1, 1)
    layer.register_forward_hook(lambda module, inputs, output: output * 2)
    return layer


def hooked_before(layer):
    layer.register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,))
    return layer


def replaced():
    layer = nn.Conv2d(3, 3, 3, 1, 1)
    layer.forward = lambda x: x + 1
    return layer


class Doubled(nn.Conv2d):
    """A layer with a forward of its own."""

    def forward(self, x):
        return 2 * super().forward(x)


UNFUSED = {
    "hook": hooked,
    "forward": replaced,
    "Doubled": lambda: Doubled(3, 3, 3, 1, 1),
    "groups": lambda: nn.Conv2d(3, 3, 3, 1, 1, groups=3),
    "dilation": lambda: nn.Conv2d(3, 3, 3, 1, 2, dilation=2),
    "circular": lambda: nn.Conv2d(3, 3, 3, 1, 1, padding_mode="circular"),
    # The older spectral norm is a hook of PyTorch's own; this one has another one beside it.
    "a hook": lambda: hooked(spectral_norm(nn.Conv2d(3, 3, 3, 1, 1))),
    "has a hook": lambda: hooked_before(spectral_norm(nn.Conv2d(3, 3, 3, 1, 1))),
}


@pytest.mark.parametrize("reason", UNFUSED)
def test_what_does_not_fuse_behaves_as_in_pytorch(reason, device):
    layers = [UNFUSED[reason](), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 2, 1), nn.Tanh()]
    stock = nn.Sequential(*layers).to(device)
    model = copy.deepcopy(stock)
    first, second = accelerate(model)
    assert not first.fused
    assert reason in first.reason
    assert (second.name, second.layers, second.fused) == ("3", "Conv2d + Tanh", True)
    assert second.reason == ""
    x = torch.randn(2, 3, 5, 4, device=device)
    assert_module(model, stock, x)


NORMALISED = {
    "hook": spectral_norm,
    "parametrisation": parametrizations.spectral_norm,
    "weight norm": parametrizations.weight_norm,
}


@pytest.mark.parametrize("kind", NORMALISED)
@pytest.mark.parametrize("training", [True, False])
def test_spectral_norm_moves_once_a_forward(kind, training, device, fused_runs):
    layers = [nn.Conv2d(3, 4, 3, 1, 1), nn.ReLU(), nn.ConvTranspose2d(4, 2, 4, 2, 1), nn.Tanh()]
    stock = nn.Sequential(*layers).to(device)
    for i in (0, 2):
        NORMALISED[kind](stock[i])
    stock.train(training)
    model = copy.deepcopy(stock)
    before = copy.deepcopy(model.state_dict())
    report = accelerate(model)
    assert [entry.fused for entry in report] == [True, True]
    assert str(report)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)  # A look moves nothing.
    x = torch.randn(2, 3, 5, 4, device=device)
    assert_module(model, stock, x)
    assert len(fused_runs) == 2
    for _ in range(2):
        model(x), stock(x)
        torch.testing.assert_close(model.state_dict(), stock.state_dict(), rtol=0, atol=0)


def test_parametrised_batch_norm_stays_out(device):
    stock = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU()).to(device)
    parametrizations.weight_norm(stock[1], dim=None)
    model = copy.deepcopy(stock)
    (entry,) = accelerate(model)
    assert "'1' stays out: it has a parametrisation" in entry.how
    assert_module(model, stock, torch.randn(2, 3, 5, 4, device=device))


def test_a_shared_activation_fuses(device, fused_runs):
    shared = nn.LeakyReLU(0.2)
    stock = nn.Sequential(
        nn.Conv2d(3, 3, 3), shared, nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2), shared)
    ).to(device)
    model = copy.deepcopy(stock)
    report = accelerate(model)
    assert [entry.how for entry in report] == ["fused", "fused"]
    assert [entry.layers.split(" + ")[-1] for entry in report] == ["LeakyReLU"] * 2
    assert_module(model, stock, torch.randn(2, 3, 5, 4, device=device))
    assert [block.activation for block in fused_runs] == ["leaky_relu"] * 2


def test_norm_or_activation_with_a_hook_stays_out_of_the_run(device):
    seen = []
    stock = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).to(device)
    model = copy.deepcopy(stock)
    accelerate(model)
    model[2].register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    assert_module(model, stock, torch.randn(2, 3, 5, 4, device=device))
    assert seen == [(2, 4, 3, 2)]
    report = accelerate(model)
    assert [entry.layers for entry in report] == ["Conv2d + BatchNorm2d"]
    assert "fused; ReLU '2' stays out: it has a hook" in str(report)


def test_layer_that_appears_twice(device):
    shared = nn.Conv2d(3, 3, 3, 1, 1)
    stock = nn.Sequential(shared, nn.ReLU(), shared, nn.Tanh()).to(device)
    model = copy.deepcopy(stock)
    assert model[0] is model[2]
    (entry,) = accelerate(model)
    assert not entry.fused
    assert "also appears" in entry.reason
    assert_module(model, stock, torch.randn(2, 3, 5, 4, device=device))


def test_convolution_outside_a_sequential():
    model = nn.ModuleDict({"stem": nn.Conv2d(3, 4, 3), "body": discriminator()})
    stem, *others = accelerate(model)
    assert (stem.name, stem.fused) == ("stem", False)
    assert "nn.Sequential" in stem.reason
    assert [entry.name for entry in others] == ["body.0", "body.2.0"]


class Model(nn.Module):
    """Somebody's network, whose forward calls one container and goes through another."""

    def __init__(self):
        super().__init__()
        self.whole = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), nn.Conv2d(4, 4, 1))
        self.parts = nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU())
        self.spare = nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU())

    def forward(self, x):
        x = self.whole(x)
        for layer in self.parts:
            x = layer(x)
        return x


def test_report_says_which_container_must_be_called(device, fused_runs):
    model = Model().to(device)
    report = accelerate(model)
    # The forward of the model is seen to call one of them, and to run the children of another.
    assert [entry.container for entry in report] == ["", "", "", "spare"]
    assert "fused when spare is called" in str(report[3])
    assert "takes its parts otherwise" in str(report)
    model(torch.randn(2, 3, 7, 7, device=device))
    assert len(fused_runs) == 3
    (entry,) = accelerate(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()))
    assert (entry.container, entry.how) == ("", "fused")


def test_a_container_that_begins_with_vectors_fuses_what_comes_later(device, fused_runs):
    stock = nn.Sequential(
        nn.Linear(5, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Unflatten(1, (3, 2, 2)),
        nn.ConvTranspose2d(3, 4, 4, 2, 1), nn.BatchNorm2d(4), nn.ReLU(),
        nn.ConvTranspose2d(4, 1, 4, 2, 1), nn.Tanh(), nn.Flatten(), nn.Linear(64, 3),
    ).to(device)  # fmt: skip
    model = copy.deepcopy(stock)
    report = accelerate(model)
    assert sum(entry.fused for entry in report) == 2
    assert_module(model, stock, torch.randn(3, 5, device=device))
    assert len(fused_runs) == 2


@pytest.mark.parametrize("wrong", [None, "model", nn.Conv2d])
def test_what_is_no_module_is_refused(wrong):
    for function in (accelerate, restore):
        with pytest.raises(TypeError, match="expected a torch.nn.Module, got "):
            function(wrong)


def test_report_notes_weights_that_are_copied(device):
    model = generator().to(device)  # The last kernel but one is 2 x 2, and 1 channel has no order.
    model[3].to(memory_format=torch.channels_last)
    report = accelerate(model)
    (note,) = [note for note in report.notes if "channels_last" in note]
    assert note.startswith("the weights of 1 of them (0) are not channels_last")
    assert note in str(report)
    model.to(memory_format=torch.channels_last)
    assert not any("channels_last" in note for note in accelerate(model).notes)
    # Nothing is copied where no kernel runs.
    model.to(memory_format=torch.contiguous_format)
    with use_backend("reference"):
        assert not accelerate(model).notes


def test_channels_last_on_request(device):
    """Weights of 4 dimensions, their gradients and nothing else; the optimizer's stay the same."""
    stock = nn.Sequential(generator(), nn.Conv3d(2, 3, 2)).to(device)
    model = copy.deepcopy(stock)
    parameters = list(model.parameters())
    first = model[0][0].weight
    first.grad = torch.ones_like(first)
    report = accelerate(model, channels_last=True)
    assert all(map(lambda a, b: a is b, parameters, model.parameters()))
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, stock.state_dict()[name])
        if weight.dim() == 4:
            assert weight.is_contiguous(memory_format=torch.channels_last)
    assert first.grad.is_contiguous(memory_format=torch.channels_last)
    assert not any("not channels_last" in note for note in report.notes)
    accelerate(stock)
    assert not stock[0][0].weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("architecture", "rounding", "dtype", "noted"),
    [
        ("sm_90", "ieee", torch.float32, True),
        ("sm_90", "tf32", torch.float32, False),
        ("sm_90", "ieee", torch.bfloat16, False),
        ("gfx942", "ieee", torch.float32, False),
    ],
)
def test_report_notes_float32_left_to_pytorch(
    architecture, rounding, dtype, noted, device, round_convolutions, monkeypatch
):
    monkeypatch.setattr(start, "architecture", lambda tensor: architecture)
    round_convolutions(rounding)
    model = generator().to(device, dtype).to(memory_format=torch.channels_last)
    assert any("left to PyTorch" in note for note in accelerate(model).notes) == noted


def test_report_prints():
    report = accelerate(nn.Sequential(*generator(), nn.Conv2d(1, 1, 3, dilation=2)))
    assert report[0].name == "0"
    assert report[0].layers == "ConvTranspose2d + BatchNorm2d + ReLU"
    text = str(report)
    for entry in report:
        assert entry.name in text
        assert entry.layers in text
        assert entry.reason in text
    assert "3 of 4" in text


def test_accelerate_twice_and_restore_once(device):
    stock = discriminator().to(device)
    model = copy.deepcopy(stock)
    accelerate(model)
    accelerate(model)
    restore(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in stock.modules()]


def test_copies_and_state_dicts_of_an_accelerated_model(device):
    stock = generator().to(device)
    model = copy.deepcopy(stock)
    accelerate(model)
    twin = copy.deepcopy(model)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    stock.load_state_dict(torch.load(file, weights_only=True))
    x = latent(device)
    assert_module(twin, stock, x)
    restore(twin)
    assert type(twin) is nn.Sequential


class Pyramid(nn.Sequential):
    """A named `nn.Sequential`, as models have them."""


@pytest.mark.parametrize("container", [nn.Sequential, Pyramid])
def test_pickles_of_an_accelerated_model(container, device):
    stock = container(*generator()).to(device)
    model = copy.deepcopy(stock)
    accelerate(model)
    for pickled in (model, model[:3]):
        twin = pickle.loads(pickle.dumps(pickled))
        assert type(twin) is type(pickled)
        assert_module(twin, copy.deepcopy(stock[: len(twin)]), latent(device))
    twin = pickle.loads(pickle.dumps(model))
    restore(twin)
    assert type(twin) is container


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("build", [generator, lambda: GeneratorBlock(4, 3)])
def test_traced_models_hold_pytorch_operations(build, device):
    model = build().to(device).eval()
    accelerate(model)
    x = latent(device)
    with use_backend("auto"):
        traced = torch.jit.trace(model, x)
        torch.testing.assert_close(traced(torch.cat([x, x])), torch.cat([model(x)] * 2))


def test_half_precision_model(device):
    stock = generator().to(device, torch.bfloat16)
    model = copy.deepcopy(stock)
    accelerate(model)
    x = latent(device).bfloat16()
    assert model(x).dtype == torch.bfloat16
    assert_module(copy.deepcopy(stock), stock, x)


def test_switching_between_training_and_evaluation(device):
    stock = generator().to(device)
    model = copy.deepcopy(stock)
    accelerate(model)
    for training in (True, False, True):
        model.load_state_dict(stock.state_dict())  # Roundings of the step before are not its own.
        assert_module(model.train(training), stock.train(training), latent(device))


@pytest.mark.parametrize("tracking", [True, False])
def test_frozen_norm_beside_training_layers(tracking, device):
    norm = nn.BatchNorm2d(4, track_running_stats=tracking, affine=tracking)
    stock = nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.ReLU()).to(device)
    stock[1].eval()
    model = copy.deepcopy(stock)
    accelerate(model)
    assert_module(model, stock, torch.randn(2, 3, 5, 4, device=device))


def test_weights_init_of_dcgans(device):
    model = nn.Sequential(GeneratorBlock(3, 4), DiscriminatorBlock(4, 3), GaussianSampler())
    accelerate(nn.Sequential(model))
    model.apply(weights_init)
    for module in model.modules():
        name = type(module).__name__
        assert hasattr(module, "weight") == ("Conv" in name or "BatchNorm" in name)
    assert 0.01 < model[0].conv.weight.std() < 0.03


def test_inference_mode_and_other_inputs(device):
    stock = generator().to(device).eval()
    model = copy.deepcopy(stock)
    accelerate(model)
    x = latent(device)
    with torch.inference_mode():
        torch.testing.assert_close(model(x), stock(x))
    mixed = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).to(device)
    single = torch.randn(3, 5, 4, device=device)  # (C, H, W), which PyTorch takes too
    expected = mixed(single)
    accelerate(mixed)
    torch.testing.assert_close(mixed(single), expected)


def test_complex_convolutions_stay_pytorchs(device):
    stock = nn.Sequential(nn.Conv2d(3, 4, 3)).to(device, torch.complex64)
    model = copy.deepcopy(stock)
    accelerate(model)
    x = torch.randn(2, 3, 5, 4, dtype=torch.complex64, device=device)
    torch.testing.assert_close(model(x), stock(x))


def mixed_norms():
    """Batch norms fused and not, with and without tracking, momentum, affine parameters."""
    return nn.Sequential(
        FusedSequential(nn.Conv2d(2, 4, 3, 2, 1), nn.BatchNorm2d(4, momentum=None), nn.ReLU()),
        nn.BatchNorm2d(4, affine=False),
        DiscriminatorBlock(4, 6),
        nn.Sequential(nn.Conv2d(6, 5, 1), nn.BatchNorm2d(5, track_running_stats=False)),
        nn.Flatten(),
        nn.BatchNorm1d(20, momentum=0.3),
        nn.Linear(20, 1),
    )


@pytest.mark.float64
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_one_pass_over_groups_is_a_pass_for_each(backend, device):
    merged = mixed_norms().to(device, torch.float64)
    merged[3][1].track_running_stats = False
    apart = copy.deepcopy(merged)
    parts = [torch.randn(3, 2, 8, 8, dtype=torch.float64, device=device) + i for i in range(3)]
    with use_backend(backend):
        for _ in range(2):
            with statistics_groups(merged, 3):
                y = merged(torch.cat(parts))
            expected = torch.cat([apart(part) for part in parts])
            torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)
            y.square().sum().backward()
            expected.square().sum().backward()
    for ours, stock in zip(merged.parameters(), apart.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, stock.grad, rtol=1e-8, atol=1e-8)
    for (name, ours), stock in zip(merged.named_buffers(), apart.buffers(), strict=True):
        torch.testing.assert_close(ours, stock, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: n + m)
    assert not any("forward" in vars(m) for m in merged.modules())


def test_groups_in_evaluation_are_one_batch(device):
    model = mixed_norms()[:3].to(device)
    model(torch.randn(4, 2, 8, 8, device=device))
    model.eval()
    x = torch.randn(3, 2, 8, 8, device=device)
    expected = model(x)
    with statistics_groups(model, 2):
        assert torch.equal(model(x), expected)


@pytest.mark.parametrize("layer", [0, 1])
def test_groups_of_unequal_size(layer, device):
    model = mixed_norms()[layer : layer + 1].to(device)
    x = torch.randn(3, (2, 4)[layer], 8, 8, device=device)
    with statistics_groups(model, 2), pytest.raises(ValueError, match="3 images and 2 groups"):
        model(x)


def test_tracking_switched_off_later(device):
    """PyTorch then ignores the running statistics in training, and leaves them alone."""
    ours = FusedSequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)).to(device)
    ours[1].track_running_stats = False
    stock = nn.Sequential(*copy.deepcopy(ours))
    x = torch.randn(3, 2, 8, 8, device=device)
    torch.testing.assert_close(ours(x), stock(x))
    assert ours[1].num_batches_tracked == 0
    assert torch.equal(ours[1].running_mean, stock[1].running_mean)
    torch.testing.assert_close(ours.eval()(x), stock.eval()(x))
