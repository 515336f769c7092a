"""What surrounds the steps in the scripts of `test_training.py`: images, schedule, split, choice of the epoch."""

from typing import Any

import pytest

from retemper.engine.catalogue import find_setting

SCRIPTS: dict[str, dict[str, Any]] = {
    "sat:cifar10_preact_resnet18": dict(
        student="preact_resnet18", normalise=True, padding=4, padding_mode="reflect", flip=True, batch_size=128,
        eps=8 / 255, attack_step=2 / 255, attack_steps=10, epochs=200, lr=0.1, lr_drops=(100, 150), lr_drop_early=True,
        weight_decay=5e-4, select_on="test", select_by="robust", select_steps=10, select_every=1,
    ),
    "trades:cifar10_wrn34_10": dict(
        student="wrn34_10", normalise=False, padding=4, padding_mode="zeros", flip=True, batch_size=128, eps=0.031,
        attack_step=0.007, attack_steps=10, epochs=76, lr=0.1, lr_drops=(74,), weight_decay=2e-4, holdout_per_class=0,
    ),
    "trades:cifar10_wrn34_10_awp": dict(
        student="wrn34_10", normalise=False, eps=8 / 255, attack_step=2 / 255, attack_steps=10, epochs=200, lr=0.1,
        lr_drops=(99, 149), weight_decay=5e-4, awp_gamma=0.005, awp_from=10, beta=6.0, holdout_per_class=0,
    ),
    "mart:cifar10_resnet18": dict(
        student="resnet18", normalise=False, eps=0.031, attack_step=0.007, attack_steps=10, epochs=120, lr=0.01,
        lr_drops=(74, 89, 99), weight_decay=3.5e-3, beta=5.0, holdout_per_class=0,
    ),
    "mart:cifar10_wrn34_10": dict(
        student="wrn34_10", normalise=False, eps=0.031, attack_step=0.007, attack_steps=10, epochs=90, lr=0.1,
        lr_drops=(74, 89), weight_decay=7e-4, beta=6.0, holdout_per_class=0,
    ),
    "frl:cifar10_preact_resnet18": dict(
        normalise=False, padding=4, padding_mode="zeros", eps=8 / 255, attack_steps=10, epochs=40, lr=0.001, beta=1.5,
        weight_decay=5e-4, holdout_per_class=300, holdout_from="end", select_on="holdout", select_steps=20,
        rate_halves_every=40, limit=0.5,
    ),
    "faal:cifar10_preact_resnet18": dict(
        student="preact_resnet18", normalise=True, padding=4, padding_mode="zeros", eps=8 / 255, attack_step=2 / 255,
        attack_steps=10, epochs=2, lr=0.01, lr_drops=(1,), weight_decay=5e-4, select_on="test", select_by="worst",
        select_steps=10, select_every=1, select_from=1,
    ),
    "adr:cifar10_resnet18": dict(
        student="resnet18", normalise=True, padding=4, padding_mode="zeros", flip=True, eps=8 / 255,
        attack_step=2 / 255, attack_steps=10, attack_start="uniform", clip_start=True, epochs=200, lr=0.1,
        lr_drops=(100, 150), weight_decay=5e-4, nesterov=True, average="ema", ema_decay=0.995, select_on="test",
        select_by="robust", select_steps=10, select_every=1,
    ),
    "adr:cifar10_resnet18_trades": dict(
        student="resnet18", normalise=True, joint=True, attack_bn="train", beta=6.0, eps=8 / 255, attack_step=2 / 255,
        epochs=200, weight_decay=5e-4, nesterov=True, average="ema", ema_decay=0.995, select_on="test",
    ),
    "rebat:cifar10_preact_resnet18": dict(
        student="preact_resnet18", normalise=True, padding=4, padding_mode="reflect", eps=8 / 255,
        attack_step=2 / 255, attack_steps=10, attack_start="uniform", epochs=200, lr=0.1, lr_drops=(100, 150),
        lr_factor=1 / 1.5, lr_drop_early=True, weight_decay=5e-4, average="ema", ema_decay=0.999, average_from=106,
        select_on="holdout", select_by="robust", select_steps=10, select_every=1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_run_around_the_steps_is_the_scripts(name: str) -> None:
    recipe = find_setting(name)[2].recipe.as_variant("released")
    usual = dict(precision="fp32", momentum=0.9, nesterov=False, batch_size=128, average="none")
    script = usual | SCRIPTS[name]
    assert {option: recipe.flat()[option] for option in script} == script


def test_frl_keeps_the_last_epoch() -> None:
    recipe = find_setting("frl:cifar10_preact_resnet18")[2].recipe
    released, reweight = (recipe.as_variant(variant) for variant in ("released", "released-reweight"))
    assert released.selection.select_from > released.optim.epochs  # none before the last may be kept
    ours, theirs = released.flat(), reweight.flat()
    assert {one for one in ours if ours[one] != theirs[one]} == {"variant", "delta", "margin_rate"}
    assert (theirs["delta"], theirs["margin_rate"]) == (0.1, 0.0)
