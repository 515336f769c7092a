"""PeerAiD: a peer, trained beside the student on the student's attacked images, teaches it (Jung et al., CVPR 2024).

peer     min  g1 CE(P(x'), y) + g2 KL(S(x') || P(x'))
student  min  l1 CE(S(x'), y) + l2 T^2 KL(P(x'; T) || S(x'; T)) + l3 T^2 KL(S(x; T) || S(x'; T))

x' = argmax KL(P(x) || S(x')) in the eps ball. S(x; T) = softmax(student(x) / T), P likewise. The student has a gradient
wherever it stands, in the peer's loss too; the peer has none in the student's.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from retemper.engine import Forwards, KlObjective, Method, Targets, given, kl_rows, option, run_recipe
from retemper.kernels import class_temperature_kl
from retemper.recipes.settings import BY_PGD_10, ON_DIGITS, adversarial_training


@dataclass(frozen=True, kw_only=True)
class PeerAid(Method):
    # released: the student looks at the attacked images twice, and the epoch is that of the average that is best on the
    # test images under PGD-10; fp32. What stays different: the batch-norm statistics of the average are averaged as the
    # weights are, not measured again on the training images.
    variants: ClassVar[tuple[str, ...]] = ("paper", "released")
    variant_options: ClassVar[Mapping[str, Mapping[str, Any]]] = {"released": BY_PGD_10}
    released_forwards: ClassVar[Forwards] = Forwards(("adv", "adv", "clean"))
    hard_labels: ClassVar[bool] = True
    trains_peer: ClassVar[bool] = True
    peer_label_weight: float = option(1.0, "weight of the peer's cross-entropy (g1)", at_most=1000)
    peer_soft_weight: float = option(0.1, "weight of the student's answers in the peer's loss (g2)", at_most=1000)
    label_weight: float = option(0.0, "weight of the student's cross-entropy (l1)", at_most=1000)
    soft_weight: float = option(1.0, "weight of the peer's answers (l2)", at_most=1000)
    clean_weight: float = option(1.0, "weight of the student's own answers to clean images (l3)", at_most=1000)
    temperature: float = option(5.0, "temperature of the student's loss (T)", positive=True, at_most=1000)
    kl_scale: float = option(
        0.1, "factor on the divergences; the authors average over the classes: a tenth for 10", at_most=1000
    )

    def objective(self, targets: Targets) -> KlObjective:
        return KlObjective(given(targets.peer_BK), targets.label_B)

    def smooths_labels(self) -> bool:
        return self.peer_label_weight > 0 or self.label_weight > 0

    def loss(self, logits: Mapping[str, Tensor], targets: Targets) -> Tensor:
        adv_BK, peer_BK = logits["adv"], given(targets.peer_adv_BK)
        peer_B = self.peer_label_weight * targets.cross_entropy_rows(peer_BK)
        peer_B = peer_B + self.peer_soft_weight * self.kl_scale * kl_rows(adv_BK, peer_BK)
        student_B = self.soft_weight * self.tempered(peer_BK.detach(), adv_BK)
        student_B = student_B + self.clean_weight * self.tempered(logits["clean"], adv_BK)
        if self.label_weight:
            student_B = student_B + self.label_weight * targets.cross_entropy_rows(adv_BK)
        return (peer_B + student_B).mean()

    def tempered(self, of_BK: Tensor, adv_BK: Tensor) -> Tensor:
        """Return T^2 KL(of || adv) of each image at the temperature T, scaled, (B,); differentiable in both."""
        t = self.temperature
        kl_B = class_temperature_kl(adv_BK, of_BK, temperature=t, student_temperature=t, reduction="none")
        return self.kl_scale * t * t * kl_B


AUTHORS: dict[str, Any] = dict(
    epochs=300, lr_drops=(214, 259, 284), select_always_from=214, average="swa", average_every="epoch", average_from=215
)
SHORT = dict(kl_scale=1.0)  # one or two thousand steps are too few for a tenth of the divergences
SETTINGS = adversarial_training(
    PeerAid,
    AUTHORS,
    ON_DIGITS,
    digits=SHORT | dict(average_from=15),  # from the first drop on, as the authors' average
    small=SHORT | dict(average_from=8),
    fashion_mnist_resnet18=dict(average_from=44),
    imagenet100_resnet18=dict(average_from=31),
    cifar100_resnet18=dict(peer_soft_weight=1.0, kl_scale=0.01),
    tiny_imagenet_preact_resnet18=dict(
        peer_soft_weight=100.0,
        label_weight=0.035,
        soft_weight=35.0,
        clean_weight=20.0,
        temperature=1.0,
        kl_scale=0.005,
        epochs=200,
        lr_drops=(99, 149),
        average_from=100,
        select_always_from=99,
    ),
)

if __name__ == "__main__":
    run_recipe(__file__)
