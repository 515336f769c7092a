"""Where an op runs, and what it may assume of its tensors: everything the kernel modules share.

Triton runs tensors on a GPU (CUDA or ROCm), and tensors on a CPU when TRITON_INTERPRET=1 was set before the import;
float64 always takes the plain PyTorch reference, which computes in float64.
"""

import math
from contextlib import AbstractContextManager

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

TRITON_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
FLOATS = (*TRITON_FLOATS, torch.float64)
TRITON_ON_CPU: bool = knobs.runtime.interpret  # what @triton.jit itself looks at

# Multiplications and additions stay two roundings, as in PyTorch, so that draws and steps agree with the CPU's to the
# bit. Said at every launch, because Triton 3.9 warns when nobody says it, and 3.10 changes the default.
EXACT = {"enable_fp_fusion": False}


@triton.jit
def clamp(x, lower, upper):
    """Clamp that lets NaN through, as PyTorch's does: a diverged pixel must not turn into a valid one."""
    x = tl.maximum(x, lower, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(x, upper, propagate_nan=tl.PropagateNan.ALL)


def runs_triton(*tensors: Tensor | None) -> bool:
    """Whether the op on these tensors goes through Triton rather than the reference."""
    given = [tensor for tensor in tensors if tensor is not None]
    return (given[0].is_cuda or TRITON_ON_CPU) and all(tensor.dtype != torch.float64 for tensor in given)


def launching(tensor: Tensor) -> AbstractContextManager[object]:
    """What a launch needs around it: the tensor's GPU as the current one; or no NumPy warnings, under the interpreter.

    The interpreter computes with NumPy, which warns of -inf - -inf and the like where a GPU does not.
    """
    return torch.cuda.device(tensor.device) if tensor.is_cuda else np.errstate(all="ignore")


def pixel_runs(image: Tensor, block: int, by_sample: bool) -> tuple[int, int | None, int, int]:
    """How an elementwise op is cut into programs: (pixels, blocks, BLOCK, programs), as `locate` takes them.

    Sample by sample where a number differs between samples; else the batch is one run, which needs no sample's index,
    and whose length is a multiple of 16 more often than an image's, which loads of 16 bytes rest on.
    """
    samples = image.shape[0] if by_sample else 1
    pixels = image.numel() // samples
    block = min(block, max(128, triton.next_power_of_2(pixels)))
    blocks = triton.cdiv(pixels, block)
    return pixels, blocks if by_sample else None, block, samples * blocks


@triton.jit
def locate(pixels, blocks, BLOCK: tl.constexpr):
    """A program's sample, the places of its pixels in memory, and which of them there are. int64: n may pass 2**31."""
    sample, block = 0, tl.program_id(0)
    if blocks is not None:
        sample, block = (block // blocks).to(tl.int64), block % blocks
    pixel = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return sample, sample * pixels + pixel, pixel < pixels


def access_width(length: int, *tensors: Tensor) -> int:
    """How many values of a run of `length` one access may take: 16 bytes of the widest dtype, or what divides a run."""
    return math.gcd(length, 16 // max(tensor.element_size() for tensor in tensors))


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float32, or float64 as soon as one tensor is."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def require_one_layout(**tensors: Tensor) -> None:
    """Images of one op: the same float dtype, device, shape and strides; dense; the batch dimension outermost."""
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
        if not _is_dense_batch_first(tensor):
            raise ValueError(f"{name}: strides {tensor.stride()} leave holes or overlap; call .contiguous() on it")
        if _strides(tensor) != _strides(first):
            raise ValueError(
                f"{name}: strides {tensor.stride()}, but {first_name} has {first.stride()}; give both one dense layout,"
                " .contiguous() or .to(memory_format=torch.channels_last)"
            )


def require_float(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS:
            raise ValueError(f"{name}: {tensor.dtype}; needs one of {', '.join(map(str, FLOATS))}")


def require_one_device(**tensors: Tensor | None) -> None:
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    first_name, first = next(iter(given.items()))
    for name, tensor in given.items():
        if tensor.device != first.device:
            raise ValueError(f"{name}: on {tensor.device}, but {first_name} is on {first.device}; move it with .to()")


def require_rows(**tensors: Tensor) -> None:
    """Logits: (B, K) of one shape, float, K at least 1, the K values of a row side by side in memory."""
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
    """A 1-D tensor of that length and one of those dtypes, its values side by side; or None."""
    if vector is None:
        return
    if vector.shape != (length,):
        raise ValueError(f"{name}: shape {tuple(vector.shape)}; needs ({length},)")
    if vector.dtype not in dtypes:
        raise ValueError(f"{name}: {vector.dtype}; needs {' or '.join(map(str, dtypes))}")
    if length > 1 and vector.stride(0) != 1:
        raise ValueError(f"{name}: stride {vector.stride(0)}; call .contiguous() on it")


def require_writable(name: str, tensor: Tensor) -> None:
    """An op in place must not write into a tensor that autograd is tracking."""
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name}: requires grad and would be overwritten; pass {name}.detach() or use torch.no_grad()")


def per_sample(name: str, value: float | Tensor, batch: int) -> tuple[float, Tensor | None]:
    """Split a number, or a (B,) tensor with one number for each sample, into what an op's schema can carry."""
    if not isinstance(value, Tensor):
        return float(value), None
    if value.shape != (batch,) or value.dtype not in FLOATS:
        raise ValueError(f"{name}: {value.dtype} of shape {tuple(value.shape)}; needs a float, or floats ({batch},)")
    return 0.0, value.detach().contiguous()


def _strides(tensor: Tensor) -> list[int]:
    """The strides that mean something: those of dimensions longer than 1, and none for an empty tensor."""
    if tensor.numel() == 0:
        return []
    return [stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]


def _is_dense_batch_first(tensor: Tensor) -> bool:
    if tensor.numel() == 0:
        return True
    expected = 1
    inner = zip(tensor.stride()[1:], tensor.shape[1:], strict=True)
    for stride, size in sorted(pair for pair in inner if pair[1] > 1):
        if stride != expected:
            return False
        expected *= size
    return tensor.shape[0] == 1 or tensor.stride(0) == expected
