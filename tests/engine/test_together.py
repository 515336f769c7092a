"""The training forwards as one batch: the same losses, gradients and statistics as one by one, in fewer operations."""

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from retemper.engine import Recipe, State, create_model, train_step
from retemper.engine.catalogue import find_setting, methods
from retemper.engine.distributed.ranks import Part
from retemper.engine.models import MODELS, channels_last
from retemper.engine.models.silu_resnets import SiluWideResNet
from retemper.engine.models.wide_resnet import WideResNet
from retemper.engine.speed.together import NormTogether, OneForward, Together

TWINS = (
    "wrn34_20",
    "preact_resnet34",
    "tiny_resnet_wide",
    "preact_resnet18_frl",
)  # the modules of others, more of them
KINDS = [name for name in MODELS if not (name.startswith("wrn") and name.endswith("_silu"))] + ["wrn28_10_silu"]
EXACT: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-12}  # of float64


def network(name: str, device: torch.device, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor]:
    """Return a network in training mode, and the images of two forwards."""
    torch.manual_seed(0)
    channels = 1 if name.startswith("tiny") else 3
    wide = SiluWideResNet if name.endswith("silu") else WideResNet  # a hundredth of the memory, and the same modules
    narrow = wide(10, 3, depth=16 if name.endswith("silu") else 34, widen=1)
    model = channels_last(narrow if name.startswith("wrn") else create_model(name, 10), device).to(dtype)
    image = torch.rand(6, channels, 8, 8).to(device, dtype).contiguous(memory_format=torch.channels_last)
    return model.train(), image


def one_by_one(model: nn.Module, image: Tensor, order: tuple[int, ...]) -> Tensor:
    parts, logits = image.chunk(2), {}
    for group in order:
        logits[group] = logits[group] if group in logits and model(parts[group]) is not None else model(parts[group])
    return torch.cat([logits[0], logits[1]])


def gradients(model: nn.Module, logits: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(logits.sin().sum(), [*model.parameters()]))


@pytest.mark.own_process
@pytest.mark.parametrize("name", [name for name in KINDS if name not in TWINS])
def test_two_forwards_are_one_to_rounding(name: str, device: torch.device) -> None:
    model, image = network(name, device)
    other, order = copy.deepcopy(model), (1, 0, 1)
    logits, expected = Together(model)(image, 2, order), one_by_one(other, image, order)
    torch.testing.assert_close(logits, expected, **EXACT)
    for ours, theirs in zip(gradients(model, logits), gradients(other, expected), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-9 * float(theirs.abs().max()) + 1e-10)
    for ours, theirs in zip(model.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)


@pytest.mark.own_process
@pytest.mark.parametrize("name", KINDS)
def test_every_norm_is_ours_and_takes_in_what_follows(name: str, device: torch.device) -> None:
    net = Together(network(name, device)[0]).net
    norms = [module for module in net.modules() if isinstance(module, NormTogether)]
    assert norms and not any(isinstance(module, nn.BatchNorm2d) for module in net.modules())
    called = [node.target for node in net.graph.nodes if node.op == "call_function"]
    assert F.relu not in called
    if name.startswith(("resnet", "tiny")):  # behind each addition of the others a convolution stands, or a norm
        assert "add" not in " ".join(str(target) for target in called) and any(norm.twice for norm in norms)


def stepped(
    method: str, together: str, device: torch.device, idle: bool = False, **changes: Any
) -> tuple[list[Tensor], State]:
    """Return the losses, and the state after two steps in float64 of a student of one block a stage."""
    torch.manual_seed(0)
    given = {"attack_steps": 2, "lr": 0.05, "precision": "fp32", **changes}
    recipe: Recipe = find_setting(f"{method}:digits")[2].recipe.replace(together=together, **given)
    teacher = channels_last(create_model("tiny_resnet", 10), device).eval().requires_grad_(False)
    networks = recipe.networks
    student = create_model("tiny_resnet", 10).double()
    clean_teacher = teacher if networks.clean_teacher_model else None
    peer = create_model("tiny_resnet", 10).double() if recipe.method.trains_peer else None
    state = State(recipe, student, teacher if networks.teacher_model else None, 10, device, clean_teacher, peer=peer)
    state.start_epoch(recipe, 1, 0)
    image = torch.rand(20, 1, 8, 8, dtype=torch.float64).to(device).contiguous(memory_format=torch.channels_last)
    rows = 0 if idle else 20
    label = torch.arange(rows, device=device) % 10
    return [train_step(state, recipe, image[:rows], label) for _ in range(2)], state


def assert_same(method: str, device: torch.device, **changes: Any) -> None:
    """Check that two steps together are those one by one."""
    apart, together = (stepped(method, way, device, **changes) for way in ("off", "on"))
    assert apart[1].joined is None and together[1].joined is not None
    torch.testing.assert_close(torch.stack(together[0]), torch.stack(apart[0]), rtol=1e-9, atol=1e-12)
    ours, theirs = together[1].trained.state_dict(), apart[1].trained.state_dict()
    assert list(ours) == list(theirs)
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("method", methods())
def test_a_step_of_each_method_is_the_same(method: str, device: torch.device) -> None:
    assert_same(method, device)


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("cfa", {"variant": "released"}),  # clean, adv, clean, and a forward after the step
        ("iad", {"variant": "released"}),
        ("sat", {"variant": "released"}),
        ("trades", {"awp_gamma": 0.01}),
        ("trades", {"awp_gamma": 0.01, "variant": "released"}),
        ("absld", {"joint": True}),
        ("ard", {"awp_gamma": 0.01}),
        ("faal", {"variant": "released"}),
        ("rslad", {"igdm": 1.0}),  # three forwards
        ("ard", {"igdm": 1.0}),  # one of three without a gradient
        ("label_trust", {"igdm": 1.0}),  # which is joint
        ("iad", {"igdm": 1.0, "variant": "released", "awp_gamma": 0.01}),
        ("saad", {"clean_weight": 0.5}),
    ],
    ids=str,
)
def test_a_step_of_each_kind_is_the_same(method: str, changes: dict[str, Any], device: torch.device) -> None:
    assert_same(method, device, **changes)


def test_what_the_loss_has_no_gradient_at_is_not_in_the_batch(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ARD trains on attacked images alone; the forward on clean ones moves the statistics."""
    names, groups, call = ("adv", "clean"), set[tuple[int, bool]](), Together.__call__

    def seen(self: Together, image: torch.Tensor, groups_: int, moves: Any) -> torch.Tensor:
        groups.add((groups_, torch.is_grad_enabled()))
        return call(self, image, groups_, moves)

    monkeypatch.setattr(Together, "__call__", lambda self, image, groups, moves: seen(self, image, groups, moves))
    for method, differentiated, expected in (
        ("ard", ("adv",), {(1, True), (1, False)}),
        ("absld", names, {(2, True)}),
    ):
        groups.clear()
        assert stepped(method, "on", device, attack_bn="eval")[1].differentiated == {(names, True): differentiated}
        assert groups == expected, method


def test_an_attack_in_training_mode_sees_the_twin_too(device: torch.device) -> None:
    state = stepped("sat", "on", device, attack_bn="train")[1]
    assert isinstance(state.attacked(), OneForward)
    state.part.idle = True
    assert state.attacked() is state.student
    assert stepped("absld", "on", device, attack_bn="eval")[1].in_training is None


def test_a_process_without_rows_moves_no_statistics(device: torch.device) -> None:
    _, state = stepped("absld", "on", device, idle=True)
    assert state.joined is not None and isinstance(state.part, Part) and state.part.idle
    assert all(int(value) == 0 for name, value in state.student.state_dict().items() if "num_batches" in name)


def test_leaves_the_student_alone(device: torch.device) -> None:
    model, image = network("tiny_resnet", device)
    model.get_submodule("bn1").eval()
    before = copy.deepcopy(model.state_dict())
    twin = Together(model)
    assert not model.get_submodule("bn1").training and model.get_submodule("conv1").training
    twin(image, 2, ())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    places = {value.data_ptr() for value in model.parameters()}
    assert {value.data_ptr() for value in twin.net.parameters()} < places  # convolutions and the last layer


def launches(model: nn.Module, image: Tensor, together: bool) -> Counter[str]:
    """Return the operations of the forwards and backwards of two batches in bf16."""
    seen: Counter[str] = Counter()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen[func.overloadpacket.__name__] += 1
            return func(*args, **(kwargs or {}))

    twin = Together(model, torch.bfloat16)
    with Watch():
        with torch.autocast(image.device.type, torch.bfloat16):
            logits = twin(image, 2, (0, 1)) if together else one_by_one(model, image, (0, 1))
        logits.float().square().sum().backward()
    return seen


def test_in_half_precision_all_weights_are_cast_at_once(device: torch.device) -> None:
    model, image = network("tiny_resnet", device, torch.float32)
    other = copy.deepcopy(model)
    ours, theirs = launches(model, image, True), launches(other, image, False)
    convolutions = sum(isinstance(module, nn.Conv2d) for module in model.modules())
    assert ours["convolution"] == convolutions and theirs["convolution"] == 2 * convolutions
    assert ours["batch_norm_"] == ours["batch_norm_backward"] == convolutions
    assert ours["_foreach_copy_"] == 2 and ours["_to_copy"] < 5 < theirs["_to_copy"]
    assert not ours["relu"] and not ours["threshold_backward"]
    for (name, weight), true in zip(model.named_parameters(), other.parameters(), strict=True):
        assert weight.grad is not None and true.grad is not None
        assert weight.grad.dtype is torch.float32 and weight.grad.stride() == weight.stride(), name
        assert float((weight.grad - true.grad).norm() / true.grad.norm()) < 0.3, name  # bf16's own


def test_a_shortcut_of_another_shape_or_layout_is_added_all_the_same(device: torch.device) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4)
            self.own = nn.Parameter(torch.randn(1, 4, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            y = F.relu(self.bn(self.conv(x)) + self.own)
            return (y + y.flatten(1).reshape(y.shape)).mean((2, 3))

    torch.manual_seed(0)
    model = channels_last(Odd(), device).double()
    image = torch.rand(4, 3, 5, 5, device=device, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    other = copy.deepcopy(model)
    logits, expected = Together(model)(image, 2, (0, 1)), one_by_one(other, image, (0, 1))
    torch.testing.assert_close(logits, expected, **EXACT)
    for ours, theirs in zip(gradients(model, logits), gradients(other, expected), strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class Centred(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


class Rolled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + x[0]


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        (Branching(), "does not trace"),
        (Centred(), "mean"),
        (Rolled(), "getitem"),
        (nn.Dropout(0.5), "not known to keep images apart"),
        (nn.SyncBatchNorm(3), "not known to keep images apart"),
        (nn.BatchNorm2d(3, momentum=None), "not known to keep images apart"),
        (nn.BatchNorm2d(3, affine=False), "not known to keep images apart"),
        (nn.BatchNorm2d(3, track_running_stats=False), "not known to keep images apart"),
    ],
)
def test_what_may_differ_in_one_batch_is_refused(part: nn.Module, reason: str) -> None:
    with pytest.raises(ValueError, match=f"Sequential: .*{reason}"):
        Together(nn.Sequential(part))


def test_a_network_that_is_refused_runs_one_by_one(
    device: torch.device, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nn.BatchNorm2d, "__init__", put_momentum_away(nn.BatchNorm2d.__init__))
    _, state = stepped("trades", "on", device, fold=False)
    assert state.joined is None and "its training forwards run one by one" in capsys.readouterr().err
    assert int(state.student.get_buffer("bn1.num_batches_tracked")) == 4


def put_momentum_away(init: Any) -> Any:
    return lambda self, channels: init(self, channels, momentum=None)


def test_is_used_on_a_gpu_and_where_it_is_asked_for(device: torch.device) -> None:
    recipe = find_setting("sat:digits")[2].recipe
    of = {way: recipe.replace(together=way).execution for way in ("auto", "on", "off")}
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert [of[way].together_on(cpu) for way in of] == [False, True, False]
    assert [of[way].together_on(gpu) for way in of] == [True, True, False]
    assert not recipe.replace(channels_last=False).execution.together_on(gpu)
