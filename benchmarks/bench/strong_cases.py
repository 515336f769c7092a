"""The cases of strong_augment, beside the transforms on PIL images that it stands for, one image after the other.

Pillow is given what each view draws, and so is measured without the draws. It makes the same bytes.
"""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from retemper.bench.case import Case, Check, Contender, Work, equal_to
from retemper.bench.kernel_cases import CHECKED, OURS, KernelSize, bytes_of
from retemper.bench.peers import library, missing
from retemper.kernels import strong_augment, strong_augment_reference
from retemper.kernels.view_draws import view_draws

PILLOW = "Pillow, image by image"
Drawn = dict[str, Any]  # what one view draws, by name


def strong_case(size: KernelSize) -> Case:
    """Return the case of strong views of bytes; the form is the policy."""
    image = torch.randint(256, (size.batch, size.side, size.side, 3), dtype=torch.uint8)
    view = torch.randint(2**62, (size.batch,))
    here, seen = image.to(size.device), view.to(size.device)
    expected = strong_augment_reference(image[:CHECKED], view[:CHECKED], policy=size.form, dtype=size.dtype)
    check: Check = equal_to(expected, lambda result: result[:CHECKED])
    ours = Contender(
        name=OURS,
        call=lambda: strong_augment(here, seen, policy=size.form, dtype=size.dtype),
        exactness="bitwise",
        check=check,
    )
    pillow = Contender(name=PILLOW, reason=reason) if (reason := missing("PIL")) else _pillow(size, image, view, check)
    work = Work(bytes=image.numel() * (1 + size.dtype.itemsize) + bytes_of(view))
    about: dict[str, Any] = {"work": work, "precision": size.precision, "own_time": True}
    return Case(name=size.title, contenders=[ours, pillow], **about)


def _pillow(size: KernelSize, image: Tensor, view: Tensor, check: Check) -> Contender:
    """Return Pillow, which makes each view by itself."""
    drawn = view_draws(view, size.side, size.side, size.form)._asdict()
    rows = [dict(zip(drawn, row, strict=True)) for row in zip(*(part.tolist() for part in drawn.values()), strict=True)]

    def call() -> Tensor:
        views = [pillow_view(one, row) for one, row in zip(image.numpy(), rows, strict=True)]
        made = torch.from_numpy(np.stack(views)).to(size.device)
        return made.permute(0, 3, 1, 2).float().div_(255).to(size.dtype)

    return Contender(name=PILLOW, call=call, check=check)


def pillow_view(image: np.ndarray, drawn: Drawn) -> np.ndarray:
    """Return a view of one (H, W, 3) image, uint8, by Pillow's operations."""
    pil = library("PIL.Image")
    seen, (height, width) = pil.fromarray(image), image.shape[:2]
    if drawn["flip"]:
        seen = seen.transpose(pil.Transpose.FLIP_LEFT_RIGHT)
    x, y, left, top = (drawn[name] for name in ("shift_x", "shift_y", "left", "top"))
    kept = seen.crop((left + x, top + y, drawn["right"] + x, drawn["bottom"] + y))
    seen = pil.new("RGB", (width, height))
    seen.paste(kept, (left, top))
    made = np.array(_operated(seen, drawn))
    y, x = drawn["erase_y"], drawn["erase_x"]
    made[y : y + drawn["erase_height"], x : x + drawn["erase_width"]] = 0
    return made


def _operated(seen: Any, drawn: Drawn) -> Any:
    """Return the PIL image after the operation that is drawn."""
    pil, enhance, ops = (library(f"PIL.{name}") for name in ("Image", "ImageEnhance", "ImageOps"))
    operation, (width, height) = drawn["operation"], seen.size
    if operation < 4:
        kind = (enhance.Color, enhance.Brightness, enhance.Contrast, enhance.Sharpness)[operation]
        return kind(seen).enhance(drawn["strength"])
    if operation < 6:
        return (ops.autocontrast if operation == 4 else ops.equalize)(seen)
    along, down = drawn["x_by_y"] / 2**32, drawn["y_by_x"] / 2**32
    if operation == 7:
        return seen.rotate(round(math.degrees(math.asin(down))))
    if operation == 6:
        sheared = [1, along, -along * height / 2, down, 1, -down * width / 2]
        return seen.transform(seen.size, pil.Transform.AFFINE, sheared, pil.Resampling.NEAREST)
    return seen
