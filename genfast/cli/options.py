"""What several commands take: a device, the seed of samples, and checks of what was given."""

import argparse

import torch

from genfast.backend import selected_backend
from genfast.functional import why_not_triton
from genfast.training.errors import BadInput
from genfast.training.runs.devices import as_device


def add_device(parser):
    """`--device`, for `working_device`."""
    parser.add_argument(
        "--device",
        default="auto",
        help="cpu, cuda, cuda:N, or auto for a GPU if there is one (default: %(default)s)",
    )


def of_rule(rule):
    """A `Rule` as a type for argparse."""

    def convert(text):
        try:
            return rule.read(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return convert


def working_device(name):
    """As `as_device`; BadInput if GENFAST_BACKEND asks for kernels that cannot run there."""
    device = as_device(name)
    reason = why_not_triton(torch.empty(1, device=device))
    if reason and selected_backend() == "triton":
        raise BadInput(f"expected kernels to run, as GENFAST_BACKEND=triton asks, but {reason}")
    return device
