"""Which step is where in which epoch, also for a run that went on with other batches."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """Steps and epochs of a run.

    Attributes:
        length: the steps of an epoch.
        ahead: by how much the number of a step exceeds that of the batch it takes, both counted
            from the first epoch. 0 unless a run went on with another number of processes: then a
            batch of all of them, and an epoch's length, are others than they were.
    """

    length: int
    ahead: int = 0

    @classmethod
    def going_on(cls, length: int, steps: int, position: int, length_then: int) -> "Schedule":
        """That of a run after so many steps, when `position` batches had been taken.

        length_then: how many of those batches made an epoch. Of an epoch that had begun, as much
            is behind as was then; whole epochs stay whole.
        """
        epochs, part = divmod(position, length_then)
        return cls(length, steps - epochs * length - part * length // length_then)

    def position(self, step: int) -> int:
        """How many batches have been taken after this step."""
        return step - self.ahead

    def epoch(self, step: int) -> int:
        """The number of the epoch, from 1, that a step belongs to."""
        return math.ceil(self.position(step) / self.length)

    def ends_epoch(self, step: int) -> bool:
        """Whether an epoch ends with this step."""
        return self.position(step) % self.length == 0

    def total(self, config) -> int:
        """The number of the last step of a run with these settings."""
        return config.steps or config.epochs * self.length + self.ahead
