"""What the teacher says of the clean images, asked for several batches at once, ahead of the steps that need it."""

from collections.abc import Iterator
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from retemper.engine.teacher_table import Ask, TeacherTable
from retemper.loaders import Batch


class TeacherLogits:
    """Hands out an epoch's batches with the teacher's logits, asking it only for what is not known.

    Args:
        ask: (image (N, H, W, C) uint8, view (B,), index (B,)) to (B, K) logits.
        ahead: how many batches are collected before the teacher is asked for what they miss.
        rows: the teacher sees a multiple of so many images, padded, so that few shapes occur.
        at_once: at most so many images in one forward, a multiple of `rows`.
        table: where answers are kept; None keeps none.
    """

    def __init__(
        self,
        ask: Ask,
        num_classes: int,
        device: torch.device,
        *,
        ahead: int,
        rows: int,
        at_once: int,
        table: TeacherTable | None = None,
    ) -> None:
        self.ask, self.num_classes, self.device = ask, num_classes, device
        self.ahead, self.rows, self.at_once, self.table = ahead, rows, at_once, table
        self.known_share = 0.0  # of the newest epoch

    def epoch(self, batches: Iterator[Batch], index: np.ndarray, view: np.ndarray) -> Iterator[tuple[Batch, Tensor]]:
        """Each batch with (B, K) float32 logits.

        Args:
            index, view: (M,) int64 on the host, what the batches hold, in their order.
        """
        logits_MK = torch.empty(len(index), self.num_classes, device=self.device)
        missing = np.arange(len(index))
        if self.table is not None:
            known, found = self.table.look_up(index, view)
            logits_MK.copy_(torch.from_numpy(found))
            missing = missing[~known]
        self.known_share = 1 - len(missing) / max(1, len(index))
        on_missing = torch.from_numpy(missing).to(self.device)
        row = 0
        while group := list(islice(batches, self.ahead)):
            end = row + sum(len(batch.label) for batch in group)
            first, last = np.searchsorted(missing, (row, end))
            self._fill(group, row, on_missing[first:last], logits_MK)
            for batch in group:
                yield batch, logits_MK[row : row + len(batch.label)]
                row += len(batch.label)
        if self.table is not None and len(missing):
            self.table.keep(index[missing], view[missing], logits_MK[on_missing].cpu().numpy())

    def _fill(self, group: list[Batch], row: int, missing: Tensor, logits_MK: Tensor) -> None:
        """Ask for the rows `missing` of `logits_MK`; the first image of `group` is row `row`."""
        if not len(missing):
            return
        image, view = torch.cat([batch.image for batch in group]), torch.cat([batch.view for batch in group])
        for part in missing.split(self.at_once):
            at = part - row
            padded = torch.cat([at, at[-1:].expand(-len(at) % self.rows)])
            logits_BK = self.ask(image, view.index_select(0, padded), padded)
            logits_MK.index_copy_(0, part, logits_BK[: len(at)].float())
