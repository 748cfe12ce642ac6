"""What a convolution does to its accumulator before it stores it."""

from dataclasses import dataclass

import torch

from genfast.launch import memory, norm, start
from genfast.launch.operand import Output


@dataclass(frozen=True)
class Epilogue:
    """What a convolution does to its accumulator before it stores it, in this order.

    bias: (channels,) added, or None; of dgrad also (phases, channels), one for each phase.
    groups: to return each tile's batch statistics, where no tile holds images of two of so many
        equal parts of the batch; 0 for no statistics.
    vectors: (1, 5, channels) to normalise by, or None.
    added: (N, channels, H, W) like the result, or None.
    activation, negative_slope: as in `functional.conv_block`.

    Or none of these, but what a gradient needs:

    output: of the layer whose gradient the convolution computes, or None: the accumulator is
        multiplied by act'(u). Where it has vectors, each tile's sums of the result g and of
        g * xhat are returned, xhat = (z - mean) * rstd: those of batch norm's backward.
    sums: to return each tile's sums of g also for an output without vectors.
    at_input: None, or (groups, 1, 2 * channels), those sums of all tiles of an output with vectors:
        the result then is the gradient of what that batch norm took. Only of `from_image.fprop` and
        `logits.dgrad`, which take hardly longer than memory: others compute a gradient once.

    Raises:
        ValueError: an output beside any of the others; sums or `at_input` without an output.
    """

    bias: torch.Tensor | None = None
    groups: int = 0
    vectors: torch.Tensor | None = None
    activation: str = "identity"
    negative_slope: float = 0.0
    output: Output | None = None
    sums: bool = False
    added: torch.Tensor | None = None
    at_input: torch.Tensor | None = None

    def __post_init__(self):
        others = self.bias is not None or self.groups or self.vectors is not None
        others = others or self.added is not None
        if self.output is not None and (others or self.activation != "identity"):
            raise ValueError(
                "expected an epilogue with an output to have neither bias, statistics, vectors, "
                f"sum nor activation, got bias {self.bias is not None}, groups {self.groups}, "
                f"vectors {self.vectors is not None}, sum {self.added is not None}, activation "
                f"{self.activation}"
            )
        if self.sums and self.output is None:
            raise ValueError("expected sums only of a gradient, with an output, got sums without")
        if self.at_input is not None and (self.output is None or self.output.vectors is None):
            raise ValueError("expected an output with vectors beside at_input, got none")

    @property
    def parts_of_batch(self):
        """The equal parts of the batch of which no tile may hold images of two."""
        if self.output is not None and self.output.vectors is not None:
            return self.output.vectors.shape[0]
        return max(self.groups, 1)

    @property
    def sums_per_channel(self):
        """How many sums of each channel are returned, apart from statistics."""
        if self.output is None or self.at_input is not None:
            return 0
        return 2 if self.output.vectors is not None else int(self.sums)

    @property
    def is_biased_by_phase(self):
        """Whether the pixels of each phase of dgrad have a bias of their own."""
        return self.bias is not None and self.bias.dim() > 1

    def reductions(self, out, tiles, rows=None):
        """Memory for what is returned beside the result.

        Args:
            out: the result (N, H, W, C).
            tiles: of its pixels, of all parts of the batch.
            rows: of a tile, where they are several pixels' channels; C by default.

        Returns:
            `TileStatistics`; or sums (groups, parts, sums_per_channel * channels) in the dtype that
            products are added in, each part [sums_per_channel, channels]; or None.
        """
        channels = out.shape[3]
        repeat = (rows or channels) // channels
        empty = dict(dtype=start.acc_dtype(out.dtype), device=out.device)
        if self.groups:
            mean, m2 = (torch.empty((tiles * repeat, channels), **empty) for _ in range(2))
            count = torch.empty(tiles, **empty)
            return norm.TileStatistics(count, mean, m2, repeat, self.groups)
        if self.sums_per_channel:
            parts = tiles // self.parts_of_batch * repeat
            shape = (self.parts_of_batch, parts, self.sums_per_channel * channels)
            return torch.empty(shape, **empty)
        return None

    def below(self, out):
        """The output (N, H, W, C) of the layer below, or what is added, dense; the result in its
        place for neither."""
        if self.output is None and self.added is None:
            return out
        below = memory.nhwc(self.added if self.output is None else self.output.value)
        if below.shape != out.shape:
            what = "what is added" if self.output is None else "the output of the layer below"
            raise ValueError(
                f"expected {what} to be {tuple(out.shape)} (N, H, W, C), as the result, got "
                f"{tuple(below.shape)}"
            )
        return below

    def of_gradient(self, out, sums):
        """Arguments of the kernels that compute the gradient of a layer's output."""
        made_by = self.output or self
        if self.at_input is not None:
            sums = self.at_input
        elif self.sums_per_channel == 0:
            sums = out
        return dict(
            vectors_ptr=out if made_by.vectors is None else made_by.vectors,
            sums_ptr=sums,
            negative_slope=made_by.negative_slope,
            HAS_NORM=made_by.vectors is not None,
            HAS_BELOW=self.output is not None,
            HAS_SUMS=self.sums_per_channel > 0,
            ACTIVATION=made_by.activation,
        )

    def arguments(self, out, reductions):
        """Arguments of the kernels that take every epilogue, but for the layer below.

        Args:
            out: the result, any tensor.
            reductions: what `reductions` returned.
        """
        statistics = reductions if self.groups else None
        return dict(
            bias_ptr=memory.dense(self.bias, out),
            count_ptr=statistics.count if statistics else out,
            mean_ptr=statistics.mean if statistics else out,
            m2_ptr=statistics.m2 if statistics else out,
            HAS_BIAS=self.bias is not None,
            HAS_STATISTICS=statistics is not None,
            STORED_DTYPE=start.tl_dtype(out.dtype),
            **self.of_gradient(out, reductions),
        )


PLAIN = Epilogue()
