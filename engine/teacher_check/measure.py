"""What is measured of a teacher: accuracy by class, its soft labels, its head, and what students' attacks do to it.

A teacher that is sure of itself on images that no student learns to hold makes the student memorise them, so more
entropy there is better (Lee and Chung, "Why Robust Teachers Fail", ICML 2026). Attacks on the student that do not move
the teacher teach little (SAAD: Lee and Chung, TMLR 2026). Row norms of the last layer tell which classes are robust
("Class-Wise Disparity in Adversarial Training", OpenReview 2025). All is in float64, in nats, on the host.

Dimension key: B batch, K classes, N images.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor, nn
from torch.nn import functional as F

from retemper.console import Progress
from retemper.engine.class_report import by_class
from retemper.engine.device import exact_fp32
from retemper.engine.predict import ATTACKS, folded_twin, labelled_batches
from retemper.errors import DataError
from retemper.loaders import Split

ATTACK = "pgd20"
SURE = 0.9  # a probability from which a soft label is as good as a hard one
TEMPERATURES = 1 / 20, 20.0  # among which the best is looked for


@dataclass(frozen=True, kw_only=True)
class Images:
    """The images that networks are asked about, and how they are attacked.

    Attributes:
        order: (N,) int64, which images of the split.
        eps: the radius in pixel units.
    """

    split: Split
    order: np.ndarray
    eps: float
    device: torch.device
    batch_size: int = 256
    seed: int = 0

    @property
    def label_N(self) -> Tensor:
        """The labels, (N,) int64."""
        return torch.from_numpy(self.split.labels[self.order]).long()


@dataclass(frozen=True, eq=False)
class Answers:
    """A network's logits, (N, K) float64 each, on clean images and on the attacked ones."""

    clean_NK: Tensor
    adv_NK: Tensor


@dataclass(frozen=True, kw_only=True)
class SoftLabels:
    """How sure a teacher is.

    Attributes:
        top: the mean of the largest probability, on clean images.
        entropy: the mean entropy on clean images.
        adv_entropy: on those attacked through the teacher itself.
        label, adv_label: the mean probability of the true class, clean and attacked.
        same: the share of images that are given the same class clean and attacked.
        temperature: that at which the soft labels of clean images fit the labels best: above 1 the teacher is surer
            than it is right.
        entropy_by_class: (K,) on clean images.
    """

    top: float
    entropy: float
    adv_entropy: float
    label: float
    adv_label: float
    same: float
    temperature: float
    entropy_by_class: list[float]


@dataclass(frozen=True, kw_only=True)
class Hard:
    """The teacher's soft labels, clean, for the images that are wrong under attack.

    Attributes:
        wrong_for: whose mistakes they are: "the network itself", or the students, all of which are wrong there.
        images: how many there are.
        by_class: (K,) of each class.
        entropy: the mean.
        share: that as a share of log K, the most there can be.
        sure: the share of images with a probability of `SURE` or more.
        label: the mean probability of the true class.
    """

    wrong_for: str
    images: int
    by_class: list[int]
    entropy: float
    share: float
    sure: float
    label: float


@dataclass(frozen=True, kw_only=True)
class Head:
    """The norms of the last layer's rows, (K,), and their correlation with the classes' robust accuracy."""

    norms: list[float]
    correlation: float


@dataclass(frozen=True, kw_only=True)
class Student:
    """What the attacks on a student do to the teacher.

    Attributes:
        network: the student's name.
        clean, robust: the student's own accuracies.
        agreement: the share of clean images that both give the same class.
        fooled: how many images the attack makes wrong for the student, of those that the teacher has right clean.
        transfer: the share of these that the teacher has wrong too, once attacked; `transfer_by_class` is (K,).
        moved: the mean KL divergence of the teacher's answers to attacked images from those to clean ones.
    """

    network: str
    clean: float
    robust: float
    agreement: float
    fooled: int
    transfer: float
    transfer_by_class: list[float]
    moved: float


@dataclass(frozen=True, kw_only=True)
class Findings:
    """All that is measured of a teacher; `clean` and `robust` are reports as evaluation.json holds them."""

    clean: dict[str, Any]
    robust: dict[str, Any]
    soft_labels: SoftLabels
    hard: Hard
    head: Head | None
    students: list[Student]


def measure(teacher: nn.Module, name: str, students: Sequence[tuple[str, nn.Module]], images: Images) -> Findings:
    """Measure a teacher, and what attacks on the students do to it.

    Args:
        teacher, students: from (B, C, H, W) pixels to (B, K) logits, frozen, in eval mode, on the images' device; each
            student with its name.
        name: the teacher's.
    Raises:
        DataError: a network's answers are not finite.
    """
    label_N, classes = images.label_N, len(images.split.classes)
    (own,) = answers(teacher, [(name, teacher)], images)
    wrong_N, measured, whose = own.adv_NK.argmax(1) != label_N, [], "the network itself"
    clean, robust = (_report(own, label_N, classes, attacked=attacked) for attacked in (False, True))
    wrong: list[Tensor] = []
    for student_name, student in students:
        of_student, of_teacher = answers(student, [(student_name, student), (name, teacher)], images)
        measured.append(against(student_name, of_student, of_teacher, label_N, classes))
        wrong.append(of_student.adv_NK.argmax(1) != label_N)
    if wrong:
        wrong_N, whose = torch.stack(wrong).all(0), ", ".join(student_name for student_name, _ in students)
    return Findings(
        clean=clean,
        robust=robust,
        soft_labels=soft_labels(own, label_N, classes),
        hard=hard(own.clean_NK, label_N, wrong_N, whose),
        head=head(teacher, robust["accuracy"]),
        students=measured,
    )


def answers(attacked: nn.Module, asked: Sequence[tuple[str, nn.Module]], images: Images) -> list[Answers]:
    """Return what each network that is asked says of the images, clean and attacked through `attacked` by PGD-20.

    Args:
        asked: each with its name; the first is the one that is attacked.
    Raises:
        DataError: answers are not finite.
    """
    perturb = ATTACKS[ATTACK].on(folded_twin(attacked, images.device), images.eps)
    said: list[list[tuple[Tensor, Tensor]]] = [[] for _ in asked]
    chosen: dict[str, Any] = dict(indices=images.order, batch_size=images.batch_size)
    with exact_fp32(), Progress(f"attacking {asked[0][0]}", len(images.order)) as progress:
        for first, clean, label_B in labelled_batches(images.split, images.device, **chosen):
            adv = perturb(clean, clean, label_B, images.seed + first)  # PGD looks at no logits of clean images
            with torch.no_grad():
                for pairs, (_, network) in zip(said, asked, strict=True):
                    pairs.append((network(clean).cpu().double(), network(adv).cpu().double()))
            progress.advance(len(label_B))
    found = [Answers(*(torch.cat(part) for part in zip(*pairs, strict=True))) for pairs in said]
    for (name, _), one in zip(asked, found, strict=True):
        if not (one.clean_NK.isfinite().all() and one.adv_NK.isfinite().all()):
            raise DataError(f"{name}: its answers to some images are not finite: it can teach nothing, name another")
    return found


def soft_labels(own: Answers, label_N: Tensor, classes: int) -> SoftLabels:
    """Return how sure a teacher is, of its answers to images attacked through itself."""
    clean_NK, adv_NK = own.clean_NK.softmax(1), own.adv_NK.softmax(1)
    entropy_N = entropy(own.clean_NK)
    return SoftLabels(
        top=float(clean_NK.amax(1).mean()),
        entropy=float(entropy_N.mean()),
        adv_entropy=float(entropy(own.adv_NK).mean()),
        label=float(_of_label(clean_NK, label_N).mean()),
        adv_label=float(_of_label(adv_NK, label_N).mean()),
        same=float((clean_NK.argmax(1) == adv_NK.argmax(1)).double().mean()),
        temperature=best_temperature(own.clean_NK, label_N),
        entropy_by_class=_mean_by_class(entropy_N, label_N, classes),
    )


def hard(clean_NK: Tensor, label_N: Tensor, wrong_N: Tensor, whose: str) -> Hard:
    """Return the teacher's soft labels for the images that are wrong under attack.

    Args:
        clean_NK: the teacher's logits on clean images.
        wrong_N: (N,) bool.
        whose: mistakes these are, in words.
    """
    chosen_NK, label_M, classes = clean_NK[wrong_N], label_N[wrong_N], clean_NK.shape[1]
    p_NK, mean = chosen_NK.softmax(1), float(entropy(chosen_NK).mean())
    return Hard(
        wrong_for=whose,
        images=len(label_M),
        by_class=torch.bincount(label_M, minlength=classes).tolist(),
        entropy=mean,
        share=mean / math.log(classes),
        sure=float((p_NK.amax(1) >= SURE).double().mean()),
        label=float(_of_label(p_NK, label_M).mean()),
    )


def head(network: nn.Module, robust_K: Sequence[float | None]) -> Head | None:
    """Return the norms of the rows of the last linear layer that has one for each class; None where there is none."""
    classes = len(robust_K)
    layers = [
        module for module in network.modules() if isinstance(module, nn.Linear) and module.out_features == classes
    ]
    if not layers:
        return None
    norms_K = layers[-1].weight.detach().cpu().double().norm(dim=1).numpy()
    accuracy_K = np.array([math.nan if accuracy is None else accuracy for accuracy in robust_K])
    known = np.isfinite(accuracy_K)
    varies = known.sum() > 2 and norms_K[known].std() > 0 and accuracy_K[known].std() > 0
    correlation = float(np.corrcoef(norms_K[known], accuracy_K[known])[0, 1]) if varies else math.nan
    return Head(norms=norms_K.tolist(), correlation=correlation)


def against(name: str, of_student: Answers, of_teacher: Answers, label_N: Tensor, classes: int) -> Student:
    """Return what the attacks on a student do to the teacher; both answer to the same attacked images."""
    right_N = of_teacher.clean_NK.argmax(1) == label_N
    fooled_N = right_N & (of_student.adv_NK.argmax(1) != label_N)
    both_N = (of_teacher.adv_NK.argmax(1) != label_N)[fooled_N].double()
    before_NK, after_NK = of_teacher.clean_NK.log_softmax(1), of_teacher.adv_NK.log_softmax(1)
    same_N = of_student.clean_NK.argmax(1) == of_teacher.clean_NK.argmax(1)
    return Student(
        network=name,
        clean=float((of_student.clean_NK.argmax(1) == label_N).double().mean()),
        robust=_report(of_student, label_N, classes, attacked=True)["average"],
        agreement=float(same_N.double().mean()),
        fooled=int(fooled_N.sum()),
        transfer=float(both_N.mean()),
        transfer_by_class=_mean_by_class(both_N, label_N[fooled_N], classes),
        moved=float(F.kl_div(after_NK, before_NK, reduction="batchmean", log_target=True)),
    )


def entropy(logits_NK: Tensor) -> Tensor:
    """Return the entropy of each row's softmax in nats, (N,)."""
    log_p_NK = logits_NK.log_softmax(1)
    return -(log_p_NK.exp() * log_p_NK).sum(1)


def best_temperature(logits_NK: Tensor, label_N: Tensor) -> float:
    """Return the temperature at which the cross-entropy against the labels is least, among `TEMPERATURES`."""

    def cost(log_t: float) -> float:
        return float(F.cross_entropy(logits_NK / math.exp(log_t), label_N))

    low, high = map(math.log, TEMPERATURES)
    found: Any = minimize_scalar(cost, bounds=(low, high), method="bounded")
    return math.exp(found.x)


def _report(own: Answers, label_N: Tensor, classes: int, *, attacked: bool) -> dict[str, Any]:
    """Return the report by class; what is wrong clean is wrong under attack too, as in an evaluation."""
    clean_N = own.clean_NK.argmax(1)
    given_N = torch.where(clean_N == label_N, own.adv_NK.argmax(1), clean_N) if attacked else clean_N
    return by_class(given_N.numpy(), label_N.numpy(), classes)


def _of_label(p_NK: Tensor, label_N: Tensor) -> Tensor:
    return p_NK.gather(1, label_N[:, None])[:, 0]


def _mean_by_class(value_N: Tensor, label_N: Tensor, classes: int) -> list[float]:
    """Return the mean of each class's images; NaN where there are none."""
    total_K = torch.zeros(classes, dtype=torch.float64).index_add_(0, label_N, value_N)
    return (total_K / torch.bincount(label_N, minlength=classes)).tolist()
