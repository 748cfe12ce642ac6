"""An operand of a product, in the forms that different kernels read it in, each made once."""

from dataclasses import dataclass

import torch

from genfast import reference
from genfast.launch import from_image, norm

# So few groups, or as many pixels in each of them, and a tile hardly ever meets two.
_FEW_GROUPS = 4
_MANY_PIXELS = 1024
# Activations of a few instructions.
_CHEAP = ("identity", "relu", "leaky_relu", "relu6", "hardtanh", "hardswish")


@dataclass
class Operand:
    """An activation, or the gradient of one before its activation function.

    value: (N, C, H, W).
    y: None, or like `value`: y = act(u), where `value` is the gradient of y and the operand that
        of u. Some kernels multiply by act'(u) as they read it; for others a pass does.
    activation, negative_slope: of y, as in `functional.conv_block`.
    image: the `from_image.Padded` copy, where there is one or once something needed it.
    """

    value: torch.Tensor
    y: torch.Tensor | None = None
    activation: str = "identity"
    negative_slope: float = 0.0
    image: from_image.Padded | None = None
    _tensor: torch.Tensor | None = None

    @property
    def channels(self):
        """How many it has."""
        return self.value.shape[1]

    def as_read(self):
        """A tensor, and how to make the operand of it: arguments of kernels that do so reading."""
        return self.value, dict(
            y=self.y, activation=self.activation, negative_slope=self.negative_slope
        )

    def unnormalized(self):
        """As `as_read`, for kernels that can normalise and nothing else."""
        return self.tensor(), {}

    def tensor(self):
        """(N, C, H, W), multiplied by act'(u)."""
        if self.y is None:
            return self.value
        if self._tensor is None:
            self._tensor = norm.activation_backward(
                self.value, self.y, self.activation, self.negative_slope
            )
        return self._tensor

    def release(self):
        """Forget the forms that can be made again."""
        self._tensor = self.image = None

    def padded(self, geometry):
        """A `from_image.Padded`, multiplied by act'(u)."""
        if self.image is None:
            value, how = self.as_read()
            self.image = from_image.padded(value, geometry, **how)
        return self.image


@dataclass
class Output:
    """The output of a layer, y = act(u), as backward keeps it: as y, or as what batch norm took.

    value: (N, C, H, W): z, where u = (z - mean) * scale + shift; without `vectors`, y. Of "glu" y
        has half of C.
    vectors: (groups, 5, C) of the batch norm, as `norm.batch_statistics` gives them, or None.
    activation, negative_slope: as in `functional.conv_block`.
    added: None, or like `value`: with vectors u = (z - mean) * scale + shift + added.
    """

    value: torch.Tensor
    vectors: torch.Tensor | None
    activation: str
    negative_slope: float | torch.Tensor
    added: torch.Tensor | None = None
    _tensor: torch.Tensor | None = None

    @property
    def channels(self):
        """How many y has."""
        channels = self.value.shape[1]
        return channels // 2 if reference.ACTIVATION[self.activation].halves else channels

    @property
    def is_made_reading(self):
        """Whether kernels that can make y as they read `value` should."""
        # Exponentials take longer than memory does, in each of the programs that read an element.
        if self.vectors is None or self.activation not in _CHEAP:
            return False
        # A program makes all of its elements anew for each group that it meets.
        groups, (n, _, h, w) = len(self.vectors), self.value.shape
        return groups <= _FEW_GROUPS or n // groups * h * w >= _MANY_PIXELS

    def as_read(self):
        """As `Operand.as_read`."""
        if not self.is_made_reading:
            return self.tensor(), {}
        return self.value, dict(
            vectors=self.vectors, activation=self.activation, negative_slope=self.negative_slope
        )

    def unnormalized(self):
        """As `as_read`: to normalise is all there is to do."""
        return self.as_read()

    def tensor(self, dtype=None):
        """y (N, C, H, W), channels_last; made once, in the dtype of `value` or of one asked for."""
        if self.vectors is None:
            return self.value
        if self._tensor is None:
            self._tensor = norm.normalize_activate(
                self.value, self.vectors, self.activation, self.negative_slope, dtype, self.added
            )
        return self._tensor

    def told_by(self):
        """What `norm.activation_backward` tells act'(u) by: y, or u itself."""
        if not reference.ACTIVATION[self.activation].from_input:
            return self.tensor()
        return norm.normalize_activate(self.value, self.vectors, "identity", 0.0)

    def remember(self, y):
        """Take y from who has made it; None is nothing to remember."""
        self._tensor = y

    def release(self):
        """Forget y, where it can be made again."""
        self._tensor = None

    def padded(self, geometry):
        """A `from_image.Padded` of y."""
        return from_image.padded(self.tensor(), geometry)


def operand(value):
    """An `Operand` of a tensor; what is an operand already stays what it is."""
    return Operand(value) if isinstance(value, torch.Tensor) else value
