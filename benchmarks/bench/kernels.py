"""Each kernel against the chain of eager operations that it stands for, that chain compiled, and Liger's KL divergence.

One table a kernel, size and precision. `ratio` is a row's time in ours: above 1 ours is faster. `of bound` is what a
copy of as many bytes takes on this machine in this run, as a share of the time; the aim at the large sizes is 90% for
`pgd_step_` and `augment`, 80% for the KL. Where `host ms` is no less than `ms`, Python's launches are what was
measured, and `kernels ms` is the kernel alone. On a CPU our kernels are their plain PyTorch references, so that only a
GPU says something about them.

GB/s counts the bytes that must move, each once, whoever computes it: `pgd_step_` reads three images and writes one;
`random_start_` reads one and writes one; `augment` reads a byte and writes a float for each value; `epilogue` reads one
or two tensors and writes one, its gradient reads two and writes one; the KL reads two tensors of logits, its gradient
writes a third; `class_sums` reads one. A share of the bound over 100% says that the tensors fit in a cache, which those
of one training step do.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

from retemper.bench import kernel_cases
from retemper.bench.case import Case, PlannedCase, Request
from retemper.bench.kernel_cases import EPILOGUES, KernelSize
from retemper.bench.sweep import sweep
from retemper.engine.device import DTYPES

LARGE_BYTES = {"cuda": 2**28, "cpu": 2**22}  # of one tensor; on a GPU far beyond its cache
Cases = dict[str, tuple[Callable[[KernelSize], Case], str]]  # with the form
ON_IMAGES: Cases = {
    "pgd_step_": (kernel_cases.pgd_case, ""),
    "random_start_": (kernel_cases.start_case, ""),
    "augment": (kernel_cases.augment_case, "zeros"),
    "augment reflected": (kernel_cases.augment_case, "reflect"),
}
ON_LOGITS: Cases = {
    "class_temperature_kl forward": (kernel_cases.kl_case, ""),
    "class_temperature_kl forward and backward": (kernel_cases.kl_case, "backward"),
    "class_temperature_kl_grad_": (kernel_cases.kl_grad_case, ""),
    "class_sums": (kernel_cases.sums_case, ""),
}


def cases(request: Request) -> Iterator[PlannedCase]:
    """Yield a case for each kernel, size and precision, or the sweep of its constants."""
    for case in _cases(request):
        if not request.sweep:
            yield case
        elif "backward" not in case.name:  # two launches, and a launch of one has a case of its own
            yield sweep(case, request)


def notes(request: Request) -> list[str]:
    """Return the remarks that a reader of the figures needs."""
    return [] if request.on_gpu else ["On a CPU our kernels are their plain PyTorch references, not Triton."]


def _cases(request: Request) -> Iterator[PlannedCase]:
    for precision in ("fp32", "bf16"):
        item = DTYPES[precision].itemsize
        size = KernelSize(title="", request=request, precision=precision, batch=0)
        for batch in _batches(request, 3 * 32 * 32 * item):
            for name, (build, form) in ON_IMAGES.items():
                yield _planned(f"{name} {precision} {batch}x3x32x32", build, replace(size, batch=batch, form=form))
        for batch in request.batches((128, 1024) if request.on_gpu else (16, 128), 2):
            for form in EPILOGUES:
                title = f"epilogue {form} {precision} {batch}x64x32x32"
                yield _planned(title, kernel_cases.epilogue_case, replace(size, batch=batch, form=form))
        for classes in (10,) if request.quick else (10, 100, 1000):
            for batch in _batches(request, classes * item, few=classes > 10):
                for name, (build, form) in ON_LOGITS.items():
                    own = replace(size, batch=batch, classes=classes, form=form)
                    yield _planned(f"{name} {precision} {batch}x{classes}", build, own)


def _planned(title: str, build: Callable[[KernelSize], Case], size: KernelSize) -> PlannedCase:
    return PlannedCase(title, partial(build, replace(size, title=title)))


def _batches(request: Request, sample_bytes: int, few: bool = False) -> tuple[int, ...]:
    """Return the batch sizes of CIFAR recipes, and one so large that only bandwidth counts."""
    large = LARGE_BYTES[request.device.type] // sample_bytes
    return request.batches((128, large) if few else (128, 1024, large), 16)
