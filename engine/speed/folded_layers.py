"""The layers of a folded network, each with what follows it, and their input gradients.

    y = act(conv'(x) + shift [+ residual])         `FoldedConv`
    y = act(scale * (x [+ residual]) + shift)      `FoldedNorm`

With a ReLU, a layer has a gradient of its own. It adds the gradients of the two places that y goes to, spreads that of
y's mean over the pixels, and masks, in one launch; then comes the convolution's. Dimension key: B batch, C channels, H,
W.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from retemper.console import say
from retemper.engine.device import is_out_of_memory
from retemper.kernels import epilogue
from retemper.kernels.depthwise import depthwise, depthwise_grad
from retemper.kernels.epilogue import epilogue_grad, epilogue_of_sum
from retemper.kernels.operators import differentiated_once, keep
from retemper.kernels.runtime import runs_triton

BATCH_NORM = nn.BatchNorm2d | nn.SyncBatchNorm  # the same function in eval mode


class FoldedLayer(nn.Module):
    """What a folded convolution and a folded norm have in common.

    Attributes:
        relu: whether act is a ReLU; otherwise it is the identity.
        twice: whether y is returned twice, for two places that it goes to. Each gives a gradient of its own.
        pooled: whether the mean of y over its pixels, (B, C), is returned in place of y.
        adds: whether the sum of x and the residual is returned too, before y.
        mask_left: whether the mask of the ReLU is left to the layer that y goes to.
        scale, shift: (C',), views of the twin's vectors of all scales and shifts; `scale` of a norm alone.
    """

    def __init__(self) -> None:
        super().__init__()
        self.relu = self.twice = self.pooled = self.adds = self.mask_left = False
        self.scale: Tensor | None = None
        self.shift = torch.empty(0)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        """Map (B, C, H, W) to (B, C', H', W'), or to what the attributes say."""
        wanted = x.requires_grad or (residual is not None and residual.requires_grad)
        if self.relu and wanted and torch.is_grad_enabled():
            return _WithGradient.apply(self, x, residual)
        return self.handed_out(*self.compute(x, residual))

    def compute(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return y, and the sum of x and the residual where `adds` asks for it."""
        raise NotImplementedError

    def input_gradient(self, grad: Tensor, x: Tensor) -> Tensor:
        """Return the gradient of x, given that of what the activation takes; a norm is given no x."""
        raise NotImplementedError

    def gradient_at_once(self, grad: Tensor, x: Tensor, y: Tensor) -> Tensor | None:
        """Return the gradient of x, given that of y, where one launch has it; a norm is given no x."""
        return None

    def handed_out(self, y: Tensor, total: Tensor | None) -> Any:
        """Return what the network sees of the layer: a tensor, or a tuple of them."""
        seen = [y.mean((2, 3))] if self.pooled else [y, y.detach()] if self.twice else [y]
        seen = seen if total is None else [total, *seen]
        return tuple(seen) if len(seen) > 1 else seen[0]


class _WithGradient(torch.autograd.Function):
    """A layer with a ReLU."""

    @staticmethod
    def forward(ctx: Any, layer: FoldedLayer, x: Tensor, residual: Tensor | None) -> Any:
        y, total = layer.compute(x, residual)
        ctx.layer = layer
        ctx.set_materialize_grads(False)
        keep(ctx, x if isinstance(layer, FoldedConv) else None, y)
        return layer.handed_out(y, total)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        return None, *differentiated_once(_gradients, ctx, *grads)


def _gradients(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of x and of the residual."""
    layer, (x, y) = ctx.layer, ctx.saved_tensors
    of_total, of_y = (grads[0], grads[1:]) if layer.adds else (None, grads)
    first, second, *_ = *(one for one in of_y if one is not None), None, None
    whole = None if first is None else layer.gradient_at_once(first, x, y)
    if whole is not None:
        return whole, None
    if layer.mask_left:
        grad = first
    else:
        grad = of_total if first is None else epilogue_grad(first, y, layer.scale, False, second, of_total)[0]
    if grad is None:
        return None, None
    _, of_x, of_residual = ctx.needs_input_grad  # autograd sums a gradient over what was broadcast
    return layer.input_gradient(grad, x) if of_x else None, grad if of_residual else None


class FoldedConv(FoldedLayer):
    """One convolution and the batch norm behind it: y = act(conv'(x) + shift [+ residual]).

    Args:
        form: "plain" for PyTorch's operations, one after the other; "fused" for one kernel after the convolution;
            "convolution" for one call of cuDNN that does all where it can, and the kernel elsewhere.
    Attributes:
        source: the convolution and the batch norm of the network; in a tuple, so that they are no submodules.
        bare: whether the shift is left to another convolution, whose shortcut this one is.
        masks_x: whether the mask of the ReLU that x came from was left to this layer.
        rounded: (C',), the shift in the dtype of the weight.
        depthwise: whether the layer has a kernel of its own, that of a depthwise convolution.
        known: whether cuDNN takes images of a shape in one call, for each that was tried.
        shapes: of the convolution's output, by that of its input.
    """

    weight: Tensor

    def __init__(self, conv: nn.Conv2d, norm: BATCH_NORM, dtype: torch.dtype, form: str) -> None:
        super().__init__()
        self.source = (conv, norm)
        self.form, self.bare, self.masks_x = form, False, False
        self.register_buffer("weight", conv.weight.detach().to(dtype, copy=True))
        self.rounded = torch.empty(0)
        self.depthwise = form == "convolution" and _is_depthwise(conv)
        self.padding: tuple[int, ...] = padding_of(conv) or (0, 0)
        self.known: dict[Any, bool] = {}
        self.shapes: dict[Any, tuple[int, ...]] = {}

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        """Map (B, C, H, W) to (B, C', H', W'), the convolution's output, or to what the attributes say."""
        if self.form == "plain":
            return self._plain(x, residual, self.shift)
        return super().forward(x.to(self.weight.dtype), residual)

    def compute(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return y; nothing is added before the convolution."""
        if residual is None and self._runs_depthwise(x):
            return depthwise(x, self.weight, self.shift, *self._square, True), None
        if self.form == "convolution":
            y = self._at_once(x, residual) if x.is_cuda else self._plain(x, residual, self.rounded)
            if y is not None:
                return y, None
        y = self._convolve(x)
        if self.bare:
            return y, None
        if residual is not None:
            y, residual = _alike(y, residual)
        return epilogue(y, self.shift, residual=residual, relu=self.relu), None

    def input_gradient(self, grad: Tensor, x: Tensor) -> Tensor:
        """Return the gradient of x, given that of the convolution's output."""
        conv, grad = self.source[0], grad.sum_to_size(self._output_shape(x))
        geometry = conv.stride, self.padding, conv.dilation, False, [0, 0], conv.groups
        wanted = [True, False, False]  # that of neither weight nor bias
        found = torch.ops.aten.convolution_backward(grad, x, self.weight, None, *geometry, wanted)[0]
        return torch.ops.aten.threshold_backward(found, x, 0) if self.masks_x else found

    def gradient_at_once(self, grad: Tensor, x: Tensor, y: Tensor) -> Tensor | None:
        """Return the gradient of x, given that of y, of a depthwise convolution; None of another layer."""
        if grad.dim() != 4 or self.twice or not self._runs_depthwise(x):
            return None
        return depthwise_grad(grad, y, self.weight, x, *self._square, self.masks_x)

    @property
    def _square(self) -> tuple[int, int]:
        """The stride and the padding, where rows and columns have the same."""
        return self.source[0].stride[0], self.padding[0]

    def _runs_depthwise(self, x: Tensor) -> bool:
        usual = self.depthwise and self.relu and x.is_contiguous(memory_format=torch.channels_last)
        return usual and runs_triton(x)

    def _convolve(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        conv = self.source[0]
        return F.conv2d(x, self.weight, shift, conv.stride, self.padding, conv.dilation, conv.groups)

    def _plain(self, x: Tensor, residual: Tensor | None, shift: Tensor) -> Tensor:
        y = self._convolve(x, None if self.bare else shift)
        if residual is not None:
            y = y.add_(residual) if y.shape == residual.shape else y + residual
        return y.relu_() if self.relu else y

    def _at_once(self, x: Tensor, residual: Tensor | None) -> Tensor | None:
        """Return y from one call of cuDNN, or None where that cannot be.

        Which shapes cuDNN takes shows at the first call. A graph is captured after calls of its shapes; one that was
        not tried takes no risk there.
        """
        conv, asked = self.source[0], (x.shape, None if residual is None else (residual.shape, residual.dtype))
        known = self.known.get(asked)
        if known is None and torch.cuda.is_current_stream_capturing():
            return None
        if known is False or not self.relu or conv.groups > 1 or torch.are_deterministic_algorithms_enabled():
            return None  # cuDNN may take any of its algorithms here, also one whose sums differ from run to run
        if residual is not None and (residual.dtype != x.dtype or residual.shape != self._output_shape(x)):
            return None
        geometry = conv.stride, self.padding, conv.dilation, conv.groups
        try:
            if residual is None:
                y = torch.cudnn_convolution_relu(x, self.weight, self.rounded, *geometry)
            else:
                y = torch.cudnn_convolution_add_relu(x, self.weight, residual, 1.0, self.rounded, *geometry)
        except RuntimeError as error:
            if known or is_out_of_memory(error):
                raise
            _tell(str(error).strip().splitlines()[0])
            self.known[asked] = False
            return None
        self.known[asked] = True
        return y

    def _output_shape(self, x: Tensor) -> tuple[int, ...]:
        conv, shape = self.source[0], self.shapes.get(x.shape)
        if shape is None:
            sizes = zip(x.shape[2:], conv.kernel_size, conv.stride, self.padding, conv.dilation, strict=True)
            pixels = [(n + 2 * pad - gap * (size - 1) - 1) // step + 1 for n, size, step, pad, gap in sizes]
            shape = self.shapes[x.shape] = x.shape[0], conv.out_channels, *pixels
        return shape

    @torch.no_grad()
    def refresh(self, scale: Tensor) -> None:
        """Write the network's weight, times `scale` (C',), into this one's."""
        torch.mul(self.source[0].weight, scale[:, None, None, None], out=self.weight)


class FoldedNorm(FoldedLayer):
    """A batch norm that no convolution feeds alone: y = act(scale * (x [+ residual]) + shift).

    Attributes:
        source: the batch norm of the network; in a tuple, so that it is no submodule.
    """

    def __init__(self, norm: BATCH_NORM) -> None:
        super().__init__()
        self.source = (norm,)

    def compute(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return y and, where there is a residual, its sum with x."""
        if not (x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)):
            x = x.contiguous()
        if residual is None:
            return epilogue(x, self.shift, scale=self.scale, relu=self.relu), None
        total, y = epilogue_of_sum(*_alike(x, residual), self.shift, self.scale, self.relu)
        return y, total

    def input_gradient(self, grad: Tensor, x: Tensor) -> Tensor:
        """Return the gradient of x, given that of the sum."""
        return grad


def _is_depthwise(conv: nn.Conv2d) -> bool:
    """Say whether it filters each channel, with a square kernel and one stride and padding."""
    squares = conv.kernel_size, conv.stride, padding_of(conv) or (0, 1), conv.dilation
    each = conv.groups == conv.in_channels == conv.out_channels > 1
    return each and conv.dilation[0] == 1 and all(size[0] == size[1] for size in squares)


def padding_of(conv: nn.Conv2d) -> tuple[int, ...] | None:
    """Return the pixels of padding at each side of H and W; None where the two sides differ."""
    if not isinstance(conv.padding, str):
        return tuple(conv.padding)
    both = [dilation * (size - 1) for dilation, size in zip(conv.dilation, conv.kernel_size, strict=True)]
    if conv.padding == "valid":
        return 0, 0
    return None if any(pixels % 2 for pixels in both) else tuple(pixels // 2 for pixels in both)


def _alike(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Return two tensors as an addition sees them: of one shape, and in the dtype and layout of the first."""
    if first.shape != second.shape:
        shape = torch.broadcast_shapes(first.shape, second.shape)
        first = first if first.shape == shape else first.expand(shape).contiguous()
    elif first.stride() == second.stride() and first.dtype == second.dtype:
        return first, second
    return first, torch.empty_like(first).copy_(second)


@cache
def _tell(reason: str) -> None:
    """Say once that cuDNN does less in one call than it might."""
    say(f"note: cuDNN does not take a convolution with its ReLU in one call here ({reason}); it takes two launches")
