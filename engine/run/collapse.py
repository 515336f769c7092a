"""The guard of training attacks in one step: it tells when a student has learned that attack alone.

Such training may collapse within an epoch (catastrophic overfitting; Wong et al., ICLR 2020): the student is right
under the one step that it is trained on, and wrong under several. After each epoch the guard holds its accuracy under
the training's own attack against that under ten steps within the same radius, on the same images. Where they part, the
epochs to come take more steps: two, then three, then ten. A student that collapsed recovers under them (Li et al.,
arXiv 2006.03089), so no epoch is taken back; the choice of the best epoch keeps the network from before.

Dimension key: B batch, C channels, H, W, K classes.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from retemper.engine.attack import ascend
from retemper.engine.attack_plan import Plan
from retemper.engine.distributed.ranks import WHOLE, Ranks
from retemper.engine.groups import harder
from retemper.engine.losses import cross_entropy_objective
from retemper.engine.maximise import attack
from retemper.engine.predict import Perturb, attacked_batches, balanced_order, folded_twin, predicted
from retemper.engine.recipe import Recipe
from retemper.engine.run.data import TrainingData
from retemper.engine.state import State
from retemper.engine.step import observe
from retemper.engine.targets import Targets
from retemper.loaders import Split, middle, split_of_arrays

IMAGES = 500  # as many of each class as there can be
CLEAR = 0.1  # how far two accuracies of so few images must lie apart to mean anything: over 3 standard errors
JUDGED_STEPS = 10


class CollapseGuard:
    """Watches one run. It looks at images held out of training, or at training images where none are.

    Args:
        ranks: the processes, which share the images out and come to the same result.
    """

    def __init__(self, recipe: Recipe, state: State, data: TrainingData, ranks: Ranks) -> None:
        self.recipe, self.state, self.ranks = recipe, state, ranks
        self.images = _images(data)
        self.order = balanced_order(self.images.labels, IMAGES)

    def look(self) -> dict[str, Any]:
        """Return how the student does under the attack in force, and the attack to go on with.

        Returns:
            "attack", "next": what is in force, and what is from now on; "own", "pgd10": the share of images that the
            student is right on under the attack in force, and under ten steps. Empty where more steps are not known.
        """
        now = self.state.attack_now(self.recipe)
        more = harder(self.recipe.attack, now)
        if more is None:
            return {}
        own, ten = self._own_accuracy(), self._accuracy_in_ten_steps()
        parted = ten < self.recipe.attack.guard_share * own and own - ten > CLEAR
        if parted:
            self.state.fallback, self.state.prior = more, None
        return {"attack": now.kind, "own": own, "pgd10": ten, "next": more if parted else now.kind}

    def _accuracy_in_ten_steps(self) -> float:
        """Return the accuracy under PGD on the cross-entropy, each image within the radius that its class now has."""
        state, method = self.state, self.recipe.method
        now, network = state.attack_now(self.recipe), folded_twin(state.student.eval(), state.device)

        def perturb(clean: Tensor, _: Tensor, label_B: Tensor, seed: int) -> Tensor:
            eps = method.margins(Targets(label_B=label_B, state=state.class_state), now)[0]
            plan = Plan(steps=JUDGED_STEPS, step=eps / 4, eps=eps, seed=seed)
            return ascend(network, clean, plan, objective=cross_entropy_objective(label_B))

        return self._accuracy(perturb)

    def _own_accuracy(self) -> float:
        """Return the accuracy under the training's attack, without batch statistics: images are looked at once."""
        state, recipe = self.state, self.recipe.replace(attack_bn="eval")
        network = state.student if state.twin is None else state.twin.refresh()

        def perturb(clean: Tensor, _: Tensor, label_B: Tensor, __: int) -> Tensor:
            targets = replace(observe(state, recipe, network, clean, label_B, None), part=WHOLE)
            return attack(state, recipe, network, clean, targets)

        return self._accuracy(perturb)

    def _accuracy(self, perturb: Perturb) -> float:
        """Return the share of images that the student is right on once they are attacked."""
        state = self.state
        options: dict[str, Any] = dict(indices=self.order, device=state.device, ranks=self.ranks, batch_size=self._size)
        right = torch.zeros((), dtype=torch.int64, device=state.device)
        for batch in attacked_batches(state.student, self.images, perturb, **options):
            right += (predicted(batch.adv_BK) == batch.label_B).sum()
        return self.ranks.all_reduce_(right.cpu()).item() / len(self.order)

    @property
    def _size(self) -> int:
        """So many images a batch that every process has some."""
        return min(256, -(-len(self.order) // self.ranks.world_size))


def guard_of(recipe: Recipe, state: State, data: TrainingData, ranks: Ranks) -> CollapseGuard | None:
    """Return the guard of a run; None where the recipe asks for none."""
    chosen = recipe.attack
    wanted = chosen.guard == "on" or (chosen.guard == "auto" and chosen.one_step)
    return CollapseGuard(recipe, state, data, ranks) if wanted else None


def collapse_words(guard: dict[str, Any], is_last: bool) -> str:
    """Return what to say of a look after which more steps are taken, or would be, had the epoch not been the last."""
    own, ten, now, then = (guard[name] for name in ("own", "pgd10", "attack", "next"))
    after = (
        f"this was the last epoch, so begin anew with --attack {then}" if is_last else f"training goes on with {then}"
    )
    return (
        f"the student is right on {own:.1%} of the images looked at under {now}, and on {ten:.1%} under ten steps, "
        f"so it has learned that attack alone: {after}"
    )


def _images(data: TrainingData) -> Split:
    """Return the images that are looked at; training images, where none are held out, are read as they are."""
    if data.held is not None:
        return data.held
    split, positions = data.split, data.loader.plan.indices
    chosen = positions[balanced_order(split.labels[positions], IMAGES)]
    walked = (batch.image.cpu().numpy() for batch in data.loader.walk(chosen))
    images = np.concatenate([middle(one, *split.shape[:2]) for one in walked])
    return split_of_arrays(split.name, "train", images, split.labels[chosen], split.classes, split.fingerprint)
