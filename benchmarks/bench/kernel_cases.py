"""What the cases of all kernels share: the size of one, its inputs, and ours beside the chain that it stands for.

image_cases.py and logit_cases.py hold the cases. A function `NAME_case` builds one; the chain beside it, `eager_NAME`,
is what a user would write in PyTorch. Images are (B, 3, H, W), of `augment` (B, H, W, 3) bytes; logits (B, K), labels
and views (B,) int64, temperatures (K,).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from retemper.bench.case import Case, Check, Contender, Request, Work, near_to
from retemper.engine.device import DTYPES

OURS, EAGER, COMPILED = "retemper", "eager chain", "torch.compile of it"
TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2, "fp16": 3e-3}  # of the largest value
CHECKED = 512  # samples, the first ones, where a check needs a copy in float64


@dataclass(frozen=True, kw_only=True)
class KernelSize:
    """The size, the precision and the form in which one kernel is measured.

    Attributes:
        side: the height and the width of an image, in pixels.
        channels: of the tensors of `epilogue`.
        form: one word of the case's own: which norm, noise, padding, operands or gradient.
    """

    title: str
    request: Request
    precision: str
    batch: int
    classes: int = 10
    side: int = 32
    channels: int = 64
    form: str = ""

    @property
    def device(self) -> torch.device:
        return self.request.device

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.precision]

    @property
    def tolerance(self) -> float:
        return TOLERANCE[self.precision]

    def near(self, expected: Tensor, rows: int = CHECKED) -> Check:
        """Return a check that the first rows of a result are `expected` but for rounding."""
        return near_to(expected, self.tolerance, lambda result: result[:rows])

    def images(self) -> Tensor:
        """Return random images, (B, 3, H, W), channels-last."""
        image = torch.rand(self.batch, 3, self.side, self.side, device=self.device).to(self.dtype)
        return image.to(memory_format=torch.channels_last)

    def logits(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return random logits of student and teacher, (B, K) each, labels (B,) and temperatures (K,)."""
        shape = self.batch, self.classes
        student, teacher = (3 * torch.randn(*shape, device=self.device, dtype=self.dtype) for _ in range(2))
        label = torch.randint(self.classes, (self.batch,)).to(self.device)
        return student, teacher, label, torch.linspace(0.5, 5, self.classes, device=self.device)

    def case(
        self,
        ours: Contender,
        chain: Callable[..., Any],
        given: Sequence[Any],
        check: Check,
        must_move: int,
        *others: Contender,
        wrap: Callable[[Callable[[], Any]], Callable[[], Any]] = lambda call: call,
    ) -> Case:
        """Return the case of our kernel beside `chain(*given)`, eager and under torch.compile without graph breaks.

        Args:
            check: of the chain's result, eager and compiled.
            must_move: bytes that the work reads and writes at least.
            wrap: makes the call to time of a call of the chain.
        """
        eager = Contender(name=EAGER, call=wrap(lambda: chain(*given)), check=check)
        compiled = Contender(name=COMPILED, reason="left out by --quick")
        if not self.request.quick:
            fast = torch.compile(chain, fullgraph=True, dynamic=False)
            compiled = Contender(name=COMPILED, call=wrap(lambda: fast(*given)), check=check, compiled=True)
        contenders = [ours, eager, compiled, *others]
        work = Work(bytes=must_move)
        about: dict[str, Any] = {"work": work, "precision": self.precision, "own_time": True, "conclude": slower}
        return Case(name=self.title, contenders=contenders, **about)


def bytes_of(tensor: Tensor) -> int:
    """Return the bytes of a tensor's values."""
    return tensor.numel() * tensor.element_size()


def slower(rows: list[dict[str, Any]]) -> str | None:
    """Return a line that says by how much ours is slower than the eager chain; None where it is not, or not known."""
    ours, ratio = rows[0], next((row["ratio"] for row in rows if row["name"] == EAGER), None)
    if ours["name"] != OURS or not ratio or ratio["median"] >= 1:
        return None
    return (
        f"{ours['table']}: slower than the eager chain, {1 / ratio['median']:.2f} of its time "
        f"({1 / ratio['p90']:.2f} to {1 / ratio['p10']:.2f})"
    )
