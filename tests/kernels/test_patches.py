"""torchattacks with our step: the attacks give what they gave, and undoing the patch gives them back."""

import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from retemper.kernels import patch_torchattacks, patches

TO_THE_BIT = ("FGSM", "BIM")
TO_ROUNDING = ("FFGSM", "RFGSM", "PGD", "EOTPGD", "MIFGSM", "DIFGSM", "PGDL2", "TPGD")
WITHOUT_TARGETS = ("TPGD",)
STARTS_AT_RANDOM = ("FFGSM", "PGD", "EOTPGD", "PGDL2", "TPGD")


@pytest.fixture(scope="module")
def torchattacks() -> ModuleType:
    try:
        from retemper.packages import import_package  # the distribution of the kernels alone has no such module

        return import_package("torchattacks")
    except ImportError as error:
        pytest.skip(str(error))


def problem(dtype: torch.dtype) -> tuple[nn.Module, Tensor, Tensor]:
    """Return a model in evaluation mode, images and labels."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(128, 10))
    return model.to(dtype).eval(), torch.rand(12, 3, 8, 8, dtype=dtype), torch.randint(10, (12,))


def made(attack: Callable[..., Tensor], images: Tensor, labels: Tensor) -> Tensor:
    torch.manual_seed(7)
    return attack(images, labels)


def aims(attack: Any, aim: str) -> None:
    """Make it a targeted attack, or one on normalised images."""
    if aim == "random target":
        attack.set_mode_targeted_random(quiet=True)
    elif aim == "by label":
        attack.set_mode_targeted_by_label(quiet=True)
    elif aim == "normalised":
        attack.set_normalization_used(mean=[0.4, 0.5, 0.6], std=[0.2, 0.3, 0.25])


AIMS = ("plain", "normalised", "random target", "by label")
CASES = [(name, aim) for name in (*TO_THE_BIT, *TO_ROUNDING) for aim in AIMS[: 2 if name in WITHOUT_TARGETS else 4]]


@pytest.mark.parametrize(("name", "aim"), CASES)
def test_an_attack_gives_what_it_gave(torchattacks: ModuleType, name: str, aim: str) -> None:
    exact = name in TO_THE_BIT
    model, images, labels = problem(torch.float32 if exact else torch.float64)
    attack = getattr(torchattacks, name)(model)
    aims(attack, aim)
    before, kept = made(attack, images, labels), images.clone()
    with patch_torchattacks():
        within = made(attack, images, labels)
        drawn_next = torch.rand(3)
    assert torch.equal(images, kept) and not within.requires_grad
    torch.testing.assert_close(within, before, rtol=0, atol=0 if exact else 1e-8)
    made(attack, images, labels)
    assert torch.equal(torch.rand(3), drawn_next), "as many numbers were drawn"


def test_single_precision_differs_in_the_last_place(torchattacks: ModuleType) -> None:
    model, images, labels = problem(torch.float32)
    attack = torchattacks.PGD(model, steps=3)
    before = made(attack, images, labels)
    with patch_torchattacks():
        torch.testing.assert_close(made(attack, images, labels), before, rtol=0, atol=1e-6)


def test_it_is_our_step_that_runs(torchattacks: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    model, images, labels = problem(torch.float32)
    steps = []
    real = patches.pgd_step_
    monkeypatch.setattr(patches, "pgd_step_", lambda *args, **options: steps.append(1) or real(*args, **options))
    with patch_torchattacks():
        for name in (*TO_THE_BIT, *TO_ROUNDING):
            attack = getattr(torchattacks, name)(model)
            attack.steps = 1  # the interpreter of Triton runs it
            made(attack, images[:2], labels[:2])
            assert steps, name
            steps.clear()


def test_undoing_gives_the_methods_back_once(torchattacks: ModuleType) -> None:
    names = (*TO_THE_BIT, *TO_ROUNDING)
    before = [getattr(torchattacks, name).forward for name in names]
    patch = patch_torchattacks()
    assert not set(before) & {getattr(torchattacks, name).forward for name in names}
    patch.undo()
    patch.undo()
    assert before == [getattr(torchattacks, name).forward for name in names]
    with pytest.raises(RuntimeError), patch_torchattacks():
        raise RuntimeError
    assert before == [getattr(torchattacks, name).forward for name in names]


def test_the_later_of_two_patches_is_undone_first(torchattacks: ModuleType) -> None:
    before = torchattacks.PGD.forward
    first, second = patch_torchattacks(), patch_torchattacks(draws="kernel")
    with pytest.raises(RuntimeError, match="patched again since; undo that patch first"):
        first.undo()
    second.undo()
    first.undo()
    assert torchattacks.PGD.forward is before


@pytest.mark.parametrize("name", (*TO_THE_BIT, *TO_ROUNDING))
def test_images_may_lie_with_the_batch_innermost(torchattacks: ModuleType, name: str) -> None:
    model, images, labels = problem(torch.float64)
    attack = getattr(torchattacks, name)(model)
    with patch_torchattacks():
        expected = made(attack, images, labels)
        turned = made(attack, images.movedim(0, -1).contiguous().movedim(-1, 0), labels)
    assert torch.equal(turned, expected)


@pytest.mark.parametrize("name", STARTS_AT_RANDOM)
def test_the_kernel_draws_the_starts_when_asked(torchattacks: ModuleType, name: str) -> None:
    model, images, labels = problem(torch.float32)
    images, labels = images[:2], labels[:2]
    attack = getattr(torchattacks, name)(model)
    attack.steps = 2
    plain = made(attack, images, labels)
    with patch_torchattacks(draws="kernel"):
        first, again = made(attack, images, labels), made(attack, images, labels)
        attack.steps = 0
        start = made(attack, images, labels)
    assert torch.equal(first, again) and not torch.equal(first, plain)
    far = (first - images).flatten(1).norm(dim=1) if name == "PGDL2" else (first - images).abs()
    assert far.max() <= attack.eps * 1.0001
    if name != "FFGSM":  # which has one step, and no number of them
        assert not torch.equal(start, images)


def test_other_versions_are_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchattacks", SimpleNamespace(__version__="3.4.0"))  # type: ignore[arg-type]
    with pytest.raises(ImportError, match=r"torchattacks 3\.4\.0: .* pip install torchattacks==3\.5\.1"):
        patch_torchattacks()


def test_unknown_draws_are_refused() -> None:
    with pytest.raises(ValueError, match="draws: 'numpy'; needs one of torch, kernel"):
        patch_torchattacks(draws="numpy")


def test_the_page_shows_both_ways(torchattacks: ModuleType) -> None:
    page = Path(__file__).parents[2] / "docs/kernels/index.md"
    (shown,) = re.findall(r"^```py\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    model, images, labels = problem(torch.float32)
    before = torchattacks.PGD.forward
    exec(compile(shown, page.name, "exec"), {"model": model, "images": images[:2], "labels": labels[:2]})
    assert torchattacks.PGD.forward is before
