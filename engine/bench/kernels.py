"""Each kernel against the chain of eager operations that it stands for, that chain compiled, and Liger's KL divergence.

On a CPU our kernels are their plain PyTorch references, so that only a GPU says something about them.

GB/s counts the bytes that must move, each once, whoever computes it: `pgd_step_` reads three images and writes one;
`random_start_` reads one and writes one; `augment` reads a byte and writes a float for each value; `epilogue` reads one
or two tensors and writes one, its gradient reads two and writes one; the KL reads two tensors of logits, its gradient
writes a third; `class_sums` reads one. A share of the bound over 100% says that the tensors fit in a cache, which those
of one training step do.
"""

from collections.abc import Iterator
from functools import partial

from retemper.engine.bench.image_kernels import EPILOGUES, IMAGE_RACES, epilogue_race
from retemper.engine.bench.logit_kernels import LOGIT_RACES
from retemper.engine.bench.plan import Plan, Request
from retemper.engine.bench.sweep import sweep
from retemper.engine.device import DTYPES

LARGE_BYTES = {"cuda": 2**28, "cpu": 2**22}  # of one tensor; on a GPU far beyond its cache


def plan(request: Request) -> Iterator[Plan]:
    """The races, each built when its turn comes; or their sweeps."""
    for race in races(request):
        if not request.sweep:
            yield race
        elif "backward" not in race.name:  # two launches, and a launch of one has a race of its own
            yield sweep(race, request)


def notes(request: Request) -> list[str]:
    """What a reader of the figures must know."""
    return [] if request.on_gpu else ["On a CPU our kernels are their plain PyTorch references, not Triton."]


def races(request: Request) -> Iterator[Plan]:
    """Each kernel, at each size, in each precision."""
    for precision in ("fp32", "bf16"):
        item = DTYPES[precision].itemsize
        for batch in sizes(request, 3 * 32 * 32 * item):
            for name, build in IMAGE_RACES.items():
                title = f"{name} {precision} {batch}x3x32x32"
                yield Plan(title, partial(build, title, request, precision, batch))
        for batch in request.batches((128, 1024) if request.on_gpu else (16, 128), 2):
            for form in EPILOGUES:
                title = f"epilogue {form} {precision} {batch}x64x32x32"
                yield Plan(title, partial(epilogue_race, title, request, precision, batch, form))
        for classes in (10,) if request.quick else (10, 100, 1000):
            for batch in sizes(request, classes * item, few=classes > 10):
                shape = f"{precision} {batch}x{classes}"
                for name, build in LOGIT_RACES.items():
                    yield Plan(f"{name} {shape}", partial(build, f"{name} {shape}", request, precision, batch, classes))


def sizes(request: Request, sample_bytes: int, few: bool = False) -> tuple[int, ...]:
    """Batches: those of CIFAR recipes, and one so large that only bandwidth counts."""
    large = LARGE_BYTES[request.device.type] // sample_bytes
    return request.batches((128, large) if few else (128, 1024, large), 16)
