"""Pictures of images beside what a VAE makes of them."""

from dataclasses import replace

import torch

from genfast.training.data import LabelledImages, load_images, load_labelled
from genfast.training.errors import BadInput
from genfast.training.runs import pictures
from genfast.training.runs.classes import labels_of_data
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
    images, labels = _images_like(model, model.config.data if data is None else data), None
    if isinstance(images, LabelledImages):
        images, labels = images.images, labels_of_data(model.config, images)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(images), generator=generator)[:num]
    originals = images[chosen]
    reconstructed = model.reconstruct(originals, None if labels is None else labels[chosen])
    reconstructed = pictures.to_uint8(reconstructed.cpu(), (0, 1))
    pairs = torch.stack([originals, reconstructed], 1).flatten(0, 1)
    columns = 2 * min(PAIRS_A_ROW, len(originals))
    pictures.save_grid(pairs, target, columns)


def _images_like(model, data):
    """The images of `data`, or `LabelledImages`, in the model's size and with its channels."""
    config = model.config
    load = load_labelled if config.conditional else load_images
    images = load(
        data, config.image_size, background=config.background, run_folder=model.path.parent
    )
    if images.shape[1] == config.channels:
        return images
    if config.channels == 1:
        raise BadInput(
            f"expected grey images, as those of the run in {model.path} are, got colour from {data}"
        )
    shape = -1, config.channels, -1, -1
    if isinstance(images, LabelledImages):
        return replace(images, images=images.images.expand(shape))
    return images.expand(shape)
