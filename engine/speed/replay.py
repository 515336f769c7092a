"""A network whose calls are replayed from CUDA graphs, and what else decides which work a network does.

Dimension key: B batch, C channels, H, W, K classes.
"""

from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from enum import Enum
from functools import partial
from types import BuiltinFunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from retemper.console import say_once
from retemper.engine.device import is_out_of_memory
from retemper.engine.speed.capture import CudaGraphs, Record, tuning, why
from retemper.kernels.runtime import is_dense_batch_first

PLAIN = {bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device}
UNSEEN = {dict, OrderedDict, list, set}
RECORD_AFTER = 3  # calls of a kind: a shape that comes once or twice is not worth a recording
LEAST = 8  # images that a recording is for
ROUNDED = 1e-4  # of the largest logit: by how much padding may move others in float32
GLOBAL_HOOKS = ("_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks")


def why_eager(model: Callable[..., Any]) -> str:
    """Return why calls of a model are not to be replayed, in words; "" where they may be."""
    if not isinstance(model, nn.Module):
        return "the model is no nn.Module, so that no change in it can be seen"
    if any(isinstance(one, nn.DataParallel | nn.parallel.DistributedDataParallel) for one in model.modules()):
        return "the model is spread over several devices: give its .module"
    hooks = any(getattr(torch_module, name, None) for name in GLOBAL_HOOKS)
    if hooks or any(one._forward_hooks or one._forward_pre_hooks or one._backward_hooks for one in model.modules()):
        return "the model has hooks, which a graph would not call"
    return ""


def fingerprint(model: nn.Module, device: torch.device) -> Hashable:
    """Return what decides, beside the images, which work a call of `model` does on `device`, and in which memory.

    It differs as soon as a tensor of the model lies elsewhere or in another layout, a module is in another mode or
    another module, a number or a function in a module is another, or torch computes in another precision. What a list
    or dictionary holds is not looked at. A change of values in place changes nothing.
    """
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    # not allow_tf32, which raises where a user has set the newer attribute
    owners: tuple[Any, ...] = (torch.backends, matmul, cudnn, cudnn.conv)
    found: list[Hashable] = [cudnn.benchmark, cudnn.deterministic, *(one.fp32_precision for one in owners)]
    found += [torch.are_deterministic_algorithms_enabled(), torch.is_autocast_enabled(device.type)]
    found += [torch.get_autocast_dtype(device.type)]
    for module in model.modules():
        found.append(type(module))
        _note_all(module.__dict__.values(), found)
        _note_all(module._parameters.values(), found)
        _note_all(module._buffers.values(), found)
    return tuple(found)


def held_by(function: Callable[..., Any]) -> Hashable:
    """Return what a function carries beside its code: of a closure, a partial function, or an object."""
    found: list[Hashable] = [function] if type(function).__hash__ is object.__hash__ else [type(function)]
    if isinstance(function, partial):
        found.append(function.func)
        _note_all([*function.args, *function.keywords.values()], found)
    _note_all(getattr(function, "__dict__", {}).values(), found)
    _note_all([cell.cell_contents for cell in getattr(function, "__closure__", None) or ()], found)
    return tuple(found)


def _note_all(values: Iterable[Any], found: list[Hashable]) -> None:
    """Add what tells each value from another, without reading a tensor. It takes a fraction of a microsecond each."""
    for value in values:
        kind = type(value)
        if kind in PLAIN:
            found.append(value)
        elif kind in UNSEEN:
            continue
        elif isinstance(value, Tensor):
            lies = (value.data_ptr(), value.stride()) if value.layout == torch.strided else (id(value),)
            found += (*lies, value.shape, value.dtype)
        elif isinstance(value, tuple):
            _note_all(value, found)
        elif kind.__hash__ is object.__hash__ or isinstance(value, Enum | BuiltinFunctionType | MethodType):
            found.append(value)


@dataclass(eq=False)
class _Graphs:
    """The recordings of one kind of call, and the tensors that they read and write.

    Attributes:
        image, logits: (N, C, H, W), (N, K) for the N images of a padded batch.
        upstream, grad: like the logits and the images: the gradients; None where none is asked for.
        turn: the number of the replay, of all recordings, whose activations are there.
    """

    image: Tensor
    forward: Callable[[], None]
    logits: Tensor
    upstream: Tensor | None = None
    backward: Callable[[], None] | None = None
    grad: Tensor | None = None
    turn: int = 0


class Replayed(nn.Module):
    """A network that is not to change, whose answers and whose gradients of the images are replayed from CUDA graphs.

    It is for loops, also of other libraries, that call a network again and again: it is called as the network is.
    Batches that are not whole are padded to one of a few sizes. As the images of a batch do not know of each other,
    which is tried first, this is the same function with other rounding: a library chooses its kernels by the shapes.

    Args:
        model: (B, C, H, W) to (B, K), in eval mode.
        record: `CudaGraphs`, or a stand-in for it in tests without a GPU; None to call the network as it is.
        most: the images of a whole batch, for which convolutions are tuned. A larger batch is the network's own work.
        pad: whether smaller batches are padded; otherwise they are the network's own work.
    """

    def __init__(self, model: nn.Module, record: Record | None, most: int, *, pad: bool = True) -> None:
        super().__init__()
        self.model, self.record, self.sizes = model, record, eighths(most) if pad else (most,)
        self.pad = pad
        self.calls: Counter[Any] = Counter()
        self.graphs: dict[Any, _Graphs] = {}
        self.apart: bool | None = None  # whether images of a batch do not know of each other; None: not tried
        self.turn = 0

    def forward(self, image: Tensor) -> Tensor:
        """Return (B, K) logits of (B, C, H, W) pixels."""
        size = next((size for size in self.sizes if size >= len(image)), None)
        if self.record is None or size is None or not len(image):
            return self.model(image)
        if size != len(image) and not (self.pad and self._may_pad(image, size)):
            return self.model(image)
        asked = torch.is_grad_enabled() and image.requires_grad
        kind = size, asked, image.shape[1:], image.stride()[1:], image.dtype
        self.calls[kind] += 1
        if self.calls[kind] <= RECORD_AFTER or not (kind in self.graphs or self._recorded(kind, image)):
            return self.model(image)
        graphs = self.graphs[kind]
        return _Answers.apply(image, self, graphs) if asked else self.ahead(graphs, image)  # pyright: ignore

    @torch.no_grad()
    def ahead(self, graphs: _Graphs, image: Tensor) -> Tensor:
        """Replay the forward on these images, and return a copy of their logits."""
        graphs.image[: len(image)].copy_(image)
        graphs.forward()
        self.turn += 1
        graphs.turn = self.turn
        return graphs.logits[: len(image)].clone()

    @torch.no_grad()
    def back(self, graphs: _Graphs, upstream: Tensor) -> Tensor:
        """Replay the backward of the forward before, and return a copy of the images' gradient."""
        assert graphs.upstream is not None and graphs.backward is not None and graphs.grad is not None
        graphs.upstream.zero_()[: len(upstream)].copy_(upstream)
        graphs.backward()
        return graphs.grad[: len(upstream)].clone()

    @torch.no_grad()
    def _may_pad(self, image: Tensor, size: int) -> bool:
        """Say whether images have the same answers in a padded batch; it is tried once, and the host waits."""
        if self.apart is None:
            padded = _like(image, size)
            padded[: len(image)].copy_(image)
            own_BK, padded_BK = self.model(image), self.model(padded)[: len(image)]
            self.apart = bool((own_BK - padded_BK).abs().max() <= ROUNDED * own_BK.abs().max())  # False for NaN
        return self.apart

    def _recorded(self, kind: Any, image: Tensor) -> bool:
        """Record a kind of call; say whether it could be done. Otherwise, which the user is told, nothing is replayed.

        Calls whose forward is done keep their recording for their backward.
        """
        try:
            with tuning(kind[0] == self.sizes[-1]):
                self.graphs[kind] = self._both(_like(image, kind[0]), kind[1])
        except Exception as error:  # which the eager call, next, raises again where it is the network's own
            self.record, self.graphs = None, {}
            reason = "the GPU's memory is too small" if is_out_of_memory(error) else why(error)
            say_once(f"note: the network runs without a CUDA graph: {reason}")
        return kind in self.graphs

    def _both(self, image: Tensor, asked: bool) -> _Graphs:
        """Return the recordings of a forward on `image` and, where its gradient is asked for, of the backward.

        Activations are not kept: other recordings, which share the memory, may use it.
        """
        assert self.record is not None
        with torch.set_grad_enabled(asked):
            upstream = self._once(image, asked)
            if upstream is None:
                return _Graphs(image, *self.record(lambda: self.model(image)))
            leaf = image.detach().requires_grad_()
            forward, logits = self.record(lambda: self.model(leaf))
            # the graph is retained, so that no tensor of the backward lies where an activation does: it may come twice
            backward, grad = self.record(partial(_gradient, logits, leaf, upstream))
        return _Graphs(image, forward, logits.detach(), upstream, backward, grad)

    def _once(self, image: Tensor, asked: bool) -> Tensor | None:
        """Run what is recorded next, which compiles kernels and makes workspaces; return the gradients of logits.

        Its images are a leaf of their own: autograd would have that of the recording wait for this stream.
        """
        leaf = image.detach().requires_grad_(asked)
        logits = self.model(leaf)
        if not asked:
            return None
        upstream = torch.zeros_like(logits)
        torch.autograd.grad(logits, leaf, upstream)
        return upstream


class _Answers(torch.autograd.Function):
    """The logits of a replayed network, whose gradient is replayed too."""

    @staticmethod
    def forward(ctx: Any, image: Tensor, network: Replayed, graphs: _Graphs) -> Tensor:
        ctx.save_for_backward(image)
        ctx.network, ctx.graphs = network, graphs
        logits_BK = network.ahead(graphs, image)
        ctx.turn = graphs.turn
        return logits_BK

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        if ctx.network.turn != ctx.turn:  # another replay has overwritten the activations
            ctx.network.ahead(ctx.graphs, *ctx.saved_tensors)
            ctx.turn = ctx.graphs.turn
        return ctx.network.back(ctx.graphs, *upstream), None, None


def graphs_for(device: torch.device, *models: nn.Module) -> Record | None:
    """Return what records calls of models on a GPU; None, of which the user is told, where they are not to be recorded.

    On a CPU it is None too.
    """
    if device.type != "cuda":
        return None
    reason = next(filter(None, map(why_eager, models)), "")
    if reason:
        say_once(f"note: the network runs without a CUDA graph: {reason}")
    return None if reason else CudaGraphs(device)


def eighths(most: int) -> tuple[int, ...]:
    """Return sizes up to `most`, in rising order, of which at most a quarter is padding for any number of images.

    The largest is `most`; below are 7, 6, 5 and 4 eighths of it, then those of its half, and so on.
    """
    found, top = {most}, most
    while top > LEAST:
        found |= {max(LEAST, -(-top * part // 8)) for part in (4, 5, 6, 7)}
        top = -(-top // 2)
    return tuple(sorted(found))


def _gradient(logits: Tensor, image: Tensor, upstream: Tensor) -> Tensor:
    (grad,) = torch.autograd.grad(logits, image, upstream, retain_graph=True)
    return grad


def _like(image: Tensor, size: int) -> Tensor:
    """Return black images, `size` of them, in the layout of those given."""
    if not is_dense_batch_first(image):
        return torch.zeros(size, *image.shape[1:], dtype=image.dtype, device=image.device)
    own = torch.empty_strided(
        (size, *image.shape[1:]),
        (image[0].numel(), *image.stride()[1:]),
        dtype=image.dtype,
        device=image.device,
    )
    return own.zero_()
