"""`genfast reconstruct`: images beside what a VAE makes of them."""

from pathlib import Path

from genfast.cli.options import add_device, of_rule
from genfast.training.runs.devices import working_device
from genfast.training.runs.reconstructions import reconstruct_checkpoint
from genfast.training.runs.rules import whole
from genfast.training.runs.settings import RULES


def add(commands):
    """Add the command to a parser's."""
    parser = commands.add_parser("reconstruct", help="draw images beside what a VAE makes of them")
    parser.set_defaults(run=run, memory_options=lambda args: ["--num"])
    parser.add_argument("checkpoint", help="the file, or the folder of a run, of a VAE")
    parser.add_argument("--data", help="as train takes it (default: what the run was trained on)")
    parser.add_argument("--num", type=of_rule(whole()), default=32, help="(default: %(default)s)")
    parser.add_argument("--out", default="reconstructions.png", help="PNG (default: %(default)s)")
    parser.add_argument(
        "--seed",
        type=of_rule(RULES["seed"]),
        default=0,
        help="of which images are taken (default: %(default)s)",
    )
    add_device(parser)


def run(args):
    """Draw them."""
    device = working_device(args.device)
    reconstruct_checkpoint(
        args.checkpoint, args.data, args.num, args.out, device=device, seed=args.seed
    )
    print(Path(args.out))
    return 0
