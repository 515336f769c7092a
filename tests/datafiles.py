"""Tiny data sets in the exact formats of the real ones, each with the truth that was written.

Every maker returns {"train": (images, labels), "test": (images, labels)}: (N, H, W, C) uint8 and (N,) int64, in the
order in which `load_split` must give them. Reached through the fixture `datafiles`.
"""

import gzip
import io
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import scipy.io
from PIL import Image

Truth = dict[str, tuple[np.ndarray, np.ndarray]]
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
WNIDS = ("n01443537", "n01629819", "n01641577")


def pixels(seed: int, *shape: int) -> np.ndarray:
    """Return random uint8 pixels of a shape."""
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def make_cifar10(root: Path, n: int = 10, version: str = "binary") -> Truth:
    """`n` images in each of the five training batches and in the test batch, as root/cifar-10-batches-bin or -py."""
    train, test = (pixels(1, 5 * n, 32, 32, 3), np.arange(5 * n) % 10), (pixels(2, n, 32, 32, 3), np.arange(n) % 10)
    folder = root / ("cifar-10-batches-bin" if version == "binary" else "cifar-10-batches-py")
    folder.mkdir(parents=True)
    batches = [(f"data_batch_{b + 1}", train[0][b * n : b * n + n], train[1][b * n : b * n + n]) for b in range(5)]
    for name, images, labels in [*batches, ("test_batch", *test)]:
        if version == "binary":
            (folder / f"{name}.bin").write_bytes(_records(images, labels[:, None]))
        else:
            batch = {"batch_label": name, "labels": labels.tolist(), "data": _planes(images)}
            (folder / name).write_bytes(python2_pickle(batch))
    if version == "binary":
        (folder / "batches.meta.txt").write_text("\n".join(CIFAR10_CLASSES) + "\n\n")
    else:
        meta = {"num_cases_per_batch": n, "label_names": list(CIFAR10_CLASSES), "num_vis": 3072}
        (folder / "batches.meta").write_bytes(python2_pickle(meta))
    return {"train": train, "test": test}


def make_cifar100(root: Path, n: int = 100, version: str = "binary") -> Truth:
    """`n` images in each half, as root/cifar-100-binary or -python; names fine_0 ... fine_99."""
    truth = {
        "train": (pixels(3, n, 32, 32, 3), np.arange(n) % 100),
        "test": (pixels(4, n, 32, 32, 3), np.arange(n)[::-1] % 100),
    }
    folder = root / ("cifar-100-binary" if version == "binary" else "cifar-100-python")
    folder.mkdir(parents=True)
    for split, (images, fine) in truth.items():
        if version == "binary":
            (folder / f"{split}.bin").write_bytes(_records(images, np.stack([fine // 5, fine], axis=1)))
        else:
            batch = {"fine_labels": fine.tolist(), "coarse_labels": (fine // 5).tolist(), "data": _planes(images)}
            (folder / split).write_bytes(python2_pickle(batch))
    names = {kind: [f"{kind}_{i}" for i in range(k)] for kind, k in (("fine", 100), ("coarse", 20))}
    if version == "binary":
        for kind, of_kind in names.items():
            (folder / f"{kind}_label_names.txt").write_text("\n".join(of_kind) + "\n")
    else:
        meta = {f"{kind}_label_names": of_kind for kind, of_kind in names.items()}
        (folder / "meta").write_bytes(python2_pickle(meta))
    return truth


def make_fashion_mnist(root: Path, n: int = 30, packed: bool = True) -> Truth:
    """`n` training images and n // 2 test images in the four IDX files."""
    root.mkdir(parents=True, exist_ok=True)
    truth: Truth = {}
    for seed, (split, stem, count) in enumerate((("train", "train", n), ("test", "t10k", n // 2))):
        images, labels = pixels(seed, count, 28, 28, 1), np.arange(count) % 10
        for kind, magic, array in (("images-idx3", 0x803, images[..., 0]), ("labels-idx1", 0x801, labels)):
            raw = struct.pack(f">{1 + array.ndim}I", magic, *array.shape) + array.astype(np.uint8).tobytes()
            name = f"{stem}-{kind}-ubyte"
            (root / (name + ".gz" if packed else name)).write_bytes(gzip.compress(raw) if packed else raw)
        truth[split] = images, labels
    return truth


def make_svhn(root: Path, n: int = 20) -> Truth:
    """`n` training images and as many test images, half of them and more of the digit 1, in two MATLAB files."""
    root.mkdir(parents=True, exist_ok=True)
    labels = np.where(np.arange(n) % 2, 1, np.arange(n) // 2 % 10)
    truth = {"train": (pixels(5, n, 32, 32, 3), labels), "test": (pixels(6, n, 32, 32, 3), labels[::-1])}
    for half, (images, digits) in truth.items():
        content = {"X": images.transpose(1, 2, 3, 0), "y": np.where(digits, digits, 10).astype(np.uint8)[:, None]}
        scipy.io.savemat(root / f"{half}_32x32.mat", content, do_compression=True)
    return truth


def make_tiny_imagenet(root: Path, n: int = 4) -> Truth:
    """Three classes with `n` training and two test images each, as root/tiny-imagenet-200; the first one is grey."""
    folder = root / "tiny-imagenet-200"
    (folder / "val" / "images").mkdir(parents=True)
    (folder / "wnids.txt").write_text("\n".join(reversed(WNIDS)) + "\n")
    (folder / "words.txt").write_text("".join(f"{w}\tword {k}, other\n" for k, w in enumerate(WNIDS)))
    train: list[tuple[np.ndarray, int]] = []
    for k, wnid in enumerate(WNIDS):
        images = folder / "train" / wnid / "images"
        images.mkdir(parents=True)
        (folder / "train" / wnid / f"{wnid}_boxes.txt").write_text("")
        for i in range(n):
            train.append((_jpeg(images / f"{wnid}_{i}.JPEG", 10 * k + i, grey=not train), k))
    rows, test = [], []
    for i in range(2 * len(WNIDS)):
        k = (i * 2) % len(WNIDS)
        test.append((_jpeg(folder / "val" / "images" / f"val_{i}.JPEG", 100 + i), k))
        rows.append(f"val_{i}.JPEG\t{WNIDS[k]}\t0\t32\t44\t62\n")
    (folder / "val" / "val_annotations.txt").write_text("".join(reversed(rows)))
    return {"train": _stack(train), "test": _stack(test)}


def make_folder(root: Path, n: int = 3, size: tuple[int, int] = (12, 12), test: str = "test") -> Truth:
    """Classes ant and bee with `n` training and two test PNGs each, all (height, width) `size`."""
    truth: Truth = {}
    for split, half, count in (("train", "train", n), ("test", test, 2)):
        pairs = []
        for k, name in enumerate(("ant", "bee")):
            (root / half / name).mkdir(parents=True)
            for i in range(count):
                image = pixels(1000 * len(half) + 10 * k + i, *size, 3)
                Image.fromarray(image).save(root / half / name / f"{i}.png")
                pairs.append((image, k))
        truth[split] = _stack(pairs)
    return truth


def python2_pickle(content: Any) -> bytes:
    """`content` pickled as Python 2 and numpy 1 did, which is what CIFAR's python version is: text is byte strings."""

    def save_text(pickler: Any, text: str | bytes) -> None:
        raw = text.encode("latin1") if isinstance(text, str) else text
        head = b"U" + struct.pack("<B", len(raw)) if len(raw) < 256 else b"T" + struct.pack("<I", len(raw))
        pickler.write(head + raw)

    base: Any = pickle.__dict__["_Pickler"]  # the one written in Python: the C one cannot be taught old text
    kind = type("Python2Pickler", (base,), {"dispatch": base.dispatch | {str: save_text, bytes: save_text}})
    out = io.BytesIO()
    kind(out, protocol=2).dump(content)
    return out.getvalue().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")


def _planes(images: np.ndarray) -> np.ndarray:
    """Return pixels as (N, 3072): all red, all green, all blue."""
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2)).reshape(len(images), -1)


def _records(images: np.ndarray, labels: np.ndarray) -> bytes:
    return np.concatenate([labels.astype(np.uint8), _planes(images)], axis=1).tobytes()


def _jpeg(path: Path, seed: int, grey: bool = False) -> np.ndarray:
    """Write a 64 x 64 JPEG and return what it decodes to: (64, 64, 3)."""
    blocks = pixels(seed, 8, 8, 3).repeat(8, axis=0).repeat(8, axis=1)
    Image.fromarray(blocks[..., 0] if grey else blocks).save(path, "JPEG")
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def _stack(pairs: list[tuple[np.ndarray, int]]) -> tuple[np.ndarray, np.ndarray]:
    return np.stack([image for image, _ in pairs]), np.array([label for _, label in pairs])
