"""A convolution as cuDNN was asked for it, with what is fused into it: read from the text of a record."""

import re
from dataclasses import dataclass
from math import prod

ITEM = {"f64": 8, "f32": 4, "bf16": 2, "f16": 2}
TENSOR = re.compile(r"(\w)=(\w+)\[([\d,]+)\](nhwc|nchw)?")
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
        layouts: "nhwc" or "nchw", each that a tensor has.
    """

    kind: str
    x: Shape
    w: Shape
    y: Shape
    item: int
    bytes: int
    fused: tuple[str, ...]
    stride: int
    layouts: frozenset[str]

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
    tensors = [(role, item, shape_of(dimensions), layout) for role, item, dimensions, layout in TENSOR.findall(name)]
    by_role = {role: (item, shape) for role, item, shape, _ in tensors if role in "xwy"}
    stride = re.search(r"stride=(\d+)", first)
    if len(by_role) != 3 or stride is None:
        raise ValueError(f"no convolution: {name}")
    return Convolution(
        kind=first.split()[0],
        x=by_role["x"][1],
        w=by_role["w"][1],
        y=by_role["y"][1],
        item=ITEM.get(by_role["x"][0], 4),
        bytes=sum(ITEM.get(item, 4) * prod(shape) for _, item, shape, _ in tensors),
        fused=tuple(one.partition(" ")[0] for one in fused),
        stride=int(stride[1]),
        layouts=frozenset(layout for _, _, shape, layout in tensors if layout and has_layout(shape)),
    )


def shape_of(dimensions: str) -> Shape:
    return tuple(int(number) for number in dimensions.split(","))


def has_layout(shape: Shape) -> bool:
    """Return whether two layouts differ: not with one channel or one pixel."""
    return len(shape) == 4 and shape[1] > 1 and shape[2] * shape[3] > 1
