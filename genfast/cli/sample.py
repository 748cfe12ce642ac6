"""`genfast sample`: images drawn with a trained model."""

from pathlib import Path

from genfast.cli.options import add_device, checkpoint_file, of_rule, working_device
from genfast.training.runs.classes import NUM, OF_A_CLASS
from genfast.training.runs.rules import whole
from genfast.training.runs.samples import sample_checkpoint
from genfast.training.runs.settings import RULES


def add(commands):
    """Add the command to a parser's."""
    parser = commands.add_parser("sample", help="draw images with a trained model")
    parser.set_defaults(run=run, memory_options=lambda args: ["--num"])
    parser.add_argument("checkpoint", help="the file, or the folder of a run")
    parser.add_argument(
        "--num",
        type=of_rule(whole()),
        help=f"(default: {NUM}, or of a conditional model {OF_A_CLASS} of each class)",
    )
    parser.add_argument(
        "--class",
        dest="of_class",
        metavar="NAME",
        help="of a conditional model, the name or number of the class to draw (default: all, a row "
        "each)",
    )
    parser.add_argument("--out", default="samples.png", help="PNG (default: %(default)s)")
    parser.add_argument(
        "--seed", type=of_rule(RULES["seed"]), default=0, help="(default: %(default)s)"
    )
    parser.add_argument(
        "--no-ema",
        action="store_true",
        help="draw from the newest generator where a run kept an average of it",
    )
    add_device(parser)


def run(args):
    """Draw them."""
    path, device = checkpoint_file(args.checkpoint), working_device(args.device)
    sample_checkpoint(
        path,
        args.num,
        args.out,
        device=device,
        seed=args.seed,
        ema=not args.no_ema,
        of_class=args.of_class,
    )
    print(Path(args.out))
    return 0
