"""Rows of losses: against PyTorch's, at the ends of the logits, and through the gradient."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from retemper.engine import (
    KlObjective,
    cross_entropy_objective,
    cross_entropy_rows,
    cw_objective,
    is_label,
    kl_rows,
)
from retemper.kernels import runtime


def test_rows_are_pytorchs() -> None:
    gen = torch.Generator().manual_seed(0)
    clean, adv = (3 * torch.randn(6, 5, generator=gen, dtype=torch.float64) for _ in range(2))
    label = torch.arange(6) % 5
    torch.testing.assert_close(cross_entropy_rows(clean, label), F.cross_entropy(clean, label, reduction="none"))
    expected = F.kl_div(adv.log_softmax(1), clean.softmax(1), reduction="none").sum(1)
    torch.testing.assert_close(kl_rows(clean, adv), expected)
    assert torch.autograd.gradcheck(kl_rows, (clean.requires_grad_(), adv.requires_grad_()))


@pytest.mark.triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_gradient_of_the_cross_entropy_in_one_launch_is_autograds(
    dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CPU has none of its own, and takes autograd's."""
    logits = (5 * torch.randn(6, 10, generator=torch.Generator().manual_seed(0))).to(device, dtype)
    label = torch.tensor([0, 9, 3, 3, 1, 2], device=device)
    objective = cross_entropy_objective(label)
    if device.type == "cpu":
        assert getattr(objective, "gradient", None) is None
        monkeypatch.setattr(runtime, "TRITON_ON_CPU", True)
        monkeypatch.setenv("TRITON_INTERPRET", "1")  # as when the kernels were imported (tests/conftest.py)
    gradient, before = getattr(objective, "gradient", None), logits.clone()
    assert gradient is not None
    wide = logits.double().requires_grad_()
    F.cross_entropy(wide, label, reduction="sum").backward()
    assert wide.grad is not None
    torch.testing.assert_close(
        gradient(logits), wide.grad.to(dtype), rtol=2**-7 if dtype is torch.bfloat16 else 1e-5, atol=1e-6
    )
    assert torch.equal(logits, before) and gradient(logits).dtype is dtype


def test_a_sure_prediction_has_a_finite_gradient() -> None:
    clean, adv = (torch.tensor([[500.0, 0.0, -500.0]], requires_grad=True) for _ in range(2))
    kl_rows(clean, adv.flip(1)).sum().backward()
    assert clean.grad is not None and clean.grad.isfinite().all()
    assert adv.grad is not None and adv.grad.isfinite().all()


def test_the_gradient_of_the_objective_copies_no_logits() -> None:
    """The network may need its logits again, so they stay; the gradient goes to memory of its own at once."""
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    logits, teacher = torch.randn(2, 6, 20)  # few classes are transposed on a CPU
    before = logits.clone()
    with Watch():
        found = KlObjective(teacher, torch.arange(6)).gradient(logits)
    assert torch.equal(logits, before) and not {"clone", "copy_", "_to_copy"} & set(seen)
    torch.testing.assert_close(found, logits.softmax(1) - teacher.softmax(1))


def test_half_precision_is_computed_in_single() -> None:
    clean, adv = torch.randn(4, 5).bfloat16(), torch.randn(4, 5).bfloat16()
    label = torch.arange(4)
    assert kl_rows(clean, adv).dtype is cross_entropy_rows(clean, label).dtype is torch.float32
    torch.testing.assert_close(kl_rows(clean, adv), kl_rows(clean.float(), adv.float()))


def test_labels_are_marked_in_their_rows() -> None:
    logits, label = torch.randn(7, 5), torch.tensor([0, 4, 2, 2, 1, 3, 0])
    assert torch.equal(is_label(logits, label), F.one_hot(label, 5).bool())


def test_nothing_is_broadcast() -> None:
    logits, label = torch.randn(6, 5), torch.arange(6) % 5
    for other in (logits[:1], logits[:, :1], logits[:5], logits[0], logits[:, None]):
        with pytest.raises(ValueError, match=r"adv"):
            kl_rows(logits, other)
    for wrong in (label[:, None], label[:1], label[:5], label.float(), F.one_hot(label, 5).float(), label[0]):
        for rows in (cross_entropy_rows, is_label):
            with pytest.raises(ValueError, match="label: "):
                rows(logits, wrong)
    with pytest.raises(TypeError, match="logits: it is a tuple"):
        cross_entropy_rows((logits, logits), label)  # pyright: ignore[reportArgumentType]
    assert torch.equal(cross_entropy_rows(logits, label.int()), cross_entropy_rows(logits, label))


def test_a_margin_in_half_precision_is_summed_in_single() -> None:
    logits = torch.randn(2000, 5).half()
    assert cw_objective(torch.zeros(2000, dtype=torch.int64), 50.0)(logits).isfinite()
