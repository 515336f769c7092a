"""Every network against the released code: sizes, names, arithmetic; and the promises the engine relies on.

Dimension key: B batch, C channels, H W image, K classes.
"""

import zlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from retemper.engine.models import MODELS, create_model
from retemper.engine.models.wide_resnet import WideResNet

SIZES = {  # name: classes, parameters, entries of the state_dict, millions of multiply-adds for a 32x32 image
    "resnet18": (10, 11_173_962, 122, 555.4),
    "mobilenet_v2": (10, 2_296_922, 344, 91.2),
    "wrn34_10": (10, 46_160_474, 191, 6659.0),
    "wrn34_20": (10, 184_531_674, 191, 26582.0),
    "preact_resnet18": (200, 11_269_640, 107, 555.5),
    "preact_resnet18_frl": (10, 11_171_146, 102, 555.4),
    "preact_resnet34": (200, 21_377_800, 203, 1159.5),
    "resnet56": (10, 853_018, 332, 125.5),
    "tiny_resnet": (10, 77_754, 56, 12.207),
    "tiny_resnet_wide": (10, 308_074, 56, 48.531),
    "small_resnet": (10, 308_826, 74, 4.044),
    "small_resnet_wide": (10, 1_228_970, 74, 15.952),
}
KEYS = {
    "resnet18": ["conv1.weight", "bn1.running_var", "layer2.0.shortcut.0.weight", "layer2.0.shortcut.1.bias"],
    "mobilenet_v2": ["layers.16.bn3.weight", "layers.0.shortcut.0.weight", "conv2.weight", "linear.bias"],
    "wrn34_10": ["block1.layer.0.convShortcut.weight", "block3.layer.4.bn2.weight", "bn1.weight", "fc.weight"],
    "wrn34_20": ["block1.layer.0.convShortcut.weight", "block3.layer.4.bn2.weight", "bn1.weight", "fc.weight"],
    "preact_resnet18_frl": ["layer4.0.shortcut.0.weight", "layer4.1.bn2.weight", "linear.weight"],
    "preact_resnet18": ["layer4.0.shortcut.0.weight", "layer4.1.bn2.weight", "bn.running_mean", "linear.weight"],
    "preact_resnet34": ["layer3.5.conv2.weight", "bn.weight"],
    "resnet56": ["layer3.8.conv2.weight", "layer2.0.bn1.weight", "linear.weight"],
    "tiny_resnet": ["layer3.0.shortcut.1.weight", "linear.weight"],
    "tiny_resnet_wide": ["layer3.0.conv2.weight", "linear.bias"],
    "small_resnet": ["layer4.0.shortcut.1.weight", "linear.weight"],
    "small_resnet_wide": ["layer4.0.conv2.weight", "linear.bias"],
}
RELEASED = {  # the first three logits of `filled` networks, by the released code in float64
    "resnet18": [0.898916041, -1.70215143, 2.78087786],
    "mobilenet_v2": [-24.5620477, -30.3432114, 50.916313],
    "wrn16_2": [1.68134062, -2.09041827, 1.0324704],
    "preact_resnet18": [-6.39996413, 6.53503079, -6.13186681],
    "preact_resnet18_frl": [-2.66532836, 2.19839475, -1.33155521],
    "preact_resnet34": [-6.29354922, 6.46159309, -6.09374875],
    "resnet56": [2.86852047, -0.276552179, -2.53967554],
}
each_model = pytest.mark.parametrize("name", MODELS)
# WRN-34-20 has the modules of WRN-34-10, four times as large
each_light_model = pytest.mark.parametrize("name", [name for name in MODELS if name != "wrn34_20"])
each_small_model = pytest.mark.parametrize("name", [name for name in MODELS if not name.startswith("wrn34")])


def meta_model(name: str, num_classes: int, channels: int | None = None) -> nn.Module:
    """A network without storage: shapes and counts only."""
    with torch.device("meta"):
        return create_model(name, num_classes, channels=channels)


def image(name: str, *, batch: int = 2, size: int = 16, device: str = "cpu") -> Tensor:
    gen = torch.Generator().manual_seed(0)
    return torch.rand(batch, 1 if name.startswith("tiny") else 3, size, size, generator=gen).to(device)


def channels_last(model: nn.Module) -> nn.Module:
    return model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue] (torch's overloads omit it)


def filled(model: nn.Module) -> nn.Module:
    """Fill a network with weights that need no random generator: sines of the position, with a phase of the name."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            phase = zlib.crc32(name.encode()) % 1000
            wave = torch.arange(tensor.numel(), dtype=torch.float64).mul(1.7).add(phase).sin()
            if tensor.dim() == 1:
                wave = 0.2 * wave + (0 if name.endswith(("bias", "mean")) else 1)
            else:
                wave = wave * (4 / tensor[0].numel()) ** 0.5
            tensor.copy_(wave.view(tensor.shape))
    return model.double().eval()


@each_model
def test_has_the_released_parameters_and_names(name: str) -> None:
    num_classes, parameters, entries, _ = SIZES[name]
    model = meta_model(name, num_classes)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert len(model.state_dict()) == entries
    assert set(KEYS[name]) <= set(model.state_dict())
    assert not any(key.startswith("sub_block1") for key in model.state_dict())


@each_model
def test_costs_the_published_multiply_adds(name: str) -> None:
    model = meta_model(name, SIZES[name][0])
    with FlopCounterMode(display=False) as counter:
        model(image(name, batch=1, size=32, device="meta"))
    assert counter.get_total_flops() / 2e6 == pytest.approx(SIZES[name][3], rel=1e-3)


@pytest.mark.own_process
@pytest.mark.parametrize("name", RELEASED)
def test_computes_what_the_released_code_computes(name: str) -> None:
    model = filled(WideResNet(10, 3, depth=16, widen=2) if name == "wrn16_2" else create_model(name, 10))
    pixels = torch.arange(3 * 32 * 32, dtype=torch.float64).mul(0.7).sin().add(1).div(2).view(1, 3, 32, 32)
    with torch.no_grad():
        logits = model(pixels)[0, :3]
    torch.testing.assert_close(logits, torch.tensor(RELEASED[name], dtype=torch.float64), rtol=1e-7, atol=0)


@pytest.mark.parametrize("size", [28, 32, 64])
@pytest.mark.parametrize("channels", [1, 3])
@each_model
def test_takes_any_image_size_and_colour(name: str, channels: int, size: int) -> None:
    logits = meta_model(name, 7, channels)(torch.empty(2, channels, size, size, device="meta"))
    assert logits.shape == (2, 7)


def test_tiny_networks_are_grey_and_the_others_in_colour() -> None:
    for name in MODELS:
        inputs = meta_model(name, 10).state_dict()["conv1.weight"].shape[1]
        assert inputs == (1 if name.startswith("tiny") else 3), name


class LayoutWatch(TorchDispatchMode):
    """A mode that notes every operation whose output is a feature map that is not channels-last."""

    def __init__(self) -> None:
        super().__init__()
        self.seen, self.broken = 0, []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor) and tensor.dim() == 4 and min(tensor.shape[1:]) > 1:
                self.seen += 1
                if tensor.stride(1) != 1:
                    self.broken.append(f"{func} {tuple(tensor.shape)}")
        return out


@pytest.mark.own_process
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
@each_light_model
def test_stays_channels_last_forward_and_backward(name: str, autocast: bool) -> None:
    model = channels_last(create_model(name, 10)).eval().requires_grad_(False)
    pixels = image(name).to(memory_format=torch.channels_last).requires_grad_()
    watch = LayoutWatch()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        with watch:
            logits = model(pixels)
        assert watch.seen > 20
        assert not watch.broken
        with watch:
            (grad,) = torch.autograd.grad(logits.float().sum(), pixels)
    assert logits.dtype == (torch.bfloat16 if autocast else torch.float32)
    assert grad.is_contiguous(memory_format=torch.channels_last) and grad.dtype == torch.float32
    # the pool spreads its gradient over the last, smallest map in the default layout; the next operation puts it right
    assert len(watch.broken) <= 1 and all("div" in broken for broken in watch.broken)


@pytest.mark.own_process
@each_small_model
def test_evaluation_is_repeatable_and_touches_no_statistics(name: str) -> None:
    model = create_model(name, 10).eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    pixels = image(name)
    with torch.no_grad():
        logits = model(pixels)
        assert torch.equal(logits, model(pixels))
        torch.testing.assert_close(logits[:1], model(pixels[:1]), rtol=1e-4, atol=1e-5)  # rows do not mix
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.own_process
@each_small_model
def test_training_moves_every_parameter_and_every_statistic(name: str) -> None:
    model = create_model(name, 10)
    nn.functional.cross_entropy(model(image(name, batch=4)), torch.tensor([0, 1, 2, 3])).backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in model.parameters())
    counts = [value for key, value in model.state_dict().items() if key.endswith("num_batches_tracked")]
    assert counts and all(count == 1 for count in counts)


@pytest.mark.parametrize("name", ["resnet56", "tiny_resnet"])
def test_is_one_graph_for_the_compiler(name: str) -> None:
    model = create_model(name, 10).eval()
    compiled: Callable[[Tensor], Tensor] = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(image(name)), model(image(name)))


def test_wide_resnet_starts_as_released() -> None:
    torch.manual_seed(0)
    state = WideResNet(10, 3, depth=10, widen=4).state_dict()
    for key, fan_out in (("block3.layer.0.conv2.weight", 9 * 256), ("block3.layer.0.convShortcut.weight", 256)):
        assert state[key].std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.02)
    assert state["fc.bias"].abs().max() == 0
    assert state["bn1.weight"].eq(1).all() and state["bn1.bias"].eq(0).all()


def test_refuses_depths_that_no_wide_resnet_has() -> None:
    with pytest.raises(ValueError, match=r"6 n \+ 4.*not 32"):
        WideResNet(10, 3, depth=32, widen=1)


def test_an_unknown_name_is_told_the_nearest_and_all() -> None:
    with pytest.raises(ValueError, match="'resnet-18'; the nearest is 'resnet18'") as error:
        create_model("resnet-18", 10)
    assert all(name in str(error.value) for name in MODELS)


@pytest.mark.parametrize(("num_classes", "channels"), [(0, None), (-1, 3), (10, 0)])
def test_refuses_counts_below_one(num_classes: int, channels: int | None) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        create_model("tiny_resnet", num_classes, channels=channels)
