"""`genfast export`: a trained network as a file that other programs read."""

from pathlib import Path

from genfast.training.runs.exporting import FORMATS, PARTS, export


def add(commands):
    """Add the command to a parser's."""
    parser = commands.add_parser("export", help="write a trained network for other programs")
    parser.set_defaults(run=run, device="cpu")
    parser.add_argument("checkpoint", help="the file, or the folder of a run")
    what = "; ".join(f"{name} ({form.suffix}): {form.text}" for name, form in FORMATS.items())
    parser.add_argument("--format", required=True, choices=FORMATS, help=what)
    parser.add_argument("--out", required=True, metavar="FILE", help="the name of a new file")
    parser.add_argument(
        "--part",
        choices=PARTS,
        help="which network (default: the generator, or the decoder of a VAE)",
    )
    parser.add_argument(
        "--no-ema",
        action="store_true",
        help="the newest generator where a run kept an average of it",
    )


def run(args):
    """Write it."""
    export(args.checkpoint, args.out, args.format, part=args.part, ema=not args.no_ema)
    print(Path(args.out))
    return 0
