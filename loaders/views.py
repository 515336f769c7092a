"""What is random in an epoch: the order of the images, and which view (crop and flip) each one is seen in.

Both are functions of (seed, epoch, position in the data set) alone, so that any epoch can be drawn again, whatever the
backend, the batch size or the number of processes. A view has an id:

    id = (dy * (2 p + 1) + dx) * 2 + flip        0 <= dy, dx <= 2 p;  p = padding;  0 <= id < 2 (2 p + 1)^2

dy and dx are where the crop begins in the image padded by p on every side.
Only the raw 64-bit words of PCG64 are used: numpy keeps those for ever, but not its permutations.
"""

from dataclasses import dataclass

import numpy as np

from retemper.errors import UsageError

# streams that must not repeat each other: the last word of each seed
ORDER, VIEW, HOLDOUT = 1, 2, 3


def random_words(n: int, *entropy: int) -> np.ndarray:
    """(n,) uint64, uniform; the same words for the same `entropy`, and the first n of any longer draw.

    Raises:
        UsageError: a negative number in `entropy`.
    """
    if min(entropy) < 0:
        raise UsageError(f"a seed and an epoch must not be negative: {entropy}")
    return np.random.PCG64(np.random.SeedSequence(entropy)).random_raw(n)


def permutation(n: int, *entropy: int) -> np.ndarray:
    """(n,) int64: 0 ... n - 1 in random order."""
    return np.argsort(random_words(n, *entropy), kind="stable").astype(np.int64, copy=False)


def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """(n,) int64: the order in which an epoch visits n images."""
    return permutation(n, seed, epoch, ORDER)


@dataclass(frozen=True)
class ViewSpace:
    """The views an image may be seen in: crops after padding, mirrored or not.

    Raises:
        UsageError: negative padding.
    """

    padding: int = 4
    flip: bool = True

    def __post_init__(self) -> None:
        if self.padding < 0:
            raise UsageError(f"padding must not be negative: {self.padding}")

    @property
    def count(self) -> int:
        """Ids lie in [0, count); without flips only the even ones are drawn."""
        return 2 * (2 * self.padding + 1) ** 2

    @property
    def identity(self) -> int:
        """The id of the image as it is."""
        return (self.padding * (2 * self.padding + 1) + self.padding) * 2

    def draw(self, n: int, seed: int, epoch: int) -> np.ndarray:
        """(n,) int64: the view of image i in this epoch; it depends on (seed, epoch, i) only."""
        words = random_words(n, seed, epoch, VIEW)
        # the remainder favours small ids by less than count / 2**64
        ids = words % np.uint64(self.count) if self.flip else words % np.uint64(self.count // 2) * np.uint64(2)
        return ids.astype(np.int64)


def holdout_split(labels: np.ndarray, per_class: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Take `per_class` images of every class away from training.

    Args:
        labels: (N,) int64.

    Returns:
        Positions to train on and positions held out, each sorted, int64; together they are 0 ... N - 1.

    Raises:
        UsageError: a class would be left with no image to train on.
    """
    if per_class < 0:
        raise UsageError(f"images held out of each class must not be negative: {per_class}")
    held = np.zeros(len(labels), dtype=bool)
    for k in np.unique(labels):
        members = np.flatnonzero(labels == k)
        if per_class >= len(members):
            raise UsageError(f"cannot hold out {per_class} images of each class: class {k} has {len(members)}")
        held[members[permutation(len(members), seed, int(k), HOLDOUT)[:per_class]]] = True
    return np.flatnonzero(~held), np.flatnonzero(held)
