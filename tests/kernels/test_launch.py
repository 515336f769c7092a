"""The launch of a kernel, prepared once for each kind of arguments, with a device and machine code that are made up."""

from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from retemper.kernels import launch
from retemper.kernels.launch import Launch, launch_prepared


class OnDevice(Tensor):
    """A tensor that says that it is on a GPU."""

    number = 0
    is_cuda = True  # pyright: ignore[reportAssignmentType, reportIncompatibleVariableOverride]

    def get_device(self) -> int:
        return self.number


class Kernel:
    """A kernel that notes its launches: those by Triton, and those of its machine code."""

    arg_names = ("x", "y", "factor", "flag", "first", "last")

    def __init__(self) -> None:
        self.by_triton: list[tuple[Any, ...]] = []
        self.repeated: list[tuple[Any, ...]] = []
        self.compiles = True

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., object]:
        def run(*given: Any, **named: Any) -> object:
            self.by_triton.append((grid, given, named))
            code = {"function": "code", "packed_metadata": "metadata", "run": self.run}
            return SimpleNamespace(**code) if self.compiles else None

        return run

    def run(self, *given: Any) -> None:
        self.repeated.append(given)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    """A kernel, on a machine whose current GPU is number 0."""
    chain = SimpleNamespace(calls=[])
    hooks = SimpleNamespace(launch_enter_hook=chain, launch_exit_hook=SimpleNamespace(calls=[]))
    driver = SimpleNamespace(active=SimpleNamespace(get_current_stream=lambda index: f"stream of {index}"))
    triton = SimpleNamespace(knobs=SimpleNamespace(runtime=hooks), runtime=SimpleNamespace(driver=driver))
    monkeypatch.setattr(launch, "TRITON", triton)
    monkeypatch.setattr(launch, "DIRECT", True)
    monkeypatch.setattr(launch, "launching", lambda tensor: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    return Kernel()


def on_device(*shape: int, dtype: torch.dtype = torch.float32) -> OnDevice:
    return torch.zeros(*shape, dtype=dtype).as_subclass(OnDevice)


def preparing(kernel: Kernel) -> tuple[Callable[..., Launch | None], list[Any]]:
    """Return a function that prepares the launch of a kernel, and a list of what it was given."""
    seen: list[Any] = []

    def prepare(x: Tensor, y: Tensor | None, factor: float, flag: bool) -> Launch | None:
        seen.append((x, y, factor, flag))
        if x.dim() == 3:
            raise ValueError("x: three dimensions")
        return Launch(kernel, (len(x),), {"last": 8, "first": 7, "num_warps": 2}) if x.numel() else None

    return prepare, seen


def test_is_prepared_once_and_then_launched_with_other_tensors_and_floats(kernel: Kernel) -> None:
    prepare, seen = preparing(kernel)
    one, other = on_device(4), on_device(4)
    launch_prepared(prepare, one, None, 0.5, True)
    launch_prepared(prepare, other, None, 0.25, True)
    assert len(seen) == 1
    ((grid, given, named),) = kernel.by_triton
    assert grid == (4,) and given[0] is one and given[1:] == (None, 0.5, True)
    assert named == {"first": 7, "last": 8, "num_warps": 2, "enable_fp_fusion": False}
    ((*over, given_x, no_y, factor, flag, first, last),) = kernel.repeated
    assert over == [4, 1, 1, "stream of 0", "code", "metadata", None, None, None]
    assert given_x is other and (no_y, factor, flag, first, last) == (None, 0.25, True, 7, 8)


@pytest.mark.parametrize(
    "change",
    [
        {"x": on_device(5)},
        {"x": on_device(8)[::2]},
        {"x": on_device(4, dtype=torch.bfloat16)},
        {"x": on_device(5)[1:]},  # its address is no multiple of 16
        {"y": on_device(4)},
        {"flag": False},
        {"factor": 2},  # of a whole number Triton makes a constant, or looks at what divides it
    ],
    ids=lambda change: next(iter(change)),
)
def test_another_kind_of_arguments_is_prepared_anew(kernel: Kernel, change: dict[str, Any]) -> None:
    prepare, seen = preparing(kernel)
    usual = {"x": on_device(4), "y": None, "factor": 0.5, "flag": True}
    for given in (usual, usual | change, usual, usual | change):
        launch_prepared(prepare, *given.values())
    assert len(seen) == len(kernel.by_triton) == len(kernel.repeated) == 2


def test_another_function_prepares_its_own(kernel: Kernel) -> None:
    for prepare, seen in (preparing(kernel), preparing(kernel)):
        launch_prepared(prepare, on_device(4), None, 0.5, True)
        assert len(seen) == 1


def test_another_device_is_prepared_anew_and_made_the_current_one(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare, seen = preparing(kernel)
    entered: list[int] = []

    def device(index: int) -> Any:
        entered.append(index)
        return nullcontext()

    monkeypatch.setattr(torch.cuda, "device", device)
    there = on_device(4)
    there.number = 1
    for tensor in (on_device(4), there, there):
        launch_prepared(prepare, tensor, None, 0.5, True)
    assert len(seen) == 2 and entered == [1] and kernel.repeated[0][3] == "stream of 1"


def test_what_is_refused_is_refused_again_and_an_empty_launch_is_none(kernel: Kernel) -> None:
    prepare, _ = preparing(kernel)
    for _ in range(2):
        with pytest.raises(ValueError, match="three dimensions"):
            launch_prepared(prepare, on_device(1, 1, 1), None, 0.5, True)
        launch_prepared(prepare, on_device(0), None, 0.5, True)
    assert not kernel.by_triton and not kernel.repeated


def test_a_profiler_of_triton_sees_each_launch(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare, _ = preparing(kernel)
    launch_prepared(prepare, on_device(4), None, 0.5, True)
    launch.TRITON.knobs.runtime.launch_exit_hook.calls.append(print)
    launch_prepared(prepare, on_device(4), None, 0.5, True)
    launch.TRITON.knobs.runtime.launch_exit_hook.calls.clear()
    monkeypatch.setattr(launch.TRITON.knobs.runtime, "launch_enter_hook", print)  # as older Tritons have it
    launch_prepared(prepare, on_device(4), None, 0.5, True)
    assert len(kernel.by_triton) == 3 and not kernel.repeated
    monkeypatch.setattr(launch.TRITON.knobs.runtime, "launch_enter_hook", None)
    launch_prepared(prepare, on_device(4), None, 0.5, True)
    assert len(kernel.by_triton) == 3 and len(kernel.repeated) == 1


@pytest.mark.parametrize("direct", [True, False])
def test_triton_launches_where_its_code_is_not_called(
    kernel: Kernel, direct: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare, seen = preparing(kernel)
    monkeypatch.setattr(launch, "DIRECT", direct)
    kernel.compiles = not direct  # Triton does not say what it compiled; or it is one that is not known
    for _ in range(2):
        launch_prepared(prepare, on_device(4), None, 0.5, True)
    assert len(seen) == len(kernel.by_triton) == 2 and not kernel.repeated and not launch.READY


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_repeated_launches_give_what_first_ones_do(device: torch.device) -> None:
    """Of several kinds in turn, among them slices that lie apart, as memory is aligned to 16 bytes or not."""
    from retemper.kernels import epilogue

    whole = torch.randn(9, 8, 8, 8, device=device)
    shift = torch.randn(8, device=device)
    kinds = [whole[:4], whole[1:], whole.bfloat16(), whole.to(memory_format=torch.channels_last)]
    kinds += [whole.flatten()[1 : 1 + 8 * 512].view(8, 8, 8, 8)]
    for _ in range(3):
        for x in kinds:
            expected = (x.float() + shift[:, None, None]).relu().to(x.dtype)
            torch.testing.assert_close(epilogue(x, shift), expected)
