"""The training step: what it may not do (wait for the device, loop, lose a format), and that it learns."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from retemper.engine import Recipe, State, create_model, train_step
from retemper.engine.catalogue import find_setting
from retemper.engine.models import channels_last

METHODS = ["sat", "trades", "rslad", "absld"]
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "unique", "equal"}


def make(method: str, device: torch.device, precision: str = "fp32") -> tuple[State, Recipe]:
    torch.manual_seed(0)
    recipe = replace(find_setting(f"{method}:digits")[2].recipe, attack_steps=2, lr=0.05, precision=precision)
    teacher = channels_last(create_model("tiny_resnet", 10), device).eval().requires_grad_(False)
    student = create_model("tiny_resnet", 10)
    state = State.begin(recipe, student, teacher if recipe.teacher_model else None, 10, device)
    return state, recipe


def batch(device: torch.device, size: int = 20) -> tuple[Tensor, Tensor]:
    gen = torch.Generator().manual_seed(1)
    label = torch.arange(size) % 10
    image = torch.rand(10, 1, 8, 8, generator=gen)[label] * 0.8 + torch.rand(size, 1, 8, 8, generator=gen) * 0.2
    return image.to(device).to(memory_format=torch.channels_last), label.to(device)


@pytest.mark.parametrize("method", METHODS)
def test_learns(method: str, device: torch.device) -> None:
    state, recipe = make(method, device)
    losses = [train_step(state, recipe, *batch(device)).item() for _ in range(30)]
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])


@pytest.mark.parametrize("method", METHODS)
def test_moves_the_statistics_once_a_forward(method: str, device: torch.device) -> None:
    state, recipe = make(method, device)
    state.student.eval()  # as a selection leaves it
    for _ in range(3):
        train_step(state, recipe, *batch(device))
    assert state.student.get_submodule("bn1").num_batches_tracked == 3 * len(recipe.forwards)
    if state.teacher is not None:
        assert state.teacher.get_submodule("bn1").num_batches_tracked == 0


@pytest.mark.parametrize("method", METHODS)
def test_never_waits_for_the_device(method: str, device: torch.device) -> None:
    state, recipe = make(method, device)
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func.overloadpacket.__name__)
            indices = args[1] if func.overloadpacket.__name__ == "index" else ()
            assert not any(i is not None and i.dtype is torch.bool for i in indices), "a boolean index waits"
            return func(*args, **(kwargs or {}))

    clean, label = batch(device)
    with Watch():
        train_step(state, recipe, clean, label)
    assert "convolution" in seen and not WAITS & set(seen), WAITS & set(seen)


@pytest.mark.parametrize("method", METHODS)
def test_launches_as_much_for_a_large_batch_as_for_a_small_one(method: str, device: torch.device) -> None:
    def launches(size: int) -> int:
        state, recipe = make(method, device)
        count = 0

        class Watch(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                nonlocal count
                count += 1
                return func(*args, **(kwargs or {}))

        clean, label = batch(device, size)
        with Watch():
            train_step(state, recipe, clean, label)
        return count

    assert launches(10) == launches(40)


def test_keeps_channels_last(device: torch.device) -> None:
    state, recipe = make("absld", device)
    formats = []
    for module in state.student.modules():
        if isinstance(module, torch.nn.Conv2d) and module.kernel_size == (3, 3):
            module.register_forward_hook(lambda _, inputs, out: formats.append(out.stride(1) == 1))
    train_step(state, recipe, *batch(device))
    assert formats and all(formats)


def test_counts_by_class(device: torch.device) -> None:
    state, recipe = make("absld", device)
    clean, label = batch(device)
    losses = [train_step(state, recipe, clean[:15], label[:15]), train_step(state, recipe, clean, label)]
    assert set(state.sums) == {"adv", "clean"}
    expected = torch.bincount(label[:15], minlength=10) + torch.bincount(label, minlength=10)
    for sums in state.sums.values():
        assert torch.equal(sums.count_K, expected)
        assert (sums.correct_K <= sums.count_K).all() and (sums.loss_K > 0).all()
    torch.testing.assert_close(state.loss_sum, losses[0] * 15 + losses[1] * 20)


def test_draws_a_new_start_each_step(device: torch.device) -> None:
    state, recipe = make("sat", device)
    train_step(state, recipe, *batch(device))
    assert state.noise_seed.item() == 1


def test_bf16_learns_and_keeps_fp32_weights(device: torch.device) -> None:
    state, recipe = make("trades", device, "bf16")  # its own prediction is taken without gradient first
    first = [parameter.detach().clone() for parameter in state.student.parameters()]
    losses = [train_step(state, recipe, *batch(device)).item() for _ in range(15)]
    assert losses[-1] < losses[0]
    for old, parameter in zip(first, state.student.parameters(), strict=True):
        assert parameter.dtype is torch.float32
        assert not torch.equal(old, parameter), "a parameter got no gradient"
