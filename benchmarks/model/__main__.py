"""What a training step would cost on a GPU that is not here: python -m benchmarks.model.

Each kernel of a real step is compiled for the card, and its machine code, its grid and its tensors
are put into a model of the card (cost.py). It is a model, not a measurement, and proves no speed.
"""

import argparse
import sys
from pathlib import Path

from benchmarks.model.cost import GPUS
from benchmarks.model.picture import draw
from benchmarks.model.prediction import predict
from benchmarks.model.recording import MODELS
from benchmarks.model.report import summary, table, write_csv

RESULTS = Path(__file__).parents[1] / "results"


def main():
    """Print the table of a step; write its CSV and its picture where asked."""
    args = _parser().parse_args()
    if args.batch < 1:
        sys.exit(f"expected a batch of at least 1 image, got {args.batch}")
    gpu = GPUS[args.gpu]
    costs = predict(args.model, args.batch, args.gpu)
    eager = None
    title = f"one step of {args.model}, batch {args.batch}, bf16, {gpu.name}"
    if args.only:
        names = {cost.launch.name for cost in costs}
        if not names.intersection(args.only):
            sys.exit(f"expected kernels among {', '.join(sorted(names))}, got {args.only}")
        costs = [cost for cost in costs if cost.launch.name in args.only]
        title += f", only {' '.join(args.only)}"
    else:
        eager = predict(args.model, args.batch, args.gpu, "eager")
    print(table(costs, gpu, title))
    if eager:
        print(summary(eager, gpu, "PyTorch, eager in one CUDA graph"))
    stem = RESULTS / f"model_{args.model}_batch{args.batch}_{args.gpu}"
    if args.csv is not None:
        path = args.csv or stem.with_suffix(".csv")
        write_csv(costs, path)
        print(path)
    if args.plot is not None:
        path = args.plot or stem.with_suffix(".png")
        draw(costs, eager, gpu, title, path)
        print(path)


def _parser():
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.model", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--model", choices=MODELS, default="dcgan")
    parser.add_argument("--batch", type=int, default=128, help="images a step (default: 128)")
    parser.add_argument("--gpu", choices=GPUS, default="h100")
    parser.add_argument("--only", nargs="+", metavar="KERNEL", help="fprop, dgrad and so on")
    for name, what in (("csv", "a line for each launch"), ("plot", "a picture")):
        parser.add_argument(
            f"--{name}",
            nargs="?",
            type=Path,
            const=False,
            metavar="FILE",
            help=f"write {what} (default: under {RESULTS.name}/)",
        )
    return parser


if __name__ == "__main__":
    main()
