"""Probes of the input gradients that attacks follow, under the usual losses, image by image.

    underflow   a pixel whose gradient is 0 under a softmax's loss and not under the margin's: float32 has lost it, and
                sign(0) = 0 leaves the pixel where it is
    off slope   (f(x + h s) - f(x)) / (h |grad f|_1) outside [1/2, 2], s = sign(grad f), f the margin: the network does
                not go where its gradient points, as when it rounds its input and hands the gradient straight through

Every share is of the images that are classified correctly: there an attack has to move.

Dimension key: B batch, C H W image, K classes.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from retemper.engine.attack import predicts
from retemper.engine.device import exact_fp32
from retemper.engine.losses import cross_entropy_rows, is_label, kl_rows
from retemper.engine.sanity.ladder import CheckRequest, fraction
from retemper.kernels import random_start_

Rows = Callable[[Tensor], Tensor]  # (B, K) logits to (B,) losses
Shares = dict[str, float]
SMALL = 1e-4  # the step h in pixels: a fortieth of a grey level of 255, and a thousand times float32's spacing below 1


def margin_rows(logits_BK: Tensor, label_B: Tensor) -> Tensor:
    """Return the largest other logit minus the label's: above 0 is misclassified. Its gradient never saturates.

    Args:
        logits_BK: (B, K), any float dtype.
        label_B: (B,) int64.
    Returns:
        (B,) in the dtype of the logits.
    """
    own_BK = is_label(logits_BK, label_B)
    return logits_BK.masked_fill(own_BK, -torch.inf).amax(1) - logits_BK.masked_fill(~own_BK, -torch.inf).amax(1)


def input_gradient(model: nn.Module, image: Tensor, rows: Rows) -> Tensor:
    """Return the gradient of each image's own loss, zero where the loss does not depend on the image.

    Args:
        image: (B, C, H, W) pixels.
        rows: the loss.
    Returns:
        (B, C, H, W), of the dtype of the images.
    """
    image = image.detach().requires_grad_(True)
    with torch.enable_grad():
        loss = rows(model(image)).sum()
        if not loss.requires_grad:
            return torch.zeros_like(image)
        (grad,) = torch.autograd.grad(loss, image, allow_unused=True, materialize_grads=True)
    return grad


def off_slope(model: nn.Module, image: Tensor, grad: Tensor, rows: Rows) -> Tensor:
    """Mark the images where a small step along the sign of `grad` fails to raise the loss by half to twice its promise.

    Pixels that the step would take out of [0, 1] stay.

    Args:
        image, grad: (B, C, H, W), pixels and the gradient of `rows` there.
    Returns:
        (B,) bool.
    """
    moved = image + SMALL * grad.sign()
    moved = torch.where((moved >= 0) & (moved <= 1), moved, image)
    promise_B = ((moved - image) * grad).flatten(1).sum(1)
    with torch.no_grad():
        rise_B = rows(model(moved)) - rows(model(image))
    return ~((rise_B > promise_B / 2) & (rise_B < promise_B * 2))


def probe_gradients(request: CheckRequest) -> dict[str, Shares]:
    """Return the shares of the module's head by loss and point: "cross_entropy, clean", "kl, random start", ...

    "zero" and "not_finite" are the shares of images whose gradient is zero everywhere, or not finite somewhere.
    "zero_pixels" and "underflow" are shares of pixels. Empty where no image is classified correctly.

    KL(softmax(clean) || softmax(x)) is left out at the clean image, where its gradient is zero by definition.
    """
    found: dict[str, list[dict[str, Tensor]]] = {}
    with exact_fp32():
        for first, clean, label_B in request.batches():
            with torch.no_grad():
                logits_BK = request.model(clean)
            right_B = predicts(logits_BK, label_B)
            if not right_B.any():
                continue
            clean, label_B, logits_BK = clean[right_B], label_B[right_B], logits_BK[right_B]
            start = random_start_(torch.empty_like(clean), clean, request.eps, seed=request.seed + first)
            for point, image in (("clean", clean), ("random start", start)):
                for loss, facts in _at(request.model, image, label_B, None if point == "clean" else logits_BK).items():
                    found.setdefault(f"{loss}, {point}", []).append(facts)
    return {
        name: {fact: fraction(torch.cat([part[fact] for part in parts])) for fact in parts[0]}
        for name, parts in found.items()
    }


def _at(model: nn.Module, image: Tensor, label_B: Tensor, clean_BK: Tensor | None) -> dict[str, dict[str, Tensor]]:
    """Return by loss the facts to be averaged over images, each (B,); the KL only if clean logits are given."""

    def margin(logits_BK: Tensor) -> Tensor:
        return margin_rows(logits_BK, label_B)

    grad = input_gradient(model, image, margin)
    there = grad.flatten(1) != 0
    facts = {"margin": _facts(grad) | {"off_slope": off_slope(model, image, grad, margin)}}
    losses: dict[str, Rows] = {"cross_entropy": lambda logits_BK: cross_entropy_rows(logits_BK, label_B)}
    if clean_BK is not None:
        losses["kl"] = lambda logits_BK: kl_rows(clean_BK, logits_BK)
    for name, rows in losses.items():
        grad = input_gradient(model, image, rows)
        lost = (grad.flatten(1) == 0) & there
        facts[name] = _facts(grad) | {"underflow": lost.double().mean(1)}
    return facts


def _facts(grad: Tensor) -> dict[str, Tensor]:
    """Return the facts about a gradient that need no second one, each (B,)."""
    zero, finite = grad.flatten(1) == 0, grad.flatten(1).isfinite()
    return {"zero": zero.all(1), "not_finite": ~finite.all(1), "zero_pixels": zero.double().mean(1)}
