"""What is installed, what works, and the exact command for what is missing."""

import importlib.metadata
import importlib.util
import platform

import torch

from retemper import __version__
from retemper.engine.run.job import default_cache
from retemper.loaders import DATASETS, DataError, ffcv_problem, load_split
from retemper.loaders.ffcv_library import INSTALL

EXTRAS = {"matplotlib": "plots", "pyautoattack": "eval", "tensorboard": "tensorboard", "torchattacks": "bench"}


def examine() -> str:
    """One line a thing: its name, "ok" or "missing", and the details or the fix."""
    lines = [("python", "ok", platform.python_version())]
    lines.append(("retemper", "ok", __version__))
    for name in ("torch", "triton", "numpy", "safetensors"):
        lines.append((name, "ok", importlib.metadata.version(name)))
    for name, extra in EXTRAS.items():
        found = importlib.util.find_spec(name) is not None
        text = importlib.metadata.version(name) if found else f"pip install 'retemper[{extra}]'"
        lines.append((name, "ok" if found else "missing", text))
    problem = ffcv_problem()
    lines.append(("ffcv", "missing" if problem else "ok", f"{problem}: {INSTALL}" if problem else "loads"))
    lines.append(_kernels())
    lines.append(_cache())
    lines += [_data(name) for name in DATASETS]
    return "\n".join(f"{name:16}{state:9}{text}" for name, state, text in lines)


def _kernels() -> tuple[str, str, str]:
    """Which path the kernels take, tried on one pixel."""
    from retemper.kernels import pgd_step_

    if not torch.cuda.is_available():
        return "kernels", "ok", "no GPU: the PyTorch references run, on the CPU"
    pixel = torch.zeros(1, 1, 1, 1, device="cuda")
    try:
        pgd_step_(pixel, torch.ones_like(pixel), torch.zeros_like(pixel), 0.5, 1.0)
    except Exception as error:  # whatever the compiler or the driver says is what the user is asking for
        return (
            "kernels",
            "broken",
            f"Triton: {str(error).strip().splitlines()[0] if str(error) else type(error).__name__}",
        )
    works = pixel.item() == 0.5
    return "kernels", "ok" if works else "broken", f"Triton on {torch.cuda.get_device_name()}"


def _cache() -> tuple[str, str, str]:
    """What is kept between runs, and may be deleted: converted data and teachers' answers."""
    folder = default_cache()
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.exists() else 0
    return "cache", "ok", f"{folder}, {size / 1e6:,.0f} MB; safe to delete"


def _data(name: str) -> tuple[str, str, str]:
    """Whether a data set is found without being told where."""
    if name in ("digits", "fashion-mnist"):
        try:
            split = load_split(name, "test", None)
            return name, "ok", f"{len(split.labels)} test images"
        except DataError as error:
            return name, "missing", str(error)
    return name, "-", "is looked for under --data-root"
