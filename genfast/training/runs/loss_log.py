"""metrics.csv: the losses of every step, fetched from the device now and then."""

import csv
import math
import time
import warnings

import torch

from genfast.training.errors import Diverged
from genfast.training.files import replacing

FIRST, LAST = ["step", "epoch"], ["images_per_second"]
NOTHING = 5e-4  # A loss below is 0.000 where it is shown.


def is_header(columns):
    """Whether these are the columns of such a file, whatever the losses in it are."""
    return columns[:2] == FIRST and columns[2:][-1:] == LAST


class LossLog:
    """Collects the losses of each step and writes them as rows of a CSV file.

    Columns: step, epoch, the losses, images_per_second (over the steps fetched together).

    Args:
        path: the file. What it holds of steps up to `keep` stays; what lies beyond, and a row that
            a crash cut short, goes.
        names: the names of the losses.
        batch_size: images a step.
        keep: the number of steps that a resumed run has behind it.

    Attributes:
        lost: how many of the newest steps in a row gave the discriminator a loss of next to 0.
        passes_over: whether losses that are not finite are written like others.
    """

    passes_over = False

    def __init__(self, path, names, batch_size, keep=0):
        self.path = path
        self.columns = [*FIRST, *names, *LAST]
        self.names = names
        self.batch_size = batch_size
        self.lost = 0
        self._pending = []
        self._write_kept_rows(keep)
        self.restart_clock()

    def restart_clock(self):
        """Let the time until now not count as training."""
        self._since = time.perf_counter()

    def age(self):
        """Seconds since the last `flush` or `restart_clock`."""
        return time.perf_counter() - self._since

    def add(self, step, epoch, result):
        """Take note of the losses of a step, scalar tensors, without waiting for the device."""
        self._pending.append((step, epoch, torch.stack(result)))

    def flush(self):
        """Write what was added and return the newest losses and the speed, formatted.

        Raises:
            Diverged: a loss is not finite, unless that is passed over.
        """
        if not self._pending:
            return {}
        losses = torch.stack([row for *_, row in self._pending]).tolist()  # Waits for the device.
        rate = len(losses) * self.batch_size / self.age()
        positions = [row[:2] for row in self._pending]
        self._pending = []
        self.restart_clock()
        with open(self.path, "a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            for position, row in zip(positions, losses, strict=True):
                writer.writerow([*position, *row, f"{rate:.1f}"])
        for (step, _), row in zip(positions, losses, strict=True):
            d_loss = dict(zip(self.names, row, strict=True)).get("d_loss", math.inf)
            self.lost = self.lost + 1 if abs(d_loss) < NOTHING else 0
            if not (self.passes_over or all(map(math.isfinite, row))):
                values = ", ".join(f"{n} {v}" for n, v in zip(self.names, row, strict=True))
                raise Diverged(f"training diverged: the losses of step {step} are {values}")
        newest = {name: f"{v:.3f}" for name, v in zip(self.names, losses[-1], strict=True)}
        return newest | {"images/s": f"{rate:.0f}"}

    def _write_kept_rows(self, keep):
        rows = []
        if keep and self.path.exists():
            with open(self.path, encoding="utf-8", errors="replace") as file:
                lines = [line.rstrip("\n").split(",") for line in file]
            rows = [line for line in lines if self._is_row(line)]
            # Those at the ends are the header, and a row that a crash may have cut short.
            strays = sum(not self._is_row(line) for line in lines[1:-1])
            if strays:
                warnings.warn(
                    f"left out {strays} lines of {self.path} that are no losses", stacklevel=3
                )
            rows = [row for row in rows if float(row[0]) <= keep]
        with replacing(self.path) as file:
            lines = [",".join(row) for row in [self.columns, *rows]]
            file.write(("\n".join(lines) + "\n").encode())

    def _is_row(self, fields):
        try:
            return len([float(field) for field in fields]) == len(self.columns)
        except ValueError:
            return False
