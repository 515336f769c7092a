"""The registration of the operations with PyTorch, as torch.ops.retemper.NAME.

A `torch.library.Library` takes the functions as they are: a call costs about 2 us of the host's time on top of theirs.
`torch.library.custom_op` would cost 30, and 1.4 seconds at the first call, since it imports torch._dynamo.
torch.compile, torch.export, autograd and torch.library.opcheck treat both alike.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import Library

NAMESPACE = "retemper"  # a copy of this package beside another one needs a name of its own
LIBRARY = Library(NAMESPACE, "FRAGMENT")


def operator(schema: str, *, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
    """Return a decorator that makes a function an operator, and gives the operator in its place.

    Args:
        schema: "name(Tensor x, float eps) -> Tensor", in PyTorch's language; Tensor(a!) is overwritten.
        fake: takes the arguments and returns new tensors like those of the function, without computing them.
    """
    name = schema.partition("(")[0]

    def register(function: Callable[..., Any]) -> Any:
        LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=LIBRARY)
        return getattr(getattr(torch.ops, NAMESPACE), name).default

    return register


def rewritten(schema: str) -> Callable[[Callable[..., Any]], Any]:
    """Return a decorator that makes a function an operator which PyTorch replaces by the operators it calls.

    torch.compile makes a number a constant of its graph, and a symbol once it has seen a second value. An operator with
    code of its own cannot take a symbol: PyTorch would compile the graph anew for each value, and give up after a few.
    One that is rewritten takes it as a Scalar, and can turn it into a tensor.
    """
    name = schema.partition("(")[0]

    def register(function: Callable[..., Any]) -> Any:
        LIBRARY.define(schema)
        LIBRARY.impl(name, function, "CompositeImplicitAutograd")
        return getattr(getattr(torch.ops, NAMESPACE), name).default

    return register


def differentiable(operator: Any, backward: Callable[..., Any], setup: Callable[..., None]) -> None:
    """Give an operator its gradient, once.

    Args:
        operator: what `operator` made.
        backward: takes the context and the gradients of the outputs; returns those of the inputs.
        setup: takes the context, the inputs and the output, and saves what `backward` reads.
    """
    torch.library.register_autograd(operator.name(), backward, setup_context=setup, lib=LIBRARY)


def is_symbol(number: Any) -> bool:
    """Say whether a number is a symbol of torch.compile: it has no value yet."""
    return isinstance(number, torch.SymFloat | torch.SymInt)


def overwritten(tensor: Tensor) -> None:
    """Tell autograd that a kernel has overwritten the tensor: a backward that still needs it raises then."""
    if not tensor.is_inference():
        torch.autograd.graph.increment_version(tensor)
