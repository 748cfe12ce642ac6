"""Augmentations of what a discriminator sees, real and generated images alike.

So it may learn from few images without the generator learning to draw augmented ones (Zhao et al.,
2020, "Differentiable Augmentation for Data-Efficient GAN Training"). Each image of (N, C, H, W) in
[-1, 1] gets random numbers of its own, drawn on its device. All of it is differentiable, any number
of times, and gives the same bits every run.

To add one, add a row to `AUGMENTATIONS`. The command line and `GANStep` take it from there.
"""

import torch
from torch.autograd import Function


class Augmentation:
    """Images to images: several of `AUGMENTATIONS`, one after the other.

    Args:
        names: of them, in a string with commas between or in a list or tuple.

    Raises:
        ValueError: there are no such augmentations.
    """

    def __init__(self, names):
        self.names = parsed(names)

    def __call__(self, images):
        """The images augmented, in float32 or wider."""
        images = images.to(torch.promote_types(images.dtype, torch.float32))
        for name in self.names:
            images = AUGMENTATIONS[name](images)
        return images


def parsed(names):
    """The names of augmentations as a tuple; ValueError unless they are some, each at most once."""
    given = names
    names = names.split(",") if isinstance(names, str) else names
    known = isinstance(names, tuple | list) and all(isinstance(n, str) for n in names)
    names = tuple(n.strip() for n in names) if known else ()
    if not names or not set(names) <= AUGMENTATIONS.keys() or len(set(names)) < len(names):
        raise ValueError(f"expected {EXPECTED}, got {given!r}")
    return names


def mirrored(images):
    """Each image, of whatever dtype, with probability 1/2 mirrored left to right."""
    chosen = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
    return torch.where(chosen, images.flip(3), images)


def _color(images):
    """Brightness changed by up to 0.5, saturation times up to 2, contrast times 0.5 to 1.5."""
    images = images + (_uniform(images) - 0.5)
    grey = images.mean(1, keepdim=True)
    images = grey + 2 * _uniform(images) * (images - grey)
    mean = images.mean((1, 2, 3), keepdim=True)
    return mean + (0.5 + _uniform(images)) * (images - mean)


def _translation(images):
    """Moved by whole pixels, up to an eighth of height and width; what comes into sight is 0."""
    n, _, *sizes = images.shape
    moves = (int(size / 8 + 0.5) for size in sizes)
    down, right = (torch.randint(-m, m + 1, (n,), device=images.device) for m in moves)
    return _Moved.apply(images, down, right)


class _Moved(Function):
    """Each image moved by its own numbers of pixels.

    Its gradient is moved back: no index is written to twice, as indexing by PyTorch would do it.
    """

    @staticmethod
    def forward(ctx, images, down, right):
        ctx.save_for_backward(down, right)
        height, width = images.shape[2:]
        rows = torch.arange(height, device=images.device) - down[:, None]
        columns = torch.arange(width, device=images.device) - right[:, None]
        seen = (
            ((rows >= 0) & (rows < height))[:, :, None]
            & ((columns >= 0) & (columns < width))[:, None, :]
        )[:, None]
        image = torch.arange(len(images), device=images.device)
        # Pixels of an image are neighbours in memory so, and the result is channels_last.
        pixels = images.permute(0, 2, 3, 1)
        moved = pixels[
            image[:, None, None],
            rows.clamp(0, height - 1)[:, :, None],
            columns.clamp(0, width - 1)[:, None, :],
        ]
        return moved.permute(0, 3, 1, 2).masked_fill_(~seen, 0.0)

    @staticmethod
    def backward(ctx, gradient):
        down, right = ctx.saved_tensors
        return _Moved.apply(gradient, -down, -right), None, None


def _cutout(images):
    """A rectangle of half the height and width is 0, its middle anywhere in the image."""
    hidden = None
    for axis in (2, 3):
        size = images.shape[axis]
        length = (size + 1) // 2
        middle = torch.randint(0, size + 1, (len(images), 1), device=images.device)
        first = middle - length // 2
        place = torch.arange(size, device=images.device)
        within = (place >= first) & (place < first + length)
        within = within[:, None, :, None] if axis == 2 else within[:, None, None, :]
        hidden = within if hidden is None else hidden & within
    return images.masked_fill(hidden, 0.0)


def _uniform(images):
    """A number from [0, 1) for each image: (N, 1, 1, 1)."""
    return torch.rand(len(images), 1, 1, 1, dtype=images.dtype, device=images.device)


# In the order of the paper's table; its limits are those of its section 4.
AUGMENTATIONS = {"color": _color, "translation": _translation, "cutout": _cutout}
EXPECTED = f"one or more of {', '.join(AUGMENTATIONS)} with commas between, each once"


def are_names(text):
    """Whether text names augmentations."""
    try:
        parsed(text)
    except ValueError:
        return False
    return True
