"""Questions about the nodes of a graph that torch.fx has traced, and one change of it."""

import operator
from typing import TypeGuard

import torch
from torch import fx, nn
from torch.nn import functional as F


def is_node(value: object) -> TypeGuard[fx.Node]:
    """Say whether an argument is the result of another node, and not a constant."""
    return isinstance(value, fx.Node)


def called(node: object, model: nn.Module) -> nn.Module | None:
    """Return the module of `model` that `node` calls, or None if it calls none."""
    return model.get_submodule(str(node.target)) if is_node(node) and node.op == "call_module" else None


def is_relu(node: fx.Node, model: nn.Module) -> bool:
    """Say whether it is a ReLU, as a function or as a module of `model`."""
    function = node.op == "call_function" and node.target in (F.relu, torch.relu)
    return function or isinstance(called(node, model), nn.ReLU)


def is_add(node: fx.Node) -> bool:
    """Say whether it adds the results of two nodes."""
    two = len(node.args) == 2 and all(map(is_node, node.args)) and not node.kwargs
    return node.op == "call_function" and node.target in (operator.add, operator.iadd, torch.add) and two


def replace(graph: fx.Graph, node: fx.Node, by: fx.Node) -> None:
    """Let all that read `node` read `by`, and take `node` out of the graph."""
    node.replace_all_uses_with(by)
    graph.erase_node(node)
