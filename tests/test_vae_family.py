"""Likelihoods, beta, importance samples, images kept aside: steps beside plain loops, and runs."""

import csv
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracle import LOSS_DRIFT
from torch.distributions import Normal, kl_divergence

from genfast import cli
from genfast.models import VAE, ConvVAE
from genfast.training import VAEStep
from genfast.training.data import Batches
from genfast.training.errors import BadInput
from genfast.training.runs import held_out
from genfast.training.runs.checkpoint import read_checkpoint
from genfast.training.runs.config import check_settings, prepare
from genfast.training.runs.loop import train
from genfast.training.steps import adam

MODELS = {"vae": lambda: VAE(256, 12, 3), "conv-vae": lambda: ConvVAE(1, 16, 3, 4)}
TINY = dict(epochs=3, batch_size=9, nz=3)


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "images.npy"
    np.save(path, np.random.default_rng(0).integers(0, 256, (40, 8, 8), np.uint8))
    return path


def seeded(model):
    torch.manual_seed(0)
    return MODELS[model]()


def batches(count, size=6):
    return torch.rand(count, size, 1, 16, 16, generator=torch.Generator().manual_seed(3))


def plain_loop(model, images, likelihood, betas, samples):
    """(loss, reconstruction, kl) of each step, in nats an image; betas: of each step."""
    optimizer = adam(model)
    torch.manual_seed(1)
    found = []
    for x, beta in zip(images, betas, strict=False):
        optimizer.zero_grad()
        mu, logvar = (t[:, None] for t in model.encode(x))
        eps = torch.randn(len(x), samples or 1, 3)
        posterior, prior = Normal(mu, torch.exp(0.5 * logvar)), Normal(0.0, 1.0)
        z = mu + torch.exp(0.5 * logvar) * eps
        made = model.decode(z.flatten(0, 1)).reshape(*z.shape[:2], -1)
        wanted = x.reshape(len(x), 1, -1).expand_as(made)
        if likelihood == "gaussian":
            constant = 0.5 * math.log(2 * math.pi)
            reconstruction = -(Normal(made, 1.0).log_prob(wanted) + constant).sum(2)
        else:
            reconstruction = F.binary_cross_entropy(made, wanted, reduction="none").sum(2)
        if samples is None:
            kl = kl_divergence(posterior, prior).sum(2)
            loss = (reconstruction + beta * kl).sum()
        else:
            kl = (posterior.log_prob(z) - prior.log_prob(z)).sum(2)
            weights = torch.softmax(-(reconstruction + kl), 1).detach()
            # The gradient of the bound is that of the weighted mean (Burda et al., equation 14).
            (weights * (reconstruction + kl)).sum().backward()
            loss = -torch.exp(-(reconstruction + kl).double()).mean(1).log().sum().float()
        if samples is None:
            loss.backward()
        optimizer.step()
        parts = loss, reconstruction.mean(1).sum(), kl.mean(1).sum()
        found.append(torch.stack(parts).detach() / len(x))
    return torch.stack(found)


def steps(step, images):
    torch.manual_seed(1)
    return torch.stack([torch.stack(tuple(step(x))) for x in images])


@pytest.mark.parametrize(
    ("model", "options", "betas"),
    [
        ("conv-vae", dict(likelihood="gaussian"), [1.0]),
        ("conv-vae", dict(beta=4.0, beta_warmup=8), [0.5 * i for i in range(1, 9)] + [4.0]),
        ("vae", dict(likelihood="bernoulli", beta=0.5), [0.5]),
        ("vae", dict(importance_samples=1), [1.0]),
        ("vae", dict(importance_samples=5, likelihood="gaussian"), [1.0]),
        ("conv-vae", dict(importance_samples=3), [1.0]),
    ],
    ids=str,
)
def test_a_step_is_that_of_a_plain_loop(model, options, betas):
    images = batches(20)
    betas = itertools.chain(betas, itertools.repeat(betas[-1]))
    likelihood = options.get("likelihood", "bernoulli")
    samples = options.get("importance_samples")
    expected = plain_loop(seeded(model), images, likelihood, betas, samples)
    ours = steps(VAEStep(seeded(model), precision="fp32", **options), images)
    torch.testing.assert_close(ours, expected, rtol=LOSS_DRIFT, atol=LOSS_DRIFT)
    assert not torch.equal(ours[0], ours[-1])


@pytest.mark.kernels
def test_importance_samples_on_the_kernels(device):
    """With a decoder that is deaf to the latent, as the kernels draw other noise than PyTorch."""
    model = seeded("vae").to(device)
    with torch.no_grad():
        model.fc3.weight.zero_()
    step = VAEStep(model, precision="fp32", importance_samples=3, capture=False)
    x = batches(1, 2)[0].to(device)
    with torch.no_grad():
        made = model.decode(torch.zeros(2, 3, device=device))
    result = step(x)
    wanted = F.binary_cross_entropy(made, x.flatten(1), reduction="sum") / 2
    torch.testing.assert_close(result.reconstruction, wanted, rtol=1e-4, atol=0)
    assert result.loss <= result.reconstruction + result.kl
    assert model.fc21.weight.grad is None or model.fc21.weight.grad.isfinite().all()


@pytest.mark.parametrize(
    "options", [dict(beta=2.0, beta_warmup=3), dict(importance_samples=2)], ids=str
)
def test_a_captured_step(options, capture_anyway):
    results = []
    for captured in (False, True):
        if captured:
            capture_anyway()
        step = VAEStep(seeded("vae"), precision="fp32", **options)
        results.append(steps(step, batches(5)))
    assert torch.equal(*results)
    if "beta" in options:
        assert step.state_dict()["modules"]["kl_weight"]["steps"] == 5


def test_a_compiled_step_of_several_samples(monkeypatch):
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: compiled(function, backend="eager"))
    ours, expected = (
        steps(VAEStep(seeded("vae"), precision="fp32", compile=c, importance_samples=2), batches(3))
        for c in (True, False)
    )
    torch.testing.assert_close(ours, expected)


def test_the_bound_of_other_images():
    step = VAEStep(seeded("conv-vae"), precision="fp32", beta=3.0)
    x, others = batches(2)
    steps(step, [x])
    step.model.encoder[0].eval()  # Somebody's choice, which stays.
    before = {k: v.clone() for k, v in step.model.state_dict().items()}
    torch.manual_seed(5)
    result = step.evaluate(others)
    assert step.model.training and not step.model.encoder[0].training
    assert all(torch.equal(v, before[k]) for k, v in step.model.state_dict().items())
    step.model.eval()
    with torch.no_grad():
        mu, logvar = step.model.encode(others)
        torch.manual_seed(5)
        made = step.model.decode(mu + torch.exp(0.5 * logvar) * torch.randn_like(mu))
    reconstruction = F.binary_cross_entropy(made, others, reduction="sum") / len(others)
    kl = kl_divergence(Normal(mu, torch.exp(0.5 * logvar)), Normal(0.0, 1.0)).sum() / len(others)
    torch.testing.assert_close(
        torch.stack(tuple(result)), torch.stack([reconstruction + kl, reconstruction, kl])
    )
    tight, loose = (step.evaluate(others, k).loss for k in (64, 1))
    assert tight < loose
    assert tuple(step.evaluate((others * 255).round().byte())) != ()
    with pytest.raises(ValueError, match="importance_samples to be a whole number from 1, or None"):
        step.evaluate(others, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(beta=-1), "expected beta to be a number from 0, got -1"),
        (dict(beta=True), "expected beta to be a number from 0, got True"),
        (dict(beta_warmup=0), "expected beta_warmup to be a whole number of steps from 1, or None"),
        (dict(importance_samples=0), "expected importance_samples to be a whole number from 1"),
        (dict(importance_samples=2, beta=2), "expected beta=1 without a warm-up for importance_sa"),
        (dict(importance_samples=2, beta_warmup=2), "expected beta=1 without a warm-up for impor"),
        (dict(importance_samples=2, adapter=print), "importance_samples, got an adapter"),
    ],
    ids=str,
)
def test_what_does_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        VAEStep(seeded("vae"), **options)


def test_images_kept_aside():
    trained, kept = held_out.split(50, 0.3, seed=4)
    assert len(trained) == held_out.num_training(50, 0.3) == 35
    assert sorted([*trained.tolist(), *kept.tolist()]) == list(range(50))
    again, other = (held_out.split(50, 0.3, seed)[1] for seed in (4, 5))
    assert torch.equal(kept, again) and not torch.equal(kept, other)
    assert held_out.split(50, None, 4) == (None, None) and held_out.num_training(50, None) == 50
    assert held_out.num_training(2, 0.01) == 1  # One is kept at least.
    images = torch.arange(50, dtype=torch.uint8)[:, None, None, None]
    stream = Batches(images, 5, 4, torch.device("cpu"), trained).stream()
    epochs = [[int(v) for batch in itertools.islice(stream, 7) for v in batch] for _ in range(2)]
    assert [sorted(e) for e in epochs] == [sorted(trained.tolist())] * 2 and epochs[0] != epochs[1]


def test_a_run_with_images_kept_aside_and_its_resume(data, tmp_path, capsys):
    config, images = prepare("vae", data, TINY | dict(validate=0.3, beta=2.0, beta_warmup=2))
    train(config, images, tmp_path / "whole", device="cpu")
    assert "IWAE bound of 64 samples" in capsys.readouterr().err
    train(config, images, tmp_path / "parts", device="cpu", max_seconds=0)
    # As if it had been killed after a row that no checkpoint knows of.
    with open(tmp_path / "parts" / "validation.csv", "a") as file:
        file.write("6,2,-1.0,1.0,0.0,\n7,")
    stopped = tmp_path / "parts" / "checkpoint.pt"
    assert read_checkpoint(stopped)["modules"]["kl_weight"]["steps"] == 1
    train(config, images, tmp_path / "parts", device="cpu", resume_from=stopped)
    whole, parts = (
        read_checkpoint(tmp_path / run / "checkpoint.pt")["modules"] for run in ("whole", "parts")
    )
    assert all(torch.equal(v, parts["model"][k]) for k, v in whole["model"].items())
    assert whole["kl_weight"]["steps"] == parts["kl_weight"]["steps"] == 9
    rows, same = (
        list(csv.DictReader((tmp_path / run / "validation.csv").read_text().splitlines()))
        for run in ("whole", "parts")
    )
    assert rows == same
    assert [(r["step"], r["epoch"], r["iwae_64"] != "") for r in rows] == [
        ("3", "1", False), ("6", "2", False), ("9", "3", True),
    ]  # fmt: skip
    for row in rows:
        parts = float(row["reconstruction"]) + float(row["kl"])
        assert float(row["elbo"]) == pytest.approx(-parts, abs=1e-3)
    assert float(rows[-1]["iwae_64"]) > float(rows[-1]["elbo"])

    # To measure draws no random number that training would.
    blind = tmp_path / "blind"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(held_out.HeldOut, "measure", lambda *args, **options: "")
        train(config, images, blind, device="cpu")
    unmeasured = read_checkpoint(blind / "checkpoint.pt")["modules"]["model"]
    assert all(torch.equal(v, unmeasured[k]) for k, v in whole["model"].items())


def test_a_file_that_no_run_left_stays(data, tmp_path):
    config, images = prepare("vae", data, TINY | dict(validate=0.3))
    other = tmp_path / "validation.csv"
    other.write_text("mine\n")
    with pytest.raises(BadInput, match="validation.csv to be what a genfast run measured, got som"):
        train(config, images, tmp_path, device="cpu")
    assert other.read_text() == "mine\n"


def test_a_compiled_run(data, tmp_path, monkeypatch, capsys):
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: compiled(function, backend="eager"))
    out, picture = tmp_path / "run", tmp_path / "a.png"
    given = ("--epochs", "2", "--batch-size", "20", "--nz", "3")
    command = ["train", "vae", "--data", str(data), "--compile", "--beta-warmup", "1", *given]
    command += ["--out", str(out)]
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert cli.main(command) == 1
    assert "expected a C++ compiler for --compile on a CPU, found no no-" in capsys.readouterr().err
    monkeypatch.delenv("CXX")
    assert cli.main(command) == 0
    # Where there is none, there are still pictures.
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert cli.main(["sample", str(out), "--num", "1", "--out", str(picture)]) == 0


@pytest.mark.parametrize(
    ("model", "given", "message"),
    [
        ("vae", dict(importance_samples=5, beta=2), "--importance-samples with --beta 1 and with"),
        ("conv-vae", dict(importance_samples=5, beta_warmup=2), "got --beta 1 and --beta-warmup 2"),
        ("dcgan", dict(validate=0.1), "expected settings that dcgan has, got --validate"),
        ("vae", dict(validate=1.0), "expected --validate to be a number above 0 and below 1"),
        ("vae", dict(likelihood="normal"), "expected --likelihood to be bernoulli or gaussian"),
    ],
)
def test_settings_that_do_not_fit(model, given, message):
    with pytest.raises(BadInput, match=message):
        check_settings(model, given)


def test_too_few_images_to_keep_any(tmp_path):
    np.save(tmp_path / "one.npy", np.zeros((1, 8, 8), np.uint8))
    with pytest.raises(BadInput, match="images to train on beside those of --validate 0.1, got 1"):
        prepare("vae", tmp_path / "one.npy", dict(validate=0.1))
