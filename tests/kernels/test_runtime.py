"""Where an op runs, what layouts it takes, and that these tests drive what they claim to."""

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from retemper.kernels import pgd_step_, runtime
from retemper.kernels.ascent_kernels import _linf_kernel
from retemper.kernels.language import triton

IMPORT = """
import sys
before = {"retemper"} | {name.partition(".")[0] for name in sys.modules}
import numpy, torch, triton
known = before | {name.partition(".")[0] for name in sys.modules}
import retemper.kernels
assert not {name.partition(".")[0] for name in sys.modules} - known
assert all(name.startswith("retemper.kernels") for name in sys.modules if name.startswith("retemper."))
assert "torch._dynamo" not in sys.modules
assert retemper.kernels.runtime.TRITON_ON_CPU == (INTERPRET == "1")
"""


@pytest.mark.triton
def test_these_tests_run_triton(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.interpreter import InterpretedFunction

    assert isinstance(_linf_kernel, InterpretedFunction if device.type == "cpu" else triton.JITFunction)
    monkeypatch.setitem(pgd_step_.__globals__, "ascend", None)  # a call of it would raise
    adv = torch.zeros(2, 3, device=device)
    assert pgd_step_(adv, torch.ones_like(adv), torch.zeros_like(adv), 0.1, 1.0).eq(0.1).all()


def test_float64_takes_the_reference(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(pgd_step_.__globals__, "launch", None)
    adv = torch.zeros(2, 3, device=device, dtype=torch.float64)
    assert pgd_step_(adv, torch.ones_like(adv), torch.zeros_like(adv), 0.1, 1.0).eq(0.1).all()


@pytest.mark.usefixtures("reference_path")
def test_a_plain_cpu_takes_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(pgd_step_.__globals__, "launch", None)
    adv = torch.zeros(2, 3)
    assert pgd_step_(adv, torch.ones_like(adv), torch.zeros_like(adv), 0.1, 1.0).eq(0.1).all()


def test_fresh_memory_is_poisoned(device: torch.device) -> None:
    assert torch.empty(1000, device=device).isnan().all()


@pytest.mark.triton
@pytest.mark.parametrize("interpret", ["0", "1"])
def test_import_is_light_and_obeys_the_environment(interpret: str) -> None:
    code = IMPORT.replace("INTERPRET", repr(interpret))
    env = os.environ | {"TRITON_INTERPRET": interpret}
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, env=env)


IMAGES = torch.zeros(2, 3, 4, 5)


@pytest.mark.parametrize(
    "image",
    [
        IMAGES,
        IMAGES.contiguous(memory_format=torch.channels_last),
        IMAGES.permute(0, 2, 3, 1),
        IMAGES[:1].expand(1, 3, 4, 5),
        torch.zeros(1, 3, 4, 5).as_strided((1, 3, 4, 5), (7, 20, 5, 1)),  # a stride nobody takes
        torch.zeros(6),
        torch.zeros(0, 3),
    ],
    ids=lambda image: f"{tuple(image.shape)}{image.stride()}",
)
def test_accepts_one_dense_layout(image: Tensor) -> None:
    runtime.require_one_layout(adv=image, clean=image)


@pytest.mark.parametrize(
    ("clean", "message"),
    [
        (IMAGES.double(), "clean: torch.float64, but adv is torch.float32"),
        (IMAGES.int(), "clean: torch.int32; needs one of"),
        (IMAGES[:1], r"clean: shape \(1, 3, 4, 5\), but adv has"),
        (IMAGES.contiguous(memory_format=torch.channels_last), r"clean: strides \(60, 1, 15, 3\), but adv has"),
        (torch.zeros(2, 3, 4, 6)[..., :5], "clean: strides .* leave holes"),
        (torch.zeros(1, 3, 4, 5).expand(2, 3, 4, 5), "clean: strides .* overlap"),
        (torch.zeros(3, 2, 4, 5).transpose(0, 1), "clean: strides"),
        (torch.zeros(2, 3, 4, 5, device="meta"), "clean: on meta, but adv is on cpu"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refuses_anything_else(clean: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        runtime.require_one_layout(adv=IMAGES, clean=clean)


def test_refuses_a_scalar_and_a_transposed_batch() -> None:
    with pytest.raises(ValueError, match="adv: a scalar"):
        runtime.require_one_layout(adv=torch.tensor(0.0))
    with pytest.raises(ValueError, match="adv: strides"):
        runtime.require_one_layout(adv=torch.zeros(3, 2).t())


@pytest.mark.parametrize(
    ("shape", "by_sample", "cut"),
    [
        ((128, 3, 32, 32), False, (393216, None, 1024, 384)),  # one run
        ((128, 3, 32, 32), True, (3072, 3, 1024, 384)),  # three programs a sample
        ((2, 1, 8, 8), True, (64, 1, 128, 2)),
        ((2, 1, 8, 8), False, (128, None, 128, 1)),
        ((5, 3, 31, 33), False, (15345, None, 1024, 15)),
    ],
    ids=str,
)
def test_a_batch_is_one_run_unless_a_number_differs_by_sample(
    shape: tuple[int, ...], by_sample: bool, cut: tuple[int | None, ...]
) -> None:
    assert runtime.pixel_runs(torch.empty(shape), 1024, by_sample) == cut


@pytest.mark.parametrize(
    ("length", "dtypes", "width"),
    [
        (64, ["float32"], 4),
        (64, ["bfloat16"], 8),
        (64, ["bfloat16", "float32"], 4),
        (10, ["float32"], 2),
        (100, ["bfloat16"], 4),
        (7, ["float16"], 1),
    ],
)
def test_an_access_takes_16_bytes_or_what_divides_a_row(length: int, dtypes: list[str], width: int) -> None:
    assert runtime.access_width(length, *(torch.empty(0, dtype=getattr(torch, name)) for name in dtypes)) == width
