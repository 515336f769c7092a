"""The check of a teacher: each number by hand, the advice at its bounds, and the command on digits."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from retemper.cli import run
from retemper.engine import class_report, create_model, save_weights
from retemper.engine.class_report import by_class
from retemper.engine.predict import ATTACKS
from retemper.engine.teacher_check.advice import _is_unlearned, advice, remarks
from retemper.engine.teacher_check.measure import (
    Answers,
    Findings,
    Hard,
    Head,
    Images,
    SoftLabels,
    Student,
    against,
    best_temperature,
    entropy,
    hard,
    head,
    measure,
    soft_labels,
)
from retemper.loaders import split_of_arrays

CLASSES = ("cat", "dog", "owl", "elk")
LABEL = torch.tensor([0, 0, 1, 2])


def logits(p_NK: list[list[float]]) -> Tensor:
    return torch.tensor(p_NK, dtype=torch.float64).log()


# the numbers


def test_the_entropy_is_that_of_the_softmax() -> None:
    found = entropy(logits([[0.25, 0.25, 0.25, 0.25], [0.5, 0.5, 1e-300, 1e-300]]) + 7)
    torch.testing.assert_close(found, torch.tensor([4.0, 2.0], dtype=torch.float64).log())


def test_the_best_temperature_is_that_which_the_labels_were_drawn_at() -> None:
    rng = torch.Generator().manual_seed(0)
    drawn_NK = 2 * torch.randn(20_000, 4, generator=rng, dtype=torch.float64)
    label_N = torch.multinomial((drawn_NK / 2.5).softmax(1), 1, generator=rng)[:, 0]
    assert best_temperature(drawn_NK, label_N) == pytest.approx(2.5, rel=0.05)


def test_soft_labels_by_hand() -> None:
    clean = logits([[0.7, 0.1, 0.1, 0.1], [0.4, 0.2, 0.2, 0.2], [0.1, 0.7, 0.1, 0.1], [0.25, 0.25, 0.25, 0.25]])
    adv = logits([[0.1, 0.7, 0.1, 0.1], [0.4, 0.2, 0.2, 0.2], [0.1, 0.7, 0.1, 0.1], [0.1, 0.1, 0.1, 0.7]])
    found = soft_labels(Answers(clean, adv), LABEL, 4)
    assert (found.top, found.label) == pytest.approx(((0.7 + 0.4 + 0.7 + 0.25) / 4,) * 2)
    assert found.adv_label == pytest.approx((0.1 + 0.4 + 0.7 + 0.1) / 4)
    assert found.same == 0.5
    sure, unsure = (float(entropy(clean[row : row + 1])) for row in (0, 1))
    assert found.entropy_by_class[:3] == pytest.approx([(sure + unsure) / 2, sure, math.log(4)])
    assert math.isnan(found.entropy_by_class[3])


def test_hard_images_are_those_that_are_wrong() -> None:
    clean = logits([[0.97, 0.01, 0.01, 0.01], [0.25, 0.25, 0.25, 0.25], [0.1, 0.7, 0.1, 0.1], [0.92, 0.03, 0.04, 0.01]])
    wrong = torch.tensor([False, True, False, True])
    found = hard(clean, LABEL, wrong, "them")
    assert (found.images, found.by_class, found.sure, found.wrong_for) == (2, [1, 0, 1, 0], 0.5, "them")
    assert found.label == pytest.approx((0.25 + 0.04) / 2)
    assert found.entropy == pytest.approx(float(entropy(clean[wrong]).mean()))
    assert found.share == pytest.approx(found.entropy / math.log(4))
    none = hard(clean, LABEL, torch.zeros(4, dtype=torch.bool), "them")
    assert none.images == 0 and math.isnan(none.entropy)


def test_head_norms_go_with_robust_accuracy() -> None:
    network = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4, bias=False), nn.Flatten())
    with torch.no_grad():
        network.get_submodule("2").get_parameter("weight").copy_(torch.diag(torch.tensor([1.0, 2.0, 3.0, 9.0])))
    found = head(network, [0.1, 0.2, 0.3, None])
    assert found is not None and found.norms == [1, 2, 3, 9] and found.correlation == pytest.approx(1)
    assert head(nn.Sequential(nn.Linear(3, 5)), [0.1, 0.2, 0.3, 0.4]) is None


def test_transfer_counts_what_fools_both_of_what_the_teacher_knows() -> None:
    """Images 0 and 1 fool the student, 1 the teacher too; 2 the teacher has wrong anyway; 3 fools neither."""
    right = logits([[0.7, 0.1, 0.1, 0.1], [0.7, 0.1, 0.1, 0.1], [0.1, 0.7, 0.1, 0.1], [0.1, 0.1, 0.7, 0.1]])
    first = logits([[0.1, 0.1, 0.1, 0.7]] * 4)
    fooled = logits([[0.1, 0.3, 0.3, 0.3]])
    teacher = Answers(
        torch.cat([right[:2], first[2:3], right[3:]]), torch.cat([right[:1], fooled, first[2:3], right[3:]])
    )
    student = Answers(right, torch.cat([first[:3], right[3:]]))
    found = against("s", student, teacher, LABEL, 4)
    assert (found.clean, found.robust, found.agreement) == (1, 0.25, 0.75)
    assert (found.fooled, found.transfer, found.transfer_by_class[0]) == (2, 0.5, 0.5)
    assert math.isnan(found.transfer_by_class[1])
    assert found.moved == pytest.approx((0.7 * math.log(7) - 0.3 * math.log(3)) / 4)


class Brighter(nn.Module):
    """A network that takes an image for class 1 where its mean pixel is above a bound, else for class 0."""

    def __init__(self, bound: float) -> None:
        super().__init__()
        self.bound = bound

    def forward(self, image: Tensor) -> Tensor:
        brighter_B = image.flatten(1).mean(1) - self.bound
        return torch.stack([-brighter_B, brighter_B], 1)


def test_hard_images_are_those_that_all_students_lose(monkeypatch: pytest.MonkeyPatch) -> None:
    """The attack makes every image brighter. Each batch of it draws from a seed of its own."""
    attacked: list[tuple[nn.Module, float, int]] = []

    class Stub:
        def on(self, network: nn.Module, eps: float) -> Any:
            def perturb(clean: Tensor, clean_BK: Tensor, label_B: Tensor, seed: int) -> Tensor:
                attacked.append((network, eps, seed))
                return clean + 0.4

            return perturb

    monkeypatch.setitem(ATTACKS, "pgd20", Stub())
    pixels = np.array([25, 25, 76], dtype=np.uint8).repeat(4).reshape(3, 2, 2, 1)  # of 0.1, 0.1 and 0.3
    split = split_of_arrays("two", "test", pixels, np.zeros(3, dtype=np.int64), ("dark", "bright"), "")
    order = np.array([0, 1, 2])
    images = Images(split=split, order=order, eps=0.4, device=torch.device("cpu"), batch_size=2, seed=5)
    teacher, students = Brighter(0.9), [("a", Brighter(0.4)), ("b", Brighter(0.6))]
    found = measure(teacher, "t", students, images)
    assert [(network.bound, seed) for network, _, seed in attacked] == [
        (bound, seed) for bound in (0.9, 0.4, 0.6) for seed in (5, 7)
    ]
    assert found.hard.images == 1 and found.hard.wrong_for == "a, b"
    assert [one.robust for one in found.students] == [0, pytest.approx(2 / 3)]
    assert (found.clean["average"], found.robust["average"]) == (1, 1)
    assert measure(teacher, "t", [], images).hard.images == 0


# the advice


def report(correct: list[int]) -> dict[str, Any]:
    label = np.repeat(np.arange(4), 100)
    given = np.concatenate([[k] * right + [(k + 1) % 4] * (100 - right) for k, right in enumerate(correct)])
    assert class_report(correct, [100] * 4).average == by_class(given, label, 4)["average"]
    return by_class(given, label, 4)


def findings(**changes: Any) -> Findings:
    labels = dict(top=0.6, entropy=0.7, adv_entropy=0.9, label=0.6, adv_label=0.4, same=0.7, temperature=0.8)
    good = Findings(
        clean=report([90, 90, 90, 80]),
        robust=report([60, 60, 60, 50]),
        soft_labels=SoftLabels(**labels, entropy_by_class=[0.7] * 4),
        hard=Hard(wrong_for="s", images=60, by_class=[15] * 4, entropy=0.7, share=0.5, sure=0.0, label=0.4),
        head=Head(norms=[2.0, 2.0, 2.0, 1.9], correlation=0.5),
        students=[student()],
    )
    return replace(good, **changes)


def student(**changes: Any) -> Student:
    fields: dict[str, Any] = dict(clean=0.9, robust=0.5, agreement=0.9, fooled=80, transfer=0.5, moved=0.1)
    return Student(**{"network": "s", "transfer_by_class": [0.5] * 4} | fields | changes)


def changed(of: str, **fields: Any) -> Findings:
    return findings(**{of: replace(getattr(findings(), of), **fields)})


def test_a_good_teacher_gets_the_word() -> None:
    said = advice(findings(), CLASSES)
    assert said.startswith("go ahead: it holds 57.5% under attack, 50.0% of its weakest class") and "50%" in said
    assert remarks(findings()) == []


REASONS = {
    "no robust teacher": findings(robust=report([40, 25, 20, 20])),
    "never learned class elk": findings(clean=report([90, 90, 90, 30])),
    "uneven: class elk": findings(robust=report([60, 60, 60, 5])),
    "sure of images that are lost": changed("hard", share=0.24),
    "attacks on s hardly move it": findings(students=[student(), student(transfer=0.19)]),
    "surer than it is right": changed("soft_labels", temperature=1.6),
}


@pytest.mark.parametrize("reason", REASONS)
def test_each_reason_is_given_with_its_verdict(reason: str) -> None:
    said = advice(REASONS[reason], CLASSES)
    assert reason in said and said.startswith("do not distil" if reason in [*REASONS][:2] else "think twice")
    assert sum(one in said for one in REASONS) == 1


def test_few_images_lead_to_no_conclusion() -> None:
    few = findings(students=[student(transfer=0.0, fooled=29)], hard=replace(findings().hard, images=29, share=0.0))
    assert advice(few, CLASSES).startswith("go ahead")
    assert "only 29 images are hard" in " ".join(remarks(few))


def report_of(correct: list[int], each: int) -> dict[str, Any]:
    """Return the report of so many images of each class."""
    given = np.concatenate([[k] * right + [(k + 1) % 4] * (each - right) for k, right in enumerate(correct)])
    return by_class(given.astype(int), np.repeat(np.arange(4), each), 4)


def test_a_handful_of_images_says_nothing_and_a_class_of_few_is_not_called_unlearned() -> None:
    said = advice(findings(clean=report_of([1, 1, 1, 1], 1), robust=report_of([1, 1, 1, 1], 1)), CLASSES)
    assert said == "no word for or against it: 4 images are too few to judge it by; give --limit 30 or more."
    for right, each in (([4, 4, 4, 0], 4), ([6, 6, 3, 2], 8)):  # too few, and too little below the average
        assert not _is_unlearned(report_of(right, each))
    assert _is_unlearned(report_of([8, 8, 8, 1], 8))
    none = findings(clean=report_of([0, 50, 0, 0], 50), robust=report_of([0, 50, 0, 0], 50))
    assert "no robust teacher;" in advice(none, CLASSES) and "clean one" not in advice(none, CLASSES)


def test_a_weakest_class_that_chance_may_have_made_is_no_reason() -> None:
    assert advice(findings(robust=report([60, 60, 60, 20])), CLASSES).startswith("go ahead")


def test_what_is_worth_knowing_besides_is_a_remark() -> None:
    uneven = findings(head=Head(norms=[2.0, 2.0, 2.0, 1.6], correlation=0.9), students=[])
    assert [text.split()[0] for text in remarks(uneven)] == ["the", "no"]
    assert advice(uneven, CLASSES).startswith("go ahead")


# the command


def test_the_command_writes_what_an_evaluation_finds(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The student is the teacher itself: its attacks are the teacher's own, and fool both."""
    out, words = tmp_path / "check", "--device cpu --limit 60 --batch-size 32".split()
    assert run(["teacher", str(teacher), "--student", str(teacher), "--out", str(out), *words]) == 0
    said = capsys.readouterr().out
    assert "ADVICE: " in said and said.endswith(f"{out / 'teacher.html'}\n")
    found = json.loads((out / "teacher.json").read_text())
    command = ["evaluate", str(teacher), "--attacks", "clean,pgd20", "--out", str(tmp_path), *words]
    assert run(command) == 0
    attacks = json.loads((tmp_path / "evaluation.json").read_text())["attacks"]
    for ours, theirs in (("clean", "clean"), ("robust", "pgd20")):
        assert found[ours]["accuracy"] == attacks[theirs]["accuracy"]
        assert found[ours]["confusion"] == attacks[theirs]["confusion"]
    (own,) = found["students"]
    assert own["transfer"] == own["agreement"] == 1 and own["fooled"] > 0
    assert sum(found["hard"]["by_class"]) == found["hard"]["images"] >= own["fooled"]
    page, text = (out / "teacher.html").read_text(), (out / "teacher.md").read_text()
    assert "data:image/svg+xml" in page and "teacher_classes.png" in text and (out / "teacher_classes.png").exists()
    assert found["advice"][1:] in page


def test_it_goes_beside_the_run_or_to_a_folder_of_its_own(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda *_: None)  # as without matplotlib
    bare = tmp_path / "net.safetensors"
    save_weights(bare, create_model("tiny_resnet", 10, channels=1))
    words = "--device cpu --limit 10".split()
    named = "--model tiny_resnet --dataset digits --student net.safetensors".split()
    assert run(["teacher", str(bare), *named, *words, "--split", "train"]) == 0
    folder = tmp_path / "teachers/net.safetensors"
    assert {path.name for path in folder.iterdir()} == {"teacher.json", "teacher.md", "teacher.html"}
    assert json.loads((folder / "teacher.json").read_text())["split"] == "train"


def test_what_cannot_be_checked_is_refused_in_a_line(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare, other = tmp_path / "bare.pt", tmp_path / "other.safetensors"
    torch.save({"w": torch.zeros(3)}, bare)
    save_weights(other, create_model("tiny_resnet", 7, channels=1), {"num_classes": "7", "model": "tiny_resnet"})
    for words, code, line in (
        ([str(bare)], 2, "does not say its architecture and its data set: retemper teacher"),
        ([str(teacher), "--student", str(bare)], 2, "does not say its architecture: name a run's folder"),
        ([str(teacher), "--student", str(other)], 3, "knows 7 classes, the data has 10"),
        ([str(teacher), "--out", str(bare)], 2, "name another folder with --out"),
        ([str(teacher), "--student", str(tmp_path / "none")], 3, "does not exist"),
    ):
        assert run(["teacher", *words, "--limit", "5"]) == code
        said = capsys.readouterr().err
        assert line in said and len(said.splitlines()) == 1, said
