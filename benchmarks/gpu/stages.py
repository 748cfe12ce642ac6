"""The stages, and which sources each one's results depend on."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "gpu"
_LIBRARY = ("kernels/*.py", "genfast/**/*.py")


@dataclass(frozen=True)
class Stage:
    """A part of the work: `python -m benchmarks.gpu.NAME --seconds S` in a process of its own.

    sources: patterns of the files whose changes make its results outdated.
    It ends with status 0 when it is complete, 75 when it has more to do, and otherwise it failed.
    """

    name: str
    sources: tuple[str, ...] = _LIBRARY

    @property
    def fingerprint(self):
        """A digest of the sources."""
        digest = hashlib.sha256()
        for pattern in self.sources:
            for path in sorted(ROOT.glob(pattern)):
                digest.update(path.read_bytes())
        return digest.hexdigest()[:16]


MORE_TO_DO = 75
STAGES = (
    Stage("ceilings", ()),
    Stage("tests", (*_LIBRARY, "genfast/launch/tuned.csv", "tests/*.py")),
    Stage("sanitizer", ("kernels/*.py", "genfast/launch/*.py")),
    Stage("tuning", ("kernels/*.py", "genfast/launch/*.py")),
    Stage("blocks", (*_LIBRARY, "genfast/launch/tuned.csv")),
    Stage("steps", (*_LIBRARY, "genfast/launch/tuned.csv")),
    Stage("profile", (*_LIBRARY, "genfast/launch/tuned.csv")),
)


def fingerprint_of(name):
    """The fingerprint of the stage of that name."""
    return next(stage for stage in STAGES if stage.name == name).fingerprint
