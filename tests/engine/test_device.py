"""The device's switches are put back, and want of memory is told from other errors."""

import errno

import numpy as np
import pytest
import torch

from retemper.engine.device import cpu_threads, exact_fp32, in_precision, is_out_of_memory, repeatable
from retemper.engine.device import tuned_convolutions as tuned


def tf32() -> tuple[object, object]:
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


def test_tf32_is_as_asked_for_inside_and_as_before_afterwards() -> None:
    before = tf32()
    with in_precision("tf32"):
        assert tf32() == (True, True)
        with exact_fp32():
            assert tf32() == (False, False)
        with in_precision("bf16"):
            assert tf32() == (False, False)
        assert tf32() == (True, True)
    with pytest.raises(KeyError), in_precision("tf32"):
        raise KeyError
    assert tf32() == before


def fills() -> bool:
    """Say whether PyTorch fills fresh memory in repeatable runs."""
    return torch.utils.deterministic.fill_uninitialized_memory  # pyright: ignore[reportAttributeAccessIssue]


def test_threads_tuning_and_repeatability_are_as_before_afterwards() -> None:
    with cpu_threads(3):
        assert torch.get_num_threads() == 3
        with cpu_threads(None):
            assert torch.get_num_threads() == 3
    assert torch.get_num_threads() == 1
    assert not torch.backends.cudnn.benchmark and not torch.are_deterministic_algorithms_enabled()
    with tuned(), repeatable():
        assert torch.backends.cudnn.benchmark and torch.are_deterministic_algorithms_enabled()
        assert not fills(), "a launch for every tensor"
    assert not torch.backends.cudnn.benchmark and not torch.are_deterministic_algorithms_enabled()
    assert fills()


def test_torch_and_numpy_without_memory_are_known() -> None:
    for ask in (lambda: torch.empty(1 << 60, dtype=torch.uint8), lambda: np.empty(1 << 60, dtype=np.uint8)):
        with pytest.raises((RuntimeError, MemoryError)) as error:
            ask()
        assert is_out_of_memory(error.value)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("could not create a primitive"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ],
    ids=str,
)
def test_so_are_the_words_of_the_libraries_below(error: Exception) -> None:
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [RuntimeError("shape mismatch"), OSError(errno.ENOENT, "No such file"), ValueError("out of memory")],
    ids=str,
)
def test_other_errors_are_not_taken_for_it(error: Exception) -> None:
    assert not is_out_of_memory(error)
