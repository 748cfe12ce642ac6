"""The average of a generator: its formula, what draws from it, and that a run goes on with it."""

import copy
import threading
from contextlib import nullcontext

import pytest
import torch

from genfast.cli import main
from genfast.models import DCGANDiscriminator, DCGANGenerator
from genfast.training import GANStep
from genfast.training.errors import BadInput
from genfast.training.runs.checkpoint import read_checkpoint
from genfast.training.runs.config import Config, prepare, prepare_resumed
from genfast.training.runs.loop import train
from genfast.training.runs.samples import sample_checkpoint

TINY = dict(epochs=2, batch_size=900, nz=4, ngf=4, ndf=4, image_size=16)


def networks():
    torch.manual_seed(0)
    return DCGANGenerator(8, 8, 1, 16), DCGANDiscriminator(1, 8, 16)


def images():
    return 2 * torch.rand(4, 1, 16, 16) - 1


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("captured", [False, True])
def test_it_is_the_moving_average(precision, captured, capture_anyway):
    if captured:
        capture_anyway()
    generator, discriminator = networks()
    step = GANStep(generator, discriminator, ema=0.75, precision=precision)
    expected = copy.deepcopy(generator.state_dict())
    for _ in range(4):
        step(images())
        for name, value in generator.state_dict().items():
            if value.is_floating_point():
                expected[name] = 0.75 * expected[name] + 0.25 * value
            else:
                expected[name] = value.clone()
    ours = step.average.module.state_dict()
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value)
        assert ours[name].dtype == generator.state_dict()[name].dtype
    assert not torch.equal(ours["main.0.weight"], generator.state_dict()["main.0.weight"])


def test_the_training_is_that_without_an_average():
    results = []
    for ema in (None, 0.9):
        step = GANStep(*networks(), ema=ema, precision="fp32")
        torch.manual_seed(1)
        results.append([t.item() for _ in range(3) for t in step(images())])
    assert results[0] == results[1]


def test_a_decay_of_zero_is_the_generator():
    step = GANStep(*networks(), ema=0, precision="fp32")
    step(images())
    for ours, theirs in zip(
        step.average.module.state_dict().values(), step.generator.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_who_draws():
    step = GANStep(*networks(), ema=0.999, precision="fp32")
    for _ in range(3):
        step(images())
    z = torch.randn(2, 8, 1, 1)
    step.generator.eval()
    newest = step.generator(z).detach()
    averaged = step.average.module.eval()(z)
    assert torch.equal(step.sample(z), averaged) and not torch.equal(newest, averaged)
    step.average = None
    assert torch.equal(step.sample(z), newest)
    step(images())  # And it goes on being kept.
    assert step.state_dict()["modules"].keys() == {"generator", "discriminator", "average"}


@pytest.mark.parametrize("ema", [1, -0.1, "0.9", float("nan")])
def test_a_decay_that_is_none(ema):
    with pytest.raises(ValueError, match="expected ema to be a number from 0 to below 1, got"):
        GANStep(*networks(), ema=ema)


def test_a_generator_that_cannot_be_copied():
    generator, discriminator = networks()
    generator.lock = threading.Lock()
    with pytest.raises(ValueError, match=r"can be copied for its average, but cannot pickle"):
        GANStep(generator, discriminator, ema=0.9)
    GANStep(generator, discriminator)


def test_a_run_and_its_resume(tmp_path):
    config, digits = prepare("dcgan", "digits", TINY | dict(ema=0.9))
    train(config, digits, tmp_path / "whole", device="cpu")
    train(config, digits, tmp_path / "parts", device="cpu", max_seconds=0)
    stopped = tmp_path / "parts" / "checkpoint.pt"
    train(config, digits, tmp_path / "parts", device="cpu", resume_from=stopped)
    whole, parts = (
        read_checkpoint(tmp_path / run / "checkpoint.pt")["modules"] for run in ("whole", "parts")
    )
    assert whole.keys() == {"generator", "discriminator", "average"}
    for name, module in whole.items():
        assert all(torch.equal(value, parts[name][key]) for key, value in module.items())

    pictures = []
    for options in ([], ["--no-ema"]):
        out = tmp_path / "samples.png"
        command = ["sample", str(tmp_path / "whole"), "--num", "4", "--out", str(out)]
        assert main([*command, "--device", "cpu", *options]) == 0
        pictures.append(out.read_bytes())
    assert pictures[0] != pictures[1]
    sample_checkpoint(stopped, 4, out, device="cpu", ema=False)
    assert out.read_bytes() == pictures[1]


def test_runs_that_keep_none(tmp_path, capsys):
    config, digits = prepare("gan", "digits", dict(epochs=1, batch_size=900, nz=4, image_size=8))
    train(config, digits, tmp_path / "run", device="cpu")
    path = tmp_path / "run" / "checkpoint.pt"
    sample_checkpoint(path, 4, tmp_path / "a.png", device="cpu")
    sample_checkpoint(path, 4, tmp_path / "b.png", device="cpu", ema=False)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    with pytest.raises(BadInput, match="expected no --ema, without which the run in .* began"):
        prepare_resumed("gan", None, dict(ema=0.9), path)
    # One of before there was a choice.
    content = read_checkpoint(path)
    settings = {k: v for k, v in content["config"].items() if k not in ("ema", "loss")}
    old = Config.of_checkpoint({"config": settings}, path)
    assert (old.loss, old.ema) == ("non-saturating", None)
    for model, value in (("vae", "0.9"), ("gan", "1"), ("gan", "x")):
        with pytest.raises(SystemExit) if model == "gan" else nullcontext():
            assert main(["train", model, "--data", "digits", "--ema", value]) == 1
        assert "--ema" in capsys.readouterr().err
