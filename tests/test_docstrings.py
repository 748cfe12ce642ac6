"""Every public name's docstring has an example, and it does what it says."""

import doctest
import sys
import warnings

import pytest
import torch
from public_names import PUBLIC

from genfast import backend, functional, use_backend
from genfast.training.runs import loop
from genfast.training.runs.config import prepare

# Each once, whatever modules hand it on.
NAMED = {f"{v.__module__}.{v.__name__}": v for names in PUBLIC.values() for v in names.values()}


def example_of(name):
    """The `doctest.DocTest` of a public name; its variables are those of its module."""
    variables = dict(vars(sys.modules[NAMED[name].__module__]))
    return doctest.DocTestParser().get_doctest(NAMED[name].__doc__, variables, name, None, 0)


@pytest.fixture(scope="module")
def where_examples_run(tmp_path_factory):
    """A folder with the files that examples read."""
    folder = tmp_path_factory.mktemp("examples")
    config, images = prepare("gan", "digits", {"steps": 1, "image_size": 8, "batch_size": 4})
    with use_backend("reference"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Of TorchScript.
        loop.train(config, images, folder / "runs" / "gan-digits", device="cpu")
        torch.jit.script(torch.nn.Flatten()).save(folder / "features.pt")
    return folder


@pytest.fixture
def as_without_a_gpu(monkeypatch, where_examples_run):
    """Examples run on CPU tensors as they would for a reader, not on interpreted kernels."""
    monkeypatch.setattr(backend, "INTERPRETING", False)
    monkeypatch.setattr(functional, "INTERPRETING", False)
    monkeypatch.chdir(where_examples_run)


def test_all_have_an_example():
    without = sorted(name for name in NAMED if not example_of(name).examples)
    assert not without, f"expected an example (>>>) in the docstring of each, lacking in {without}"


@pytest.mark.parametrize("name", sorted(NAMED))
def test_example(name, as_without_a_gpu):
    told = []
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("error", UserWarning)
        torch.manual_seed(0)
        found = doctest.DocTestRunner(verbose=False).run(example_of(name), out=told.append)
    assert not found.failed, "".join(told)
