"""Pictures of images beside what a VAE makes of them."""

from dataclasses import replace

import torch

from genfast.training.data import load_images, load_labelled
from genfast.training.errors import BadInput
from genfast.training.runs import pictures
from genfast.training.runs.samples import picture_file
from genfast.training.runs.trained import load

PAIRS_A_ROW = 8


def reconstruct_checkpoint(path, data, num, out, *, device, seed=0):
    """Write pairs of pictures as one PNG: an image, and right of it what a VAE makes of it.

    The latent is the mean that the encoder gives.

    Args:
        path: a checkpoint, or the folder of a run.
        data: as `load_images` takes it; None for what the run was trained on.
        num: how many images, taken at random; all of them where there are no more.
        out: the name of the picture.
        seed: of which images are taken.

    Raises:
        BadInput: the checkpoint cannot be read or is that of no VAE, the data cannot be read or do
            not fit it, or nothing must be written to `out`.
    """
    target = picture_file(out)
    model = load(path, device)
    model.check_encodes("reconstruct images")
    images = _images_like(model, model.config.data if data is None else data)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(images), generator=generator)[:num]
    labels = images.labels[chosen] if model.config.conditional else None
    originals = images.images[chosen] if model.config.conditional else images[chosen]
    reconstructed = pictures.to_uint8(model.reconstruct(originals, labels).cpu(), (0, 1))
    pairs = torch.stack([originals, reconstructed], 1).flatten(0, 1)
    columns = 2 * min(PAIRS_A_ROW, len(originals))
    pictures.save_grid(pairs, target, columns)


def _images_like(model, data):
    """The images of `data`, with labels for a conditional model, of the model's size and channels.

    BadInput if their classes are not those of the run.
    """
    config = model.config
    load = load_labelled if config.conditional else load_images
    images = load(
        data, config.image_size, background=config.background, run_folder=model.path.parent
    )
    if config.conditional and images.classes != config.classes:
        raise BadInput(
            f"expected images of the classes {', '.join(config.classes)}, as the run in "
            f"{model.path} has them, got {', '.join(images.classes)} from {data}"
        )
    if images.shape[1] == config.channels:
        return images
    if config.channels == 1:
        raise BadInput(
            f"expected grey images, as those of the run in {model.path} are, got colour from {data}"
        )
    if config.conditional:
        return replace(images, images=images.images.expand(-1, config.channels, -1, -1))
    return images.expand(-1, config.channels, -1, -1)
