"""Reparameterised sampling: the noise, z, the KL divergence and their gradients."""

import pytest
import torch
from oracle import assert_close, assert_standard_normal
from torch.distributions import Normal, kl_divergence

from genfast import reference, use_backend
from genfast.functional import reparameterize, reparameterize_with_kl
from genfast.launch import passes
from genfast.nn import GaussianSampler

pytestmark = pytest.mark.kernels

SHAPES = [(5, 7), (1, 1), (300, 3), (6, 1), (2, 1037), (3, 2, 5, 2), (9,), (4, 64)]
both = pytest.mark.parametrize("sampling", [reparameterize, reparameterize_with_kl])


def z_of(result):
    return result[0] if isinstance(result, tuple) else result


def noise(sampling, shape, device, seed=0):
    """The noise that sampling draws for a shape: z where mu and logvar are 0."""
    zeros = torch.zeros(shape, device=device)
    torch.manual_seed(seed)
    return z_of(sampling(zeros, zeros))


def latents(shape, dtype, device):
    """mu and logvar with gradients."""
    return [torch.randn(shape).to(device, dtype).requires_grad_() for _ in range(2)]


def test_noise_is_standard_normal(device):
    # Rows of a length that the tiles do not divide: noise that repeats anywhere would correlate.
    assert_standard_normal(noise(reparameterize, (500, 1000), device))


@both
def test_seed_decides_the_noise(sampling, device):
    shape = (5, 7)
    first = noise(sampling, shape, device)
    assert torch.equal(first, noise(sampling, shape, device))
    assert not torch.isclose(first, noise(sampling, shape, device, seed=1)).any()
    zeros = torch.zeros(shape, device=device)
    assert not torch.isclose(first, z_of(sampling(zeros, zeros))).any()


@both
def test_generator(sampling, device):
    zeros = torch.zeros(5, 7, device=device)
    generator = torch.Generator(device).manual_seed(7)
    torch.manual_seed(0)
    first, second = (z_of(sampling(zeros, zeros, generator=generator)) for _ in range(2))
    assert not torch.isclose(first, second).any()
    generator.manual_seed(7)
    assert torch.equal(first, z_of(sampling(zeros, zeros, generator=generator)))
    # The default generator has not moved.
    assert torch.equal(z_of(sampling(zeros, zeros)), noise(sampling, (5, 7), device))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kl_does_not_change_the_noise(shape, device):
    assert torch.equal(
        noise(reparameterize, shape, device), noise(reparameterize_with_kl, shape, device)
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_sample_kl_and_gradients(shape, dtype, device):
    mu, logvar = latents(shape, dtype, device)
    eps = noise(reparameterize_with_kl, shape, device)
    dz, dkl = torch.randn_like(mu), torch.randn(shape[0], device=device)

    def results(z, kl, mu, logvar, dz, dkl):
        gradients = torch.autograd.grad((z, kl), (mu, logvar), (dz, dkl))
        names = "z", "kl", "gradient of mu", "gradient of logvar"
        return dict(zip(names, (z.detach(), kl.detach(), *gradients), strict=True))

    def closed_form(dtype, wide):
        m, v = mu.detach().to(dtype).requires_grad_(), logvar.detach().to(dtype).requires_grad_()
        z = m + torch.exp(0.5 * v) * eps.to(dtype)
        prior, posterior = Normal(0.0, 1.0), Normal(m.to(wide), torch.exp(0.5 * v.to(wide)))
        kl = kl_divergence(posterior, prior).reshape(shape[0], -1).sum(1)
        return results(z, kl, m, v, dz.to(dtype), dkl.to(wide))

    torch.manual_seed(0)
    ours = results(*reparameterize_with_kl(mu, logvar), mu, logvar, dz, dkl)
    assert ours["kl"].dtype == torch.float32
    exact = closed_form(torch.float64, torch.float64)
    assert_close(ours, exact, [(closed_form(dtype, torch.float32), exact)])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradient_uses_the_noise_of_forward(shape, device):
    mu, logvar = latents(shape, torch.float32, device)
    z = reparameterize(mu, logvar)
    dmu, dlogvar = torch.autograd.grad(z, (mu, logvar), torch.ones_like(z))
    assert torch.equal(dmu, torch.ones_like(z))
    # dz/dlogvar = eps exp(logvar / 2) / 2 = (z - mu) / 2.
    torch.testing.assert_close(dlogvar, (z - mu).detach() / 2)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_kl_near_the_prior_keeps_its_digits(backend, device):
    mu, logvar = 1e-4 * torch.randn(2, 4, 20, dtype=torch.float64, device=device)
    with use_backend(backend):
        kl = reparameterize_with_kl(mu.float(), logvar.float())[1]
    exact = reference.kl_divergence(mu.float().double(), logvar.float().double())
    # In float32, exp(logvar) - 1 - logvar as written would be wrong by more than its value. What is
    # left here is the rounding of expm1(logvar) - logvar, 3e-4.
    torch.testing.assert_close(kl.double(), exact, rtol=1e-3, atol=0)


@pytest.mark.parametrize("used", [0, 1], ids=["z", "kl"])
def test_gradient_of_one_result_alone(used, device):
    mu, logvar = latents((3, 5), torch.float32, device)
    torch.manual_seed(0)
    result = reparameterize_with_kl(mu, logvar)[used]
    ours = torch.autograd.grad(result.sum(), (mu, logvar))
    eps = noise(reparameterize_with_kl, (3, 5), device)
    plain = (reference.reparameterize(mu, logvar, eps), reference.kl_divergence(mu, logvar))[used]
    for gradient, expected in zip(
        ours, torch.autograd.grad(plain.sum(), (mu, logvar)), strict=True
    ):
        torch.testing.assert_close(gradient, expected)


def test_halves_of_one_tensor(device):
    # What an encoder with one head gives: neither half is contiguous.
    mu, logvar = torch.randn(5, 14, device=device).chunk(2, dim=1)
    torch.manual_seed(0)
    z, kl = reparameterize_with_kl(mu, logvar)
    torch.manual_seed(0)
    dense_z, dense_kl = reparameterize_with_kl(mu.contiguous(), logvar.contiguous())
    assert torch.equal(z, dense_z)
    assert torch.equal(kl, dense_kl)


def test_few_programs_share_long_rows(device, monkeypatch):
    mu, logvar = latents((3, 4100), torch.float32, device)
    torch.manual_seed(0)
    z, kl = reparameterize_with_kl(mu, logvar)
    monkeypatch.setattr(passes, "programs", lambda tensor, each: 1)
    torch.manual_seed(0)
    same_z, same_kl = reparameterize_with_kl(mu, logvar)
    assert torch.equal(z, same_z)
    torch.testing.assert_close(kl, same_kl)


def test_sampler_is_the_function(device):
    mu, logvar = torch.randn(2, 3, 5, device=device)
    torch.manual_seed(0)
    z = GaussianSampler()(mu, logvar)
    torch.manual_seed(0)
    assert torch.equal(z, reparameterize(mu, logvar))
