"""One projected-gradient step inside the eps ball (Madry et al., ICLR 2018), in place.

    L-inf:  adv <- clip(min(max(adv + step sign(grad), clean - eps), clean + eps), lower, upper)
    L2:     moved = adv + step grad / ||grad||;  delta = moved - clean
            adv <- clip(clean + delta min(1, eps / ||delta||), lower, upper)

With `momentum` (MI-FGSM; Dong et al., CVPR 2018), the step follows it in place of the gradient:

    momentum <- decay momentum + grad / ||grad||_1

With `previous`, the iterate before `adv`, it is the update of Auto-PGD (Croce and Hein, ICML 2020). P is the step's
projection and clip, and z what the step above makes of `adv`:

    adv, previous <- P(adv + inertia (z - adv) + (1 - inertia) (adv - previous)), adv

A number of the step is a float, or a tensor of floats: one for all; (B,), or any shape that flattens to it, by sample;
(C,), (C, 1, 1) or (1, C, 1, 1), by channel; (B, C, 1, 1). With B = C, (B,) is by sample. The bounds of a pixel do not
differ by sample, nor step and eps by channel in L2.

Norms are those of a sample. Bound by memory: L-inf reads 3 tensors and writes 1 in one launch, where eager PyTorch
takes six launches, reads 9 and writes 6. L2 passes over each sample four times, mostly in the cache.

The arithmetic is in ascent.py in PyTorch, and in ascent_kernels.py in Triton. Here are the PyTorch operators and what
users call.
"""

import math
from typing import Any

import torch
from torch import Tensor

from retemper.kernels.ascent import Number, Step, ascend
from retemper.kernels.ascent_kernels import launch
from retemper.kernels.operators import is_symbol, operator, overwritten, rewritten
from retemper.kernels.pixels import NORMS, finite, grid, named_norm, overlap, rows_or_pixels, split
from retemper.kernels.runtime import (
    FLOATS,
    compute_dtype,
    is_dense_batch_first,
    require_no_grad,
    require_one_device,
    require_one_layout,
    require_pixel_units,
    require_writable,
    runs_triton,
)


def _take(
    adv: Tensor,
    grad: Tensor,
    clean: Tensor,
    step: float,
    eps: float,
    lower: float,
    upper: float,
    norm: str,
    step_by: Tensor | None = None,
    eps_by: Tensor | None = None,
    lower_by: Tensor | None = None,
    upper_by: Tensor | None = None,
    mask: Tensor | None = None,
    momentum: Tensor | None = None,
    decay: float = 1.0,
    previous: Tensor | None = None,
    inertia: float = 0.75,
    clip_first: bool = False,
) -> None:
    """Take the step in place; a tensor of numbers, where it is given, stands for the number of its name."""
    _require_images(adv, grad, clean, momentum, previous)
    numbers: tuple[Number, Number, Number, Number] = (step, eps, lower, upper)
    if not (step_by is None and eps_by is None and lower_by is None and upper_by is None):
        numbers = _numbers(adv, norm, numbers, (step_by, eps_by, lower_by, upper_by))
    if mask is not None:
        require_one_device(adv=adv, mask=mask)
        mask = rows_or_pixels(mask, adv)
    if norm not in NORMS:
        raise ValueError(f"norm: {norm!r}; needs one of {', '.join(NORMS)}")
    if adv.numel() == 0:
        return
    if momentum is not None or previous is not None:
        _require_own_memory(momentum, previous, adv=adv, grad=grad, clean=clean)
    given = Step(adv, grad, clean, *numbers, norm, mask, momentum, decay, previous, inertia, clip_first)
    if not runs_triton(adv, grad, clean, momentum, previous):
        if not (adv.is_contiguous() or is_dense_batch_first(adv)):
            require_one_layout(adv=adv)
        ascend(given)
        return
    launch(given)
    for tensor in (adv, momentum, previous):
        if tensor is not None:
            overwritten(tensor)


def _require_images(adv: Tensor, *others: Tensor | None) -> None:
    """Raise ValueError unless all are floats of one shape and device."""
    shape, device = adv.shape, adv.device
    for tensor in (adv, *others):
        if tensor is not None and (tensor.shape != shape or tensor.device != device or tensor.dtype not in FLOATS):
            place = [one is tensor for one in (adv, *others)].index(True)
            raise _misfit(("adv", "grad", "clean", "momentum", "previous")[place], tensor, adv)
    if not shape:
        raise ValueError("adv: a scalar; needs a leading batch dimension")


def _misfit(name: str, tensor: Tensor, adv: Tensor) -> ValueError:
    """Return the error of a tensor that is no image beside `adv`."""
    if tensor.dtype not in FLOATS:
        return ValueError(f"{name}: {tensor.dtype}; needs one of {', '.join(map(str, FLOATS))}")
    if tensor.shape != adv.shape:
        return ValueError(f"{name}: shape {tuple(tensor.shape)}, but adv has {tuple(adv.shape)}")
    return ValueError(f"{name}: on {tensor.device}, but adv is on {adv.device}; move it with .to()")


def _require_own_memory(momentum: Tensor | None, previous: Tensor | None, **others: Tensor | None) -> None:
    """Raise ValueError where a buffer that is overwritten is the memory of another tensor."""
    for name, buffer in (("momentum", momentum), ("previous", previous)):
        for other_name, other in others.items():
            if buffer is not None and other is not None and overlap(buffer, other):
                raise ValueError(f"{name}: it is the memory of {other_name}, and is overwritten; pass a clone()")
        others |= {name: buffer}


def _numbers(
    adv: Tensor, norm: str, numbers: tuple[Number, ...], tensors: tuple[Tensor | None, ...]
) -> tuple[Number, Number, Number, Number]:
    """Return the numbers, and in place of some of them the tensors that are given, as `grid` makes them."""
    names = ("step", "eps", "lower", "upper")
    require_one_device(adv=adv, **dict(zip(names, tensors, strict=True)))
    result: list[Number] = []
    for name, value, tensor in zip(names, numbers, tensors, strict=True):
        by_sample = name in ("step", "eps")
        made = value if tensor is None else grid(name, tensor, adv, by_sample)
        if norm == "l2" and by_sample and isinstance(made, Tensor) and made.shape[1] > 1:
            raise ValueError(f"{name}: it differs by channel; with norm='l2' a sample has one {name}")
        result.append(made)
    step, eps, lower, upper = result
    return step, eps, lower, upper


_SCHEMA = (
    "(Tensor(a!) adv, Tensor grad, Tensor clean, NUMBER step, NUMBER eps, NUMBER lower, NUMBER upper, str norm,"
    " Tensor? step_by=None, Tensor? eps_by=None, Tensor? lower_by=None, Tensor? upper_by=None, Tensor? mask=None,"
    " Tensor(b!)? momentum=None, float decay=1.0, Tensor(c!)? previous=None, float inertia=0.75, bool clip_first=False)"
    " -> ()"
)
_take_op = operator("pgd_step_" + _SCHEMA.replace("NUMBER", "float"), fake=lambda *_: None)(_take)


@rewritten("pgd_step_number_" + _SCHEMA.replace("NUMBER", "Scalar"))
def _take_symbols(
    adv: Tensor,
    grad: Tensor,
    clean: Tensor,
    step: Any,
    eps: Any,
    lower: Any,
    upper: Any,
    norm: str,
    step_by: Tensor | None = None,
    eps_by: Tensor | None = None,
    lower_by: Tensor | None = None,
    upper_by: Tensor | None = None,
    *rest: Any,
) -> None:
    """Take the step of numbers some of which may be symbols of torch.compile."""
    numbers, by = [step, eps, lower, upper], [step_by, eps_by, lower_by, upper_by]
    for place, number in enumerate(numbers):
        if is_symbol(number):
            numbers[place], by[place] = 0.0, adv.new_ones(1, dtype=compute_dtype(adv, grad, clean)) * number
    _take_op(adv, grad, clean, *numbers, norm, *by, *rest)


def _require_tensors(**given: object) -> None:
    """Raise TypeError unless all that are given are tensors."""
    for name, value in given.items():
        if not (value is None or isinstance(value, Tensor)):
            raise TypeError(f"{name}: a {type(value).__name__}; needs a tensor")


def _require_constants(adv: Tensor, *constants: Tensor | None) -> None:
    """Raise ValueError if autograd is tracking a tensor: it would be overwritten, or miss a gradient."""
    if torch.is_grad_enabled() and True in [one.requires_grad for one in (adv, *constants) if one is not None]:
        require_writable("adv", adv)
        names = ("grad", "clean", "step", "eps", "lower", "upper", "momentum", "previous")
        require_no_grad(**dict(zip(names, constants, strict=True)))


def pgd_step_(
    adv: Tensor,
    grad: Tensor,
    clean: Tensor,
    step: float | Tensor,
    eps: float | Tensor,
    *,
    norm: str | float = "linf",
    lower: float | Tensor = 0.0,
    upper: float | Tensor = 1.0,
    mask: Tensor | None = None,
    momentum: Tensor | None = None,
    decay: float = 1.0,
    previous: Tensor | None = None,
    inertia: float = 0.75,
    clip_first: bool = False,
) -> Tensor:
    """Move `adv` one step along `grad`, in place, and project it to the eps ball around `clean` and to valid pixels.

    A pixel whose gradient is zero or NaN does not move. With L2, neither does one whose gradient is infinite, and a
    sample inside the ball is not rescaled. In float16 and bfloat16 the result is rounded after the projection, so it
    may leave the ball by half an ulp. Formulas, sources and the shapes of numbers: the module docstring.

    Args:
        adv: (B, ...), floats, dense with the batch outermost, in any order of the other dimensions (channels-last).
        grad, clean: of the shape of `adv`, of any float dtype and strides, read as they are; both may be `adv`.
            On a GPU, tensors of more than 4 dimensions and another layout than `adv` are copied.
        step, eps: in pixel units (8/255, not 8); numbers, or tensors of those shapes. A number is at most the width of
            the range (or 1) in L-inf, or its sqrt(pixels)-fold in L2. A negative step moves against the gradient:
            towards a target. eps >= 0; of a tensor, what is below counts as 0.
        norm: "linf" or "l2", or math.inf, "inf", 2, "2".
        lower, upper: the range of a valid pixel. Where tensors cross, the pixel becomes upper.
        mask: (B,) bool, or bool that broadcasts to `adv`. Where it is False, a pixel stays exactly as it is, and its
            gradient and its distance from `clean` count 0.
        momentum: like `adv`, any float dtype and layout, zeros at first; overwritten. Its values are about 1 / pixels,
            too small for float16 in large images.
        decay: of the momentum, a number.
        previous: the iterate before, like `adv`, any float dtype and layout, at first a copy; overwritten with `adv`.
        inertia: the weight of the new move, beside `previous`; Auto-PGD takes 1 at its first step, then 0.75.
        clip_first: in L2, whether to clip to valid pixels before the projection to the ball, and not after it.

    Returns:
        `adv` itself.

    Raises:
        TypeError: an argument is neither a tensor nor a number where it must be one.
        ValueError: a shape, dtype, device, layout or norm does not fit (L1 too); an argument requires a gradient; a
            number is not finite, not in pixel units, or no range of pixels; a buffer is the memory of another argument.
    """
    if not (isinstance(adv, Tensor) and isinstance(grad, Tensor) and isinstance(clean, Tensor)):
        raise TypeError("adv, grad, clean: they must be tensors")
    if not mask is momentum is previous is None:
        _require_tensors(mask=mask, momentum=momentum, previous=previous)
        decay = decay if momentum is None else finite("decay", decay)
        inertia = inertia if previous is None else finite("inertia", inertia)
    norm = named_norm(norm)
    step, step_by = split("step", step)
    eps, eps_by = split("eps", eps)
    lower, lower_by = split("lower", lower, -math.inf)
    upper, upper_by = split("upper", upper, math.inf)
    _require_constants(adv, grad, clean, step_by, eps_by, lower_by, upper_by, momentum, previous)
    pixels = 1 if norm == "linf" or not adv.numel() else adv.numel() // adv.shape[0]
    require_pixel_units(lower, upper, pixels, step=abs(step), eps=eps)
    if clip_first and norm == "linf":
        raise ValueError("clip_first: it is for norm='l2'; in L-inf the order makes no difference")
    rest = (step_by, eps_by, lower_by, upper_by, mask, momentum, decay, previous, inertia, clip_first)
    if torch.compiler.is_compiling():
        _take_symbols(adv, grad, clean, step, eps, lower, upper, norm, *rest)
    elif adv.is_cpu and type(adv) is Tensor and not runs_triton(adv):  # an operator's 2 us are much of a small step
        _take(adv, grad, clean, step, eps, lower, upper, norm, *rest)
    else:
        _take_op(adv, grad, clean, step, eps, lower, upper, norm, *rest)
    return adv
