"""ABSLD: a temperature per class on the soft labels, moved until classes fare alike (Zhao et al., NeurIPS 2024).

min  a KL(T(x; t_adv[y]) || S(x')) + (1 - a) KL(T(x; t_clean[y]) || S(x))   where   x' maximises the first term's KL

T(x; t) = softmax(teacher(x) / t). After each epoch a class that costs the student more than the mean gets a lower
temperature, a sharper label, and one that costs less a higher one:

t[k] <- clip(t[k] - rate * g[k] / max|g|, 1/2, 5)   where   g[k] = L[k] - mean L,  L[k] the class's cross-entropy
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from retemper.engine import EpochStats, KlObjective, Recipe, Targets, option, require_order, run_recipe
from retemper.kernels import class_temperature_kl
from retemper.recipes.igdm import Igdm
from retemper.recipes.settings import JUDGED_ON_TEST, ON_BOTH, distillation


def class_gap(loss_K: Tensor) -> Tensor:
    """Return g / max|g| above, (K,) in [-1, 1]: 0 where all losses are equal."""
    gap_K = loss_K - loss_K.mean()
    largest = gap_K.abs().max()
    return torch.where(largest > 0, gap_K / largest, torch.zeros_like(gap_K))


def next_temperature(
    temperature_K: Tensor, loss_K: Tensor, rate: float, lower: float = 0.5, upper: float = 5.0
) -> Tensor:
    """Return the temperatures after one epoch, by the rule above.

    Args:
        temperature_K: (K,) float.
        loss_K: (K,) float, the mean losses. Where they are equal, every temperature stays where it is.
        rate: the most that a temperature moves.
    Returns:
        (K,), like `temperature_K`.
    Raises:
        ValueError: the two differ in shape.
    """
    if temperature_K.shape != loss_K.shape:
        raise ValueError(f"temperature_K has shape {tuple(temperature_K.shape)}, loss_K {tuple(loss_K.shape)}")
    return (temperature_K - rate * class_gap(loss_K).to(temperature_K.dtype)).clamp(lower, upper)


@dataclass(frozen=True, kw_only=True)
class Absld(Igdm):
    # paper: separate temperatures for the two terms. released: the authors' code divides one storage twice in place, so
    # that the attack and both terms see the teacher at the product t_adv[y] * t_clean[y]. It takes a class's sum of the
    # cross-entropy, which is wrong where classes differ in size; and their split, their choice, and fp32.
    variants: ClassVar[tuple[str, ...]] = ("paper", "released")
    variant_options: ClassVar[Mapping[str, Mapping[str, Any]]] = {"released": JUDGED_ON_TEST}
    adv_weight: float = option(5 / 6, "weight of the attacked term (a)", at_most=1)
    kl_scale: float = option(0.1, "factor on the loss; the authors average over 10 classes", at_most=1000)
    temperature_rate: float = option(
        0.1, "the most that a temperature moves in an epoch; falls with the learning rate", at_most=100
    )
    temperature_lower: float = option(0.5, "the lowest temperature", positive=True, at_most=1000)
    temperature_upper: float = option(5.0, "the highest temperature", positive=True, at_most=1000)
    manual_temperatures: tuple[float, ...] = option(
        (), "a fixed temperature for each class, 1,1,0.8,..., and no rule", positive=True, at_most=1000
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require_order(self, "temperature_lower", "temperature_upper")

    def class_state(self, num_classes: int, recipe: Recipe) -> dict[str, Tensor]:
        start = self.manual_temperatures or (1.0,) * num_classes
        if len(start) != num_classes:
            raise ValueError(f"manual_temperatures: there are {len(start)}, and {num_classes} classes")
        own = {name: torch.tensor(start).float() for name in ("temperature_adv", "temperature_clean")}
        return super().class_state(num_classes, recipe) | own

    def temperatures(self, state: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the temperatures of the adversarial term and of the clean one, each (K,)."""
        adv_K, clean_K = state["temperature_adv"], state["temperature_clean"]
        return (adv_K * clean_K, adv_K * clean_K) if self.variant == "released" else (adv_K, clean_K)

    def objective(self, targets: Targets) -> KlObjective:
        adv_K, _ = self.temperatures(targets.state)
        return KlObjective(targets.teacher, targets.label_B, adv_K)

    def loss(self, logits: Mapping[str, Tensor], targets: Targets) -> Tensor:
        adv_K, clean_K = self.temperatures(targets.state)
        adv = class_temperature_kl(logits["adv"], targets.teacher, targets.label_B, adv_K, ignore_index=None)
        clean = class_temperature_kl(logits["clean"], targets.teacher, targets.label_B, clean_K, ignore_index=None)
        return self.kl_scale * (self.adv_weight * adv + (1 - self.adv_weight) * clean)

    def next_class_state(
        self, state: Mapping[str, Tensor], stats: EpochStats, epoch: int, recipe: Recipe
    ) -> dict[str, Tensor]:
        moved = super().next_class_state(state, stats, epoch, recipe)
        if self.manual_temperatures:
            return moved
        rate = self.temperature_rate * recipe.optim.decay(epoch)
        bounds = self.temperature_lower, self.temperature_upper
        for name, sums in stats.forwards.items():
            loss_K = sums.loss_K if self.variant == "released" else sums.mean_loss_K
            moved[f"temperature_{name}"] = next_temperature(state[f"temperature_{name}"], loss_K, rate, *bounds)
        return moved


# one or two thousand steps are too few for the authors' tenth of the loss, ten or twenty epochs for their rate
SHORT = dict(kl_scale=1.0, temperature_rate=0.3)
SETTINGS = distillation(Absld, status=ON_BOTH, digits=SHORT, small=SHORT)

if __name__ == "__main__":
    run_recipe(__file__)
