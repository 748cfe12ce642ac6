"""The command line: `genfast train`, `sample`, `env` and `demo`."""

import argparse
import math
import platform
import shlex
import sys
import warnings
from pathlib import Path

import numpy
import torch

import genfast
from genfast.backend import selected_backend, triton
from genfast.functional import why_not_triton
from genfast.models.dcgan import IMAGE_SIZES
from genfast.training.data import colour
from genfast.training.errors import BadInput, Diverged
from genfast.training.runs.checkpoint import NAME as CHECKPOINT_NAME
from genfast.training.runs.config import DEFAULTS, DIGITS_DEFAULTS, MODELS, prepare, prepare_resumed
from genfast.training.runs.demo import demo
from genfast.training.runs.loop import CHECKPOINT_SECONDS, train
from genfast.training.runs.samples import sample_checkpoint
from genfast.training.steps.precision import PRECISIONS, resolve_precision

SETTINGS = (
    "image_size",
    "batch_size",
    "epochs",
    "lr",
    "beta1",
    "nz",
    "ngf",
    "ndf",
    "seed",
    "precision",
    "background",
)


def main(arguments=None):
    """Run a command; returns the exit status: 0, 1 after an error, 130 after an interrupt."""
    args = _parser().parse_args(arguments)
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: _tell(f"warning: {message}")
        try:
            _check_backend()
            return args.run(args)
        except (BadInput, Diverged) as error:
            _tell(f"error: {error}")
            return 1
        except OSError as error:  # A full disk, a folder that must not be written to.
            _tell(f"error: expected files that can be read and written, but {error}")
            return 1
        except KeyboardInterrupt:
            _tell("interrupted")
            return 130


def _check_backend():
    try:
        selected_backend()
    except ValueError as error:
        raise BadInput(str(error)) from None


def _tell(message):
    print(f"genfast: {message}", file=sys.stderr)


def _train(args):
    given = {name: getattr(args, name) for name in SETTINGS if getattr(args, name) is not None}
    device = _working_device(args.device)
    _check_precision(args.precision, device)
    resume_from = _resume_from(args)
    out = _out_folder(args, resume_from)
    if resume_from:
        config, images = prepare_resumed(args.model, args.data, given, resume_from, out)
        _check_precision(config.precision, device)  # The run may have begun on another machine.
    else:
        config, images = prepare(args.model, args.data, given, out)
    outcome = train(
        config,
        images,
        out,
        device=device,
        resume_from=resume_from,
        checkpoint_seconds=args.checkpoint_seconds,
    )
    if outcome.interrupted:
        again = ["python", "-m", "genfast", "train", config.model, "--data", config.data]
        again += ["--out", str(out), "--epochs", str(config.epochs), "--resume"]
        _tell(f"stopped after step {outcome.steps}; to go on: {shlex.join(again)}")
        return 130
    print(outcome.picture)
    return 0


def _resume_from(args):
    """The path of the checkpoint to go on from, or None."""
    if args.resume is None:
        if args.data is None:
            raise BadInput("expected --data, which only --resume can do without, got none")
        return None
    if args.resume is not True:
        return Path(args.resume)
    if args.out is None and args.data is None:
        raise BadInput("expected --resume with --out, --data or a checkpoint, got it alone")
    return _default_out(args) / CHECKPOINT_NAME


def _out_folder(args, resume_from):
    if resume_from and args.out is None:
        return resume_from.parent
    out = _default_out(args)
    if out.exists() and not out.is_dir():
        raise BadInput(f"expected --out to be a folder, got the file {out}")
    checkpoint = out / CHECKPOINT_NAME
    if checkpoint.exists() and not (resume_from and _is_same(resume_from, checkpoint)):
        raise BadInput(
            f"expected --out to be a folder without a run, but {out} holds one: give --resume to "
            f"go on with it, or another --out"
        )
    return out


def _is_same(path, existing):
    return path.exists() and path.samefile(existing)


def _default_out(args):
    return Path(args.out or f"runs/{args.model}-{Path(args.data).resolve().name}")


def _sample(args):
    path = Path(args.checkpoint)
    path = path / CHECKPOINT_NAME if path.is_dir() else path
    out = Path(args.out)
    if not out.parent.is_dir():
        raise BadInput(f"expected --out in a folder that exists, got {out}")
    if out.is_dir():
        raise BadInput(f"expected --out to be the name of a picture, got the folder {out}")
    sample_checkpoint(path, args.num, out, device=_working_device(args.device), seed=args.seed)
    print(out)
    return 0


def _env(args):
    device = _device(args.device)
    print(f"genfast    {genfast.__version__}")
    print(f"python     {platform.python_version()} on {platform.platform()}")
    print(f"torch      {torch.__version__}")
    print(f"triton     {triton.__version__ if triton else 'not installed'}")
    print(f"numpy      {numpy.__version__}")
    print(f"device     {device}: {_device_name(device)}")
    print(f"precision  {resolve_precision('auto', device)}")
    print(f"backend    {selected_backend()}")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        reason = why_not_triton(torch.empty(1, device=device, dtype=dtype))
        runs = f"PyTorch, because {reason}" if reason else "the Triton kernels"
        if selected_backend() == "reference":
            runs = "PyTorch, because the backend 'reference' was asked for"
        print(f"{str(dtype).removeprefix('torch.'):<10} runs {runs}")
    return 0


def _demo(args):
    return 0 if demo(Path(args.out), _working_device(args.device)) else 130


def _device(name):
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise BadInput(f"expected --device to be auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise BadInput(
            f"expected --device to be one this machine has, got {name!r}; PyTorch finds "
            f"{torch.cuda.device_count()} GPUs"
        )
    return device


def _working_device(name):
    """As `_device`; BadInput if GENFAST_BACKEND asks for kernels that cannot run there."""
    device = _device(name)
    reason = why_not_triton(torch.empty(1, device=device))
    if reason and selected_backend() == "triton":
        raise BadInput(f"expected kernels to run, as GENFAST_BACKEND=triton asks, but {reason}")
    return device


def _check_precision(precision, device):
    try:
        resolve_precision(precision or "auto", device)
    except ValueError as error:
        raise BadInput(str(error)) from None


def _device_name(device):
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return f"{torch.cuda.get_device_name(device)}, capability {major}.{minor}"
    return f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"


def _parser():
    parser = argparse.ArgumentParser(prog="genfast", description=genfast.__doc__)
    parser.add_argument("--version", action="version", version=f"genfast {genfast.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_train(commands)
    _add_sample(commands)
    env = commands.add_parser("env", help="print versions, the device, and which kernels run")
    env.set_defaults(run=_env)
    demo_parser = commands.add_parser("demo", help="train on digits and compare with plain PyTorch")
    demo_parser.add_argument("--out", default="runs/demo", help="folder (default: %(default)s)")
    demo_parser.set_defaults(run=_demo)
    for command in (env, demo_parser):
        _add_device(command)
    return parser


def _add_train(commands):
    parser = commands.add_parser("train", help="train a model on images")
    parser.set_defaults(run=_train)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument(
        "--data",
        help="digits or photos (from scikit-learn), a folder of png, jpg or webp images, a .npy or "
        ".npz file of uint8 images, or MNIST's IDX files",
    )
    parser.add_argument(
        "--background",
        type=_background,
        metavar="COLOUR",
        help="what lies behind transparent images: white, black or a colour such as '#ff8800' "
        "(default: white)",
    )
    parser.add_argument(
        "--image-size",
        type=int,
        metavar="PIXELS",
        help=f"height and width, one of {', '.join(map(str, IMAGE_SIZES))} (default: 16 for "
        "digits, 32 with dcgan; 64 for photos and folders; that of the images for arrays)",
    )
    _add_setting(parser, "batch_size", _whole, "images a step")
    _add_setting(parser, "epochs", _whole, "passes over the images")
    _add_setting(parser, "lr", _positive, "learning rate of Adam")
    _add_setting(parser, "beta1", _fraction, "beta1 of Adam")
    _add_setting(parser, "nz", _whole, "length of the noise or latent vector")
    _add_setting(parser, "ngf", _whole, "channels next to the image in the generator or VAE")
    _add_setting(parser, "ndf", _whole, "channels next to the image in the discriminator")
    _add_setting(parser, "seed", _from_zero, "of weights, noise and the order of the images")
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        help="bf16 and fp16 are autocast; auto takes bf16 where it is fast, else fp32 "
        "(default: auto)",
    )
    _add_device(parser)
    parser.add_argument("--out", help="folder of the run (default: runs/MODEL-DATA)")
    parser.add_argument(
        "--resume",
        nargs="?",
        const=True,
        metavar="CHECKPOINT",
        help=f"go on from a checkpoint (default: {CHECKPOINT_NAME} in the run's folder); of the "
        "settings only --epochs may change",
    )
    parser.add_argument(
        "--checkpoint-seconds",
        type=_seconds,
        default=CHECKPOINT_SECONDS,
        metavar="S",
        help="time between two checkpoints (default: %(default)s)",
    )


def _add_sample(commands):
    parser = commands.add_parser("sample", help="draw images with a trained model")
    parser.set_defaults(run=_sample)
    parser.add_argument("checkpoint", help="the file, or the folder of a run")
    parser.add_argument("--num", type=_whole, default=64, help="(default: %(default)s)")
    parser.add_argument("--out", default="samples.png", help="picture (default: %(default)s)")
    parser.add_argument("--seed", type=_from_zero, default=0, help="(default: %(default)s)")
    _add_device(parser)


def _add_device(parser):
    parser.add_argument(
        "--device",
        default="auto",
        help="cpu, cuda, cuda:N, or auto for a GPU if there is one (default: %(default)s)",
    )


def _add_setting(parser, name, kind, text):
    parser.add_argument(
        f"--{name.replace('_', '-')}",
        type=kind,
        metavar="N" if kind in (_whole, _from_zero) else "X",
        help=f"{text} (default: {_defaults_of(name)})",
    )


def _defaults_of(name):
    """The default of a setting in words, such as "gan 50, dcgan 25, on digits 200 and 60"."""
    words = []
    for model, settings in DEFAULTS.items():
        if name in settings:
            digits = DIGITS_DEFAULTS[model].get(name)
            words.append(f"{model} {settings[name]}" + (f", {digits} on digits" if digits else ""))
    if len({DEFAULTS[m].get(name) for m in MODELS}) == 1 and "digits" not in "".join(words):
        return str(DEFAULTS[MODELS[0]][name])
    return "; ".join(words)


def _number(kind, holds, expected):
    """A type for argparse: a number for which `holds`; the error says what was `expected`."""

    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not holds(value):
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
        return value

    return convert


def _background(text):
    try:
        colour(text)
    except BadInput as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


_whole = _number(int, lambda v: v >= 1, "a whole number from 1")
_from_zero = _number(int, lambda v: 0 <= v < 2**63, "a whole number from 0")
_positive = _number(float, lambda v: 0 < v < math.inf, "a number above 0")
_fraction = _number(float, lambda v: 0 <= v < 1, "a number from 0 to below 1")
_seconds = _number(float, lambda v: v >= 0, "a number from 0")
