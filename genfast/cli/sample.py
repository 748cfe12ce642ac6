"""`genfast sample`: images drawn with a trained model."""

from pathlib import Path

from genfast.cli.options import add_device, checkpoint_file, of_rule, working_device
from genfast.training.runs.rules import whole
from genfast.training.runs.samples import sample_checkpoint
from genfast.training.runs.settings import RULES


def add(commands):
    """Add the command to a parser's."""
    parser = commands.add_parser("sample", help="draw images with a trained model")
    parser.set_defaults(run=run, memory_options=lambda args: ["--num"])
    parser.add_argument("checkpoint", help="the file, or the folder of a run")
    parser.add_argument("--num", type=of_rule(whole()), default=64, help="(default: %(default)s)")
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
    sample_checkpoint(path, args.num, args.out, device=device, seed=args.seed, ema=not args.no_ema)
    print(Path(args.out))
    return 0
