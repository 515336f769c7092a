"""A batch of one image that batch norm cannot train on is refused before the first step, in a line."""

from pathlib import Path

import numpy as np
import pytest
import torch

from retemper.cli import run
from retemper.engine import create_model
from retemper.engine.catalogue import find_setting
from retemper.engine.run.lone_image import require_no_lone_image
from retemper.errors import UsageError
from retemper.loaders import Loader, ViewSpace, make_loader, split_of_arrays


def loader_of(images: int, batch_size: int, world_size: int = 1) -> Loader:
    pixels, labels = np.zeros((images, 4, 4, 1), np.uint8), np.arange(images) % 2
    split = split_of_arrays("made", "train", pixels, labels, ("a", "b"), "made")
    views, device = ViewSpace(0, False), torch.device("cpu")
    return make_loader(
        "resident", split, batch_size=batch_size, seed=0, views=views, device=device, world_size=world_size
    )


@pytest.mark.parametrize(
    "images, batch_size, world_size, pixels, changes, refused",
    [
        (10, 3, 1, 4, {}, True),
        (4, 1, 1, 4, {}, True),
        (10, 4, 1, 4, {}, False),
        (10, 3, 1, 8, {}, False),  # the last layers have 2 x 2 pixels
        (11, 4, 2, 4, {}, True),  # two images and one
        (9, 4, 4, 4, {}, True),  # one image, and none in three processes
        (11, 4, 2, 4, {"batch_norm": "synced"}, False),
        (10, 3, 1, 4, {"joint": True}, False),  # the clean image beside the attacked one
        (10, 3, 1, 4, {"joint": True, "attack_bn": "train"}, True),
    ],
)
def test_a_batch_of_one_image_is_refused_where_batch_norm_cannot_train_on_it(
    images: int, batch_size: int, world_size: int, pixels: int, changes: dict[str, object], refused: bool
) -> None:
    recipe, student = find_setting("trades:digits")[2].recipe.replace(**changes), create_model("tiny_resnet", 2)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    given = student, recipe, loader_of(images, batch_size, world_size), (pixels, pixels, 1)
    if refused:
        with pytest.raises(UsageError, match="leave a batch of one image"):
            require_no_lone_image(*given)
    else:
        require_no_lone_image(*given)
    assert student.training and all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


def test_it_is_refused_before_the_first_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = "train sat:digits --epochs 1 --image-size 4 --images-per-class 1 --batch-size 3".split()
    assert run([*words, "--out", str(tmp_path / "run")]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("retemper: error: 10 images in batches of 3 leave a batch of one image, and batch norm in")
    assert not (tmp_path / "run/config.json").exists()
