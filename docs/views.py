"""The picture of docs/kernels/strong_augment.md: images of digits and of Fashion-MNIST in the views of each policy.

    python docs/views.py             rewrite docs/images/views.png
    python docs/views.py ROOT        with the files of Fashion-MNIST in ROOT

A row has one image: as it is, then three views of each policy, and three crops with a cutout.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from retemper.kernels import strong_augment
from retemper.loaders import ViewSpace, load_split

PICTURE = Path(__file__).parent / "images/views.png"
COLUMNS = (("crop", 0), ("cropshift", 0), ("idbh-weak", 0), ("idbh-strong", 0), ("crop", 2))  # and eighths cut out
ROWS, EACH, CELL, GAP = 3, 3, 56, 4  # of each data set; views of a policy; pixels


def views_of(dataset: str, root: Path | None) -> np.ndarray:
    """Return a row of views for each of the first images of the data set, (ROWS, 1 + views, CELL, CELL) uint8."""
    split = load_split(dataset, "train", root)
    image, side = torch.from_numpy(split.images[:ROWS].copy()), split.shape[0]
    columns = [strong_augment(image, torch.full((ROWS,), -1))]
    for policy, eighths in COLUMNS:
        how = {"policy": policy, "padding": side // 8, "cutout": eighths * side // 8}
        for epoch in range(EACH):
            view = torch.from_numpy(ViewSpace(strong=True).draw(ROWS, seed=0, epoch=epoch))
            columns.append(strong_augment(image, view, **how))
    byte = (torch.stack(columns, 1)[:, :, 0] * 255).round().to(torch.uint8)
    return byte.repeat_interleave(CELL // side, 2).repeat_interleave(CELL // side, 3).numpy()


def main(root: Path | None) -> None:
    rows = np.concatenate([views_of("digits", root), views_of("fashion-mnist", root)])
    width = CELL + GAP
    page = np.full((len(rows) * width + GAP, rows.shape[1] * width + (len(COLUMNS) + 1) * GAP), 255, np.uint8)
    for y, row in enumerate(rows):
        for x, view in enumerate(row):
            left = x * width + GAP * (1 + (x + EACH - 1) // EACH)
            page[y * width + GAP :, left:][:CELL, :CELL] = view
    Image.fromarray(page).quantize(16).save(PICTURE, optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
