"""How the weights of a student move: averages of them, adversarial perturbation, the guard of updates, and SGD.

    EMA     average <- decay average + (1 - decay) w              (Tarvainen and Valpola, NeurIPS 2017)
    SWA     average <- mean of w so far                           (Izmailov et al., UAI 2018)
    AWP     w <- w + gamma ||w|| g / ||g||, layer by layer        (Wu et al., NeurIPS 2020)
    SGD     v <- momentum v + g + decay w;   w <- w - lr v        (Nesterov's momentum: Sutskever et al., ICML 2013)

Averages take in batch-norm statistics as they do weights (as CFA does); the statistics are not measured again. AWP's
gradient is taken at the perturbed weights and applied to the weights themselves, as is their decay; the authors' code
decays the perturbed ones, and so does `awp_decay = "perturbed"`.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from retemper.engine.groups import Optimisation


class Average:
    """An average of the weights and batch-norm statistics of a network.

    Args:
        student: the network; the average begins as a copy of it.
        kind: "ema" or "swa".
        decay: of EMA, a fraction of 1.

    Attributes:
        network: the average, in eval mode, frozen.
        active: 0-dim; while it is 0, the average follows the student itself.
        count: 0-dim, how many times the student was taken in since then.
    """

    def __init__(self, student: nn.Module, kind: str, decay: float) -> None:
        self.network = copy.deepcopy(student).eval().requires_grad_(False)
        self.kind, self.decay = kind, decay
        values = self.network.state_dict().values()
        self.real = [value for value in values if value.is_floating_point()]
        self.whole = [value for value in values if not value.is_floating_point()]  # counts of batches
        first = next(student.parameters())
        self.active, self.count = torch.zeros(2, device=first.device, dtype=wide_dtype(first))

    @torch.no_grad()
    def follow(self, student: nn.Module) -> None:
        """Take in the student as it is now. Counts of batches are copied."""
        share = 1 / (self.count + 1)
        if self.kind == "ema":
            share = torch.where(self.count > 0, 1 - self.decay, share)
        share = torch.where(self.active > 0, share, 1.0)
        now = [*student.state_dict().values()]
        real = [value for value in now if value.is_floating_point()]
        torch._foreach_lerp_(self.real, real, [share] * len(real))  # pyright: ignore[reportPrivateImportUsage]
        for count, value in zip(self.whole, (v for v in now if not v.is_floating_point()), strict=True):
            count.copy_(value)
        self.count += self.active

    def skip(self, student: nn.Module) -> None:
        """Leave the student out as it is now. While nothing was taken in, the average is the student itself."""
        if self.count == 0:
            self.network.load_state_dict(student.state_dict())

    def state(self) -> dict[str, Any]:
        """Return what `load` takes: tensors, and dictionaries of them."""
        return {"network": self.network.state_dict(), "count": self.count}

    def load(self, saved: Mapping[str, Any]) -> None:
        """Go on from a saved state, in place."""
        self.network.load_state_dict(saved["network"])
        self.count.copy_(saved["count"])


def wide_dtype(weight: Tensor) -> torch.dtype:
    """Return the dtype of what is computed beside a network of such weights: float64 where they are, or float32."""
    return torch.float64 if weight.dtype is torch.float64 else torch.float32


def perturb_weights(
    student: nn.Module,
    gamma: Tensor,
    loss: Callable[[], Tensor],
    whole: Callable[[Sequence[Tensor]], Sequence[Tensor]] = list,
) -> dict[nn.Parameter, Tensor]:
    """Move every weight of two dimensions or more up the gradient of a loss, by `gamma` times its norm (AWP).

    Args:
        gamma: 0-dim, on the device of the student.
        loss: runs the student and returns a 0-dim loss; what it does to batch-norm statistics is undone.
        whole: turns the gradients of this process's rows into those of the whole batch.
    Returns:
        Each weight that moved, with a copy of its value before.
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
            weight += torch.where(gradient.isfinite().all(), move, 0)  # an overflow moves nothing
    return before


@torch.no_grad()
def put_back(before: Mapping[nn.Parameter, Tensor], decay: float, scaler: torch.amp.GradScaler) -> None:
    """Give perturbed weights the values of before, `perturb_weights`, once their gradients are known.

    Args:
        decay: the weight decay where it is that of the perturbed weights: what it lacks is added to the gradients.
    """
    for weight, value in before.items():
        if decay and weight.grad is not None:
            weight.grad += scaler.scale(decay * (weight - value))
        weight.copy_(value)


class Guard:
    """Finds the first step whose loss or gradient is not finite, and stops its update and all later ones.

    Every attribute is a tensor on the device that is written in place, so that no step waits for the device and a CUDA
    graph may hold it.

    Attributes:
        seed: (1,) int64, the noise seed of that step, which identifies it; -1 before.
        loss: 0-dim float32, that step's loss.
        found_inf: 0-dim float32, 1 from that step on and 0 before; fused optimizers skip their update at 1.
        poison: 0-dim float32, NaN from that step on and 0 before; added to a loss, it makes a gradient scaler skip the
            update.
    """

    def __init__(self, device: torch.device) -> None:
        self.seed = torch.full((1,), -1, dtype=torch.int64, device=device)
        self.loss, self.found_inf, self.poison = torch.zeros(3, device=device)

    def look(self, loss: Tensor, gradients: Sequence[Tensor], seed: Tensor) -> None:
        """Check a step before its update.

        Args:
            loss: 0-dim.
            gradients: of any shapes; one whose norm overflows is not finite either.
            seed: (1,) int64, the step's noise seed.
        """
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
