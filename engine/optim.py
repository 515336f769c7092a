"""What methods do to weights besides descending: averages of them (EMA, SWA), and adversarial perturbation (AWP).

    EMA     average <- decay average + (1 - decay) weights
    SWA     average <- mean of the weights so far                        (Izmailov et al., UAI 2018)
    AWP     weights <- weights + gamma ||w|| g / ||g||, layer by layer   (Wu et al., NeurIPS 2020)

Batch-norm statistics are averaged like weights (as CFA does), not measured again. AWP's gradient is taken at the
perturbed weights and applied to the weights themselves, as is their decay (in the authors' code that of the perturbed).
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from retemper.engine.groups import Optimisation


class Average:
    """The average of a network's weights and statistics.

    Attributes:
        network: it, in eval mode, frozen.
        active: 0-dim; while it is 0 the average is the network itself.
        count: 0-dim, how often it has followed since.
    """

    def __init__(self, student: nn.Module, kind: str, decay: float) -> None:
        self.network = copy.deepcopy(student).eval().requires_grad_(False)
        self.kind, self.decay = kind, decay
        values = self.network.state_dict().values()
        self.real = [value for value in values if value.is_floating_point()]
        self.whole = [value for value in values if not value.is_floating_point()]  # counts of batches
        device = next(student.parameters()).device
        self.active, self.count = torch.zeros(2, device=device)

    @torch.no_grad()
    def follow(self, student: nn.Module) -> None:
        """Take in the student as it is now."""
        share = 1 / (self.count + 1)
        if self.kind == "ema":
            share = torch.where(self.count > 0, 1 - self.decay, share)
        share = torch.where(self.active > 0, share, 1.0)
        now = [*student.state_dict().values()]
        real = [value for value in now if value.is_floating_point()]
        torch._foreach_lerp_(self.real, real, [share] * len(real))
        for count, value in zip(self.whole, (v for v in now if not v.is_floating_point()), strict=True):
            count.copy_(value)
        self.count += self.active

    def skip(self, student: nn.Module) -> None:
        """Leave the student out as it is now; as long as none was taken in, the average is the network itself."""
        if self.count == 0:
            self.network.load_state_dict(student.state_dict())

    def state(self) -> dict[str, Any]:
        """For `load`."""
        return {"network": self.network.state_dict(), "count": self.count}

    def load(self, saved: Mapping[str, Any]) -> None:
        """Go on from a saved state."""
        self.network.load_state_dict(saved["network"])
        self.count.copy_(saved["count"])


def perturb_weights(
    student: nn.Module,
    gamma: Tensor,
    loss: Callable[[], Tensor],
    whole: Callable[[Sequence[Tensor]], Sequence[Tensor]] = list,
) -> dict[nn.Parameter, Tensor]:
    """Move every weight of more than one dimension up the loss, by `gamma` times its norm.

    The forward that `loss` makes leaves the student's statistics alone.

    Args:
        whole: from the gradients of this process's part of a batch to those of the batch.
    Returns:
        What the weights were.
    """
    weights = [parameter for parameter in student.parameters() if parameter.dim() > 1]
    statistics = [(buffer, buffer.clone()) for buffer in student.buffers()]
    gradients = whole(torch.autograd.grad(loss(), weights))
    before = {}
    with torch.no_grad():
        for buffer, value in statistics:
            buffer.copy_(value)
        for weight, gradient in zip(weights, gradients, strict=True):
            before[weight] = weight.clone()
            move = gamma * weight.norm() / (gradient.norm() + 1e-12) * gradient
            weight += torch.where(gradient.isfinite().all(), move, 0)  # one that overflows is not followed
    return before


class Guard:
    """All on the device, written in place.

    Attributes:
        seed: (1,) int64, the noise seed of the first step that was stopped, which tells the step; -1 before.
        loss: 0-dim, that step's loss.
        found_inf: 0-dim float, 1 from then on, as fused optimizers take it.
        poison: 0-dim, NaN from then on, 0 before: added to a loss, it makes a gradient scaler skip the step.
    """

    def __init__(self, device: torch.device) -> None:
        self.seed = torch.full((1,), -1, dtype=torch.int64, device=device)
        self.loss, self.found_inf, self.poison = torch.zeros(3, device=device)

    def look(self, loss: Tensor, gradients: Sequence[Tensor], seed: Tensor) -> None:
        """At a step's loss and gradients before its update; a gradient whose norm overflows is not finite either."""
        finite = loss.isfinite()
        if gradients:
            finite = finite & get_total_norm(gradients).isfinite()
        first = ~finite & (self.seed < 0).view(())
        self.seed.copy_(torch.where(first, seed, self.seed))
        self.loss.copy_(torch.where(first, loss, self.loss))
        self.found_inf.copy_((self.seed >= 0).view(()))
        self.poison.masked_fill_(self.found_inf > 0, torch.nan)


def sgd(options: Optimisation, student: nn.Module, device: torch.device, fused: bool) -> torch.optim.SGD:
    """Return the optimizer of the student's parameters.

    Args:
        fused: one kernel a step. On a GPU the learning rate is then a tensor there, so that a captured step follows the
            schedule.
    """
    return torch.optim.SGD(
        student.parameters(),
        lr=torch.tensor(options.lr, device=device) if device.type == "cuda" and fused else options.lr,
        momentum=options.momentum,
        weight_decay=options.weight_decay,
        nesterov=options.nesterov,
        fused=fused or None,  # with a scaler the fused step alone does not wait for the device
    )
