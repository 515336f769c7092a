"""Examine the installation: what is installed, what works, and the exact command for what is missing."""

import importlib.metadata
import importlib.util
import platform
from collections.abc import Iterator

from retemper import __version__
from retemper.engine.run.job import default_cache
from retemper.loaders import DATASETS, DataError, ffcv_problem, load_split
from retemper.loaders.ffcv_library import INSTALL
from retemper.provenance import versions

EXTRAS = {
    "matplotlib": "plots",
    "pyautoattack": "eval",
    "foolbox": "cross",
    "tensorboard": "tensorboard",
    "torchattacks": "bench",
}
Line = tuple[str, str, str]  # a thing; "ok", "missing" or "broken"; its version, or the command that mends it


def examine() -> Iterator[str]:
    """Yield one line for each package, backend, cache and data set, as soon as it is known; FFCV takes seconds."""
    for name, state, text in _lines():
        yield f"{name:16}{state:9}{text}"


def _lines() -> Iterator[Line]:
    yield "python", "ok", platform.python_version()
    yield "retemper", "ok", __version__
    for name in ("torch", "numpy", "safetensors"):
        yield name, "ok", importlib.metadata.version(name)
    yield _triton()
    for name, extra in EXTRAS.items():
        yield _extra(name, extra)
    yield _kernels()
    yield _cache()
    yield from map(_data, DATASETS)
    problem = ffcv_problem()
    yield ("ffcv", "missing", f"{problem}: {INSTALL}") if problem else ("ffcv", "ok", "loads")


def _triton() -> Line:
    """Return the line of Triton, which a build of PyTorch for GPUs brings."""
    if version := versions().get("triton"):
        return "triton", "ok", version
    return "triton", "missing", "pip install triton; a CPU needs none"


def _extra(name: str, extra: str) -> Line:
    """Return the line of an optional package, which `extra` installs."""
    if importlib.util.find_spec(name) is None:
        return name, "missing", f"pip install 'retemper[{extra}]'"
    return name, "ok", importlib.metadata.version(name)


def _kernels() -> Line:
    """Return the line of the kernels: whether Triton runs one on a single pixel, if there is a GPU."""
    import torch

    from retemper.kernels import pgd_step_
    from retemper.kernels.language import HAS_TRITON

    if not torch.cuda.is_available():
        return "kernels", "ok", "no GPU: the PyTorch references run, on the CPU"
    if not HAS_TRITON:
        return "kernels", "missing", "pip install triton; the PyTorch references run, several times slower"
    pixel = torch.zeros(1, 1, 1, 1, device="cuda")
    try:
        pgd_step_(pixel, torch.ones_like(pixel), torch.zeros_like(pixel), 0.5, 1.0)
    except Exception as error:  # the line says what the compiler or the driver says
        return "kernels", "broken", f"Triton: {(str(error).strip().splitlines() or [type(error).__name__])[0]}"
    works = pixel.item() == 0.5
    return "kernels", "ok" if works else "broken", f"Triton on {torch.cuda.get_device_name()}"


def _cache() -> Line:
    """Return the line of the folder that holds converted data and teachers' answers between runs."""
    folder = default_cache()
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.exists() else 0
    return "cache", "ok", f"{folder}, {size / 1e6:,.0f} MB; safe to delete"


def _data(name: str) -> Line:
    """Return the line of a data set: whether it is found without --data-root."""
    if name not in ("digits", "fashion-mnist"):
        return name, "-", "is looked for under --data-root"
    try:
        return name, "ok", f"{len(load_split(name, 'test', None).labels)} test images"
    except DataError as error:
        return name, "missing", str(error)
