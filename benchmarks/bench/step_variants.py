"""The variants of our training step: each thing that makes it fast added to the others, and all of them but one."""

from dataclasses import dataclass
from typing import Any

from retemper.bench.step_problem import StepProblem
from retemper.engine.recipe import Recipe

AHEAD = 8  # batches that the teacher is asked about at once
NO_GRAPH = "CUDA graphs need a GPU"


@dataclass(frozen=True)
class Variant:
    """A variant of our step: one or more options changed.

    Attributes:
        changes: fields of the recipe.
        exactness: of the change.
        gpu: why it is left out on a CPU; None where it is not.
        logits: who gives the teacher's logits: the "step", the teacher for AHEAD batches at once ("ahead"), or a
            "table".
    """

    name: str
    changes: dict[str, Any]
    exactness: str
    gpu: str | None = None
    logits: str = "step"


ADDITIONS = (  # each to the one before
    Variant("vectorised", {}, "rounding"),
    Variant("+ channels-last", dict(channels_last=True), "rounding"),
    Variant(
        "+ bf16", dict(precision="bf16"), "lower precision", "bf16 is slower than fp32 on a CPU without matrix units"
    ),
    Variant("+ fused SGD", dict(fused_sgd=True), "rounding"),
    Variant("+ folded batch norm", dict(fold=True), "rounding"),
    Variant("+ fused epilogues", dict(epilogue="fused"), "rounding", "on a CPU convolutions add their bias themselves"),
    Variant("+ epilogues in cuDNN's call", dict(epilogue="convolution"), "rounding", "a CPU has no cuDNN"),
    Variant("+ forwards together", dict(together="on"), "rounding", "on a CPU it saves no launch"),
    Variant("+ CUDA graph", dict(capture="on"), "bitwise", NO_GRAPH),
    Variant(f"+ teacher for {AHEAD} batches at once", {}, "rounding", logits="ahead"),
    Variant("+ table, every view known", {}, "rounding", logits="table"),
)
OTHERWISE = (  # all additions but for one thing, asking the teacher in each step
    Variant("all but channels-last", dict(channels_last=False), "rounding"),
    Variant("all but bf16", dict(precision="fp32"), "rounding", "not used on a CPU"),
    Variant("all but fused SGD, and the graph that needs it", dict(fused_sgd=False, capture="off"), "rounding"),
    Variant("all but folded batch norm", dict(fold=False, epilogue="plain"), "rounding"),
    Variant("all but fused epilogues", dict(epilogue="plain"), "rounding", "not used on a CPU"),
    Variant("all but epilogues in cuDNN's call", dict(epilogue="fused"), "rounding", "not used on a CPU"),
    Variant("all but forwards together", dict(together="off"), "rounding", "not used on a CPU"),
    Variant("all but the graph", dict(capture="off"), "bitwise", "not used on a CPU"),
    Variant("with IGDM", dict(igdm=1e-9), "different algorithm"),  # whose weight no time depends on
    Variant("the teacher beside the attack", dict(beside=True), "bitwise", "on a CPU nothing is beside"),
    Variant("twin compiled instead of fused", dict(epilogue="compiled"), "rounding"),
)


def changed(problem: StepProblem, recipe: Recipe, variant: Variant) -> Recipe:
    """Return the recipe with the variant's changes, if they are for this device."""
    possible = variant.gpu is None or problem.request.on_gpu
    return recipe.replace(**variant.changes) if possible else recipe


def whole(problem: StepProblem, captured: bool = True) -> Recipe:
    """Return the recipe with all additions, asking the teacher in each step."""
    recipe = problem.recipe
    for variant in ADDITIONS:
        if captured or "capture" not in variant.changes:
            recipe = changed(problem, recipe, variant)
    return recipe
