"""What turns images into features: the classifier of digits, Inception, or a file of the user's.

An extractor is a function of uint8 images (N, C, H, W) that gives features (N, D). To add one by
name, add a row to `EXTRACTORS`.
"""

import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from genfast.models.sizes import plain
from genfast.training.errors import BadInput, require
from genfast.training.evaluation.digits import PoorClassifier, good_classifier
from genfast.training.memory import missing_memory
from genfast.training.pixels import normalize

# uint8 images (N, C, H, W) to features (N, D).
Extractor = Callable[[torch.Tensor], torch.Tensor]


def extractor(name: str, image_shape: Sequence[int], device: torch.device) -> Extractor:
    """An extractor for images of one shape.

    Args:
        name: one of `EXTRACTORS`, or the path of a file. One that ends in .onnx is an ONNX model,
            run by onnxruntime; any other is TorchScript, and loading that runs code of its maker.
            Both take float32 images (N, 3, H, W) with values in [0, 1], N of any size, grey images
            as three equal channels, H and W those of the run; resizing and normalising are theirs.
            Both give floats (N, D), or several things of which this is the first.
        image_shape: (C, H, W), C 1 or 3.
        device: a `torch.device`.

    Raises:
        BadInput: there is no such extractor, it does not take such images, its weights cannot be
            had, or an extra is not installed.
    """
    if name in EXTRACTORS:
        return EXTRACTORS[name](image_shape, device)
    path = Path(name)
    if not path.is_file():
        raise BadInput(
            f"expected --features to be {', '.join(EXTRACTORS)} or a TorchScript or ONNX file, got "
            f"{name}, where there is no file"
        )
    return (_onnx if path.suffix.lower() == ".onnx" else _torchscript)(path, device)


def extract(extractor: Extractor, name: str, batches: Iterable[torch.Tensor]) -> torch.Tensor:
    """The features (N, D) of batches of images, float32 in CPU memory.

    Args:
        extractor: what the function of that name gave.
        name: its own.
        batches: uint8 images (n, C, H, W), several times.

    Raises:
        BadInput: it fails, or gives something else than finite features.
    """
    parts: list[torch.Tensor] = []
    for images in batches:
        try:
            found = extractor(images)
        except Exception as error:  # It is somebody's own code.
            if missing_memory(error) or isinstance(error, BadInput):
                raise
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise BadInput(
                f"expected --features {name} to take images of {images.shape[3]} x "
                f"{images.shape[2]} pixels, but it failed: {reason[-1]}"
            ) from error
        width = parts[0].shape[1] if parts else "D"
        if not _are_features(found, len(images), width):
            raise BadInput(
                f"expected --features {name} to give finite floats ({len(images)}, {width}) for "
                f"{len(images)} images, got {_described(found)}"
            )
        parts.append(found.detach().float().cpu())
    return torch.cat(parts)


def _are_features(found: object, count: int, width: object) -> bool:
    return (
        isinstance(found, torch.Tensor)
        and found.is_floating_point()
        and found.ndim == 2
        and found.shape[0] == count
        and found.shape[1] >= 1
        and width in ("D", found.shape[1])
        and bool(found.isfinite().all())
    )


def _described(found: object) -> str:
    if not isinstance(found, torch.Tensor):
        return f"a {type(found).__name__}"
    infinite = found.is_floating_point() and not found.isfinite().all()
    kind = str(found.dtype).removeprefix("torch.")
    return f"{kind} {tuple(found.shape)}" + (" with NaN or infinity" if infinite else "")


def _digits(image_shape: Sequence[int], device: torch.device) -> Extractor:
    channels, height, width = image_shape
    if channels != 1:
        raise BadInput(f"expected grey images for --features digits, got {channels} channels")
    try:
        classifier = good_classifier(plain(height, width))
    except PoorClassifier as error:  # Of images so small that digits cannot be told apart.
        raise BadInput(f"{error}, of {height} x {width} pixels") from None
    return lambda images: torch.from_numpy(classifier.features(images))


def _inception(image_shape: Sequence[int], device: torch.device) -> Extractor:
    fidelity = require("torch_fidelity", "torch-fidelity", "evaluate")
    try:
        network = fidelity.FeatureExtractorInceptionV3("inception", ["2048"]).to(device)
    except Exception as error:  # It downloads its weights, which may fail in any way.
        if missing_memory(error):
            raise
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise BadInput(
            f"expected the weights of Inception, which torch-fidelity downloads once, but could "
            f"not have them: {reason}; give --features a file instead"
        ) from error

    @torch.no_grad()
    def run(images: torch.Tensor) -> torch.Tensor:
        return network(_rgb(images).to(device))[0]

    return run


def _torchscript(path: Path, device: torch.device) -> Extractor:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch would rather have other formats.
            network = torch.jit.load(path, map_location=device).eval()
    except Exception as error:  # Damaged bytes make the reader raise nearly anything.
        if missing_memory(error):
            raise
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise BadInput(
            f"expected a TorchScript file at {path}, could not read it: {reason}"
        ) from error

    @torch.no_grad()
    def run(images: torch.Tensor) -> torch.Tensor:
        return _first(network(_floats(images).to(device)))

    return run


def _onnx(path: Path, device: torch.device) -> Extractor:
    runtime = require("onnxruntime", "onnxruntime", "evaluate")
    providers: list[Any] = ["CPUExecutionProvider"]
    if device.type == "cuda" and "CUDAExecutionProvider" in runtime.get_available_providers():
        providers.insert(0, ("CUDAExecutionProvider", {"device_id": device.index or 0}))
    try:
        session = runtime.InferenceSession(str(path), providers=providers)
    except Exception as error:  # Of a class of its own for each trouble.
        if missing_memory(error):
            raise
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise BadInput(f"expected an ONNX file at {path}, could not read it: {reason}") from error
    inputs = session.get_inputs()
    if len(inputs) != 1:
        raise BadInput(f"expected an ONNX file of one input at {path}, got {len(inputs)}")
    if isinstance(inputs[0].shape[0], int):
        raise BadInput(
            f"expected an ONNX file that takes any number of images at {path}, got one for "
            f"{inputs[0].shape[0]}: export it with a dynamic first axis"
        )

    def run(images: torch.Tensor) -> torch.Tensor:
        found = session.run(None, {inputs[0].name: _floats(images).cpu().numpy()})
        return torch.from_numpy(found[0])

    return run


def _first(found: Any) -> Any:
    return found[0] if isinstance(found, tuple | list) and found else found


def _rgb(images: torch.Tensor) -> torch.Tensor:
    return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images


def _floats(images: torch.Tensor) -> torch.Tensor:
    return normalize(_rgb(images), (0.0, 1.0))


EXTRACTORS = {"digits": _digits, "inception": _inception}
