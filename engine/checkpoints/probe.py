"""The probe of a network of other people's code: a few images show whether a run can build on it.

Dimension key: B batch, C channels, H, W, K classes.
"""

import torch
from torch import Tensor, nn

from retemper.engine.checkpoints.surroundings import failing_as
from retemper.engine.device import exact_fp32
from retemper.errors import DataError

IMAGES = 8  # that are looked at
FEW = 2  # of them make the smaller batch; a batch of one is left out, for some code squeezes it away
ROUNDING = 1e-2  # of the largest logit: above what half precision inside a network does to another batch size


def require_sound(whose: str, network: nn.Module, image: Tensor, num_classes: int, *, attacked: bool = False) -> None:
    """Check that a network in eval mode leaves its images alone and answers each image by itself.

    Args:
        whose: the network in words, to begin the message with.
        image: (B, C, H, W) pixels of at least `FEW` different images; they are left as they are.
        num_classes: K.
        attacked: whether gradients must reach the images.
    Raises:
        DataError: it changes its images; its logits are no finite floats (B, K), differ from call to call, or depend
            on the other images of the batch; or no gradient reaches the images. The message says what to do.
    """
    with exact_fp32(), failing_as(f"{whose} does not answer {len(image)} images"):
        first, changed = _asked(network, image.clone(memory_format=torch.channels_last))
        again, changed_too = _asked(network, image.clone(memory_format=torch.contiguous_format))
        few, _ = _asked(network, image[:FEW].clone(memory_format=torch.channels_last))
    if changed or changed_too:
        raise DataError(f"{whose} changes the images that it is given: begin its forward with image = image.clone()")
    _require_logits(whose, first, (len(image), num_classes))
    _require_logits(whose, few, (min(FEW, len(image)), num_classes))
    if (apart := _apart(again, first)) > ROUNDING:
        raise DataError(
            f"{whose} answers the same images otherwise when it is asked again (logits differ by {apart:.0%}): "
            "switch off what is random in eval mode"
        )
    if (apart := _apart(few, first[: len(few)])) > ROUNDING:
        raise DataError(
            f"{whose} answers the same images otherwise in another batch (logits differ by {apart:.0%}): "
            "compute nothing over the batch in eval mode"
        )
    if attacked:
        _require_gradient(whose, network, image)


def _asked(network: nn.Module, image: Tensor) -> tuple[Tensor, bool]:
    """Return what the network answers, and whether it has changed `image`, which is the caller's to lose."""
    before = image.clone()
    with torch.no_grad():
        answer = network(image)
    return answer, not torch.equal(image, before)


def _require_logits(whose: str, answer: object, wanted: tuple[int, int]) -> None:
    """Check that an answer is what a loss can take: finite floats of the shape `wanted`."""
    got = f"{tuple(answer.shape)} of {answer.dtype}" if isinstance(answer, Tensor) else f"a {type(answer).__name__}"
    if not isinstance(answer, Tensor) or answer.shape != wanted or not answer.is_floating_point():
        raise DataError(f"{whose} answers {wanted[0]} images with {got}: it must return logits, floats {wanted}")
    if not answer.isfinite().all():
        strange = int((~answer.isfinite()).any(1).sum())
        raise DataError(f"{whose} answers {strange} of {wanted[0]} images with logits that are not finite")


def _apart(one: Tensor, other: Tensor) -> float:
    """Return the largest difference of logits, as a share of the largest logit."""
    return float((one - other).abs().max() / other.abs().max().clamp_min(1e-30))


def _require_gradient(whose: str, network: nn.Module, image: Tensor) -> None:
    given = image.clone().requires_grad_(True)
    with torch.enable_grad(), failing_as(f"{whose}: no gradient reaches its images, and the method attacks it"):
        torch.autograd.grad(network(given).sum(), given)
