"""Triton and its language; where Triton is not installed, stand-ins with which the kernels' modules can be imported.

PyTorch for a GPU brings Triton, PyTorch for a CPU does not. Without Triton every operation takes its reference in plain
PyTorch. A kernel cannot be launched then, so that the stand-ins need only what a module does at its import: decorate
functions, name constants and annotate arguments.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import triton
    import triton.language as tl

    HAS_TRITON, INTERPRETED = True, False
else:
    try:
        import triton
        import triton.language as tl

        HAS_TRITON, INTERPRETED = True, triton.knobs.runtime.interpret  # by which @triton.jit decides
    except ModuleNotFoundError as error:
        # A folder of that name, as of a clone, is a package without a language. One that is broken is not missing.
        if error.name not in ("triton", "triton.language"):
            raise
        HAS_TRITON, INTERPRETED = False, False

        class triton:
            """Stands in for the package: a kernel stays a Python function, which nothing calls."""

            @staticmethod
            def jit(function: Any) -> Any:
                return function

        class tl:
            """Stands in for the language: a constant of a kernel is the number that it holds."""

            class constexpr:
                def __init__(self, value: Any) -> None:
                    self.value = value


def next_power_of_2(number: int) -> int:
    """Return the smallest power of 2 that is no less than a number above 0."""
    return 1 << (number - 1).bit_length()


def cdiv(number: int, by: int) -> int:
    """Return number / by, rounded up."""
    return -(-number // by)


__all__ = ["HAS_TRITON", "INTERPRETED", "cdiv", "next_power_of_2", "tl", "triton"]
