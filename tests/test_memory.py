"""A test that takes much memory runs in a process of its own, and fails as any other does."""

import os

import pytest
import torch

PID = os.getpid()


@pytest.mark.own_process
def test_it_runs_elsewhere(tmp_path_factory: pytest.TempPathFactory) -> None:
    assert os.getpid() != PID or torch.cuda.is_available()
    assert tmp_path_factory.getbasetemp().is_dir()


@pytest.mark.own_process
@pytest.mark.xfail(strict=True, raises=(pytest.fail.Exception, ZeroDivisionError))
def test_its_failure_is_told() -> None:
    raise ZeroDivisionError


@pytest.mark.own_process
@pytest.mark.xfail(strict=True, raises=pytest.fail.Exception)
@pytest.mark.skipif(torch.cuda.is_available(), reason="it would end this process")
def test_its_death_is_told() -> None:
    os._exit(3)
