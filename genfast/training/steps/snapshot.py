"""All that a step changes, kept so that steps can be undone."""

import torch


class Snapshot:
    """What a step changes, as it is now; gradients and half-precision copies are set aside.

    Args:
        modules, optimizers, scalers: lists of them.
        half_weights: a list of `HalfWeights`.
        device: the `torch.device` they are on.
    """

    def __init__(self, modules, optimizers, scalers, half_weights, device):
        self._device = device
        parts = list(dict.fromkeys(m for module in modules for m in module.modules()))
        tensors = [t for m in modules for t in (*m.parameters(), *m.buffers())]
        states = [s for o in optimizers for s in o.state.values()]
        tensors += [t for state in states for t in state.values()]
        self._optimizers, self._scalers = optimizers, scalers
        scales = [t for scaler in scalers for t in _scale_of(scaler)]
        self._values = [(t, t.detach().clone()) for t in dict.fromkeys((*tensors, *scales))]
        self._buffers = _copied(m._buffers for m in parts)
        stages = [s for scaler in scalers for s in _stages_of(scaler)]
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        self._held = _copied(
            [
                *(held for m in parts for held in (vars(m), m._parameters)),
                *(held for o in optimizers for held in (vars(o), o.state)),
                *(vars(scaler) for scaler in scalers),
                *(states + stages + groups),
            ]
        )
        self._cpu_rng = torch.get_rng_state()
        self._rng = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        self._gradients = [(p, p.grad) for module in modules for p in module.parameters()]
        for parameter, _ in self._gradients:
            parameter.grad = None
        self._take_back = [half.set_aside() for half in half_weights]

    @torch.no_grad()
    def put_values_back(self):
        """Let tensors hold what they held; those that steps made since stay.

        An optimizer's are then those of one that has not stepped yet, and gradients are None.
        """
        for buffers, before in self._buffers:
            buffers.update(before)
        old = {id(tensor) for tensor, _ in self._values}
        for optimizer in self._optimizers:
            for tensor in (t for state in optimizer.state.values() for t in state.values()):
                if id(tensor) not in old:
                    tensor.zero_()
        for scaler in self._scalers:
            initial = ("_init_scale", "_init_growth_tracker")
            for tensor, name in zip(_scale_of(scaler), initial, strict=False):
                if id(tensor) not in old:
                    tensor.fill_(getattr(scaler, name))
        for tensor, value in self._values:
            tensor.copy_(value)
        for parameter, _ in self._gradients:
            parameter.grad = None
        self._put_random_numbers_back()

    @torch.no_grad()
    def put_back(self):
        """Let all be as if nothing had run."""
        for held, before in (*self._held, *self._buffers):
            held.clear()
            held.update(before)
        for tensor, value in self._values:
            tensor.copy_(value)
        for parameter, gradient in self._gradients:
            parameter.grad = gradient
        for take_back in self._take_back:
            take_back()
        self._put_random_numbers_back()

    def _put_random_numbers_back(self):
        torch.set_rng_state(self._cpu_rng)
        if self._rng is not None:
            torch.cuda.set_rng_state(self._rng, self._device)


def _copied(dicts):
    # A TorchScript module's are none.
    return [(held, dict(held)) for held in dicts if isinstance(held, dict)]


def _scale_of(scaler):
    """The tensors of a gradient scaler: none before it is used."""
    tensors = getattr(scaler, "_scale", None), getattr(scaler, "_growth_tracker", None)
    return [] if tensors[0] is None else list(tensors)


def _stages_of(scaler):
    """What a gradient scaler knows about the optimizers in this step."""
    stages = getattr(scaler, "_per_optimizer_states", {})
    return [stages, *stages.values(), *(s["found_inf_per_device"] for s in stages.values())]
