"""A case for each kernel: ours, the chain of eager operations that it stands for, and that chain compiled.

A function `NAME_case` builds a case; the chain beside it, `eager_NAME`, is what a user would write in PyTorch. Images
are (B, 3, 32, 32), of `augment` (B, 32, 32, 3) bytes; logits (B, K), labels and views (B,) int64, temperatures (K,).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from retemper.bench.case import Case, Check, Contender, Request, Work, equal_to, near_to
from retemper.bench.peers import library, missing
from retemper.engine.device import DTYPES
from retemper.kernels import (
    augment,
    augment_reference,
    class_sums,
    class_temperature_kl,
    class_temperature_kl_grad_,
    class_temperature_kl_grad_reference,
    class_temperature_kl_reference,
    epilogue,
    num_views,
    pgd_step_,
    pgd_step_reference,
    random_start_,
)

OURS, EAGER, COMPILED = "retemper", "eager chain", "torch.compile of it"
STEP, EPS = 2 / 255, 8 / 255
TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2}  # of the largest value
SUM_TOLERANCE = 1e-3  # of a sum over millions of rows in float32, which an eager chain adds up one by one
CHECKED = 512  # samples, the first ones, where a check needs a copy in float64
EPILOGUES = {  # what is done -> how many tensors are read and written
    "shift relu": 2,
    "shift residual relu": 3,
    "scale shift residual relu": 3,
    "shift residual relu, forward and backward": 6,
}


@dataclass(frozen=True, kw_only=True)
class KernelSize:
    """The size, the precision and the form in which one kernel is measured."""

    title: str
    request: Request
    precision: str
    batch: int
    classes: int = 10
    form: str = ""

    @property
    def device(self) -> torch.device:
        return self.request.device

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.precision]

    def near(self, expected: Tensor, rows: int = CHECKED) -> Check:
        """Return a check that the first rows of a result are `expected` but for rounding."""
        return near_to(expected, TOLERANCE[self.precision], lambda result: result[:rows])

    def images(self) -> Tensor:
        """Return random images, (B, 3, 32, 32), channels-last."""
        image = torch.rand(self.batch, 3, 32, 32, device=self.device).to(self.dtype)
        return image.to(memory_format=torch.channels_last)

    def logits(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return random logits of student and teacher, (B, K) each, labels (B,) and temperatures (K,)."""
        shape = self.batch, self.classes
        student, teacher = (3 * torch.randn(*shape, device=self.device, dtype=self.dtype) for _ in range(2))
        label = torch.randint(self.classes, (self.batch,), device=self.device)
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
        return Case(name=self.title, contenders=contenders, work=Work(bytes=must_move), precision=self.precision)


def bytes_of(tensor: Tensor) -> int:
    """Return the bytes of a tensor's values."""
    return tensor.numel() * tensor.element_size()


def eager_pgd_step(adv: Tensor, grad: Tensor, clean: Tensor) -> Tensor:
    moved = adv + STEP * grad.sign()
    return torch.min(torch.max(moved, clean - EPS), clean + EPS).clamp(0, 1)


def pgd_case(size: KernelSize) -> Case:
    """Return the case of a step of PGD in the L-inf ball; our kernel works in place."""
    clean = size.images()
    adv, grad = (clean + 0.02 * torch.randn_like(clean)).clamp_(0, 1), torch.randn_like(clean)
    expected = pgd_step_reference(adv[:CHECKED].cpu(), grad[:CHECKED].cpu(), clean[:CHECKED].cpu(), STEP, EPS)
    own = adv.clone()
    ours = Contender(
        name=OURS,
        call=lambda: pgd_step_(own, grad, clean, STEP, EPS),
        exactness="bitwise",
        check=equal_to(expected, lambda result: result[:CHECKED]),
        prepare=lambda: own.copy_(adv),
    )
    return size.case(ours, eager_pgd_step, (adv, grad, clean), size.near(expected), 4 * bytes_of(clean))


def eager_start(clean: Tensor) -> Tensor:
    return (clean + torch.empty_like(clean).uniform_(-EPS, EPS)).clamp_(0, 1)


def start_case(size: KernelSize) -> Case:
    """Return the case of a uniform random start. Draws differ: range, ball and mean size of the noise are checked."""
    clean = size.images().mul_(0.8).add_(0.1)
    adv, seed = torch.empty_like(clean), torch.zeros(1, dtype=torch.int64, device=size.device)
    most = EPS + 2**-8 * (size.precision != "fp32") + 1e-6

    def check(result: Tensor) -> str | None:
        noise = (result[:CHECKED].double() - clean[:CHECKED].double()).abs()
        if float(noise.max()) > most or float(result.min()) < 0 or float(result.max()) > 1:
            return "it leaves the ball or the range of pixels"
        mean = float(noise.mean()) / (EPS / 2)
        return None if abs(mean - 1) < 0.1 else f"the mean size of its noise is {mean:.2f} of a uniform one's"

    ours = Contender(
        name=OURS,
        call=lambda: random_start_(adv, clean, EPS, noise="uniform", seed=seed),
        exactness="different algorithm",  # a counter-based generator, the same draws on every device
        check=check,
    )
    return size.case(ours, eager_start, (clean,), check, 2 * bytes_of(clean))


def eager_augment(image: Tensor, view: Tensor, dtype: torch.dtype, mode: str) -> Tensor:
    """Pad, then gather by index, as a data set on the device is usually cropped and flipped."""
    side = image.shape[1]
    place = torch.arange(side, device=image.device)
    x = torch.where((view % 2 == 1)[:, None], place.flip(0), place) + (view // 2 % 9)[:, None]
    y = place + (view // 18)[:, None]
    if mode == "reflect":  # by index, since torch reflects no bytes
        x, y = (side - 1 - (side - 1 - (at - 4).abs()).abs() for at in (x, y))
    else:
        image = F.pad(image, (0, 0, 4, 4, 4, 4))
    sample = torch.arange(len(image), device=image.device)[:, None, None]
    return (image[sample, y[:, :, None], x[:, None, :]].float() / 255).to(dtype).permute(0, 3, 1, 2)


def augment_case(size: KernelSize) -> Case:
    """Return the case of the random crop and flip of bytes, padded by 4, and their conversion to pixels in [0, 1].

    The form is the padding's mode.
    """
    image = torch.randint(256, (size.batch, 32, 32, 3), dtype=torch.uint8, device=size.device)
    view = torch.randint(num_views(4), (size.batch,), device=size.device)
    few = image[:CHECKED].cpu(), view[:CHECKED].cpu()
    expected = augment_reference(*few, padding_mode=size.form, dtype=size.dtype)
    ours = Contender(
        name=OURS,
        call=lambda: augment(image, view, padding_mode=size.form, dtype=size.dtype),
        exactness="bitwise",
        check=equal_to(expected, lambda result: result[:CHECKED]),
    )
    must_move = image.numel() * (1 + size.dtype.itemsize) + 8 * size.batch
    return size.case(ours, eager_augment, (image, view, size.dtype, size.form), size.near(expected), must_move)


def eager_epilogue(x: Tensor, shift: Tensor, scale: Tensor | None, residual: Tensor | None) -> Tensor:
    y = (x if scale is None else x * scale[:, None, None]) + shift[:, None, None]
    return F.relu(y if residual is None else y + residual)


def epilogue_case(size: KernelSize) -> Case:
    """Return the case of one of EPILOGUES, after a convolution. With "backward" a call gives the gradient of x."""

    def fresh() -> Tensor:
        x = torch.randn(size.batch, 64, 32, 32, device=size.device, dtype=size.dtype)
        return x.to(memory_format=torch.channels_last)

    backward = size.form.endswith("backward")
    x, grad = fresh().requires_grad_(backward), fresh()
    residual = fresh() if "residual" in size.form else None
    shift = torch.randn(64, device=size.device)
    scale = torch.rand(64, device=size.device) + 0.5 if "scale" in size.form else None
    own_shift, own_scale = shift.to(x.dtype), None if scale is None else scale.to(x.dtype)  # or they widen the result

    def whole(forward: Callable[[], Tensor]) -> Callable[[], Tensor]:
        return (lambda: torch.autograd.grad(forward(), x, grad)[0]) if backward else forward

    few = slice(0, 16)
    wide_scale = None if scale is None else scale.double()
    wide_residual = None if residual is None else residual[few].double()
    expected = eager_epilogue(x.detach()[few].double(), shift.double(), wide_scale, wide_residual)
    expected = grad[few].double() * (expected > 0) if backward else expected
    check = size.near(expected, 16)
    call = whole(lambda: epilogue(x, shift, scale=scale, residual=residual))
    ours = Contender(name=OURS, call=call, exactness="rounding", check=check)
    given = (x, own_shift, own_scale, residual)
    return size.case(ours, eager_epilogue, given, check, EPILOGUES[size.form] * bytes_of(x), wrap=whole)


def eager_kl(student: Tensor, teacher: Tensor, label: Tensor, temperature: Tensor) -> Tensor:
    tempered = teacher.float() / temperature[label][:, None]
    return F.kl_div(student.float().log_softmax(1), tempered.softmax(1), reduction="batchmean")


def kl_case(size: KernelSize) -> Case:
    """Return the case of the KL, or with the form "backward" of its gradient.

    Liger's KL knows no class temperatures and wants (log-)probabilities. The teacher's, tempered, are given to it ready
    made, and so cost it nothing; the student's log-softmax is in its time.
    """
    student, teacher, label, temperature = given = size.logits()
    backward = size.form == "backward"
    student.requires_grad_(backward)
    tempered = (teacher.float() / temperature[label][:, None]).softmax(1)
    truth = kl_gradient_of_first(given) / size.batch if backward else kl_of_rows(given).mean()
    check = size.near(truth) if backward else near_to(truth, TOLERANCE[size.precision])

    def whole(loss: Callable[[], Tensor]) -> Callable[[], Tensor]:
        return (lambda: torch.autograd.grad(loss(), student)[0]) if backward else loss

    def liger() -> Tensor:
        kl = library("liger_kernel.ops.kl_div").LigerKLDivLossFunction
        return kl.apply(student.float().log_softmax(1), tempered, "batchmean")

    call = whole(lambda: class_temperature_kl(student, teacher, label, temperature))
    ours = Contender(name=OURS, call=call, exactness="rounding", check=check)
    reason = missing("liger_kernel") if size.request.on_gpu else "needs a GPU: it has no path for a CPU"
    call = None if reason else whole(liger)
    peer = Contender(name="Liger, teacher tempered beforehand", call=call, check=check, reason=reason)
    must_move = (3 if backward else 2) * bytes_of(student) + 12 * size.batch
    return size.case(ours, eager_kl, given, check, must_move, peer, wrap=whole)


def kl_of_rows(given: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
    """Return the KL of each row, (B,) in float64."""
    student, teacher, label, temperature = given
    return class_temperature_kl_reference(student.detach().double(), teacher, label, temperature)


def kl_gradient_of_first(given: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
    """Return the gradient of the KL of each of the first rows, in float64."""
    student, teacher, label = (part[:CHECKED] for part in given[:3])
    return class_temperature_kl_grad_reference(student.detach().double(), teacher, label, given[3])


def eager_kl_grad(student: Tensor, teacher: Tensor, label: Tensor, temperature: Tensor) -> Tensor:
    tempered = teacher.float() / temperature[label][:, None]
    return (student.float().softmax(1) - tempered.softmax(1)).to(student.dtype)


def kl_grad_case(size: KernelSize) -> Case:
    """Return the case of the KL's gradient. Ours overwrites its logits: later calls work on gradients, as fast."""
    student, teacher, label, temperature = given = size.logits()
    own, check = student.clone(), size.near(kl_gradient_of_first(given))
    ours = Contender(
        name=OURS,
        call=lambda: class_temperature_kl_grad_(own, teacher, label, temperature),
        exactness="rounding",
        check=check,
        prepare=lambda: own.copy_(student),
    )
    return size.case(ours, eager_kl_grad, given, check, 3 * bytes_of(student) + 8 * size.batch)


def eager_sums(student: Tensor, label: Tensor, classes: int) -> tuple[Tensor, Tensor, Tensor]:
    loss = F.cross_entropy(student.float(), label, reduction="none")
    hit = (student.argmax(1) == label).long()
    none = torch.zeros(classes, dtype=torch.int64, device=label.device)
    sums = torch.zeros(classes, device=label.device).index_add_(0, label, loss)
    return sums, none.index_add(0, label, hit), none.index_add(0, label, torch.ones_like(label))


def sums_case(size: KernelSize) -> Case:
    """Return the case of the sums by class: cross-entropies, hits, images."""
    student, _, label, _ = size.logits()
    loss_B = F.cross_entropy(student.double(), label, reduction="none")
    loss = torch.zeros(size.classes, dtype=torch.float64, device=size.device).index_add_(0, label, loss_B)
    correct = label[student.double().argmax(1) == label].bincount(minlength=size.classes)
    count = label.bincount(minlength=size.classes)
    checks = [
        near_to(loss, SUM_TOLERANCE, lambda result: result[0]),
        equal_to(correct, lambda result: result[1]),
        equal_to(count, lambda result: result[2]),
    ]

    def check(result: Any) -> str | None:
        return next((wrong for each in checks if (wrong := each(result))), None)

    ours = Contender(
        name=OURS, call=lambda: class_sums(student, label, size.classes), exactness="rounding", check=check
    )
    return size.case(ours, eager_sums, (student, label, size.classes), check, bytes_of(student) + 8 * size.batch)
