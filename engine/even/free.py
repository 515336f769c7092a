"""Evening without training: the last layer's rows or its bias are changed, and judged on held-out images."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from retemper.console import Progress, say
from retemper.engine.even.head import POWERS, ROUNDS, Round, evened_rows, fit_bias
from retemper.engine.even.subject import FREE, Subject
from retemper.engine.predict import Attack, attacked_batches, folded_twin
from retemper.errors import UsageError

FITTING = Attack(loss="margin", steps=10)  # under which a bias is fitted


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A last layer, changed.

    Attributes:
        by: how, one of `FREE`.
        weight_KD, bias_K: of the layer; no bias where it has none.
        rounds: of the fit of a bias.
        report: how the network does with it on the images that choose.
    """

    by: str
    weight_KD: Tensor
    bias_K: Tensor | None
    rounds: list[Round] = field(default_factory=list)
    report: dict[str, Any]

    @property
    def score(self) -> float:
        """The average + worst class, by which the best is chosen, as an epoch of a run is."""
        return self.report["average"] + self.report["worst"]

    @property
    def chosen_round(self) -> int:
        """The round of the fit that was kept, from 0, the first with the best score; 0 where there was no fit."""
        return max(range(len(self.rounds)), key=lambda number: self.rounds[number].score, default=0)


def candidates(subject: Subject, head: nn.Linear) -> list[Candidate]:
    """Return the last layers that the request asks for, each judged; the network's own, `head`, is left as it was.

    Raises:
        UsageError: it has no bias, and that is asked for.
    """
    asked = subject.request.by
    if head.bias is None and asked in (None, "bias"):
        why = f"the last layer of {subject.name} has no bias"
        if asked:
            raise UsageError(f"{why}: even it by norm or by half")
        say(f"note: {why}: norm and half are tried")
    ways = [by for by in FREE if asked in (None, by) and (by != "bias" or head.bias is not None)]
    return [_candidate(subject, head, by) for by in ways]


def put_into(head: nn.Linear, weight_KD: Tensor, bias_K: Tensor | None) -> None:
    """Give a layer these numbers."""
    with torch.no_grad():
        head.weight.copy_(weight_KD)
        if bias_K is not None:
            head.bias.copy_(bias_K)


def _candidate(subject: Subject, head: nn.Linear, by: str) -> Candidate:
    before = head.weight.detach().clone(), None if head.bias is None else head.bias.detach().clone()
    weight_KD, bias_K = before
    rounds: list[Round] = []
    if by == "bias":
        rounds = _rounds(subject, head)
        assert bias_K is not None
        bias_K = bias_K + max(rounds, key=lambda one: one.score).shift_K.to(bias_K)
    else:
        weight_KD = evened_rows(weight_KD, POWERS[by])
    put_into(head, weight_KD, bias_K)
    try:
        report = subject.judged(subject.model)
    finally:
        put_into(head, *before)
    return Candidate(by=by, weight_KD=weight_KD, bias_K=bias_K, rounds=rounds, report=report)


def _rounds(subject: Subject, head: nn.Linear) -> list[Round]:
    """Fit the numbers of a bias on training images, attacked anew in every round."""
    fit, device, eps = subject.images.fit, subject.request.device, subject.found.recipe.attack.eps
    with Progress("the bias", ROUNDS + 1) as progress:

        def attacked() -> Tensor:
            perturb = FITTING.on(folded_twin(subject.model, device), eps)
            batches = attacked_batches(subject.model, fit, perturb, device=device)
            logits_NK = torch.cat([batch.adv_BK for batch in batches])
            progress.advance(1)
            return logits_NK

        return fit_bias(head, attacked, torch.from_numpy(fit.labels).to(device))
