"""An epoch of random 32 x 32 images: padded by 4, cropped at random, flipped, as float pixels in [0, 1] on the device.

Ours, from both backends, beside FFCV with its own random operations, and torchvision's transforms in a DataLoader. All
give batches of the same images. The two of ours must agree to the bit; what the others give must be a crop of the right
image, mirrored or not. A library's loader is used at its best: persistent workers, pinned memory on a GPU.
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

from retemper.engine.bench import peers
from retemper.engine.bench.machine import Work
from retemper.engine.bench.plan import Plan, Request
from retemper.engine.bench.timing import Contestant, Race
from retemper.kernels import augment, augment_reference, num_views
from retemper.loaders import Split, ViewSpace, convert, ffcv_problem, make_loader, split_of_arrays
from retemper.loaders.ffcv_library import ffcv_module

PADDING, SIDE = 4, 32
CHECKED = 16  # images of a batch: each is compared with every view there is of it
WORKERS = 2

Batch = tuple[Tensor, Tensor]  # (B, C, H, W) float32 on the device; (B,) positions of the images
Epoch = Callable[[], Iterable[Batch]]


def plan(request: Request) -> Iterator[Plan]:
    """One race."""
    (batch,) = request.batches((128,), 64)
    images = 512 if request.quick else 50_000 if request.on_gpu else 10_000
    title = f"{images:,} images of {SIDE}x{SIDE}x3 batch {batch}"
    yield Plan(title, partial(race, title, request, images, batch))


def race(title: str, request: Request, images: int, batch: int) -> Race:
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

    def ours(kind: str) -> Callable[[], Epoch]:
        return lambda: our_epoch(kind, split, batch, request.device, beton)

    def valid(result: list[Batch]) -> str | None:
        return wrong_views(result, pixels)

    def agrees(result: list[Batch]) -> str | None:
        if not first:
            first.extend(result)
        same = all(
            torch.equal(a, b) for old, new in zip(first, result, strict=True) for a, b in zip(old, new, strict=True)
        )
        return wrong_views(result, pixels) if same else "its batches are not those of the resident backend"

    contestants = [
        contestant("retemper, resident", None, ours("resident"), agrees, "bitwise"),
        contestant("retemper, ffcv", no_ffcv, ours("ffcv"), agrees, "bitwise"),
        contestant("FFCV's own operations", slow or no_ffcv, lambda: ffcv_epoch(beton, batch, request.device), valid),
    ]
    for workers in (WORKERS, 0):
        name = f"torchvision, {workers} workers"
        make = partial(torchvision_epoch, pixels, batch, request.device, workers)
        contestants.append(contestant(name, no_torchvision, make, valid))
    rounds = max(3, request.rounds // 4)  # of whole epochs
    work = Work(images=images)
    return Race(name=title, contestants=contestants, work=work, rounds=rounds, warm_up=1, close=folder.cleanup)


def contestant(
    name: str,
    reason: str | None,
    make: Callable[[], Epoch],
    check: Callable[[Any], str | None],
    exactness: str = "peer",
) -> Contestant:
    """Runs an epoch to its end. The loader is made in the first call, which keeps some batches for the check."""
    made: list[Epoch] = []

    def run() -> list[Batch]:
        if not made:
            made.append(make())
            return [(image.clone(), index.clone()) for image, index in made[0]()]
        for _ in made[0]():
            pass
        return []

    return Contestant(name=name, run=None if reason else run, reason=reason, check=check, exactness=exactness)


def wrong_views(batches: list[Batch], pixels: np.ndarray) -> str | None:
    """Why these are not the images of an epoch, each in one of its views; the first of every batch are looked at."""
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
    loader = make_loader(
        kind,
        split,
        batch_size=batch,
        seed=0,
        views=ViewSpace(PADDING),
        device=device,
        beton=beton if kind == "ffcv" else None,
    )

    def epoch() -> Iterator[Batch]:
        for given in loader.epoch(1):
            yield augment(given.image, given.view, padding=PADDING), given.index

    return epoch


def ffcv_epoch(beton: Path, batch: int, device: torch.device) -> Epoch:
    """The pipeline of FFCV's own CIFAR example, up to the pixels; labels are left out, positions kept."""
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

    def epoch() -> Iterator[Batch]:
        for image_BCHW, index_B in loader:
            yield image_BCHW.float().div_(255), index_B

    return epoch


class Images(Dataset[tuple[Tensor, int]]):
    """As torchvision's CIFAR10: an array, a Pillow image each, transforms; the position in place of the label."""

    def __init__(self, pixels: np.ndarray, transform: Callable[[Any], Tensor]) -> None:
        self.pixels, self.transform = pixels, transform

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from PIL import Image

        return self.transform(Image.fromarray(self.pixels[index])), index


def torchvision_epoch(pixels: np.ndarray, batch: int, device: torch.device, workers: int) -> Epoch:
    """What most training scripts do."""
    transforms = peers.torchvision_transforms()
    steps = [transforms.RandomCrop(SIDE, padding=PADDING), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
    loader = DataLoader(
        Images(pixels, transforms.Compose(steps)),
        batch_size=batch,
        shuffle=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=device.type == "cuda",
    )

    def epoch() -> Iterator[Batch]:
        for image_BCHW, index_B in loader:
            yield image_BCHW.to(device, non_blocking=True), index_B

    return epoch
