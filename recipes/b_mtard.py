"""B-MTARD: MTARD whose two teachers are kept equally sure of themselves by temperatures (Zhao et al., TPAMI 2024).

min  (1 - w) KL(T(x'; t) || S(x')) + w KL(C(x; c) || S(x))   where   x' = argmax CE(S(x'), y) in the eps ball

T(x; t) = softmax(teacher(x) / t). w moves as in MTARD. After every step, H the mean entropy over the batch:

t <- clip(t - rate sign(H(T(x'; t)) - H(C(x; c))), 1, 10),   c <- clip(c + the same, 1, 10)
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from retemper.engine import EpochStats, Recipe, Targets, given, option, require_order, run_recipe
from retemper.kernels import class_temperature_kl
from retemper.recipes.mtard import Mtard
from retemper.recipes.settings import ON_DIGITS, distillation


def mean_entropy(logits_BK: Tensor, temperature: Tensor) -> Tensor:
    """Return the mean entropy of softmax(logits / temperature), in nats; `temperature` is (1,) float32."""
    log_p_BK = (logits_BK / temperature).log_softmax(1)
    return -(log_p_BK.exp() * log_p_BK).sum(1).mean()


@dataclass(frozen=True, kw_only=True)
class BMtard(Mtard):
    # The authors' code writes w's rule otherwise: ratios over their mean, both weights moved, kept above 0 and made to
    # add up to 1. It comes to the same.
    temperature_rate: float = option(
        0.001, "how far a temperature moves in a step; falls with the learning rate", at_most=100
    )
    temperature_lower: float = option(1.0, "the lowest temperature", positive=True, at_most=1000)
    temperature_upper: float = option(10.0, "the highest temperature", positive=True, at_most=1000)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_order(self, "temperature_lower", "temperature_upper")

    def class_state(self, num_classes: int, recipe: Recipe) -> dict[str, Tensor]:
        own = {
            "temperature_adv": torch.ones(1),
            "temperature_clean": torch.ones(1),
            "temperature_rate": torch.full((1,), self.temperature_rate),
        }
        return super().class_state(num_classes, recipe) | own

    def task_losses(self, logits: Mapping[str, Tensor], targets: Targets) -> tuple[Tensor, Tensor]:
        num_classes = logits["adv"].shape[1]
        adv_K, clean_K = (targets.state[f"temperature_{name}"].repeat(num_classes) for name in ("adv", "clean"))
        adv = class_temperature_kl(logits["adv"], given(targets.teacher_adv_BK), targets.label_B, adv_K)
        clean = class_temperature_kl(logits["clean"], given(targets.clean_teacher_BK), targets.label_B, clean_K)
        return self.kl_scale * adv, self.kl_scale * clean

    def after_step(self, state: Mapping[str, Tensor], logits: Mapping[str, Tensor], targets: Targets) -> None:
        super().after_step(state, logits, targets)
        adv, clean = state["temperature_adv"], state["temperature_clean"]
        adv_entropy = targets.part.mean(mean_entropy(given(targets.teacher_adv_BK), adv))
        clean_entropy = targets.part.mean(mean_entropy(given(targets.clean_teacher_BK), clean))
        move = state["temperature_rate"] * torch.sign(adv_entropy - clean_entropy)
        adv.copy_((adv - move).clamp(self.temperature_lower, self.temperature_upper))
        clean.copy_((clean + move).clamp(self.temperature_lower, self.temperature_upper))

    def next_class_state(
        self, state: Mapping[str, Tensor], stats: EpochStats, epoch: int, recipe: Recipe
    ) -> dict[str, Tensor]:
        rate = torch.full_like(state["temperature_rate"], self.temperature_rate * recipe.optim.decay(epoch))
        return super().next_class_state(state, stats, epoch, recipe) | {"temperature_rate": rate}


# one or two thousand steps are too few for a tenth of the loss, and for a thousandth a step
SHORT = dict(kl_scale=1.0, temperature_rate=0.01)
SETTINGS = distillation(BMtard, status=ON_DIGITS, digits=SHORT, fashion_mnist_small=SHORT)

if __name__ == "__main__":
    run_recipe(__file__)
