"""How many images a second are decoded at 224 pixels: JPEG files of a folder, and an FFCV file of JPEG copies.

    python benchmarks/decode.py --json benchmarks/results/decode_2core_cpu.json

The images are pieces of the two photographs that scikit-learn brings, 500 x 375 as ImageNet's are on average. Each rate
is that of the best of some rounds, in which all take turns; a worker is a thread. An epoch of ImageNet is modelled:
1,281,167 images at the rate of one core, on as many as are named.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

from retemper.files import write_json
from retemper.loaders import Split, convert, load_split
from retemper.loaders.ffcv_library import ffcv_module
from retemper.provenance import versions

SIDES, QUALITY, BATCH = (224, 256), 90, 64
IMAGENET, MODELLED = 1_281_167, (8, 16, 64)


class Rate(NamedTuple):
    """Images a second: of the clock, and of one core's time, which other programs on the machine take nothing from."""

    per_s: float
    per_core_s: float


def make_folder(root: Path, number: int) -> None:
    """Write so many pieces of photographs as JPEG files, in one class folder."""
    photographs, generator = load_sample_images()["images"], np.random.default_rng(0)
    (root / "train" / "0").mkdir(parents=True)
    for i in range(number):
        photograph = photographs[i % len(photographs)]
        top, left = (
            int(generator.integers(0, side - part + 1)) for side, part in zip((427, 640), (375, 500), strict=True)
        )
        piece = photograph[top : top + 375, left : left + 500]
        Image.fromarray(np.ascontiguousarray(piece[:, :: 1 - 2 * int(generator.integers(2))])).save(
            root / "train" / "0" / f"{i}.jpg", quality=QUALITY
        )


def of_folder(split: Split) -> Callable[[], int]:
    """Return what decodes and resizes every image of a folder, one after the other, in one thread."""
    read, parts = split.read_some, np.array_split(np.arange(len(split)), -(-len(split) // BATCH))
    assert read is not None
    return lambda: sum(len(read(part)) for part in parts)


def of_ffcv(path: Path, workers: int) -> Callable[[], int]:
    """Return what decodes every image of an FFCV file."""
    module = ffcv_module("loader.loader")
    order = module.OrderOption.SEQUENTIAL
    loader = module.Loader(str(path), batch_size=BATCH, num_workers=workers, os_cache=True, order=order, seed=0)
    return lambda: sum(len(batch[0]) for batch in loader)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=512, help="how many images (512)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count (5)")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    words = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root, work, sizes = Path(folder), {}, {}
        make_folder(root, words.images)
        for side in SIDES:
            split, file = load_split("folder", "train", root, side), root / f"{side}.beton"
            convert(split, file, progress=False, jpeg_quality=QUALITY)
            work[f"folder, {side} px"] = of_folder(split)
            work |= {f"ffcv, {side} px, {n} worker{'s' * (n > 1)}": of_ffcv(file, n) for n in (1, 2)}
            sizes[side] = file.stat().st_size / words.images
        found = {name: Rate(0.0, 0.0) for name in work}
        for number in range(words.rounds + 1):  # the first compiles
            for name, decode in work.items():
                started, used = time.perf_counter(), time.process_time()
                images = decode()
                took = Rate(images / (time.perf_counter() - started), images / (time.process_time() - used))
                if number:
                    found[name] = Rate(*map(max, found[name], took))
    for name, rate in found.items():
        print(f"{name:26} {rate.per_s:7.0f} images/s {rate.per_core_s:7.0f} a second of one core")
    for side in SIDES:
        one = found[f"ffcv, {side} px, 1 worker"].per_core_s
        hours = ", ".join(f"{n} cores {IMAGENET / one / n / 60:.1f} min" for n in MODELLED)
        print(f"{side} px, {sizes[side] / 1e3:.0f} kB an image: an epoch of ImageNet as modelled: {hours}")
    if words.json:
        facts = {"quality": QUALITY, "images": words.images, "rounds": words.rounds, "bytes_per_image": sizes}
        write_json(
            words.json,
            {
                "cores": os.cpu_count(),
                "versions": versions(),
                **facts,
                "rates": {name: rate._asdict() for name, rate in found.items()},
            },
        )


if __name__ == "__main__":
    main()
