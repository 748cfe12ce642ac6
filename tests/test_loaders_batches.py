"""What a step takes from a loader: tensors, lists and dicts, of floats in a range that is known."""

import warnings

import pytest
import torch
from torch import nn

from genfast.models import VAE, VAEGAN
from genfast.training import GANStep, VAEGANStep, VAEStep
from genfast.training.steps import base
from genfast.training.steps.labels import Labels

UNIT = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(1))


class Generator(nn.Module):
    latent_shape = (3,)

    def __init__(self, classes=None):
        super().__init__()
        self.classes, self.layer = classes, nn.Linear(3, 64)

    def forward(self, z, labels=None):
        z = z if labels is None else z + labels[:, None]
        return torch.tanh(self.layer(z)).view(-1, 1, 8, 8)


class Critic(nn.Module):
    def __init__(self, classes=None):
        super().__init__()
        self.classes, self.layer = classes, nn.Linear(64, 1)

    def forward(self, images, labels=None):
        logits = self.layer(images.flatten(1))
        return logits if labels is None else logits * (1 + labels[:, None])


def gan(classes=None, **options):
    torch.manual_seed(0)
    step = GANStep(Generator(classes), Critic(classes), precision="fp32", **options)
    torch.manual_seed(1)
    return step


def vae(**options):
    torch.manual_seed(0)
    step = VAEStep(VAE(64, 8, 2), precision="fp32", **options)
    torch.manual_seed(1)
    return step


def vae_gan(**options):
    torch.manual_seed(0)
    model = VAEGAN(1, 16, 3, 2, 2)
    parts = model.encoder, model.decoder, model.discriminator
    step = VAEGANStep(*parts, precision="fp32", **options)
    torch.manual_seed(1)
    return step


def losses(step, batch):
    return [t.item() for t in (*step(batch), *step(batch))]


@pytest.mark.parametrize(
    "as_loaded",
    [
        lambda x, y: (x, y, 7),
        lambda x, y: {"image": x, "label": y},
        lambda x, y: {"labels": y.to(torch.int32), "pixel_values": x, "mask": x},
        lambda x, y: {"idx": y, "anything": x, "label": y},
    ],
)
def test_batches_with_labels(as_loaded):
    images, labels = UNIT * 2 - 1, torch.tensor([0, 1, 2, 2, 1, 0])
    expected = losses(gan(3), [images, labels])
    assert losses(gan(3), as_loaded(images, labels)) == expected
    assert losses(gan(), as_loaded(images, labels)) == losses(gan(), images)


def test_batches_that_name_no_images():
    for batch, message in (
        ({"left": UNIT, "right": UNIT}, "one of left, right, 2 of which may be"),
        ({"label": torch.zeros(6)}, "one of label, 0 of which may be"),
        ({"image": [UNIT[0]]}, "one of image, 0 of which"),
        (("a", UNIT), "a list or tuple .* or a dict .*got a tuple that begins with a str"),
    ):
        with pytest.raises(TypeError, match=message):
            gan()(batch)
    with pytest.raises(ValueError, match="as the networks take labels of 3 .* got images alone"):
        gan(3)({"image": UNIT * 2 - 1})


@pytest.mark.parametrize("make", [gan, vae_gan])
def test_floats_from_0_to_1_are_no_floats_from_minus_1_on(make):
    images = UNIT if make is gan else torch.rand(6, 1, 16, 16)
    with pytest.raises(ValueError, match=r"none below 0: give image_range=\(0, 1\) to have them"):
        make()(images)
    with pytest.raises(ValueError, match=r"give image_range=\(0, 255\)"):
        make()(images * 255)
    expected = losses(make(), images * 2 - 1)
    assert losses(make(image_range=(0, 1)), images) == expected
    told = losses(make(image_range=(-1, 1)), images)  # They are what they look like.
    assert told != expected
    with pytest.raises(ValueError, match=r"images in \[0, 1\], as image_range says, got values fr"):
        make(image_range=(0, 1))(images * 2 - 1)
    make()(torch.zeros_like(images))  # That says nothing.
    levels = (images * 255).round().to(torch.uint8)
    assert losses(make(image_range=(0, 1)), levels) == losses(make(), levels)


def test_floats_far_beyond_are_told_once():
    step = gan()
    with pytest.warns(UserWarning, match=r"images in \[-1, 1\], got values from -3 to 3: they are"):
        step(UNIT.round() * 6 - 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(UNIT.round() * 6 - 3)
        gan()(UNIT * 2.1 - 1.05)  # What resizing overshoots.


@pytest.mark.parametrize("make", [gan, vae])
def test_a_range_far_wider_than_the_images_is_told_once(make):
    step = make(image_range=(0, 255))
    with pytest.warns(UserWarning, match=r"fill their image_range, \[0, 255\], got .* to 1,"):
        step(UNIT.round())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(UNIT.round())
        make(image_range=(0, 49))(UNIT.round())  # 1 in 49 are 5.2 levels of 255.
        make(image_range=(0, 255))(torch.ones_like(UNIT))


def test_a_vae_of_floats_from_minus_1_on():
    images = UNIT * 2 - 1
    with pytest.raises(ValueError, match=r"in \[0, 1\], got .*: give image_range=\(-1, 1\)"):
        vae()(images)
    resized = UNIT * 1.06 - 0.03
    with pytest.raises(ValueError, match=r"in \[0, 1\], got .*: give image_range=\(0, 1\) where"):
        vae()(resized)
    vae(image_range=(0, 1))(resized)
    vae(image_range=(-1, 1))(resized * 2 - 1)
    expected = losses(vae(), images * 0.5 + 0.5)
    step = vae(image_range=(-1, 1))
    assert losses(step, images) == expected
    plain = vae()
    losses(plain, images * 0.5 + 0.5)
    for ours, theirs in zip(step.encode(images), plain.encode(images * 0.5 + 0.5), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("given", [(1, 0), (0, float("inf")), 1, (0, 1, 2), "01", (None, 1)])
def test_ranges_that_are_none(given):
    with pytest.raises(ValueError, match="expected image_range to be .low, high. of float images"):
        gan(image_range=given)


def test_batches_in_cpu_memory_go_where_the_networks_are():
    there = torch.device("meta")
    assert base._checked_images(UNIT, there, torch.float32).device == there
    labels = Labels(3)._checked(torch.tensor([0, 2], dtype=torch.int32), UNIT[:2].to(there))
    assert labels.device == there and labels.dtype == torch.int64
    with pytest.raises(ValueError, match="networks' device cpu, got meta"):
        gan()(UNIT.to(there))
