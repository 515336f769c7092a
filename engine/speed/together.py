"""Run a student's training forwards as one batch, with batch norm by forward: a twin that shares all its tensors.

The convolutions of two forwards, on clean and on attacked images, become those of one batch of twice the size. Batch
norm keeps the statistics of each forward apart (kernels/batch_norm.py), and takes in the shortcut and the ReLU behind
it. In half precision one launch casts all weights and one casts all their gradients back, where autocast takes one for
each weight. Parameters and running statistics are the student's own: its optimizer, averages and files see no twin.
Dimension key: B batch, C channels, H, W, K classes, G forwards.
"""

import builtins
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.nn import functional as F

from retemper.engine.device import is_out_of_memory
from retemper.engine.speed.trace import called, is_add, is_node, is_relu, replace
from retemper.kernels import batch_norm, batch_norm_twice

# What works on each image by itself and draws nothing: in one batch it does what it does in two.
POOLS = nn.AvgPool2d | nn.AdaptiveAvgPool2d | nn.MaxPool2d
ACTIVATIONS = nn.ReLU | nn.ReLU6 | nn.LeakyReLU | nn.ELU | nn.SiLU | nn.GELU | nn.Sigmoid | nn.Hardswish
APART = nn.Conv2d | nn.Linear | nn.Flatten | nn.Identity | POOLS | ACTIVATIONS
FUNCTIONS = {
    *(operator.add, operator.iadd, operator.sub, operator.mul, operator.truediv, builtins.getattr, torch.add),
    *(F.relu, torch.relu, F.leaky_relu, F.silu, F.gelu, F.pad, torch.flatten),
    *(F.avg_pool2d, F.adaptive_avg_pool2d, F.max_pool2d),
}
copy_all: Any = torch._foreach_copy_  # pyright: ignore[reportPrivateImportUsage]  # one launch
METHODS = {"add", "add_", "relu", "relu_", "flatten", "view", "reshape", "size", "to", "contiguous"}


@dataclass
class Forwards:
    """How the batch of the next call is made up: `groups` forwards, whose statistics `moves` names in their order."""

    groups: int = 1
    moves: Sequence[int] = (0,)


class NormTogether(nn.Module):
    """One batch norm, with the shortcut and the ReLU behind it.

    Attributes:
        source: the batch norm of the student; in a tuple, so that it is no submodule.
        forwards: how the batch is made up; all norms of a twin share it.
        relu: whether a ReLU follows.
        twice: whether the result is given as a pair, one for each of two readers.
    """

    def __init__(self, norm: nn.BatchNorm2d, forwards: Forwards) -> None:
        super().__init__()
        self.source, self.forwards = (norm,), forwards
        self.relu, self.twice = False, False

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Map (B, C, H, W) to the same shape; `residual` may be any tensor that can be added."""
        (norm,), forwards = self.source, self.forwards
        statistics: Any = norm.running_mean, norm.running_var, norm.num_batches_tracked
        how: dict[str, Any] = {"groups": forwards.groups, "moves": forwards.moves, "momentum": norm.momentum}
        how["eps"] = norm.eps
        if residual is not None and not _alike(x, residual):
            y = batch_norm(x, norm.weight, norm.bias, statistics, **how) + residual
            y = y.relu() if self.relu else y
            return (y, y) if self.twice else y
        normalise = batch_norm_twice if self.twice else batch_norm
        return normalise(x, norm.weight, norm.bias, statistics, **how, residual=residual, relu=self.relu)


def _alike(x: Tensor, y: Tensor) -> bool:
    return x.shape == y.shape and x.dtype == y.dtype and x.stride() == y.stride()


class CastAll(torch.autograd.Function):
    """Cast weights to another dtype in one launch, and their gradients back in another."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.weights = [weight.detach() for weight in weights]
        cast = [torch.empty_like(weight, dtype=dtype) for weight in weights]  # in the weight's own strides
        copy_all(cast, ctx.weights)
        return tuple(cast)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        wide = [None if g is None else torch.empty_like(w) for w, g in zip(ctx.weights, grads, strict=True)]
        copy_all([w for w in wide if w is not None], [g for g in grads if g is not None])
        return None, *wide


class Together:
    """The twin of a student in training mode.

    Args:
        student: traceable by torch.fx, on its device. It is left as it is.
        dtype: what autocast makes its convolutions compute in; None where there is no autocast.
    Raises:
        ValueError: torch.fx cannot trace it, or something in it does not work on each image by itself.
    """

    def __init__(self, student: nn.Module, dtype: torch.dtype | None = None) -> None:
        self.dtype, self.forwards = dtype, Forwards()
        self.net = _traced(student)
        for node in self.net.graph.nodes:
            if not _keeps_apart(node, self.net):
                raise ValueError(f"{type(student).__name__}: {node.format_node()} is not known to keep images apart")
        _replace_norms(self.net, self.forwards)
        _take_in_shortcuts_and_relus(self.net)
        _give_twice(self.net)
        self.net.delete_all_unused_submodules()
        self.net.recompile()
        layers = [(name, layer) for name, layer in self.net.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
        weights = {f"{name}.{key}": value for name, layer in layers for key, value in layer.named_parameters()}
        self.cast = {name: value for name, value in weights.items() if dtype and value.dtype is torch.float32}

    def __call__(self, image: Tensor, groups: int, moves: Sequence[int]) -> Tensor:
        """Return the student's logits in training mode, (B, K), under the autocast that is on.

        Args:
            image: (B, C, H, W), the images of `groups` forwards of one size, one after the other.
            moves: the forwards whose statistics move the running ones, in this order; a number may come again.
        """
        self.forwards.groups, self.forwards.moves = groups, moves
        if not self.cast:
            return self.net(image)
        cast = CastAll.apply(self.dtype, *self.cast.values())
        return functional_call(self.net, dict(zip(self.cast, cast, strict=True)), (image,))


class OneForward(nn.Module):
    """The twin for one forward at a time, each of which moves the statistics: an attack in training mode sees it."""

    def __init__(self, together: Together) -> None:
        super().__init__()
        self.together = together

    def forward(self, image: Tensor) -> Tensor:
        """Map (B, C, H, W) pixels to (B, K) logits."""
        return self.together(image, 1, (0,))


def _traced(student: nn.Module) -> fx.GraphModule:
    """Return the graph of the student in training mode, with its own modules. Raises ValueError if there is none."""
    modes = [(module, module.training) for module in student.modules()]
    try:
        return fx.symbolic_trace(student.train())
    except Exception as error:  # the model's own code may raise anything, called with a symbolic value
        if is_out_of_memory(error):
            raise
        raise ValueError(f"{type(student).__name__}: torch.fx does not trace it ({error})") from None
    finally:
        for module, training in modes:
            module.training = training


def _keeps_apart(node: fx.Node, net: fx.GraphModule) -> bool:
    """Say whether a node is known to do with a batch what it does with each image of it."""
    if node.op == "call_module":
        module = called(node, net)
        if type(module) is nn.BatchNorm2d:
            return module.affine and module.track_running_stats and module.momentum is not None
        return isinstance(module, APART)
    if node.op == "call_function":
        of_shape = node.target is operator.getitem and is_node(node.args[0]) and node.args[0].target is builtins.getattr
        return node.target in FUNCTIONS or of_shape or _is_mean_of_an_image(node, torch.mean)
    if node.op == "call_method":
        return node.target in METHODS or _is_mean_of_an_image(node, "mean")
    return True


def _is_mean_of_an_image(node: fx.Node, mean: object) -> bool:
    """Say whether it takes a mean, and not over the images of the batch."""
    dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    dims = [dims] if isinstance(dims, int) else dims
    return node.target == mean and isinstance(dims, list | tuple) and all(d in (1, 2, 3, -1, -2) for d in dims)


def _replace_norms(net: fx.GraphModule, forwards: Forwards) -> None:
    """Put a norm of ours in the place of each batch norm."""
    for number, node in enumerate(list(net.graph.nodes)):
        norm = called(node, net)
        if isinstance(norm, nn.BatchNorm2d):
            net.add_submodule(f"norm{number}", NormTogether(norm, forwards))
            node.target = f"norm{number}"


def _take_in_shortcuts_and_relus(net: fx.GraphModule) -> None:
    """Move the addition and the ReLU that follow a norm into it."""
    for node in list(net.graph.nodes):
        if is_add(node) and node.args[0] is not node.args[1]:
            first, second = node.args
            for main, other in ((first, second), (second, first)):
                if not _waits(main, net):
                    continue
                with net.graph.inserting_before(node):
                    replace(net.graph, node, net.graph.call_module(main.target, (main.args[0], other)))
                net.graph.erase_node(main)
                break
        elif is_relu(node, net):
            before = node.args[0]
            norm = called(before, net)
            if isinstance(norm, NormTogether) and len(before.users) == 1:
                norm.relu = True
                replace(net.graph, node, before)


def _waits(node: Any, net: fx.GraphModule) -> bool:
    """Say whether a norm can take in an addition: it has one reader, no residual and no ReLU."""
    norm = called(node, net)
    return isinstance(norm, NormTogether) and len(node.users) == 1 and len(node.args) == 1 and not norm.relu


def _give_twice(net: fx.GraphModule) -> None:
    """Give what a norm returns to each of its two readers apart, where there are two."""
    for node in list(net.graph.nodes):
        norm, readers = called(node, net), list(node.users)
        if isinstance(norm, NormTogether) and len(readers) == 2:
            norm.twice = True
            for number, reader in enumerate(readers):
                with net.graph.inserting_after(node):
                    part = net.graph.call_function(operator.getitem, (node, number))
                reader.replace_input_with(node, part)
