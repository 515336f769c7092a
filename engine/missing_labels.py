"""Labels of images that have none: the teacher's answer to the clean image stands in for them.

Such images come from a pool (`retemper.loaders.mixed`) and are marked by -1. Class sums leave them out, since they add
nothing for what is no class. Dimension key: B batch, C channels, H, W, K classes.
"""

import torch
from torch import Tensor

from retemper.engine.recipe import Recipe
from retemper.engine.state import State


def stand_in(
    state: State, recipe: Recipe, clean_BCHW: Tensor, label_B: Tensor, teacher_BK: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return labels with the teacher's first largest logit in place of -1, and the teacher's logits, if they are known.

    No value is read on the host. A teacher whose answers to clean images the method has no use for is asked all the
    same: one forward of it a step more.

    Args:
        clean_BCHW, label_B, teacher_BK: as for `train_step`.
    Raises:
        ValueError: there is no teacher.
    """
    if state.teacher is None:
        raise ValueError("label: -1 stands for a label that the teacher gives, and this method has no teacher")
    if teacher_BK is None:
        with torch.no_grad(), state.autocast():
            teacher_BK = state.teacher(clean_BCHW)
    assert teacher_BK is not None
    label_B = torch.where(label_B < 0, teacher_BK.argmax(1), label_B)
    return label_B, teacher_BK if "clean" in recipe.method.shown_to_teacher() else None
