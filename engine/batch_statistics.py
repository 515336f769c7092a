"""Batch norm's statistics measured anew, for the network that is evaluated and kept.

    mean, var <- means, over whole batches, of each batch's mean and variance

The running ones follow the last ten batches or so, augmented, each kind of image in turn, under weights that have moved
since. These are of training images as they are, attacked as in training through the network with its running ones, each
kind that the method forwards once: precise batch norm (Wu & Johnson, arXiv 2105.07576), for attacked images as well.
Dimension key: B batch.
"""

import copy
from dataclasses import replace

import torch
from torch import nn

from retemper.engine.evaluation.evaluate import as_float, exact_fp32, folded_twin
from retemper.engine.parallel.ranks import WHOLE
from retemper.engine.recipe import Recipe
from retemper.engine.speed.fold import BATCH_NORM
from retemper.engine.step import State, attack, observe, observe_attacked
from retemper.loaders import Split


def with_measured_statistics(state: State, recipe: Recipe, split: Split) -> nn.Module:
    """What `state` keeps, copied, in eval mode, with the statistics of `split`'s images; no other tensor is touched.

    Every process measures the same. What fills no batch of `recipe.batch_size` is left out, unless there is no other.
    """
    device = state.ones_K.device
    measured = copy.deepcopy(state.kept)
    norms = [module for module in measured.modules() if isinstance(module, BATCH_NORM)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean over batches
    state = replace(state, part=WHOLE, noise_seed=torch.zeros_like(state.noise_seed))
    recipe = replace(recipe, attack_bn="eval")  # the running statistics of what is attacked stay
    attacked = folded_twin(state.kept.eval(), device) if recipe.fold else state.kept.eval()
    measured.train()
    label_N = torch.from_numpy(split.labels)
    with exact_fp32():
        for batch in torch.arange(len(split)).split(recipe.batch_size):
            if len(batch) < min(recipe.batch_size, len(split)):
                break
            label_B, clean = label_N[batch].to(device), as_float(split, batch, device)
            targets = observe(state, recipe, attacked, clean, label_B, None)
            adv = attack(state, recipe, attacked, clean, targets)
            images = recipe.images(clean, adv, observe_attacked(state, recipe, adv, targets))
            with torch.no_grad():
                for name in recipe.forwards:
                    measured(images[name])
            state.noise_seed += 1
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return measured.eval()
