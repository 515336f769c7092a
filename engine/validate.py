"""How the student fares on held-out training images, class by class: what FRL and WAT move their weights by."""

import torch
from torch import Tensor, nn

from retemper.engine.attack import cross_entropy_objective, pgd
from retemper.engine.evaluate import as_float, exact_fp32
from retemper.engine.recipe import Recipe
from retemper.engine.seen import ClassMeans, ClassSums, HeldOut
from retemper.kernels import class_sums, class_temperature_kl
from retemper.loaders import Split


def validate(
    model: nn.Module, recipe: Recipe, split: Split, num_classes: int, device: torch.device, batch_size: int = 256
) -> HeldOut:
    """`model` on the images of `split`, clean and under PGD on the cross-entropy (`select_steps` steps of eps/4)."""
    clean_sums, adv_sums = (ClassSums.zeros(num_classes, device) for _ in range(2))
    boundary = ClassMeans.zeros(num_classes, 1, device)
    ones_K = torch.ones(num_classes, device=device)
    label_N = torch.from_numpy(split.labels)
    model.eval()
    with exact_fp32():
        for batch in torch.arange(len(split)).split(batch_size):
            label_B, clean = label_N[batch].to(device), as_float(split, batch, device)
            adv = pgd(
                model,
                clean,
                objective=cross_entropy_objective(label_B),
                steps=recipe.select_steps,
                step=recipe.eps / 4,
                eps=recipe.eps,
                start="uniform",
                seed=int(batch[0]),
            )
            with torch.no_grad():
                logits: list[Tensor] = [model(clean), model(adv)]
            clean_sums.add(*class_sums(logits[0], label_B, num_classes))
            adv_sums.add(*class_sums(logits[1], label_B, num_classes))
            boundary.add(class_temperature_kl(logits[1], logits[0], label_B, ones_K, reduction="none"), label_B)
    return HeldOut(
        clean_accuracy_K=clean_sums.accuracy_K,
        robust_accuracy_K=adv_sums.accuracy_K,
        clean_loss_K=clean_sums.mean_loss_K,
        boundary_loss_K=boundary.mean_K,
    )
