"""The losses of the kernels and of PyTorch, by the rule of `oracle`, and where they are extreme."""

import pytest
import torch
import torch.nn.functional as F
from oracle import DRAWS, assert_close

from genfast import autograd, losses, use_backend
from genfast.launch import first_use
from genfast.launch import losses as launched

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Below, at and beyond a tile of 1024 values, and enough tiles for several programs.
COUNTS = [2, 1022, 1024, 9000]


def results(loss, logits, dloss):
    (gradient,) = torch.autograd.grad(loss, logits, dloss.to(loss.dtype))
    return {"loss": loss.detach(), "gradient of the logits": gradient}


def hold_to_rule(ours, plain, inputs, dtype, device):
    """ours, plain: functions of what `inputs()` gives, tensors of which the first are logits."""
    dloss = torch.tensor(0.7, device=device)

    def evaluate(loss, tensors, as_dtype):
        logits, *others = (t.to(as_dtype) for t in tensors)
        logits.requires_grad_()
        return results(loss(logits, *others), logits, dloss)

    def sample(tensors):
        return evaluate(plain, tensors, dtype), evaluate(plain, tensors, torch.float64)

    tensors = [t.to(dtype) for t in inputs()]
    samples = [sample(tensors)]
    samples += [sample([t.to(dtype) for t in inputs()]) for _ in range(DRAWS - 1)]
    assert_close(evaluate(ours, tensors, dtype), samples[0][1], samples)


def wide(t):
    return t.to(torch.promote_types(t.dtype, torch.float32))


def cross_entropy(logits, targets):
    return F.binary_cross_entropy_with_logits(wide(logits), wide(targets), reduction="sum")


def softplus(x):
    return F.softplus(x, threshold=100)


# By loss: of real images' logits, of generated ones', and the generator's; each is averaged. As the
# papers have them, in PyTorch's operations.
PAPERS = {
    "non-saturating": (lambda x: softplus(-x), softplus, lambda x: softplus(-x)),
    "minimax": (lambda x: softplus(-x), softplus, lambda x: -softplus(x)),
    "lsgan": (
        lambda x: (x - 1) ** 2 / 2, lambda x: x**2 / 2, lambda x: (x - 1) ** 2 / 2,
    ),
    "hinge": (lambda x: F.relu(1 - x), lambda x: F.relu(1 + x), lambda x: -x),
    "wgan": (lambda x: -x, lambda x: x, lambda x: -x),
}  # fmt: skip


def of_paper(loss, name, logits):
    x = wide(logits)
    if loss == "rpgan":
        real, fake = x.chunk(2)
        return softplus(fake - real if name == "discriminator" else real - fake).mean()
    of_real, of_fake, of_generator = PAPERS[loss]
    if name == "discriminator":
        real, fake = x.chunk(2)
        return of_real(real).mean() + of_fake(fake).mean()
    return {"real": of_real, "fake": of_fake, "generator": of_generator}[name](x).mean()


WAYS = [
    (loss, name)
    for loss in losses.GAN_LOSSES
    for name in ("real", "fake", "generator", "discriminator")
    if loss != "rpgan" or name in ("generator", "discriminator")
]


@pytest.mark.one_in(3)
@pytest.mark.kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize(("loss", "name"), WAYS)
def test_gan_losses(loss, name, count, dtype, device):
    ours = getattr(losses.gan_loss(loss), name)
    hold_to_rule(
        ours,
        lambda logits: of_paper(loss, name, logits),
        lambda: [4 * torch.randn(count, device=device)],
        dtype,
        device,
    )


@pytest.mark.kernels
@pytest.mark.float64
@pytest.mark.parametrize(("loss", "name"), WAYS)
def test_gan_losses_differentiated_twice(loss, name, device):
    logits = (3 * torch.randn(6, 1, device=device, dtype=torch.float64)).requires_grad_()
    ours = getattr(losses.gan_loss(loss), name)
    assert torch.autograd.gradcheck(ours, logits)
    assert torch.autograd.gradgradcheck(ours, logits)


@pytest.mark.kernels
@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("loss", losses.GAN_LOSSES)
def test_gan_losses_of_extreme_logits(loss, backend, device):
    x = torch.tensor([-1e30, -1e4, -1.0, 0.0, 1.0, 1e4], device=device)
    if loss == "lsgan":
        x = x.clamp(-1e4, 1e4)  # Whose squares there are.
    x.requires_grad_()
    for name in ("generator", "discriminator"):
        with use_backend(backend):
            found = getattr(losses.gan_loss(loss), name)(x)
        expected = of_paper(loss, name, x.detach().double())
        torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)
        (gradient,) = torch.autograd.grad(found, x)
        assert gradient.isfinite().all()
        with use_backend(backend):
            y = x.detach().clone()
            y[2] = torch.nan
            assert getattr(losses.gan_loss(loss), name)(y).isnan()


def test_images_in_pairs_are_not_judged_alone():
    for name in ("real", "fake"):
        with pytest.raises(ValueError, match="judges them in pairs"):
            getattr(losses.gan_loss("rpgan"), name)(torch.randn(4))
    with pytest.raises(ValueError, match=r"as many generated as real images, got shape \(3, 1\)"):
        losses.gan_loss("rpgan").generator(torch.randn(3, 1))


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 7), (5, 3, 19, 21)], ids=str)
def test_reconstruction_loss(shape, dtype, device):
    def ours(logits, images):
        return losses.reconstruction_loss(logits, images, logits=True)

    def inputs():
        return 4 * torch.randn(shape, device=device), torch.rand(shape, device=device)

    hold_to_rule(ours, cross_entropy, inputs, dtype, device)


@pytest.mark.kernels
def test_tensors_of_any_layout(device):
    logits = torch.randn(4, 3, 5, 6, device=device)
    images = torch.rand(4, 3, 5, 6, device=device)
    dense = losses.reconstruction_loss(logits, images, logits=True)
    channels_last = logits.to(memory_format=torch.channels_last).requires_grad_()
    strided = torch.randn(4, 3, 5, 12, device=device)[..., ::2].copy_(logits)
    expanded = images[:1].expand(4, 3, 5, 6)
    for x in (channels_last, strided):
        torch.testing.assert_close(losses.reconstruction_loss(x, images, logits=True), dense)
    torch.testing.assert_close(
        losses.reconstruction_loss(logits, images.flatten(1), logits=True), dense
    )
    torch.testing.assert_close(
        losses.reconstruction_loss(logits, expanded, logits=True), cross_entropy(logits, expanded)
    )
    every_other = torch.randn(12, device=device)[::2]
    torch.testing.assert_close(losses.real_loss(every_other), F.softplus(-every_other).mean())
    losses.reconstruction_loss(channels_last, images, logits=True).backward()
    assert channels_last.grad.stride() == channels_last.stride()
    torch.testing.assert_close(channels_last.grad, channels_last.detach().sigmoid() - images)


@pytest.mark.kernels
def test_same_bits_whoever_sums(device, monkeypatch):
    logits, images = torch.randn(20000, device=device), torch.rand(20000, device=device)
    alone = losses.reconstruction_loss(logits, images, logits=True)
    assert torch.equal(alone, losses.reconstruction_loss(logits, images, logits=True))
    monkeypatch.setattr(launched, "_LOSS_TILES_ALONE", 100)
    torch.testing.assert_close(losses.reconstruction_loss(logits, images, logits=True), alone)


@pytest.mark.kernels
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_extreme_logits(backend, device):
    x = torch.tensor(
        [-1e4, -100.0, -20.0, 0.0, 20.0, 100.0, 1e4], device=device, requires_grad=True
    )
    exact = {-1e4: 1e4, -100.0: 100.0, -20.0: 20.0, 0.0: 0.6931472, 20.0: 2.0611536e-9}
    with use_backend(backend):
        for value, loss in exact.items():
            logit = torch.tensor([value], device=device, requires_grad=True)
            found = losses.real_loss(logit)
            torch.testing.assert_close(found.item(), loss, rtol=1e-6, atol=0)
            torch.testing.assert_close(losses.fake_loss(-logit).item(), loss, rtol=1e-6, atol=0)
            found.backward()
            gradient = -torch.sigmoid(-logit.detach().double())
            torch.testing.assert_close(logit.grad.double(), gradient, rtol=1e-6, atol=1e-40)
        losses.fake_loss(x).backward()
    assert x.grad.isfinite().all()


@pytest.mark.kernels
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("target", [0.0, 0.5, 1.0])
def test_values_that_are_not_finite(value, target, device):
    logits = torch.tensor([0.3, value], device=device, requires_grad=True)
    targets = torch.tensor([0.5, target], device=device)
    found, expected = [], []
    for backend, into in (("triton", found), ("reference", expected)):
        with use_backend(backend):
            loss = losses.reconstruction_loss(logits, targets, logits=True)
            into += [loss.detach(), torch.autograd.grad(loss, logits)[0]]
            for gan in (losses.real_loss, losses.fake_loss):
                loss = gan(logits)
                into += [loss.detach(), torch.autograd.grad(loss, logits)[0]]
    for ours, theirs in zip(found, expected, strict=True):
        # Of -inf and a label of 1 PyTorch makes NaN, by 0 * inf; the loss is inf.
        unknown = theirs.isnan() & (ours == torch.inf)
        torch.testing.assert_close(ours.where(~unknown, torch.nan), theirs, equal_nan=True)


@pytest.mark.kernels
def test_gradient_of_the_images(device):
    logits, images = torch.randn(2, 3, 5, device=device)
    images = images.sigmoid().requires_grad_()
    loss = losses.reconstruction_loss(logits, images, logits=True)
    torch.testing.assert_close(torch.autograd.grad(loss, images)[0], -logits)


@pytest.mark.parametrize("name", ["real", "fake", "discriminator"])
def test_of_no_image(name):
    assert getattr(losses.gan_loss("non-saturating"), name)(torch.empty(0, 1)).isnan()


def test_bad_input():
    with pytest.raises(ValueError, match=r"as many generated as real images, got shape \(3, 1\)"):
        losses.discriminator_loss(torch.randn(3, 1))
    with pytest.raises(ValueError, match=r"as many values as its images, .*\(2, 5\) and \(2, 6\)"):
        losses.reconstruction_loss(torch.randn(2, 5), torch.rand(2, 6), logits=True)
    meta = torch.rand(2, 5, device="meta")
    with pytest.raises(ValueError, match="on the device of its images, got cpu and meta"):
        losses.reconstruction_loss(torch.randn(2, 5), meta)


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", COUNTS)
def test_the_gradient_for_a_dloss_of_one_is_there_already(count, dtype, device, started):
    logits = (3 * torch.randn(count, device=device)).to(dtype).requires_grad_()
    for loss_of in (losses.fake_loss, losses.discriminator_loss):
        (expected,) = torch.autograd.grad(loss_of(logits), logits)  # PyTorch's own 1.
        assert started.count("logit_loss_backward") == 1
        loss = loss_of(logits) + 0.0
        one = autograd.one(loss)
        (gradient,) = torch.autograd.grad(loss, logits, one, retain_graph=True)
        assert started.count("logit_loss_backward") == 1
        assert torch.equal(gradient, expected)
        # The same memory, of which nobody knows any more what it holds.
        (of_changed,) = torch.autograd.grad(loss, logits, one.mul_(2), retain_graph=True)
        (doubled,) = torch.autograd.grad(loss, logits, torch.full_like(loss, 2))
        assert torch.equal(of_changed, doubled) and not torch.equal(doubled, expected)
        autograd._ones.clear()
        started.clear()
    with torch.no_grad():
        losses.fake_loss(logits)
    assert started == launched_for(count)


def launched_for(count):
    return ["logit_loss"] if count <= 4096 else ["logit_loss", "sum_partials"]


def test_a_one_made_in_a_capture_is_not_kept(monkeypatch):
    """Its memory holds a 1 only after that graph was replayed."""
    loss = torch.zeros(())
    monkeypatch.setattr(autograd, "_ones", {})
    with monkeypatch.context() as capture:
        capture.setattr(first_use, "is_captured", lambda device: True)
        assert autograd.one(loss) == 1 and not autograd._ones
    assert autograd.one(loss) is autograd.one(loss)
