"""An epoch of random 32 x 32 images: padded by 4, cropped at random, flipped, as float pixels in [0, 1] on the device.

Ours, from both backends, beside FFCV with its own random operations, and torchvision's transforms in a DataLoader. A
call is an epoch; `images/s` is what a training step must not exceed, or it waits. The first row is the baseline: a
`ratio` above 1 is slower than it. Ours draws the views itself, so that an epoch can be drawn again: its two backends
must agree to the bit. What the others give must be a crop of the right image, mirrored or not. A library's loader is
used at its best: persistent workers, pinned memory on a GPU.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from retemper.bench import peers
from retemper.bench.case import Case, Check, Contender, PlannedCase, Request, Work
from retemper.kernels import augment, augment_reference, num_views
from retemper.loaders import Split, ViewSpace, convert, ffcv_problem, make_loader, split_of_arrays
from retemper.loaders.ffcv_library import ffcv_module

PADDING, SIDE = 4, 32
CHECKED = 16  # images of a batch: each is compared with every view there is of it
WORKERS = 2

Batch = tuple[Tensor, Tensor]  # (B, C, H, W) float32 on the device; (B,) positions of the images
Epoch = Callable[[], Iterable[Batch]]


def cases(request: Request) -> Iterator[PlannedCase]:
    """Yield the one case of this benchmark."""
    (batch,) = request.batches((128,), 64)
    images = 512 if request.quick else 50_000 if request.on_gpu else 10_000
    title = f"{images:,} images of {SIDE}x{SIDE}x3 batch {batch}"
    yield PlannedCase(title, partial(_case, title, request, images, batch))


def _case(title: str, request: Request, images: int, batch: int) -> Case:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (images, SIDE, SIDE, 3), dtype=np.uint8)
    split = split_of_arrays("random", "train", pixels, np.arange(images) % 10, tuple("0123456789"), "random")
    folder = TemporaryDirectory(prefix="retemper-bench-")
    beton = Path(folder.name) / "random.beton"
    no_ffcv = ffcv_problem()
    if not no_ffcv:
        convert(split, beton, progress=False)
    slow = "left out by --quick: it compiles for 10 s" if request.quick else None
    no_torchvision = peers.missing("torchvision", "PIL")
    first: list[Batch] = []  # of the resident backend, for the other to agree with

    def valid(result: list[Batch]) -> str | None:
        return wrong_views(result, pixels)

    def agrees(result: list[Batch]) -> str | None:
        first.extend([] if first else result)
        pairs = ((a, b) for old, new in zip(first, result, strict=True) for a, b in zip(old, new, strict=True))
        same = all(torch.equal(a, b) for a, b in pairs)
        return valid(result) if same else "its batches are not those of the resident backend"

    def ours(kind: str, reason: str | None) -> Contender:
        make = partial(our_epoch, kind, split, batch, request.device, beton)
        return contender(f"retemper, {kind}", reason, make, agrees, "bitwise")

    def torchvision(workers: int) -> Contender:
        make = partial(torchvision_epoch, pixels, batch, request.device, workers)
        return contender(f"torchvision, {workers} workers", no_torchvision, make, valid)

    ffcv = partial(ffcv_epoch, beton, batch, request.device)
    contenders = [
        ours("resident", None),
        ours("ffcv", no_ffcv),
        contender("FFCV's own operations", slow or no_ffcv, ffcv, valid),
        torchvision(WORKERS),
        torchvision(0),
    ]
    rounds = max(3, request.rounds // 4)  # of whole epochs
    work = Work(images=images)
    return Case(name=title, contenders=contenders, work=work, rounds=rounds, warm_up=1, close=folder.cleanup)


def contender(
    name: str, reason: str | None, make: Callable[[], Epoch], check: Check, exactness: str = "peer"
) -> Contender:
    """Return the contender whose call is a whole epoch; the first call makes the loader and returns its batches."""
    made: list[Epoch] = []

    def call() -> list[Batch]:
        if not made:
            made.append(make())
            return [(image.clone(), index.clone()) for image, index in made[0]()]
        for _ in made[0]():
            pass
        return []

    return Contender(name=name, call=None if reason else call, reason=reason, check=check, exactness=exactness)


def wrong_views(batches: list[Batch], pixels: np.ndarray) -> str | None:
    """Return why these are not the images of an epoch, each in one of its views, or None; some images are looked at.

    Args:
        pixels: (N, H, W, 3) uint8, the images as they are.
    """
    seen = torch.cat([index.cpu() for _, index in batches])
    if not torch.equal(seen.sort().values, torch.arange(len(pixels))):
        return f"it gives {len(seen):,} images, {len(seen.unique()):,} different ones, of {len(pixels):,}"
    view = torch.arange(num_views(PADDING))
    for image, index in batches[:4]:
        for got, position in zip(image[:CHECKED].cpu(), index[:CHECKED].tolist(), strict=True):
            source = torch.from_numpy(pixels[position : position + 1])
            views = augment_reference(source.expand(len(view), -1, -1, -1).contiguous(), view, padding=PADDING)
            if float((views - got).abs().flatten(1).amax(1).min()) > 1e-6:
                return f"image {position} is no crop of its own"
    return None


def our_epoch(kind: Any, split: Split, batch: int, device: torch.device, beton: Path) -> Epoch:
    """Return a function that gives the same epoch each time, by our loader; `beton` is read by "ffcv" alone."""
    path = beton if kind == "ffcv" else None
    views = ViewSpace(PADDING)
    loader = make_loader(kind, split, batch_size=batch, seed=0, views=views, device=device, beton=path)

    def epoch() -> Iterator[Batch]:
        for given in loader.epoch(1):
            yield augment(given.image, given.view, padding=PADDING), given.index

    return epoch


def ffcv_epoch(beton: Path, batch: int, device: torch.device) -> Epoch:
    """Return a function that gives epochs of FFCV's own CIFAR pipeline up to the pixels, with positions for labels."""
    loaders, transforms, decoders = (ffcv_module(name) for name in ("loader.loader", "transforms", "fields.decoders"))
    image = [
        decoders.NDArrayDecoder(),
        transforms.RandomHorizontalFlip(),
        transforms.RandomTranslate(padding=PADDING),
        transforms.ToTensor(),
        transforms.ToDevice(device, non_blocking=True),
        transforms.ToTorchImage(),
    ]
    index = [decoders.IntDecoder(), transforms.ToTensor(), transforms.Squeeze(1), transforms.ToDevice(device)]
    loader = loaders.Loader(
        str(beton),
        batch_size=batch,
        num_workers=min(WORKERS, os.cpu_count() or 1),
        order=loaders.OrderOption.RANDOM,
        drop_last=False,
        seed=0,
        os_cache=True,
        pipelines={"image": image, "label": None, "index": index},
    )
    return lambda: ((image_BCHW.float().div_(255), index_B) for image_BCHW, index_B in loader)


class Images(Dataset[tuple[Tensor, int]]):
    """Images as torchvision's CIFAR10 gives them: an array, Pillow, transforms; a position in place of the label."""

    def __init__(self, pixels: np.ndarray, transform: Callable[[Any], Tensor]) -> None:
        self.pixels, self.transform = pixels, transform

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from PIL import Image

        return self.transform(Image.fromarray(self.pixels[index])), index


def torchvision_epoch(pixels: np.ndarray, batch: int, device: torch.device, workers: int) -> Epoch:
    """Return a function that gives epochs of torchvision's transforms in a DataLoader, as most scripts have them."""
    transforms = peers.library("torchvision.transforms")
    steps = [transforms.RandomCrop(SIDE, padding=PADDING), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
    loader = DataLoader(
        Images(pixels, transforms.Compose(steps)),
        batch_size=batch,
        shuffle=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=device.type == "cuda",
    )
    return lambda: ((image_BCHW.to(device, non_blocking=True), index_B) for image_BCHW, index_B in loader)
