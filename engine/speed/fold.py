"""Fold batch norm into the convolutions of a network: its twin for eval mode, which attacks and teachers run.

    bn(conv(x)) = conv'(x) + shift;   conv' = scale * conv,  scale = gamma / sqrt(var + eps),  shift = beta - scale mean

The twin adds a shortcut and applies a ReLU where it adds the shift (engine/speed/folded_layers.py). Its parameters are
frozen: an attack then pays for input gradients alone, under torch.compile too, which computes the gradient of every
parameter that requires one. Dimension key: B batch, C channels, H, W, K classes.
"""

import copy
import operator
from typing import TypeGuard

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from retemper.engine.device import is_out_of_memory
from retemper.engine.speed.folded_layers import BATCH_NORM, FoldedConv, FoldedLayer, FoldedNorm, padding_of
from retemper.engine.speed.trace import called, is_add, is_node, is_relu, replace
from retemper.kernels.fold_weights import fold_norms_, scale_rows_

READ_ONLY = (operator.add, torch.add)  # functions that leave their arguments as they are


class Folded(nn.Module):
    """The twin of a network: its function in eval mode, with batch norm folded.

    Args:
        model: traceable by torch.fx; what it adds to a folded convolution's output has the same shape. The twin is on
            its device and in its memory format, and shares no tensor with it.
        dtype: what the twin computes in. Images are cast to it, and logits come back in it.
        epilogue: how shift, shortcut and ReLU are computed: "plain" PyTorch, one "fused" kernel, in the call of the
            "convolution" where cuDNN can, or "compiled".
    Raises:
        ValueError: torch.fx cannot trace the model.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype = torch.float32, epilogue: str = "plain") -> None:
        super().__init__()
        self.dtype = dtype
        net, fused = _traced(model), epilogue in ("fused", "convolution")
        form = epilogue if fused else "plain"
        self.folded = tuple(_fold_norms(net, model, dtype, form))  # a tuple: `net` has them already
        self.handed_over = _take_in_shortcuts_and_relus(net)
        if fused:
            _take_in_sums(net)
            _take_in_means_and_second_gradients(net)
            _leave_masks_to_depthwise(net)
        net.delete_all_unused_submodules()
        net.recompile()
        self._copies(net, model)
        self.at_once = epilogue == "convolution"
        half = dtype in (torch.float16, torch.bfloat16)
        self._vectors(torch.float32 if half and fused else dtype)  # PyTorch's own wants its inputs' dtype
        net.eval().requires_grad_(False)
        self.net = torch.compile(net, dynamic=False) if epilogue == "compiled" else net
        self.refresh()

    def forward(self, image: Tensor) -> Tensor:
        """Map (B, C, H, W) pixels to (B, K) logits."""
        return self.net(self.as_seen(image))

    def as_seen(self, image: Tensor) -> Tensor:
        """Return pixels in the dtype of the twin. An attack takes its gradient there: it need not be cast back."""
        return image.to(self.dtype)

    def _copies(self, net: fx.GraphModule, model: nn.Module) -> None:
        """Cast what is not folded, such as the last layer; a batch norm that stays keeps its float32 tensors."""
        calls = [node for node in net.graph.nodes if node.target is F.batch_norm]  # of a module that is none of torch's
        kept = {str(one.target) for node in calls for one in node.all_input_nodes}
        for place, module in net.named_modules():
            if not isinstance(module, FoldedConv | FoldedNorm | BATCH_NORM):
                for name, parameter in module.named_parameters(recurse=False):
                    if f"{place}.{name}" not in kept:
                        parameter.data = parameter.data.to(self.dtype)
        source = dict(_values(model))
        self.copied = [(value, source[name]) for name, value in _values(net) if name in source]

    def _vectors(self, dtype: torch.dtype) -> None:
        """Make one vector for all shifts and one for all scales, which one launch fills."""
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
        self.rounded = self.shift.to(self.dtype) if self.at_once else self.shift  # or the vector itself, of that dtype
        if self.rounded is not self.shift:
            self.copied.append((self.rounded, self.shift))  # in the launch that copies what is not folded
        self.scales = self.scale.split(sizes)
        shortcuts = {conv: shortcut for shortcut, conv in self.handed_over}
        self.shortcuts = [self.folded.index(shortcuts[f]) if f in shortcuts else -1 for f in self.folded]
        vectors = zip(self.folded, self.scales, self.shift.split(sizes), self.rounded.split(sizes), strict=True)
        for folded, scale, shift, rounded in vectors:
            folded.shift = shift
            if isinstance(folded, FoldedConv):
                folded.rounded = rounded
            else:
                folded.scale = scale

    @torch.no_grad()
    def refresh(self) -> "Folded":
        """Fold the weights and statistics that the network holds now, and return the twin.

        It is done in place: no tensor changes its address, so that a captured step stays valid.
        """
        if self.folded:
            self._fold()
        if self.copied:
            values, sources = zip(*self.copied, strict=True)
            torch._foreach_copy_(values, sources)  # pyright: ignore[reportPrivateImportUsage]
        return self

    def _fold(self) -> None:
        """Write every scale and shift, and every folded weight: two launches on a GPU."""
        norms = [folded.source[-1] for folded in self.folded]
        mean, var = ([n.get_buffer(name) for n in norms] for name in ("running_mean", "running_var"))
        gamma, beta = [n.weight for n in norms], [n.bias for n in norms]
        fold_norms_(gamma, beta, mean, var, self.eps, self.scale, self.shift, self.shortcuts)
        sources, scales, weights = [], [], []
        for folded, scale in zip(self.folded, self.scales, strict=True):
            if isinstance(folded, FoldedConv):
                weight = folded.source[0].weight
                if isinstance(weight, nn.Parameter):
                    sources.append(weight)
                    scales.append(scale)
                    weights.append(folded.weight)
                else:  # it is computed anew for each use, in another place
                    folded.refresh(scale)
        scale_rows_(sources, scales, weights)


def _traced(model: nn.Module) -> fx.GraphModule:
    """Return the graph of a copy of `model` in eval mode. Raises ValueError if torch.fx cannot trace it."""
    try:
        return fx.symbolic_trace(copy.deepcopy(model).eval())
    except Exception as error:  # the model's own code may raise anything, copied or called with a symbolic value
        if is_out_of_memory(error):
            raise
        raise ValueError(
            f"{type(model).__name__} cannot be folded, torch.fx does not trace it ({error}): set fold=False"
        ) from None


def _values(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Return parameters and statistics by name, without the counters of batches; they share memory with the module."""
    named = [*((name, parameter.data) for name, parameter in module.named_parameters()), *module.named_buffers()]
    return [(name, value) for name, value in named if value.is_floating_point()]


def _fold_norms(net: fx.GraphModule, model: nn.Module, dtype: torch.dtype, form: str) -> list[FoldedConv | FoldedNorm]:
    """Replace every batch norm, with the convolution that feeds it and nothing else, by a folded module."""
    made: list[FoldedConv | FoldedNorm] = []
    for node in list(net.graph.nodes):
        norm, before = called(node, model), node.args[0] if node.args else None
        if not (isinstance(norm, BATCH_NORM) and norm.affine and norm.track_running_stats):
            continue
        conv = called(before, model)
        if is_node(before) and len(before.users) == 1 and _is_plain(conv):
            folded, inputs = FoldedConv(conv, norm, dtype, form), before.args
        elif form != "plain":
            folded, inputs = FoldedNorm(norm), node.args
        else:
            continue  # PyTorch's own is one pass as well
        name = f"folded{len(made)}"
        net.add_submodule(name, folded)
        made.append(folded)
        with net.graph.inserting_before(node):
            node.replace_all_uses_with(net.graph.call_module(name, inputs))
        net.graph.erase_node(node)
        if is_node(before) and not before.users:
            net.graph.erase_node(before)
    return made


def _take_in_shortcuts_and_relus(net: fx.GraphModule) -> tuple[tuple[FoldedConv, FoldedConv], ...]:
    """Move the addition and the ReLU that follow a folded module into it.

    Returns:
        Pairs of a shortcut without a shift of its own and the convolution that adds that shift.
    """
    handed_over = []
    for node in list(net.graph.nodes):
        if is_add(node) and node.args[0] is not node.args[1]:
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
                replace(net.graph, node, new)
                net.graph.erase_node(main)
                break
        elif is_relu(node, net):
            before = node.args[0]
            folded = called(before, net)
            if isinstance(folded, FoldedConv | FoldedNorm) and len(before.users) == 1:
                folded.relu = True
                replace(net.graph, node, before)
    return tuple(handed_over)


def _take_in_sums(net: fx.GraphModule) -> None:
    """Move the addition before a folded norm with a ReLU into it; it returns the sum too, for who else needs it."""
    for node in list(net.graph.nodes):
        norm, before = called(node, net), node.args[0] if node.args else None
        if not (isinstance(norm, FoldedNorm) and norm.relu and is_node(before) and is_add(before)):
            continue
        added = before.all_input_nodes
        if len(added) == 1 or (before.target is operator.iadd and len(added[0].users) > 1):
            continue
        norm.adds = True
        with net.graph.inserting_before(before):
            both = net.graph.call_module(str(node.target), tuple(added))
            total, y = (net.graph.call_function(operator.getitem, (both, place)) for place in (0, 1))
        replace(net.graph, before, total)
        replace(net.graph, node, y)


def _take_in_means_and_second_gradients(net: fx.GraphModule) -> None:
    """Let a layer with a ReLU return the mean over its pixels, or its output twice where it goes to two places."""
    for node in list(net.graph.nodes):
        layer = _answering(node, net)
        if layer is None:
            continue
        users = list(node.users)
        if len(users) == 1 and _is_mean(users[0]):
            layer.pooled = True
            replace(net.graph, users[0], node)
        elif len(users) == 2 and all(_reads_once(user, node, net) for user in users):
            layer.twice = True
            source, first = (node.args[0], 1) if layer.adds else (node, 0)
            with net.graph.inserting_after(node):
                outputs = [net.graph.call_function(operator.getitem, (source, first + place)) for place in (0, 1)]
            for user, output in zip(users, outputs, strict=True):
                user.replace_input_with(node, output)
            if layer.adds:
                net.graph.erase_node(node)


def _leave_masks_to_depthwise(net: fx.GraphModule) -> None:
    """Let a depthwise convolution mask the gradient of its input, where that comes from a ReLU and goes there alone."""
    for node in net.graph.nodes:
        layer, before = called(node, net), node.args[0] if node.args else None
        if not (isinstance(layer, FoldedConv) and layer.depthwise and layer.relu and is_node(before)):
            continue
        first = called(before, net)
        if isinstance(first, FoldedConv) and first.relu and len(before.users) == 1 and len(node.args) == 1:
            first.mask_left = layer.masks_x = True


def _is_plain(conv: nn.Module | None) -> TypeGuard[nn.Conv2d]:
    """Say whether it is a convolution that can be folded."""
    if not isinstance(conv, nn.Conv2d) or conv.bias is not None or conv.padding_mode != "zeros":
        return False
    return padding_of(conv) is not None


def _waiting_conv(node: object, net: fx.GraphModule) -> FoldedConv | None:
    """Return the folded convolution that `node` calls if it can take in an addition: one user, no residual, no ReLU."""
    folded = called(node, net)
    free = is_node(node) and len(node.users) == 1 and len(node.args) == 1
    return folded if isinstance(folded, FoldedConv) and free and not folded.relu else None


def _answering(node: fx.Node, net: fx.GraphModule) -> FoldedLayer | None:
    """Return the layer with a ReLU whose y this is; one that returns a sum too has y in second place."""
    source = node.args[0] if node.target is operator.getitem else node
    layer = called(source, net)
    if not isinstance(layer, FoldedLayer) or not layer.relu:
        return None
    is_y = source is not node and node.args[1] == 1 if layer.adds else source is node
    return layer if is_y else None


def _is_mean(node: fx.Node) -> bool:
    """Say whether it is x.mean((2, 3)), the mean over the pixels."""
    dims = node.args[1] if len(node.args) == 2 else node.kwargs.get("dim")
    usual = isinstance(dims, tuple | list) and tuple(dims) in ((2, 3), (-2, -1)) and not node.kwargs.keys() - {"dim"}
    return usual and (node.op, node.target) in (("call_method", "mean"), ("call_function", torch.mean))


def _reads_once(user: fx.Node, node: fx.Node, net: fx.GraphModule) -> bool:
    """Say whether it takes the value of `node` once, and leaves it as it is."""
    leaves = isinstance(called(user, net), FoldedLayer | nn.Conv2d) or user.target in READ_ONLY
    in_place = user.target is operator.iadd and user.args[0] is not node
    return (leaves or in_place) and list(user.args).count(node) == 1
