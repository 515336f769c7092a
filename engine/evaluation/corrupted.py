"""A network's accuracy on corrupted images, by corruption, severity and class: `retemper evaluate ... --corruptions`.

What is finished is kept: the accuracies are handed over after each corruption, and those that are known are taken over.

Dimension key: B batch, K classes, S severities.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from retemper.console import Progress
from retemper.engine.class_report import class_report
from retemper.engine.device import exact_fp32
from retemper.engine.distributed.ranks import ALONE, Ranks
from retemper.engine.evaluation.corruptions import CONSTANTS, CORRUPTIONS, SEVERITIES, corrupt
from retemper.engine.evaluation.evaluation_file import EvaluationFile
from retemper.engine.predict import predicted
from retemper.files import finite
from retemper.kernels import augment, identity_view
from retemper.loaders import Split


def add_corruptions(file: EvaluationFile, model: nn.Module, split: Split, order: np.ndarray, **options: Any) -> None:
    """Add the accuracies on corrupted images to an evaluation, and write it after each corruption.

    Args:
        model, split, order, options: as `corrupted_accuracies` takes them.
    """
    known = file.content.get("corruptions")
    for found in corrupted_accuracies(model, split, order, known=known, **options):
        file.content["corruptions"] = found
        if options.get("ranks", ALONE).is_first:
            file.write()


def corrupted_accuracies(
    model: nn.Module,
    split: Split,
    order: np.ndarray,
    *,
    device: torch.device,
    batch_size: int = 256,
    seed: int = 0,
    ranks: Ranks = ALONE,
    known: Mapping[str, Any] | None = None,
) -> Iterator[dict[str, Any]]:
    """Yield what evaluation.json holds of the corruptions, after each that is computed.

    Args:
        model: (B, C, H, W) float32 pixels in [0, 1] to (B, K) logits, on `device`; it is put into eval mode.
        order: (N,) int64, which images of `split`.
        seed: of the draws; each image has its own.
        ranks: the processes that take turns at the batches.
        known: what an earlier evaluation of the same images and weights held; the first process's counts.
    Yields:
        "accuracy" by corruption, S lists of K fractions, and the summaries of `summed_up`.
    """
    model.eval()
    count_K = np.bincount(split.labels[order], minlength=len(split.classes))
    about = {"constants": CONSTANTS, "seed": seed, "severities": list(SEVERITIES), "count": count_K.tolist()}
    accuracy = ranks.broadcast(_finished(known or {}, about))
    if len(accuracy) == len(CORRUPTIONS):
        yield summed_up(about, accuracy)
    with Progress("corruptions", len(order) * len(SEVERITIES) * (len(CORRUPTIONS) - len(accuracy))) as progress:
        for name in (name for name in CORRUPTIONS if name not in accuracy):
            rows = []
            for severity in SEVERITIES:
                correct_K = torch.zeros(len(split.classes), dtype=torch.int64, device=device)
                for first in range(ranks.rank * batch_size, len(order), ranks.world_size * batch_size):
                    index_B = order[first : first + batch_size]
                    right_B = _right(model, split, index_B, name, severity, seed, device)
                    label_B = torch.from_numpy(split.labels[index_B]).to(device)
                    correct_K += torch.bincount(label_B[right_B], minlength=len(correct_K))
                    progress.advance(min(len(index_B) * ranks.world_size, len(order) - first))
                correct_K = ranks.all_reduce_(correct_K.cpu())
                rows.append(class_report(correct_K, count_K).accuracy)
            accuracy = accuracy | {name: finite(rows)}
            yield summed_up(about, accuracy)


def _finished(known: Mapping[str, Any], about: Mapping[str, Any]) -> dict[str, Any]:
    """Return the accuracies that are known of the very same images; what is damaged is left out."""
    if any(known.get(name) != value for name, value in about.items()):
        return {}
    sizes = [len(about["count"])] * len(SEVERITIES)
    found = known.get("accuracy") or {}
    return {name: found[name] for name in CORRUPTIONS if [len(row) for row in found.get(name, ())] == sizes}


def _right(
    model: nn.Module, split: Split, index_B: np.ndarray, name: str, severity: int, seed: int, device: torch.device
) -> torch.Tensor:
    """Return which images of a batch are classified correctly when they are corrupted: (B,) bool on `device`."""
    image_BHWC = corrupt(split.seen(index_B), name, severity, index_B, seed)
    view_B = torch.full((len(index_B),), identity_view(0), device=device)
    image = augment(torch.from_numpy(image_BHWC).to(device), view_B, padding=0)
    with exact_fp32(), torch.no_grad():
        return predicted(model(image)) == torch.from_numpy(split.labels[index_B]).to(device)


def summed_up(about: Mapping[str, Any], accuracy: Mapping[str, list[list[float | None]]]) -> dict[str, Any]:
    """Return the entry of evaluation.json: `about`, the accuracies, and their means over corruptions and severities.

    Args:
        about: with "count", the images of each class.
        accuracy: by corruption; S lists of K fractions, None for a class without images.
    Returns:
        Also "class" (K means), "average" (over all images), "worst", "worst_class", and "complete".
    """
    count_K = np.array(about["count"])
    mean_K = np.array([np.array(rows, dtype=float).mean(axis=0) for rows in accuracy.values()]).mean(axis=0)
    seen = count_K > 0
    worst = int(np.argmin(np.where(seen, mean_K, np.inf)))
    means = {
        "class": mean_K.tolist(),
        "average": float(mean_K[seen] @ count_K[seen] / count_K.sum()),
        "worst": float(mean_K[worst]),
        "worst_class": worst,
        "complete": len(accuracy) == len(CORRUPTIONS),
    }
    return finite(dict(about) | {"accuracy": dict(accuracy)} | means)


def corruption_table(content: Mapping[str, Any]) -> str:
    """Return the table of an evaluation's corruptions for the terminal: a line each, a column a severity."""
    found, classes = content["corruptions"], content["protocol"]["classes"]
    count_K = np.array(found["count"])
    seen = count_K > 0
    lines = [f"{'corruption':20}{''.join(f'{one:>8}' for one in found['severities'])}{'mean':>8}{'worst':>8}  class"]
    for name, rows in found["accuracy"].items():
        accuracy_SK = np.array(rows, dtype=float)
        average_S = accuracy_SK[:, seen] @ count_K[seen] / count_K.sum()
        lines.append(_line(name, [*average_S, average_S.mean()], accuracy_SK.mean(axis=0), classes))
    mean_K = np.array(found["class"], dtype=float)
    blank = [np.nan] * len(found["severities"])
    lines.append(_line("mean", [*blank, found["average"]], mean_K, classes))
    return "\n".join(
        [*lines, "on corrupted images, without attacks; worst: the class with the lowest mean over the severities"]
    )


def _line(title: str, averages: list[float], mean_K: np.ndarray, classes: list[str]) -> str:
    worst = int(np.nanargmin(mean_K))
    shares = "".join(f"{'' if np.isnan(one) else f'{one:.1%}':>8}" for one in [*averages, mean_K[worst]])
    return f"{title:20}{shares}  {classes[worst]}"
