"""What only a GPU can show: sizes past 2^31, graphs, streams, and the captured step.

Skipped where there is none; `python -m benchmarks.gpu` runs the whole suite on one.
"""

import copy

import pytest
import torch
from cases import Case, Geometry
from oracle import assert_block, largest_error
from same_training import SEED, assert_same_bits, train
from torch import nn

import genfast
from genfast import functional
from genfast.functional import reparameterize_with_kl
from genfast.launch import start, tiles
from genfast.models import VAE, VAEGAN, DCGANDiscriminator, DCGANGenerator
from genfast.training import GANStep, VAEGANStep, VAEStep

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]
CUDA = torch.device("cuda")
# Of a captured step of a DCGAN-64, counted by the profiler.
MOST_KERNELS = 120


@pytest.fixture(autouse=True)
def as_users_run(request):
    """Deterministic algorithms fill empty tensors, which costs kernels, and cannot be captured."""
    torch.use_deterministic_algorithms(False)
    needed = request.node.get_closest_marker("large_memory")
    free, _ = torch.cuda.mem_get_info()
    if needed and free < needed.args[0] * 2**30:
        pytest.skip(f"needs {needed.args[0]} GiB of free GPU memory")
    yield
    torch.cuda.empty_cache()


def images(n, channels, size, dtype=torch.bfloat16):
    x = torch.randn(n, size, size, channels, device=CUDA, dtype=dtype)
    return x.permute(0, 3, 1, 2)


def assert_equal(ours, expected):
    torch.testing.assert_close(ours, expected, rtol=0, atol=0)


@pytest.mark.large_memory(40)
@pytest.mark.parametrize("norm", [False, True])
def test_convolutions_beyond_2_to_the_31(norm):
    n = 33  # The big side has 33 * 64 * 1024 * 1024 > 2^31 values.
    weight = torch.randn(16, 64, 4, 4, device=CUDA, dtype=torch.bfloat16) / 32
    options = dict(norm=norm, activation="leaky_relu")
    if norm:  # Fixed statistics, or the images would not be independent.
        options |= dict(
            running_mean=torch.zeros(16, device=CUDA),
            running_var=torch.ones(16, device=CUDA),
            training=False,
        )
    x = images(n, 64, 1024)
    last = x[-1:].clone(memory_format=torch.channels_last).requires_grad_()
    x.requires_grad_()
    dy = images(n, 16, 512)
    y, y_last = (functional.conv_block(t, weight, None, 2, 1, **options) for t in (x, last))
    assert_equal(y[-1:], y_last)
    (dx,) = torch.autograd.grad(y, x, dy)
    (dx_last,) = torch.autograd.grad(y_last, last, dy[-1:])
    assert_equal(dx[-1:], dx_last)


@pytest.mark.large_memory(20)
def test_weight_gradient_beyond_2_to_the_31():
    x, dy = images(33, 64, 1024), images(33, 16, 512)
    dy[:-1] = 0  # Only the last image counts.
    weight = torch.zeros(16, 64, 4, 4, device=CUDA, dtype=torch.bfloat16, requires_grad=True)
    (dw,) = torch.autograd.grad(functional.conv_block(x, weight, None, 2, 1), weight, dy)
    y = functional.conv_block(x[-1:], weight, None, 2, 1)
    (expected,) = torch.autograd.grad(y, weight, dy[-1:])
    torch.testing.assert_close(dw, expected, rtol=2e-2, atol=2e-2 * expected.abs().max().item())


@pytest.mark.large_memory(40)
def test_batch_norm_beyond_2_to_the_31():
    x = images(33, 16, 512).requires_grad_()
    weight = torch.randn(16, 64, 4, 4, device=CUDA, dtype=torch.bfloat16) / 16
    y = functional.conv_transpose_block(x, weight, None, 2, 1, norm=True, activation="identity")
    assert y.numel() > 2**31
    for part in (y[:1], y[-1:]):  # As random as each other: mean 0, variance 1.
        assert part.float().mean().abs() < 1e-2 and (part.float().var() - 1).abs() < 2e-2
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    # A constant is what the norm takes away.
    assert dx.float().abs().max() < 0.1


@pytest.mark.large_memory(40)
def test_sampling_beyond_2_to_the_31():
    mu = torch.zeros(33, 2**26, device=CUDA, dtype=torch.bfloat16)
    z, kl = reparameterize_with_kl(mu, mu)
    assert not kl.any()
    for row in (z[0], z[-1]):
        values = row[-(2**20) :].float()
        assert values.mean().abs() < 5e-3 and (values.var() - 1).abs() < 1e-2
    assert not torch.equal(z[0, -100:], z[-1, -100:])


def test_a_hundred_repeats_are_bit_identical():
    generator, discriminator = dcgan()
    z = torch.randn(32, 100, 1, 1, device=CUDA)

    def gradients():
        with torch.autocast("cuda", torch.bfloat16):
            logits = discriminator(generator(z))
        parameters = [*generator.parameters(), *discriminator.parameters()]
        return torch.autograd.grad(logits.float().sum(), parameters)

    first = gradients()
    for _ in range(99):
        assert all(map(torch.equal, gradients(), first))


def dcgan(image_size=64):
    torch.manual_seed(SEED)
    networks = (
        DCGANGenerator(ngf=32, image_size=image_size),
        DCGANDiscriminator(ndf=32, image_size=image_size),
    )
    return tuple(n.to(CUDA, memory_format=torch.channels_last) for n in networks)


def test_another_stream():
    generator, _ = dcgan()
    z = torch.randn(16, 100, 1, 1, device=CUDA)
    expected = copy.deepcopy(generator)(z)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        y = generator(z)
    torch.cuda.current_stream().wait_stream(stream)
    assert_equal(y, expected)


def test_a_block_in_a_graph():
    block = genfast.nn.GeneratorBlock(32, 16).to(CUDA)
    twin = copy.deepcopy(block)
    x = torch.randn(8, 32, 8, 8, device=CUDA).to(memory_format=torch.channels_last)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            block(x)
    torch.cuda.synchronize()
    block.load_state_dict(twin.state_dict())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = block(x)
    for _ in range(3):
        x.normal_()
        graph.replay()
        assert_equal(y, twin(x))
    assert_equal(block.norm.running_var, twin.norm.running_var)
    assert block.norm.num_batches_tracked == 3


def test_replays_draw_new_noise():
    mu = torch.zeros(64, 128, device=CUDA)
    reparameterize_with_kl(mu, mu)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        z, _ = reparameterize_with_kl(mu, mu)
    draws = []
    for _ in range(3):
        graph.replay()
        draws.append(z.clone())
    assert not torch.equal(draws[0], draws[1]) and not torch.equal(draws[1], draws[2])


def gan_step(**options):
    return GANStep(*dcgan(), latent_shape=(100, 1, 1), **options)


def vae_step(**options):
    torch.manual_seed(SEED)
    return VAEStep(VAE().to(CUDA), **options)


def iwae_step(**options):
    return vae_step(importance_samples=5, **options)


def warmed_up_step(**options):
    return vae_step(beta=2.0, beta_warmup=5, **options)


def vae_gan_step(**options):
    torch.manual_seed(SEED)
    model = VAEGAN(1, 32, 20, 32, 32).to(CUDA)
    return VAEGANStep(model.encoder, model.decoder, model.discriminator, **options)


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (gan_step, (16, 3, 64, 64)),
        (vae_step, (32, 1, 28, 28)),
        (iwae_step, (32, 1, 28, 28)),
        (warmed_up_step, (32, 1, 28, 28)),
        (vae_gan_step, (16, 1, 32, 32)),
    ],
)
def test_the_captured_step_is_the_step(make, shape, precision, monkeypatch):
    """Warm-up leaves no trace; weights, statistics, moments and random numbers advance alike.

    To the bit: graph and eager run the same kernels. PyTorch's libraries are asked for algorithms
    that give the same bits every time, and conftest.py for one workspace, by which they choose.
    """
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    step = make(precision=precision, capture=True)
    results = train(step, shape)
    assert step.why_not_captured is None and step._run.failure is None
    assert results["losses"].isfinite().all()
    assert_same_bits(results, train(make(precision=precision, capture=False), shape))


def test_the_learning_rate_reaches_the_graph():
    step = vae_step(capture=True, precision="fp32")
    x = torch.rand(8, 1, 28, 28, device=CUDA)
    step(x)
    for group in step.optimizers["model"].param_groups:
        group["lr"] = 0.0
    before = [p.clone() for p in step.model.parameters()]
    step(x)
    assert all(map(torch.equal, before, step.model.parameters()))


def test_a_captured_step_has_few_kernels():
    torch.manual_seed(SEED)
    networks = DCGANGenerator().to(CUDA), DCGANDiscriminator().to(CUDA)
    step = GANStep(*(n.to(memory_format=torch.channels_last) for n in networks))
    x = 2 * torch.rand(128, 3, 64, 64, device=CUDA) - 1
    for _ in range(3):
        step(x)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        step(x)
        torch.cuda.synchronize()
    on_gpu = torch.autograd.DeviceType.CUDA
    names = [e.name for e in profiler.events() if e.device_type == on_gpu]
    assert 0 < len(names) <= MOST_KERNELS, names


def test_inside_torch_compile(started):
    model = nn.Sequential(nn.ConvTranspose2d(8, 4, 4, 2, 1), nn.BatchNorm2d(4), nn.ReLU()).to(CUDA)
    x = torch.randn(4, 8, 8, 8, device=CUDA)
    expected = copy.deepcopy(model)(x)
    genfast.accelerate(model)
    with genfast.use_backend("auto"):
        y = torch.compile(model, fullgraph=True)(x)
    assert "normalize_activate" in started
    torch.testing.assert_close(y, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rounding", ["tf32", "ieee"])
def test_float32_rounds_as_the_setting_says(rounding, transposed, round_convolutions, monkeypatch):
    """By the library and by every tile: held to eager PyTorch's error under the same setting."""
    if torch.version.hip or torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("needs TF32: an NVIDIA GPU from Ampere on")
    round_convolutions(rounding)
    last = "channels_last"
    layouts = dict(layout=last, weight_layout=last, dy_layout=last)
    geometry = Geometry(4, 2, 1, big=(16, 16), small=(8, 8))
    case = Case(transposed, geometry, (128, 128), batch=16, **layouts)
    architecture = start.architecture(torch.empty(1, device=CUDA))
    x = torch.randn(16, 128, 8, 8, device=CUDA).to(memory_format=torch.channels_last)
    weight = torch.randn(128, 128, 4, 4, device=CUDA)
    convolve = nn.functional.conv_transpose2d if transposed else nn.functional.conv2d
    block = functional.conv_transpose_block if transposed else functional.conv_block
    exact = convolve(x.double(), weight.double(), None, 2, 1)
    for config in (tiles.LIBRARY, *tiles.shipped(architecture, rounding)):
        monkeypatch.setattr(tiles, "gemm_config", lambda *_, config=config: config)
        assert_block(case, CUDA)
        y = block(x, weight, None, 2, 1)
        error = (largest_error(y, exact) / exact.abs().max()).item()
        # TF32 keeps 10 bits below the first one: two factors that are cut off so err by 2^-9 at
        # most. Float32 errs by its own roundings of 2^-24, of which one sum has some.
        assert error < 2**-9 and (error > 2**-14) == (rounding == "tf32"), config
