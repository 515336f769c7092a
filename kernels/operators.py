"""The registration of the operations with PyTorch, as torch.ops.retemper.NAME.

A `torch.library.Library` takes the functions as they are: a call costs about 2 us of the host's time on top of theirs.
`torch.library.custom_op` would cost 30, and 1.4 seconds at the first call, since it imports torch._dynamo.
torch.compile, torch.export, autograd and torch.library.opcheck treat both alike.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
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
    """Give an operator its gradient, once: to differentiate the gradient is an error, and so is the forward mode.

    `torch.library.register_autograd` would do the same, and cost 30 us a call.

    Args:
        operator: what `operator` made of a schema without defaults, since PyTorch leaves out what equals a default.
        backward: takes the context and the gradients of the outputs; returns those of the inputs, and None after them.
        setup: takes the context, the inputs and the output, and saves what `backward` reads.
    """
    after = torch._C._after_autograd_keyset

    class Gradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            *given, keys = inputs
            with torch._C._AutoDispatchBelowAutograd():
                output = operator.redispatch(keys & after, *given)
            setup(ctx, given, output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return *differentiated_once(backward, ctx, *grads), None

    def autograd(keys: Any, *inputs: Any) -> Any:
        if (torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs)) or forward_ad._current_level >= 0:
            return Gradient.apply(*inputs, keys)
        with torch._C._AutoDispatchBelowAutograd():
            return operator.redispatch(keys & after, *inputs)

    LIBRARY.impl(operator._schema.name.partition("::")[2], autograd, "Autograd", with_keyset=True)


def keep(ctx: Any, *tensors: Tensor | None) -> None:
    """Save tensors for the backward. Of those made in inference mode, which autograd cannot save, it saves copies."""
    ctx.save_for_backward(*(t.clone() if t is not None and t.is_inference() else t for t in tensors))


class _Last(torch.autograd.Function):
    """The identity, which no gradient passes."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError("the gradient of an operation of retemper is differentiated again; it has a first one only")


def differentiated_once(backward: Callable[..., Any], ctx: Any, *grads: Any) -> tuple[Any, ...]:
    """Return the gradients that `backward` computes. Where autograd records them, to differentiate them is an error.

    `torch.autograd.function.once_differentiable` would record nothing where the gradients of the outputs are constants,
    and so lose the second derivative without a word.
    """
    if not torch.is_grad_enabled():
        return backward(ctx, *grads)
    with torch.no_grad():
        found = backward(ctx, *grads)
    return tuple(None if grad is None else _Last.apply(grad.detach().requires_grad_()) for grad in found)


def is_symbol(number: Any) -> bool:
    """Say whether a number is a symbol of torch.compile: it has no value yet."""
    return isinstance(number, torch.SymFloat | torch.SymInt)


def overwritten(tensor: Tensor) -> None:
    """Tell autograd that a kernel has overwritten the tensor: a backward that still needs it raises then."""
    if not tensor.is_inference():
        torch.autograd.graph.increment_version(tensor)
