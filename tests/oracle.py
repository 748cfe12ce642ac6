"""What "right" means: every tolerance of the tests of the kernels, and the comparison by them.

The oracle is the formula in float64, given the same (rounded) inputs. A result passes when its
largest error is at most twice that of eager PyTorch in the same dtype, three times for gradients,
plus one rounding of its largest element. The norm of its errors is held to the same factors, plus
one rounding of every element: a largest error is a rare one, and would let all others be as large.
No tolerance grows with the number of elements.
"""

import copy
from dataclasses import replace

import torch
import torch.nn.functional as F
from cases import LAYOUTS, VECTORS

CONVOLVED = ("x", "weight", "bias")
STATISTICS = ("running_mean", "running_var")

VALUE_FACTOR = 2
GRADIENT_FACTOR = 3
# A reduction to a handful of numbers may come out exact by luck, so eager PyTorch's error is the
# largest over this many draws of the inputs, those of the test among them.
DRAWS = 16
# Where an activation bends, a rounding decides between two derivatives. Pixels closer to the bend
# than this many of eager PyTorch's errors get no gradient from above; the others obey the rule.
BEND_MARGIN = 4
# What random draws show may lie this many standard deviations from what is expected. The seeds are
# fixed: a test that passes goes on passing.
SIGMAS = 5
# Losses of two trainings in float32 may part by this much, relatively, at any step.
LOSS_DRIFT = 1e-3


def assert_close(ours, oracle, samples):
    """Hold named tensors to the rule; None and integers must be equal.

    Args:
        ours: the results under test, by name. Names of gradients begin with "gradient".
        oracle: those of the formula in float64.
        samples: pairs of eager PyTorch's results and their oracle's. To test float64 they are in
            float32, and their errors count in proportion to the roundings.
    """
    assert ours.keys() == oracle.keys()
    problems = []
    for name, result in ours.items():
        expected = oracle[name]
        if result is None or not result.is_floating_point():
            assert result is expected is None or torch.equal(result, expected), name
            continue
        assert result.shape == expected.shape, name
        dtype = samples[0][0][name].dtype
        assert result.dtype in (dtype, torch.float64), name
        rounding = torch.finfo(result.dtype).eps
        factor = GRADIENT_FACTOR if name.startswith("gradient") else VALUE_FACTOR
        factor += result.dtype == torch.float64  # there the oracle errs as much itself
        # Rounded to nearest, an element errs by at most half the spacing of its binade, which is
        # at most |element| * eps / 2. That holds for each, so in norm it is norm * eps / 2.
        for measure, error_of, one_rounding in (
            ("error", largest_error, rounding * largest_error(expected, 0 * expected)),
            ("norm of errors", norm_of_errors, rounding / 2 * norm_of_errors(expected, 0)),
        ):
            eager_error = max(error_of(eager[name], exact[name]) for eager, exact in samples)
            eager_error *= rounding / torch.finfo(dtype).eps
            allowed = factor * eager_error + one_rounding
            error = error_of(result, expected)
            if not error <= allowed:  # NaN is no pass either
                problems.append(f"{name}: {measure} {error:.3g}, allowed {allowed:.3g}")
    assert not problems, "; ".join(problems)


def assert_stable_statistics(z, mean, var, normalized, correction=1):
    """Hold batch statistics, and what they normalise to, to their condition number.

    A stable algorithm errs by about |mean| / deviation roundings, relatively; the difference of
    mean squares by the square of that many (Chan, Golub and LeVeque, 1983).

    Args:
        z: the values of one channel.
        mean: their mean.
        var: their variance: unbiased, or biased if `correction` is 0.
        normalized: (z - mean) / sqrt(biased variance).
    """
    exact_var, exact_mean = torch.var_mean(z.double(), correction=0)
    exact = (z.double() - exact_mean) / exact_var.sqrt()
    allowed = (exact_mean.abs() / exact_var.sqrt() * torch.finfo(z.dtype).eps).item()
    exact_var = z.double().var(correction=correction)
    assert abs(mean.item() / exact_mean.item() - 1) <= allowed, "mean"
    assert abs(var.item() / exact_var.item() - 1) <= allowed, "variance"
    assert largest_error(normalized, exact) <= allowed * exact.abs().max(), "normalised"


def largest_error(result, expected):
    """The largest |result - expected|: NaN if there is one, 0 for empty tensors."""
    difference = result.double() - expected.double()
    return difference.abs().max().item() if difference.numel() else 0.0


def norm_of_errors(result, expected):
    """The 2-norm of result - expected, NaN if there is one."""
    return torch.linalg.vector_norm(result.double() - expected).item()


def assert_block(case, device, gradients=True):
    """Hold a fused block's output, gradients and running statistics to the rule.

    Args:
        case: a `cases.Case`.
        device: where the kernels run.
        gradients: whether any are wanted; without them the block runs as for inference.

    Returns:
        The output.
    """
    tensors = case.tensors(device)
    dy = upstream_gradient(case, tensors) if gradients else None
    ours = evaluate(case.fused, case, tensors, dy, case.dtype, case.autocast)
    oracle = evaluate(exact_block, case, _exact(case, tensors), dy, torch.float64)
    samples = [_sample(case, tensors, dy)]
    for _ in range(DRAWS - 1):
        others = case.tensors(device)
        dy = upstream_gradient(case, others) if gradients else None
        samples.append(_sample(case, others, dy))
    assert_close(ours, oracle, samples)
    return ours["output"]


def evaluate(operation, case, tensors, dy=None, dtype=None, autocast=False, frozen=()):
    """Output, gradients and running statistics of a block, by name; what is absent is None.

    Args:
        operation: a function with the arguments of `case.fused`.
        case: a `cases.Case`.
        tensors: the operation's tensor arguments, by name. They do not change.
        dy: the gradient of the output, or None if no gradients are wanted.
        dtype: to convert dy to.
        autocast: whether to run under autocast to the case's dtype.
        frozen: names of tensors that need no gradient.
    """
    tensors = {n: t if t is None else t.detach() for n, t in tensors.items()}
    tensors |= {n: tensors[n].clone() for n in STATISTICS if tensors[n] is not None}
    leaves = {
        name: t.requires_grad_()
        for name, t in tensors.items()
        if t is not None and name not in (*STATISTICS, *frozen)
    }
    x, weight, bias = (tensors[name] for name in CONVOLVED)
    vectors = {name: tensors[name] for name in VECTORS}
    context = torch.autocast(x.device.type, case.dtype, enabled=autocast)
    with context, torch.set_grad_enabled(dy is not None):
        y = operation(x, weight, bias, *case.arguments, **vectors, **case.options)
    results = {"output": y.detach(), **{name: tensors[name] for name in STATISTICS}}
    if dy is None:
        return results
    gradients = torch.autograd.grad(y, list(leaves.values()), dy.to(dtype))
    return results | {f"gradient of {n}": g for n, g in zip(leaves, gradients, strict=True)}


def exact_block(
    x, weight, bias, stride, padding, output_padding=None, *, norm, norm_weight, norm_bias,
    running_mean, running_var, training, momentum, eps, activation, negative_slope,
    statistics_groups,
):  # fmt: skip
    """Both blocks by their formulas. In float64, `F.batch_norm` would be less exact than this."""
    if statistics_groups > 1:
        # By definition: one group after another, as if each were a batch.
        settings = {name: value for name, value in locals().items() if name != "x"}
        settings["statistics_groups"] = 1
        return torch.cat([exact_block(part, **settings) for part in x.chunk(statistics_groups)])
    if output_padding is None:
        u = F.conv2d(x, weight, bias, stride, padding)
    else:
        u = F.conv_transpose2d(x, weight, bias, stride, padding, output_padding)
    if norm:
        mean, var = running_mean, running_var
        if training or mean is None:
            var, mean = torch.var_mean(u, (0, 2, 3), correction=0)
        if training and running_mean is not None:
            unbiased = torch.var(u.detach(), (0, 2, 3), correction=1)
            running_mean += momentum * (mean.detach() - running_mean)
            running_var += momentum * (unbiased - running_var)
        mean, rstd = mean[:, None, None], (var[:, None, None] + eps).rsqrt()
        u = (u - mean) * rstd
        if norm_weight is not None:
            u = u * norm_weight[:, None, None]
        if norm_bias is not None:
            u = u + norm_bias[:, None, None]
    slopes = {"relu": 0.0, "leaky_relu": negative_slope, "identity": 1.0}
    if activation in slopes:
        return torch.where(u > 0, u, slopes[activation] * u)
    return {"tanh": torch.tanh, "sigmoid": torch.sigmoid}[activation](u)


def upstream_gradient(case, tensors):
    """A gradient for the output, 0 next to the bend of an activation, in the layout of the case."""
    linear = replace(case, activation="identity")
    eager, exact = (result["output"] for result in _sample(linear, tensors))
    clear = exact.abs() > BEND_MARGIN * largest_error(eager, exact)
    assert clear.double().mean() > 0.5, "too few pixels are left to compare gradients at"
    return LAYOUTS[case.dy_layout](torch.randn_like(eager) * clear)


def _sample(case, tensors, dy=None):
    """Eager PyTorch's results in the dtype of the case (float32 for float64) and their oracle's."""
    narrow = {
        name: t.float() if t is not None and t.dtype == torch.float64 else t
        for name, t in tensors.items()
    }
    dtype = torch.float32 if case.dtype == torch.float64 else case.dtype
    eager = evaluate(case.plain, case, narrow, dy, dtype, case.autocast)
    return eager, evaluate(exact_block, case, _exact(case, narrow), dy, torch.float64)


def _exact(case, tensors):
    """The tensors as the operation sees them, autocast's rounding included, in float64."""
    seen = dict(tensors)
    if case.autocast:
        seen |= {n: tensors[n].to(case.dtype) for n in CONVOLVED if tensors[n] is not None}
    return {name: t if t is None else t.double() for name, t in seen.items()}


def assert_standard_normal(draws):
    """Hold many draws to N(0, 1), independent of each other at every distance.

    The bounds are `SIGMAS` standard deviations of each figure for true normal draws; the largest of
    so many correlations may be two more.
    """
    x = draws.double().flatten()
    n = x.numel()
    figures = {
        "mean": (x.mean(), 0, 1),
        "variance": (x.square().mean(), 1, 2),
        "skewness": (x.pow(3).mean(), 0, 15),
        "kurtosis": (x.pow(4).mean(), 3, 96),
        "beyond two deviations": ((x.abs() > 2).double().mean(), 0.0455003, 0.0434),
    }
    for name, (found, expected, variance) in figures.items():
        assert abs(found.item() - expected) <= SIGMAS * (variance / n) ** 0.5, name
    for name, values in (("values", x), ("squares", (x.square() - 1) / 2**0.5)):
        spectrum = torch.fft.rfft(values).abs().square()
        correlation = torch.fft.irfft(spectrum, n=n)[1:] / n
        assert correlation.abs().max() <= (SIGMAS + 2) * n**-0.5, f"correlation of {name}"


def assert_module(ours, stock, x):
    """Run both modules forward and backward, and hold ours to the rule; both modules' state moves.

    Compares the output, the gradients of the input and of every parameter, and every buffer.

    Args:
        ours: the module under test.
        stock: a module of PyTorch's layers with the same parameters, in the same state.
        x: the input.
    """
    dy = torch.randn_like(copy.deepcopy(stock)(x))
    exact = copy.deepcopy(stock).double()
    samples = []
    for _ in range(DRAWS):
        other = torch.randn_like(x)
        twins = copy.deepcopy(stock), copy.deepcopy(exact)
        samples.append([_run_module(module, other, dy) for module in twins])
    results, expected, eager = (_run_module(module, x, dy) for module in (ours, exact, stock))
    assert_close(results, expected, [(eager, expected), *samples])


def _run_module(module, x, dy):
    dtype = next(module.parameters()).dtype
    x = x.detach().to(dtype, copy=True).requires_grad_()
    module.zero_grad()
    y = module(x)
    y.backward(dy.to(dtype))
    gradients = {f"gradient of {name}": p.grad for name, p in module.named_parameters()}
    return {
        "output": y.detach(),
        "gradient of x": x.grad,
        **gradients,
        **dict(module.named_buffers()),
    }


def assert_same_losses(ours, stock):
    """Hold the losses of two trainings, a list for every step, to be the same but for rounding."""
    drift = (torch.tensor(ours) / torch.tensor(stock) - 1).abs().amax(1)
    assert drift.max() <= LOSS_DRIFT, f"{drift.max():.2g} at step {drift.argmax()}"
