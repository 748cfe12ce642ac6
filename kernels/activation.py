"""Each activation and its derivative, once, with PyTorch's behaviour at 0 and NaN."""

import triton
import triton.language as tl


@triton.jit
def activate(u, negative_slope, ACTIVATION: tl.constexpr):
    """y = act(u). NaN gives NaN."""
    if ACTIVATION == "relu":
        y = tl.where(u <= 0, 0.0, u)  # Not maximum(): this order lets NaN through.
    elif ACTIVATION == "leaky_relu":
        y = tl.where(u > 0, u, u * negative_slope)
    elif ACTIVATION == "tanh":
        y = _tanh(u)
    elif ACTIVATION == "sigmoid":
        y = 1.0 / (1.0 + tl.exp(-u))
    else:
        tl.static_assert(ACTIVATION == "identity")
        y = u
    return y


@triton.jit
def activation_backward(dy, y, negative_slope, ACTIVATION: tl.constexpr):
    """dy * act'(u), from the output y = act(u): every activation here allows it.

    At u = 0 the derivative is 0 for relu and the slope for leaky relu. NaN passes dy through relu
    and scales it by the slope in leaky relu. The slope must not be negative: y would not tell.
    """
    if ACTIVATION == "relu":
        du = tl.where(y <= 0, 0.0, dy)
    elif ACTIVATION == "leaky_relu":
        du = tl.where(y > 0, dy, dy * negative_slope)
    elif ACTIVATION == "tanh":
        du = dy * (1.0 - y * y)
    elif ACTIVATION == "sigmoid":
        du = dy * (1.0 - y) * y
    else:
        tl.static_assert(ACTIVATION == "identity")
        du = dy
    return du


@triton.jit
def _tanh(u):
    # Near 0 the exponential form cancels, so Lambert's continued fraction takes over there: below
    # 1/2, five of its levels are exact to float32, seven to float64. Both forms share one division.
    near = tl.abs(u) < 0.5
    t = tl.exp(-2.0 * tl.abs(u))
    far = tl.where(u < 0, t - 1.0, 1.0 - t)
    s = u * u
    if u.dtype == tl.float64:
        numerator = u * (135135.0 + s * (17325.0 + s * (378.0 + s)))
        denominator = 135135.0 + s * (62370.0 + s * (3150.0 + s * 28.0))
    else:
        numerator = u * (945.0 + s * (105.0 + s))
        denominator = 945.0 + s * (420.0 + s * 15.0)
    return tl.where(near, numerator, far) / tl.where(near, denominator, 1.0 + t)
