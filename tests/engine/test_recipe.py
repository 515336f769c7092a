"""Recipes: options by flat name, in groups, checked where they are made, and each explained."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest

from retemper.engine import Method, Recipe, option
from retemper.engine.catalogue import method_module, methods
from retemper.engine.recipe import GROUPS
from retemper.engine.run.changed import changed_options, flat_options
from retemper.options import options_of

by_method = pytest.mark.parametrize("method", methods())


def recipes(method: str) -> list[Recipe]:
    """Return the recipes of every setting of a method in the catalogue."""
    return [setting.recipe for setting in method_module(method).SETTINGS.values()]


@dataclass(frozen=True, kw_only=True)
class Twofold(Method):
    """A method with two variants, the second with options of the run."""

    variants: ClassVar[tuple[str, ...]] = ("paper", "released")
    variant_options: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "released": dict(strength=2.0, nesterov=True, attack_steps=7)
    }
    strength: float = option(1.0, "how strong it is")
    power: int = option(3, "an exponent", positive=True)


def twofold(**options: Any) -> Recipe:
    return Recipe.of(Twofold, **(dict(dataset="digits", student="tiny_resnet") | options))


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("attack_steps", -1, "it must not be negative"),
        ("attack_step", float("inf"), "it must be a finite number"),
        ("attack_start", "somewhere", "it must be one of none, normal, uniform"),
        ("attack_bn", "both", "it must be one of eval, train"),
        ("dataset", "mnist", "it must be one of "),
        ("teacher_model", "resnet19", "it must be one of None, "),
        ("batch_size", 0, "it must be above 0"),
        ("cpu_threads", 0, "it must be above 0"),
        ("ema_decay", float("nan"), "it must be a finite number"),
        ("select_on", "train", "it must be one of holdout, test"),
        ("capture", "maybe", "it must be one of auto, on, off"),
        ("variant", "secret", "it must be one of paper, released"),
        ("strength", -0.5, "it must not be negative"),
        ("power", 0, "it must be above 0"),
    ],
)
def test_a_wrong_value_is_named_by_its_flat_name(name: str, value: object, said: str) -> None:
    with pytest.raises(ValueError) as error:
        twofold(**{name: value})
    assert str(error.value).startswith(f"{name} = {value!r}: {said}")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("attack_setps", "'attack_setps' (did you mean 'attack_steps'?)"),
        ("strenght", "'strenght' (did you mean 'strength'?)"),
        ("bn_mode", "'bn_mode'"),  # the attribute of `attack_bn`
    ],
)
def test_an_unknown_option_is_refused_and_the_nearest_named(wrong: str, said: str) -> None:
    for make in (twofold, twofold().replace):
        with pytest.raises(TypeError) as error:
            make(**{wrong: 1})
        assert str(error.value).startswith(f"there is no option {said}")


def test_options_without_a_default_must_be_given() -> None:
    with pytest.raises(TypeError, match="student"):
        Recipe.of(Twofold, dataset="digits")


def test_an_option_goes_to_its_group() -> None:
    recipe = twofold(strength=4.0, attack_bn="train", lr=0.5, padding=1, select_steps=3, fold=False)
    assert isinstance(recipe.method, Twofold) and recipe.method.strength == 4
    assert (recipe.attack.bn_mode, recipe.optim.lr, recipe.data.padding) == ("train", 0.5, 1)
    assert (recipe.selection.select_steps, recipe.execution.fold) == (3, False)
    assert (recipe.networks.student, recipe.data.dataset) == ("tiny_resnet", "digits")


@by_method
def test_flat_and_grouped_options_are_the_recipe(method: str) -> None:
    for recipe in recipes(method):
        flat, grouped = recipe.flat(), recipe.grouped()
        assert Recipe.of(type(recipe.method), **flat) == recipe == recipe.replace()
        assert list(grouped) == ["method", *GROUPS]
        assert {name: value for group in grouped.values() for name, value in group.items()} == flat
        assert all(recipe.options()[name][0] == group for group, values in grouped.items() for name in values)
        new, old = (json.loads(json.dumps(config)) for config in (grouped, flat))  # as config.json holds them
        assert flat_options(new) == flat_options(old) == old


def test_replace_changes_what_it_is_told_and_nothing_else() -> None:
    recipe = twofold(lr=0.3, strength=5.0)
    other = recipe.replace(attack_steps=4, power=2)
    before, after = recipe.flat(), other.flat()
    assert {name: after[name] for name in after if after[name] != before[name]} == {"attack_steps": 4, "power": 2}
    assert other.replace(attack_steps=before["attack_steps"], power=before["power"]) == recipe


def test_configs_of_earlier_versions_show_the_same_options() -> None:
    grouped = {"method": {"variant": "paper", "beta": 6.0}, "attack": {"eps": 0.1}, "optim": {"lr_drops": [3, 5]}}
    flat = {"variant": "paper", "beta": 6.0, "eps": 0.1, "lr_drops": [3, 5]}
    assert flat_options(grouped) == flat_options(flat) == flat


def test_what_leads_to_another_run_is_told() -> None:
    old = twofold().flat()
    assert changed_options(old, twofold(attack_steps=3, lr=0.5).flat()) == ["attack_steps", "lr"]
    assert changed_options(old, twofold(capture="off").flat()) == [], "to the bit the same run"
    del old["attack_steps"], old["average"]  # a config from before there was a choice
    assert changed_options(old, twofold().flat()) == []
    assert changed_options(old, twofold(average="ema").flat()) == ["average"]


@by_method
def test_an_option_that_a_run_is_too_old_to_have_counts_as_its_default(method: str) -> None:
    """Those of the method itself too, and those that are lists in a file."""
    for recipe in recipes(method):
        now = json.loads(json.dumps(recipe.flat()))
        for name, (_, one) in recipe.options().items():
            if recipe.flat()[name] == one.default:
                old = {other: value for other, value in now.items() if other != name}
                assert changed_options(old, now, type(recipe.method)) == [], name


@by_method
def test_every_option_is_explained_in_a_line(method: str) -> None:
    for recipe in recipes(method):
        for name, (_, one) in recipe.options().items():
            assert one.help.strip() and "\n" not in one.help, name


@by_method
def test_no_two_groups_have_an_option_of_one_name(method: str) -> None:
    for recipe in recipes(method):
        names = [name for group in (type(recipe.method), *GROUPS.values()) for name in options_of(group)]
        assert len(set(names)) == len(names), [name for name in names if names.count(name) > 1]


def test_a_variant_brings_its_options() -> None:
    paper = twofold(lr=0.3)
    released = paper.as_variant("released")
    before, after = paper.flat(), released.flat()
    changed = {name: after[name] for name in after if after[name] != before[name]}
    assert changed == {"variant": "released", "strength": 2.0, "nesterov": True, "attack_steps": 7}
    assert paper.as_variant("paper") == paper
    with pytest.raises(ValueError, match="variant = 'other': it must be one of paper, released"):
        paper.as_variant("other")


@by_method
def test_every_variant_of_every_setting_can_be_made(method: str) -> None:
    for recipe in recipes(method):
        brings = recipe.method.variant_options
        assert brings.keys() <= {*recipe.method.variants}
        for variant in recipe.method.variants:
            flat, expected = recipe.as_variant(variant).flat(), {"variant": variant, **brings.get(variant, {})}
            if flat["dataset"] == "folder":  # no mean is known to normalise by
                expected.pop("normalise", None)
            assert {name: flat[name] for name in expected} == expected


@dataclass(frozen=True, kw_only=True)
class Validating(Method):
    validates_by: ClassVar = "pgd"


@dataclass(frozen=True, kw_only=True)
class Both(Method):
    attacks_teacher: ClassVar[bool] = True


@pytest.mark.parametrize(
    ("method", "options", "said"),
    [
        (Method, dict(average_above=0.2, average_every="step"), "average_above = 0.2"),
        (Method, dict(average_above=0.2, average_every="epoch", holdout_per_class=0), "average_above = 0.2"),
        (Method, dict(select_step=1.2), "select_step = 1.2"),
        (Validating, dict(holdout_per_class=0), "holdout_per_class must be above 0"),
        (Validating, dict(select_on="test", holdout_per_class=0), "holdout_per_class must be above 0"),
        (Both, dict(attack_bn="train"), "attack_bn = 'train'"),
        (Method, dict(nesterov=True, momentum=0.0), "momentum = 0.0"),
        (Method, dict(eps=8.0), "8/255, not 8"),
        (Method, dict(average="ema", ema_decay=1.0), "ema_decay = 1.0"),
        (Method, dict(lr_drops=(0, 3)), "lr_drops = (0, 3)"),
        (Method, dict(teacher_table="on", teacher_ahead=0), "teacher_table = 'on'"),
        (Method, dict(teacher_table="on", augment="cropshift"), "too many for a table"),
        (Method, dict(teacher_table="on", cutout=2), "set teacher_table = 'auto'"),
    ],
)
def test_options_that_contradict_each_other_are_refused(
    method: type[Method], options: dict[str, Any], said: str
) -> None:
    small = dict(dataset="digits", student="tiny_resnet")
    Recipe.of(method, **small)  # without them there is nothing wrong
    with pytest.raises(ValueError) as error:
        Recipe.of(method, **small, **options)
    assert said in str(error.value)


def test_the_learning_rate_falls_as_the_schedule_says() -> None:
    optim = twofold(lr=0.5, lr_drops=(2, 4), lr_factor=0.1).optim
    assert [round(optim.lr_at(epoch), 9) for epoch in (1, 2, 3, 4, 5)] == [0.5, 0.5, 0.05, 0.05, 0.005]
    assert [round(optim.decay(epoch), 9) for epoch in (1, 2, 3, 4)] == [1, 0.1, 0.1, 0.01]
    first = twofold(lr=0.5, lr_drops=(2, 4), lr_drop_of="first").optim
    assert [round(first.lr_at(epoch), 9) for epoch in (2, 3, 5)] == [0.5, 0.05, 0.05]
