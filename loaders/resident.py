"""The backend that holds the whole split on the device: the fastest for sets that fit there (CIFAR-10: 154 MB)."""

from collections.abc import Iterator

import numpy as np
import torch

from retemper.loaders.loader import Batch, Loader, Plan, upload
from retemper.loaders.split import Split


class ResidentLoader(Loader):
    """A loader whose batch is a gather on the device: order and views go there once an epoch.

    Raises:
        DataError: the split's pixels cannot be read.
    """

    def __init__(self, split: Split, plan: Plan, device: torch.device, reason: str) -> None:
        super().__init__(plan, len(split), device, f"loader: resident on {device} ({reason})")
        self._image = torch.from_numpy(split.images).to(device)
        self._label = torch.from_numpy(split.labels).to(device)

    def _fetch(self, index: np.ndarray, view: np.ndarray, batches: int) -> Iterator[Batch]:
        on_index, on_view = upload(index, self.device), upload(view, self.device)
        rows = self.plan.local_size
        for start in range(0, batches * rows, rows):
            at = on_index[start : start + rows]
            yield Batch(
                self._image.index_select(0, at), self._label.index_select(0, at), at, on_view[start : start + rows]
            )

    def close(self) -> None:
        self._image = self._label = torch.empty(0, device=self.device)
