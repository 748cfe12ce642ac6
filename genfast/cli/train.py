"""`genfast train`: a run begins, or goes on."""

import argparse
import os
import shlex
from pathlib import Path

from genfast.cli.options import add_device, of_rule, working_device
from genfast.cli.streams import tell
from genfast.training import progress
from genfast.training.errors import BadInput
from genfast.training.runs import board, folder, kept
from genfast.training.runs.api import prepared
from genfast.training.runs.checkpoint import NAME as CHECKPOINT_NAME
from genfast.training.runs.checkpoint import file_of
from genfast.training.runs.config import LENGTHS
from genfast.training.runs.devices import check_precision
from genfast.training.runs.loop import CHECKPOINT_SECONDS, KEEP, SAMPLE_EVERY, train
from genfast.training.runs.models import MODELS
from genfast.training.runs.rules import FROM_0
from genfast.training.runs.settings import SETTINGS, option
from genfast.training.runs.workers import command_again, joined

# Those that decide how much memory training takes.
MEMORY_SETTINGS = ("batch_size", "image_size", "nz", "ngf", "ndf", "importance_samples")


def add(commands):
    """Add the command to a parser's."""
    parser = commands.add_parser("train", help="train a model on images")
    parser.set_defaults(run=run, memory_options=memory_options, spreads=True)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument(
        "--data",
        help="digits or photos (from scikit-learn), a folder of png, jpg or webp images, a .npy or "
        ".npz file of uint8 images, or MNIST's IDX files",
    )
    for name, setting in SETTINGS.items():
        _add_setting(parser, name, setting)
    add_device(parser)
    parser.add_argument("--out", help="folder of the run (default: runs/MODEL-DATA)")
    parser.add_argument(
        "--resume",
        nargs="?",
        const=True,
        metavar="CHECKPOINT",
        help=f"go on from a checkpoint or a run's folder (default: {CHECKPOINT_NAME} in --out, or "
        "a new run if there is none yet); of the settings only --epochs or --steps may change",
    )
    parser.add_argument(
        "--init-from",
        nargs="+",
        metavar="WEIGHTS",
        help="begin with the weights of a checkpoint or a run's folder, or with those of PyTorch's "
        "public DCGAN example, netG_epoch_24.pth, netD_epoch_24.pth or both; a run that goes on "
        "keeps to those of its checkpoint (default: random ones)",
    )
    parser.add_argument(
        "--checkpoint-seconds",
        type=of_rule(FROM_0),
        default=CHECKPOINT_SECONDS,
        metavar="S",
        help="time between two checkpoints (default: %(default)s)",
    )
    parser.add_argument(
        "--keep",
        type=of_rule(KEEP),
        default=0,
        metavar="N",
        help="keep the newest N checkpoints besides the last one, in the folder checkpoints "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--sample-every",
        type=of_rule(SAMPLE_EVERY),
        metavar="STEPS",
        help="steps from one sample picture to the next (default: an epoch)",
    )
    parser.add_argument(
        "--log",
        type=of_rule(board.LOGS),
        metavar="tensorboard",
        help="write losses and sample pictures for TensorBoard too, which must be installed",
    )
    parser.add_argument(
        "--quiet",
        action="store_true",
        help="show no progress: nothing but warnings, errors and the last picture's name",
    )


def _add_setting(parser, name, setting):
    help = f"{setting.text} (default: {setting.default or _defaults_of(name)})"
    rule = setting.rule
    if rule.kind is bool:
        on = any(kind.with_labels.get(name) for kind in MODELS.values())
        action = argparse.BooleanOptionalAction if on else "store_true"
        text = f"{setting.text} (default: where a run is conditional)" if on else setting.text
        parser.add_argument(option(name), action=action, default=None, help=text)
        return
    metavar = setting.metavar or ("N" if rule.kind is int else "X")
    if rule.choices:
        metavar = "{" + ",".join(map(str, rule.choices)) + "}"
    parser.add_argument(option(name), type=of_rule(rule), metavar=metavar, help=help)


def _defaults_of(name):
    """The default of a setting in words, such as "gan 50; dcgan 25, 80 on digits"."""
    words, values = [], set()
    for model, kind in MODELS.items():
        if name in kind.defaults:
            value, digits = kind.defaults[name], kind.on_digits.get(name)
            values |= {value} if digits is None else {value, digits}
            words.append(f"{model} {value}" + (f", {digits} on digits" if digits else ""))
    if len(values) == 1:
        (value,) = values
        return "none" if value is None else str(value)
    return "; ".join(words)


def run(args):
    """Train, or go on."""
    with joined(args.device) as (workers, device), progress.hidden(args.quiet):
        return _run(args, device, workers)


def _run(args, device, workers):
    config, images, out, resume_from, init_from = workers.together(
        lambda: _prepared(args, device, workers)
    )
    outcome = train(
        config,
        images,
        out,
        device=device,
        resume_from=resume_from,
        init_from=init_from,
        checkpoint_seconds=args.checkpoint_seconds,
        sample_every=args.sample_every,
        keep=args.keep,
        log=args.log,
        workers=workers,
    )
    with workers.first_alone():  # Who has said it ends first.
        if not outcome.interrupted:
            print(outcome.picture)
            return 0
        again = [*command_again(), "train", config.model, "--data", config.data]
        again += ["--out", str(out), *_length(config), *_outputs(args), "--resume"]
        tell(f"stopped after step {outcome.steps}; to go on: {shlex.join(again)}")
        return 130


def _prepared(args, device, workers):
    """The `Config`, the images, the folder, what to go on from and what to begin with, or None."""
    given = {name: getattr(args, name) for name in SETTINGS if getattr(args, name) is not None}
    device = working_device(device)
    check_precision(args.precision, device)
    board.check(args.log)
    resume_from = _resume_from(args)
    out = _out_folder(args, resume_from)
    config, images, init_from = prepared(
        args.model, args.data, given, out, resume_from, args.init_from, device, workers.count
    )
    return config, images, out, resume_from, init_from


def _length(config):
    """The option that says how long the run is to be."""
    (name,) = (name for name in LENGTHS if getattr(config, name) is not None)
    return [option(name), str(getattr(config, name))]


def _outputs(args):
    """The options that say what a run leaves, where they are not the defaults."""
    given = (("--keep", args.keep), ("--sample-every", args.sample_every), ("--log", args.log))
    return [text for name, value in given if value for text in (name, str(value))]


def _resume_from(args):
    """The path of the checkpoint to go on from, or None where a run is to begin."""
    if args.resume is None:
        if args.data is None:
            raise BadInput("expected --data, which only --resume can do without, got none")
        return None
    if args.resume is not True:
        return file_of(args.resume)
    if args.out is None and args.data is None:
        raise BadInput("expected --resume with --out, --data or a checkpoint, got it alone")
    path = _default_out(args) / CHECKPOINT_NAME
    if args.data is None or os.path.lexists(path):
        return path
    tell(f"there is no checkpoint at {path} yet: a new run begins")
    return None


def _out_folder(args, resume_from):
    """The folder to write into; BadInput at once, not after the images, if that must not be."""
    if resume_from and args.out is None and kept.is_kept(resume_from):
        raise BadInput(
            f"expected --out with {resume_from}, from which a run goes on in a folder of its own, "
            f"got none"
        )
    out = resume_from.parent if resume_from and args.out is None else _default_out(args)
    folder.check(out, resume_from)
    return out


def _default_out(args):
    return Path(args.out or f"runs/{args.model}-{Path(args.data).resolve().name}")


def memory_options(args):
    """The options that, lower, let a run that is to begin take less memory."""
    names = ("image_size", *MODELS[args.model].defaults)
    names = [name for name in MEMORY_SETTINGS if name in names and args.resume is None]
    return [option(n) for n in names if not SETTINGS[n].optional or getattr(args, n) is not None]
