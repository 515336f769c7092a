"""An attack that is replayed gives the bits of `pgd`, and sees every change that decides which work it is."""

import runpy
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from retemper import console
from retemper.engine import CapturedAttack, KlObjective, create_model, cross_entropy_objective, pgd
from retemper.engine.captured_attack import MOST
from retemper.engine.models import channels_last

Graphs = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("stand_in.py")))).Graphs  # no package
BALL: dict[str, Any] = dict(steps=2, step=0.02, eps=0.05)
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(autouse=True)
def nothing_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "_once", set())


class Net(nn.Module):
    """A network with all that a change may be made to."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.drop, self.scale = create_model("tiny_resnet", 10), nn.Dropout(0.5), 1.0
        self.shift = torch.zeros(10)
        self.act: Callable[[Tensor], Tensor] = torch.relu

    def forward(self, image: Tensor) -> Tensor:
        return self.drop(self.act(self.net(image)) * self.scale + self.shift)


def make(seed: int = 0) -> tuple[Net, Tensor, Tensor]:
    torch.manual_seed(seed)
    return Net().eval(), torch.rand(4, 1, 8, 8), torch.arange(4)


def expected(net: nn.Module, image: Tensor, label: Tensor, **options: Any) -> Tensor:
    return pgd(net, image, objective=cross_entropy_objective(label), **BALL | options)


def test_calls_equal_those_of_pgd_bit_for_bit_while_weights_and_inputs_change() -> None:
    net, image, label = make()
    graphs = Graphs()
    attack = CapturedAttack(net, cross_entropy_objective, record=graphs, **BALL)
    for seed in range(5):
        assert torch.equal(attack(image, label, seed=seed), expected(net, image, label, seed=seed))
        image, label = torch.rand(4, 1, 8, 8), (label + 1) % 10
        with torch.no_grad():
            for weight in net.parameters():
                weight.add_(0.01 * torch.randn_like(weight))
    assert graphs.recorded == 1 and graphs.replayed == 4


def test_tensors_among_the_options_are_read_anew() -> None:
    net, image, _ = make()
    graphs = Graphs()
    attack = CapturedAttack(net, KlObjective, record=graphs, steps=2, step=0.02, eps=0.1)
    for trial in range(3):
        teacher, label = torch.randn(4, 10), torch.arange(4)
        given: dict[str, Any] = dict(eps=0.1 * torch.rand(4), mask=torch.rand(4, 1, 8, 8) < 0.5, seed=trial)
        found = attack(image, teacher, label, **given)
        assert torch.equal(found, pgd(net, image, objective=KlObjective(teacher, label), steps=2, step=0.02, **given))
    assert graphs.replayed == 2


def replace_weight(net: Net) -> None:
    net.net.linear.weight = nn.Parameter(torch.randn_like(net.net.linear.weight))  # pyright: ignore


def other_layout(net: Net) -> None:
    channels_last(net, torch.device("cpu"))


CHANGES: dict[str, Callable[[Net], object]] = {
    "a weight": replace_weight,
    "a tensor that is no parameter": lambda net: setattr(net, "shift", torch.randn(10)),
    "a number": lambda net: setattr(net, "scale", -2.0),
    "a function": lambda net: setattr(net, "act", torch.tanh),
    "a module": lambda net: setattr(net, "drop", nn.Identity()),
    "the memory format": other_layout,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen(change: str) -> None:
    net, image, label = make()
    graphs = Graphs()
    attack = CapturedAttack(net, cross_entropy_objective, record=graphs, **BALL)
    for _ in range(2):
        attack(image, label, seed=1)
    CHANGES[change](net)
    assert torch.equal(attack(image, label, seed=1), expected(net, image, label, seed=1))
    assert graphs.replayed == 1


def test_a_mode_and_a_precision_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    net, image, label = make()
    graphs = Graphs()
    attack = CapturedAttack(net, cross_entropy_objective, record=graphs, bn_mode="keep", **BALL)
    for _ in range(2):
        attack(image, label, seed=1)
    net.net.train()
    for _ in range(2):
        attack(image, label, seed=1)
    assert graphs.recorded == 2
    net.net.eval()
    attack(image, label, seed=1)
    assert graphs.recorded == 2 and graphs.replayed == 3  # the first recording is still there
    with torch.autocast("cpu", dtype=torch.bfloat16):
        attack(image, label, seed=1)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    attack(image, label, seed=1)
    assert graphs.replayed == 3


def test_another_tensor_of_the_objectives_closure_is_seen() -> None:
    net, image, label = make()
    teacher = torch.randn(4, 10)

    def objective(label: Tensor) -> KlObjective:
        return KlObjective(teacher, label)

    attack = CapturedAttack(net, objective, record=Graphs(), **BALL)
    for _ in range(2):
        attack(image, label, seed=1)
    teacher = torch.randn(4, 10)
    found = attack(image, label, seed=1)
    assert torch.equal(found, pgd(net, image, objective=KlObjective(teacher, label), seed=1, **BALL))


def test_recordings_are_bounded() -> None:
    net, image, label = make()
    graphs = Graphs()
    attack = CapturedAttack(net, cross_entropy_objective, record=graphs, **BALL)
    for _ in range(MOST + 2):
        replace_weight(net)
        for _ in range(2):
            attack(image, label, seed=1)
    assert graphs.recorded == MOST + 2
    assert attack._recordings is not None and len(attack._recordings.kinds) == MOST


class Spread(nn.DataParallel):
    """A model over several devices, which this machine need not have."""

    def __init__(self, net: nn.Module) -> None:
        nn.Module.__init__(self)
        self.module = net

    def forward(self, image: Tensor) -> Tensor:
        return self.module(image)


def never(work: Callable[[], Tensor]) -> Any:
    raise RuntimeError("operation not permitted\nand more")


def too_large(work: Callable[[], Tensor]) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def hooked(net: Net) -> nn.Module:
    net.net.register_forward_hook(lambda *_: None)
    return net


EAGER: dict[str, tuple[Callable[[Net], Callable[[Tensor], Tensor]], Any, str]] = {
    "not recordable": (lambda net: net, never, "operation not permitted"),
    "too large": (lambda net: net, too_large, "out of memory"),
    "hooks": (hooked, Graphs(), "hooks"),
    "a function": (lambda net: lambda image: net(image), Graphs(), "no nn.Module"),
    "several devices": (Spread, Graphs(), ".module"),
}


@pytest.mark.parametrize("case", EAGER)
def test_what_cannot_be_recorded_runs_as_it_is_and_one_line_says_so(case: str, capsys: Any) -> None:
    net, image, label = make()
    change, record, reason = EAGER[case]
    attack = CapturedAttack(change(net), cross_entropy_objective, record=record, **BALL)
    for seed in range(4):
        assert torch.equal(attack(image, label, seed=seed), expected(net, image, label, seed=seed))
    (line,) = capsys.readouterr().err.splitlines()
    assert reason in line and line.startswith("note: this attack runs without a CUDA graph")


def test_options_that_python_cannot_tell_apart_are_no_fault(capsys: Any) -> None:
    net, image, label = make()
    attack = CapturedAttack(net, cross_entropy_objective, record=Graphs(), rows=[0, 1], **BALL)
    for seed in range(3):
        assert torch.equal(attack(image, label, seed=seed), expected(net, image, label, seed=seed))
    assert "unhashable" in capsys.readouterr().err


def test_values_are_checked_at_the_first_call_of_a_kind() -> None:
    net, image, label = make()
    attack = CapturedAttack(net, cross_entropy_objective, record=Graphs(), **BALL)
    with pytest.raises(ValueError, match="pixels outside"):
        attack(image * 255, label)
    with pytest.raises(TypeError, match="stepsize"):
        CapturedAttack(net, cross_entropy_objective, stepsize=1, **BALL)  # pyright: ignore


def test_without_a_gpu_it_is_pgd() -> None:
    net, image, label = make()
    attack = CapturedAttack(net, cross_entropy_objective, **BALL)
    for seed in range(3):
        assert torch.equal(attack(image, label, seed=seed), expected(net, image, label, seed=seed))


def test_inference_mode_leaves_tensors_that_autograd_takes() -> None:
    net, image, label = make()
    attack = CapturedAttack(net, cross_entropy_objective, record=Graphs(), **BALL)
    for seed in range(3):
        with torch.inference_mode():
            found = attack(image.clone(), label.clone(), seed=seed)
        assert not found.is_inference() and torch.equal(found, expected(net, image, label, seed=seed))


def test_threads_take_turns() -> None:
    net, image, label = make()
    attack = CapturedAttack(net, cross_entropy_objective, record=Graphs(), **BALL)
    found: dict[int, Tensor] = {}

    def use(number: int) -> None:
        for _ in range(4):
            found[number] = attack((image + number / 10).clamp(0, 1), label, seed=number)

    threads = [threading.Thread(target=use, args=(number,)) for number in range(2)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    for number, adv in found.items():
        wanted = expected(net, (image + number / 10).clamp(0, 1), label, seed=number)
        torch.testing.assert_close(adv, wanted, rtol=0, atol=1e-6)


@pytest.mark.gpu
@NEEDS_GPU
def test_on_a_gpu_a_replay_has_the_bits_of_pgd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    net, image, label = make()
    net, image, label = net.cuda(), image.cuda(), label.cuda()
    net.shift = net.shift.cuda()
    attack = CapturedAttack(net, cross_entropy_objective, **BALL)
    for seed in range(4):
        assert torch.equal(attack(image, label, seed=seed), expected(net, image, label, seed=seed))
    drawn = [attack(image, label) for _ in range(4)]
    assert not torch.equal(drawn[2], drawn[3])  # a start without a seed is another one at every replay


@pytest.mark.gpu
@NEEDS_GPU
def test_on_a_gpu_a_recording_that_fails_leaves_torch_as_it_was(capsys: Any) -> None:
    class Waits(nn.Module):
        def forward(self, image: Tensor) -> Tensor:
            return image.flatten(1)[:, :10] * image.detach().sum().item()

    _, image, label = make()
    attack = CapturedAttack(Waits(), cross_entropy_objective, **BALL)
    stream = torch.cuda.current_stream()
    for _ in range(3):
        attack(image.cuda(), label.cuda(), seed=1)
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert torch.cuda.current_stream() == stream and torch.rand(3, device="cuda").shape == (3,)
