"""`genfast sample`: images drawn with a trained model."""

from pathlib import Path

from genfast.cli.options import add_device, of_rule
from genfast.training.errors import BadInput
from genfast.training.runs.classes import NUM, OF_A_CLASS, labels_of_samples
from genfast.training.runs.devices import working_device
from genfast.training.runs.rules import whole
from genfast.training.runs.samples import images_to, sample_checkpoint, walk_to
from genfast.training.runs.settings import RULES
from genfast.training.runs.trained import load

# What is drawn where no --num is given: a row, walks side by side, a plane of 20 x 20.
IN_A_ROW, WALKS, ON_A_PLANE = 10, 16, 400
FRAMES, FRAME_SECONDS = 60, 0.07


def add(commands):
    """Add the command to a parser's."""
    parser = commands.add_parser("sample", help="draw images with a trained model")
    parser.set_defaults(run=run, memory_options=lambda args: ["--num"])
    parser.add_argument(
        "checkpoint",
        help="the file, the folder of a run, or weights of the generator of PyTorch's "
        "public DCGAN example",
    )
    parser.add_argument(
        "--num",
        type=of_rule(whole()),
        help=f"(default: {NUM}, or of a conditional model {OF_A_CLASS} of each class; {IN_A_ROW} "
        f"with --interpolate, {WALKS} with --walk, {ON_A_PLANE} with --manifold)",
    )
    parser.add_argument(
        "--class",
        dest="of_class",
        metavar="NAME",
        help="of a conditional model, the name or number of the class to draw (default: all, a row "
        "each)",
    )
    parser.add_argument(
        "--out",
        help="PNG; with a slash at its end, a folder for single pictures; GIF with --walk "
        "(default: samples.png, or walk.gif)",
    )
    seed = of_rule(RULES["seed"])
    parser.add_argument("--seed", type=seed, help="(default: 0)")
    ways = parser.add_mutually_exclusive_group()
    ways.add_argument(
        "--interpolate",
        nargs=2,
        type=seed,
        metavar=("A", "B"),
        help="draw a row of images on the way from one seed to another, spherically interpolated",
    )
    ways.add_argument(
        "--walk",
        action="store_true",
        help="draw closed walks through the latent space, side by side, as GIF",
    )
    ways.add_argument(
        "--manifold",
        action="store_true",
        help="draw the plane of a VAE's latent of two dimensions, --num images in a square",
    )
    parser.add_argument(
        "--frames", type=of_rule(whole()), help=f"of --walk (default: {FRAMES})", metavar="N"
    )
    parser.add_argument(
        "--no-ema",
        action="store_true",
        help="draw from the newest generator where a run kept an average of it",
    )
    add_device(parser)


def run(args):
    """Draw them."""
    device = working_device(args.device)
    out = args.out or ("walk.gif" if args.walk else "samples.png")
    _check_options(args)
    draw = _draw_samples
    if args.interpolate:
        draw = _draw_between
    elif args.walk:
        draw = _draw_walk
    elif args.manifold:
        draw = _draw_manifold
    draw(args, out, device)
    print(Path(out))
    return 0


def _check_options(args):
    if args.frames and not args.walk:
        raise BadInput(f"expected --frames with --walk, got --frames {args.frames} without it")
    if args.seed is not None and args.interpolate:
        a, b = args.interpolate
        raise BadInput(
            f"expected no --seed with --interpolate, which has two of its own, {a} and {b}, got "
            f"--seed {args.seed}"
        )
    if args.seed is not None and args.manifold:
        raise BadInput(
            f"expected no --seed with --manifold, which draws no random numbers, got --seed "
            f"{args.seed}"
        )


def _draw_samples(args, out, device):
    sample_checkpoint(
        args.checkpoint,
        args.num,
        out,
        device=device,
        seed=args.seed or 0,
        ema=not args.no_ema,
        of_class=args.of_class,
    )


def _draw_between(args, out, device):
    num = args.num or IN_A_ROW
    write = images_to(out, num, columns=num)
    model = _model(args, device)
    write([model.interpolate(*args.interpolate, num, labels=_of_one_class(args, model))])


def _draw_walk(args, out, device):
    write = walk_to(out, FRAME_SECONDS)
    model, num = _model(args, device), args.num or WALKS
    labels = labels_of_samples(model.config, num, args.of_class)
    write(model.walk(num, args.frames or FRAMES, args.seed or 0, labels=labels))


def _draw_manifold(args, out, device):
    num = args.num or ON_A_PLANE
    side = round(num**0.5)
    if side**2 != num:
        raise BadInput(f"expected --num to be a square such as 400 with --manifold, got {num}")
    write = images_to(out, num, columns=side)
    model = _model(args, device)
    write([model.manifold(side, labels=_of_one_class(args, model))])


def _of_one_class(args, model):
    """The number of --class, which a conditional model needs here; None for another model."""
    if model.config.conditional and args.of_class is None:
        raise BadInput(
            "expected --class with --interpolate or --manifold of a model trained with "
            "--conditional, got none"
        )
    labels = labels_of_samples(model.config, 1, args.of_class)
    return None if labels is None else int(labels)


def _model(args, device):
    return load(args.checkpoint, device, ema=not args.no_ema)
