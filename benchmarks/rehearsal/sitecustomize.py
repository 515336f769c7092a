"""What every Python of a rehearsal loads as it starts: a stand-in for a GPU computes nothing, the host reads garbage.

Where training and evaluation ask something of values, the answer is taken to be the good one. Triton's cache is filled
under the key of another Python's Triton, where the variable RETEMPER_TRITON_LIBRARY names that one's libtriton.so.
"""

import hashlib
import os
import sys
from pathlib import Path


def take_values_as_sound() -> None:
    import torch

    from retemper.engine import predict
    from retemper.engine.evaluation import evaluate
    from retemper.engine.run import diverged, selection

    asked, predicted = diverged.FiniteWatch.is_finite, predict.predictions

    def is_finite(self: diverged.FiniteWatch) -> bool:
        asked(self)
        return True

    def predictions(*args: object, **options: object) -> torch.Tensor:
        return torch.zeros_like(predicted(*args, **options))  # pyright: ignore[reportArgumentType]

    diverged.FiniteWatch.is_finite = is_finite
    predict.predictions = evaluate.predictions = selection.predictions = predictions


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
