"""How the weights of a student move: averages of them, adversarial perturbation, the guard of updates, the optimizer.

    EMA     average <- decay average + (1 - decay) w              (Tarvainen and Valpola, NeurIPS 2017)
            with a warm-up, decay = min(decay, (1 + t) / (10 + t)) after t updates (Wang et al., ICML 2023)
    SWA     average <- mean of w so far                           (Izmailov et al., UAI 2018)
    AWP     w <- w + gamma ||w|| g / ||g||, layer by layer        (Wu et al., NeurIPS 2020)
    SGD     v <- momentum v + g + decay w;   w <- w - lr v        (Nesterov's momentum: Sutskever et al., ICML 2013)
    AdamW   w <- w - lr decay w - lr m / (sqrt v + 1e-8)          (Loshchilov and Hutter, ICLR 2019)

Averages take in batch-norm statistics as they do weights (as CFA does); the statistics are not measured again. AWP's
gradient is taken at the perturbed weights and applied to the weights themselves, as is their decay; the authors' code
decays the perturbed ones, and so does `awp_decay = "perturbed"`.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from retemper.engine.groups import Optimisation
from retemper.kernels.guard import guard_
from retemper.kernels.moved_weights import follow_, perturb_


class Average:
    """An average of the weights and batch-norm statistics of a network.

    Args:
        student: the network; the average begins as a copy of it.
        kind: "ema" or "swa".
        decay: of EMA, a fraction of 1.
        warm_up: whether an EMA begins with a lower decay, as in the module docstring.

    Attributes:
        network: the average, in eval mode, frozen.
        active: 0-dim; while it is 0, the average follows the student itself.
        count: 0-dim, how many times the student was taken in since then.
    """

    def __init__(self, student: nn.Module, kind: str, decay: float, warm_up: bool = False) -> None:
        self.network = copy.deepcopy(student).eval().requires_grad_(False)
        self.rate, self.warm_up = 1 - decay if kind == "ema" else None, warm_up
        values = self.network.state_dict().values()
        self.real = [value for value in values if value.is_floating_point()]
        self.whole = [value for value in values if not value.is_floating_point()]  # counts of batches
        first = next(student.parameters())
        self.active, self.count = torch.zeros(2, device=first.device, dtype=wide_dtype(first))

    @torch.no_grad()
    def follow(self, student: nn.Module) -> None:
        """Take in the student as it is now. Counts of batches are copied."""
        now = [*student.state_dict().values()]
        real = [value for value in now if value.is_floating_point()]
        follow_(self.real, real, self.active, self.count, self.rate, self.warm_up)
        copy_each(self.whole, [value for value in now if not value.is_floating_point()])
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


class Perturbation:
    """The adversarial perturbation of a network's weights of two dimensions or more (AWP), and the way back.

    Args:
        student: on the device that it is trained on.
        leaves_statistics: whether the loss that `move` takes leaves batch-norm statistics alone.

    Attributes:
        gamma: 0-dim, how far the weights move, a fraction of their norm; 0 until it is set.
        before: the weights before they moved.
    """

    def __init__(self, student: nn.Module, leaves_statistics: bool = False) -> None:
        self.weights = [weight for weight in student.parameters() if weight.dim() > 1]
        self.gradients, self.before = ([torch.empty_like(weight) for weight in self.weights] for _ in range(2))
        self.statistics = [] if leaves_statistics else [*student.buffers()]
        self.kept = [torch.empty_like(buffer) for buffer in self.statistics]
        self.gamma = self.weights[0].new_zeros((), dtype=wide_dtype(self.weights[0]))

    def move(self, loss: Callable[[], Tensor], whole: Callable[[Sequence[Tensor]], Sequence[Tensor]] = list) -> None:
        """Move every weight up the gradient of a loss, by `gamma` times its norm. An overflow moves nothing.

        Args:
            loss: runs the student and returns a 0-dim loss; what it does to batch-norm statistics is undone.
            whole: turns the gradients of this process's rows into those of the whole batch.
        """
        copy_each(self.kept, self.statistics)
        gradients = whole(torch.autograd.grad(loss(), self.weights))
        copy_each(self.statistics, self.kept)
        copy_each(self.gradients, gradients)
        sizes, slopes = norms([*self.weights, *self.gradients]).chunk(2)
        with torch.no_grad():
            perturb_(self.weights, self.gradients, self.before, sizes, slopes, self.gamma)

    @torch.no_grad()
    def put_back(self, decay: float, scaler: torch.amp.GradScaler) -> None:
        """Give the weights their values of before, once their gradients are known.

        Args:
            decay: the weight decay where it is that of the perturbed weights: what it lacks is added to the gradients.
        """
        moved = [(w, w.grad, v) for w, v in zip(self.weights, self.before, strict=True) if w.grad is not None]
        if decay and moved:
            weights, gradients, before = zip(*moved, strict=True)
            lacking = torch._foreach_sub(weights, before)  # pyright: ignore[reportPrivateImportUsage]
            torch._foreach_mul_(lacking, decay)  # pyright: ignore[reportPrivateImportUsage]
            torch._foreach_add_(gradients, scaler.scale(lacking))  # pyright: ignore
        copy_each(self.weights, self.before)


@torch.no_grad()
def copy_each(to: Sequence[Tensor], source: Sequence[Tensor]) -> None:
    """Copy tensors into others of their shapes, with a launch for dozens of one dtype that lie alike."""
    for dtype in dict.fromkeys(one.dtype for one in to):
        pairs = [pair for pair in zip(to, source, strict=True) if pair[0].dtype is dtype]
        torch._foreach_copy_(*zip(*pairs, strict=True))  # pyright: ignore


@torch.no_grad()
def norms(tensors: Sequence[Tensor]) -> Tensor:
    """Return the L2 norm of each of some tensors, (N,)."""
    return torch.stack([*torch._foreach_norm([*tensors])])  # pyright: ignore[reportPrivateImportUsage]


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

    @torch.no_grad()
    def look(self, loss: Tensor, gradients: Sequence[Tensor], seed: Tensor, total: Tensor, rows: int) -> None:
        """Check a step before its update, and count it.

        Args:
            loss: 0-dim.
            gradients: of any shapes; one whose norm overflows is not finite either.
            seed: (1,) int64, the step's noise seed; it moves on to the next step's.
            total: 0-dim, the sum of the losses so far; it grows by that of `rows` images.
        """
        guard_(
            loss,
            norms(gradients) if gradients else None,
            rows,
            next_seed=seed,
            seed=self.seed,
            loss_at=self.loss,
            found=self.found_inf,
            poison=self.poison,
            total=total,
        )


def make_optimizer(
    options: Optimisation, student: nn.Module, device: torch.device, fused: bool
) -> torch.optim.Optimizer:
    """Return the optimizer of the student's parameters, in one group, or two where some of them do not decay.

    Args:
        fused: one kernel a step. On a GPU the learning rate is then a tensor there, so that a captured step follows the
            schedule.
    """
    on_device = device.type == "cuda" and fused
    # with a scaler the fused step alone does not wait for the device
    given: dict[str, Any] = dict(lr=options.lr, weight_decay=options.weight_decay, fused=fused or None)
    weights: Any = decay_groups(student, options.decay_norms)
    if options.optimizer == "sgd":
        optimizer = torch.optim.SGD(weights, momentum=options.momentum, nesterov=options.nesterov, **given)
    else:
        first, second = options.adam_betas
        optimizer = torch.optim.AdamW(weights, betas=(first, second), capturable=on_device, **given)
        vars(optimizer)["_warned_capturable_if_run_uncaptured"] = True  # steps before a graph is recorded are meant
    if on_device:
        rate = torch.tensor(options.lr, device=device)
        for group in optimizer.param_groups:
            group["lr"] = rate
    return optimizer


def decay_groups(student: nn.Module, decay_norms: bool) -> list[dict[str, Any]]:
    """Return the groups of parameters that an optimizer takes: all in one or, apart, those that do not decay.

    These are all of fewer than two dimensions: batch norm's scales and shifts, and biases.
    """
    weights = [*student.parameters()]
    if decay_norms:
        return [{"params": weights}]
    decaying, others = ([w for w in weights if (w.dim() > 1) is decays] for decays in (True, False))
    return [{"params": decaying}, {"params": others, "weight_decay": 0.0}]
