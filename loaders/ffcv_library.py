"""The FFCV library, imported in the one place that knows its manners.

On import, and again with every loader and every epoch, FFCV sets torch's thread count to its own (usually 1), which
slows all CPU work that follows. Here the count is kept.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from retemper.errors import UsageError

INSTALL = "apt-get install pkg-config libturbojpeg0-dev libopencv-dev && pip install 'retemper[ffcv]'"


def ffcv_problem() -> str | None:
    """Why FFCV cannot be used here, in a few words; None if it can. Imports it: several seconds the first time."""
    if find_spec("ffcv") is None:
        return "ffcv is not installed"
    threads = torch.get_num_threads()
    try:
        compiler = import_module("ffcv.pipeline.compiler")
        for name in ("loader.loader", "writer", "fields"):
            import_module(f"ffcv.{name}")
    # a missing library, another version of numpy, numba or Python: each breaks it in a way of its own
    except (ImportError, OSError, AttributeError, TypeError, RuntimeError) as error:
        return f"ffcv is installed but does not load: {str(error).splitlines()[0] if str(error) else repr(error)}"
    finally:
        torch.set_num_threads(threads)
    compiler.Compiler.set_num_threads = classmethod(_set_num_threads)
    return None


def ffcv_module(name: str) -> Any:
    """The module ffcv.`name`, untyped.

    Raises:
        UsageError: FFCV cannot be used here.
    """
    problem = ffcv_problem()
    if problem:
        raise UsageError(f"{problem}: run `{INSTALL}`")
    return import_module(f"ffcv.{name}")


def _set_num_threads(compiler: Any, count: int) -> None:
    """What FFCV's own does, less `torch.set_num_threads`."""
    compiler.num_threads = count
    import_module("numba").set_num_threads(count)
