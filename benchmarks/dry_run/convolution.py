"""A convolution as cuDNN was asked for it, with what is fused into it: read from the text of a record."""

import re
from dataclasses import dataclass
from math import prod

ITEM = {"f64": 8, "f32": 4, "bf16": 2, "f16": 2}
TENSOR = re.compile(r"(\w)=(\w+)\[([\d,]+)\]")
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Convolution:
    """One launch of cuDNN.

    Attributes:
        kind: "forward", "input_gradient" or "weight_gradient".
        x, w, y: shapes (N, C, H, W), (K, C / groups, R, S), (N, K, P, Q), of a gradient those of what it belongs to.
        item: bytes of a number of x.
        bytes: of all tensors in memory, those of fused operations too.
        fused: the operations after the convolution, "add", "relu" and so on.
    """

    kind: str
    x: Shape
    w: Shape
    y: Shape
    item: int
    bytes: int
    fused: tuple[str, ...]
    stride: int

    @property
    def flop(self) -> int:
        return 2 * prod(self.y) * prod(self.w[1:])

    @property
    def groups(self) -> int:
        return self.x[1] // self.w[1]

    def as_product(self) -> tuple[int, int, int]:
        """Return (m, n, k) of the matrix product that it comes to, for one group."""
        n, c, h, w = self.x
        k, _, r, s = self.w
        _, _, p, q = self.y
        if self.kind == "forward":
            return n * p * q, k, c * r * s
        if self.kind == "input_gradient":
            return n * h * w, c, k * r * s // self.stride**2
        return k, c * r * s, n * p * q


def read(name: str) -> Convolution:
    """Return the convolution that the name of a record describes.

    Raises:
        ValueError: it describes none.
    """
    first, *fused = name.removeprefix("cudnn ").split(" + ")
    tensors = tensors_of(name)
    by_role = {
        role: (item, shape) for role, item, shape in [*tensors, *tensors_of(first)]
    }  # a fused y is the last one's
    stride = re.search(r"stride=(\d+)", first)
    if not by_role.keys() >= set("xwy") or stride is None:
        raise ValueError(f"no convolution: {name}")
    return Convolution(
        kind=first.split()[0],
        x=by_role["x"][1],
        w=by_role["w"][1],
        y=by_role["y"][1],
        item=by_role["x"][0],
        bytes=sum(item * prod(shape) for _, item, shape in tensors),
        fused=tuple(one.partition(" ")[0] for one in fused),
        stride=int(stride[1]),
    )


def tensors_of(text: str) -> list[tuple[str, int, Shape]]:
    """Return the role, the bytes of a number, and the shape of every tensor in the text."""
    return [
        (role, ITEM.get(dtype, 4), tuple(int(number) for number in dimensions.split(",")))
        for role, dtype, dimensions in TENSOR.findall(text)
    ]
