"""Each kernel against the chain of eager operations that it stands for, that chain compiled, and Liger's KL divergence;
`strong_augment` against Pillow.

One table a kernel, size and precision. `ratio` is a row's time in ours: above 1 ours is faster. `of bound` is what a
copy of as many bytes takes on this machine in this run, as a share of the time; the aim at the large sizes is 90% for
`pgd_step_` and `augment`, 80% for the KL. Where `host ms` is no less than `ms`, Python's launches are what was
measured, and `kernels ms` is the kernel alone. On a CPU our kernels are their plain PyTorch references.

GB/s counts the bytes that must move, each once, whoever computes it: `pgd_step_` reads three images and writes one;
`random_start_` reads one and writes one; `augment` and `strong_augment` read a byte and write a float for each value;
`epilogue` reads one or two tensors and writes one, its gradient reads two and writes one; the divergences read two
tensors of logits, their gradients write a third; `class_pair` reads three, its gradients write two more; `class_sums`
reads one. A share of the bound over 100% says that the tensors fit in a cache, which those of one training step do.

The tables of host_time.py say how long a call holds Python, those of first_call.py what the first one of a process
takes.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

from retemper.bench import image_cases, logit_cases, strong_cases
from retemper.bench.case import Case, PlannedCase, Request
from retemper.bench.first_call import first_call_cases
from retemper.bench.host_time import host_case
from retemper.bench.kernel_cases import KernelSize
from retemper.bench.sweep import sweep
from retemper.engine.device import DTYPES

LARGE_BYTES = {"cuda": 2**28, "cpu": 2**22}  # of one tensor; on a GPU far beyond its cache
VOCABULARY = 512, 32_000  # rows and classes of a language model
Build = Callable[[KernelSize], Case]
IMAGES: dict[str, tuple[Build, str]] = {  # with the form
    "pgd_step_": (image_cases.pgd_case, "linf"),
    "pgd_step_ l2": (image_cases.pgd_case, "l2"),
    "random_start_": (image_cases.start_case, "uniform"),
    "random_start_ normal": (image_cases.start_case, "normal"),
    "random_start_ l2": (image_cases.start_case, "l2"),
    "augment": (image_cases.augment_case, "zeros"),
    "augment reflected": (image_cases.augment_case, "reflect"),
}
STRONG: dict[str, tuple[Build, str]] = {
    f"strong_augment {policy}": (strong_cases.strong_case, policy) for policy in ("cropshift", "idbh-weak")
}
EPILOGUES: dict[str, tuple[Build, str]] = {
    f"epilogue {form}": (image_cases.epilogue_case, form) for form in image_cases.EPILOGUES
}
LOGITS: dict[str, tuple[Build, str]] = {
    "class_temperature_kl forward": (logit_cases.kl_case, ""),
    "class_temperature_kl forward and backward": (logit_cases.kl_case, "backward"),
    "class_temperature_kl_grad_": (logit_cases.kl_grad_case, ""),
    "class_temperature_js forward": (logit_cases.js_case, ""),
    "class_temperature_js forward and backward": (logit_cases.js_case, "backward"),
    "class_pair forward": (logit_cases.pair_case, ""),
    "class_pair forward and backward": (logit_cases.pair_case, "backward"),
    "class_sums": (logit_cases.sums_case, ""),
}


def cases(request: Request) -> Iterator[PlannedCase]:
    """Yield a case for each kernel, size and precision, the host's time and the first call; or the constants' sweep."""
    if request.sweep:
        for case in _sized(request):
            if "backward" not in case.name:  # two launches, and a launch of one has a case of its own
                yield sweep(case, request)
        return
    yield from _sized(request)
    for name, (build, form) in (IMAGES | EPILOGUES | LOGITS).items():
        yield host_case(name, build, form, request)
    yield from first_call_cases(request)


def notes(request: Request) -> list[str]:
    """Return the remarks that a reader of the figures needs."""
    if request.on_gpu:
        return []
    return [
        "On a CPU our kernels are their plain PyTorch references, not Triton.",
        "With one thread the times are the processor's own: what else runs on the machine adds little to them.",
    ]


def _sized(request: Request) -> Iterator[PlannedCase]:
    """Yield the cases of a training step's sizes, of a large one, and of a language model's."""
    for precision in ("fp32", "bf16", "fp16") if request.on_gpu else ("fp32", "bf16"):
        item = DTYPES[precision].itemsize
        size = KernelSize(title="", request=request, precision=precision, batch=0)
        for name in IMAGES:
            for batch in _batches(request, 3 * 32 * 32 * item, few=" " in name):
                yield _planned(f"{name} {precision} {batch}x3x32x32", IMAGES[name], replace(size, batch=batch))
        for name in STRONG:
            for batch in request.batches((128,), 16):
                yield _planned(f"{name} {precision} {batch}x3x32x32", STRONG[name], replace(size, batch=batch))
        for name in EPILOGUES:
            for batch in request.batches((128, 1024) if request.on_gpu else (16, 128), 2):
                yield _planned(f"{name} {precision} {batch}x64x32x32", EPILOGUES[name], replace(size, batch=batch))
        for batch, classes in _rows(request, item):
            for name in LOGITS:
                own = replace(size, batch=batch, classes=classes)
                yield _planned(f"{name} {precision} {batch}x{classes}", LOGITS[name], own)


def _planned(title: str, built: tuple[Build, str], size: KernelSize) -> PlannedCase:
    build, form = built
    return PlannedCase(title, partial(build, replace(size, title=title, form=form)))


def _rows(request: Request, item: int) -> Iterator[tuple[int, int]]:
    """Yield the sizes (B, K) of logits whose items take so many bytes."""
    for classes in (10,) if request.quick else (10, 100, 1000):
        for batch in _batches(request, classes * item, few=classes > 10):
            yield batch, classes
    if not request.quick and request.batch is None:
        yield VOCABULARY


def _batches(request: Request, sample_bytes: int, few: bool) -> tuple[int, ...]:
    """Return the batch sizes of CIFAR recipes, and one so large that only bandwidth counts, unless it is near those."""
    large = LARGE_BYTES[request.device.type] // sample_bytes
    usual = (128,) if few and request.on_gpu else (128, 1024)
    return request.batches((*usual, large) if large > 2 * usual[-1] else usual, 16)
