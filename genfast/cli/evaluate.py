"""`genfast evaluate`: how good and how various a trained model's images are."""

import argparse
from pathlib import Path

from genfast.cli.options import add_device, of_rule
from genfast.training.evaluation.features import EXTRACTORS
from genfast.training.evaluation.measuring import (
    MOST,
    evaluate,
    report_file,
    table,
    write_report,
)
from genfast.training.evaluation.metrics import METRICS
from genfast.training.runs.devices import working_device
from genfast.training.runs.rules import whole
from genfast.training.runs.settings import RULES


def add(commands):
    """Add the command to a parser's."""
    parser = commands.add_parser("evaluate", help="measure a trained model's images")
    parser.set_defaults(run=run, memory_options=lambda args: ["--num"])
    parser.add_argument("checkpoint", help="the file, or the folder of a run")
    parser.add_argument(
        "--data", help="real images, as train takes them (default: those of the run)"
    )
    known = "; ".join(f"{name}: {metric.text}" for name, metric in METRICS.items())
    parser.add_argument(
        "--metrics",
        type=_metrics,
        default=tuple(METRICS),
        metavar="NAMES",
        help=f"with commas between them (default: all: {known})",
    )
    parser.add_argument(
        "--features",
        metavar="NAME",
        help=f"{' or '.join(EXTRACTORS)}, or a TorchScript or ONNX file that takes floats "
        "(N, 3, H, W) from 0 to 1 and gives (N, D); loading TorchScript runs code of its maker "
        "(default: digits for the digits, else inception)",
    )
    parser.add_argument(
        "--num",
        type=of_rule(whole()),
        metavar="N",
        help=f"images of each kind (default: as many as there are real ones, at most {MOST:,})",
    )
    parser.add_argument(
        "--seed", type=of_rule(RULES["seed"]), default=0, help="(default: %(default)s)"
    )
    parser.add_argument(
        "--no-ema",
        action="store_true",
        help="measure the newest generator where a run kept an average of it",
    )
    parser.add_argument("--out", metavar="JSON", help="file for the results (default: none)")
    add_device(parser)


def _metrics(text):
    names = tuple(filter(None, text.split(",")))
    if not names or any(name not in METRICS for name in names):
        raise argparse.ArgumentTypeError(f"expected names among {', '.join(METRICS)}, got {text!r}")
    return names


def run(args):
    """Measure, and print what comes of it."""
    target = report_file(args.out) if args.out else None
    device = working_device(args.device)
    evaluation = evaluate(
        args.checkpoint,
        args.data,
        metrics=args.metrics,
        features=args.features,
        num=args.num,
        seed=args.seed,
        ema=not args.no_ema,
        device=device,
        bars=True,
    )
    print(table(evaluation))
    if target:
        write_report(evaluation, target)
        print(Path(args.out))
    return 0
