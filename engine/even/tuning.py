"""The recipe of the two-epoch fine-tunes of a given network: its own images, radius and held-out part."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from retemper.console import say
from retemper.engine.catalogue import method_module
from retemper.engine.checkpoints.external import users_network
from retemper.engine.evaluation.described import Described
from retemper.engine.groups import Data
from retemper.engine.models import MODELS, PIXELS, is_timm
from retemper.engine.recipe import Recipe
from retemper.errors import UsageError
from retemper.loaders import usual_eps
from retemper.options import options_of

CARRIED = (  # of a run, beside all options of its images
    *(name for name in options_of(Data) if name != "extra_fraction"),
    *("student", "normalise", "eps", "attack_step", "loader", "precision", "cpu_threads", "channels_last"),
)
HELD_OUT = ("holdout_per_class", "holdout_from")


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """A setting of a fine-tune, as it is run on one network.

    Attributes:
        is_apart: whether the images that are held out of it were held out of the network's training as well.
    """

    setting: str
    recipe: Recipe
    is_apart: bool


def tuning(method: str, known: Described, holdout: int | None = None, eps: float | None = None) -> Tuning:
    """Return the setting of `method` that is the nearest to a network's, with what the network has otherwise.

    Args:
        method: that of the fine-tune.
        known: what is known of the network.
        holdout, eps: how many images of each class choose, and the radius, where the user says it.
    Raises:
        UsageError: no run can have such a student; the run holds another number out.
    """
    config, facts = known.config, known.facts
    model = str(facts.model)
    if model not in MODELS and not is_timm(model) and users_network(model) is None:
        raise UsageError(
            f"{known.network.name}: only its package can build it, and what is evened is written as weights: name a "
            "function of your own that returns it, net.py:build"
        )
    ran: Mapping[str, Any] = {} if config is None else config["recipe"]
    is_apart = ran.get("select_on", "test") == "holdout" and ran.get("holdout_per_class", 0) > 0
    if is_apart and holdout is not None:
        held = ran["holdout_per_class"]
        raise UsageError(f"--holdout {holdout}: the run held out {held} images of each class: leave it out")
    options = _of_network(known) | {name: ran[name] for name in CARRIED if name in ran}
    options |= {name: ran[name] for name in HELD_OUT if name in ran and is_apart}
    options |= {} if holdout is None else {"holdout_per_class": holdout}
    options |= {} if eps is None else {"eps": eps, "attack_step": eps / 4}
    options = {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
    settings = method_module(method).SETTINGS
    name = _nearest({name: one.recipe.flat() for name, one in settings.items()}, options, config)
    return Tuning(setting=name, recipe=settings[name].recipe.replace(**options), is_apart=is_apart)


def as_normalised(found: Tuning, whose: str) -> Tuning:
    """Return the fine-tune of a network that normalises its images first, `whose` it is in words.

    Raises:
        UsageError: of its data set neither mean nor deviation is known.
    """
    if found.recipe.networks.normalise:
        return found
    if (dataset := found.recipe.data.dataset) not in PIXELS:
        raise UsageError(f"{whose} normalises its images, and no mean and deviation are known of {dataset}")
    return replace(found, recipe=found.recipe.replace(normalise=True))


def say_what_chooses(found: Tuning, whose: str) -> None:
    """Say which images choose, and that a network from elsewhere may have learned from them."""
    count = found.recipe.selection.holdout_per_class
    if found.is_apart:
        say(f"{whose}: {count} training images of each class choose, which its training held out")
    else:
        say(
            f"note: {count} training images of each class choose, and {whose} may have learned from them: what it "
            "reaches on them flatters it"
        )


def _of_network(known: Described) -> dict[str, Any]:
    """Return the options that follow from the network itself."""
    facts = known.facts
    eps = usual_eps(str(facts.dataset)) if facts.eps is None else facts.eps
    size = {} if facts.image_size is None else {"image_size": facts.image_size}
    return dict(dataset=facts.dataset, student=facts.model, eps=eps, attack_step=eps / 4, **size)


def _nearest(
    settings: Mapping[str, Mapping[str, Any]], options: Mapping[str, Any], config: Mapping[str, Any] | None
) -> str:
    """Return the setting that is the most like `options`: by name, then by images, then by student."""
    own = {} if config is None else config
    known = ("dataset", "image_size", "student")

    def likeness(name: str) -> tuple[bool, ...]:
        same = (settings[name].get(one) == options.get(one) for one in known)
        return (name == own.get("setting") and settings[name]["dataset"] == options["dataset"], *same)

    return max(settings, key=likeness)
