"""What all kernel modules share: the choice between Triton and PyTorch, the launch, and the checks of the arguments.

Tensors on a GPU (CUDA or ROCm) go through Triton. So do tensors on a CPU when TRITON_INTERPRET=1 was set before the
import: Triton's interpreter runs the kernels then. Everything else takes the reference in plain PyTorch. float64 always
takes it, since the kernels compute in float32.
"""

import math
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from retemper.kernels.language import HAS_TRITON, INTERPRETED, cdiv, next_power_of_2, tl, triton

TRITON_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
FLOATS = (*TRITON_FLOATS, torch.float64)
TRITON_ON_CPU: bool = INTERPRETED

# The options of every launch. A multiplication and an addition keep their two roundings, as in PyTorch, so that random
# starts and attack steps agree with those of a CPU to the bit. Triton 3.9 warns where a launch leaves the option out,
# and 3.10 changes its default.
EXACT = {"enable_fp_fusion": False}


@triton.jit
def clamp(x, lower, upper):
    """Clamp x to [lower, upper] and keep NaN, as PyTorch does: a diverged pixel must not turn into a valid one."""
    x = tl.maximum(x, lower, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(x, upper, propagate_nan=tl.PropagateNan.ALL)


def runs_triton(*tensors: Tensor | None) -> bool:
    """Say whether an operator on these tensors, of one device, goes through Triton rather than the reference."""
    for tensor in tensors:
        if tensor is not None and (
            tensor.dtype is torch.float64 or not (TRITON_ON_CPU or (HAS_TRITON and tensor.is_cuda))
        ):
            return False
    return True


def launching(tensor: Tensor) -> AbstractContextManager[object]:
    """Return the context manager that a launch on this tensor needs.

    On a GPU it makes the tensor's device the current one. On a CPU it silences NumPy, with which the interpreter
    computes: NumPy warns of -inf - -inf and the like, a GPU does not.
    """
    if tensor.is_cuda:
        return torch.cuda.device(tensor.device)
    import numpy as np  # which Triton's interpreter needs, and nothing else here

    return np.errstate(all="ignore")


def pixel_runs(image: Tensor, block: int, by_sample: bool) -> tuple[int, int | None, int, int]:
    """Cut an elementwise operation into programs.

    With `by_sample` each program stays within one sample: needed where a number, such as eps, differs between samples.
    Otherwise the whole batch is one run. A batch's length is a multiple of 16 more often than an image's, and loads of
    16 bytes need that.

    Args:
        image: (B, ...), dense.
        block: the most pixels that a program may take.

    Returns:
        The pixels of a run, the programs of a run (None for a single run) and BLOCK, as `locate` takes them; and the
        number of programs in all.
    """
    samples = image.shape[0] if by_sample else 1
    pixels = image.numel() // samples
    block = min(block, max(128, next_power_of_2(pixels)))
    blocks = cdiv(pixels, block)
    return pixels, blocks if by_sample else None, block, samples * blocks


@triton.jit
def locate(pixels, blocks, BLOCK: tl.constexpr):
    """Return a program's sample, the offsets of its pixels, and a mask of those that exist.

    Offsets are int64, since a batch may have more than 2**31 pixels.
    """
    sample, block = 0, tl.program_id(0)
    if blocks is not None:
        sample, block = (block // blocks).to(tl.int64), block % blocks
    pixel = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return sample, sample * pixels + pixel, pixel < pixels


def access_width(length: int, *tensors: Tensor) -> int:
    """Return the number of values of one memory access: at most 16 bytes of the widest dtype, a divisor of `length`."""
    return math.gcd(length, 16 // max(tensor.element_size() for tensor in tensors))


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """Return the dtype in which to compute: float32, or float64 as soon as one tensor is float64."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def require_one_layout(**tensors: Tensor) -> None:
    """Raise ValueError unless all images have one float dtype, device, shape and strides, dense and batch first."""
    first_name, first = next(iter(tensors.items()))
    require_float(**tensors)
    require_one_device(**tensors)
    if first.dim() == 0:
        raise ValueError(f"{first_name}: a scalar; needs a leading batch dimension")
    for name, tensor in tensors.items():
        if tensor.dtype != first.dtype:
            raise ValueError(f"{name}: {tensor.dtype}, but {first_name} is {first.dtype}; convert it with .to()")
        if tensor.shape != first.shape:
            raise ValueError(f"{name}: shape {tuple(tensor.shape)}, but {first_name} has {tuple(first.shape)}")
        if tensor is not first and tensor.stride() == first.stride():
            continue
        if not (tensor.is_contiguous() or is_dense_batch_first(tensor)):
            raise ValueError(f"{name}: strides {tensor.stride()} leave holes or overlap; call .contiguous() on it")
        if _strides(tensor) != _strides(first):
            raise ValueError(
                f"{name}: strides {tensor.stride()}, but {first_name} has {first.stride()}; give both one dense layout,"
                " .contiguous() or .to(memory_format=torch.channels_last)"
            )


def require_float(**tensors: Tensor) -> None:
    """Raise ValueError unless each tensor is float16, bfloat16, float32 or float64."""
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS:
            raise ValueError(f"{name}: {tensor.dtype}; needs one of {', '.join(map(str, FLOATS))}")


def require_one_device(**tensors: Tensor | None) -> None:
    """Raise ValueError unless all tensors that are given are on one device."""
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    first_name, first = next(iter(given.items()))
    for name, tensor in given.items():
        if tensor.device != first.device:
            raise ValueError(f"{name}: on {tensor.device}, but {first_name} is on {first.device}; move it with .to()")


def require_rows(**tensors: Tensor) -> None:
    """Raise ValueError unless all are float logits (B, K) of one shape, K >= 1, a row's values side by side."""
    first_name, first = next(iter(tensors.items()))
    require_float(**tensors)
    for name, tensor in tensors.items():
        if tensor.dim() != 2 or tensor.shape[1] == 0:
            raise ValueError(f"{name}: shape {tuple(tensor.shape)}; needs (B, K) with K at least 1")
        if tensor.shape != first.shape:
            raise ValueError(f"{name}: shape {tuple(tensor.shape)}, but {first_name} has {tuple(first.shape)}")
        if tensor.shape[1] > 1 and tensor.stride(1) != 1:
            raise ValueError(f"{name}: strides {tensor.stride()}; rows must be contiguous, call .contiguous() on it")


def require_vector(name: str, vector: Tensor | None, length: int, *dtypes: torch.dtype) -> None:
    """Raise ValueError unless it is None or (length,), of one of the dtypes, its values side by side in memory."""
    if vector is None:
        return
    if vector.shape != (length,):
        raise ValueError(f"{name}: shape {tuple(vector.shape)}; needs ({length},)")
    if vector.dtype not in dtypes:
        raise ValueError(f"{name}: {vector.dtype}; needs {' or '.join(map(str, dtypes))}")
    if length > 1 and vector.stride(0) != 1:
        raise ValueError(f"{name}: stride {vector.stride(0)}; call .contiguous() on it")


def require_no_grad(**tensors: object) -> None:
    """Raise ValueError where autograd would need a gradient that is not computed; what is no tensor is passed over."""
    if torch.is_grad_enabled():
        for name, tensor in tensors.items():
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                raise ValueError(f"{name}: requires grad, and its gradient is not computed; pass {name}.detach()")


def require_writable(name: str, tensor: Tensor) -> None:
    """Raise ValueError if autograd is tracking the tensor, which an operator would overwrite."""
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name}: requires grad and would be overwritten; pass {name}.detach() or use torch.no_grad()")


def per_sample(name: str, value: float | Tensor, batch: int) -> tuple[float, Tensor | None]:
    """Split a number, or a tensor with one number for each sample, into what the schema of an operator can carry.

    Returns:
        The number and None; or 0.0 and the (B,) tensor, detached and contiguous.

    Raises:
        ValueError: a tensor is not (B,) or not of a float dtype.
    """
    if not isinstance(value, Tensor):
        return float(value), None
    if value.shape != (batch,) or value.dtype not in FLOATS:
        raise ValueError(f"{name}: {value.dtype} of shape {tuple(value.shape)}; needs a float, or floats ({batch},)")
    return 0.0, value.detach().contiguous()


def require_pixel_units(lower: float, upper: float, pixels: int = 1, **numbers: float) -> None:
    """Raise ValueError unless pixels have a range, and each number is a length in it: 8/255 where they end at 1, not 8.

    A length up to 1 fits a range that is narrower too: it reaches every pixel there.

    Args:
        lower, upper: the range of a pixel.
        pixels: over how many the lengths are measured: those of an image in L2, one in L-inf.
        numbers: lengths by name. One that is NaN does not fit.
    """
    if not lower < upper:
        raise ValueError(f"lower: {lower}, upper: {upper}; the range of a pixel is empty")
    longest = max(1.0, upper - lower) * math.sqrt(pixels)
    for name, number in numbers.items():
        if not 0 <= number <= longest * (1 + 1e-6):  # the range itself, rounded, is no mistake
            raise ValueError(
                f"{name}: {number}; needs 0 to {longest:g}, as pixels lie in [{lower}, {upper}]: 8/255, not 8"
            )


def _strides(tensor: Tensor) -> list[int]:
    """Return the strides of dimensions longer than 1, or none for an empty tensor: no others mean anything."""
    if tensor.numel() == 0:
        return []
    return [stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]


def is_dense_batch_first(tensor: Tensor) -> bool:
    """Say whether the samples lie one after the other, without holes or overlaps, in any order of dimensions."""
    if tensor.numel() == 0:
        return True
    expected = 1
    inner = zip(tensor.stride()[1:], tensor.shape[1:], strict=True)
    for stride, size in sorted(pair for pair in inner if pair[1] > 1):
        if stride != expected:
            return False
        expected *= size
    return tensor.shape[0] == 1 or tensor.stride(0) == expected
