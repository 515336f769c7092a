"""The kernels as modules: the settings in the constructor, the tensors of a batch in `forward`.

A setting that is a tensor is a buffer. It moves with `.to()`, it is in the `state_dict`, and it keeps its address when
it is written in place, as a captured CUDA graph needs: `loss.temperature.copy_(new_K)`. A setting that is a number is
neither.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from retemper.kernels.class_temperature_kl import class_temperature_kl
from retemper.kernels.jensen_shannon import class_temperature_js
from retemper.kernels.pgd_step import pgd_step_
from retemper.kernels.pixels import batch_first
from retemper.kernels.random_start import random_start_


class _WithSettings(nn.Module):
    """A module that calls one function with its settings."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self._settings = tuple(settings)
        for name, value in settings.items():
            if isinstance(value, Tensor):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move the buffers; of a network in half precision they stay in float32, which the kernels need."""

        def moved(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            return tensor.to(result.device) if result.dtype in (torch.float16, torch.bfloat16) else result

        return super()._apply(moved, recurse)

    def settings(self) -> dict[str, Any]:
        """Return the settings by name, as they are now."""
        return {name: getattr(self, name) for name in self._settings}

    def extra_repr(self) -> str:
        """Return the settings for `repr`, of a tensor its shape; one that is None is left out."""
        given = {name: value for name, value in self.settings().items() if value is not None}
        return ", ".join(f"{name}={_described(value)}" for name, value in given.items())


def _described(value: Any) -> str:
    return f"{list(value.shape)}" if isinstance(value, Tensor) else repr(value)


class ClassTemperatureKL(_WithSettings):
    """The loss of `class_temperature_kl`: the KL divergence from a student to a teacher with a temperature by class.

    Args:
        temperature: of the teacher; one number above 0, or (K,) with one for each class. One for each row differs from
            batch to batch and is no setting: call the function.
        student_temperature: one number above 0.
        class_weight: (K,), a factor on the loss of each row of that class; 1 when left out.
        label_trust: (K,) in [0, 1], how far the label is trusted over the teacher; 0 when left out.
        teacher_is: "logits" or "probabilities".
        reverse: whether to take KL(student || teacher).
        ignore_index: the label of rows that count for nothing; None when there are no such rows.
        class_dim: the dimension of the classes.
        reduction: "batchmean", "mean", "sum" or "none".
    """

    temperature: float | Tensor
    class_weight: Tensor | None
    label_trust: Tensor | None

    def __init__(
        self,
        temperature: float | Tensor = 1.0,
        *,
        student_temperature: float = 1.0,
        class_weight: Tensor | None = None,
        label_trust: Tensor | None = None,
        teacher_is: str = "logits",
        reverse: bool = False,
        ignore_index: int | None = -100,
        class_dim: int = -1,
        reduction: str = "batchmean",
    ) -> None:
        super().__init__(
            temperature=temperature,
            student_temperature=student_temperature,
            class_weight=class_weight,
            label_trust=label_trust,
            teacher_is=teacher_is,
            reverse=reverse,
            ignore_index=ignore_index,
            class_dim=class_dim,
            reduction=reduction,
        )

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        label: Tensor | None = None,
        row_weight: Tensor | None = None,
        row_trust: Tensor | None = None,
    ) -> Tensor:
        """Compute the loss, differentiable in both networks' predictions.

        Args:
            student, teacher: (B, K) logits, or with more dimensions as for `class_temperature_kl`.
            label: (B,), the class of each row; needed where a setting is (K,), and with `row_trust`.
            row_weight: (B,), a factor on the loss of each row.
            row_trust: (B,) in [0, 1], how far the label of each row is trusted, in place of `label_trust`.

        Returns:
            A scalar, or the rows for "none", in nats.

        Raises:
            ValueError: as `class_temperature_kl`.
        """
        of_rows: dict[str, Any] = {"row_weight": row_weight, "row_trust": row_trust}
        return class_temperature_kl(student, teacher, label, **of_rows, **self.settings())


class ClassTemperatureJS(_WithSettings):
    """The loss of `class_temperature_js`: the generalised Jensen-Shannon divergence with a temperature by class.

    Args:
        beta: the teacher's share of the mixture, from 0 to 1.
        temperature, student_temperature, class_weight, ignore_index, class_dim, reduction: as for
            `ClassTemperatureKL`.
    """

    temperature: float | Tensor
    class_weight: Tensor | None

    def __init__(
        self,
        temperature: float | Tensor = 1.0,
        *,
        student_temperature: float = 1.0,
        beta: float = 0.5,
        class_weight: Tensor | None = None,
        ignore_index: int | None = -100,
        class_dim: int = -1,
        reduction: str = "batchmean",
    ) -> None:
        super().__init__(
            temperature=temperature,
            student_temperature=student_temperature,
            beta=beta,
            class_weight=class_weight,
            ignore_index=ignore_index,
            class_dim=class_dim,
            reduction=reduction,
        )

    def forward(
        self, student: Tensor, teacher: Tensor, label: Tensor | None = None, row_weight: Tensor | None = None
    ) -> Tensor:
        """Compute the loss, differentiable in both networks' predictions.

        Args:
            student, teacher, label, row_weight: as for `ClassTemperatureKL`.

        Returns:
            A scalar, or the rows for "none", in nats.

        Raises:
            ValueError: as `class_temperature_js`.
        """
        return class_temperature_js(student, teacher, label, row_weight=row_weight, **self.settings())


class PgdStep(_WithSettings):
    """The step of `pgd_step_`: along the gradient, back into the eps ball, clipped to valid pixels.

    Args:
        step, eps: in pixel units (8/255, not 8); a number, or a tensor as for `pgd_step_`, such as (C, 1, 1) for
            normalised images. A negative step is a targeted attack's.
        norm: "linf" or "l2".
        lower, upper: the range of a valid pixel; a number, or (C, 1, 1).
        decay: of the momentum, where `forward` gets one.
        inertia: the share of the new step, where `forward` gets the previous images.
        clip_first: with "l2", whether to clip before the projection.
    """

    step: float | Tensor
    eps: float | Tensor
    lower: float | Tensor
    upper: float | Tensor

    def __init__(
        self,
        step: float | Tensor,
        eps: float | Tensor,
        *,
        norm: str = "linf",
        lower: float | Tensor = 0.0,
        upper: float | Tensor = 1.0,
        decay: float = 1.0,
        inertia: float = 0.75,
        clip_first: bool = False,
    ) -> None:
        super().__init__(
            step=step,
            eps=eps,
            norm=norm,
            lower=lower,
            upper=upper,
            decay=decay,
            inertia=inertia,
            clip_first=clip_first,
        )

    def forward(
        self,
        adv: Tensor,
        grad: Tensor,
        clean: Tensor,
        *,
        mask: Tensor | None = None,
        momentum: Tensor | None = None,
        previous: Tensor | None = None,
    ) -> Tensor:
        """Take the step in place.

        Args:
            adv: (B, ...), overwritten.
            grad, clean: the shape of `adv`.
            mask: bool; where it is False a pixel stays as it is.
            momentum: a buffer like `adv`, overwritten: zeros before the first step.
            previous: a buffer like `adv`, overwritten: the images before the last step.

        Returns:
            `adv` itself.

        Raises:
            ValueError: as `pgd_step_`.
        """
        return pgd_step_(adv, grad, clean, mask=mask, momentum=momentum, previous=previous, **self.settings())


class RandomStart(_WithSettings):
    """The start of `random_start_`: each call draws anew, and a loaded `state_dict` goes on where it was saved.

    The seed is a buffer of one int64 that a call advances on the device, so that a captured CUDA graph draws anew at
    every replay. Processes that are to draw different noise need seeds that lie further apart than they take calls, and
    a module outside of the one that DistributedDataParallel wraps, since that gives all the first one's buffers.

    Args:
        eps: in pixel units (8/255, not 8); a number, or a tensor as for `random_start_`.
        noise: "uniform" in the ball, or "normal" with standard deviation `scale`.
        scale: the standard deviation of normal noise, in pixel units.
        seed: an int of 64 bits.
        clip: whether to clamp to [lower, upper].
        norm: "linf" or "l2".
        lower, upper: the range of a valid pixel; a number, or (C, 1, 1).
    """

    eps: float | Tensor
    seed: Tensor

    def __init__(
        self,
        eps: float | Tensor,
        *,
        noise: str = "uniform",
        scale: float = 0.001,
        seed: int = 0,
        clip: bool = True,
        norm: str = "linf",
        lower: float | Tensor = 0.0,
        upper: float | Tensor = 1.0,
    ) -> None:
        super().__init__(
            eps=eps,
            noise=noise,
            scale=scale,
            seed=torch.tensor([seed]),
            clip=clip,
            norm=norm,
            lower=lower,
            upper=upper,
        )

    def forward(self, clean: Tensor, adv: Tensor | None = None) -> Tensor:
        """Draw starts around the clean images.

        Args:
            clean: (B, ...), of any strides.
            adv: like `clean`, overwritten; a new tensor when left out.

        Returns:
            `adv`, or the new tensor.

        Raises:
            ValueError: as `random_start_`.
        """
        adv = torch.empty_like(batch_first(clean)) if adv is None else adv
        start = random_start_(adv, clean, **self.settings())
        self.seed.add_(1)
        return start
