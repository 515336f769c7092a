"""Evaluation: what the numbers mean, and that they hang together."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from retemper.engine import create_model, save_weights
from retemper.engine.checkpoints.header import load_network, read_facts
from retemper.engine.class_report import by_class
from retemper.engine.cli import run
from retemper.engine.predict import ATTACKS, Attack, balanced_order, survivors
from retemper.loaders import Split, load_split, split_of_arrays

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def digits() -> Split:
    return load_split("digits", "test", None)


class Brightness(nn.Module):
    """Class 1 where the mean pixel is above a half. Each margin is known: |mean - 1/2|."""

    def forward(self, image: Tensor) -> Tensor:
        score = image.flatten(1).mean(1) - 0.5
        return 50 * torch.stack([-score, score], 1)


def squares(means: list[int]) -> Split:
    images = np.stack([np.full((4, 4, 1), mean, dtype=np.uint8) for mean in means])
    labels = (np.array(means) > 127).astype(np.int64)
    return split_of_arrays("digits", "test", images, labels, ("dark", "light"), "")


@pytest.mark.parametrize("name", ["fgsm", "pgd20", "cw"])
def test_an_image_falls_exactly_when_its_margin_is_smaller_than_eps(name: str) -> None:
    split = squares([0, 100, 120, 126, 129, 140, 180, 255])
    eps = 20 / 255
    margin = np.abs(split.images.reshape(8, -1).mean(1) / 255 - 0.5)
    correct = survivors(Brightness(), split, ATTACKS[name], eps=eps, device=CPU)
    assert correct.tolist() == (margin > eps).tolist()


def test_a_radius_of_zero_is_clean(teacher: Path, digits: Split) -> None:
    model = trained(teacher)
    clean = survivors(model, digits, ATTACKS["clean"], eps=0, device=CPU)
    for name in ("fgsm", "pgd20", "cw"):
        assert torch.equal(survivors(model, digits, ATTACKS[name], eps=0, device=CPU), clean)


def test_more_radius_and_more_steps_break_more(teacher: Path, digits: Split) -> None:
    model = trained(teacher)
    order = balanced_order(digits.labels, 100)

    def robust(attack: Attack, eps: float) -> int:
        return int(survivors(model, digits, attack, eps=eps, device=CPU, indices=order).sum())

    counts = [robust(ATTACKS["pgd20"], eps) for eps in (0.0, 0.05, 0.15, 1.0)]
    assert counts == sorted(counts, reverse=True) and counts[0] > counts[2] and counts[-1] <= 10
    assert robust(ATTACKS["pgd20"], 0.15) <= robust(ATTACKS["fgsm"], 0.15)


def test_an_image_misclassified_when_clean_never_counts() -> None:
    right = squares([100, 160])
    wrong = split_of_arrays("digits", "test", right.images, 1 - right.labels, right.classes, "")
    assert not survivors(Brightness(), wrong, ATTACKS["pgd20"], eps=0.5, device=CPU).any()


def trained(run_folder: Path) -> nn.Module:
    weights = run_folder / "best.safetensors"
    return load_network(weights, read_facts(weights), CPU)


def test_an_answer_that_is_not_finite_is_no_answer(digits: Split) -> None:
    class Broken(nn.Module):
        def forward(self, image: Tensor) -> Tensor:
            return image.flatten(1)[:, :10] * float("nan")

    assert not survivors(Broken(), digits, ATTACKS["clean"], eps=0, device=CPU).any()


def test_any_prefix_is_balanced() -> None:
    labels = np.array([0, 0, 0, 0, 1, 2, 2, 1, 2, 2, 2])
    order = balanced_order(labels)
    assert sorted(order) == list(range(11))
    for size in (3, 6):
        assert np.bincount(labels[balanced_order(labels, size)]).tolist() == [size // 3] * 3
    assert balanced_order(labels, 3).tolist() == [0, 4, 5]


def test_the_report_counts_by_class() -> None:
    label = np.array([0, 0, 0, 0, 1, 1])
    report = by_class(np.array([0, 0, 0, 2, -1, 1]), label, 3)  # -1: the logits were not finite
    assert report["accuracy"] == [0.75, 0.5, None]  # nobody has class 2: null, not a number
    assert (report["worst"], report["worst_class"], report["count"]) == (0.5, 1, [4, 2, 0])
    low, high = report["interval"]["class"][0]
    assert low < 0.75 < high
    assert report["confusion"] == [[3, 0, 1], [0, 1, 0], [0, 0, 0]]
    json.dumps(report, allow_nan=False)


def test_batches_are_evaluated_in_fp32_without_tf32(digits: Split) -> None:
    seen = []

    class Watch(nn.Module):
        def forward(self, image: Tensor) -> Tensor:
            seen.append((image.dtype, torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32))
            return image.flatten(1)[:, :10]

    before = torch.backends.cudnn.allow_tf32
    survivors(Watch(), digits, ATTACKS["fgsm"], eps=0.1, device=CPU, indices=np.arange(4))
    assert set(seen) == {(torch.float32, False, False)} and torch.backends.cudnn.allow_tf32 == before


def test_evaluate_writes_the_contracts_file_and_adds_to_it(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["evaluate", str(teacher), "--limit", "50"]
    assert run([*words, "--attacks", "clean"]) == 0
    assert run([*words, "--attacks", "fgsm,pgd20"]) == 0
    content = json.loads((teacher / "evaluation.json").read_text())
    protocol = content["protocol"]
    assert (protocol["dataset"], protocol["split"], protocol["images"], protocol["eps"]) == ("digits", "test", 50, 0.15)
    assert (protocol["norm"], protocol["precision"], protocol["seed"]) == ("linf", "fp32", 0)
    assert list(content["attacks"]) == ["clean", "fgsm", "pgd20"] == list(protocol["attacks"])
    for result in content["attacks"].values():
        assert len(result["accuracy"]) == len(result["count"]) == 10 and sum(result["count"]) == 50
        assert {"average", "worst", "worst_class", "worst_tenth", "nsd", "interval"} <= result.keys()
    assert "pgd20" in capsys.readouterr().out
    assert run(["evaluate", str(teacher), "--limit", "60", "--attacks", "clean"]) == 0  # another protocol
    assert list(json.loads((teacher / "evaluation.json").read_text())["attacks"]) == ["clean"]
    assert json.loads((teacher / "evaluation.1.json").read_text()) == content


def test_a_bare_checkpoint_is_evaluated_when_it_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "model.pt"
    torch.save({"state_dict": create_model("tiny_resnet", 10).state_dict()}, path)
    words = ["evaluate", str(path), "--attacks", "clean", "--limit", "20"]
    assert run(words) == 2
    assert "--dataset" in capsys.readouterr().err
    assert run([*words, "--dataset", "digits"]) == 2
    assert "--model" in capsys.readouterr().err
    assert run([*words, "--dataset", "digits", "--model", "tiny_resnet", "--eps", "0.1"]) == 0
    assert json.loads((tmp_path / "evaluation.json").read_text())["protocol"]["eps"] == 0.1


def test_a_checkpoint_of_another_data_set_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "hundred.safetensors"
    save_weights(
        path, create_model("tiny_resnet", 100), {"model": "tiny_resnet", "num_classes": "100", "dataset": "digits"}
    )
    assert run(["evaluate", str(path), "--attacks", "clean"]) == 3
    assert "100 classes" in capsys.readouterr().err


def test_autoattack_is_the_librarys(teacher: Path) -> None:
    assert run(["evaluate", str(teacher), "--attacks", "pgd20,autoattack", "--limit", "10", "--weights", "last"]) == 0
    content = json.loads((teacher / "evaluation-last.json").read_text())
    assert content["attacks"]["autoattack"]["average"] <= content["attacks"]["pgd20"]["average"]
    assert content["protocol"]["attacks"]["autoattack"]["suite"] == "standard"
