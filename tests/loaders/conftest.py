"""What the loaders' tests share: a small split, and FFCV itself."""

import os
from pathlib import Path

import numpy as np
import pytest

from retemper.loaders import Split, ffcv_problem, split_of_arrays
from retemper.loaders.ffcv_library import INSTALL


@pytest.fixture(scope="session")
def split() -> Split:
    """Return 130 colour images of 6 x 5 in 4 classes: odd sides, and a number that few batch sizes divide."""
    images = np.random.default_rng(0).integers(0, 256, (130, 6, 5, 3), dtype=np.uint8)
    return split_of_arrays("toy", "train", images, np.arange(130) % 4, ("a", "b", "c", "d"), "f" * 64)


@pytest.fixture(scope="session")
def ffcv() -> None:
    """The test needs the real library."""
    problem = ffcv_problem()
    if problem:
        pytest.fail(f"{problem}: run `{INSTALL}`")


@pytest.fixture(scope="session")
def debian_fashion_mnist() -> Path:
    """The folder above the one in which Debian's package puts Fashion-MNIST."""
    folder = Path("/usr/share/datasets")
    if not (folder / "fashion-mnist" / "train-images-idx3-ubyte.gz").is_file():
        missing = "the real Fashion-MNIST is not here: run `apt-get install dataset-fashion-mnist`"
        pytest.fail(missing) if os.environ.get("CI") else pytest.skip(missing)
    return folder
