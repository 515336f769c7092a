"""How unevenly the classes fare, in numbers beside the smallest accuracy; and the weakest class without its bad luck.

    honest worst   = the accuracy on one half of the images of the class that is the weakest on the other half
    gini           = sum_kj |a_k - a_j| / (2 K^2 mean a); 0: all classes alike
    confusion norm = the largest singular value of P: P[k, j] = share of class k that is given j, P[k, k] = 0
    tau            = Kendall's tau-b of two lists: 1 in the same order, -1 in the opposite one, 0 in unrelated ones

The smallest of K accuracies was also unlucky: it lies below the true one on average, by nothing where one class is far
below the rest and by 1.5 standard errors where ten are alike. A class that one half of the images chose and the other
half measures was not chosen for its luck there. Its accuracy is that of a class which is at least as strong as the
weakest, so that the truth lies between the two on average. Each class is halved by itself; the mean over all halvings
has a closed form, so that none is drawn.

Gini (Variabilita e mutabilita, 1912); Machart and Ralaivola (arXiv 1202.6221) for the norm of the confusion matrix,
which CSR (Jin et al., ICLR 2025) lowers; Kendall (Biometrika 1945) for tau-b.
Dimension key: D draws, K classes, G accuracies that a half may have.
"""

import math

import numpy as np

NEVER = 1e-13  # what is less likely is left out
MOST_NODES = 8  # of the integral over ties: exact up to 16 classes, far below NEVER's effect on a number shown beyond
MOST_APART = 400  # accuracies that are told apart; where classes of many sizes have more, close ones count as equal
CELLS = 2**20  # of the tables that are held at once


def honest_worst(correct_DK: np.ndarray, count_K: np.ndarray) -> np.ndarray:
    """Return the accuracy on one half of the images of the class that is the weakest on the other, (D,) float64.

    It is a fraction: the mean over all halvings, with each half choosing in turn, and over the classes where several
    are equally weak. Nothing is drawn.

    Args:
        correct_DK: (D, K) whole numbers: the images of each class that were classified correctly, for D networks or
            draws.
        count_K: (K,) whole numbers, above 0: the images of each class.
    Returns:
        NaN for all where a class has a single image.
    """
    correct_DK, count_K = np.asarray(correct_DK, np.int64), np.asarray(count_K, np.int64)
    if count_K.min() < 2:
        return np.full(len(correct_DK), math.nan)
    sizes = {tuple(count_K // 2): count_K // 2, tuple(count_K - count_K // 2): count_K - count_K // 2}
    return np.mean([_chosen_on(size_K, correct_DK, count_K) for size_K in sizes.values()], axis=0)


def _chosen_on(size_K: np.ndarray, correct_DK: np.ndarray, count_K: np.ndarray) -> np.ndarray:
    """Return what `honest_worst` does, (D,), where `size_K` images of each class choose and the others measure."""
    share_DK = correct_DK / count_K
    # Serfling's bound: a half's accuracy is further from the whole's with a chance below NEVER
    reach_K = np.sqrt((1 - (size_K - 1) / count_K) * math.log(2 / NEVER) / (2 * size_K))
    low, high = (share_DK - reach_K).min(), (share_DK + reach_K).min(axis=1).max()
    grid_G = np.unique(np.concatenate([np.arange(n + 1) / n for n in np.unique(size_K)]))
    grid_G = grid_G[(grid_G >= low) & (grid_G <= high)]
    grid_G = grid_G[:: -(-len(grid_G) // MOST_APART)]
    part = max(1, CELLS // (len(count_K) * len(grid_G)))
    starts = range(0, len(correct_DK), part)
    return np.concatenate([_expected(grid_G, size_K, correct_DK[i : i + part], count_K) for i in starts])


def _expected(grid_G: np.ndarray, size_K: np.ndarray, correct_DK: np.ndarray, count_K: np.ndarray) -> np.ndarray:
    """Return the mean over the halvings in which the weakest class has an accuracy of `grid_G` or less than the next.

    The chance that m others tie with a class is in the mean of 1 / (m + 1), which is the integral over t from 0 to 1 of
    the product over the others of (chance to be above + t chance to tie).
    """
    chance_DKG, measured_DKG = np.zeros((2, *correct_DK.shape, len(grid_G)))
    for k, (size, count) in enumerate(zip(size_K, count_K, strict=True)):
        taken_A = np.arange(size + 1)
        first_G = np.searchsorted(taken_A / size, [*grid_G, math.inf])  # of those that count as each accuracy
        correct_U, draw_D = np.unique(correct_DK[:, k], return_inverse=True)
        chance_UA = _hypergeometric(taken_A, correct_U[:, None], size, count)
        measured_UA = chance_UA * (correct_U[:, None] - taken_A) / (count - size)
        for sums_DKG, of_UA in ((chance_DKG, chance_UA), (measured_DKG, measured_UA)):
            so_far_UA = np.pad(of_UA.cumsum(axis=1), ((0, 0), (1, 0)))
            sums_DKG[:, k] = np.diff(so_far_UA[:, first_G])[draw_D]
    above_DKG = (1 - chance_DKG.cumsum(axis=2)).clip(min=0)
    mean_D = np.zeros(len(correct_DK))
    for node, weight in zip(*np.polynomial.legendre.leggauss(min(MOST_NODES, -(-len(count_K) // 2))), strict=True):
        factor_DKG = above_DKG + (node + 1) / 2 * chance_DKG
        all_DG = factor_DKG.prod(axis=1)
        others_DKG = np.divide(all_DG[:, None], factor_DKG, out=np.zeros_like(factor_DKG), where=chance_DKG > 0)
        mean_D += weight / 2 * np.einsum("dkg,dkg->d", measured_DKG, others_DKG)
    return mean_D


def _hypergeometric(taken_A: np.ndarray, correct_U1: np.ndarray, size: int, count: int) -> np.ndarray:
    """Return the chance that `size` of `count` images hold `taken` of the `correct` ones, (U, A)."""
    log_factorial = np.concatenate([[0.0], np.log(np.arange(1, count + 1)).cumsum()])

    def log_choose(n: np.ndarray | int, k: np.ndarray | int) -> np.ndarray:
        return log_factorial[n] - log_factorial[k] - log_factorial[n - k]

    can_be_UA = (taken_A <= correct_U1) & (size - taken_A <= count - correct_U1)
    taken_UA, wrong_UA = np.where(can_be_UA, taken_A, 0), np.where(can_be_UA, size - taken_A, 0)
    log_UA = log_choose(correct_U1, taken_UA) + log_choose(count - correct_U1, wrong_UA) - log_choose(count, size)
    return np.where(can_be_UA, np.exp(log_UA), 0.0)


def gini(accuracy_DK: np.ndarray) -> np.ndarray:
    """Return Gini's coefficient of each row of (D, K) accuracies, (D,): 0 where all are alike, NaN where all are 0.

    At most 1 - 1/K, which one class alone that is ever right has.
    """
    sorted_DK, classes = np.sort(accuracy_DK, axis=1), accuracy_DK.shape[1]
    rank_K = 2 * np.arange(1, classes + 1) - classes - 1
    total_D = sorted_DK.sum(axis=1)
    return np.divide(sorted_DK @ rank_K, classes * total_D, out=np.full(len(total_D), math.nan), where=total_D > 0)


def confusion_norm(confusion_KK: np.ndarray, count_K: np.ndarray) -> float:
    """Return the spectral norm of the shares that are confused; 0 where no image is given another class.

    Args:
        confusion_KK: (K, K) counts, a row a true class, a column the class given.
        count_K: (K,) images of each class, those that were given none among them. A class of none has a row of 0.
    """
    share_KK = confusion_KK / np.maximum(count_K, 1)[:, None]
    return float(np.linalg.norm(share_KK - np.diag(share_KK.diagonal()), 2))


def kendall_tau(first_K: np.ndarray, second_K: np.ndarray) -> float:
    """Return Kendall's tau-b of two lists of (K,) numbers; places where either is NaN are left out.

    Returns:
        A number in [-1, 1]; NaN where all numbers of a list are equal, or fewer than two are left.
    """
    both_2K = np.array([first_K, second_K], dtype=np.float64)
    both_2K = both_2K[:, np.isfinite(both_2K).all(axis=0)]
    first_KK, second_KK = np.sign(both_2K[:, :, None] - both_2K[:, None])
    scale = math.sqrt((first_KK**2).sum() * (second_KK**2).sum())
    return float((first_KK * second_KK).sum() / scale) if scale else math.nan
