"""Images and labels, in what data sets and loaders give: an item, or a batch of items."""

from collections.abc import Callable, Mapping
from typing import Any

# The names under which the dicts of Hugging Face's data sets and processors have them.
IMAGES = ("image", "images", "img", "pixel_values")
LABELS = ("label", "labels")
FORMS = f"a list or tuple that begins with one, or a dict with one under {', '.join(IMAGES)}"


def images_and_labels(thing: Any, are_images: Callable[[Any], bool]) -> tuple[Any, Any]:
    """(images, labels) of an item or of a batch; of one without labels these are None.

    Args:
        thing: images; a list or tuple that begins with them, and goes on with labels if there are
            any; or a dict that has them under one of `IMAGES`, or under whatever name if nothing
            else in it could be images, and labels under one of `LABELS`.
        are_images: a function that tells whether a value may be images.

    Returns:
        The two as they were given. The first may be no images: that is for the caller to say.

    Raises:
        TypeError: a dict has no images, or could mean several of its values.
    """
    if isinstance(thing, tuple | list):
        images, labels = [*list(thing), None, None][:2]
        return images, labels
    if not isinstance(thing, Mapping):
        return thing, None
    candidates = [name for name, value in thing.items() if are_images(value)]
    named = [name for name in candidates if name in IMAGES]
    if len(named or candidates) != 1:
        raise TypeError(
            f"expected a dict with images under one of {', '.join(IMAGES)}, got one of "
            f"{', '.join(map(str, thing)) or 'nothing'}, {len(named or candidates)} of which may be"
        )
    return thing[(named or candidates)[0]], next((thing[n] for n in LABELS if n in thing), None)
