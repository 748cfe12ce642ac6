"""Images: where they come from, the batches drawn from them, and fetching those ahead."""

from genfast.training.data.batches import Batches
from genfast.training.data.datasets import DataSet, Streamed
from genfast.training.data.decoding import colour
from genfast.training.data.labels import LabelledImages
from genfast.training.data.sources import checksum, load_images, load_labelled, resize
from genfast.training.pixels import normalize

__all__ = [
    "Batches",
    "DataSet",
    "LabelledImages",
    "Streamed",
    "checksum",
    "colour",
    "load_images",
    "load_labelled",
    "normalize",
    "resize",
]
