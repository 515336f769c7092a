"""RSLAD and what came after it: free steps of the variant `released` end where the authors' scripts end.

The scripts are resnet18_rslad_cifar10.py of zibojia/RSLAD, resnet18_absld_cifar10.py of zhaoshiji123/ABSLD,
mtard/mtard_resnet18_cifar10.py of zhaoshiji123/MTARD, resnet18_mtard_cifar10.py of zhaoshiji123/MTARD-extension, and
Fair-RSLAD.py and Fair-MTARD.py of NISP-official/Fair-ARD. All of them take a step in the same order: an attack in eval
mode, then in training mode the attacked images and the clean ones. Dimension key: B batch, K classes.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from driver import Batch, Run, assert_same, free_run, trained
from reference import climb
from torch import Tensor, nn
from torch.nn import functional as F

from retemper.engine.run.selection import score


class Script:
    """A script: what it holds besides the student, its step, and what it does after an epoch.

    Attributes:
        factor: what the rates of the script have been multiplied by so far.
        rates: the learning rate of each step.
        scores: what the script chooses an epoch by, by epoch; none where it chooses none.
    """

    nesterov = False

    def __init__(self, run: Run) -> None:
        self.run, self.student, self.factor = run, run.student0, 1.0
        self.rates: list[float] = []
        self.scores: list[float] = []
        self.begin()

    def begin(self) -> None:
        """Set what the script holds before its first step."""

    def attack(self, batch: Batch, value: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the attacked images that raise `value`, a scalar of logits; leave the student in training mode."""
        attack = self.run.recipe.attack

        def of_images(at: Tensor) -> Tensor:
            logits_BK = self.student(at)
            self.see(logits_BK.detach(), batch.label)
            return value(logits_BK)

        self.student.eval()
        start = self.run.start(batch.image, attack.eps, batch.seed, "normal", clip=False)
        adv = climb(batch.image, start, of_images, eps=attack.eps, step=attack.step, steps=attack.steps)
        self.student.train()
        return adv

    def see(self, logits_BK: Tensor, label_B: Tensor) -> None:
        """See the logits of an iterate of the attack."""

    def loss(self, batch: Batch) -> Tensor:
        """Take the forwards of a step, in their order, and return what is minimised."""
        raise NotImplementedError

    def conclude(self) -> dict[str, Tensor]:
        """End an epoch: move what the script holds; return the class state by the names of the run."""
        return {}

    def judge(self) -> tuple[float, Tensor]:
        """Return the clean accuracy on the test images, and under their PGD which of each class are right: (K,)."""
        assert self.run.judged is not None
        image, label = self.run.judged
        eps, right = self.run.recipe.attack.eps, []
        self.student.eval()
        for chosen in torch.arange(len(label)).split(256):
            own = label[chosen]
            start = self.run.start(image[chosen], eps, chosen[:1], "uniform", clip=True)
            value = lambda at, own=own: F.cross_entropy(self.student(at), own)  # noqa: E731
            adv = climb(image[chosen], start, value, eps=eps, step=0.003 / (8 / 255) * eps, steps=20)
            right.append(self.student(adv).argmax(1) == own)
        clean = (self.student(image).argmax(1) == label).double().mean().item()
        return clean, torch.stack([torch.cat(right)[label == k].double().mean() for k in range(10)])

    def average(self, robust_K: Tensor) -> float:
        """Return the average over the images of a test set, from that of each class."""
        assert self.run.judged is not None
        return (robust_K @ self.run.judged[1].bincount().double()).item() / len(self.run.judged[1])

    def score(self) -> float | None:
        """Return what the script chooses the epoch by that has ended."""
        return None

    def play(self) -> float:
        """Train; hold the run to the result; return the largest difference."""
        optim, state = self.run.recipe.optim, {}
        weights = self.student.parameters()
        sgd = torch.optim.SGD(weights, lr=0.1, momentum=0.9, weight_decay=2e-4, nesterov=self.nesterov)
        for epoch, batches in enumerate(self.run.batches, 1):
            for batch in batches:
                sgd.zero_grad()
                self.loss(batch).backward()
                sgd.step()
                self.rates.append(sgd.param_groups[0]["lr"])
            if epoch in optim.lr_drops:
                self.factor *= 0.1
                sgd.param_groups[0]["lr"] *= 0.1
            state = self.conclude()
            self.scores += [score] if (score := self.score()) is not None else []
            self.student.train()
        return assert_same(self.run, self.student, kept=self.student, class_state=state or None, lr=self.rates)


def kl_sum(student_BK: Tensor, target_BK: Tensor) -> Tensor:
    """Return the sum that an attack raises; the targets are probabilities."""
    return F.kl_div(student_BK.log_softmax(1), target_BK, reduction="sum")


def kl_BK(student_BK: Tensor, target_BK: Tensor) -> Tensor:
    """Return the terms of the loss that all the scripts define alike, with 1e-5 inside the target's logarithm."""
    return -student_BK.log_softmax(1) * target_BK + (target_BK + 1e-5).log() * target_BK


class Rslad(Script):
    def loss(self, batch: Batch) -> Tensor:
        target_BK = ask(self.run.teacher, batch.image).softmax(1)
        adv = self.attack(batch, lambda logits_BK: kl_sum(logits_BK, target_BK))
        adv_BK = self.student(adv)
        clean_BK = self.student(batch.image)
        return 5 / 6 * kl_BK(adv_BK, target_BK).mean() + 1 / 6 * kl_BK(clean_BK, target_BK).mean()

    def score(self) -> float:
        return self.average(self.judge()[1])


class Absld(Script):
    """One storage holds the targets of both terms: it is divided by both temperatures."""

    def begin(self) -> None:
        self.temperature = {name: torch.ones(10, dtype=torch.float64) for name in ("adv", "clean")}
        self.forget()

    def forget(self) -> None:
        self.cost = {name: torch.zeros(10, dtype=torch.float64) for name in ("adv", "clean")}

    def loss(self, batch: Batch) -> Tensor:
        label = batch.label
        teacher_BK = ask(self.run.teacher, batch.image).clone()
        for name in ("adv", "clean"):
            teacher_BK /= self.temperature[name][label, None]
        target_BK = teacher_BK.softmax(1)
        adv = self.attack(batch, lambda logits_BK: kl_sum(logits_BK, target_BK))
        logits = {"adv": self.student(adv)}
        logits["clean"] = self.student(batch.image)
        for name, logits_BK in logits.items():
            self.cost[name].index_add_(0, label, F.cross_entropy(logits_BK.detach(), label, reduction="none"))
        losses = {name: kl_BK(logits_BK, target_BK).mean() for name, logits_BK in logits.items()}
        return 5 / 6 * losses["adv"] + 1 / 6 * losses["clean"]

    def conclude(self) -> dict[str, Tensor]:
        for name, cost in self.cost.items():
            gap = cost - cost.mean()
            moved = self.temperature[name] - 0.1 * self.factor * gap / gap.abs().max()
            self.temperature[name] = moved.clamp(0.5, 5)
        self.forget()
        return {f"temperature_{name}": value for name, value in self.temperature.items()}

    def score(self) -> float:
        robust_K = self.judge()[1]
        return self.average(robust_K) + robust_K.min().item()


class Mtard(Script):
    """The weight of the clean task follows from the losses' values, 1e-5 included."""

    def begin(self) -> None:
        self.weight, self.first, self.task_rate = {"adv": 0.5, "clean": 0.5}, {}, 0.025

    def targets(self, adv: Tensor, clean: Tensor) -> dict[str, Tensor]:
        return {"adv": ask(self.run.teacher, adv), "clean": ask(self.run.clean_teacher, clean)}

    def terms(self, logits_BK: Tensor, teacher_BK: Tensor, label_B: Tensor) -> Tensor:
        return kl_BK(logits_BK, teacher_BK.softmax(1))

    def loss(self, batch: Batch) -> Tensor:
        adv = self.attack(batch, lambda logits_BK: F.cross_entropy(logits_BK, batch.label))
        logits = {"adv": self.student(adv)}
        logits["clean"] = self.student(batch.image)
        teachers = self.targets(adv, batch.image)
        losses = self.task_losses(logits, teachers, batch.label)
        self.first = self.first or {name: loss.item() for name, loss in losses.items()}
        self.balance({name: loss.item() / self.first[name] for name, loss in losses.items()})
        return self.weight["adv"] * losses["adv"] + self.weight["clean"] * losses["clean"]

    def task_losses(self, logits: dict[str, Tensor], teachers: dict[str, Tensor], label_B: Tensor) -> dict[str, Tensor]:
        return {name: self.terms(logits[name], teachers[name], label_B).mean() for name in logits}

    def balance(self, ratio: dict[str, float]) -> None:
        goal = ratio["clean"] / (ratio["adv"] + ratio["clean"])
        self.weight["clean"] -= self.task_rate * self.factor * (self.weight["clean"] - goal)
        self.weight["adv"] = 1 - self.weight["clean"]

    def conclude(self) -> dict[str, Tensor]:
        return {
            "clean_task_weight": one(self.weight["clean"]),
            "task_rate": one(self.task_rate * self.factor),
            "first_adv_loss": one(self.first["adv"]),
            "first_clean_loss": one(self.first["clean"]),
        }

    def score(self) -> float | None:
        return self.average(self.judge()[1])


class BMtard(Mtard):
    """Both weights move and are made to add up to 1; temperatures move in every step, after the losses are taken."""

    def begin(self) -> None:
        super().begin()
        self.temperature, self.temperature_rate = {"adv": 1.0, "clean": 1.0}, 0.001

    def task_losses(self, logits: dict[str, Tensor], teachers: dict[str, Tensor], label_B: Tensor) -> dict[str, Tensor]:
        tempered = {name: (teacher_BK / self.temperature[name]).softmax(1) for name, teacher_BK in teachers.items()}
        losses = {name: kl_BK(logits[name], tempered[name]).mean() for name in logits}
        entropy = {name: ((p_BK + 1e-5).log() * p_BK).mean() for name, p_BK in tempered.items()}
        for name, other in (("adv", "clean"), ("clean", "adv")):
            sign = torch.sign(entropy[name] / entropy[other] - 1).item()
            moved = self.temperature[name] - self.temperature_rate * self.factor * sign
            self.temperature[name] = max(min(10, moved), 1)
        return losses

    def balance(self, ratio: dict[str, float]) -> None:
        mean = (ratio["adv"] + ratio["clean"]) / 2
        inverse = {name: value / mean for name, value in ratio.items()}
        for name, value in inverse.items():
            goal = value / (inverse["adv"] + inverse["clean"])
            moved = self.weight[name] - self.task_rate * self.factor * (self.weight[name] - goal)
            self.weight[name] = max(moved, 0)
        total = sum(self.weight.values())
        self.weight = {name: value / total for name, value in self.weight.items()}

    def conclude(self) -> dict[str, Tensor]:
        own = {f"temperature_{name}": one(value) for name, value in self.temperature.items()}
        return super().conclude() | own | {"temperature_rate": one(self.temperature_rate * self.factor)}

    def score(self) -> float:
        clean, robust_K = self.judge()
        return clean + self.average(robust_K)


class Fair(Script):
    """The rule of the family: kappa counts the iterates before each step that are still classified correctly."""

    nesterov, floor = True, 1e-5

    def begin(self) -> None:
        super().begin()
        self.class_weight = torch.ones(10, dtype=torch.float64)
        self.kappa = torch.zeros(10, dtype=torch.float64)

    def see(self, logits_BK: Tensor, label_B: Tensor) -> None:
        self.kappa.index_add_(0, label_B, (logits_BK.argmax(1) == label_B).double())

    def conclude(self) -> dict[str, Tensor]:
        images = sum(len(batch.label) for batch in self.run.batches[0])
        inverse = (1 / (self.kappa / (images / 10) + self.floor)) ** 2
        self.class_weight = (inverse * 10 / inverse.sum()).clamp(5 / 6, 5 / 2)
        self.kappa = torch.zeros_like(self.kappa)
        return super().conclude() | {"class_weight": self.class_weight}

    def score(self) -> None:
        return None


class FairRslad(Fair):
    floor = 0

    def loss(self, batch: Batch) -> Tensor:
        target_BK = ask(self.run.teacher, batch.image).softmax(1)
        adv = self.attack(batch, lambda logits_BK: kl_sum(logits_BK, target_BK))
        weight_B = self.class_weight[batch.label, None]
        adv_BK = self.student(adv)
        clean_BK = self.student(batch.image)
        adv_loss, clean_loss = ((weight_B * kl_BK(of, target_BK)).mean() for of in (adv_BK, clean_BK))
        return 5 / 6 * adv_loss + 1 / 6 * clean_loss


class FairMtard(Fair, Mtard):
    """The robust teacher on the attacked images teaches both tasks."""

    def targets(self, adv: Tensor, clean: Tensor) -> dict[str, Tensor]:
        return dict.fromkeys(("adv", "clean"), ask(self.run.teacher, adv))

    def terms(self, logits_BK: Tensor, teacher_BK: Tensor, label_B: Tensor) -> Tensor:
        return self.class_weight[label_B, None] * super().terms(logits_BK, teacher_BK, label_B)


def ask(teacher: nn.Module | None, image: Tensor) -> Tensor:
    """Return the logits of a frozen teacher in eval mode."""
    assert teacher is not None and not teacher.training
    with torch.no_grad():
        return teacher(image)


def one(value: float) -> Tensor:
    return torch.tensor([value], dtype=torch.float64)


SCRIPTS: dict[str, type[Script]] = {
    "rslad": Rslad,
    "absld": Absld,
    "mtard": Mtard,
    "b_mtard": BMtard,
    "fair_rslad": FairRslad,
    "fair_mtard": FairMtard,
}


@pytest.mark.parametrize("method", SCRIPTS)
def test_free_steps_end_where_the_script_ends(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"{method}:cifar10_resnet18"
    run = free_run(name, tmp_path, monkeypatch, make=trained, eps=0.1, attack_step=0.05, padding=1, flip=False)
    assert [len(batches) for batches in run.batches] == [20, 20]
    script = SCRIPTS[method](run)
    assert script.play() < 1e-12
    judged = [json.loads(line).get("holdout") for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [score(report, run.recipe) for report in judged if report] == pytest.approx(script.scores, abs=1e-12)
    assert len(script.scores) == (0 if method.startswith("fair") else 2)
    assert run.best_epoch == (1 + script.scores.index(max(script.scores)) if script.scores else 2)
