"""How long a run still takes, estimated from what its steps and the ends of its epochs have taken so far."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from retemper.engine.recipe import Recipe

WARM_UP = 2  # steps of a process that are not counted: they compile, allocate and tune


class Pace:
    """The clock of a run.

    Args:
        steps: how many an epoch has.
        max_steps: the steps after which the run is cut; None where it is not.
    """

    def __init__(self, recipe: Recipe, steps: int, max_steps: int | None = None) -> None:
        self.recipe, self.steps = recipe, steps
        whole = recipe.optim.epochs * steps
        self.last = whole if max_steps is None else min(whole, max_steps)
        self.taken, self.counted, self.counted_s, self.at = 0, 0, 0.0, 0.0
        self.ends: dict[bool, list[float]] = {True: [], False: []}  # seconds, by whether the epoch was looked at

    def allowed(self, epoch: int) -> int:
        """Return how many steps of `epoch`, from 1, the run is to take."""
        return max(0, min(self.steps, self.last - (epoch - 1) * self.steps))

    def begin(self) -> None:
        """Start the clock before steps that follow one another."""
        self.at = time.monotonic()

    def step(self) -> None:
        """Count a step."""
        now = time.monotonic()
        self.taken += 1
        if self.taken > WARM_UP:
            self.counted, self.counted_s = self.counted + 1, self.counted_s + now - self.at
        self.at = now

    @contextmanager
    def ending(self, epoch: int) -> Iterator[None]:
        """Count the time inside as that of the end of `epoch`: held-out images, averages, files."""
        started = time.monotonic()
        yield
        self.ends[self._is_due(epoch)].append(time.monotonic() - started)

    def left_s(self, epoch: int, done: int) -> float | None:
        """Return the seconds that are left after so many steps of `epoch`; None before a step was counted.

        The end of an epoch of a kind that has not come yet counts as nothing.
        """
        if not self.counted:
            return None
        to_do = max(0, self.last - (epoch - 1) * self.steps - done)
        due = [self._is_due(one) for one in range(epoch, -(-self.last // self.steps) + 1)]
        end_s = {kind: sum(taken) / max(1, len(taken)) for kind, taken in self.ends.items()}
        return to_do * self.counted_s / self.counted + sum(end_s[kind] for kind in due)

    def _is_due(self, epoch: int) -> bool:
        return self.recipe.selection.is_due(epoch, self.recipe.optim.epochs)
