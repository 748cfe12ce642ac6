"""The sizes of a convolution, seen the same way for `Conv2d` and `ConvTranspose2d`."""

from typing import NamedTuple


def pair(value, name):
    """An int or a (height, width) of ints as a pair; a stride is at least 1, the others 0."""
    values = (value, value) if isinstance(value, int) else tuple(value)
    if len(values) != 2 or not all(isinstance(v, int) for v in values):
        raise ValueError(f"expected {name} to be an int or two ints, got {value!r}")
    least = 1 if name == "stride" else 0
    if min(values) < least:
        raise ValueError(f"expected {name} to be at least {least}, got {value!r}")
    return values


class ConvGeometry(NamedTuple):
    """How the low-resolution (small) and high-resolution (big) sides of a convolution meet.

    `small[y, x]` touches `big[y * stride - padding + k]` for each tap k of the kernel. A `Conv2d`
    maps big to small, a `ConvTranspose2d` small to big. Every field is a (height, width) pair.
    """

    big: tuple[int, int]
    small: tuple[int, int]
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]

    @classmethod
    def conv(cls, size, kernel_size, stride, padding):
        """The geometry of `conv2d` on an input of this (height, width)."""
        small = tuple(
            (n + 2 * p - k) // s + 1
            for n, k, s, p in zip(size, kernel_size, stride, padding, strict=True)
        )
        return cls(tuple(size), small, kernel_size, stride, padding)

    @classmethod
    def conv_transpose(cls, size, kernel_size, stride, padding, output_padding):
        """The geometry of `conv_transpose2d` on an input of this (height, width)."""
        big = tuple(
            (n - 1) * s - 2 * p + k + o
            for n, k, s, p, o in zip(
                size, kernel_size, stride, padding, output_padding, strict=True
            )
        )
        return cls(big, tuple(size), kernel_size, stride, padding)

    @property
    def taps(self):
        """How many weights a pair of channels has."""
        return self.kernel_size[0] * self.kernel_size[1]

    @property
    def is_product(self):
        """Whether the kernel covers its whole input at once, unpadded: a matrix product.

        Latents to maps, maps to logits: the big side's pixels then are so many channels.
        """
        covers = self.small == (1, 1) and self.big == self.kernel_size
        return covers and not any(self.padding)

    @property
    def output_padding(self):
        """What a transposed convolution from small to big adds at the bottom and right."""
        smallest = (
            (n - 1) * s - 2 * p + k
            for n, s, p, k in zip(
                self.small, self.stride, self.padding, self.kernel_size, strict=True
            )
        )
        return tuple(b - least for b, least in zip(self.big, smallest, strict=True))
