"""Made-up runs for the tests of the report: folders as training and evaluation leave them."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from retemper.engine.class_report import class_report, intervals
from retemper.engine.evaluation.curve_file import CurveFile

DIGITS = [str(k) for k in range(10)]
RSLAD = [0.85, 0.62, 0.74, 0.60, 0.80, 0.71, 0.88, 0.75, 0.43, 0.66]  # weakest: 8
ABSLD = [0.83, 0.70, 0.75, 0.61, 0.78, 0.72, 0.84, 0.74, 0.64, 0.69]  # weakest: 3


def entry(accuracy: list[float], count: int = 100) -> dict[str, Any]:
    correct = [round(a * count) for a in accuracy]
    report = class_report(correct, [count] * len(correct))
    return vars(report) | {"interval": intervals(correct, [count] * len(correct), draws=500), "seconds": 1.0}


def epoch(number: int, epochs: int, accuracy: list[float], state: bool) -> dict[str, Any]:
    part = number / epochs
    rng = np.random.default_rng(number)
    now = [a * (1 - math.exp(-5 * part)) for a in accuracy]
    row: dict[str, Any] = {
        "epoch": number,
        "loss": 2.3 * math.exp(-2 * part),
        "lr": 0.1 if part < 0.6 else 0.01,
        "images_per_second": 900.0,
        "seconds": 1.5,
        "class_loss": [1 - a for a in now],
        "class_accuracy": now,
    }
    if number % 2 == 0:
        noisy = np.clip(np.array(now) + rng.normal(0, 0.02, len(now)), 0, 1)
        row["holdout"] = {k: v for k, v in vars(class_report(noisy * 1e4 // 1, [10_000] * len(now))).items()}
    if state:
        row["temperature_adv"] = [1 + 2 * part * (a - np.mean(accuracy)) for a in accuracy]
        row["temperature_clean"] = [1 + part * (a - np.mean(accuracy)) for a in accuracy]
    return row


def make_run(folder: Path, accuracy: list[float], classes: list[str] = DIGITS, **change: Any) -> Path:
    """A run's folder. change: attacks, protocol, teacher, state, count, epochs, seed, checks, partly, verdicts.

    partly: attacks whose numbers are upper bounds. verdicts: evaluation.csv and confusion are written too.
    """
    folder.mkdir(parents=True)
    count, epochs = change.get("count", 100), change.get("epochs", 20)
    config = {
        "method": change.get("method", folder.name),
        "setting": "digits",
        "recipe": {"dataset": "digits", "student": "tiny_resnet", "variant": "paper", "eps": 8 / 255, "epochs": epochs},
        "seed": change.get("seed", 0),
        "classes": classes,
        "out": "runs/x",
        "versions": {"retemper": "0.1.0", "torch": "2.13.0"},
        "device": "cpu: 2 cores",
        "commit": "abc123",
        "teacher": change.get("teacher"),
        "started": "2026-11-21T12:00:00Z",
    }
    (folder / "config.json").write_text(json.dumps(config))
    rows = [epoch(e, epochs, accuracy, change.get("state", True)) for e in range(1, epochs + 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    gain = {"clean": 1.12, "fgsm": 1.05, "pgd20": 1.0, "cw": 0.95, "autoattack-fast": 0.92, "autoattack": 0.9}
    attacks = change.get("attacks", ("clean", "pgd20"))
    protocol = {
        "dataset": "digits",
        "split": "test",
        "images": count * len(classes),
        "eps": 0.15,
        "norm": "linf",
        "precision": "fp32",
        "seed": 0,
        "batch_size": 256,
        "versions": config["versions"],
        "weights": "best.safetensors",
        "weights_sha256": folder.name,
        "attacks": {a: {"loss": "cross-entropy", "steps": 20, "step": 2 / 255, "start": "uniform"} for a in attacks},
        "classes": classes,
    } | change.get("protocol", {})
    results = {a: entry([min(1.0, gain.get(a, 1.0) * x) for x in accuracy], count) for a in attacks}
    for attack in change.get("partly", ()):
        results[attack]["upper_bound"] = True
    if change.get("verdicts"):
        write_verdicts(folder, results, count)
    if attacks:
        evaluation = {"protocol": protocol, "attacks": results, "checks": change.get("checks", {})}
        (folder / "evaluation.json").write_text(json.dumps(evaluation))
    return folder


def add_curve(folder: Path, *radii: float) -> None:
    """Write curve.json and curve.csv beside a run's evaluation: the images fall evenly from radius to radius."""
    content = json.loads((folder / "evaluation.json").read_text())
    whole = content["attacks"]["pgd20"]
    entries = [
        whole | {"eps": eps, "attacked": 1, "accuracy": [a / (1 + number / 2) for a in whole["accuracy"]]}
        for number, eps in enumerate(radii)
    ]
    file = CurveFile.empty(folder / "curve.json", content["protocol"] | {"eps": list(radii)})
    images = {image: (0, radii[0]) for image in range(sum(whole["count"]))}
    file.set("pgd20", {"steps": 20}, entries, images)
    file.content["consistency"] = {"pairs": 6, "images": 6 * len(images), "violations": []}
    file.write()


def write_verdicts(folder: Path, results: dict[str, Any], count: int) -> None:
    """Write evaluation.csv, and each attack's confusion: every wrong image is taken for the next class."""
    classes = len(next(iter(results.values()))["count"])
    columns = []
    for attack, result in results.items():
        right_K = np.array([round(a * count) for a in result["accuracy"]])
        wrong_KK = np.roll(np.diag(count - right_K), 1, axis=1)
        result["confusion"] = (np.diag(right_K) + wrong_KK).tolist()
        rng = np.random.default_rng(len(attack))  # the same luck for all runs
        columns.append((rng.permuted(np.tile(np.arange(count), (classes, 1)), axis=1) < right_K[:, None]).ravel())
    labels = np.repeat(np.arange(classes), count)
    rows = [
        ",".join(map(str, (i, label, *map(int, row))))
        for i, (label, *row) in enumerate(zip(labels, *columns, strict=True))
    ]
    (folder / "evaluation.csv").write_text("\n".join([",".join(["image", "label", *results]), *rows]) + "\n")


def checks(suspect: bool) -> dict[str, Any]:
    """Return checks as `retemper evaluate --check` writes them."""
    said = "At eps 1 still 12 % of the images are classified correctly; no network can do that."
    flags = [
        {"name": "radius_end", "raised": suspect, "value": 0.12 * suspect, "threshold": 0.02, "text": said},
        {"name": "zero_gradients", "raised": False, "value": None, "threshold": 0.001, "text": "not measured"},
    ]
    rungs = [{"eps": e, "accuracy": max(0.12 * suspect, 0.9 - e)} for e in (0, 0.03, 0.06, 0.12, 1)]
    verdict = "suspect" if suspect else "ok"
    return {"verdict": verdict, "flags": flags, "ladder": {"radius": rungs}, "images": 300}


def three_runs(folder: Path, **change: Any) -> list[Path]:
    teacher = {"path": str(folder / "teacher/best.safetensors"), "model": "tiny_resnet", "sha256": "ab" * 32}
    return [
        make_run(folder / "teacher", [min(1, a + 0.04) for a in RSLAD], state=False, **change),
        make_run(folder / "rslad", RSLAD, state=False, teacher=teacher, **change),
        make_run(folder / "absld", ABSLD, teacher=teacher, **change),
    ]
