"""Questions about values, which a recorder cannot answer: it computes nothing, and the host reads zeros.

They are asked as on a GPU, so that what they cost and what they wait for is seen; the good answer is taken for granted.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from typing import Any
from unittest.mock import patch

import retemper.engine.attack as attack
import retemper.engine.run.networks as networks
from retemper.engine.run.diverged import FiniteWatch
from retemper.errors import DataError


@contextmanager
def sound_values() -> Iterator[None]:
    """Have what is asked of values be so inside: images and logits fit, networks are sound, losses
    and gradients are finite."""
    with (
        patch.object(attack, "require_claims", granted(attack.require_claims)),
        patch.object(networks, "require_sound", granted(networks.require_sound)),
        patch.object(FiniteWatch, "is_finite", answered(FiniteWatch.is_finite, True)),
    ):
        yield


def granted(check: Callable[..., None]) -> Callable[..., None]:
    """Return the check, which refuses nothing."""

    @wraps(check)
    def asked(*args: Any, **kwargs: Any) -> None:
        with suppress(ValueError, DataError):
            check(*args, **kwargs)

    return asked


def answered(question: Callable[..., bool], answer: bool) -> Callable[..., bool]:
    """Return the question, with that answer whatever it finds."""

    @wraps(question)
    def asked(*args: Any) -> bool:
        question(*args)
        return answer

    return asked
