"""The import of the FFCV library.

On import, and again with every loader and every epoch, FFCV sets torch's thread count to its own (usually 1), which
slows all CPU work that follows. This module keeps torch's count as it is.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from retemper.errors import UsageError

INSTALL = "apt-get install pkg-config libturbojpeg0-dev libopencv-dev && pip install 'retemper[ffcv]'"


def ffcv_problem() -> str | None:
    """Return the reason why FFCV cannot be used here; None if it can. The first call imports it, in seconds."""
    if find_spec("ffcv") is None:
        return "ffcv is not installed"
    threads = torch.get_num_threads()
    try:
        compiler = import_module("ffcv.pipeline.compiler")
        for name in ("loader.loader", "writer", "fields"):
            import_module(f"ffcv.{name}")
    # a missing library, another version of numpy, numba or Python: each breaks the import in a way of its own
    except (ImportError, OSError, AttributeError, TypeError, RuntimeError) as error:
        return f"ffcv is installed but does not load: {str(error).splitlines()[0] if str(error) else repr(error)}"
    finally:
        torch.set_num_threads(threads)
    compiler.Compiler.set_num_threads = classmethod(_set_num_threads)
    return None


def ffcv_module(name: str) -> Any:
    """Return the module ffcv.`name`, untyped.

    Raises:
        UsageError: FFCV cannot be used here.
    """
    problem = ffcv_problem()
    if problem:
        raise UsageError(f"{problem}: run `{INSTALL}`")
    return import_module(f"ffcv.{name}")


def _set_num_threads(compiler: Any, count: int) -> None:
    """Set the threads of FFCV and Numba as FFCV's method of this name does, without `torch.set_num_threads`."""
    compiler.num_threads = count
    import_module("numba").set_num_threads(count)
