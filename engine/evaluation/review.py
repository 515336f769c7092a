"""All that this library can ask of one network: `retemper evaluate --review`."""

from dataclasses import replace

from retemper.engine.evaluation.norms import NORMS
from retemper.engine.evaluation.protocols import CURVE
from retemper.engine.evaluation.request import WITHOUT_STEPS, EvaluationRequest, require_effect
from retemper.errors import UsageError

ATTACKS = ("clean", "fgsm", "pgd20", "cw", "autoattack")
OF_CURVES = ("clean", "pgd20", "autoattack")
CHOSEN = ("attacks", "protocol", "norm", "eps", "suite", "shard", "budget_s", "cross_check", "check", "corruptions")


def review(request: EvaluationRequest) -> tuple[EvaluationRequest, ...]:
    """Return the evaluations of a review, in order; what is done of one is left as it is.

    The first is at the usual radius in L-inf: all attacks, the cross-checks, the search for masked gradients and the
    corruptions. The others are curves over the radius, one a norm, with the cross-checks at each radius.

    Args:
        request: the network, the images, and how they are attacked. What a review chooses is as it was by default.
    Raises:
        UsageError: the request chooses something itself, or FMN's library is missing.
    """
    usual = EvaluationRequest(target=request.target, device=request.device, facts=request.facts)
    for name in CHOSEN:
        if getattr(request, name) != getattr(usual, name):
            word = name.removesuffix("_s").replace("_", "-")
            raise UsageError(f"--review chooses attacks, radii and norms itself: leave out --{word}")
    whole = replace(request, attacks=ATTACKS, cross_check=True, goes_on=True)
    curves = [
        replace(whole, norm=norm, eps=CURVE, attacks=tuple(a for a in OF_CURVES if norm != "l1" or a in WITHOUT_STEPS))
        for norm in NORMS
    ]
    asked = (replace(whole, check=True, corruptions=True), *curves)
    for one in asked:
        require_effect(one)
    return asked
