"""The checks before the first attack: what would stop an evaluation in its middle stops it before its beginning."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from retemper.engine.device import exact_fp32, is_out_of_memory
from retemper.engine.losses import cross_entropy_rows
from retemper.engine.sanity.gradients import margin_rows
from retemper.errors import DataError, UsageError

BYTES_AN_IMAGE = 400  # more than evaluation.csv and the ledger write of one
BYTES = 1 << 20  # more than evaluation.json holds


def require_room(folder: Path, images: int, paths: Sequence[Path]) -> None:
    """Check that the files of an evaluation can be written.

    Args:
        folder: is made if it does not exist.
        images: how many are evaluated.
        paths: the files.
    Raises:
        UsageError: the folder cannot be made or written to, its disk is full, or a folder has the name of a file.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(BYTES + BYTES_AN_IMAGE * images))
            file.flush()
    except OSError as error:
        raise UsageError(f"cannot write to {folder} ({error.strerror}): name another folder with --out") from None
    for path in paths:
        if path.is_dir():
            raise UsageError(f"{path} is a folder: move it away, or name another folder with --out")


def zero_gradients(name: str, model: nn.Module, image: Tensor, label_B: Tensor) -> dict[str, float]:
    """Try a network and its gradients on a few images, as the attacks use them.

    Args:
        name: of the network, for messages.
        image, label_B: (B, C, H, W) pixels, (B,) int64.
    Returns:
        By loss, "cross-entropy" and "margin", the share of images whose gradient is zero: there no attack can move.
    Raises:
        DataError: the network raises an error, or no gradient reaches its input.
    """
    losses = {"cross-entropy": cross_entropy_rows, "margin": margin_rows}
    found = {}
    with exact_fp32(), torch.enable_grad():
        for loss, rows in losses.items():
            given = image.clone().requires_grad_(True)
            try:
                raised = rows(model(given), label_B).sum()
                (grad,) = torch.autograd.grad(raised, given)
            except Exception as error:  # the network's code may raise anything
                if is_out_of_memory(error):
                    raise
                why = (str(error).strip().splitlines() or [type(error).__name__])[0]
                raise DataError(
                    f"{name}: no gradient reaches its input ({why}): attacks need one; --attacks clean does not"
                ) from None
            found[loss] = float((grad.flatten(1) == 0).all(1).double().mean())
    return found


def gradient_flags(loss: str, zero: dict[str, float]) -> list[str]:
    """Return a warning for the result of an attack on `loss` where some of the probed gradients are zero."""
    if not zero.get(loss):
        return []
    return [
        f"{zero[loss]:.0%} of the probed images have a gradient of exactly zero: the attack cannot move; see --check"
    ]
