"""Several samples of a latent an image: the noise, log q - log p of each, their gradients."""

import pytest
import torch
from oracle import DRAWS, assert_close
from torch.autograd import gradcheck, gradgradcheck
from torch.distributions import Normal

from genfast import losses, reference, use_backend
from genfast.functional import importance_samples, reparameterize
from genfast.launch import passes

pytestmark = pytest.mark.kernels

# (N, ...) and the samples: ragged, one alone, more than a tile has, long rows, scalar latents.
CASES = [
    (torch.float32, (3, 5), 7),
    (torch.float32, (1, 6), 130),
    (torch.float32, (2, 1037), 2),
    (torch.float32, (5,), 3),
    (torch.bfloat16, (2, 3, 1, 2), 3),
    (torch.bfloat16, (1, 1), 1),
]


def draws(mu, logvar, samples, seed=0):
    torch.manual_seed(seed)
    return importance_samples(mu, logvar, samples)


def noise(shape, samples, device):
    zeros = torch.zeros(shape, device=device)
    return draws(zeros, zeros, samples)[0]


def results(z, kl, mu, logvar, dz, dkl):
    gradients = torch.autograd.grad((z, kl), (mu, logvar), (dz, dkl))
    names = "z", "kl", "gradient of mu", "gradient of logvar"
    return dict(zip(names, (z.detach(), kl.detach(), *gradients), strict=True))


def by_the_distributions(mu, logvar, eps, dz, dkl, dtype, wide):
    m, v = (t.detach().to(dtype).unsqueeze(1).requires_grad_() for t in (mu, logvar))
    z = m + torch.exp(0.5 * v) * eps.to(dtype)
    posterior = Normal(m.to(wide), torch.exp(0.5 * v.to(wide)))
    of_each = posterior.log_prob(z.to(wide)) - Normal(0.0, 1.0).log_prob(z.to(wide))
    kl = of_each.reshape(*eps.shape[:2], -1).sum(2)
    found = results(z, kl, m, v, dz.to(dtype), dkl.to(wide))
    return {k: g.squeeze(1) if k.startswith("gradient") else g for k, g in found.items()}


@pytest.mark.parametrize(("dtype", "shape", "samples"), CASES, ids=str)
def test_samples_and_gradients(dtype, shape, samples, device):
    def drawn():
        mu, logvar = (torch.randn(shape).to(device, dtype).requires_grad_() for _ in range(2))
        dz = torch.randn(shape[0], samples, *shape[1:]).to(device, dtype)
        return mu, logvar, dz, torch.randn(shape[0], samples, device=device)

    eps = noise(shape, samples, device)
    mu, logvar, dz, dkl = drawn()
    ours = results(*draws(mu, logvar, samples), mu, logvar, dz, dkl)
    assert ours["kl"].dtype == torch.float32
    eager = []
    for i in range(DRAWS):
        given = (mu, logvar, dz, dkl) if i == 0 else drawn()
        given = (*given[:2], eps, *given[2:])
        eager.append(
            (
                by_the_distributions(*given, dtype, torch.float32),
                by_the_distributions(*given, torch.float64, torch.float64),
            )
        )
    assert_close(ours, eager[0][1], eager)


def test_the_noise_is_that_of_single_samples(device):
    drawn = noise((2, 5), 3, device).flatten(0, 1)
    zeros = torch.zeros(6, 5, device=device)
    torch.manual_seed(0)
    assert torch.equal(drawn, reparameterize(zeros, zeros))


def test_parts_of_rows_add_up(device, monkeypatch):
    mu, logvar = torch.randn(2, 1, 1100, device=device)
    z, kl = draws(mu, logvar, 2)
    monkeypatch.setattr(passes, "programs", lambda tensor, each: 1)
    same_z, same_kl = draws(mu, logvar, 2)
    assert torch.equal(z, same_z)
    torch.testing.assert_close(kl, same_kl)


def test_channels_last_is_read_in_the_order_of_the_shape(device):
    mu, logvar = torch.randn(2, 2, 3, 2, 2, device=device)
    z, _ = draws(mu, logvar, 2)
    channels_last = (t.to(memory_format=torch.channels_last) for t in (mu, logvar))
    assert torch.equal(draws(*channels_last, 2)[0], z)


@pytest.mark.float64
@pytest.mark.parametrize("check", [gradcheck, gradgradcheck])
def test_gradients_by_differences(check, device):
    mu, logvar = torch.randn(2, 2, 3, dtype=torch.float64, device=device)
    inputs = mu.requires_grad_(), logvar.requires_grad_()
    assert check(lambda *given: draws(*given, 3), inputs, fast_mode=True)


@pytest.mark.parametrize("used", [0, 1], ids=["z", "kl"])
def test_gradient_of_one_result_alone(used, device):
    mu, logvar = (t.requires_grad_() for t in torch.randn(2, 2, 3, device=device))
    result = draws(mu, logvar, 3)[used].sum()
    ours = torch.autograd.grad(result, (mu, logvar), retain_graph=True)
    twice = torch.autograd.grad(result, (mu, logvar), create_graph=True)
    plain = reference.importance_samples(mu, logvar, noise((2, 3), 3, device))[used].sum()
    expected = torch.autograd.grad(plain, (mu, logvar))
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(twice, expected)  # Those that can be differentiated again.


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_near_the_prior_digits_are_kept(backend, device):
    mu, logvar = 1e-4 * torch.randn(2, 4, 20, device=device)
    with use_backend(backend):
        kl = draws(mu, logvar, 5)[1]
        eps = noise((4, 20), 5, device)
    # As written, z^2 - eps^2 - logvar would leave three digits.
    exact = reference.importance_samples(mu.double(), logvar.double(), eps.double())[1]
    scale = exact.abs().max()
    torch.testing.assert_close(kl.double() / scale, exact / scale, rtol=0, atol=1e-5)


def test_what_is_no_number_of_samples(device):
    mu = torch.zeros(2, 3, device=device)
    for samples in (0, 2.0, True, None):
        with pytest.raises(ValueError, match="expected samples to be a whole number from 1, got"):
            importance_samples(mu, mu, samples)


def test_the_bound_of_a_model_whose_likelihood_is_known():
    """x = z + noise, both N(0, 1): log p(x) is that of N(0, 2), and the posterior N(x/2, 1/2)."""
    x = torch.linspace(-2, 2, 5, dtype=torch.float64)
    mu, logvar = (x / 2)[:, None], torch.full((5, 1), 0.5, dtype=torch.float64).log()

    def bound(mu, logvar, samples):
        z, kl = reference.importance_samples(mu, logvar, torch.randn(5, samples, 1, dtype=mu.dtype))
        reconstruction = -Normal(z.squeeze(2), 1.0).log_prob(x[:, None])
        return losses.iwae_loss(reconstruction, kl)

    exact = -Normal(0.0, 2**0.5).log_prob(x).sum().double()
    # By the true posterior every weight is p(x): exact for any number of samples.
    for samples in (1, 5):
        torch.testing.assert_close(bound(mu, logvar, samples), exact)
    # By another it is above, and nearer with more samples.
    loose, tight = (bound(mu + 0.5, logvar, k).item() for k in (1, 2000))
    assert exact + 0.5 < loose and abs(tight - exact) < 0.1
    with pytest.raises(ValueError, match=r"two tensors of one shape \(N, samples\), got shapes"):
        losses.iwae_loss(torch.zeros(3), torch.zeros(3))


@pytest.mark.parametrize("logits", [True, False, None], ids=["logits", "unit", "gaussian"])
def test_the_loss_of_each_reconstruction(logits, device):
    images = torch.rand(3, 1, 2, 2, device=device)
    made = torch.randn(3, 4, 1, 2, 2, device=device)
    made = made if logits else made.sigmoid()
    likelihood = "gaussian" if logits is None else "bernoulli"
    each = losses.each_reconstruction_loss(made, images, likelihood, logits=bool(logits))
    assert each.shape == (3, 4)
    for n in range(3):
        for k in range(4):
            if logits is None:
                one = losses.gaussian_reconstruction_loss(made[n, k, None], images[n, None])
            else:
                one = losses.reconstruction_loss(
                    made[n, k, None], images[n, None], logits=bool(logits)
                )
            torch.testing.assert_close(each[n, k], one)
    with pytest.raises(ValueError, match="as many values as its images"):
        losses.each_reconstruction_loss(made[..., :1], images, likelihood)
