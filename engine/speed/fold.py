"""A network's twin for eval mode, its batch norm folded into the convolutions: what an attack and a teacher look at.

    bn(conv(x)) = conv'(x) + shift;   conv' = scale * conv,  scale = gamma / sqrt(var + eps),  shift = beta - scale mean

Where a shortcut is added, or a ReLU taken, that is done with the shift in one go (kernels/epilogue.py). The twin's
parameters are frozen, so that an attack pays for input gradients alone; under torch.compile too, which computes the
gradient of every parameter that asks for one.
"""

import copy
import operator
from typing import TypeGuard

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from retemper.kernels import epilogue

STEM_CHANNELS = 4  # what a padded stem has
BATCH_NORM = nn.BatchNorm2d | nn.SyncBatchNorm  # which are the same in eval mode


class FoldedConv(nn.Module):
    """y = act(conv'(x) + shift [+ residual]), for one convolution and the batch norm behind it."""

    weight: Tensor

    def __init__(self, conv: nn.Conv2d, norm: BATCH_NORM, dtype: torch.dtype, fused: bool, pad_stem: bool) -> None:
        super().__init__()
        self.source = (conv, norm)  # in a tuple: not submodules
        self.fused, self.relu = fused, False
        self.bare = False  # its shift is added by the convolution that it is the shortcut of
        inputs = conv.weight.shape[1]
        self.pad = STEM_CHANNELS - inputs if pad_stem and conv.groups == 1 and inputs < STEM_CHANNELS else 0
        self.register_buffer("weight", F.pad(conv.weight.detach(), (0, 0, 0, 0, 0, self.pad)).to(dtype, copy=True))
        self.shift = torch.empty(0)  # a part of the twin's one vector of shifts

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """(B, C, H, W) to the convolution's output; `residual` is like that."""
        if self.pad:
            x = F.pad(x, (0, 0, 0, 0, 0, self.pad))
        conv = self.source[0]
        shift = None if self.fused or self.bare else self.shift
        y = F.conv2d(x, self.weight, shift, conv.stride, conv.padding, conv.dilation, conv.groups)
        if self.fused:
            return y if self.bare else epilogue(y, self.shift, residual=residual, relu=self.relu)
        y = y if residual is None else y.add_(residual)
        return y.relu_() if self.relu else y

    @torch.no_grad()
    def take(self, scale: Tensor) -> None:
        """Take over the convolution's weight, scaled."""
        weight = self.source[0].weight
        torch.mul(weight, scale[:, None, None, None], out=self.weight[:, : weight.shape[1]])


class FoldedNorm(nn.Module):
    """y = act(scale * x + shift), for a batch norm that no convolution feeds."""

    def __init__(self, norm: BATCH_NORM) -> None:
        super().__init__()
        self.source = (norm,)
        self.relu = False
        self.scale = self.shift = torch.empty(0)  # parts of the twin's vectors

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to its like."""
        return epilogue(x, self.shift, scale=self.scale, relu=self.relu)


class Folded(nn.Module):
    """The twin of `model`. `refresh()` takes over the weights and statistics that `model` holds now.

    Args:
        model: traceable by torch.fx; what it adds to a folded convolution's output has the same shape. The twin is on
            its device and in its memory format.
        dtype: what the twin computes in; images are cast to it, logits come back in it.
        epilogue: "plain", "fused" or "compiled".
        pad_stem: see `Moves`.
    Raises:
        ValueError: torch.fx cannot trace the model.
    """

    def __init__(
        self, model: nn.Module, dtype: torch.dtype = torch.float32, epilogue: str = "plain", pad_stem: bool = False
    ) -> None:
        super().__init__()
        self.dtype = dtype
        try:
            net = fx.symbolic_trace(copy.deepcopy(model).eval())
        except Exception as error:  # whatever the model's own code raises on a symbolic value
            raise ValueError(
                f"{type(model).__name__} cannot be folded, torch.fx does not trace it ({error}): set fold=False"
            ) from None
        folded = _fold_norms(net, model, dtype, epilogue == "fused", pad_stem)
        self.handed_over = _take_in_shortcuts_and_relus(net)
        net.delete_all_unused_submodules()
        net.recompile()
        self.folded = tuple(folded)  # a tuple: they are submodules of `net` already
        self._copies(net, model)
        half = dtype in (torch.float16, torch.bfloat16)
        self._vectors(torch.float32 if half and epilogue == "fused" else dtype)  # PyTorch's own wants its inputs' dtype
        net.eval().requires_grad_(False)
        self.net = torch.compile(net, dynamic=False) if epilogue == "compiled" else net
        self.refresh()

    def forward(self, image: Tensor) -> Tensor:
        """(B, C, H, W) pixels -> (B, K) logits."""
        return self.net(image.to(self.dtype))

    def _copies(self, net: fx.GraphModule, model: nn.Module) -> None:
        """Cast what is not folded, such as the last layer; a batch norm among it keeps its float32 statistics."""
        for module in net.modules():
            if not isinstance(module, FoldedConv | FoldedNorm | BATCH_NORM):
                for parameter in module.parameters(recurse=False):
                    parameter.data = parameter.data.to(self.dtype)
        source = dict(_values(model))
        self.copied = [(value, source[name]) for name, value in _values(net) if name in source]

    def _vectors(self, dtype: torch.dtype) -> None:
        """One vector for all shifts and one for all scales, so that folding takes a dozen launches, not hundreds."""
        norms = [folded.source[-1] for folded in self.folded]
        sizes = [norm.num_features for norm in norms]
        if not norms:
            return
        weight = norms[0].weight
        device = weight.device
        self.scale = torch.ones(sum(sizes), device=device, dtype=weight.dtype)
        self.shift = torch.zeros(sum(sizes), device=device, dtype=dtype)
        eps = [norm.eps for norm in norms]
        self.eps = torch.tensor(eps, dtype=weight.dtype).repeat_interleave(torch.tensor(sizes)).to(device)
        self.scales = self.scale.split(sizes)
        for folded, scale, shift in zip(self.folded, self.scales, self.shift.split(sizes), strict=True):
            folded.shift = shift
            if isinstance(folded, FoldedNorm):
                folded.scale = scale

    @torch.no_grad()
    def refresh(self) -> "Folded":
        """Fold anew, in place: no tensor changes its address, so that a captured step stays valid."""
        for value, source in self.copied:
            value.copy_(source)
        norms = [folded.source[-1] for folded in self.folded]
        if not norms:
            return self
        var, mean = (torch.cat([n.get_buffer(name) for n in norms]) for name in ("running_var", "running_mean"))
        gamma, beta = torch.cat([n.weight for n in norms]), torch.cat([n.bias for n in norms])
        torch.mul(gamma, torch.rsqrt(var + self.eps), out=self.scale)
        self.shift.copy_(beta - self.scale * mean)
        for folded, scale in zip(self.folded, self.scales, strict=True):
            if isinstance(folded, FoldedConv):
                folded.take(scale)
        for shortcut, conv in self.handed_over:
            conv.shift += shortcut.shift
        return self


def _values(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters and statistics by name, each as the tensor that lives on; no counters."""
    named = [*((name, parameter.data) for name, parameter in module.named_parameters()), *module.named_buffers()]
    return [(name, value) for name, value in named if value.is_floating_point()]


def _fold_norms(
    net: fx.GraphModule, model: nn.Module, dtype: torch.dtype, fused: bool, pad_stem: bool
) -> list[FoldedConv | FoldedNorm]:
    """Put a folded module in the place of every batch norm, and of the convolution that feeds it and nothing else."""
    made: list[FoldedConv | FoldedNorm] = []
    for node in list(net.graph.nodes):
        norm, before = _called(node, model), node.args[0] if node.args else None
        if not (isinstance(norm, BATCH_NORM) and norm.affine and norm.track_running_stats):
            continue
        conv = _called(before, model)
        if _is_node(before) and len(before.users) == 1 and _is_plain(conv):
            folded, inputs = FoldedConv(conv, norm, dtype, fused, pad_stem), before.args
        elif fused:
            folded, inputs = FoldedNorm(norm), node.args
        else:
            continue  # PyTorch's own is one pass as well
        name = f"folded{len(made)}"
        net.add_submodule(name, folded)
        made.append(folded)
        with net.graph.inserting_before(node):
            node.replace_all_uses_with(net.graph.call_module(name, inputs))
        net.graph.erase_node(node)
        if _is_node(before) and not before.users:
            net.graph.erase_node(before)
    return made


def _take_in_shortcuts_and_relus(net: fx.GraphModule) -> tuple[tuple[FoldedConv, FoldedConv], ...]:
    """Give every folded module the addition and the ReLU that follow it.

    Returns:
        The shortcuts whose shift is left to another convolution, each with that one.
    """
    handed_over = []
    for node in list(net.graph.nodes):
        if _is_add(node) and node.args[0] is not node.args[1]:
            first, second = node.args
            for main, other in ((first, second), (second, first)):
                conv, shortcut = _waiting_conv(main, net), _waiting_conv(other, net)
                if conv is None:
                    continue
                if shortcut is not None:
                    shortcut.bare = True
                    handed_over.append((shortcut, conv))
                with net.graph.inserting_before(node):
                    new = net.graph.call_module(main.target, (main.args[0], other))
                _replace(net, node, new)
                net.graph.erase_node(main)
                break
        elif _is_relu(node, net):
            before = node.args[0]
            folded = _called(before, net)
            if isinstance(folded, FoldedConv | FoldedNorm) and len(before.users) == 1:
                folded.relu = True
                _replace(net, node, before)
    return tuple(handed_over)


def _is_plain(conv: nn.Module | None) -> TypeGuard[nn.Conv2d]:
    return isinstance(conv, nn.Conv2d) and conv.bias is None and conv.padding_mode == "zeros"


def _replace(net: fx.GraphModule, node: fx.Node, by: fx.Node) -> None:
    node.replace_all_uses_with(by)
    net.graph.erase_node(node)


def _is_node(node: object) -> TypeGuard[fx.Node]:
    return isinstance(node, fx.Node)


def _called(node: object, model: nn.Module) -> nn.Module | None:
    """The module of `model` that `node` calls; None where it calls none."""
    return model.get_submodule(str(node.target)) if _is_node(node) and node.op == "call_module" else None


def _is_relu(node: fx.Node, net: fx.GraphModule) -> bool:
    function = node.op == "call_function" and node.target in (F.relu, torch.relu)
    return function or isinstance(_called(node, net), nn.ReLU)


def _is_add(node: fx.Node) -> bool:
    two = len(node.args) == 2 and all(map(_is_node, node.args)) and not node.kwargs
    return node.op == "call_function" and node.target in (operator.add, operator.iadd, torch.add) and two


def _waiting_conv(node: object, net: fx.GraphModule) -> FoldedConv | None:
    """The folded convolution that `node` calls, if its output goes to one place and nothing was done to it yet."""
    folded = _called(node, net)
    free = _is_node(node) and len(node.users) == 1 and len(node.args) == 1
    return folded if isinstance(folded, FoldedConv) and free and not folded.relu else None
