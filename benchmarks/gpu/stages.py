"""The stages, and which sources each one's results depend on."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "gpu"
_PACKAGE = ("kernels/*.py", "genfast/**/*.py")


@dataclass(frozen=True)
class Stage:
    """A part of the work: `python -m benchmarks.gpu.NAME --seconds S` in a process of its own.

    sources: patterns of the files whose changes make its results outdated.
    It ends with status 0 when it is complete, 75 when it has more to do, and otherwise it failed.
    """

    name: str
    sources: tuple[str, ...] = _PACKAGE

    @property
    def digest(self):
        """A hash of the sources, 16 digits."""
        sha = hashlib.sha256()
        for pattern in self.sources:
            for path in sorted(ROOT.glob(pattern)):
                sha.update(path.read_bytes())
        return sha.hexdigest()[:16]


MORE_TO_DO = 75
STAGES = (
    Stage("ceilings", ()),
    Stage("tests", (*_PACKAGE, "genfast/launch/tuned.csv", "tests/*.py")),
    Stage("sanitizer", ("kernels/*.py", "genfast/launch/*.py")),
    Stage("tuning", ("kernels/*.py", "genfast/launch/*.py")),
    Stage("blocks", (*_PACKAGE, "genfast/launch/tuned.csv")),
    Stage("steps", (*_PACKAGE, "genfast/launch/tuned.csv")),
    Stage("overlap", (*_PACKAGE, "genfast/launch/tuned.csv")),
    Stage("profile", (*_PACKAGE, "genfast/launch/tuned.csv")),
)


def digest_of(name):
    """The digest of the stage of that name."""
    return next(stage for stage in STAGES if stage.name == name).digest
