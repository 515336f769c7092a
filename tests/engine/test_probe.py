"""Networks of other code that would spoil a run: a probe on a few images refuses them before the first step."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from retemper.engine.checkpoints.probe import require_sound
from retemper.errors import DataError

Train = Callable[..., int]
IMAGE = torch.rand(8, 3, 4, 4, generator=torch.Generator().manual_seed(0))
NET = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(64, 10)

    def forward(self, image):
        return self.head(image.flatten(1))

class InPlace(Net):
    def forward(self, image):
        return super().forward(image.sub_(0.5))

class Standardising(Net):
    def forward(self, image):
        return super().forward((image - image.mean(0)) / (image.std(0) + 0.1))

class Nan(Net):
    def forward(self, image):
        return super().forward(image / image.amin((1, 2, 3), keepdim=True))

class NoGrad(Net):
    @torch.no_grad()
    def forward(self, image):
        return super().forward(image)
"""


class Net(nn.Module):
    """A linear network whose input and output a test may spoil."""

    def __init__(self, before: Callable[[Tensor], Tensor] = lambda x: x, after: Callable = lambda x: x) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head, self.before, self.after = nn.Linear(48, 5).requires_grad_(False), before, after

    def forward(self, image: Tensor) -> object:
        return self.after(self.head(self.before(image).flatten(1)))


def inferred(logits: Tensor) -> Tensor:
    with torch.inference_mode():
        return logits + 1


def raising(logits: Tensor) -> Tensor:
    raise KeyError("depth")


@pytest.mark.parametrize(
    "network, attacked, said",
    [
        (
            Net(lambda x: x.sub_(0.5)),
            False,
            "changes the images that it is given: begin its forward with image = image",
        ),
        (Net(lambda x: x.contiguous().sub_(0.5)), False, "changes the images"),  # of one memory format alone
        (Net(lambda x: x - x.mean(0)), False, "otherwise in another batch"),
        (Net(lambda x: nn.functional.dropout(x, 0.5)), False, "otherwise when it is asked again"),
        (Net(after=lambda x: x / 0), False, "8 of 8 images with logits that are not finite"),
        (Net(after=lambda x: x.index_fill(0, torch.tensor(3), torch.nan) if len(x) > 3 else x), False, "1 of 8 images"),
        (Net(after=lambda x: nn.functional.pad(x, (0, 1))), False, "(8, 6) of torch.float32: it must return logits"),
        (Net(after=lambda x: (x, x)), False, "answers 8 images with a tuple"),
        (Net(after=lambda x: x.round().long()), False, "(8, 5) of torch.int64"),
        (Net(after=lambda x: x.mean(0)), False, "with (5,) of torch.float32"),
        (Net(after=inferred), True, "no gradient reaches its images"),
        (Net(after=raising), False, "does not answer 8 images (KeyError: 'depth')"),
        (Net(after=lambda x: x.detach()), True, "no gradient reaches its images"),
        (Net(lambda x: x.relu_()), True, "no gradient reaches its images, and the method attacks it (RuntimeError"),
    ],
)
def test_a_network_that_would_spoil_a_run_is_refused_in_a_line(network: Net, attacked: bool, said: str) -> None:
    image = IMAGE.clone()
    with pytest.raises(DataError) as error:
        require_sound("the teacher net.py:build", network, image, 5, attacked=attacked)
    assert str(error.value).startswith("the teacher net.py:build") and said in str(error.value)
    assert "\n" not in str(error.value) and torch.equal(image, IMAGE), "the probe changed the caller's images"


@pytest.mark.parametrize(
    "network, attacked",
    [
        (Net(), True),
        (Net(lambda x: x.clone().sub_(0.5)), True),
        (Net(lambda x: x - x.mean((1, 2, 3), keepdim=True)), True),
        (Net(lambda x: x.bfloat16().float(), lambda x: x.bfloat16()), True),
        (Net(after=lambda x: x.squeeze()), True),
        (Net(after=lambda x: x.detach()), False),
        (Net(after=inferred), False),
        (nn.Sequential(nn.ReLU(inplace=True), Net()), False),  # of pixels in [0, 1] it changes none
    ],
)
def test_a_network_that_answers_each_image_by_itself_is_taken(network: nn.Module, attacked: bool) -> None:
    require_sound("the teacher", network, IMAGE, 5, attacked=attacked)


@pytest.mark.parametrize(
    "recipe, network, said",
    [
        *((recipe, "InPlace", "changes the images") for recipe in ("iad", "fair_iad", "absld", "adaad")),
        ("mtard", "InPlace", "changes the images"),
        ("rslad", "Standardising", "in another batch"),
        ("rslad", "Nan", "not finite"),
        ("adaad", "NoGrad", "no gradient reaches its images"),
    ],
)
def test_a_teacher_is_probed_before_it_teaches(
    recipe: str,
    network: str,
    said: str,
    train: Train,
    teacher: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "net.py").write_text(NET)
    name = f"{tmp_path}/net.py:{network}"
    words = ["--teacher", str(teacher), "--clean-teacher", name] if recipe == "mtard" else ["--teacher", name]
    assert train(f"{recipe}:digits", tmp_path / "run", "--epochs", "1", *words) == 3
    assert said in (err := capsys.readouterr().err) and name in err
    assert not (tmp_path / "run/config.json").exists()


def test_a_start_is_probed_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from retemper.cli import run

    (tmp_path / "net.py").write_text("""
from retemper.engine.models.resnet import ResNet

class Overwriting(ResNet):
    def forward(self, image):
        answer = super().forward(image)
        image.zero_()
        return answer

def build():
    return Overwriting(10, 1, (32, 64, 128), (1, 1, 1))
""")
    words = ["train", "sat:digits", "--epochs", "1", "--start", f"{tmp_path}/net.py:build"]
    assert run([*words, "--out", str(tmp_path / "run")]) == 3
    assert "net.py:build changes the images" in capsys.readouterr().err
    assert not (tmp_path / "run/config.json").exists()
