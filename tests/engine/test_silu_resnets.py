"""The SiLU networks against their published formula, with the published names, and in files.

Dimension key: B batch, C channels, H W image, K classes.
"""

import zlib
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from retemper.cli import run
from retemper.engine.checkpoints.content import CheckpointError
from retemper.engine.checkpoints.header import Facts, fitting_models, load_network, read_facts
from retemper.engine.checkpoints.weights import load_checkpoint, save_weights
from retemper.engine.models import MODELS, Normalised, NormalisingNetwork, create_model
from retemper.engine.models.silu_resnets import SiluWideResNet, silu_wide_resnet
from retemper.engine.run.networks import require_same_pixels
from retemper.engine.speed.fold import Folded

CPU = torch.device("cpu")
PUBLISHED = {  # the mean and the deviation in the released code
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "svhn": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
State = dict[str, Tensor]


def values(name: str, *shape: int) -> Tensor:
    """Weights that need no random generator: sines of the position, with a phase of the name."""
    wave = torch.arange(torch.Size(shape).numel(), dtype=torch.float64).mul(1.7).add(zlib.crc32(name.encode()) % 997)
    if len(shape) == 1:
        return 0.2 * wave.sin() + (0 if name.endswith(("bias", "mean")) else 1)
    return (wave.sin() * (3 / torch.Size(shape[1:]).numel()) ** 0.5).view(shape)


def norm_state(name: str, channels: int) -> State:
    keys = ("weight", "bias", "running_mean", "running_var")
    return {f"{name}.{key}": values(f"{name}.{key}", channels) for key in keys}


def wide_state(depth: int, widen: int, classes: int) -> State:
    """The tensors of a released WideResNet, by the names of its files."""
    state = {"init_conv.weight": values("init_conv.weight", 16, 3, 3, 3)}
    for group in range(3):
        outputs = 16 * widen * 2**group
        for number in range((depth - 4) // 6):
            inputs = outputs if number else 16 if group == 0 else outputs // 2
            block = f"layer.{group}.block.{number}"
            convs = {"conv_0": (outputs, inputs, 3, 3), "conv_1": (outputs, outputs, 3, 3)}
            convs |= {} if inputs == outputs else {"shortcut": (outputs, inputs, 1, 1)}
            state |= {f"{block}.{conv}.weight": values(f"{block}.{conv}", *shape) for conv, shape in convs.items()}
            state |= norm_state(f"{block}.batchnorm_0", inputs) | norm_state(f"{block}.batchnorm_1", outputs)
    return state | norm_state("batchnorm", 64 * widen) | head_state(64 * widen, classes)


def preact_state(classes: int) -> State:
    """The tensors of a released PreActResNet-18, by the names of its files."""
    state = {"conv_2d.weight": values("conv_2d.weight", 64, 3, 3, 3)}
    for group in range(4):
        outputs = 64 * 2**group
        for number in range(2):
            inputs = outputs if number or group == 0 else outputs // 2
            block = f"layer_{group}.{number}"
            convs = {"conv_2d_1": (outputs, inputs, 3, 3), "conv_2d_2": (outputs, outputs, 3, 3)}
            convs |= {} if inputs == outputs else {"shortcut": (outputs, inputs, 3, 3)}
            state |= {f"{block}.{conv}.weight": values(f"{block}.{conv}", *shape) for conv, shape in convs.items()}
            state |= norm_state(f"{block}.batchnorm_0", inputs) | norm_state(f"{block}.batchnorm_1", outputs)
    return state | norm_state("batchnorm", 512) | head_state(512, classes)


def head_state(features: int, classes: int) -> State:
    return {"logits.weight": values("logits.weight", classes, features), "logits.bias": values("logits.bias", classes)}


def activated(x: Tensor, state: State, name: str) -> Tensor:
    mean, var, gamma, beta = (
        state[f"{name}.{key}"].view(1, -1, 1, 1) for key in ("running_mean", "running_var", "weight", "bias")
    )
    y = (x - mean) / (var + 1e-5).sqrt() * gamma + beta
    return y * y.sigmoid()


def same_padded(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    """JAX's "SAME": what must be added for H / stride rows lies half above and half below, the odd one below."""
    size = weight.shape[-1]
    total = max(size - stride, 0) if x.shape[-1] % stride == 0 else max(size - x.shape[-1] % stride, 0)
    low = total // 2
    return F.conv2d(F.pad(x, (low, total - low, low, total - low)), weight, stride=stride)


def block_of(x: Tensor, state: State, block: str, convs: tuple[str, str], stride: int, raw: bool) -> Tensor:
    """The pre-activation block; `raw` says whether its shortcut reads x, or the activated x."""
    y = activated(x, state, f"{block}.batchnorm_0")
    out = same_padded(y, state[f"{block}.{convs[0]}.weight"], stride)
    out = same_padded(activated(out, state, f"{block}.batchnorm_1"), state[f"{block}.{convs[1]}.weight"], 1)
    shortcut = state.get(f"{block}.shortcut.weight")
    return out + (x if shortcut is None else same_padded(x if raw else y, shortcut, stride))


def formula(state: State, image: Tensor, dataset: str) -> Tensor:
    """The logits of a released network, wide or not, in plain functions."""
    mean, std = (torch.tensor(one).double().view(1, 3, 1, 1) for one in PUBLISHED[dataset])
    wide = "init_conv.weight" in state
    x = same_padded((image - mean) / std, state["init_conv.weight" if wide else "conv_2d.weight"], 1)
    for group in range(3 if wide else 4):
        place = f"layer.{group}.block" if wide else f"layer_{group}"
        for number in range(sum(name.startswith(place) and name.endswith("_0.bias") for name in state)):
            convs = ("conv_0", "conv_1") if wide else ("conv_2d_1", "conv_2d_2")
            stride = 2 if group and not number else 1
            x = block_of(x, state, f"{place}.{number}", convs, stride, raw=not wide)
    x = activated(x, state, "batchnorm").mean((2, 3))
    return x @ state["logits.weight"].T + state["logits.bias"]


def pixels(size: int = 16) -> Tensor:
    return torch.arange(2 * 3 * size * size, dtype=torch.float64).mul(0.7).sin().add(1).div(2).view(2, 3, size, size)


CASES = {
    "wide": (wide_state(16, 2, 10), lambda: SiluWideResNet(10, 3, depth=16, widen=2), "cifar10"),
    "narrow": (wide_state(10, 1, 10), lambda: SiluWideResNet(10, 3, depth=10, widen=1), "cifar10"),
    "preact": (preact_state(10), lambda: create_model("preact_resnet18_silu", 10), "cifar10"),
    "preact of CIFAR-100": (preact_state(100), lambda: create_model("preact_resnet18_silu", 100), "cifar100"),
    "preact of SVHN": (preact_state(10), lambda: create_model("preact_resnet18_silu", 10, normalise="svhn"), "svhn"),
}


@pytest.mark.parametrize("case", CASES)
def test_computes_the_published_formula(case: str) -> None:
    state, make, dataset = CASES[case]
    model = make().double().eval()
    assert {name for name in model.state_dict() if not name.endswith("num_batches_tracked")} == state.keys()
    model.load_state_dict(state, strict=False)
    expected = formula(state, pixels(), dataset)
    with torch.no_grad():
        torch.testing.assert_close(model(pixels()), expected, rtol=1e-9, atol=1e-9)
        for epilogue in ("plain", "fused"):
            torch.testing.assert_close(Folded(model, torch.float64, epilogue)(pixels()), expected, rtol=1e-9, atol=1e-9)
    assert expected.std() > 0.1


@pytest.mark.parametrize("form", ["bare", "module", "sequential", "averaged", "with its pixels"])
def test_a_released_file_is_loaded_and_normalises_once(form: str, tmp_path: Path) -> None:
    dataset = "svhn" if form == "with its pixels" else "cifar100"
    state = {name: value.float() for name, value in preact_state(10).items()}
    own = {name: torch.tensor(one).view(3, 1, 1) for name, one in zip(("mean", "std"), PUBLISHED[dataset], strict=True)}
    sequential = {f"module.0.{name}": value for name, value in state.items()}
    other = {name: value + 1 for name, value in sequential.items()}
    content = {
        "bare": state,
        "module": {"state_dict": {f"module.{name}": value for name, value in state.items()}},
        "sequential": sequential,
        "averaged": {"model_state_dict": sequential, "unaveraged_model_state_dict": other},
        "with its pixels": state | own,
    }[form]
    torch.save(content, path := tmp_path / "net.pt")
    assert fitting_models(path) == ["preact_resnet18_silu"]
    told = "cifar10" if form == "with its pixels" else dataset  # what the file says comes first
    model = load_network(path, Facts(model="preact_resnet18_silu", num_classes=10, channels=3, dataset=told), CPU)
    assert not isinstance(model, Normalised)
    expected = formula(preact_state(10), pixels(), dataset).float()
    torch.testing.assert_close(model(pixels().float()), expected, rtol=1e-3, atol=1e-3)


def test_a_file_of_ours_is_built_for_the_images_it_was_trained_on(tmp_path: Path) -> None:
    model = create_model("preact_resnet18_silu", 10, normalise="svhn").eval()
    facts = Facts(model="preact_resnet18_silu", num_classes=10, channels=3, dataset="svhn")
    save_weights(tmp_path / "w.safetensors", model, facts.as_metadata())
    elsewhere = load_network(tmp_path / "w.safetensors", replace(facts, dataset="cifar10"), CPU)
    torch.testing.assert_close(elsewhere(pixels().float()), model(pixels().float()))
    other = create_model("preact_resnet18_silu", 10)
    load_checkpoint(tmp_path / "w.safetensors", other)  # into whatever the caller has built
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in other.state_dict().items())
    require_same_pixels("it", None, model)


def test_a_state_dict_with_the_pixels_sets_them() -> None:
    model, (mean, std) = create_model("preact_resnet18_silu", 10), PUBLISHED["svhn"]
    model.load_state_dict(model.state_dict() | {"mean": torch.tensor(mean).view(3, 1, 1), "std": torch.tensor(std)})
    assert torch.equal(model.get_buffer("std").flatten(), torch.tensor(std)) and "mean" not in model.state_dict()


def test_grey_images_are_normalised_too() -> None:
    for dataset, mean in {"digits": 0.3053, "svhn": 0.5, None: 0.5}.items():
        model = create_model("preact_resnet18_silu", 10, channels=1, normalise=dataset)
        assert model.get_buffer("mean").flatten().tolist() == pytest.approx([mean])


def test_the_wrong_name_is_told_the_right_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    narrow: nn.Module = SiluWideResNet(10, 3, depth=34, widen=1)
    monkeypatch.setitem(MODELS, "wrn34_10_silu", partial(silu_wide_resnet, depth=34, widen=1))
    torch.save(narrow.state_dict(), tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=r"another architecture.*its tensors are those of wrn34_10_silu"):
        load_network(tmp_path / "w.pt", Facts(model="wrn34_10", num_classes=10), CPU)
    state = {name: value for name, value in narrow.state_dict().items() if not name.startswith("layer.2.block.4")}
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=r"the nearest network is wrn34_10_silu, 9\d% of whose tensors it has"):
        load_network(tmp_path / "w.pt", Facts(model="wrn34_10", num_classes=10), CPU)


def test_other_pixels_in_a_file_are_not_lost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    name, file = "preact_resnet18_silu", tmp_path / "other.pt"
    network = create_model(name, 10, channels=1)
    torch.save(network.state_dict() | {"mean": torch.full((1,), 0.25), "std": torch.full((1,), 0.5)}, file)
    words = ["--student", name, "--start", str(file), "--max-steps", "1", "--device", "cpu"]
    assert run(["train", "sat:digits", *words, "--out", str(tmp_path / "run")]) == 2  # its own files have no mean
    assert "first takes (image - [0.25]) / [0.5], the student (image - [0.3053])" in capsys.readouterr().err

    monkeypatch.setattr("retemper.engine.even.subject.require_learned", lambda *_: None)
    words = ["--model", name, "--dataset", "digits", "--by", "norm", "--holdout", "5", "--device", "cpu"]
    assert run(["even", str(file), *words, "--out", str(tmp_path / "evened")]) == 0
    weights = tmp_path / "evened/best.safetensors"
    evened = load_network(weights, read_facts(weights), CPU)
    assert isinstance(evened, NormalisingNetwork) and (evened.mean.item(), evened.std.item()) == (0.25, 0.5)
