"""The last linear layer of a network, and what evens its classes there without training.

    norm    W[k] <- W[k] m / |W[k]|           m = mean of |W[j]|: all rows of one norm (HWNwB), the bias stays
    half    W[k] <- W[k] (m / |W[k]|) ** 1/2   half the way, as in tau-normalisation (Kang et al., ICLR 2020)
    bias    b[k] <- b[k] + s[k]               K numbers, moved in rounds by how class k fares under attack

A round adds u / sqrt(1 + round) (mean of a - a[k]) to s[k], where a[k] is the share of class k's images that are
right under attack. u is the median distance of the attacked images' logits from the boundary before the first round,
so that a step has the logits' own scale. The round with the largest average + worst class of a is kept. In the first
one, s = 0.

Dimension key: B batch, C channels, H, W, K classes, D features, N images.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from retemper.errors import UsageError

POWERS = {"norm": 1.0, "half": 0.5}
ROUNDS = 8


def find_head(network: nn.Module, image_BCHW: Tensor, whose: str) -> nn.Linear:
    """Return the linear layer whose output on some images is the network's answer.

    Args:
        network: in eval mode.
        whose: the network in words, to begin the message with.
    Raises:
        UsageError: there is no such layer, or its weights are made of others.
    """
    outputs: dict[nn.Linear, list[Tensor]] = {}

    def note(layer: nn.Linear) -> Callable[[nn.Module, object, Tensor], None]:
        return lambda _, __, output: outputs.setdefault(layer, []).append(output)

    linear = [layer for layer in network.modules() if isinstance(layer, nn.Linear)]
    hooks = [layer.register_forward_hook(note(layer)) for layer in linear]
    try:
        with torch.no_grad():
            answer_BK = network(image_BCHW)
    finally:
        for hook in hooks:
            hook.remove()
    heads = [layer for layer, found in outputs.items() if len(found) == 1 and torch.equal(found[0], answer_BK)]
    if len(heads) != 1 or parametrize.is_parametrized(heads[0]):
        raise UsageError(
            f"{whose} does not end in one linear layer whose output is its answer, which norm, half and bias change: "
            "--by csr or --by plain trains the whole network"
        )
    return heads[0]


def evened_rows(weight_KD: Tensor, power: float) -> Tensor:
    """Return the rows with norms that are nearer to their mean: (K, D), like `weight_KD`.

    Args:
        power: 1 for all norms equal, 0 for none changed. A row of zeros stays one.
    """
    norm_K = weight_KD.double().norm(dim=1)
    factor_K = torch.where(norm_K > 0, norm_K.mean() / norm_K, 1.0) ** power
    return (weight_KD.double() * factor_K[:, None]).to(weight_KD.dtype)


def next_shift(shift_K: Tensor, accuracy_K: Tensor, number: int, unit: float) -> Tensor:
    """Return the K numbers after round `number`, from 0: (K,), like `shift_K`."""
    return shift_K + unit / math.sqrt(1 + number) * (accuracy_K.mean() - accuracy_K).to(shift_K)


@dataclass(frozen=True, kw_only=True)
class Round:
    """A round of the fit: the numbers that it tried, and the share of each class that was right, both (K,) float64."""

    shift_K: Tensor
    accuracy_K: Tensor

    @property
    def score(self) -> float:
        """The average + worst class, by which a round is chosen."""
        return float(self.accuracy_K.mean() + self.accuracy_K.min())


def fit_bias(head: nn.Linear, attacked: Callable[[], Tensor], label_N: Tensor, rounds: int = ROUNDS) -> list[Round]:
    """Return the rounds of the fit, the first with all numbers 0; the bias is left as it was.

    Args:
        head: of the network that `attacked` attacks; it has a bias.
        attacked: attacks the network as it is then, and returns (N, K) logits of the attacked images.
        label_N: (N,) int64, on the logits' device; every class has an image.
        rounds: how often the numbers are moved.
    """
    classes = head.out_features
    before_K, unit, found = head.bias.detach().clone(), 0.0, list[Round]()
    shift_K = torch.zeros(classes, dtype=torch.float64, device=before_K.device)
    own_KN = (torch.arange(classes, device=label_N.device)[:, None] == label_N).double()
    try:
        for number in range(rounds + 1):
            with torch.no_grad():
                head.bias.copy_(before_K + shift_K)
            logits_NK = attacked()
            right_N = (logits_NK.argmax(1) == label_N).double()
            found.append(Round(shift_K=shift_K, accuracy_K=own_KN @ right_N / own_KN.sum(1)))
            unit = unit or float(margin(logits_NK, label_N).abs().median())
            shift_K = next_shift(shift_K, found[-1].accuracy_K, number, unit)
    finally:
        with torch.no_grad():
            head.bias.copy_(before_K)
    return found


def margin(logits_NK: Tensor, label_N: Tensor) -> Tensor:
    """Return by how much the label's logit exceeds the largest other one: (N,)."""
    own_N1 = logits_NK.gather(1, label_N[:, None])
    return (own_N1 - logits_NK.scatter(1, label_N[:, None], -math.inf).amax(1, keepdim=True)).squeeze(1)
