"""The training step of the authors' ABSLD script (CIFAR-10, ResNet-18), which users have without retemper.

Written out from what the script does, not from its text. It computes what our `released` variant computes: both
temperatures divide one storage. Its costs are kept: images in NCHW, float32 with whatever PyTorch allows it, loops over
the samples of a batch that wait for the device at each label and each loss, a softmax of constant targets in each
attack step, deterministic convolutions, and a loss read out in each step.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

EPS, STEP, STEPS = 8 / 255, 2 / 255, 10


def new_sgd(student: nn.Module) -> torch.optim.SGD:
    """Return the script's optimizer."""
    return torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9, weight_decay=2e-4)


class AuthorsStep:
    """The authors' step, on networks that stay contiguous.

    Args:
        student, teacher: on the images' device; the teacher in eval mode.
        temperatures: one for each class, of both terms.
        deterministic: the flag that the script sets; without it the rest of the step is timed alone.
    """

    def __init__(
        self, student: nn.Module, teacher: nn.Module, temperatures: list[float], deterministic: bool = True
    ) -> None:
        self.student, self.teacher, self.deterministic = student, teacher, deterministic
        self.temperatures = temperatures
        self.loss_adv, self.loss_clean = [0.0] * len(temperatures), [0.0] * len(temperatures)
        self.optimizer = new_sgd(student)

    def __call__(self, clean: Tensor, label: Tensor) -> float:
        """Do one step on images (B, C, H, W) and labels (B,), and return the loss."""
        with self._flags():
            target_adv, target_clean = self.targets(clean, label)
            adv = attack(self.student, clean, target_adv, 0.001 * torch.randn_like(clean), again=True)
            self.student.train()
            self.optimizer.zero_grad()
            logits_adv, logits_clean = self.student(adv), self.student(clean)
            self.count(logits_adv, logits_clean, label)
            loss = 5 / 6 * soft_loss(logits_adv, target_adv.softmax(1))
            loss = loss + 1 / 6 * soft_loss(logits_clean, target_clean.softmax(1))
            loss.backward()
            self.optimizer.step()
            return loss.item()

    def targets(self, clean: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """Return the teacher's logits over the temperatures, (B, K), sample by sample: two names for one storage."""
        with torch.no_grad():
            logits = self.teacher(clean)
        target_adv, target_clean = logits.detach(), logits.detach()
        for i in range(len(label)):
            target_adv[i] = target_adv[i] / self.temperatures[label[i]]
            target_clean[i] = target_clean[i] / self.temperatures[label[i]]
        return target_adv, target_clean

    def count(self, logits_adv: Tensor, logits_clean: Tensor, label: Tensor) -> None:
        """Add each sample's cross-entropy to its class's sum."""
        loss_adv = F.cross_entropy(logits_adv.detach(), label, reduction="none")
        loss_clean = F.cross_entropy(logits_clean.detach(), label, reduction="none")
        for i in range(len(label)):
            self.loss_adv[label[i]] += loss_adv[i].item()
            self.loss_clean[label[i]] += loss_clean[i].item()

    @contextmanager
    def _flags(self) -> Iterator[None]:
        before = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
        torch.backends.cudnn.deterministic = self.deterministic
        torch.backends.cudnn.benchmark = False
        try:
            yield
        finally:
            torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = before


def attack(student: nn.Module, clean: Tensor, target: Tensor, noise: Tensor, again: bool) -> Tensor:
    """Attack by PGD on the KL divergence, from `clean` + `noise`, all (B, C, H, W).

    Args:
        target: (B, K) logits, made probabilities in every step, if `again`; else probabilities.
    """
    student.eval()
    adv = clean.detach() + noise
    for _ in range(STEPS):
        adv.requires_grad_()
        with torch.enable_grad():
            soft = target.softmax(1) if again else target
            loss = F.kl_div(F.log_softmax(student(adv), 1), soft, reduction="sum")
        (grad,) = torch.autograd.grad(loss, [adv])
        adv = adv.detach() + STEP * torch.sign(grad.detach())
        adv = torch.min(torch.max(adv, clean - EPS), clean + EPS)
        adv = torch.clamp(adv, 0.0, 1.0)
    return adv.detach()


def soft_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Return the script's KL: a mean over batch and classes, with 1e-5 in the target's logarithm."""
    return (-target * torch.log(F.softmax(logits, 1)) + target * torch.log(target + 1e-5)).mean()


class CarefulStep:
    """The same step as a careful user writes it in PyTorch: no loop, nothing read out, targets computed once.

    Args:
        compile: run the student through torch.compile.
    """

    def __init__(
        self, student: nn.Module, teacher: nn.Module, temperatures: list[float], compile: bool = False
    ) -> None:
        self.student = student
        if compile:
            self.student: nn.Module = torch.compile(student, dynamic=False)  # pyright: ignore[reportAttributeAccessIssue]
        self.teacher, self.optimizer = teacher, new_sgd(student)
        device = next(student.parameters()).device
        self.temperature_K = torch.tensor(temperatures, device=device)
        self.loss_adv_K, self.loss_clean_K = torch.zeros(2, len(temperatures), device=device)

    def __call__(self, clean: Tensor, label: Tensor) -> Tensor:
        """Do one step on images (B, C, H, W) and labels (B,), and return the loss, on the device."""
        with torch.no_grad():
            target = (self.teacher(clean) / self.temperature_K[label][:, None] ** 2).softmax(1)
        adv = attack(self.student, clean, target, 0.001 * torch.randn_like(clean), again=False)
        self.student.train()
        self.optimizer.zero_grad(set_to_none=True)
        logits_adv, logits_clean = self.student(adv), self.student(clean)
        for sum_K, logits in ((self.loss_adv_K, logits_adv), (self.loss_clean_K, logits_clean)):
            sum_K.index_add_(0, label, F.cross_entropy(logits.detach(), label, reduction="none"))
        kl_adv, kl_clean = (
            F.kl_div(F.log_softmax(logits, 1), target, reduction="batchmean") for logits in (logits_adv, logits_clean)
        )
        loss = (5 / 6 * kl_adv + 1 / 6 * kl_clean) / target.shape[1]
        loss.backward()
        self.optimizer.step()
        return loss.detach()
