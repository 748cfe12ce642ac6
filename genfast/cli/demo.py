"""`genfast demo`: what genfast does, seen in two minutes."""

from pathlib import Path

from genfast.cli.options import add_device
from genfast.training.runs.demo import demo
from genfast.training.runs.devices import working_device


def add(commands):
    """Add the command to a parser's."""
    parser = commands.add_parser("demo", help="train on digits and compare with plain PyTorch")
    parser.set_defaults(run=run)
    parser.add_argument("--out", default="runs/demo", help="folder (default: %(default)s)")
    add_device(parser)


def run(args):
    """Train and compare."""
    return 0 if demo(Path(args.out), working_device(args.device)) else 130
