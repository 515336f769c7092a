"""What FGSM-PGI keeps of each image: its perturbation and the momentum of its gradients (Jia et al., ECCV 2022).

    start     x + d                        x' = clip(P(start + eps sign(g))),   g = grad objective(student(start))
    m <- decay m + g / ||g||_1             d <- clip(P(start + eps sign(m))) - x

P projects to the eps ball around x, and clip to valid pixels. `x'` is what the student learns from, and d what the
image begins from an epoch later. Every `reset` epochs d is eps times random signs, and m is 0.

Both lie in the frame of the padded, unmirrored image: an image is cropped and mirrored anew in each epoch, and a pixel
finds its own values again, wherever it is seen. (The authors' code adds d to whatever crop comes next.) They are
rounded to float16: a perturbation by at most eps / 2048, and the momentum, of which signs alone count, by as much of
itself.

Dimension key: N images of the data set, B batch, C channels, H, W, p padding.
"""

import math
import os
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from retemper.engine.distributed.ranks import Ranks
from retemper.errors import DataError
from retemper.kernels import random_start_

SCALE = 2.0**12  # of the stored momentum: its values, about 1 / pixels, are too small for float16
ROWS = 4096  # images at a time, where all are gone through
LATE = 4  # batches whose rows may still be on their way back to the disk


class Kept:
    """The perturbations and momenta of the images of a data set.

    They lie on the device, or in a file that is mapped into memory: then the rows of a batch alone are on the device.

    Args:
        images: how many, N.
        shape: (H, W, C) of an image.
        padding: p, in pixels.
        eps: the radius of the random signs, in pixel units.
        reset: the epochs after which everything begins anew.
        rows: the most images of a batch in this process.
        file: where the mapped file is made; None for the device. It is unlinked at once, so it goes with the process.
    Raises:
        DataError: there is no room for the file.
    Attributes:
        places: (N, H + 2p, W + 2p, C) float16 by name: "perturbation" and "momentum".
    """

    def __init__(
        self,
        images: int,
        shape: tuple[int, int, int],
        padding: int,
        *,
        eps: float,
        reset: int,
        rows: int,
        device: torch.device,
        file: Path | None = None,
    ) -> None:
        height, width, channels = shape
        self.height, self.width, self.padding, self.eps, self.reset = height, width, padding, eps, reset
        framed = (height + 2 * padding, width + 2 * padding, channels)
        self.places = {name: _place((images, *framed), device, file, name) for name in ("perturbation", "momentum")}
        self.written = torch.zeros(images, dtype=torch.bool, device="cpu" if file else device)  # since the last `merge`
        self.window, self.row = self.places, None
        if file is not None:
            self.window = {name: torch.zeros(rows, *framed, dtype=torch.float16, device=device) for name in self.places}
            self.row = torch.arange(rows, device=device)
        self.late: deque[tuple[np.ndarray, dict[str, Tensor], Any]] = deque()

    @property
    def on_disk(self) -> bool:
        """True where they lie in a file, and `begin_step` and `end_step` carry rows."""
        return self.row is not None

    def start_epoch(self, epoch: int, seed: int) -> None:
        """Begin anew where it is time, before `epoch`, from 1. The signs depend on the seed alone, on any device."""
        if (epoch - 1) % self.reset:
            return
        self.places["momentum"].zero_()
        place = self.places["perturbation"]
        number = torch.full((1,), seed, dtype=torch.int64, device=place.device)
        for first in range(0, len(place), ROWS):
            part = place[first : first + ROWS]
            noise = torch.zeros(part.shape, device=place.device)
            random_start_(noise, noise, 1.0, seed=number, clip=False, rows=(first, 1))
            part.copy_(noise.sign() * self.eps)

    def begin_step(self, index: np.ndarray) -> None:
        """Bring the rows of a batch to the device, where they lie in a file. index: (B,) int64 on the host."""
        if self.row is None:
            return
        self._store(LATE)
        for name, place in self.places.items():
            rows = place[torch.from_numpy(index)]
            on_gpu = self.row.is_cuda
            self.window[name][: len(index)].copy_(rows.pin_memory() if on_gpu else rows, non_blocking=on_gpu)

    def end_step(self, index: np.ndarray) -> None:
        """Send the rows of that batch back; the host does not wait for them."""
        if self.row is None:
            return
        on_gpu = self.row.is_cuda
        rows = {name: one[: len(index)].to("cpu", non_blocking=on_gpu, copy=True) for name, one in self.window.items()}
        done = torch.cuda.Event() if on_gpu else None
        if done is not None:
            done.record()
        self.late.append((index, rows, done))

    def _store(self, most: int = 0) -> None:
        """Write rows that have come back to the file, until at most so many batches are on their way."""
        while len(self.late) > most:
            index, rows, done = self.late.popleft()
            if done is not None:
                done.synchronize()
            for name, place in self.places.items():
                place[torch.from_numpy(index)] = rows[name]
            self.written[torch.from_numpy(index)] = True

    def read(self, clean_BCHW: Tensor, index_B: Tensor, view_B: Tensor) -> tuple[Tensor, Tensor]:
        """Return the perturbation and the momentum of the pixels that are seen, each like `clean_BCHW`.

        Args:
            clean_BCHW: the images as they are seen.
            index_B, view_B: (B,) int64, their positions in the data set, and their views (`loaders/views.py`).
        """
        at = self._at(index_B, view_B)
        found = (torch.empty_like(clean_BCHW).copy_(one[at].permute(0, 3, 1, 2)) for one in self.window.values())
        perturbation, momentum = found
        return perturbation, momentum.div_(SCALE)

    def write(self, index_B: Tensor, view_B: Tensor, perturbation: Tensor, momentum: Tensor) -> None:
        """Keep what `read` is to return of these pixels; arguments as there."""
        at = self._at(index_B, view_B)
        for one, value in zip(self.window.values(), (perturbation, momentum * SCALE), strict=True):
            one[at] = value.permute(0, 2, 3, 1).to(one.dtype)
        if self.row is None:
            self.written.index_fill_(0, index_B, True)

    def _at(self, index_B: Tensor, view_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return which row, line and column of `window` each pixel is, to be broadcast to (B, H, W)."""
        side = 2 * self.padding + 1
        down_B, along_B = view_B // 2 // side, view_B // 2 % side
        line, column = (torch.arange(size, device=view_B.device) for size in (self.height, self.width))
        across_BW = torch.where((view_B % 2 == 1)[:, None], self.width - 1 - column, column) + along_B[:, None]
        row_B = index_B if self.row is None else self.row[: len(index_B)]
        return row_B[:, None, None], (line + down_B[:, None])[:, :, None], across_BW[:, None, :]

    def merge(self, ranks: Ranks) -> None:
        """Bring what each process has written since the last time to all of them; no two wrote of one image."""
        self._store()
        if not ranks.joined:
            return
        mine, anyones = self.written, ranks.all_reduce_(self.written.to(torch.int32)) > 0
        for place in self.places.values():
            for first in range(0, len(place), ROWS):
                part = slice(first, first + ROWS)
                own, any_own = (one[part, None, None, None] for one in (mine, anyones))
                total = ranks.all_reduce_(torch.where(own, place[part], 0.0))  # one value and zeros: exact
                place[part] = torch.where(any_own, total, place[part])
        self.written.zero_()

    def load(self, saved: dict[str, Tensor]) -> None:
        """Go on from saved places, in place."""
        for name, place in self.places.items():
            place.copy_(saved[name])


def _place(shape: tuple[int, ...], device: torch.device, file: Path | None, name: str) -> Tensor:
    if file is None:
        return torch.zeros(shape, dtype=torch.float16, device=device)
    path, size = file.with_name(f"{file.name}.{name}"), math.prod(shape)
    try:
        with path.open("wb") as made:
            os.posix_fallocate(made.fileno(), 0, 2 * size)  # or a disk that fills up would kill the process later
        return torch.from_file(str(path), shared=True, size=size, dtype=torch.float16).view(shape)
    except OSError as error:
        needed = f"{2 * size / 2**30:.1f} GiB for each image's {name}"
        raise DataError(
            f"cannot make {path} ({error.strerror or error}): {needed}; --kept device needs no file"
        ) from None
    finally:
        path.unlink(missing_ok=True)
