"""What a replay would miss is captured anew, and nothing else, with a stand-in for the graph."""

import types

import pytest
import torch
from torch import nn

from genfast import use_backend
from genfast.backend import selected_backend
from genfast.training.steps.capture import CapturedStep

CPU = torch.device("cpu")


class Recorder:
    """Records by running, and replays without Python, as a graph does: here by nothing."""

    device = CPU

    def __init__(self):
        self.recorded = 0

    def warm_up(self, function, times):
        function()

    def record(self, function):
        self.recorded += 1
        function()
        return lambda: None


class Own(nn.Module):
    """A layer with attributes of many kinds."""

    power = 1

    def __init__(self):
        super().__init__()
        self.scale, self.name, self.on, self.nothing = 1.0, "name", True, None
        self.shape, self.sizes, self.options = (1, (2,)), [1, [2]], {"a": {"b": 1}}
        self.labels = {1, 2}
        self.activation = torch.relu
        self.table = torch.ones(4)
        self.unregistered = [nn.LeakyReLU(0.2)]

    def forward(self, x):
        return self.activation(x * self.scale)


class Norm(nn.BatchNorm1d):
    """Another class, which does the same."""


class Fixture:
    """A model, its optimizer, scaler and captured step."""

    def __init__(self):
        torch.manual_seed(0)
        self.layers = nn.ModuleDict(
            {
                "first": nn.Linear(3, 4),
                "norm": nn.BatchNorm1d(4),
                "activation": nn.LeakyReLU(0.2),
                "dropout": nn.Dropout(0.5),
                "own": Own(),
                "last": nn.Linear(4, 1),
            }
        )
        self.model = nn.Sequential(*self.layers.values())
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=2**-7, fused=True)
        self.scaler = torch.amp.GradScaler("cpu")
        self.recorder = Recorder()
        self.captured = CapturedStep(
            self._step, [self.model], [self.optimizer], [self.scaler], self.recorder
        )

    def __getattr__(self, name):
        return self.layers[name]

    def _step(self, x):
        self.optimizer.zero_grad(set_to_none=True)
        loss = (self.model(x).float() ** 2).mean()
        if loss.requires_grad:
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
        return (loss.detach(),)

    def run(self, steps=2):
        for _ in range(steps):
            self.captured(torch.ones(6, 3))
        return self.recorder.recorded


def _nothing(*args):
    pass


def _replace_forward(f):
    f.activation.forward = types.MethodType(lambda self, x: x, f.activation)


def _swap_layers(f):
    modules = f.model._modules
    modules["2"], modules["3"] = modules["3"], modules["2"]


def _reorder_layers(f):
    f.model._modules["2"] = f.model._modules.pop("2")


CHANGES = {
    "momentum": lambda f: setattr(f.norm, "momentum", 0.2),
    "momentum None": lambda f: setattr(f.norm, "momentum", None),
    "eps": lambda f: setattr(f.norm, "eps", 1e-3),
    "negative slope": lambda f: setattr(f.activation, "negative_slope", 0.1),
    "inplace": lambda f: setattr(f.activation, "inplace", True),
    "dropout": lambda f: setattr(f.dropout, "p", 0.25),
    "number": lambda f: setattr(f.own, "scale", 2.0),
    "string": lambda f: setattr(f.own, "name", "other"),
    "bool": lambda f: setattr(f.own, "on", False),
    "None": lambda f: setattr(f.own, "nothing", 0),
    "tuple": lambda f: setattr(f.own, "shape", (1, (3,))),
    "list": lambda f: f.own.sizes.append(3),
    "inner list": lambda f: f.own.sizes[1].append(3),
    "dict": lambda f: f.own.options["a"].update(b=2),
    "set": lambda f: f.own.labels.add(3),
    "function": lambda f: setattr(f.own, "activation", torch.tanh),
    "tensor": lambda f: setattr(f.own, "table", torch.ones(4)),
    "tensor's place": lambda f: setattr(f.own.table, "data", torch.ones(4)),
    "module in a list": lambda f: setattr(f.own.unregistered[0], "negative_slope", 0.3),
    "new attribute": lambda f: setattr(f.own, "new", None),
    "removed attribute": lambda f: delattr(f.own, "name"),
    "class": lambda f: setattr(f.norm, "__class__", Norm),
    "forward hook": lambda f: f.norm.register_forward_hook(_nothing),
    "forward pre-hook": lambda f: f.norm.register_forward_pre_hook(_nothing),
    "backward hook": lambda f: f.norm.register_full_backward_hook(_nothing),
    "backward pre-hook": lambda f: f.norm.register_full_backward_pre_hook(_nothing),
    "tensor hook": lambda f: f.first.weight.register_hook(_nothing),
    "accumulation hook": lambda f: f.first.weight.register_post_accumulate_grad_hook(_nothing),
    "optimizer hook": lambda f: f.optimizer.register_step_post_hook(_nothing),
    "replaced layer": lambda f: setattr(f.model, "2", nn.LeakyReLU(0.2)),
    "appended layer": lambda f: f.model.append(nn.Identity()),
    "swapped layers": _swap_layers,
    "reordered layers": _reorder_layers,
    "replaced forward": _replace_forward,
    "replaced buffer": lambda f: setattr(f.norm, "running_mean", torch.zeros(4)),
    "weight's place": lambda f: setattr(f.first.weight, "data", f.first.weight.data.clone()),
    "betas": lambda f: f.optimizer.param_groups[0].update(betas=(0.5, 0.9)),
    "optimizer's step": lambda f: setattr(f.optimizer, "step", f.optimizer.step),
    "scaler": lambda f: f.scaler.set_growth_interval(7),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_somebody_changes_is_captured_anew(change):
    f = Fixture()
    assert f.run() == 1
    change(f)
    assert f.run(3) == 2


def test_a_hook_that_goes_is_captured_anew():
    f = Fixture()
    handles = [
        f.norm.register_forward_hook(_nothing),
        f.first.weight.register_hook(_nothing),
    ]
    for expected, handle in enumerate(handles, 1):
        assert f.run() == expected
        handle.remove()
    assert f.run() == 3


def test_a_renamed_attribute_is_captured_anew():
    f = Fixture()
    f.own.last_one = True  # The last one, so that the other takes its place.
    assert f.run() == 1
    del f.own.last_one
    f.own.another = True
    assert f.run() == 2


def test_a_hook_of_another_kind_is_captured_anew():
    f = Fixture()
    handle = f.norm.register_forward_pre_hook(_nothing)
    assert f.run() == 1
    handle.remove()
    f.norm.register_forward_hook(_nothing)
    assert f.run() == 2


@pytest.mark.parametrize("attribute", ["power", "forward"])
def test_a_changed_class_is_captured_anew(attribute, monkeypatch):
    f = Fixture()
    assert f.run() == 1
    monkeypatch.setattr(Own, attribute, 2 if attribute == "power" else lambda self, x: x)
    assert f.run() == 2


def test_a_global_hook_is_captured_anew():
    f = Fixture()
    assert f.run() == 1
    handle = nn.modules.module.register_module_forward_hook(_nothing)
    try:
        assert f.run() == 2
    finally:
        handle.remove()


SETTINGS = {
    "convolutions": (torch.backends.cudnn.conv, "fp32_precision", "ieee"),
    "recurrent layers": (torch.backends.cudnn.rnn, "fp32_precision", "ieee"),
    "matrix products": (torch.backends.cuda.matmul, "fp32_precision", "tf32"),
    "cuDNN": (torch.backends.cudnn, "enabled", False),
    "benchmark": (torch.backends.cudnn, "benchmark", True),
    "deterministic": (torch.backends.cudnn, "deterministic", True),
}


@pytest.mark.parametrize(("owner", "name", "value"), SETTINGS.values(), ids=SETTINGS)
def test_settings_are_captured_anew(owner, name, value):
    f = Fixture()
    before = getattr(owner, name)
    assert f.run() == 1
    try:
        setattr(owner, name, value)
        assert f.run() == 2
    finally:
        setattr(owner, name, before)
    assert f.run() == 3


@pytest.mark.parametrize(
    "within",
    [
        lambda: torch.autocast("cpu", torch.bfloat16),
        lambda: use_backend("auto" if selected_backend() == "reference" else "reference"),
        torch.no_grad,
    ],
    ids=["autocast", "backend", "no gradients"],
)
def test_surroundings_are_captured_anew(within):
    f = Fixture()
    assert f.run() == 1
    with within():
        assert f.run() == 2
    assert f.run() == 3


def test_another_dtype_of_autocast_is_captured_anew():
    f = Fixture()
    with torch.autocast("cpu", torch.bfloat16):
        assert f.run() == 1
    with torch.autocast("cpu", torch.float16):
        assert f.run() == 2


def _set_alike(f):
    f.norm.momentum, f.norm.eps = float("0.1"), float("1e-5")
    f.dropout.p = 1 / 2
    f.own.shape, f.own.sizes, f.own.options = (1, (2,)), [1, [2]], {"a": {"b": 1}}
    f.optimizer.param_groups[0]["betas"] = (float("0.9"), float("0.999"))
    f.model.train().requires_grad_(True)


def _use(f):
    f.model.eval()
    with torch.no_grad(), torch.autocast("cpu"):
        f.model(torch.ones(2, 3))
    f.model.train()
    f.model.load_state_dict(f.model.state_dict())


def _hook_and_go(f):
    f.norm.register_forward_hook(_nothing).remove()
    f.norm.register_state_dict_post_hook(_nothing)


def _keep_an_activation(f):
    f.own.seen = f.first(torch.ones(2, 3))


@pytest.mark.parametrize("change", [_nothing, _set_alike, _use, _hook_and_go])
def test_the_same_again_needs_no_new_capture(change):
    f = Fixture()
    assert f.run() == 1
    for _ in range(3):
        change(f)
        assert f.run() == 1


def test_an_activation_that_is_kept_needs_no_new_capture():
    f = Fixture()
    _keep_an_activation(f)
    assert f.run() == 1
    _keep_an_activation(f)
    assert f.run() == 1


def test_what_was_set_alike_is_watched_in_its_turn():
    f = Fixture()
    assert f.run() == 1
    _set_alike(f)
    assert f.run() == 1
    f.own.sizes[1].append(3)
    assert f.run() == 2
