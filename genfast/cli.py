"""The command line: `genfast train`, `sample`, `env` and `demo`."""

import argparse
import errno
import os
import platform
import shlex
import sys
import warnings
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy
import torch

import genfast
from genfast.backend import selected_backend, triton
from genfast.functional import why_not_triton
from genfast.launch import first_use, timings
from genfast.losses import GAN_LOSSES
from genfast.models.dcgan import IMAGE_SIZES
from genfast.training.errors import BadInput, Diverged
from genfast.training.memory import limited_memory, missing_memory
from genfast.training.runs import folder
from genfast.training.runs.checkpoint import NAME as CHECKPOINT_NAME
from genfast.training.runs.config import (
    CONVOLUTIONAL,
    DEFAULTS,
    DIGITS_DEFAULTS,
    MODELS,
    option,
    prepare,
    prepare_resumed,
)
from genfast.training.runs.demo import demo
from genfast.training.runs.devices import as_device
from genfast.training.runs.loop import CHECKPOINT_SECONDS, train
from genfast.training.runs.rules import RULES, Rule, whole
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
    "loss",
    "ema",
)
# Those that decide how much memory training takes.
MEMORY_SETTINGS = ("batch_size", "image_size", "nz", "ngf", "ndf")
SECONDS = Rule(float, "a number from 0", lambda v: v >= 0)


def main(arguments=None):
    """Run a command; returns the exit status: 0, 1 after an error, 130 after an interrupt."""
    _open_closed_streams()
    out, errors = _Unbreakable(sys.stdout, needed=True), _Unbreakable(sys.stderr, needed=False)
    with redirect_stdout(out), redirect_stderr(errors), warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: _tell(f"warning: {message}")
        return _run(arguments)


def _run(arguments):
    try:
        try:
            args = _parser().parse_args(arguments)
            _check_backend()
            with limited_memory(as_device(args.device)):
                return args.run(args)
        finally:
            sys.stdout.flush()  # At Python's exit it would be too late to say why it failed.
    except (BadInput, Diverged) as error:
        _tell(f"error: {error}")
    except (MemoryError, OSError, RuntimeError) as error:
        amount = missing_memory(error)
        if amount:
            _tell(f"error: expected enough memory, got no room for {amount}: {_remedy(args)}")
        elif isinstance(error, OSError):  # A full disk, a folder that must not be written to.
            _tell(f"error: expected files that can be read and written, but {error}")
        else:
            raise
    except KeyboardInterrupt:
        _tell("interrupted")
        return 130
    return 1


def _open_closed_streams():
    """Open the null device where a standard stream is closed.

    The next file that is opened, a checkpoint perhaps, would get its number, and then whatever
    libraries and compilers write there.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            descriptor = os.open(os.devnull, os.O_RDWR)
            os.set_inheritable(descriptor, True)
            setattr(sys, name, os.fdopen(descriptor, mode))


class _Unbreakable:
    """A text stream that goes on into the null device when it cannot be written to any more.

    Args:
        stream: the stream.
        needed: whether an error is to be raised the first time, unless only the reader has gone.
    """

    def __init__(self, stream, needed):
        self._stream = stream
        self._needed = needed

    def __getattr__(self, name):
        return getattr(self._stream, name)

    def write(self, text):
        self._unless_broken(self._stream.write, text)
        return len(text)

    def flush(self):
        self._unless_broken(self._stream.flush)

    def _unless_broken(self, function, *arguments):
        try:
            function(*arguments)
        except OSError as error:
            with open(os.devnull, "w") as null:
                os.dup2(null.fileno(), self._stream.fileno())
            if self._needed and error.errno not in (errno.EPIPE, errno.EIO):
                raise


def _remedy(args):
    """What to do where memory is short."""
    lowered = ["--num"] if args.run is _sample else []
    if args.run is _train and args.resume is None:
        names = ("image_size", *DEFAULTS[args.model])
        lowered = [option(name) for name in MEMORY_SETTINGS if name in names]
    if not lowered:
        return "free some, or give another --device"
    return "lower " + ", ".join(lowered[:-1]) + (" or " if lowered[1:] else "") + lowered[-1]


def _check_backend():
    try:
        selected_backend()
        first_use.why_off(torch.device("cpu"))
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
    """The path of the checkpoint to go on from, or None where a run is to begin."""
    if args.resume is None:
        if args.data is None:
            raise BadInput("expected --data, which only --resume can do without, got none")
        return None
    if args.resume is not True:
        return _checkpoint_file(args.resume)
    if args.out is None and args.data is None:
        raise BadInput("expected --resume with --out, --data or a checkpoint, got it alone")
    path = _default_out(args) / CHECKPOINT_NAME
    if args.data is None or os.path.lexists(path):
        return path
    _tell(f"there is no checkpoint at {path} yet: a new run begins")
    return None


def _checkpoint_file(name):
    """The path of a checkpoint, given by itself or by the folder of its run."""
    path = Path(name)
    return path / CHECKPOINT_NAME if path.is_dir() else path


def _out_folder(args, resume_from):
    """The folder to write into; BadInput at once, not after the images, if that must not be."""
    out = resume_from.parent if resume_from and args.out is None else _default_out(args)
    folder.check(out, resume_from)
    return out


def _default_out(args):
    return Path(args.out or f"runs/{args.model}-{Path(args.data).resolve().name}")


def _sample(args):
    path, device = _checkpoint_file(args.checkpoint), _working_device(args.device)
    sample_checkpoint(path, args.num, args.out, device=device, seed=args.seed, ema=not args.no_ema)
    print(Path(args.out))
    return 0


def _env(args):
    device = as_device(args.device)
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
    off = first_use.why_off(device)
    print(f"first use  {f'not timed, because {off}' if off else 'timed'}")
    print(f"timings    {_kept_timings(device)}")
    return 0


def _kept_timings(device):
    """The file of what first uses found, and how much of it holds here."""
    try:
        path = timings.path()
        found, bad = timings.read(path)
    except (timings.NotOurs, OSError) as error:
        return f"not used, because {error}"
    here = sum((timing.gpu, timing.versions) == first_use.where(device) for timing in found)
    unreadable = f", {bad} lines that cannot be read" if bad else ""
    return f"{path}: {here} products for this GPU and versions, {len(found)} in all{unreadable}"


def _demo(args):
    return 0 if demo(Path(args.out), _working_device(args.device)) else 130


def _working_device(name):
    """As `as_device`; BadInput if GENFAST_BACKEND asks for kernels that cannot run there."""
    device = as_device(name)
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


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        """Say what is wrong with an option in one line; argparse would print all options too."""
        _tell(f"error: {message}; python -m {self.prog} --help says what there is")
        sys.exit(2)


def _parser():
    parser = _Parser(prog="genfast", description=genfast.__doc__)
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
        type=_type(RULES["background"]),
        metavar="COLOUR",
        help="what lies behind transparent images: white, black or a colour such as '#ff8800' "
        "(default: white)",
    )
    parser.add_argument(
        "--image-size",
        type=_type(RULES["image_size"]),
        metavar="PIXELS",
        help=f"height and width; {' and '.join(CONVOLUTIONAL)} take "
        f"{', '.join(map(str, IMAGE_SIZES))}, the others any (default: 16 for digits, 32 with "
        "dcgan; 64 for photos and folders; that of the images for arrays)",
    )
    _add_setting(parser, "batch_size", "images a step")
    _add_setting(parser, "epochs", "passes over the images")
    _add_setting(parser, "lr", "learning rate of Adam")
    _add_setting(parser, "beta1", "beta1 of Adam")
    _add_setting(parser, "nz", "length of the noise or latent vector")
    _add_setting(parser, "ngf", "channels next to the image in the generator or VAE")
    _add_setting(parser, "ndf", "channels next to the image in the discriminator")
    _add_setting(parser, "seed", "of weights, noise and the order of the images")
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        help="bf16 and fp16 are autocast; auto takes bf16 where it is fast, else fp32 "
        "(default: auto)",
    )
    parser.add_argument(
        "--loss",
        choices=tuple(GAN_LOSSES),
        help="what a GAN's networks minimise (default: non-saturating)",
    )
    parser.add_argument(
        "--ema",
        type=_type(RULES["ema"]),
        metavar="DECAY",
        help="keep an average of a GAN's generator, 0.999 for example, from which pictures are "
        "drawn (default: none)",
    )
    _add_device(parser)
    parser.add_argument("--out", help="folder of the run (default: runs/MODEL-DATA)")
    parser.add_argument(
        "--resume",
        nargs="?",
        const=True,
        metavar="CHECKPOINT",
        help=f"go on from a checkpoint or a run's folder (default: {CHECKPOINT_NAME} in --out, or "
        "a new run if there is none yet); of the settings only --epochs may change",
    )
    parser.add_argument(
        "--checkpoint-seconds",
        type=_type(SECONDS),
        default=CHECKPOINT_SECONDS,
        metavar="S",
        help="time between two checkpoints (default: %(default)s)",
    )


def _add_sample(commands):
    parser = commands.add_parser("sample", help="draw images with a trained model")
    parser.set_defaults(run=_sample)
    parser.add_argument("checkpoint", help="the file, or the folder of a run")
    parser.add_argument("--num", type=_type(whole()), default=64, help="(default: %(default)s)")
    parser.add_argument("--out", default="samples.png", help="PNG (default: %(default)s)")
    parser.add_argument(
        "--seed", type=_type(RULES["seed"]), default=0, help="(default: %(default)s)"
    )
    parser.add_argument(
        "--no-ema",
        action="store_true",
        help="draw from the newest generator where a run kept an average of it",
    )
    _add_device(parser)


def _add_device(parser):
    parser.add_argument(
        "--device",
        default="auto",
        help="cpu, cuda, cuda:N, or auto for a GPU if there is one (default: %(default)s)",
    )


def _add_setting(parser, name, text):
    rule = RULES[name]
    parser.add_argument(
        option(name),
        type=_type(rule),
        metavar="N" if rule.kind is int else "X",
        help=f"{text} (default: {_defaults_of(name)})",
    )


def _type(rule):
    """A rule as a type for argparse."""

    def convert(text):
        try:
            return rule.read(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return convert


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
