"""A long tail of a training set: fewer images of each class than of the one before it.

    n_k = n_0 F^(-k / (K - 1))      k = 0 ... K - 1, rounded down;  F = n_0 / n_(K - 1), the imbalance factor

F is the largest class over the smallest, 100 or so, as in Cui et al. (CVPR 2019), who made the long-tailed CIFAR; much
code takes the inverse, 0.01. The classes keep their order: the first is the largest. n_0 is as large as leaves each
class enough images, so that F holds where classes are of unequal size too. Dimension key: N images, K classes.
"""

import numpy as np

from retemper.errors import UsageError
from retemper.loaders.views import permutation

TAIL = 11  # the last word of the seeds, as in views.py: no other stream has it


def tail_sizes(count_K: np.ndarray, factor: float) -> np.ndarray:
    """Return how many images of each class a long tail has, (K,) int64; a class may be left with none.

    Args:
        count_K: (K,) whole numbers, the images that there are of each class.
        factor: largest class over smallest; 1 makes all as large as the smallest.
    Raises:
        UsageError: `factor` is below 1.
    """
    if factor < 1:
        raise UsageError(f"an imbalance factor is the largest class over the smallest, 1 or more, not {factor:g}")
    share_K = factor ** -(np.arange(len(count_K)) / max(1, len(count_K) - 1))
    room = (np.asarray(count_K) / share_K).min()  # how large the first class may be, that all others suffice
    return np.floor(np.floor(room + 1e-9) * share_K + 1e-9).astype(np.int64)


def long_tail(label_N: np.ndarray, num_classes: int, factor: float) -> np.ndarray:
    """Return the positions of the images of a long tail, sorted, int64.

    They are drawn from each class with a fixed seed, so that they are the same in every run.

    Args:
        label_N: (N,) int64, each in [0, K).
        num_classes: K.
        factor: as in `tail_sizes`.
    Raises:
        UsageError: as `tail_sizes`; or a class has no image, so that there is no largest tail.
    """
    count_K = np.bincount(label_N, minlength=num_classes)
    size_K = tail_sizes(count_K, factor)
    if not count_K.all():
        raise UsageError(f"a long tail needs images of every class, and class {int(count_K.argmin())} has none")
    chosen = []
    for k, size in enumerate(size_K):
        members = np.flatnonzero(label_N == k)
        chosen.append(members[permutation(len(members), 0, k, TAIL)[:size]])
    return np.sort(np.concatenate(chosen))
