"""The modules: each does what its function does, and its tensors are buffers."""

import io

import pytest
import torch
from torch import Tensor, nn

from retemper.kernels import class_temperature_js, class_temperature_kl, pgd_step_, random_start_
from retemper.kernels.modules import ClassTemperatureJS, ClassTemperatureKL, PgdStep, RandomStart


@pytest.fixture
def rows() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(6, 4, requires_grad=True), torch.randn(6, 4, requires_grad=True), torch.arange(6) % 4


def by_class() -> Tensor:
    return torch.linspace(0.5, 2, 4)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 3.0, "student_temperature": 2.0, "reduction": "sum"},
        {"temperature": by_class(), "class_weight": by_class().flip(0), "reduction": "none"},
        {"label_trust": by_class() / 4, "ignore_index": 2},
        {"reverse": True, "ignore_index": None, "reduction": "mean"},
    ],
)
def test_the_kl_module_is_its_function(rows: tuple[Tensor, Tensor, Tensor], settings: dict) -> None:
    student, teacher, label = rows
    weight = torch.linspace(0, 1, 6)
    expected = class_temperature_kl(student, teacher, label, row_weight=weight, **settings)
    loss = ClassTemperatureKL(**settings)(student, teacher, label, weight)
    assert torch.equal(loss, expected)
    loss.sum().backward()
    assert student.grad is not None and teacher.grad is not None


def test_the_kl_module_takes_a_trust_of_each_row(rows: tuple[Tensor, Tensor, Tensor]) -> None:
    student, teacher, label = rows
    trust = torch.linspace(0, 1, 6)
    expected = class_temperature_kl(student, teacher, label, row_trust=trust)
    assert torch.equal(ClassTemperatureKL()(student, teacher, label, row_trust=trust), expected)


def test_a_teacher_of_probabilities_and_the_classes_dimension_are_settings(rows: tuple[Tensor, Tensor, Tensor]) -> None:
    student, teacher, _ = rows
    soft = teacher.detach().softmax(1)
    expected = class_temperature_kl(student, soft, teacher_is="probabilities")
    across = ClassTemperatureKL(teacher_is="probabilities", class_dim=0)
    torch.testing.assert_close(across(student.T, soft.T), expected)


@pytest.mark.parametrize("settings", [{}, {"temperature": by_class(), "beta": 0.2, "reduction": "none"}])
def test_the_js_module_is_its_function(rows: tuple[Tensor, Tensor, Tensor], settings: dict) -> None:
    student, teacher, label = rows
    expected = class_temperature_js(student, teacher, label, **settings)
    assert torch.equal(ClassTemperatureJS(**settings)(student, teacher, label), expected)


def test_tensors_move_load_and_keep_their_address() -> None:
    loss = ClassTemperatureKL(by_class(), class_weight=torch.ones(4))
    assert set(loss.state_dict()) == {"temperature", "class_weight"} and not list(loss.parameters())
    assert isinstance(loss.temperature, Tensor)
    place = loss.temperature.data_ptr()
    loss.load_state_dict({"temperature": torch.full((4,), 3.0), "class_weight": torch.zeros(4)})
    assert loss.temperature.data_ptr() == place and loss.temperature.eq(3).all()
    moved = loss.to("meta").temperature
    assert isinstance(moved, Tensor) and moved.device.type == "meta"


def test_numbers_stay_out_of_the_state() -> None:
    assert not ClassTemperatureKL(2.0).state_dict() and not PgdStep(0.1, 0.2).state_dict()
    assert set(PgdStep(0.1, 0.2, lower=torch.zeros(3, 1, 1)).state_dict()) == {"lower"}


def test_a_printed_module_says_its_settings() -> None:
    assert repr(PgdStep(0.1, torch.ones(3, 1, 1), norm="l2")).startswith("PgdStep(step=0.1, eps=[3, 1, 1], norm='l2',")
    assert "temperature=[4]" in repr(ClassTemperatureKL(by_class()))
    assert "class_weight" not in repr(ClassTemperatureKL())


def test_the_step_module_is_its_function() -> None:
    torch.manual_seed(0)
    clean, grad = torch.rand(4, 3, 5, 5), torch.randn(4, 3, 5, 5)
    eps, mask = torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1), torch.tensor([True, True, False, True])
    step, adv, expected = PgdStep(0.1, eps, decay=0.5), clean.clone(), clean.clone()
    momentum, beside = torch.zeros_like(clean), torch.zeros_like(clean)
    for _ in range(2):
        assert step(adv, grad, clean, mask=mask, momentum=momentum) is adv
        pgd_step_(expected, grad, clean, 0.1, eps, mask=mask, momentum=beside, decay=0.5)
    assert torch.equal(adv, expected) and torch.equal(momentum, beside)


def test_the_step_module_takes_the_images_before() -> None:
    clean, grad = torch.rand(4, 3, 5, 5), torch.randn(4, 3, 5, 5)
    adv, previous = clean.clone(), (clean + 0.05).clamp(0, 1)
    expected = pgd_step_(clean.clone(), grad, clean, 0.1, 0.2, previous=previous.clone(), inertia=0.6)
    assert torch.equal(PgdStep(0.1, 0.2, inertia=0.6)(adv, grad, clean, previous=previous), expected)


def test_the_start_module_draws_anew_and_goes_on_where_it_was_saved() -> None:
    clean = torch.rand(4, 3, 5, 5)
    start = RandomStart(0.1, seed=5, noise="normal", scale=0.05)
    for seed in (5, 6):
        expected = random_start_(torch.empty_like(clean), clean, 0.1, seed=seed, noise="normal", scale=0.05)
        assert torch.equal(start(clean), expected)
    saved = io.BytesIO()
    torch.save(start.state_dict(), saved)
    saved.seek(0)
    other, adv = RandomStart(0.1, noise="normal", scale=0.05), torch.empty_like(clean)
    other.load_state_dict(torch.load(saved, weights_only=True))
    assert other(clean, adv) is adv and torch.equal(adv, start(clean))


def test_the_start_module_takes_images_with_the_batch_innermost() -> None:
    clean = torch.rand(3, 5, 5, 4).permute(3, 0, 1, 2)
    torch.testing.assert_close(RandomStart(0.1)(clean), RandomStart(0.1)(clean.contiguous()), rtol=0, atol=0)


def test_half_precision_leaves_the_seed_and_the_temperatures_usable() -> None:
    """A module within a network that is cast: `.half()` and `.to(torch.bfloat16)` reach its buffers."""
    network = nn.ModuleDict({"loss": ClassTemperatureKL(by_class()), "start": RandomStart(0.1)}).bfloat16()
    student, teacher = torch.randn(2, 6, 4, dtype=torch.bfloat16)
    assert network["loss"](student, teacher, torch.arange(6) % 4).isfinite()
    assert network["start"](torch.rand(2, 3, 4, 4).bfloat16()).isfinite().all()
