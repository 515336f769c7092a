"""The random part of an epoch: the order of the images, and the view that each one is seen in.

Both are functions of (seed, epoch, position in the data set) alone. So any epoch can be drawn again, whatever the
backend, the batch size or the number of processes. A view, a crop and a flip, has an id:

    id = (dy * (2 p + 1) + dx) * 2 + flip        0 <= dy, dx <= 2 p;  p = padding;  0 <= id < 2 (2 p + 1)^2

(dy, dx) is where the crop begins in the image padded by p on every side. A strong view has too many choices for ids: it
is a number of 63 bits, from which `strong_augment` or `resized_crop` draws them, and -1 leaves the image as it is.
Only the raw 64-bit words of PCG64 are used: numpy promises not to change those, but not its permutations.
"""

from dataclasses import dataclass

import numpy as np

from retemper.errors import UsageError

# the last word of each seed, so that no stream repeats another
ORDER, VIEW, HOLDOUT, POOL, POOL_VIEW = 1, 2, 3, 4, 5


def random_words(n: int, *entropy: int) -> np.ndarray:
    """Draw (n,) uniform uint64: the same for the same `entropy`, and the first n of any longer draw.

    Raises:
        UsageError: a negative number in `entropy`.
    """
    if min(entropy) < 0:
        raise UsageError(f"a seed and an epoch must not be negative: {entropy}")
    return np.random.PCG64(np.random.SeedSequence(entropy)).random_raw(n)


def permutation(n: int, *entropy: int) -> np.ndarray:
    """Return 0 ... n - 1 in random order, (n,) int64. Raises UsageError as `random_words`."""
    return np.argsort(random_words(n, *entropy), kind="stable").astype(np.int64, copy=False)


def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """Return the order in which an epoch visits n images, (n,) int64. Raises UsageError as `random_words`."""
    return permutation(n, seed, epoch, ORDER)


@dataclass(frozen=True)
class ViewSpace:
    """The views that an image may be seen in: crops after padding, mirrored or not; or strong ones.

    padding: pixels on every side.
    flip: whether views may be mirrored.
    strong: draw the numbers of strong views, whatever they may show.

    Raises:
        UsageError: negative padding.
    """

    padding: int = 4
    flip: bool = True
    strong: bool = False

    def __post_init__(self) -> None:
        if self.padding < 0:
            raise UsageError(f"padding must not be negative: {self.padding}")

    @property
    def count(self) -> int:
        """Return the number of ids. They lie in [0, count); without flips only the even ones are drawn."""
        if self.strong:
            return 2**63
        return 2 * (2 * self.padding + 1) ** 2

    @property
    def identity(self) -> int:
        """Return the id of the view that leaves an image as it is; of strong views it is the only one below 0."""
        return -1 if self.strong else (self.padding * (2 * self.padding + 1) + self.padding) * 2

    def draw(self, n: int, seed: int, epoch: int, stream: int = VIEW) -> np.ndarray:
        """Return the views of n images in an epoch, (n,) int64; the i-th depends on (seed, epoch, stream, i) alone.

        Raises:
            UsageError: a negative seed or epoch.
        """
        words = random_words(n, seed, epoch, stream)
        if self.strong:
            return (words >> np.uint64(1)).astype(np.int64)
        # the remainder favours small ids by less than count / 2**64
        ids = words % np.uint64(self.count) if self.flip else words % np.uint64(self.count // 2) * np.uint64(2)
        return ids.astype(np.int64)


def holdout_split(
    labels: np.ndarray, per_class: int, seed: int = 0, place: str = "random"
) -> tuple[np.ndarray, np.ndarray]:
    """Hold `per_class` images of every class out of training.

    Args:
        labels: (N,) int64.
        per_class: images of each class.
        seed: decides which ones, where they are drawn.
        place: "random" to draw them, "start" or "end" to take the first or the last ones of each class.

    Returns:
        Positions to train on and positions held out, both sorted and int64; together they are 0 ... N - 1.

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
        if place == "random":
            members = members[permutation(len(members), seed, int(k), HOLDOUT)]
        held[members[len(members) - per_class :] if place == "end" else members[:per_class]] = True
    return np.flatnonzero(~held), np.flatnonzero(held)
