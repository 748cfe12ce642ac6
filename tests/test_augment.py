"""Augmentations of a GAN's images, beside the same written image by image."""

import pytest
import torch

from genfast.training.steps.augment import AUGMENTATIONS, Augmentation, mirrored


def by_image(name, images):
    """The augmentation of each image by the paper's words, with the random numbers of the whole."""
    n, _, height, width = images.shape
    if name == "color":
        brightness, saturation, contrast = (
            torch.rand(n, 1, 1, 1, dtype=images.dtype).flatten() for _ in range(3)
        )
        found = []
        for i, image in enumerate(images):
            image = image + brightness[i] - 0.5
            grey = image.mean(0)
            image = torch.stack([grey + 2 * saturation[i] * (c - grey) for c in image])
            found.append(image.mean() + (0.5 + contrast[i]) * (image - image.mean()))
        return torch.stack(found)
    if name == "translation":
        most_down, most_right = (int(size / 8 + 0.5) for size in (height, width))
        down = torch.randint(-most_down, most_down + 1, (n,)).tolist()
        right = torch.randint(-most_right, most_right + 1, (n,)).tolist()
        found = []
        for image, y, x in zip(images, down, right, strict=True):
            wide = torch.nn.functional.pad(image, (most_right,) * 2 + (most_down,) * 2)
            top, left = most_down - y, most_right - x
            found.append(wide[:, top : top + height, left : left + width])
        return torch.stack(found)
    middles = [torch.randint(0, size + 1, (n, 1)).flatten().tolist() for size in (height, width)]
    kept = torch.ones(n, 1, height, width, dtype=images.dtype)
    for i, (y, x) in enumerate(zip(*middles, strict=True)):
        h, w = (height + 1) // 2, (width + 1) // 2
        top, left = y - h // 2, x - w // 2
        kept[i, :, max(top, 0) : max(top + h, 0), max(left, 0) : max(left + w, 0)] = 0
    return images * kept


@pytest.mark.parametrize("name", AUGMENTATIONS)
@pytest.mark.parametrize("shape", [(12, 3, 16, 12), (5, 1, 9, 7)])
def test_images_are_what_they_are_one_by_one(name, shape):
    images = torch.rand(shape, dtype=torch.float64) * 2 - 1
    torch.manual_seed(1)
    expected = by_image(name, images)
    torch.manual_seed(1)
    ours = AUGMENTATIONS[name](images)
    torch.testing.assert_close(ours, expected)
    following = torch.rand(())
    torch.manual_seed(1)
    by_image(name, images)
    assert torch.equal(torch.rand(()), following)


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_gradients(name):
    def augmented(images):
        torch.manual_seed(2)
        return AUGMENTATIONS[name](images) ** 2

    images = torch.rand(2, 2, 3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(augmented, images, fast_mode=True)
    assert torch.autograd.gradgradcheck(augmented, images, fast_mode=True)


def test_half_of_the_images_are_mirrored_whatever_their_dtype():
    images = torch.arange(64 * 2 * 3 * 5, dtype=torch.int64).view(64, 2, 3, 5).to(torch.uint8)
    found = mirrored(images)
    turned = [torch.equal(a, b.flip(2)) for a, b in zip(found, images, strict=True)]
    same = [torch.equal(a, b) for a, b in zip(found, images, strict=True)]
    assert found.dtype == torch.uint8
    assert all(a != b for a, b in zip(turned, same, strict=True)) and 16 < sum(turned) < 48


def test_several_come_one_after_the_other_in_float32():
    images = torch.rand(4, 3, 8, 8, dtype=torch.bfloat16)
    torch.manual_seed(3)
    expected = by_image("translation", by_image("color", images.float()))
    torch.manual_seed(3)
    torch.testing.assert_close(Augmentation("color, translation")(images), expected)


@pytest.mark.parametrize("names", ["", "colour", "color,color", "color,", (), 3, ["color", 3]])
def test_names_that_are_none(names):
    with pytest.raises(ValueError, match="expected one or more of color, translation, cutout with"):
        Augmentation(names)
