"""The class weights of Fair-ARD: classes that fall to fewer attack steps count more (Yue et al., NeurIPS 2023).

w[k] <- clip(K v[k] / sum v, 5/6, 5/2)   where   v[k] = (1 / (kappa[k] + 1e-5)) ** beta

kappa[k] is the class's mean difficulty: how many of the attack's iterates, the last one apart, the student still
classifies correctly. The weights are not normalised again after the clip.
"""

from torch import Tensor

FLOOR = 1e-5  # a class that is never classified correctly has kappa = 0


def class_weight(kappa_K: Tensor, beta: float = 2.0, lower: float = 5 / 6, upper: float = 5 / 2) -> Tensor:
    """The next epoch's class weights.

    Args:
        kappa_K: (K,) float, each in [0, number of attack steps].
        beta: how strongly difficulty counts; 0 weighs all classes alike.
    Returns:
        (K,), like `kappa_K`, each in [lower, upper].
    Raises:
        ValueError: `kappa_K` is not one-dimensional.
    """
    if kappa_K.dim() != 1:
        raise ValueError(f"kappa_K has shape {tuple(kappa_K.shape)}: it must be (K,)")
    raw_K = (kappa_K + FLOOR).reciprocal() ** beta
    return (raw_K * kappa_K.numel() / raw_K.sum()).clamp(lower, upper)
