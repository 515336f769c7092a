"""What every Python of a rehearsal loads as it starts: a stand-in for a GPU computes nothing, the host reads garbage.

Where training and evaluation ask something of values, the answer is taken to be the good one. Triton's cache is filled
under the key of another Python's Triton, where the variable RETEMPER_TRITON_LIBRARY names that one's libtriton.so.
"""

import hashlib
import os
import sys
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any


def take_values_as_sound() -> None:
    import torch

    from retemper.engine import predict
    from retemper.engine.checkpoints import probe
    from retemper.engine.run import diverged
    from retemper.errors import DataError

    for name in ("evaluation.evaluate", "run.train"):
        import_module(f"retemper.engine.{name}")  # what these import is replaced below
    finite, predicted, sound = diverged.FiniteWatch.is_finite, predict.predictions, probe.require_sound

    def is_finite(self: diverged.FiniteWatch) -> bool:
        finite(self)
        return True

    def predictions(*args: Any, **options: Any) -> torch.Tensor:
        return torch.zeros_like(predicted(*args, **options))

    def require_sound(*args: Any, **options: Any) -> None:
        with suppress(DataError):
            sound(*args, **options)

    diverged.FiniteWatch.is_finite = is_finite
    for module in [module for name, module in sys.modules.items() if name.startswith("retemper.")]:
        for name, old, new in (("predictions", predicted, predictions), ("require_sound", sound, require_sound)):
            if getattr(module, name, None) is old:
                setattr(module, name, new)


def take_triton_key_of(library: Path) -> None:
    import triton
    from triton.runtime import cache

    own = next(Path(triton.__file__).parent.glob("_C/libtriton*.so"))
    key = cache.triton_key().replace(digest(own), digest(library))
    assert digest(library) in key, "this Triton makes its key of something else"
    cache.triton_key = lambda: key


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


if {"train", "evaluate"} & set(sys.orig_argv):
    take_values_as_sound()
if os.environ.get("RETEMPER_TRITON_LIBRARY"):
    take_triton_key_of(Path(os.environ["RETEMPER_TRITON_LIBRARY"]))
