"""First and second derivatives in float64 against finite differences, through the kernels."""

import pytest
import torch
from cases import ACTIVATIONS, Case, Geometry, pairwise
from torch.autograd import gradcheck, gradgradcheck

from genfast import functional, losses

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.float64,
]


def block(transposed, mode, activation):
    return Case(
        transposed,
        Geometry((2, 3), (2, 1), (0, 1), (4, 2), (2, 2)),
        channels=(2, 3),
        batch=2,
        dtype=torch.float64,
        mode=mode,
        activation=activation,
        bias=True,
        tracking=mode == "evaluation",  # a function that is checked has no side effects
    )


ONCE = [
    block(**row)
    for row in pairwise(
        dict(
            transposed=[False, True],
            mode=["training", "evaluation", "plain"],
            activation=ACTIVATIONS,
        )
    )
]
TWICE = [
    block(transposed, mode, activation)
    for mode, activations in (
        ("plain", ("relu", "leaky_relu", "tanh", "sigmoid")),
        ("training", ("leaky_relu", "tanh")),
        ("evaluation", ("relu", "sigmoid")),
    )
    for transposed, activation in zip((False, True, False, True), activations, strict=False)
]


def block_and_inputs(case, device):
    """The block as a function of the tensors that have gradients, and these."""
    tensors = case.tensors(device)
    constants = {name: tensors[name] for name in ("running_mean", "running_var")}
    inputs = [
        t.requires_grad_() for n, t in tensors.items() if t is not None and n not in constants
    ]

    def operation(x, weight, bias, norm_weight=None, norm_bias=None):
        vectors = dict(norm_weight=norm_weight, norm_bias=norm_bias, **constants)
        return case.fused(x, weight, bias, *case.arguments, **vectors, **case.options)

    return operation, inputs


@pytest.mark.one_in(2)
@pytest.mark.parametrize("case", ONCE, ids=str)
def test_block(case, device):
    assert gradcheck(*block_and_inputs(case, device), fast_mode=True)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("case", TWICE, ids=str)
def test_block_twice(case, device):
    # A gradient that nobody gave is looked at above.
    inputs = block_and_inputs(case, device)
    assert gradgradcheck(*inputs, fast_mode=True, check_undefined_grad=False)


@pytest.mark.parametrize("mode", ["training", "evaluation", "plain"])
def test_weight_computed_from_the_input(mode, device):
    # A gradient that has a graph must not take the way through the weight twice.
    case = Case(False, Geometry(2, 1, 0, (3, 3), (2, 2)), (2, 3), 2, torch.float64, mode)
    operation, (x, weight, *vectors) = block_and_inputs(case, device)
    y = operation(x, weight * (1 + x.mean()), None, *vectors).square().sum()
    (plain,) = torch.autograd.grad(y, x, retain_graph=True)
    (with_graph,) = torch.autograd.grad(y, x, create_graph=True)
    torch.testing.assert_close(with_graph, plain)


@pytest.mark.parametrize("transposed", [False, True])
def test_gradient_penalty_reaches_the_weights(transposed, device):
    # WGAN-GP and R1 differentiate the norm of the gradient of the input.
    case = Case(transposed, Geometry(4, 2, 1, (4, 4), (2, 2)), dtype=torch.float64, mode="plain")
    tensors = case.tensors(device)
    x, weight = tensors["x"].requires_grad_(), tensors["weight"].requires_grad_()
    penalties = []
    for operation in (case.fused, case.plain):
        y = operation(x, weight, None, *case.arguments, **_no_vectors(), **case.options)
        (dx,) = torch.autograd.grad(y.tanh().sum(), x, create_graph=True)
        penalties.append(torch.autograd.grad(dx.square().sum(), weight)[0])
    torch.testing.assert_close(*penalties)


def _no_vectors():
    return dict.fromkeys(("norm_weight", "norm_bias", "running_mean", "running_var"))


def seeded(sampling):
    """Sampling as a function: the same noise each time."""

    def sample(mu, logvar):
        torch.manual_seed(0)
        return sampling(mu, logvar)

    return sample


@pytest.mark.parametrize("shape", [(3, 5), (2, 1), (2, 3, 2)])
@pytest.mark.parametrize("check", [gradcheck, gradgradcheck])
@pytest.mark.parametrize("sampling", [functional.reparameterize, functional.reparameterize_with_kl])
def test_sampling(sampling, check, shape, device):
    mu, logvar = torch.randn(2, *shape, dtype=torch.float64, device=device)
    assert check(seeded(sampling), (mu.requires_grad_(), logvar.requires_grad_()), fast_mode=True)


def test_kl_alone(device):
    mu, logvar = torch.randn(2, 3, 5, dtype=torch.float64, device=device)
    inputs = mu.requires_grad_(), logvar.requires_grad_()

    def kl(mu, logvar):
        return functional.reparameterize_with_kl(mu, logvar)[1]

    assert gradcheck(seeded(kl), inputs, fast_mode=True)
    assert gradgradcheck(seeded(kl), inputs, fast_mode=True)


@pytest.mark.parametrize("check", [gradcheck, gradgradcheck])
def test_losses(check, device):
    logits, images = torch.randn(2, 4, 3, dtype=torch.float64, device=device)
    images = images.sigmoid()
    logits.requires_grad_()
    assert check(losses.discriminator_loss, (logits,))
    assert check(losses.real_loss, (logits,))
    assert check(lambda x: losses.reconstruction_loss(x, images, logits=True), (logits,))
