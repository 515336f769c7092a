"""Flags: what speaks against a network's robustness numbers, one function each.

They are the checks of Carlini et al. (arXiv 1902.06705) and of AutoAttack (Croce & Hein, ICML 2020), and two that those
leave out: a softmax's loss whose gradient float32 has lost, and a gradient that is not the network's slope. A flag is
made of the network's answers, its gradients (gradients.py), or the ladder of attacks (ladder.py).

Dimension key: B batch, C H W image, K classes, N images.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from retemper.engine.sanity.gradients import Shares
from retemper.engine.sanity.ladder import STARTS, Ladder, fraction

SOME_IMAGES = 0.001  # honest networks in float32 have none: one image of a few hundred raises the flag
SOME_PIXELS = 0.01
OFF_SLOPE = 0.1  # measured: 0 % for networks with and without robust training, above 99 % for rounded inputs
RANDOM = 1e-4  # of the logits' norm: AutoAttack's own bound, above what reordered sums in float32 do
SATURATED = 24 * math.log(2)  # the gap of logits beyond which float32 rounds the larger one's softmax to 1
DLR_CLASSES = 4  # the targeted DLR loss divides by z_1 - (z_3 + z_4) / 2
# on 300 digits at the radius of training honest networks stay below 0.8 % and 3.7 %; at 5/3 of it, where an attack of
# few steps is truly weak, below 4.7 % and 10.4 %
LUCK = 0.01  # of the images, by which one attack may beat a stronger one
MORE_STARTS = 0.08
SQUARE_HELPS = 0.002  # of the images: AutoAttack's own bound
ADVICE = ("few_classes",)  # says which attacks make sense, and nothing against the network


@dataclass(frozen=True)
class Flag:
    """One check: raised when `value`, which is None where it could not be measured, lies beyond `threshold`."""

    name: str
    raised: bool
    value: float | None
    threshold: float
    text: str  # one sentence for the reader


def training_mode(model: nn.Module) -> Flag:
    """Raise the flag for modules in training mode: batch norm then answers for the batch, dropout at random."""
    count = sum(module.training for module in model.modules())
    return _above("training_mode", count, 0, f"{count} modules are in training mode; an evaluation wants none.")


def not_finite_weights(model: nn.Module) -> Flag:
    """Raise the flag for parameters and buffers that hold a NaN or an infinity."""
    count = sum(not value.isfinite().all() for value in model.state_dict().values())
    return _above("not_finite_weights", count, 0, f"{count} weights or statistics hold numbers that are not finite.")


def random_outputs(model: nn.Module, image: Tensor, calls: int = 4) -> Flag:
    """Raise the flag if the same (B, C, H, W) images get other logits from call to call."""
    with torch.no_grad():
        first, *others = (model(image) for _ in range(calls))
        apart = max(_apart(other, first) for other in others)
    text = f"the same images get logits that differ by {apart:.2g} of their size from call to call; they should not."
    return _above("random_outputs", apart, RANDOM, text)


def batch_dependent(model: nn.Module, image: Tensor, logits_BK: Tensor) -> Flag:
    """Raise the flag if images get other logits in other company: one alone, a half, and all in reverse order.

    Args:
        image: (B, C, H, W) pixels.
        logits_BK: what the network answered to them as one batch.
    """
    half = -(-len(image) // 2)
    with torch.no_grad():
        others = [model(image[:1]).float(), model(image[:half]).float(), model(image.flip(0)).float().flip(0)]
    apart = max(_apart(other, logits_BK[: len(other)]) for other in others)
    text = f"the same images get logits that differ by {apart:.2g} of their size in another batch; they should not."
    return _above("batch_dependent", apart, RANDOM, text)


def changes_images(model: nn.Module, image: Tensor) -> Flag:
    """Raise the flag if the network writes into the (B, C, H, W) images that it is given; the attacks need them."""
    given = image.clone()
    with torch.no_grad():
        model(given)
    changed = fraction((given != image).flatten(1).any(1))
    text = f"the network overwrites {changed:.1%} of the images that it is given; give it copies."
    return _above("changes_images", changed, 0.0, text)


def not_finite_logits(logits_NK: Tensor, ladder: Ladder) -> Flag:
    """Raise the flag for images whose logits hold a NaN or an infinity, clean or on any rung of the ladder."""
    clean = fraction(~logits_NK.isfinite().all(1))
    under = max(map(fraction, ladder.not_finite.values()), default=0.0)
    text = f"{clean:.1%} of the images get logits that are not finite, {under:.1%} under attack; they count as wrong."
    return _above("not_finite_logits", max(clean, under), 0.0, text)


def near_chance(ladder: Ladder, classes: int) -> Flag:
    """Raise the flag if the network is no better than guessing: the other checks then see hardly an image to break."""
    chance, clean, images = 1 / classes, ladder.accuracy("clean"), len(ladder.attack["clean"])
    least = chance + 3 * math.sqrt(chance * (1 - chance) / images)
    text = f"{clean:.1%} of {images} images are classified correctly, by guessing {chance:.1%} are: nothing was tested."
    return Flag("near_chance", clean <= least, clean, least, text)


def probabilities(logits_NK: Tensor) -> Flag:
    """Raise the flag if the (N, K) outputs are a softmax already, which the losses would flatten by another one."""
    in_range_N = ((logits_NK >= -1e-5) & (logits_NK <= 1 + 1e-5)).all(1)
    share = fraction(in_range_N & ((logits_NK.sum(1) - 1).abs() < 1e-5))
    return _above("probabilities", share, 0.99, f"{share:.1%} of the outputs are probabilities; attacks need logits.")


def few_classes(num_classes: int) -> Flag:
    """Raise the flag if there are too few classes for AutoAttack's targeted DLR loss: advice, not a reproach."""
    text = f"there are {num_classes} classes; AutoAttack's targeted DLR loss needs {DLR_CLASSES}."
    return Flag("few_classes", num_classes < DLR_CLASSES, num_classes, DLR_CLASSES, text)


def logit_scale(logits_NK: Tensor) -> Flag:
    """Raise the flag if half of the images have a softmax that float32 rounds to 1: the rest of its loss misleads."""
    top_N2 = logits_NK.topk(min(2, logits_NK.shape[1]), 1).values
    gap = float((top_N2[:, 0] - top_N2[:, -1]).median())
    text = f"the largest logit leads by {gap:.3g} (median); float32 rounds the softmax to 1 from {SATURATED:.1f} on."
    return _above("logit_scale", gap, SATURATED, text)


def zero_gradients(probes: Mapping[str, Shares]) -> Flag:
    """Raise the flag for images whose gradient is zero, of any loss, at the clean image or at a random start."""
    share, where = _worst(probes, "zero")
    text = f"{share:.1%} of the images have a gradient of exactly zero{where}; an attack that follows it cannot move."
    return _above("zero_gradients", share, SOME_IMAGES, text)


def not_finite_gradients(probes: Mapping[str, Shares]) -> Flag:
    """Raise the flag for images whose gradient has NaN or infinite entries, of any loss, at either point."""
    share, where = _worst(probes, "not_finite")
    text = f"{share:.1%} of the images have a gradient that is not finite{where}; an attack cannot follow it."
    return _above("not_finite_gradients", share, SOME_IMAGES, text)


def underflow(probes: Mapping[str, Shares]) -> Flag:
    """Raise the flag for pixels that lose their gradient in float32 alone.

    Other pixels may have none for good reasons: a ReLU network can ignore an empty border.
    """
    share, where = _worst(probes, "underflow")
    text = f"{share:.1%} of the pixels have a gradient that float32 rounds to zero{where}; there an attack cannot move."
    return _above("underflow", share, SOME_PIXELS, text)


def off_slope(probes: Mapping[str, Shares]) -> Flag:
    """Raise the flag for images where the network does not go where its gradient points."""
    share, where = _worst(probes, "off_slope")
    promise = f"a tiny step along the gradient does not do what the gradient promises{where}"
    text = f"for {share:.1%} of the images {promise}."
    return _above("off_slope", share, OFF_SLOPE, text)


def zero_radius(ladder: Ladder) -> Flag:
    """Raise the flag if an attack of radius 0 changes a verdict."""
    share = fraction(ladder.radius[0.0] != ladder.attack["clean"])
    return _above("zero_radius", share, 0.0, f"an attack of radius 0 changes the verdict on {share:.1%} of the images.")


def radius_rises(ladder: Ladder) -> Flag:
    """Raise the flag if a larger radius leaves more images correct than the next smaller one."""
    left = [fraction(verdict_N) for verdict_N in ladder.radius.values()]
    rise = max(larger - smaller for smaller, larger in pairwise(left))
    return _by_luck("radius_rises", rise, ladder, f"a larger radius is {_points(-rise)} than the next smaller one.")


def radius_end(ladder: Ladder) -> Flag:
    """Raise the flag if images stay correct when every image is in the ball."""
    left = fraction(ladder.radius[1.0])
    text = f"{left:.1%} of the images stay correct when every pixel is free; an attack that works leaves none."
    return _by_luck("radius_end", left, ladder, text)


def more_steps(ladder: Ladder) -> Flag:
    """Raise the flag if PGD gets weaker from 1 step to 10, or from 10 to 50."""
    rise = max(ladder.accuracy(more) - ladder.accuracy(few) for few, more in pairwise(("pgd1", "pgd10", "pgd50")))
    return _by_luck("more_steps", rise, ladder, f"PGD with more steps is {_points(-rise)} than with fewer.")


def more_starts(ladder: Ladder) -> Flag:
    """Raise the flag if PGD-10 gains much from two more random starts: it then finds only what lies next to each."""
    gain = ladder.accuracy(STARTS[0]) - fraction(torch.stack([ladder.attack[name] for name in STARTS]).all(0))
    text = f"two more random starts break {gain:.1%} of the images; where the loss is smooth they hardly matter."
    return _by_luck("more_starts", gain, ladder, text, MORE_STARTS)


def single_step(ladder: Ladder) -> Flag:
    """Raise the flag if FGSM is stronger than PGD-50."""
    lead = ladder.accuracy("pgd50") - ladder.accuracy("fgsm")
    return _by_luck("single_step", lead, ladder, f"the single step of FGSM is {_points(lead)} than PGD-50.")


def noise(ladder: Ladder) -> Flag:
    """Raise the flag if random noise in the ball is stronger than PGD-50."""
    lead = ladder.accuracy("pgd50") - ladder.accuracy("noise")
    return _by_luck("noise", lead, ladder, f"random noise is {_points(lead)} than PGD-50.")


def transfer(ladder: Ladder) -> Flag:
    """Raise the flag if images made to fool the teacher fool the student better than those made to fool the student."""
    if "transfer" not in ladder.attack:
        return _by_luck("transfer", math.nan, ladder, "not run: no teacher is at hand.")
    lead = ladder.accuracy("pgd50") - ladder.accuracy("transfer")
    text = f"an attack made on the teacher is {_points(lead)} than PGD-50 on the network itself."
    return _by_luck("transfer", lead, ladder, text)


def black_box(ladder: Ladder) -> Flag:
    """Raise the flag if a short search without gradients breaks what no attack by gradients broke."""
    if "square" not in ladder.attack:
        return _by_luck("black_box", math.nan, ladder, "not run: pip install 'retemper[eval]' brings Square.")
    found = fraction(ladder.white_box & ~ladder.attack["square"])
    text = f"Square, a search without gradients, breaks {found:.1%} of the images that no attack by gradients broke."
    return _by_luck("black_box", found, ladder, text)


def square_helps(broken: int, images: int) -> Flag:
    """Raise the flag if AutoAttack's Square broke images that its attacks by gradients had left. Two may be luck."""
    text = f"in AutoAttack, Square broke {broken / images:.1%} of the images that no attack by gradients broke."
    return _above("square_helps", broken / images, max(SQUARE_HELPS, 2 / images), text)


OF_GRADIENTS = (zero_gradients, not_finite_gradients, underflow, off_slope)
OF_LADDER = (zero_radius, radius_rises, radius_end, more_steps, more_starts, single_step, noise, transfer, black_box)


def _above(name: str, value: float, threshold: float, text: str) -> Flag:
    """Return a flag that is raised above the threshold; NaN stands for what was not measured."""
    known = math.isfinite(value)
    return Flag(name, known and value > threshold, value if known else None, threshold, text)


def _apart(other_BK: Tensor, first_BK: Tensor) -> float:
    """Return by how much two answers differ, in terms of the size of the first; NaN where either is not finite."""
    return float((other_BK - first_BK).norm() / (first_BK.norm() + 1e-10))


def _by_luck(name: str, value: float, ladder: Ladder, text: str, share: float = LUCK) -> Flag:
    """Return a flag that is raised three standard errors above the share that honest networks have.

    So few images prove little.
    """
    error = math.sqrt(share * (1 - share) / len(ladder.attack["clean"]))
    return _above(name, value, share + 3 * error, text)


def _worst(probes: Mapping[str, Shares], fact: str) -> tuple[float, str]:
    """Return the largest share of `fact`, and in words under which loss and where."""
    shares = {name: shares[fact] for name, shares in probes.items() if fact in shares}
    name = max(shares, key=lambda name: shares[name], default="")
    share = shares.get(name, math.nan)
    return share, f" ({name.replace('_', '-')})" if share > 0 else ""


def _points(lead: float) -> str:
    """Return by how many points of accuracy an attack is stronger, in words."""
    return f"{100 * abs(lead):.1f} points {'stronger' if lead > 0 else 'weaker'}"
