"""The layers of a folded network: what they take in, what their gradients save, and what they fall back on."""

from collections import Counter
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from retemper.engine import KlObjective, create_model, pgd
from retemper.engine.speed import folded_layers
from retemper.engine.speed.fold import Folded, FoldedConv, FoldedNorm

OURS = ["fused", "convolution"]
each_form = pytest.mark.parametrize("form", OURS)


@pytest.fixture(autouse=True)
def not_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let PyTorch for a CPU say that no graph is captured."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)


class Block(nn.Module):
    """A stem and one residual block, whose shortcut a test may change."""

    def __init__(self, groups: int = 1, shortcut: Any = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding="same", groups=groups, bias=False), nn.BatchNorm2d(8)
        self.conv3, self.bn3 = nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.shortcut = shortcut or nn.Sequential()
        for norm in (self.bn1, self.bn2, self.bn3):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.uniform_(norm.bias, -0.5, 0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(x)))
        return F.relu(self.bn3(self.conv3(y)) + self.shortcut(x)).mean((2, 3))


class Changed(nn.Module):
    """A function of a tensor, as a module."""

    def __init__(self, how: Any) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        return self.how(x)


class Watch(TorchDispatchMode):
    """Counts the operations inside."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def prepared(model: nn.Module, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(1)
    image = torch.rand(2, 3, 8, 8, dtype=dtype).contiguous(memory_format=torch.channels_last)
    return model.eval().to(dtype, memory_format=torch.channels_last), image  # pyright: ignore[reportCallIssue]


def gradient(model: Any, image: Tensor) -> Tensor:
    image = image.clone().requires_grad_()
    (grad,) = torch.autograd.grad(model(image).square().sum(), image)
    return grad


def agree(model: nn.Module, image: Tensor, form: str) -> Folded:
    """Return the twin, after its values and gradients were found to be the network's."""
    twin = Folded(model, image.dtype, form)
    torch.testing.assert_close(twin(image), model(image), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient(twin, image), gradient(model, image), rtol=1e-11, atol=1e-12)
    return twin


@each_form
@pytest.mark.parametrize("name", ["resnet18", "preact_resnet18", "tiny_resnet"])
def test_the_backward_is_masks_and_convolutions(name: str, form: str) -> None:
    """No launch adds the gradients of two places, spreads that of the mean, or brings one into another layout."""
    model, image = prepared(create_model(name, 10, channels=3), torch.float32)
    twin = Folded(model, epilogue=form)
    image.requires_grad_()
    loss = twin(image).sum()
    with Watch() as watch:
        torch.autograd.grad(loss, image)
    layers = [layer for layer in twin.folded if layer.relu]
    assert watch.seen["epilogue_backward"] == len(layers)
    usual = {"epilogue_backward", "convolution_backward", "detach", "sum", "expand", "ones_like", "mm", "t", "view"}
    left = watch.seen.keys() - usual
    # stem of a pre-activation network: no norm follows it, so that its two gradients meet outside of any layer
    assert left <= ({"add"} if name.startswith("preact") else set()), left
    assert watch.seen["add"] <= 4  # there, of each block that changes the shape as well


@each_form
def test_a_pre_activation_network_adds_its_shortcuts_in_its_norms(form: str) -> None:
    model, _ = prepared(create_model("preact_resnet18", 10), torch.float32)
    twin = Folded(model, epilogue=form)
    assert sum(isinstance(layer, FoldedNorm) and layer.adds for layer in twin.folded) == 8
    adds = [node for node in twin.net.graph.nodes if "add" in str(node.target)]  # pyright: ignore
    assert not adds


@pytest.mark.parametrize("form", ["plain", *OURS])
@pytest.mark.parametrize(
    "how",
    [
        lambda x: x.mean((2, 3), keepdim=True),  # broadcast over the pixels
        lambda x: x[:1],  # over the batch
        lambda x: x.contiguous(),  # in another layout
        lambda x: x.transpose(2, 3),
        lambda x: x[:, :, ::1, :].float(),  # of another dtype
    ],
    ids=["pixels", "batch", "layout", "transposed", "dtype"],
)
def test_a_shortcut_of_another_shape_or_layout_is_added(how: Any, form: str) -> None:
    agree(*prepared(Block(shortcut=Changed(how))), form)


@each_form
def test_what_a_shortcut_widens_is_added(form: str) -> None:
    class Squeezed(Block):
        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.bn1(self.conv1(x)))
            y = F.relu(self.bn2(self.conv2(x)))
            return F.relu(self.bn3(self.conv3(y.mean((2, 3), keepdim=True))) + x)

    agree(*prepared(Squeezed()), form)


@each_form
def test_a_norm_takes_a_slice(form: str) -> None:
    class Sliced(Block):
        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.bn1(torch.cat([x, x, x], 1)[:, :8].transpose(2, 3)))

    agree(*prepared(Sliced()), form)


@each_form
def test_a_place_that_writes_over_its_input_has_no_second_output(form: str) -> None:
    class InPlace(Block):
        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.bn1(self.conv1(x)))
            y = F.relu(self.bn2(self.conv2(x)))
            return (y.add_(1) * (x + y)).mean((2, 3))

    model, image = prepared(InPlace())
    twin = Folded(model, image.dtype, form)
    with torch.no_grad():  # with a gradient the network itself is refused by autograd
        torch.testing.assert_close(twin(image), model(image), rtol=1e-12, atol=1e-12)
    assert [layer.twice for layer in twin.folded] == [True, False]


def test_the_gradient_is_not_differentiated_again() -> None:
    model, image = prepared(Block())
    twin = Folded(model, torch.float64, "convolution")
    image.requires_grad_()
    (grad,) = torch.autograd.grad(twin(image).square().sum(), image, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated again"):
        grad.sum().backward()


def layer(form: str = "convolution") -> tuple[FoldedConv, Tensor, Tensor]:
    model, image = prepared(Block(), torch.float32)
    folded = Folded(model, epilogue=form).folded[0]
    assert isinstance(folded, FoldedConv) and folded.relu
    return folded, image, torch.rand(2, 8, 8, 8).contiguous(memory_format=torch.channels_last)


def test_cudnn_is_asked_for_all_in_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of PyTorch's two functions, each is given what it takes: the shift has the dtype of the images."""
    folded, image, residual = layer()
    asked = []

    def relu(x, weight, bias, stride, padding, dilation, groups):
        asked.append("relu")
        assert bias.dtype is x.dtype
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups).relu()

    def add_relu(x, weight, z, alpha, bias, stride, padding, dilation, groups):
        asked.append("add_relu")
        return (F.conv2d(x, weight, bias, stride, padding, dilation, groups) + alpha * z).relu()

    monkeypatch.setattr(torch, "cudnn_convolution_relu", relu)
    monkeypatch.setattr(torch, "cudnn_convolution_add_relu", add_relu)
    with torch.no_grad():
        for given in ((image, None), (image, residual)):
            found = folded._at_once(*given)
            assert found is not None
            torch.testing.assert_close(found, folded.compute(*given)[0])
        assert asked == ["relu", "add_relu"]
        assert folded._at_once(image, residual[:, :, :1]) is None and folded._at_once(image, residual.half()) is None
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
        assert folded._at_once(image, None) is None
    assert len(asked) == 2


def test_what_cudnn_refuses_is_told_once_and_asked_no_more(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folded, image, _ = layer()
    asked = []

    def refuse(*given: Any) -> Tensor:
        asked.append(given)
        raise RuntimeError("GET was unable to find an engine to execute this computation\nin C++")

    monkeypatch.setattr(torch, "cudnn_convolution_relu", refuse)
    folded_layers._tell.cache_clear()
    with torch.no_grad():
        assert folded._at_once(image, None) is None and folded._at_once(image, None) is None and len(asked) == 1
        assert folded._at_once(image[:1], None) is None and len(asked) == 2  # of another shape it may know
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1 and "unable to find an engine" in told[0] and "two launches" in told[0]


def test_a_shape_that_was_not_tried_is_not_tried_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    folded, image, _ = layer()
    monkeypatch.setattr(torch, "cudnn_convolution_relu", lambda *_: image)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert folded._at_once(image, None) is None
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert folded._at_once(image, None) is image
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert folded._at_once(image, None) is image


def test_too_little_memory_is_not_taken_for_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    folded, image, _ = layer()

    def fail(*_: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "cudnn_convolution_relu", fail)
    with pytest.raises(torch.OutOfMemoryError):
        folded._at_once(image, None)


@pytest.mark.parametrize("kernel", [True, False])
def test_a_depthwise_convolution_masks_for_the_layer_before_it(kernel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    class Chain(Block):
        def forward(self, x: Tensor) -> Tensor:
            y = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
            return self.bn3(self.conv3(y))

    monkeypatch.setattr(folded_layers, "runs_triton", lambda _: kernel)  # its operator takes the reference here
    model, image = prepared(Chain(groups=8))
    twin = agree(model, image, "convolution")
    first, second = twin.folded[:2]
    assert first.mask_left and isinstance(second, FoldedConv) and second.masks_x and second.depthwise
    image.requires_grad_()
    loss = twin(image).sum()
    with Watch() as watch:
        torch.autograd.grad(loss, image)
    assert watch.seen["depthwise_backward"] == kernel and watch.seen["epilogue_backward"] == (not kernel)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "preact_resnet18"])
def test_a_gpu_computes_what_separate_kernels_do_over_memory_that_held_nan(name: str, dtype: torch.dtype) -> None:
    """Without a shortcut, PyTorch gives cuDNN memory that was never written, times 0, in its place."""
    model, image = prepared(create_model(name, 10), torch.float32)
    model, image = model.cuda(), image.cuda()
    expected = ()
    for form in ("fused", "convolution"):
        room = torch.full((2**26,), torch.nan, device="cuda")
        del room
        twin = Folded(model, dtype, form)
        found = twin(image).float(), gradient(twin, image)
        assert all(value.isfinite().all() for value in found)
        if form == "fused":
            expected = found
        else:
            for ours, theirs in zip(found, expected, strict=True):
                assert (ours - theirs).norm() < (0.05 if dtype is torch.bfloat16 else 1e-2) * theirs.norm()


def test_a_trained_network_in_bfloat16_is_attacked_as_strongly() -> None:
    """The shift is rounded to bfloat16, as the weights are. PGD-10 reaches within 0.1 % what it does in float32."""
    digits: Any = load_digits()
    image = torch.as_tensor(digits.images, dtype=torch.float32).div(16)[:, None]
    label = torch.as_tensor(digits.target)
    torch.manual_seed(0)
    teacher, model = (create_model("tiny_resnet", 10) for _ in range(2))
    for network in (teacher, model):
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
        for some in torch.randperm(1500).repeat(2).split(100):
            optimizer.zero_grad()
            F.cross_entropy(network(image[some]), label[some]).backward()
            optimizer.step()
        network.eval().to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    attacked = image[1500:].contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        objective = KlObjective(teacher(attacked), label[1500:], torch.linspace(0.5, 2, 10))

    def reached(twin: nn.Module) -> float:
        adv = pgd(twin, attacked, objective=objective, steps=10, step=2 / 255, eps=8 / 255, start="normal", seed=0)
        with torch.no_grad():
            return float(objective(model(adv)))

    truth = reached(model)
    found = {form: reached(Folded(model, torch.bfloat16, form)) for form in ("fused", "convolution")}
    assert truth > 1 and found == pytest.approx(dict.fromkeys(found, truth), rel=1e-3)
