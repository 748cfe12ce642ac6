"""dgrad to an image of few channels: a generator's last layer, a discriminator's input gradient."""

from genfast.backend import INTERPRETING, triton
from genfast.launch import memory, norm, passes, start, tape, tiles

if triton is not None:
    from genfast.kernels import to_image as kernels

# What a program does before its first step, in steps.
_PROLOGUE = 1.2


def fits(geometry, c_small, c_big, epilogue):
    """Whether `dgrad` takes this problem; see `why_not`."""
    return why_not(geometry, c_small, c_big, epilogue) is None


def why_not(geometry, c_small, c_big, epilogue):
    """A sentence saying why `dgrad` does not take this problem; None if it does.

    Args:
        geometry: a `ConvGeometry`.
        c_small, c_big: the channels of its sides, c_big being the image's.
        epilogue: an `Epilogue`.
    """
    if not 1 <= c_big <= 4:
        return f"an image has 1 to 4 channels, this has {c_big}"
    if geometry.is_product:
        return "the kernel covers the whole image: a matrix product"
    if epilogue.is_biased_by_phase:
        return "an image's bias is one a channel"
    if epilogue.groups or epilogue.vectors is not None:
        return "an image is not normalised"
    if epilogue.output is not None:
        return "an image is no layer's output"
    for kernel, stride in zip(geometry.kernel_size, geometry.stride, strict=True):
        if not max(stride, 2) <= kernel <= 8:
            return f"kernels are 2 to 8 wide and no narrower than their stride, not {kernel}"
    return None


def dgrad(
    small, weight, geometry, epilogue, y=None, vectors=None, activation="identity",
    negative_slope=0.0,
):  # fmt: skip
    """As `conv.dgrad`, where `fits`.

    Args:
        small: (N, C_small, Ho, Wo) of `geometry.small`.
        weight: (C_small, C_big, kh, kw).
        geometry: a `ConvGeometry`.
        epilogue: an `Epilogue` over C_big channels, without statistics and vectors.
        y: None, or a tensor like `small` of which that is the gradient. What is convolved then is
            small * act'(u) where y = act(u): the gradient of u.
        vectors: None, or (groups, 5, C_small) of a batch norm whose input `small` is: what is
            convolved then is its activated output. Not together with y.
        activation, negative_slope: of y, or of that output, as in `functional.conv_block`.

    Returns:
        (N, C_big, H, W) of `geometry.big`, channels_last.
    """
    small, weight = memory.nhwc(small), memory.nhwc(weight)
    y = None if y is None else memory.nhwc(y)
    groups, normalization = norm.reading(small, vectors)
    n, h_small, w_small, c_small = small.shape
    h_big, w_big = geometry.big
    c_big = weight.shape[3]
    kh, kw = geometry.kernel_size
    result = memory.channels_last((n, h_big, w_big, c_big), small)

    tile = _tile(start.architecture(small), start.precision(small), small, geometry, c_big)
    first_step, steps = _steps(h_big, geometry.stride[0], geometry.padding[0])
    warm_up = tiles.ceil_div(kh - geometry.stride[0], geometry.stride[0])
    strips = tiles.ceil_div(n, tile["BLOCK_N"]) * tile["tiles_w"]
    segments = _segments(strips, steps, warm_up, passes.programs(small, 1))
    steps_per_segment = tiles.ceil_div(steps, segments)
    segments = tiles.ceil_div(steps, steps_per_segment)
    tape.start(
        kernels.to_image,
        (strips * segments,),
        small_ptr=small,
        y_ptr=small if y is None else y,
        weight_ptr=weight,
        bias_ptr=memory.dense(epilogue.bias, result),
        out_ptr=memory.nhwc(result),
        N=n,
        H_small=h_small,
        W_small=w_small,
        C_small=c_small,
        H_big=h_big,
        W_big=w_big,
        segments=segments,
        first_step=first_step,
        steps_per_segment=steps_per_segment,
        negative_slope=epilogue.negative_slope,
        y_slope=negative_slope,
        group_images=n // groups,
        C_BIG=c_big,
        KH=kh,
        KW=kw,
        STRIDE_H=geometry.stride[0],
        STRIDE_W=geometry.stride[1],
        PAD_H=geometry.padding[0],
        PAD_W=geometry.padding[1],
        HAS_BIAS=epilogue.bias is not None,
        ACTIVATION=epilogue.activation,
        HAS_Y=y is not None,
        GROUPED=groups > 1,
        **normalization,
        Y_ACTIVATION=activation,
        **start.arithmetic(small),
        **tile,
    )
    return result


def _steps(h_big, stride, padding):
    """The first row of small that completes a row of the image, and how many rows do."""
    first = padding // stride
    return first, (h_big - 1 + padding) // stride - first + 1


def _segments(strips, steps, warm_up, multiprocessors):
    """In how many parts to cut the steps of each strip, by the time that the slowest chip part has.

    A multiprocessor with one program waits for memory about as long as two would take.
    """

    def time(segments):
        programs = max(tiles.ceil_div(strips * segments, multiprocessors), 2)
        return programs * (_PROLOGUE + warm_up + tiles.ceil_div(steps, segments))

    # A segment first reads warm_up rows of its neighbour: no more of these than of its own.
    return min(range(1, steps // max(warm_up, 1) + 1), key=time, default=1)


def _tile(architecture, precision, small, geometry, c_big):
    """The tile's constants, and how tiles cover a row.

    64 pixels and 64 columns are one wgmma of a warp group. What is chosen here fits the registers
    and the shared memory of each architecture; tests/test_to_image.py compiles the extremes.
    """
    _, _, w_small, c_small = small.shape
    itemsize = small.element_size()
    kh, kw = map(tiles.power_of_two, geometry.kernel_size)
    hopper = architecture in ("sm_90", "sm_100")
    # What multiplies without tensor cores holds its operands in registers.
    scalar = itemsize >= 4 and precision == "ieee"
    large = kh * kw > 16
    # whole: the bytes of a pixel up to which its channels are one chunk. Then the weight is loaded
    # once for all steps.
    if INTERPRETING:
        pixels, whole, chunk = 16, 128, 32  # A test's few pixels and channels span several tiles.
    elif scalar:
        pixels, whole, chunk = 16 if large else 64, 64, 16
    elif hopper:
        pixels, whole, chunk = 64, 256 if large else 512, (64 if large else 128) // itemsize
    else:  # sm_86 has 99 KiB of shared memory, gfx942 64.
        pixels, whole, chunk = 32 if large else 64, 128 if large else 256, 128 // itemsize
    block_c = max(tiles.power_of_two(c_small), 16)
    if block_c * itemsize > whole:
        block_c = chunk
    num_warps = 8 if large or block_c * itemsize > 256 else 4

    # A wider tile wastes less on the neighbours of a row that is a little longer than a tile.
    wide = hopper and not large and not scalar and block_c * itemsize <= 128
    widths = (pixels, 2 * pixels) if wide else (pixels,)
    covers = [(width, *_cover(width, w_small, geometry)) for width in widths]
    block_w, tiles_w, tile_w, first_x = min(covers, key=lambda cover: cover[0] * cover[1])
    block_w = min(block_w, tiles.power_of_two(w_small))
    return dict(
        tiles_w=tiles_w,
        tile_w=tile_w,
        first_x=first_x,
        CHUNKED=c_small > block_c,
        BLOCK_KH=kh,
        BLOCK_KW=kw,
        BLOCK_N=max(pixels // block_w, 1),
        BLOCK_W=block_w,
        BLOCK_C=block_c,
        BLOCK_E=tiles.power_of_two(tile_w * geometry.stride[1] * c_big),
        num_warps=8 if block_w > pixels else num_warps,
        num_stages=3 if block_c * itemsize <= 256 and (hopper or not large) else 2,
    )


def _cover(block_w, w_small, geometry):
    """How tiles of block_w pixels cover a row: their number, their pitch and the first's start.

    The pitch is in pixels of small; a tile makes stride times as many of the image.
    """
    (_, w_big), (_, kw) = geometry.big, geometry.kernel_size
    (_, stride), (_, padding) = geometry.stride, geometry.padding
    pitch = tiles.ceil_div(w_big, stride)
    if w_small <= block_w:
        return 1, pitch, 0  # What lies beyond the tile lies beyond the image.
    # The image's pixels from a multiple of the stride on touch those from first_x on.
    first_x = -((kw - 1 - padding) // stride)
    largest = block_w + first_x - (padding - 1) // stride - 1
    count = tiles.ceil_div(pitch, largest)
    return count, tiles.ceil_div(pitch, count), first_x
