"""What several commands take: a device, and checks of what was given."""

import argparse


def add_device(parser):
    """`--device`, for `devices.working_device`."""
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
