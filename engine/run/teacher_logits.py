"""What the teacher says of the clean images, asked for several batches at once, ahead of the steps that need it."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from retemper.console import say
from retemper.engine.checkpoints.find import Source
from retemper.engine.recipe import Recipe
from retemper.engine.run.data import TrainingData
from retemper.engine.run.host_memory import HostMemory
from retemper.engine.run.teacher_table import AUTO_LIMIT, Ask, TeacherTable, table_bytes, table_folder
from retemper.engine.state import State, clean_images
from retemper.errors import UsageError
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
        # index, view and logits that are not in the table yet, and where those lie
        self.fresh: list[tuple[np.ndarray, np.ndarray, Tensor, HostMemory]] = []

    def epoch(self, batches: Iterator[Batch], index: np.ndarray, view: np.ndarray) -> Iterator[tuple[Batch, Tensor]]:
        """Yield each batch with (B, K) float32 logits.

        Args:
            index, view: (M,) int64 on the host, what the batches hold, in their order.
        """
        logits_MK = torch.empty(len(index), self.num_classes, device=self.device)
        missing = np.arange(len(index))
        if self.table is not None:
            real = np.flatnonzero(index >= 0)  # of a pool the table holds nothing
            known, found = self.table.look_up(index[real], view[real])
            logits_MK.index_copy_(0, torch.from_numpy(real).to(self.device), torch.from_numpy(found).to(self.device))
            missing = np.delete(missing, real[known])
        self.known_share = 1 - len(missing) / max(1, len(index))
        on_missing, row = torch.from_numpy(missing).to(self.device), 0
        while group := list(islice(batches, self.ahead)):
            self.keep(wait=False)  # while the device is busy
            end = row + sum(len(batch.label) for batch in group)
            asked = slice(*np.searchsorted(missing, (row, end)))
            if len(missing[asked]):
                self._fill(group, row, on_missing[asked], logits_MK)
                memory = HostMemory(self.device)
                answers = memory.copy({"logits": logits_MK[on_missing[asked]]})["logits"]
                self.fresh.append((index[missing[asked]], view[missing[asked]], answers, memory))
            for batch in group:
                yield batch, logits_MK[row : row + len(batch.label)]
                row += len(batch.label)
        self.keep()

    def keep(self, wait: bool = True) -> None:
        """Add what was asked for so far to the table, if there is one; the end of an epoch does so itself.

        Args:
            wait: for the device; what it has not answered yet is left for later otherwise.
        """
        while self.fresh and (wait or self.fresh[0][3].is_ready()):
            index, view, logits, memory = self.fresh.pop(0)
            memory.wait()
            if self.table is not None:
                real = index >= 0
                self.table.keep(index[real], view[real], logits.numpy()[real])

    def _fill(self, group: list[Batch], row: int, missing: Tensor, logits_MK: Tensor) -> None:
        """Ask for the rows `missing` of `logits_MK`; the first image of `group` is row `row`."""
        image, view = torch.cat([batch.image for batch in group]), torch.cat([batch.view for batch in group])
        for part in missing.split(self.at_once):
            at = part - row
            padded = torch.cat([at, at[-1:].expand(-len(at) % self.rows)])
            logits_BK = self.ask(image, view.index_select(0, padded), padded)
            logits_MK.index_copy_(0, part, logits_BK[: len(at)].float())


def teacher_logits(
    recipe: Recipe, state: State, data: TrainingData, source: Source | None, *, run: str, cache: Path
) -> TeacherLogits | None:
    """Return where the steps of a run get the teacher's logits; None where they ask it themselves, or there is none.

    Args:
        source: how config.json names the teacher.
        run: the run's name, for messages.
        cache: the folder that holds tables of answers.
    Raises:
        UsageError: a table is asked for, and cannot be made.
        DataError: the table there is damaged.
    """
    teacher, rows, ahead = state.teacher, data.loader.plan.local_size, recipe.execution.teacher_ahead
    if teacher is None or source is None or not ahead or "clean" not in recipe.method.shown_to_teacher():
        return None

    def ask(image: Tensor, view: Tensor, index: Tensor) -> Tensor:
        with torch.no_grad(), state.autocast():
            return teacher(clean_images(recipe, image, view, index))

    return TeacherLogits(
        ask,
        state.num_classes,
        state.device,
        ahead=ahead,
        rows=rows,
        # a GPU wants much at once; on a CPU one size makes a row's bits the same whatever else is asked with it
        at_once=rows * (ahead if state.device.type == "cuda" else 1),
        table=_table(recipe, state, data, source, ask, run, cache),
    )


def _table(
    recipe: Recipe, state: State, data: TrainingData, source: Source, ask: Ask, run: str, cache: Path
) -> TeacherTable | None:
    """Return the table of this teacher's answers, checked; None where none is wanted or the disk has no room."""
    execution, device, split = recipe.execution, state.device, data.split
    size = len(split), data.loader.plan.views.count, state.num_classes
    wanted = execution.teacher_table
    if recipe.data.strong:
        if wanted == "auto":
            say(f"{run}: the views change in every epoch: no table of the teacher's answers is kept, it is asked ahead")
        return None
    if wanted == "off" or (wanted == "auto" and table_bytes(*size) > AUTO_LIMIT):
        return None
    facts = {
        "teacher": source.get("tensors", source["sha256"]),
        "model": source["model"],
        "data": [recipe.data.dataset, split.fingerprint, recipe.data.image_size],
        "padding": recipe.data.padding,
        "computed": [str(state.precision), execution.fold, execution.epilogue_on(device), execution.channels_last],
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
    }
    if recipe.data.padding_mode != "zeros":  # what earlier versions, whose tables are still read, did not have
        facts["padding_mode"] = recipe.data.padding_mode
    earlier = facts | {"teacher": source["sha256"]}  # runs of earlier versions knew the teacher's file alone
    if table_folder(cache, *size, earlier).exists():
        facts = earlier
    try:
        table = TeacherTable(cache, *size, facts)
    except OSError as error:
        if wanted == "on":
            raise UsageError(f"no table of the teacher's answers in {cache}: {error}") from None
        say(f"{run}: no table of the teacher's answers in {cache} ({error})")
        return None
    exact = 2**-17 if device.type == "cpu" else 2**-12  # another batch size, another convolution
    table.check(data.loader, ask, exact if state.precision is torch.float32 else 2**-5)
    say(f"{run}: the teacher's answers are kept in {table.folder}, {table.known.mean():.1%} known so far")
    return table
