"""The training step: what it may not do (wait for the device, loop, lose a format), and that it learns."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from retemper.engine import Recipe, State, create_model, train_step
from retemper.engine.catalogue import find_setting
from retemper.engine.models import channels_last

METHODS = ["sat", "trades", "rslad", "absld", "mart", "frl", "bat", "cfa", "wat", "dafa", "faal"]
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "unique", "equal"}


def make(method: str, device: torch.device, precision: str = "fp32") -> tuple[State, Recipe]:
    torch.manual_seed(0)
    recipe = find_setting(f"{method}:digits")[2].recipe.replace(attack_steps=2, lr=0.05, precision=precision)
    teacher = channels_last(create_model("tiny_resnet", 10), device).eval().requires_grad_(False)
    student = create_model("tiny_resnet", 10)
    state = State(recipe, student, teacher if recipe.networks.teacher_model else None, 10, device)
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
    share = 0.9 if method == "bat" else 0.7  # two of BAT's terms hold every prediction back
    assert sum(losses[-3:]) < share * sum(losses[:3])


@pytest.mark.parametrize("method", METHODS)
def test_moves_the_statistics_once_a_forward(method: str, device: torch.device) -> None:
    state, recipe = make(method, device)
    state.student.eval()  # as a selection leaves it
    for _ in range(3):
        train_step(state, recipe, *batch(device))
    assert state.student.get_submodule("bn1").num_batches_tracked == 3 * len(recipe.method.forwards)


@pytest.mark.usefixtures("values_unseen")
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


@contextmanager
def refusing_to_wait() -> Iterator[None]:
    """Have what waits for the GPU raise."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch warns, once, that it does not see all that waits
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_never_waits_for_a_gpu(device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("the CPU's trace is above; a GPU's own word needs one")
    clean, label = batch(device)
    for method in METHODS:
        state, recipe = make(method, device, "bf16")
        train_step(state, recipe, clean, label)  # kernels are compiled and tuned, which waits
        with refusing_to_wait():
            train_step(state, recipe, clean, label)


@pytest.mark.parametrize(
    ("move", "other"),
    [
        ("fold", False),
        ("channels_last", False),
        ("fused_sgd", False),
        ("epilogue", "fused"),
        ("epilogue", "convolution"),
        ("together", "on"),
        ("beside", True),
    ],
)
def test_a_move_changes_rounding_alone(move: str, other: object, device: torch.device) -> None:
    """Same losses, weights and batch-norm statistics after three steps, to float32's digits."""
    results = []
    for value in (None, other):
        torch.manual_seed(0)
        recipe = find_setting("absld:digits")[2].recipe.replace(attack_steps=3, lr=0.02, precision="fp32")
        recipe = recipe if value is None else recipe.replace(**{move: value})
        teacher = create_model("tiny_resnet", 10).to(device).eval().requires_grad_(False)
        state = State(recipe, create_model("tiny_resnet", 10), teacher, 10, device)
        losses = [train_step(state, recipe, *batch(device)) for _ in range(3)]
        results.append([torch.stack(losses), *state.student.state_dict().values()])
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=2e-3, atol=2e-4)
    counters = [value for value in results[1] if value.dtype is torch.int64]
    assert counters and all(int(value) == 6 for value in counters)  # two forwards a step; none by the attack


def test_a_train_mode_attack_is_never_folded(device: torch.device) -> None:
    recipe = find_setting("sat:digits")[2].recipe.replace(attack_bn="train")
    state = State(recipe, create_model("tiny_resnet", 10), None, 10, device)
    assert state.twin is None and state.attacked() is state.student


def test_a_graph_is_refused_where_there_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    from retemper.cli import run

    assert run(["train", "sat:digits", "--capture", "on", "--device", "cpu", "--out", "/nonexistent/x"]) == 2
    assert run(["train", "sat:digits", "--epilogue", "fast", "--device", "cpu"]) == 2
    assert "plain" in capsys.readouterr().err


def test_a_batch_that_does_not_fit_is_refused_before_anything_moves(device: torch.device) -> None:
    state, recipe = make("absld", device)
    clean, label = batch(device)
    teacher, before = torch.zeros(20, 10, device=device), [value.clone() for value in state.student.parameters()]
    for wrong, given in {
        "clean: torch.uint8": (clean.byte(), label),
        "clean: .* shape": (clean[0], label),
        "label: .* whole numbers": (clean, label.float()),
        "label: shape": (clean, label[:5]),
        r"teacher: shape \(20, 5\)": (clean, label, teacher[:, :5]),
        r"teacher: shape \(1, 10\)": (clean, label, teacher[:1]),
    }.items():
        with pytest.raises(ValueError, match=wrong):
            train_step(state, recipe, *given)
    assert all(torch.equal(*pair) for pair in zip(before, state.student.parameters(), strict=True))
    train_step(state, recipe, clean, label.int())
