"""Images for a real run: CIFAR-10's binary files, made of JPEG copies in class folders, in many processes.

    python benchmarks/gpu_images.py SOURCE OUT

SOURCE is a folder or a tar archive of train/CLASS/*.jpg and test/CLASS/*.jpg.

OUT/cifar-10-batches-bin then reads as CIFAR-10 (`--data-root OUT`). JPEG copies differ a little from the original
pixels, so results on them are results on "CIFAR-10, JPEG copies". Files that are there already are not made again.
"""

import io
import sys
import tarfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES: list[str] = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
FILES = {"train": [f"data_batch_{i}.bin" for i in range(1, 6)], "test": ["test_batch.bin"]}
COUNTS = {"train": 50_000, "test": 10_000}


def main() -> None:
    source, out = Path(sys.argv[1]), Path(sys.argv[2]) / "cifar-10-batches-bin"
    if (out / "batches.meta.txt").is_file():
        return print(f"{out} is there already")
    records: dict[str, list[bytes]] = {"train": [], "test": []}
    try:
        with ProcessPoolExecutor() as pool:
            for split, record in pool.map(record_of, jpegs(source), chunksize=500):
                records[split].append(record)
    except (OSError, ValueError, tarfile.TarError) as error:
        why = str(error).splitlines()[0].rstrip(":")
        sys.exit(f"{source} cannot be read as images in class folders: {why}")
    out.mkdir(parents=True, exist_ok=True)
    for split, files in FILES.items():
        if len(records[split]) != COUNTS[split]:
            sys.exit(f"{source} holds {len(records[split]):,} {split} images in class folders, not {COUNTS[split]:,}")
        shuffled = np.random.default_rng(0).permutation(COUNTS[split])
        for file, rows in zip(files, np.split(shuffled, len(files)), strict=True):
            (out / file).write_bytes(b"".join(records[split][row] for row in rows))
    (out / "batches.meta.txt").write_text("\n".join([*CLASSES, ""]))
    print(f"{out}: CIFAR-10, JPEG copies")


def jpegs(source: Path) -> Iterator[tuple[str, bytes]]:
    """Yield each image's split/class/name and its file's bytes."""
    if source.is_dir():
        for path in sorted(source.glob("t*/*/*.jpg")):
            yield str(path.relative_to(source)), path.read_bytes()
        return
    with tarfile.open(source) as archive:
        for member in archive:
            file = archive.extractfile(member) if member.name.endswith(".jpg") else None
            if file is not None:
                yield member.name.removeprefix("./"), file.read()


def record_of(named: tuple[str, bytes]) -> tuple[str, bytes]:
    """Return the split of an image and its record: the label, then planes of red, green and blue."""
    (split, label, _), data = named[0].split("/"), named[1]
    try:
        pixels = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    except OSError as error:
        raise ValueError(f"{named[0]} is no image, or cut off") from error
    if pixels.shape != (32, 32, 3):
        raise ValueError(f"{named[0]} is {pixels.shape[1]} x {pixels.shape[0]} pixels, not 32 x 32")
    return split, bytes([CLASSES.index(label)]) + pixels.transpose(2, 0, 1).tobytes()


if __name__ == "__main__":
    main()
