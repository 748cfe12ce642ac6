"""Conditional networks in steps and runs, beside plain PyTorch that follows the papers."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from test_losses import of_paper, softplus
from torch import nn

import genfast
from genfast import reference
from genfast.cli import main
from genfast.models import GAN, VAE, ConvVAE, DCGANDiscriminator, DCGANGenerator
from genfast.training import GANStep, VAEStep
from genfast.training.errors import BadInput
from genfast.training.runs.checkpoint import read_checkpoint
from genfast.training.runs.classes import labels_of_samples
from genfast.training.runs.config import Config, prepare, prepare_resumed
from genfast.training.runs.loop import train
from genfast.training.runs.models import MODELS as KINDS
from genfast.training.runs.samples import sample_checkpoint
from genfast.training.steps import adam
from genfast.training.steps.labels import Labels, classes_of

CLASSES = 5


def dcgan():
    torch.manual_seed(0)
    return DCGANGenerator(8, 8, 1, 16, CLASSES), DCGANDiscriminator(1, 8, 16, CLASSES)


def gan():
    torch.manual_seed(0)
    networks = GAN((1, 4, 4), 8, CLASSES)
    return networks.generator, networks.discriminator


def gan_with_norms():
    torch.manual_seed(0)
    networks = GAN((1, 4, 4), 8, CLASSES, batch_norm=True)
    return networks.generator, networks.discriminator


def batches(steps, count=6, size=16):
    return [
        (2 * torch.rand(count, 1, size, size) - 1, torch.randint(CLASSES, (count,)))
        for _ in range(steps)
    ]


def run(layers, x):
    for layer in layers:
        x = layer(x)
    return x


def plain_dcgan(generator, discriminator):
    """The embedding beside the noise; Miyato and Koyama's psi(phi(x)) + <V y, phi(x)>."""

    def generate(z, y):
        return run(
            generator.main, torch.cat([z, generator.embedding.weight[y][..., None, None]], 1)
        )

    def judge(x, y):
        *layers, last = discriminator.main
        features = run(layers, x)
        summed = features.flatten(2).sum(2)
        return last(features).view(-1) + torch.einsum(
            "nc,nc->n", discriminator.embedding.weight[y], summed
        )

    return generate, judge


def plain_gan(generator, discriminator):
    """Hidden layers of their own for the one-hot label, as Mirza and Osindero have them."""
    *layers, last = [layer for layer in generator.main if isinstance(layer, nn.Linear)]
    norms = [layer for layer in generator.main if isinstance(layer, nn.BatchNorm1d)]

    def hidden(which, x):
        x = layers[which](x)
        if norms:
            x = (x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt()
            x = norms[which].weight * x + norms[which].bias
        return x.relu()

    def generate(z, y):
        of_label = F.relu(F.one_hot(y, CLASSES).float() @ generator.embedding.weight)
        joint = hidden(1, torch.cat([hidden(0, z), of_label], 1))
        return last(joint).tanh().view(-1, 1, 4, 4)

    def judge(x, y):
        of_image = run(discriminator.main[:3], x)
        of_label = F.one_hot(y, CLASSES).float() @ discriminator.embedding.weight
        return run(discriminator.main[3:], torch.cat([of_image, of_label], 1)).view(-1)

    return generate, judge


def plain_gan_loop(networks, plain, loss, data):
    """The losses of each step: the discriminator on reals, then on fakes, then the generator."""
    generate, judge = plain(*networks)
    g_optimizer, d_optimizer = map(adam, networks)
    torch.manual_seed(1)
    found = []
    for reals, y in data:
        fakes = generate(torch.randn(len(reals), *networks[0].latent_shape), y)
        d_optimizer.zero_grad()
        logits = torch.cat([judge(reals, y), judge(fakes.detach(), y)])
        d_loss = of_paper(loss, "discriminator", logits)
        d_loss.backward()
        d_optimizer.step()
        g_optimizer.zero_grad()
        if loss == "rpgan":
            g_loss = softplus(judge(reals, y).detach() - judge(fakes, y)).mean()
        else:
            g_loss = of_paper(loss, "generator", judge(fakes, y))
        g_loss.backward()
        g_optimizer.step()
        found.append(torch.stack([d_loss.detach(), g_loss.detach()]))
    return torch.stack(found)


def losses_of(step, data):
    torch.manual_seed(1)
    return torch.stack([torch.stack(tuple(step(batch))) for batch in data])


@pytest.mark.parametrize(
    ("make", "plain", "loss", "merge"),
    [
        (dcgan, plain_dcgan, "non-saturating", None),
        (dcgan, plain_dcgan, "hinge", False),
        (dcgan, plain_dcgan, "rpgan", None),
        (gan, plain_gan, "non-saturating", False),  # One pass would draw another dropout.
        (gan_with_norms, plain_gan, "non-saturating", False),
    ],
)
def test_a_step_is_that_of_a_plain_loop(make, plain, loss, merge):
    data = batches(20, size=16 if make is dcgan else 4)
    expected = plain_gan_loop(make(), plain, loss, data)
    step = GANStep(*make(), loss=loss, precision="fp32", merge=merge)
    torch.testing.assert_close(losses_of(step, data), expected, rtol=1e-3, atol=1e-3)
    assert (step.why_not_merged is None) == (merge is None)
    others = [(images, (y + 1) % CLASSES) for images, y in data[:2]]
    step = GANStep(*make(), loss=loss, precision="fp32", merge=merge)
    assert (losses_of(step, others) - expected[:2]).abs().max() > 1e-3


class PlainVAE(nn.Module):
    """Sohn et al.: a one-hot label beside the image and beside the latent."""

    def __init__(self, model):
        super().__init__()
        rows = [e.weight.T for e in (model.label_of_encoder, model.label_of_decoder)]
        self.hidden = nn.Linear(64 + CLASSES, 12)
        self.generated = nn.Linear(3 + CLASSES, 12)
        self.rest = nn.ModuleList(copy.deepcopy([model.fc21, model.fc22, model.fc4]))
        for joint, layer, row in zip(
            (self.hidden, self.generated), (model.fc1, model.fc3), rows, strict=True
        ):
            joint.weight.data = torch.cat([layer.weight, row], 1).detach()
            joint.bias.data = layer.bias.detach().clone()

    def encode(self, x, y):
        hidden = self.hidden(torch.cat([x.flatten(1), F.one_hot(y, CLASSES)], 1)).relu()
        return self.rest[0](hidden), self.rest[1](hidden)

    def logits(self, z, y):
        hidden = self.generated(torch.cat([z, F.one_hot(y, CLASSES)], 1)).relu()
        return self.rest[2](hidden)


class PlainConvVAE(nn.Module):
    """An embedding as one more channel of the image, another one beside the latent."""

    def __init__(self, model):
        super().__init__()
        self.model = copy.deepcopy(model)

    def _run(self, blocks, x):
        for block in blocks:
            x = block.conv(x)
            x = x if block.norm is None else block.norm(x)
            x = reference.activate(x, block.activation, block.negative_slope)
        return x

    def encode(self, x, y):
        channel = self.model.label_of_encoder.weight[y].view(-1, 1, *x.shape[2:])
        heads = self._run(self.model.encoder, torch.cat([x, channel], 1)).flatten(1)
        return heads.chunk(2, 1)

    def logits(self, z, y):
        z = torch.cat([z, self.model.label_of_decoder.weight[y]], 1)
        return self._run(self.model.decoder, z[..., None, None])


VAES = {
    "vae": (lambda: VAE(64, 12, 3, CLASSES), PlainVAE, 8),
    "conv-vae": (lambda: ConvVAE(1, 16, 3, 4, CLASSES), PlainConvVAE, 16),
}


def plain_vae_loop(model, data):
    optimizer = adam(model)
    torch.manual_seed(1)
    found = []
    for images, y in data:
        mu, logvar = model.encode(images, y)
        z = mu + torch.randn(mu.shape) * torch.exp(0.5 * logvar)
        loss = F.binary_cross_entropy_with_logits(
            model.logits(z, y).flatten(1), images.flatten(1), reduction="sum"
        )
        loss = loss + 0.5 * (mu**2 + logvar.exp() - 1 - logvar).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.detach() / len(images))
    return torch.stack(found)


@pytest.mark.parametrize("name", VAES)
def test_a_step_of_a_vae_is_that_of_a_plain_loop(name):
    make, plain, size = VAES[name]
    data = [((images + 1) / 2, y) for images, y in batches(20, size=size)]
    torch.manual_seed(0)
    model = make()
    expected = plain_vae_loop(plain(model), data)
    ours = losses_of(VAEStep(model, precision="fp32"), data)[:, 0]
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.kernels
def test_on_the_kernels(device):
    data = batches(1, count=2)
    expected = plain_gan_loop(dcgan(), plain_dcgan, "hinge", data)
    step = GANStep(*(n.to(device) for n in dcgan()), loss="hinge", precision="fp32",
                   capture=False, output="logits")  # fmt: skip
    ours = losses_of(step, [tuple(t.to(device) for t in batch) for batch in data])
    if device.type == "cpu":  # Elsewhere other random numbers are drawn.
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3)


def test_a_captured_step_reads_the_labels_of_each_batch(capture_anyway):
    data = batches(3) + batches(1, count=4) + batches(2)
    expected = losses_of(GANStep(*dcgan(), precision="fp32"), data)
    capture_anyway()
    step = GANStep(*dcgan(), precision="fp32")
    places = []
    step.generator.embedding.register_forward_pre_hook(
        lambda _, inputs: places.append((len(inputs[0]), inputs[0].data_ptr()))
    )
    assert torch.equal(losses_of(step, data), expected)
    # A graph finds them in the same place, after a batch of another size too.
    assert len({place for count, place in places if count == 6}) == 1


def test_labels_of_more_than_a_batch():
    labels = Labels(CLASSES)
    assert Labels()(6) == ()
    with labels.given(torch.tensor([3, 1]), torch.zeros(2)):
        assert labels(4)[0].tolist() == [3, 1, 3, 1]  # Real images, then generated ones.
        assert labels(4, each=True)[0].tolist() == [3, 3, 1, 1]  # Several latents an image.
        with pytest.raises(ValueError, match="number of images that the 2 of the batch divide"):
            labels(3)

    class Compiled(nn.Module):  # As `torch.compile` wraps a network.
        classes = CLASSES

        def forward(self, *args, **kwargs):
            return self._orig_mod(*args, **kwargs)

    wrapper = Compiled()
    wrapper._orig_mod = dcgan()[0]
    assert classes_of(wrapper) == CLASSES


def test_networks_without_labels_ignore_them():
    data = batches(2)
    results = []
    for given in (data, [images for images, _ in data]):
        torch.manual_seed(0)
        step = GANStep(DCGANGenerator(8, 8, 1, 16), DCGANDiscriminator(1, 8, 16), precision="fp32")
        results.append(losses_of(step, given))
    assert torch.equal(*results)

    class Named(nn.Sequential):  # Somebody else's `classes` mean something else.
        classes = 10

    torch.manual_seed(0)
    networks = Named(DCGANGenerator(8, 8, 1, 16)), Named(DCGANDiscriminator(1, 8, 16))
    step = GANStep(*networks, latent_shape=(8, 1, 1), precision="fp32")
    assert torch.equal(losses_of(step, data), results[0])


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (None, r"\[images, labels\], as the networks take labels of 5 classes, got images alone"),
        (torch.zeros(6), "whole numbers, got torch.float32"),
        ([0] * 6, "whole numbers, got list"),
        (torch.zeros(5, dtype=torch.int64), r"shape \(6,\), one an image, got \(5,\)"),
        (torch.tensor([0, 1, 2, 3, 4, 5]), "from 0 to 4, as the networks take, got 5"),
        (torch.tensor([0, 1, 2, 3, 4, -1]), "from 0 to 4, as the networks take, got -1"),
    ],
)
def test_labels_that_do_not_fit(labels, message):
    step = GANStep(*dcgan(), precision="fp32")
    ((images, _),) = batches(1)
    with pytest.raises((TypeError, ValueError), match=f"^expected .*{message}$"):
        step(images if labels is None else [images, labels])


def test_networks_that_do_not_fit():
    generator, discriminator = dcgan()
    with pytest.raises(ValueError, match="got 5 for the generator, none for the discriminator"):
        GANStep(generator, DCGANDiscriminator(1, 8, 16))
    with pytest.raises(ValueError, match="got 4 for the generator, 5 for the discriminator"):
        GANStep(DCGANGenerator(8, 8, 1, 16, 4), discriminator)
    for make in (dict(classes=0), dict(classes=2.0), dict(classes=True)):
        with pytest.raises(ValueError, match="expected classes to be None or a whole number"):
            VAE(**make)
    step = GANStep(generator, discriminator, precision="fp32")
    with pytest.raises(ValueError, match="expected the labels .*, those of 5 classes, got none"):
        step.sample(torch.randn(2, 8, 1, 1))
    with pytest.raises(ValueError, match="expected the labels .*, none, got some"):
        VAEStep(VAE(64, 12, 3)).sample(torch.randn(2, 3), torch.zeros(2, dtype=torch.int64))


def test_samples_are_of_the_classes_asked_for():
    step = GANStep(*dcgan(), precision="fp32", ema=0.9)
    z, labels = torch.randn(4, 8, 1, 1), torch.tensor([0, 1, 1, 4])
    average = step.average.module.eval()
    assert torch.equal(step.sample(z, labels), average(z, labels))
    assert not torch.equal(step.sample(z, labels), average(z, labels.flip(0)))


TINY = dict(batch_size=4, epochs=2, conditional=True)
MODELS = {
    "gan": dict(nz=3), "dcgan": dict(nz=3, ngf=4, ndf=4), "vae": dict(nz=3),
    "conv-vae": dict(nz=3, ngf=4),
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    draw = np.random.default_rng(0)
    for name in ("ant", "bee", "cat"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(3):
            pixels = draw.integers(0, 256, (16, 16), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / name / f"{i}.png")
    return tmp_path / "data"


@pytest.mark.parametrize("model", MODELS)
def test_a_run_and_its_resume(model, folder, tmp_path):
    config, images = prepare(model, folder, TINY | MODELS[model] | dict(image_size=16))
    assert config.classes == ("ant", "bee", "cat")
    train(config, images, tmp_path / "whole", device="cpu")
    train(config, images, tmp_path / "parts", device="cpu", max_seconds=0)
    stopped = tmp_path / "parts" / "checkpoint.pt"
    resumed, same = prepare_resumed(model, None, {}, stopped)
    assert resumed == config
    train(resumed, same, tmp_path / "parts", device="cpu", resume_from=stopped)
    whole, parts = (read_checkpoint(tmp_path / run / "checkpoint.pt") for run in ("whole", "parts"))
    assert whole["steps"] == parts["steps"] == 4 and whole["config"]["classes"] == config.classes
    for name, module in whole["modules"].items():
        assert all(torch.equal(value, parts["modules"][name][key]) for key, value in module.items())
    with Image.open(tmp_path / "parts/samples/epoch_002.png") as picture:
        assert picture.size == (8 * 66 + 2, 3 * 66 + 2)  # A class a row.


def test_the_perceptrons_have_batch_norm_where_a_run_is_conditional(folder, tmp_path):
    tiny = dict(batch_size=4, epochs=1, nz=3, image_size=16)
    for given, expected in (
        (dict(conditional=True), (True, 6e-4)),
        (dict(conditional=True, batch_norm=False, lr_d=1e-3), (False, 1e-3)),
        (dict(conditional=True, lr=1e-3), (True, None)),
        (dict(batch_norm=True), (True, None)),
        ({}, (False, None)),
    ):
        config, _ = prepare("gan", folder, tiny | given)
        assert (config.batch_norm, config.lr_d) == expected
        generator, _ = KINDS["gan"].networks(config)
        assert any(isinstance(m, nn.BatchNorm1d) for m in generator.modules()) is expected[0]
    for given, count, message in (
        (dict(batch_norm=True, batch_size=1), 1, "expected 2 images or more for batch norm, got 1"),
        (dict(sync_bn=True), 2, "expected --batch-norm with --sync-bn, got a gan without"),
    ):
        with pytest.raises(BadInput, match=message):
            prepare("gan", folder, tiny | given, processes=count)
    # Conditional runs that began before there was the setting are without.
    config, images = prepare("gan", folder, tiny | dict(conditional=True, batch_norm=False))
    train(config, images, tmp_path / "run", device="cpu", max_seconds=0)
    path = tmp_path / "run" / "checkpoint.pt"
    content = torch.load(path, weights_only=True)
    for name in ("batch_norm", "sync_bn"):
        del content["config"][name]
    torch.save(content, path)
    assert genfast.load(path, "cpu").sample(2, labels="bee").shape == (2, 1, 16, 16)


def test_data_that_changed(folder, tmp_path):
    config, images = prepare("vae", folder, TINY | dict(nz=3))
    train(config, images, tmp_path / "run", device="cpu", max_seconds=0)
    path = tmp_path / "run" / "checkpoint.pt"
    with pytest.raises(BadInput, match="expected --conditional True, with which .*, got False"):
        prepare_resumed("vae", None, dict(conditional=False), path)
    (folder / "bee").rename(folder / "bug")
    with pytest.raises(BadInput, match="the names of classes with which the run in .* began"):
        prepare_resumed("vae", None, {}, path)
    (folder / "bug" / "2.png").rename(folder / "cat" / "!.png")  # The images in the same order.
    with pytest.raises(BadInput, match="9 images from .* that are not the same"):
        prepare_resumed("vae", None, {}, path)
    with pytest.raises(BadInput, match="expected the LabelledImages that prepare gives"):
        train(config, images.images, tmp_path / "other", device="cpu")


def test_sampling_from_the_command_line(folder, tmp_path, capsys):
    config, images = prepare("vae", folder, TINY | dict(nz=3))
    train(config, images, tmp_path / "run", device="cpu", max_seconds=0)
    path, drawn = tmp_path / "run" / "checkpoint.pt", []
    for given in (["--class", "bee"], ["--class", "1"], ["--class", "cat"], []):
        out = tmp_path / "a.png"
        assert main(["sample", str(path), *given, "--num", "6", "--out", str(out)]) == 0
        drawn.append(out.read_bytes())
    assert drawn[0] == drawn[1] != drawn[2]
    with Image.open(out) as picture:
        assert picture.size == (2 * 66 + 2, 3 * 66 + 2)
    capsys.readouterr()
    for name in ("dog", "3", "-1"):
        assert main(["sample", str(path), f"--class={name}"]) == 1
        said = capsys.readouterr().err
        assert f"to be one of ant, bee, cat, or a number from 0 to 2, got '{name}'\n" in said
    plain, images = prepare("vae", folder, dict(nz=3, batch_size=4, epochs=2))
    assert (plain.conditional, plain.classes) == (False, None)
    train(plain, images, tmp_path / "plain", device="cpu", max_seconds=0)
    with pytest.raises(BadInput, match="trained with --conditional for --class ant, got one"):
        sample_checkpoint(tmp_path / "plain/checkpoint.pt", 4, out, device="cpu", of_class="ant")


def test_settings_of_a_checkpoint():
    old = dict(
        model="vae", data="digits", num_images=8, checksum=1, image_size=16, channels=1,
        batch_size=4, epochs=1, lr=2e-4, beta1=0.5, nz=3, seed=0, precision="fp32",
    )  # fmt: skip
    before = Config.of_checkpoint({"config": old}, "c.pt")
    assert (before.conditional, before.classes) == (False, None)
    for wrong in (("a",), ("a", "a"), ("a", ""), ("a", 1), ["a", "b"], None):
        with pytest.raises(BadInput, match="expected classes to be at least 2 names, each another"):
            Config.of_checkpoint({"config": old | dict(conditional=True, classes=wrong)}, "c.pt")
    with pytest.raises(BadInput, match="expected classes of a conditional run alone"):
        Config.of_checkpoint({"config": old | dict(classes=("a", "b"))}, "c.pt")
    # A number is a name where some names are numbers.
    numbers = Config(**old | dict(conditional=True, classes=("3", "7", "9")))
    assert labels_of_samples(numbers, 2, 7).tolist() == [1, 1]
    assert labels_of_samples(numbers, 7).tolist() == [0, 0, 0, 1, 1, 1, 2]
    with pytest.raises(BadInput, match="--class to be one of 3, 7, 9, got '2'"):
        labels_of_samples(numbers, 2, 2)
