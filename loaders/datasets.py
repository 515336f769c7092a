"""The data sets by name: digits, Fashion-MNIST, CIFAR, SVHN, Tiny-ImageNet and folders of images."""

from pathlib import Path

import numpy as np

from retemper.console import say
from retemper.errors import DataError, UsageError
from retemper.loaders.cifar import load_cifar
from retemper.loaders.fashion_mnist import load_fashion_mnist
from retemper.loaders.image_folders import load_folder, load_tiny_imagenet
from retemper.loaders.split import Split, fingerprint_of, split_of_arrays
from retemper.loaders.svhn import load_svhn
from retemper.loaders.views import permutation

DATASETS = ("digits", "fashion-mnist", "cifar10", "cifar100", "svhn", "tiny-imagenet", "folder")
SPLITS = ("train", "test")
USUAL_EPS = {"digits": 0.15, "fashion-mnist": 0.1}  # of the others 8/255
USUAL_L2 = {"digits": 0.6, "fashion-mnist": 0.5}  # of the others 128/255
USUAL_L1 = {"digits": 1.0, "fashion-mnist": 1.5}  # of the others 12
DIGITS_SEED = 1797  # of our own split of digits: another seed would make another data set


def usual_eps(dataset: str, norm: str = "linf") -> float:
    """Return the radius that networks on a data set are evaluated at, in pixel units, so that all are alike.

    Args:
        norm: "linf", "l2" or "l1"; for another there is none, and ValueError is raised.
    """
    known = {"linf": (USUAL_EPS, 8 / 255), "l2": (USUAL_L2, 128 / 255), "l1": (USUAL_L1, 12.0)}
    if norm not in known:
        raise ValueError(f"norm = {norm!r}: it must be one of {', '.join(known)}")
    of_dataset, otherwise = known[norm]
    return of_dataset.get(dataset, otherwise)


def load_split(
    dataset: str,
    split: str,
    data_root: str | Path | None = None,
    image_size: int | None = None,
    max_side: int | None = None,
) -> Split:
    """Read one half of a data set.

    Args:
        dataset: one of `DATASETS`.
        split: "train" or "test".
        data_root: the folder of the set, or the folder that it lies in. None for digits, which scikit-learn brings, and
            for Fashion-MNIST where Debian's package puts it; a folder that is named is never passed over.
        image_size: the side in pixels; None keeps the set's own. For `folder` the shorter side of each image is resized
            to it and the middle taken; for the other sets see `shrink`.
        max_side: of `folder`: the shorter side is resized to this instead. All of the middle square is stored for
            training, which views of `image_size` are cut from; of a test image the middle `image_size` is taken.

    Raises:
        UsageError: no such data set or half, or an image size where the set has its own.
        DataError: files are missing or damaged.
    """
    if dataset not in DATASETS:
        raise UsageError(f"no data set {dataset!r}; there are {', '.join(DATASETS)}")
    if split not in SPLITS:
        raise UsageError(f"no half {split!r} of a data set; there are {', '.join(SPLITS)}")
    if image_size is not None and image_size < 1:
        raise UsageError(f"--image-size {image_size}: it must be at least 1")
    if max_side is not None and dataset != "folder":
        raise UsageError(f"--max-side {max_side}: {dataset} has images of one size; it is for folders of images")
    data_root = None if data_root is None else Path(data_root)
    try:
        if dataset == "folder":
            return load_folder(split, data_root, image_size, max_side)
        found = _load(dataset, split, data_root)
        return found if image_size is None else shrink(found, image_size)
    except OSError as error:
        raise DataError(f"cannot read {error.filename or data_root}: {error.strerror or error}") from error


def _load(dataset: str, split: str, data_root: Path | None) -> Split:
    if dataset == "digits":
        if data_root is not None and not data_root.is_dir():
            raise DataError(f"--data-root {data_root} is not a folder: leave it out, digits come with scikit-learn")
        if data_root is not None:
            say(f"note: digits come with scikit-learn, nothing is read from --data-root {data_root}")
        return load_digits_split(split)
    if dataset == "fashion-mnist":
        return load_fashion_mnist(split, data_root)
    if dataset == "svhn":
        return load_svhn(split, data_root)
    if dataset == "tiny-imagenet":
        return load_tiny_imagenet(split, data_root)
    return load_cifar(dataset, split, data_root)


def shrink(split: Split, side_px: int) -> Split:
    """Return the split with smaller images: each pixel is the rounded mean of the square that it replaces.

    Args:
        split: square images.
        side_px: the new side; it divides the old one.

    Raises:
        UsageError: the images are not square, or the side does not divide theirs.
    """
    height, width, channels = split.shape
    factor = height // side_px
    if height != width or side_px * factor != height:
        raise UsageError(
            f"--image-size {side_px}: {split.name} is {height} x {width}, and can be divided by whole numbers"
        )

    def read() -> np.ndarray:
        squares = split.images.reshape(len(split), side_px, factor, side_px, factor, channels)
        return np.rint(squares.mean((2, 4))).astype(np.uint8)

    mark = fingerprint_of([], Path(), split.fingerprint, "shrunk to", side_px)
    shape = (side_px, side_px, channels)
    return Split(split.name, split.split, split.labels, split.classes, shape, mark, read)


def load_digits_split(split: str) -> Split:
    """Return scikit-learn's digits, 1,797 images of 8 x 8: two thirds of each class to train, one third to test.

    The 17 grey levels 0 ... 16 become 0 ... 255.
    """
    import sklearn  # here: the import takes about a second
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    train = np.zeros(len(labels), dtype=bool)
    for k in range(10):
        members = np.flatnonzero(labels == k)
        train[members[permutation(len(members), DIGITS_SEED, k)[: round(len(members) * 2 / 3)]]] = True
    chosen = train if split == "train" else ~train
    images = np.rint(pixels[chosen] * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
    mark = fingerprint_of([], Path(), "digits", split, sklearn.__version__)
    return split_of_arrays("digits", split, images, labels[chosen], tuple("0123456789"), mark)
