"""What the KL refuses, each in a message that names the argument and, where there is one, the fix."""

import math

import pytest
import torch
from torch import Tensor

from retemper.kernels import class_temperature_kl, class_temperature_kl_grad_


def batch(shape: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    student, teacher = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)).to(device)
    label = torch.arange(shape[0], device=device) % shape[1]
    return student, teacher, label, torch.linspace(0.5, 2, shape[1], device=device)


def test_refuses_what_it_cannot_do(device: torch.device) -> None:
    student, teacher, label, temperature = batch((7, 10), device)
    for message, args, options in [
        (r"student: shape \(70,\); needs \(B, K\)", (student.flatten(), teacher, label, temperature), {}),
        (r"student: shape \(7, 0\); needs \(B, K\)", (student[:, :0], teacher[:, :0], label, temperature[:0]), {}),
        (r"teacher: shape \(7, 9\), but student", (student, teacher[:, :9], label, temperature), {}),
        (r"teacher: torch.int32; needs", (student, teacher.int(), label, temperature), {}),
        (r"student: strides \(1, 7\); rows", (student.t().contiguous().t(), teacher, label, temperature), {}),
        (r"label: shape \(6,\); needs \(7,\)", (student, teacher, label[:6], temperature), {}),
        (r"label: torch.bool; needs torch.int64", (student, teacher, label.bool(), temperature), {}),
        (r"label: torch.float32; needs torch.int64", (student, teacher, label.float(), temperature), {}),
        (
            r"label: None; needs the class of each row, as class_weight",
            (student, teacher),
            {"class_weight": temperature},
        ),
        (r"label: None; needs the class of each row, as label_trust", (student, teacher), {"label_trust": temperature}),
        (r"temperature: shape \(10,\); needs \(7,\) by row, or one number", (student, teacher, None, temperature), {}),
        (
            r"temperature: shape \(9,\); needs \(10,\) by class, \(7,\) by row",
            (student, teacher, label, temperature[:9]),
            {},
        ),
        (r"temperature: torch.float16", (student, teacher, label, temperature.half()), {}),
        (r"temperature: torch.float16 on", (student, teacher, label, temperature[0].half()), {}),
        (r"row_weight: shape \(10,\); needs \(7,\)", (student, teacher, label), {"row_weight": temperature}),
        (r"row_weight: torch.int64", (student, teacher, label), {"row_weight": label}),
        (r"row_trust: shape \(10,\); needs \(7,\)", (student, teacher, label), {"row_trust": temperature}),
        (r"row_trust: torch.int64", (student, teacher, label), {"row_trust": label}),
        (r"label: None; needs .* as row_trust", (student, teacher), {"row_trust": temperature[:7]}),
        (r"row_trust: needs reverse=False", (student, teacher, label), {"row_trust": temperature[:7], "reverse": True}),
        (
            r"row_trust: needs label_trust=None; .* by class or by row",
            (student, teacher, label),
            {"row_trust": temperature[:7], "label_trust": temperature},
        ),
        (r"label_trust: needs reverse=False", (student, teacher, label), {"label_trust": temperature, "reverse": True}),
        (r"teacher_is: 'probs'; needs 'logits' or", (student, teacher, label), {"teacher_is": "probs"}),
        *(
            (message, (student, teacher, label, number), {"teacher_is": "probabilities", **options})
            for message, number, options in [
                (r"temperature: needs teacher_is='logits'", 2.0, {}),
                (r"temperature: needs teacher_is='logits'", temperature, {}),
                (r"label_trust: needs teacher_is='logits'", 1.0, {"label_trust": temperature}),
                (r"row_trust: needs teacher_is='logits'", 1.0, {"row_trust": temperature[:7]}),
                (r"reverse: needs teacher_is='logits'; .* teacher.log\(\)", 1.0, {"reverse": True}),
            ]
        ),
        (r"class_dim: 2; student has shape \(7, 10\)", (student, teacher, label), {"class_dim": 2}),
        *(
            (f"^temperature: {number}; needs a finite number above 0", (student, teacher, label, number), {})
            for number in (0, -1.5, math.nan, math.inf)
        ),
        (r"temperature: stride 0", (student, teacher, label, temperature[:1].expand(10)), {}),
        (r"class_weight: shape \(7,\)", (student, teacher, label, temperature), {"class_weight": temperature[:7]}),
        (
            r"label_trust: shape \(9,\); needs \(10,\)",
            (student, teacher, label, temperature),
            {"label_trust": temperature[:9]},
        ),
        (r"label_trust: torch.int64", (student, teacher, label, temperature), {"label_trust": temperature.long()}),
        (r"student_temperature: 0", (student, teacher, label, temperature), {"student_temperature": 0.0}),
        (r"student_temperature: a tensor of shape", (student, teacher, label), {"student_temperature": temperature}),
        (r"student_temperature: nan", (student, teacher, label, temperature), {"student_temperature": math.nan}),
    ]:
        with pytest.raises(ValueError, match=message):
            class_temperature_kl(*args, **options)
        with pytest.raises(ValueError, match=message):
            class_temperature_kl_grad_(*args, **options)
    with pytest.raises(ValueError, match="reduction: 'avg'; needs one of batchmean, mean, sum, none"):
        class_temperature_kl(student, teacher, label, temperature, reduction="avg")
    with pytest.raises(ValueError, match=r"student: strides \(0, 1\) overlap"):
        class_temperature_kl_grad_(student[:1].expand(7, 10), teacher, label, temperature)
    tracked = student.requires_grad_()
    with pytest.raises(ValueError, match=r"student: requires grad .* student.detach\(\)"):
        class_temperature_kl_grad_(tracked * 1, teacher, label, temperature)
    with pytest.raises(TypeError, match="row_trust: a float; needs a tensor"):
        class_temperature_kl(student, teacher, label, row_trust=0.5)  # type: ignore[arg-type]
    for name, args in {"student": (None, teacher), "teacher": (student, None)}.items():
        with pytest.raises(TypeError, match=f"{name}: a NoneType; needs a tensor"):
            class_temperature_kl(*args, label)  # type: ignore[arg-type]
