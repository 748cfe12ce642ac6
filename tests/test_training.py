"""Steps against plain PyTorch written by hand, checkpoints, pictures, and runs that go on."""

import csv
import json
import os
import re
import threading
import time
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from genfast import cpu, use_backend
from genfast.models import GAN, VAE, ConvVAE, DCGANDiscriminator, DCGANGenerator
from genfast.training import GANStep, VAEStep
from genfast.training.data import Batches, batches, normalize, sources
from genfast.training.errors import BadInput, Diverged
from genfast.training.files import replacing
from genfast.training.runs import checkpoint, config, demo, loop, loss_log, pictures
from genfast.training.runs.models import build_step
from genfast.training.runs.samples import sample_checkpoint
from genfast.training.steps.precision import resolve_precision
from genfast.training.steps.stock import StockGANStep

CPU = torch.device("cpu")


def _dcgan(seed=0):
    torch.manual_seed(seed)
    return DCGANGenerator(5, 4, 1, 16), DCGANDiscriminator(1, 4, 16)


def _adam(module):
    return torch.optim.Adam(module.parameters(), lr=2e-4, betas=(0.5, 0.999))


def test_gan_step_is_the_plain_one():
    images = torch.rand(8, 1, 16, 16) * 2 - 1
    step = GANStep(*_dcgan(), latent_shape=(5, 1, 1), precision="fp32")
    networks = _dcgan()
    plain_step = StockGANStep(
        *networks,
        [_adam(n) for n in networks],
        latent_shape=(5, 1, 1),
        criterion=F.binary_cross_entropy_with_logits,
    )
    torch.manual_seed(1)
    ours = [[t.item() for t in step(images)] for _ in range(20)]
    torch.manual_seed(1)
    plain = [[t.item() for t in plain_step(images)] for _ in range(20)]
    np.testing.assert_allclose(ours, plain, rtol=1e-4)
    assert ours[0] != ours[-1]
    for module, reference in zip((step.generator, step.discriminator), networks, strict=True):
        for name, tensor in reference.state_dict().items():
            # Adam divides by small second moments, so a rounding may move a weight by part of lr.
            torch.testing.assert_close(module.state_dict()[name], tensor, rtol=1e-3, atol=4e-4)


def test_vae_step_is_the_plain_one():
    images = torch.rand(8, 1, 4, 4)
    torch.manual_seed(0)
    model = VAE(16, 12, 3)
    plain = VAE(16, 12, 3)
    plain.load_state_dict(model.state_dict())
    step, optimizer = VAEStep(model, precision="fp32"), _adam(plain)
    torch.manual_seed(1)
    ours = [step(images).loss.item() for _ in range(20)]
    torch.manual_seed(1)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        mu, logvar = plain.encode(images)
        recon = plain.decode(mu + torch.randn_like(mu) * torch.exp(0.5 * logvar))
        bce = F.binary_cross_entropy(recon, images.flatten(1), reduction="sum")
        loss = bce - 0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())
        loss.backward()
        optimizer.step()
        losses.append(loss.item() / len(images))
    np.testing.assert_allclose(ours, losses, rtol=1e-5)
    assert losses[0] != losses[-1]


def test_vae_result_holds_the_parts():
    result = VAEStep(VAE(16, 12, 3), precision="fp32")(torch.rand(8, 1, 4, 4))
    assert result.loss.item() == pytest.approx(result.reconstruction.item() + result.kl.item())
    assert result.kl > 0


def test_generator_update_computes_no_discriminator_gradients():
    generator, discriminator = _dcgan()
    step = GANStep(generator, discriminator, latent_shape=(5, 1, 1))
    first = discriminator.main[0].weight
    wanted = []
    first.register_hook(lambda grad: wanted.append(grad))
    step(2 * torch.rand(4, 1, 16, 16) - 1)
    assert len(wanted) == 1  # In the discriminator's own update.
    assert all(p.grad is None for p in discriminator.parameters())
    assert all(p.requires_grad for p in discriminator.parameters())
    assert all(p.grad is not None for p in generator.parameters())


def _spectral_discriminator():
    return nn.Sequential(spectral_norm(nn.Conv2d(1, 1, 16)), nn.Flatten(0))


def test_one_discriminator_pass_gives_the_numbers_of_two():
    torch.manual_seed(1)
    batches = [torch.rand(6, 1, 16, 16, dtype=torch.float64) * 2 - 1 for _ in range(5)]
    outcomes = []
    for merge in (True, False):
        networks = [network.double() for network in _dcgan()]
        step = GANStep(*networks, latent_shape=(5, 1, 1), precision="fp32", merge=merge)
        assert (step.why_not_merged is None) == merge
        torch.manual_seed(2)
        losses = torch.tensor([[t.item() for t in step(batch)] for batch in batches])
        outcomes.append([losses, *(t for n in networks for t in n.state_dict().values())])
    for ours, plain in zip(*outcomes, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-7, atol=1e-9)
    assert networks[1].main[3].num_batches_tracked == 15  # Real, generated, and the generator's.


@pytest.mark.one_in(2)
@pytest.mark.kernels
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_on_the_kernels(precision, device):
    images = torch.rand(4, 1, 16, 16, device=device) * 2 - 1
    outcomes = []
    for backend, merge in (("triton", True), ("reference", False)):
        networks = [network.to(device) for network in _dcgan()]
        step = GANStep(*networks, latent_shape=(5, 1, 1), precision=precision, merge=merge)
        torch.manual_seed(1)
        with use_backend(backend):
            outcomes.append([[t.item() for t in step(images)] for _ in range(2)])
    np.testing.assert_allclose(*outcomes, rtol=1e-4 if precision == "fp32" else 5e-2)


def test_merging_is_refused_where_two_passes_differ():
    class MinibatchDeviation(nn.Module):
        def forward(self, x):
            return x - x.std(0)

    for layer, reason in (
        (MinibatchDeviation(), "its layer 1, a MinibatchDeviation, may treat a batch as a whole"),
        (spectral_norm(nn.Conv2d(1, 1, 1)), "its layer 1 has a parametrisation"),
    ):
        discriminator = nn.Sequential(nn.Conv2d(1, 1, 16), layer)
        step = GANStep(_dcgan()[0], discriminator, latent_shape=(5, 1, 1), precision="fp32")
        assert step.why_not_merged.startswith(reason)
    watched = _dcgan()[1]
    watched.main[2].register_forward_hook(lambda *_: None)
    assert "main.2 has a hook" in GANStep(_dcgan()[0], watched).why_not_merged
    own = nn.Sequential(nn.Conv2d(1, 1, 16), MinibatchDeviation())
    assert GANStep(_dcgan()[0], own, precision="fp32", merge=True).why_not_merged is None


@pytest.mark.one_in(2)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("make", [VAE, lambda: ConvVAE(1, 16, 4, 4)], ids=["vae", "conv-vae"])
def test_a_compiled_step_of_a_vae(make, precision, monkeypatch):
    # The whole of torch.compile but for the C++, which takes long; the benchmark runs that too.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    size = 28 if make is VAE else 16
    batches = [torch.rand(n, 1, size, size) for n in (4, 4, 3)]
    outcomes = []
    for compiled in (True, False):
        torch.manual_seed(0)
        step = VAEStep(make(), precision=precision, compile=compiled)
        outcomes.append([[t.item() for t in step(batch)] for batch in batches])
    np.testing.assert_allclose(*outcomes, rtol=1e-5 if precision == "fp32" else 1e-2)


def test_a_compiled_step_needs_a_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match="expected a C.. compiler for .* found no no-such-comp"):
        VAEStep(VAE(), compile=True)


def test_real_images_are_converted_early_only_where_that_changes_nothing():
    images = torch.rand(4, 1, 16, 16) * 2 - 1
    outcomes = []
    for early in (True, False):
        step = GANStep(*_dcgan(), latent_shape=(5, 1, 1), precision="bf16")
        assert step._converts
        step._converts = early
        torch.manual_seed(1)
        outcomes.append([t.item() for _ in range(2) for t in step(images)])
    assert outcomes[0] == outcomes[1]
    for first in (nn.Dropout(0.1), nn.GroupNorm(1, 1)):  # These would meet rounded images.
        discriminator = nn.Sequential(first, nn.Conv2d(1, 1, 16), nn.Flatten(0))
        assert not GANStep(_dcgan()[0], discriminator, latent_shape=(5, 1, 1))._converts


def test_models_are_left_as_they_were():
    generator = nn.Sequential(nn.ConvTranspose2d(5, 1, 16), nn.Tanh())
    discriminator = _spectral_discriminator()
    networks = (generator, discriminator)
    before = [{k: (t.dtype, t.stride()) for k, t in n.state_dict().items()} for n in networks]
    hooks = [len(m._forward_hooks) for n in networks for m in n.modules()]
    step = GANStep(generator, discriminator, latent_shape=(5, 1, 1))
    step(2 * torch.rand(4, 1, 16, 16) - 1)
    after = [{k: (t.dtype, t.stride()) for k, t in n.state_dict().items()} for n in networks]
    assert after == before
    assert hooks == [len(m._forward_hooks) for n in networks for m in n.modules()]
    assert generator(torch.randn(2, 5, 1, 1)).dtype == torch.float32
    assert all(m.training and p.requires_grad for n in networks for m in n.modules()
               for p in m.parameters())  # fmt: skip


def test_fp16_scales_the_losses():
    step = GANStep(*_dcgan(), latent_shape=(5, 1, 1), precision="fp16")
    before = step.generator.main[0].weight.clone()
    for scaler in step.scalers.values():
        scaler._init_scale = 1024.0
    results = [step(torch.rand(8, 1, 16, 16) * 2 - 1) for _ in range(3)]
    assert all(t.isfinite() and t.dtype == torch.float32 for r in results for t in r)
    assert {name: s.get_scale() for name, s in step.scalers.items()} == {
        "generator": 1024.0,
        "discriminator": 1024.0,
    }
    assert not torch.equal(step.generator.main[0].weight, before)


def test_fp16_passes_over_a_step_that_overflows():
    step = GANStep(*_dcgan(), latent_shape=(5, 1, 1), precision="fp16")
    for scaler in step.scalers.values():
        scaler._init_scale = 2.0**120
    before = step.generator.main[0].weight.clone()
    step(torch.rand(8, 1, 16, 16) * 2 - 1)
    assert torch.equal(step.generator.main[0].weight, before)
    assert all(s.get_scale() == 2.0**119 for s in step.scalers.values())


def test_steps_that_cannot_be():
    for wrong, message in (
        (dict(precision="tf32"), "expected tf32 on an NVIDIA GPU from Ampere on, got it on cpu"),
        (dict(capture=True), "only a GPU has graphs"),
        (dict(loss="hing"), "expected a loss among"),
        (dict(ema=1.0), "expected ema to be a number from 0 to below 1"),
    ):
        with pytest.raises(ValueError, match=message):
            GANStep(*_dcgan(), **wrong)


def test_a_frozen_layer_stays_frozen():
    generator, discriminator = _dcgan()
    discriminator.main[0].weight.requires_grad_(False)
    before = discriminator.main[0].weight.clone()
    GANStep(generator, discriminator, latent_shape=(5, 1, 1))(2 * torch.rand(4, 1, 16, 16) - 1)
    assert not discriminator.main[0].weight.requires_grad
    assert torch.equal(discriminator.main[0].weight, before)


def test_gradients_from_before_do_not_count():
    images, losses = 2 * torch.rand(4, 1, 16, 16) - 1, []
    for stale in (False, True):
        generator, discriminator = _dcgan()
        step = GANStep(generator, discriminator, latent_shape=(5, 1, 1), precision="fp32")
        if stale:
            for p in (*generator.parameters(), *discriminator.parameters()):
                p.grad = torch.ones_like(p)
        torch.manual_seed(1)
        losses.append([step(images).g_loss.item() for _ in range(2)])
    assert losses[0] == losses[1]


def test_default_optimizers():
    step = GANStep(*_dcgan(), latent_shape=(5, 1, 1))
    vae_step = VAEStep(VAE(16))
    for optimizer in (*step.optimizers.values(), *vae_step.optimizers.values()):
        assert isinstance(optimizer, torch.optim.Adam)
        assert optimizer.defaults["lr"] == 2e-4
        assert optimizer.defaults["betas"] == (0.5, 0.999)


def test_bf16_step_trains_with_float32_losses():
    step = GANStep(*_dcgan(), latent_shape=(5, 1, 1), precision="bf16")
    result = step(2 * torch.rand(8, 1, 16, 16) - 1)
    assert result.d_loss.dtype == result.g_loss.dtype == torch.float32
    assert step.precision == "bf16"
    vae = ConvVAE(1, 16, 4, 4)
    vae_step = VAEStep(vae, optimizer=torch.optim.Adam(vae.parameters(), 0.01), precision="bf16")
    images = torch.rand(8, 1, 16, 16).round()
    losses = [vae_step(images).loss.item() for _ in range(10)]
    assert losses[-1] < losses[0]


def test_precision_auto(monkeypatch):
    for avx512, amx, expected in ((0, 0, "fp32"), (1, 0, "bf16"), (0, 1, "bf16")):
        monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda v=avx512: bool(v))
        monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda v=amx: bool(v))
        monkeypatch.setattr(cpu, "has_bfloat16", cpu.looks_for_bfloat16)
        assert resolve_precision("auto", CPU) == expected
    assert resolve_precision("fp32", CPU) == "fp32"
    with pytest.raises(ValueError, match="expected a precision among .*, got 'fp8'"):
        resolve_precision("fp8", CPU)


def test_precision_is_that_of_the_steps_gpu_not_of_the_current_one(monkeypatch):
    turing, hopper = torch.device("cuda", 0), torch.device("cuda", 1)
    capabilities = {turing: (7, 5), hopper: (9, 0)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", capabilities.get)
    monkeypatch.setattr(torch.version, "hip", None)
    for current, supported in ((turing, False), (hopper, True)):
        monkeypatch.setattr(torch.cuda, "current_device", lambda index=current.index: index)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *a, v=supported, **k: v)
        assert resolve_precision("auto", turing) == "fp32"
        assert resolve_precision("auto", hopper) == "bf16"
    assert resolve_precision("tf32", hopper) == "tf32"
    with pytest.raises(ValueError, match="expected tf32 on an NVIDIA GPU from Ampere on"):
        resolve_precision("tf32", turing)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert resolve_precision("auto", turing) == "bf16"


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (torch.zeros(4, 16, 16), ValueError, r"expected images of shape .*\(4, 16, 16\)"),
        (torch.zeros(4, 1, 16, 16, dtype=torch.int64), TypeError, "or uint8 images.*int64"),
        (torch.zeros(4, 1, 16, 16, device="meta"), ValueError, "networks' device cpu, got meta"),
        (torch.zeros(4, 3, 16, 16), ValueError, r"\(4, 1, 16, 16\), got \(4, 3, 16, 16\)"),
        (torch.zeros(4, 1, 32, 32), ValueError, r"\(4, 1, 16, 16\), got \(4, 1, 32, 32\)"),
    ],
)
def test_wrong_batches(images, error, message):
    step = GANStep(*_dcgan(), latent_shape=(5, 1, 1), precision="fp32")
    with pytest.raises(error, match=message):
        step(images)


def test_samples_do_not_disturb_training():
    step = GANStep(*_dcgan(), latent_shape=(5, 1, 1))
    buffers = {name: b.clone() for name, b in step.generator.named_buffers()}
    images = step.sample(torch.randn(3, 5, 1, 1))
    assert images.shape == (3, 1, 16, 16)
    assert images.dtype == torch.float32
    assert step.generator.training
    assert all(torch.equal(b, buffers[name]) for name, b in step.generator.named_buffers())


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), replacing(path) as file:
        file.write(b"half of the n")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old"
    with replacing(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["file"]


def test_an_interrupted_checkpoint_leaves_the_old_one(tmp_path, monkeypatch):
    step = GANStep(*_dcgan(), latent_shape=(5, 1, 1))
    path = tmp_path / "checkpoint.pt"
    checkpoint.save_checkpoint(path, step, {}, 1)

    class Torn:
        def __init__(self, content):
            self.content = content

        def __reduce__(self):
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "rng_states", lambda device: Torn(device))
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save_checkpoint(path, step, {}, 2)
    assert checkpoint.read_checkpoint(path)["steps"] == 1


def test_checkpoint_restores_everything(tmp_path):
    images = 2 * torch.rand(4, 1, 16, 16) - 1
    step = GANStep(*_dcgan(), latent_shape=(5, 1, 1))
    step(images)
    checkpoint.save_checkpoint(tmp_path / "c.pt", step, {}, 1)
    expected = [step(images).g_loss.item() for _ in range(3)]
    other = GANStep(*_dcgan(seed=9), latent_shape=(5, 1, 1))
    torch.manual_seed(99)
    content = checkpoint.read_checkpoint(tmp_path / "c.pt")
    checkpoint.restore(other, content, tmp_path / "c.pt")
    assert [other(images).g_loss.item() for _ in range(3)] == expected


@pytest.mark.parametrize("content", [b"", b"text, no checkpoint", b"PK\x03\x04 damaged"])
def test_damaged_checkpoints(tmp_path, content):
    (tmp_path / "c.pt").write_bytes(content)
    with pytest.raises(BadInput, match="expected a genfast checkpoint at .*c.pt, could not read"):
        checkpoint.read_checkpoint(tmp_path / "c.pt")


def test_truncated_checkpoint(tmp_path):
    checkpoint.save_checkpoint(tmp_path / "c.pt", VAEStep(VAE(16)), {}, 1)
    whole = (tmp_path / "c.pt").read_bytes()
    (tmp_path / "c.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BadInput, match="could not read it"):
        checkpoint.read_checkpoint(tmp_path / "c.pt")


def test_one_wrong_bit_in_a_checkpoint(tmp_path):
    path = tmp_path / "c.pt"
    checkpoint.save_checkpoint(path, VAEStep(VAE(16)), {}, 1)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(BadInput, match="could not read it: .*damaged"):
        checkpoint.read_checkpoint(path)


def test_checkpoints_that_lack_something(tmp_path):
    path = tmp_path / "c.pt"
    checkpoint.save_checkpoint(path, VAEStep(VAE(16)), {"model": "vae"}, 1)
    with pytest.raises(BadInput, match="settings of a genfast run in .*missing"):
        sample_checkpoint(path, 1, tmp_path / "picture.png", device=torch.device("cpu"))
    content = checkpoint.read_checkpoint(path)
    del content["optimizers"]
    torch.save(content, path)
    with pytest.raises(BadInput, match="it lacks optimizers"):
        checkpoint.read_checkpoint(path)


def test_checkpoints_that_run_code_are_refused(tmp_path):
    torch.save({"format": checkpoint.FORMAT, "x": os.getcwd}, tmp_path / "c.pt")
    with pytest.raises(BadInput, match="could not read it"):
        checkpoint.read_checkpoint(tmp_path / "c.pt")


def test_files_of_another_kind(tmp_path):
    torch.save({"main.0.weight": torch.zeros(1)}, tmp_path / "c.pt")
    with pytest.raises(BadInput, match="expected a genfast checkpoint at .*, got another kind"):
        checkpoint.read_checkpoint(tmp_path / "c.pt")
    with pytest.raises(BadInput, match="expected a checkpoint file at .*, where there is none"):
        checkpoint.read_checkpoint(tmp_path / "absent.pt")


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: VAE(16, 12, 3), r"DCGANGenerator in c.pt, but it has none"),
        (lambda: DCGANGenerator(5, 8, 1, 16), r"main.0.weight has shape .* instead of"),
        (lambda: DCGANGenerator(5, 4, 1, 32), r"main.0.weight has shape"),
    ],
)
def test_checkpoints_of_another_architecture(other, message):
    model = other()
    name = "model" if isinstance(model, VAE) else "generator"
    content = {"modules": {name: model.state_dict()}}
    step = GANStep(*_dcgan(), latent_shape=(5, 1, 1))
    with pytest.raises(BadInput, match=message):
        checkpoint.restore_modules(step, content, "c.pt")


def test_grid_places_and_magnifies():
    images = torch.arange(1, 4, dtype=torch.uint8)[:, None, None, None].expand(3, 1, 16, 16)
    canvas = pictures.grid(images, columns=2)
    assert canvas.shape == (1, 2 * 66 + 2, 2 * 66 + 2)
    assert canvas[0, 2:66, 2:66].unique().tolist() == [1]
    assert canvas[0, 2:66, 68:132].unique().tolist() == [2]
    assert canvas[0, 68:132, 2:66].unique().tolist() == [3]
    assert canvas[0, 68:, 68:].unique().tolist() == [0]


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_saved_grid(tmp_path, channels, mode):
    images = torch.randint(256, (4, channels, 64, 64), dtype=torch.uint8)
    pictures.save_grid(images, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.mode == mode
        pixels = torch.from_numpy(np.array(picture)).view(134, 134, channels)
    assert torch.equal(pixels[2:66, 2:66].permute(2, 0, 1), images[0])


def test_to_uint8_undoes_normalize():
    levels = torch.arange(256, dtype=torch.uint8)
    for pixel_range in ((-1.0, 1.0), (0.0, 1.0)):
        assert torch.equal(pictures.to_uint8(normalize(levels, pixel_range), pixel_range), levels)
    assert pictures.to_uint8(torch.tensor([-9.0, 9.0]), (-1.0, 1.0)).tolist() == [0, 255]


def _images(count=12):
    return np.random.default_rng(0).integers(0, 256, (count, 16, 16), dtype=np.uint8)


SMALL = {
    "gan": dict(batch_size=4, epochs=2, nz=3),
    "dcgan": dict(batch_size=4, epochs=2, nz=3, ngf=4, ndf=4),
    "vae": dict(batch_size=4, epochs=2, nz=3),
    "conv-vae": dict(batch_size=4, epochs=2, nz=3, ngf=4),
    "vae-gan": dict(batch_size=4, epochs=2, nz=3, ngf=4, ndf=4),
}


def _prepare(tmp_path, model, **given):
    np.save(tmp_path / "images.npy", _images())
    return config.prepare(model, tmp_path / "images.npy", SMALL[model] | given)


def _losses(out):
    with open(out / "metrics.csv", newline="") as file:
        return [row[:-1] for row in csv.reader(file)]


@pytest.mark.parametrize("model", config.MODELS)
def test_a_run_leaves_everything_behind(tmp_path, model, capsys):
    settings, images = _prepare(tmp_path, model)
    outcome = loop.train(settings, images, tmp_path / "out", device=CPU)
    assert outcome == loop.Outcome(True, False, 6, tmp_path / "out/samples/epoch_002.png")
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert written["model"] == model
    assert written["batch_size"] == 4
    assert written["versions"]["torch"] == torch.__version__
    for epoch in (1, 2):
        with Image.open(tmp_path / f"out/samples/epoch_{epoch:03d}.png") as picture:
            assert picture.size == (8 * 66 + 2, 8 * 66 + 2)
    rows = _losses(tmp_path / "out")
    assert [row[:2] for row in rows[1:]] == [[str(i), str((i + 2) // 3)] for i in range(1, 7)]
    assert "images/s" in capsys.readouterr().err


def test_losses_fall(tmp_path):
    settings, images = _prepare(tmp_path, "vae", epochs=40)
    loop.train(settings, images, tmp_path / "out", device=CPU)
    losses = [float(row[2]) for row in _losses(tmp_path / "out")[1:]]
    assert losses[-1] < 0.9 * losses[0]


class _StopAt:
    """Stands for a signal that comes during a step."""

    def __init__(self, monkeypatch, step):
        self.left = step
        self.add = loss_log.LossLog.add
        monkeypatch.setattr(loss_log.LossLog, "add", lambda *args: self.count(*args))

    def count(self, *args):
        self.add(*args)
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), 2)


@pytest.mark.parametrize("model", config.MODELS)
@pytest.mark.parametrize("stop", [1, 3, 5])
def test_a_resumed_run_has_the_losses_of_an_uninterrupted_one(tmp_path, monkeypatch, model, stop):
    settings, images = _prepare(tmp_path, model)
    loop.train(settings, images, tmp_path / "whole", device=CPU)
    with monkeypatch.context() as patch:
        _StopAt(patch, stop)
        outcome = loop.train(settings, images, tmp_path / "parts", device=CPU)
    assert outcome.interrupted
    assert outcome.steps == stop
    path = tmp_path / "parts/checkpoint.pt"
    resumed, same_images = config.prepare_resumed(model, None, {}, path)
    assert resumed == settings
    outcome = loop.train(resumed, same_images, tmp_path / "parts", device=CPU, resume_from=path)
    assert outcome.finished
    assert _losses(tmp_path / "parts") == _losses(tmp_path / "whole")
    pictures_made = [
        (tmp_path / name / "samples/epoch_002.png").read_bytes() for name in ("parts", "whole")
    ]
    assert pictures_made[0] == pictures_made[1]


def test_a_streamed_run_has_the_losses_of_one_from_memory(tmp_path, monkeypatch):
    settings, images = _prepare(tmp_path, "vae")
    loop.train(settings, images, tmp_path / "whole", device=CPU)
    monkeypatch.setattr(sources, "LARGE", 0)
    settings, images = _prepare(tmp_path, "vae")
    with monkeypatch.context() as patch:
        _StopAt(patch, 4)
        loop.train(settings, images, tmp_path / "parts", device=CPU)
    path = tmp_path / "parts/checkpoint.pt"
    settings, images = config.prepare_resumed("vae", None, {}, path)
    loop.train(settings, images, tmp_path / "parts", device=CPU, resume_from=path)
    assert _losses(tmp_path / "parts") == _losses(tmp_path / "whole")


@pytest.mark.parametrize("error", [KeyboardInterrupt, Diverged])
def test_no_thread_outlives_a_run_that_breaks_off(tmp_path, monkeypatch, error):
    def data_threads():
        return [t for t in threading.enumerate() if t.name.startswith("genfast-data")]

    def breaks_off(*_):
        assert data_threads()
        raise error

    monkeypatch.setattr(sources, "LARGE", 0)
    monkeypatch.setattr(loss_log.LossLog, "add", breaks_off)
    settings, images = _prepare(tmp_path, "vae")
    with pytest.raises(error):
        loop.train(settings, images, tmp_path / "out", device=CPU)
    assert not data_threads()


def test_progress_shows_the_share_of_waiting_for_data(tmp_path, monkeypatch, capsys):
    def shares(out):
        settings, images = _prepare(tmp_path, "vae")
        loop.train(settings, images, tmp_path / out, device=CPU)
        return [int(share) for share in re.findall(r"data=(\d+)%", capsys.readouterr().err)]

    def read_slowly(rows, indices, out):
        time.sleep(0.3)
        read(rows, indices, out)

    read = batches._take
    monkeypatch.setattr(loop, "REPORT_SECONDS", 0)
    monkeypatch.setattr(sources, "LARGE", 0)
    assert shares("one")[-1] < 50  # All is gathered by then.
    monkeypatch.setattr(batches, "_take", read_slowly)
    assert max(shares("two")) > 50


def test_resuming_goes_beyond_the_first_epochs(tmp_path):
    settings, images = _prepare(tmp_path, "dcgan", epochs=3)
    loop.train(settings, images, tmp_path / "whole", device=CPU)
    settings, images = _prepare(tmp_path, "dcgan", epochs=1)
    loop.train(settings, images, tmp_path / "parts", device=CPU)
    path = tmp_path / "parts/checkpoint.pt"
    settings, images = config.prepare_resumed("dcgan", None, {"epochs": 3}, path)
    loop.train(settings, images, tmp_path / "parts", device=CPU, resume_from=path)
    assert _losses(tmp_path / "parts") == _losses(tmp_path / "whole")
    with pytest.raises(BadInput, match="expected --epochs of more than the 3 .*, got 3"):
        loop.train(settings, images, tmp_path / "parts", device=CPU, resume_from=path)


def test_metrics_beyond_the_checkpoint_go(tmp_path):
    settings, images = _prepare(tmp_path, "vae", epochs=1)
    out = tmp_path / "out"
    loop.train(settings, images, out, device=CPU)
    before = _losses(out)
    with open(out / "metrics.csv", "a") as file:
        file.write("4,2,1.5,1.0,0.5,10.0\n5,2,1.")  # Made after the checkpoint; one is cut short.
    path = out / "checkpoint.pt"
    settings, images = config.prepare_resumed("vae", None, {"epochs": 2}, path)
    loop.train(settings, images, out, device=CPU, resume_from=path)
    rows = _losses(out)
    assert rows[:4] == before
    assert [row[0] for row in rows[1:]] == list("123456")
    assert rows[4][2] != "1.5"


@pytest.mark.parametrize(
    ("model", "given", "message"),
    [
        ("vae", {}, "expected a checkpoint of vae at .*, got one of dcgan"),
        ("dcgan", {"ngf": 8}, "expected --ngf 4, with which the run in .* began, got 8"),
        ("dcgan", {"image_size": 32}, "expected --image-size 16, with which .* began, got 32"),
    ],
)
def test_resuming_with_other_settings(tmp_path, model, given, message):
    settings, images = _prepare(tmp_path, "dcgan", epochs=1)
    loop.train(settings, images, tmp_path / "out", device=CPU)
    with pytest.raises(BadInput, match=message):
        config.prepare_resumed(model, None, given, tmp_path / "out/checkpoint.pt")


def test_resuming_with_other_images(tmp_path):
    settings, images = _prepare(tmp_path, "vae", epochs=1)
    loop.train(settings, images, tmp_path / "out", device=CPU)
    np.save(tmp_path / "moved.npy", _images())
    np.save(tmp_path / "images.npy", _images()[::-1])
    path = tmp_path / "out/checkpoint.pt"
    with pytest.raises(BadInput, match="expected the 12 images with which .* that are not the sam"):
        config.prepare_resumed("vae", None, {}, path)
    settings, _ = config.prepare_resumed("vae", tmp_path / "moved.npy", {}, path)
    assert settings.data == str(tmp_path / "moved.npy")


def test_a_run_that_diverges_keeps_its_checkpoint(tmp_path):
    settings, images = _prepare(tmp_path, "vae", lr=1e30)
    path = tmp_path / "out/checkpoint.pt"
    expected = rf"training diverged: the losses of step 2 are loss .*; .* is {path}, of step 1$"
    with pytest.raises(Diverged, match=expected):
        loop.train(settings, images, tmp_path / "out", device=CPU, checkpoint_seconds=0)
    assert checkpoint.read_checkpoint(path)["steps"] == 1


def test_time_limit(tmp_path):
    settings, images = _prepare(tmp_path, "vae")
    outcome = loop.train(settings, images, tmp_path / "out", device=CPU, max_seconds=0)
    assert outcome == loop.Outcome(False, False, 1, None)
    assert checkpoint.read_checkpoint(tmp_path / "out/checkpoint.pt")["steps"] == 1


@pytest.mark.parametrize("model", config.MODELS)
def test_samples_from_a_checkpoint(tmp_path, model):
    settings, images = _prepare(tmp_path, model, epochs=1)
    loop.train(settings, images, tmp_path / "out", device=CPU)
    path = tmp_path / "out/checkpoint.pt"
    sample_checkpoint(path, 64, tmp_path / "same.png", device=CPU, seed=settings.seed)
    same, first = tmp_path / "same.png", tmp_path / "out/samples/epoch_001.png"
    assert same.read_bytes() == first.read_bytes()
    sample_checkpoint(path, 3, tmp_path / "other.png", device=CPU, seed=7)
    with Image.open(tmp_path / "other.png") as picture:
        assert picture.size == (2 * 66 + 2, 2 * 66 + 2)


@pytest.mark.parametrize(
    ("model", "given", "message"),
    [
        ("vae", {"ngf": 8}, "expected settings that vae has, got --ngf"),
        ("dcgan", {"image_size": 257}, "a smaller side from 16 to 256 for dcgan, got 257"),
        (
            "stylegan",
            {},
            "expected a model among gan, dcgan, vae, .*, vae-gan, got 'stylegan'",
        ),
        ("dcgan", {"batch_size": 13}, "expected --batch-size of at most the 12 images, got 13"),
    ],
)
def test_unsuitable_settings(tmp_path, model, given, message):
    np.save(tmp_path / "images.npy", _images())
    with pytest.raises(BadInput, match=message):
        settings, images = config.prepare(model, tmp_path / "images.npy", given)
        Batches(images, settings.batch_size, 0, CPU)


def test_settings_suit_the_images(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((6, 28, 31, 3), np.uint8))
    perceptron, _ = config.prepare("vae", tmp_path / "a.npy", {})
    assert (perceptron.image_size, perceptron.channels, perceptron.batch_size) == ("28x31", 3, 6)
    convolutional, images = config.prepare("dcgan", tmp_path / "a.npy", {})
    assert convolutional.image_size == "28x32"
    assert images.shape == (6, 3, 28, 32)


def test_stock_recipe_trains_networks_of_the_same_sizes():
    settings = config.Config(
        model="dcgan", data="digits", num_images=8, checksum=0, channels=1, image_size=16,
        batch_size=4, epochs=1, lr=2e-4, beta1=0.5, nz=3, ngf=4, ndf=4, seed=0, precision="fp32",
    )  # fmt: skip
    images = torch.rand(4, 1, 16, 16) * 2 - 1
    losses = []
    for build in (build_step, demo.build_stock_step):
        torch.manual_seed(0)
        step = build(settings, CPU)
        torch.manual_seed(1)
        losses.append([[t.item() for t in step(images)] for _ in range(5)])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)


def test_compare_measures_each(monkeypatch):
    def fast(images):
        calls.append(len(images))
        clock[0] += 0.005

    def slow(images):
        clock[0] += 0.01

    calls, clock = [], [0.0]
    monkeypatch.setattr(demo.time, "perf_counter", lambda: clock[0])
    batches = Batches(torch.zeros(8, 1, 2, 2, dtype=torch.uint8), 4, 0, CPU).stream()
    rates = demo.compare((fast, slow), batches, (0.0, 1.0), CPU)
    assert rates[0] == pytest.approx([800] * demo.ROUNDS)
    assert rates[1] == pytest.approx([400] * demo.ROUNDS)
    assert calls == [4] * (demo.WARMUP_STEPS + demo.ROUNDS * demo.STEPS_A_TURN)


def test_gan_pair_trains():
    gan = GAN((1, 8, 8), nz=4)
    step = GANStep(gan.generator, gan.discriminator, latent_shape=(4,), precision="fp32")
    before = [p.clone() for p in gan.parameters()]
    step(2 * torch.rand(6, 1, 8, 8) - 1)
    assert all(not torch.equal(p, b) for p, b in zip(gan.parameters(), before, strict=True))
