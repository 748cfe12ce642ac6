"""What the conditional networks share."""


def check_classes(classes: int | None) -> None:
    """Raise ValueError unless `classes` is None or a number of classes."""
    if classes is not None and (type(classes) is not int or classes < 1):
        raise ValueError(
            f"expected classes to be None or a whole number from 1 on, got {classes!r}"
        )
