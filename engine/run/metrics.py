"""The epochs of metrics.jsonl as scalars for TensorBoard, an optional extra: `retemper train ... --tensorboard`.

What is shown is that file, whatever was shown before: a run that goes on writes its earlier epochs anew, and what an
earlier process wrote of them is purged.
"""

import json
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

from retemper.engine.run.run_folder import RunFolder
from retemper.errors import UsageError


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
        """Show one more epoch, `line` as in metrics.jsonl; the first time, all that the file holds."""
        lines = [line] if self.begun else map(json.loads, self.metrics.read_text().splitlines())
        for line in lines:
            for name, value in scalars(line, self.classes):
                self.writer.add_scalar(name, value, line["epoch"])
        self.writer.flush()
        self.begun = True


def scalars(line: dict[str, Any], classes: Sequence[str]) -> Iterator[tuple[str, float]]:
    """The numbers of an epoch by name: `loss`, `holdout/average`, `temperature_adv/cat`."""
    for name, value in line.items():
        if isinstance(value, dict):
            yield from ((f"{name}/{inner}", number) for inner, number in scalars(value, classes))
        elif isinstance(value, list):
            of = [name.replace("/", "-") for name in classes] if len(value) == len(classes) else range(len(value))
            each = {f"{name}/{one}": number for one, number in zip(of, value, strict=True)}
            yield from scalars({name: value[0]} if len(value) == 1 else each, classes)
        elif isinstance(value, int | float) and name != "epoch":
            yield name, value
