"""The registration of the operations with PyTorch, as torch.ops.retemper.NAME.

A `torch.library.Library` takes the functions as they are: a call costs about 2 us of the host's time on top of theirs,
and 5 where autograd stands between. `torch.library.custom_op` would cost 30, and 1.4 seconds at the first call, since
it imports torch._dynamo. torch.compile, torch.export, autograd and torch.library.opcheck treat both alike.

An eager loop is bound by the host, and needs nothing of this: where nobody else sees a call, `operator` calls the
function itself.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.library import Library

# The types of arguments of which no other part of PyTorch wants to see a call.
PLAIN = frozenset((Tensor, float, int, bool, str, torch.dtype, type(None)))
NAMESPACE = "retemper"  # a copy of this package beside another one needs a name of its own
LIBRARY = Library(NAMESPACE, "FRAGMENT")


def operator(schema: str, *, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], "Operator"]:
    """Return a decorator that makes a function an operator, and gives what calls it in its place.

    Args:
        schema: "name(Tensor x, float eps) -> Tensor", in PyTorch's language; Tensor(a!) is overwritten.
        fake: takes the arguments and returns new tensors like those of the function, without computing them.
    """
    name = schema.partition("(")[0]

    def register(function: Callable[..., Any]) -> Operator:
        LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=LIBRARY)
        return Operator(function, getattr(getattr(torch.ops, NAMESPACE), name).default)

    return register


class Operator:
    """A function and the operator that it is to PyTorch. Called, without keywords, it is whichever is needed.

    Attributes:
        function: computes.
        of_torch: the operator.
        recorded: computes and has autograd record it; its last argument is None. None where there is no gradient.
    """

    def __init__(self, function: Callable[..., Any], of_torch: Any) -> None:
        self.function = function
        self.of_torch = of_torch
        self.recorded: Callable[..., Any] | None = None

    def __call__(self, *arguments: Any) -> Any:
        if _seen(arguments):
            return self.of_torch(*arguments)
        if self.recorded is not None and torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments):
            return self.recorded(*arguments, None)
        return self.function(*arguments)


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


def _seen(arguments: tuple[Any, ...]) -> bool:
    """Say whether a part of PyTorch looks at each operator that is called on these arguments.

    It is a compiler or a tracer, a transform of torch.func, the forward mode of autograd, a mode such as that of fake
    tensors, or a tensor of a class of its own.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._is_tracing()
        or forward_ad._current_level >= 0
        or not PLAIN.issuperset(map(type, arguments))
    )


def differentiable(operator: Operator, backward: Callable[..., Any], setup: Callable[..., None]) -> None:
    """Give an operator its gradient, once: to differentiate the gradient is an error, and so is the forward mode.

    `torch.library.register_autograd` would do the same, and cost 30 us a call.

    Args:
        operator: what `operator` made of a schema without defaults, since PyTorch leaves out what equals a default.
        backward: takes the context and the gradients of the outputs; returns those of the inputs, and None after them.
        setup: takes the context, the inputs and the output, and saves what `backward` reads.
    """
    after, of_torch = torch._C._after_autograd_keyset, operator.of_torch

    class Gradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            *given, keys = inputs
            if keys is None:
                output = operator.function(*given)
            else:
                with torch._C._AutoDispatchBelowAutograd():
                    output = of_torch.redispatch(keys & after, *given)
            setup(ctx, given, output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return *differentiated_once(backward, ctx, *grads), None

    def autograd(keys: Any, *inputs: Any) -> Any:
        if (torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs)) or forward_ad._current_level >= 0:
            return Gradient.apply(*inputs, keys)
        with torch._C._AutoDispatchBelowAutograd():
            return of_torch.redispatch(keys & after, *inputs)

    LIBRARY.impl(of_torch._schema.name.partition("::")[2], autograd, "Autograd", with_keyset=True)
    operator.recorded = Gradient.apply


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
