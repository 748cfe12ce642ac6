"""Each activation and its derivative, once, with PyTorch's behaviour at 0 and NaN.

`genfast.reference.ACTIVATION` is the same table in PyTorch. Sources: elu is Clevert et al. (2016)
with alpha = 1, selu Klambauer et al. (2017), gelu Hendrycks and Gimpel (2016), silu Elfwing et al.
(2018), mish Misra (2019), hardswish Howard et al. (2019), prelu He et al. (2015).
"""

import triton
import triton.language as tl

SELU_ALPHA = tl.constexpr(1.6732632423543772848170429916717)
SELU_SCALE = tl.constexpr(1.0507009873554804934193349852946)
# Above it PyTorch's softplus is the identity.
SOFTPLUS_THRESHOLD = tl.constexpr(20.0)
ROOT_HALF = tl.constexpr(0.70710678118654752440)
NORMAL_AT_0 = tl.constexpr(0.39894228040143267794)  # 1 / sqrt(2 pi)
GELU_CUBIC = tl.constexpr(0.044715)


@triton.jit
def activate(u, negative_slope, ACTIVATION: tl.constexpr):
    """y = act(u). NaN gives NaN. For "prelu" negative_slope broadcasts to u."""
    if ACTIVATION == "relu":
        y = tl.where(u <= 0, 0.0, u)  # Not maximum(): this order lets NaN through.
    elif ACTIVATION == "leaky_relu" or ACTIVATION == "prelu":
        y = tl.where(u > 0, u, u * negative_slope)
    elif ACTIVATION == "tanh":
        y = _tanh(u)
    elif ACTIVATION == "sigmoid":
        y = 1.0 / (1.0 + tl.exp(-u))
    elif ACTIVATION == "relu6":
        y = _clamp(u, 0.0, 6.0)
    elif ACTIVATION == "hardtanh":
        y = _clamp(u, -1.0, 1.0)
    elif ACTIVATION == "hardswish":
        y = u * _clamp(u + 3.0, 0.0, 6.0) / 6.0
    elif ACTIVATION == "elu":
        y = tl.where(u > 0, u, _expm1(tl.where(u > 0, 0.0, u)))
    elif ACTIVATION == "selu":
        y = tl.where(u > 0, u, _expm1(tl.where(u > 0, 0.0, u)) * SELU_ALPHA) * SELU_SCALE
    elif ACTIVATION == "softplus":
        above = tl.where(u > 0, u, 0.0) + log1p(tl.exp(-tl.abs(u)))
        y = tl.where(u > SOFTPLUS_THRESHOLD, u, above)
    elif ACTIVATION == "silu":
        y = u * sigmoid(u)
    elif ACTIVATION == "gelu":
        y = u * _normal_cdf(u)
    elif ACTIVATION == "gelu_tanh":
        y = u * sigmoid(_gelu_exponent(u))
    elif ACTIVATION == "mish":
        y = u * _tanh_softplus(u)
    else:
        tl.static_assert(ACTIVATION == "identity")
        y = u
    return y


@triton.jit
def activation_backward(dy, y, negative_slope, ACTIVATION: tl.constexpr):
    """dy * act'(u), from the output y = act(u).

    For "prelu" and those from "silu" on y is u itself: their output does not tell. At u = 0 the
    derivative is 0 for relu and the slope for leaky relu. NaN passes dy through relu and scales it
    by the slope in leaky relu, whose slope must not be negative: y would not tell.
    """
    if ACTIVATION == "relu":
        du = tl.where(y <= 0, 0.0, dy)
    elif ACTIVATION == "leaky_relu" or ACTIVATION == "prelu":
        du = tl.where(y > 0, dy, dy * negative_slope)
    elif ACTIVATION == "tanh":
        du = dy * (1.0 - y * y)
    elif ACTIVATION == "sigmoid":
        du = dy * (1.0 - y) * y
    elif ACTIVATION == "relu6":
        du = tl.where((y <= 0) | (y >= 6), 0.0, dy)
    elif ACTIVATION == "hardtanh":
        du = tl.where((y <= -1) | (y >= 1), 0.0, dy)
    elif ACTIVATION == "elu":
        du = tl.where(y > 0, dy, dy * (y + 1.0))
    elif ACTIVATION == "selu":
        du = dy * tl.where(y > 0, SELU_SCALE, y + (SELU_SCALE * SELU_ALPHA))
    elif ACTIVATION == "softplus":  # 1 - exp(-y)
        du = tl.where(y > SOFTPLUS_THRESHOLD, dy, -dy * _expm1(-y))
    elif ACTIVATION == "silu":
        du = dy * (sigmoid(y) * (1.0 + y * sigmoid(-y)))
    elif ACTIVATION == "gelu":
        density = tl.exp(-0.5 * y * y) * NORMAL_AT_0
        du = dy * (_normal_cdf(y) + y * density)
    elif ACTIVATION == "gelu_tanh":
        s = sigmoid(_gelu_exponent(y))
        slope = (1.0 + y * y * (3.0 * GELU_CUBIC)) * (4.0 * NORMAL_AT_0)
        du = dy * (s + y * (s * sigmoid(-_gelu_exponent(y))) * slope)
    elif ACTIVATION == "mish":
        t = _tanh_softplus(y)
        du = dy * (t + y * (1.0 - t * t) * sigmoid(y))
    elif ACTIVATION == "hardswish":
        du = tl.where(y <= -3, 0.0, tl.where(y >= 3, dy, dy * (y / 3.0 + 0.5)))
    else:
        tl.static_assert(ACTIVATION == "identity")
        du = dy
    return du


@triton.jit
def activation_backward_at(dy, u, negative_slope, ACTIVATION: tl.constexpr):
    """dy * act'(u), from u: in as few registers as may be, since products do it in their tiles."""
    if ACTIVATION == "tanh" or ACTIVATION == "sigmoid":
        y = activate(u, negative_slope, ACTIVATION)
        du = activation_backward(dy, y, negative_slope, ACTIVATION)
    elif ACTIVATION == "elu":
        du = tl.where(u > 0, dy, dy * tl.exp(u))
    elif ACTIVATION == "selu":
        du = dy * tl.where(u > 0, SELU_SCALE, tl.exp(u) * (SELU_SCALE * SELU_ALPHA))
    elif ACTIVATION == "softplus":
        du = tl.where(u > SOFTPLUS_THRESHOLD, dy, dy * sigmoid(u))
    else:  # u, or its sign or place among bounds, tells as y does.
        du = activation_backward(dy, u, negative_slope, ACTIVATION)
    return du


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)), which overflows nowhere."""
    e = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, e) / (1.0 + e)


@triton.jit
def log1p(e):
    """log(1 + e) for e in [0, 1]."""
    # 1 + e drops digits of e; they come back as the first term of Taylor's series around the
    # rounded sum u, and e - (u - 1) is exact.
    u = 1.0 + e
    return tl.log(u) + (e - (u - 1.0)) / u


@triton.jit
def _clamp(u, low: tl.constexpr, high: tl.constexpr):
    return tl.where(u <= low, low, tl.where(u >= high, high, u))


@triton.jit
def _normal_cdf(u):
    return 0.5 * (1.0 + tl.erf(u * ROOT_HALF))


@triton.jit
def _gelu_exponent(u):
    """x of gelu's approximation u * sigmoid(x) = u / 2 * (1 + tanh(x / 2))."""
    return (u + u * u * u * GELU_CUBIC) * (4.0 * NORMAL_AT_0)


@triton.jit
def _tanh_softplus(u):
    """tanh(log(1 + exp(u))), without a difference: with e = exp(u), (e^2 + 2e) / (e^2 + 2e + 2)."""
    e = tl.exp(-tl.abs(u))
    # Above 0 both parts are divided by exp(2u), which could overflow.
    numerator = tl.where(u > 0, 1.0 + 2.0 * e, e * (e + 2.0))
    return numerator / (numerator + 2.0 * tl.where(u > 0, e * e, 1.0))


@triton.jit
def _expm1(u):
    """exp(u) - 1 for u <= 0."""
    # Near 0 that cancels, so Taylor's series takes over: below 1/2, of which so many terms are
    # exact to float32 or float64. It takes no division, and few registers.
    TERMS: tl.constexpr = 14 if u.dtype == tl.float64 else 8
    series = 1.0 + u * (1.0 / TERMS)
    for n in tl.static_range(TERMS - 1, 1, -1):
        series = 1.0 + u * series * (1.0 / n)
    return tl.where(u > -0.5, u * series, tl.exp(u) - 1.0)


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
