"""What a run says of an epoch: its line of metrics.jsonl, a line for the user, and TensorBoard.

TensorBoard is an optional extra (`retemper train ... --tensorboard`). It shows metrics.jsonl, whatever it showed
before: a run that goes on writes its earlier epochs anew, and what an earlier process wrote of them is purged.
"""

import math
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

from retemper.engine.recipe import Recipe
from retemper.engine.run.content import EpochLine
from retemper.engine.run.run_folder import RunFolder
from retemper.engine.state import State
from retemper.errors import UsageError
from retemper.files import finite, read_json_lines


def epoch_line(epoch: int, recipe: Recipe, state: State, images: int) -> dict[str, Any]:
    """Return the epoch's line of metrics.jsonl, but for how long it took.

    Its class state is the one that the epoch was trained under, its learning rate that of the step in the middle.

    Args:
        images: how many the epoch has.
    """
    steps = -(-images // recipe.optim.batch_size)
    line: dict[str, Any] = {
        "epoch": epoch,
        "loss": float(state.loss_sum) / images,
        "lr": recipe.optim.lr_at(epoch, (steps - 1) // 2, steps),
    }
    for name, sums in state.sums.items():
        if name not in (*state.forwards.before, "peer"):
            continue
        suffix = "" if name == "adv" else f"_{name}"
        for what, value_K in (("loss", sums.mean_loss_K), ("accuracy", sums.accuracy_K)):  # of no image: null
            line[f"class_{what}{suffix}"] = value_K.where(sums.count_K > 0, math.nan).tolist()
    return finite(line | {name: value.tolist() for name, value in state.class_state.items()})


def epoch_words(line: dict[str, Any], recipe: Recipe, classes: Sequence[str], is_best: bool) -> str:
    """Return the line that the user sees, from the epoch's line of metrics.jsonl."""
    words = f"epoch {line['epoch']}/{recipe.optim.epochs}  loss {line['loss']:.4f}  lr {line['lr']:g}"
    words += f"  {line['images_per_second']:.0f} img/s"
    if "holdout" in line:
        words += f"  {held_out_words(line['holdout'], recipe, classes)}"
        first, epochs = recipe.selection.select_from, recipe.optim.epochs
        words += "  best so far" * is_best
        words += f"  (no epoch is kept as the best before {min(first, epochs)})" * (line["epoch"] < min(first, epochs))
    if "guard" in line:
        seen = line["guard"]
        words += f"  {seen['attack']} {seen['own']:.1%}, ten steps {seen['pgd10']:.1%}"
    return words


def held_out_words(held: dict[str, Any], recipe: Recipe, classes: Sequence[str]) -> str:
    """Return the report on the images that choose the best epoch in words."""
    kind, worst = "robust" if recipe.selection.select_steps else "clean", classes[held["worst_class"]]
    where = "test" if recipe.selection.select_on == "test" else "held-out"
    clean = f", clean {held['clean_average']:.1%}" if "clean_average" in held else ""
    return f"{where} {kind} {held['average']:.1%}, worst {held['worst']:.1%} ({worst}){clean}"


class Board:
    """Writes RUN/tensorboard/.

    Raises:
        UsageError: the package is not installed.
    """

    def __init__(self, folder: RunFolder, classes: Sequence[str]) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter  # here, not above: it takes a second, and is an extra
        except ImportError:
            raise UsageError("--tensorboard needs a package: pip install 'retemper[tensorboard]'") from None
        self.metrics, self.classes, self.begun = folder.metrics, classes, False
        self.writer = SummaryWriter(str(folder.path / "tensorboard"), purge_step=1)
        weakref.finalize(self, self.writer.close)

    def write(self, line: dict[str, Any]) -> None:
        """Show one more epoch, `line` as metrics.jsonl is to hold it; the first time, all that the file has before."""
        earlier = [] if self.begun else read_json_lines(self.metrics, EpochLine)[0]
        for row in [*(row for row in earlier if row["epoch"] < line["epoch"]), line]:
            for name, value in scalars(row, self.classes):
                self.writer.add_scalar(name, value, row["epoch"])
        self.writer.flush()
        self.begun = True


def scalars(line: dict[str, Any], classes: Sequence[str]) -> Iterator[tuple[str, float]]:
    """Yield the numbers of an epoch by name: `loss`, `holdout/average`, `temperature_adv/cat`."""
    for name, value in line.items():
        if isinstance(value, dict):
            yield from ((f"{name}/{inner}", number) for inner, number in scalars(value, classes))
        elif isinstance(value, list):
            of = [name.replace("/", "-") for name in classes] if len(value) == len(classes) else range(len(value))
            each = {f"{name}/{one}": number for one, number in zip(of, value, strict=True)}
            yield from scalars({name: value[0]} if len(value) == 1 else each, classes)
        elif isinstance(value, int | float) and name != "epoch":
            yield name, value
