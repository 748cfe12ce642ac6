"""Which devices the kernels run on, and that those they do not run on get a reason."""

from types import SimpleNamespace

import pytest
import torch

from genfast import backend, convert, functional, use_backend

CAPABILITIES = {0: (7, 0), 1: (7, 5), 2: (8, 0), 3: (8, 6), 4: (9, 0), 5: (12, 0)}
TOO_OLD = {0: "7.0", 1: "7.5"}


@pytest.fixture
def gpus(monkeypatch):
    """As on a machine with these GPUs, where nothing is interpreted; the GPUs that were asked."""
    asked = []

    def capability(index):
        asked.append(index)
        return CAPABILITIES[index]

    monkeypatch.setattr(backend, "triton", SimpleNamespace())
    monkeypatch.setattr(backend, "INTERPRETING", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", capability)
    monkeypatch.setattr(torch.version, "hip", None)
    backend._why_too_old.cache_clear()
    with use_backend("auto"):
        yield asked
    backend._why_too_old.cache_clear()


@pytest.mark.parametrize("index", CAPABILITIES)
def test_old_gpus_run_pytorch_and_say_so(index, gpus):
    for _ in range(2):
        reason = backend.why_device_cannot_run_triton(torch.device("cuda", index))
        if index in TOO_OLD:
            assert reason == (
                "the kernels need an NVIDIA GPU of compute capability 8.0, "
                f"got one of {TOO_OLD[index]}"
            )
        else:
            assert reason is None
    assert gpus == [index]  # Asked once: operations ask at every call.


def test_cuda_without_an_index_is_the_current_gpu(gpus, monkeypatch):
    assert backend.why_device_cannot_run_triton(torch.device("cuda")).endswith("got one of 7.5")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 4)
    assert backend.why_device_cannot_run_triton(torch.device("cuda")) is None


def test_amd_gpus_are_not_asked(gpus, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert backend.why_device_cannot_run_triton(torch.device("cuda", 0)) is None
    assert not gpus


def test_where_there_is_no_gpu(gpus, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert backend.why_device_cannot_run_triton(torch.device("cuda")) == "PyTorch finds no GPU"


def test_interpreted_kernels_ask_no_gpu(gpus, monkeypatch):
    monkeypatch.setattr(backend, "INTERPRETING", True)
    for device in (torch.device("cuda", 0), torch.device("cpu")):
        assert backend.why_device_cannot_run_triton(device) is None


def test_operations_and_reports_take_the_reason(gpus):
    x = SimpleNamespace(device=torch.device("cuda", 1), dtype=torch.float32)
    reason = backend.why_device_cannot_run_triton(x.device)
    assert functional.why_not_triton(x) == reason
    assert functional.implementation(x) == "reference"
    model = SimpleNamespace(parameters=lambda: iter([x]))
    assert convert._why_nothing_runs(model) == reason
    with use_backend("triton"), pytest.raises(RuntimeError, match="cannot run: the kernels need"):
        functional.implementation(x)
