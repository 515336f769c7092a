"""A pytest plugin for a process of the recorder: tests of flow count, tests of values cannot.

    pytest -p dry_run.pytest_plugin ...

On a recorder nothing is computed, so that a comparison of numbers fails. Where the assertion of a test itself fails, or
one of torch.testing, the test is "about values" and counts as neither passed nor failed. Everything else that a test
raises is a fault: an error of CUDA, a refused capture, a warning, an error of ours.
"""

import traceback
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from dry_run.values import sound_values

TESTS = Path(__file__).resolve().parents[2] / "tests"
NOT_EQUAL = "Tensor-likes are not"  # the words of torch.testing
COMPARES = "torch/testing", "numpy/testing"  # folders whose assertions are about values


def about_values(error: BaseException) -> bool:
    """Return whether a test failed because a number was not what it should be."""
    if isinstance(error, pytest.fail.Exception):  # what is wrong was to be refused, and is not seen
        return True
    if NOT_EQUAL in str(error):  # as a warning of torch.jit.trace, which compares what it has traced
        return True
    last = traceback.extract_tb(error.__traceback__)[-1].filename
    of_a_test = Path(last).is_relative_to(TESTS) or any(folder in last for folder in COMPARES)
    return isinstance(error, AssertionError) and of_a_test


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Have a test that is about values be one that was expected to fail."""
    report = yield
    if call.excinfo is not None and report.failed and about_values(call.excinfo.value):
        report.outcome = "skipped"
        report.wasxfail = "about values"
    return report


@pytest.fixture(autouse=True)
def values_are_sound() -> Iterator[None]:
    """Have questions about values be answered well in every test."""
    with sound_values():
        yield
