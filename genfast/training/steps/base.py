"""What the steps share: precision, capture, the check of a batch, and the default optimizer."""

from contextlib import contextmanager

import torch

from genfast.training.steps.capture import CapturedStep, CUDARecorder, why_not_captured
from genfast.training.steps.precision import Precision


def adam(module, lr=2e-4, betas=(0.5, 0.999)):
    """Adam as fast as PyTorch has it where the module is: fused, and on a GPU fit for a graph."""
    on_gpu = _device_of(module).type == "cuda"
    return torch.optim.Adam(module.parameters(), lr, betas, fused=True, capturable=on_gpu)


def _device_of(module):
    return next(module.parameters()).device


class Step:
    """What steps share: precision, capture, and the checks of a batch.

    Subclasses have `_step(images) -> tuple of scalar tensors`, the attributes `pixel_range`,
    `latent_shape` and `weights_reused` (whether a network takes part in more than one pass), and
    `_draw(z)`, their images in `pixel_range`. They may have `_look(images)`, which learns from a
    first batch what the steps need to know, and leaves no other trace.
    """

    def __init__(self, modules, optimizers, precision, capture):
        self.modules, self.optimizers = modules, optimizers
        self._looked = False
        self.device = _device_of(next(iter(modules.values())))
        self._precision = Precision(
            precision, self.device, modules, optimizers, self.weights_reused
        )
        reason = "it was switched off"
        if capture is not False:
            reason = why_not_captured(self.device, optimizers.values())
        if capture and reason:
            raise ValueError(f"expected a step that can be captured, but {reason}")
        self.why_not_captured = reason
        self._run = self._step_in_precision
        if reason is None:
            self._run = CapturedStep(
                self._step_in_precision,
                list(modules.values()),
                list(optimizers.values()),
                list(self.scalers.values()),
                CUDARecorder(self.device),
            )

    @property
    def precision(self):
        """The name of the precision, never "auto"."""
        return self._precision.name

    @property
    def scalers(self):
        """The gradient scalers of fp16 by their optimizer's name."""
        return self._precision.scalers

    def __call__(self, images):
        """Make one step."""
        images = _checked_images(images, self.device)
        with self._precision.products():
            if not self._looked:
                self._look(images)
                self._looked = True
            return self._result(*self._run(images))

    def _look(self, images):
        pass

    def _step_in_precision(self, images):
        with self._precision.weights():
            return self._step(images)

    @torch.no_grad()
    def sample(self, z):
        """Images in `pixel_range` for this noise, by the running statistics of batch norms."""
        with self._precision.products(), self._precision.autocast():
            return self._draw(z).float()


def _checked_images(images, device):
    """The images in the memory format of the kernels; an error unless a step can take them."""
    if images.dim() != 4:
        raise ValueError(f"expected images of shape (N, C, H, W), got shape {tuple(images.shape)}")
    if not images.is_floating_point():
        raise TypeError(f"expected floating-point images, got {images.dtype}")
    if images.device != device:
        raise ValueError(f"expected images on the networks' device {device}, got {images.device}")
    return images.contiguous(memory_format=torch.channels_last)


@contextmanager
def evaluating(module):
    modes = [(m, m.training) for m in module.modules()]  # A part may be in evaluation for good.
    module.eval()
    try:
        yield
    finally:
        for m, training in modes:
            m.training = training
