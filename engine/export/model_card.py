"""What is told of an exported network: its README.md, and RobustBench's entry."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retemper.commands import command
from retemper.engine.catalogue import method_module, methods
from retemper.engine.checkpoints.header import Facts
from retemper.engine.models import MODELS
from retemper.loaders import usual_eps
from retemper.templates import render

TITLES = {  # of the architectures, as RobustBench writes them
    "resnet18": "ResNet-18",
    "mobilenet_v2": "MobileNetV2",
    "wrn34_10": "WideResNet-34-10",
    "wrn34_20": "WideResNet-34-20",
    "preact_resnet18": "PreActResNet-18",
    "preact_resnet18_frl": "PreActResNet-18 without its last norm",
    "preact_resnet34": "PreActResNet-34",
    "resnet56": "ResNet-56",
    "wrn28_10_silu": "WideResNet-28-10 with SiLU",
    "wrn34_10_silu": "WideResNet-34-10 with SiLU",
    "wrn34_20_silu": "WideResNet-34-20 with SiLU",
    "wrn70_16_silu": "WideResNet-70-16 with SiLU",
    "wrn82_8_silu": "WideResNet-82-8 with SiLU",
    "wrn94_16_silu": "WideResNet-94-16 with SiLU",
    "wrn106_16_silu": "WideResNet-106-16 with SiLU",
    "preact_resnet18_silu": "PreActResNet-18 with SiLU",
}


@dataclass(frozen=True, kw_only=True)
class ExportedNetwork:
    """A network that is exported, and all that is known of it.

    Attributes:
        name: of the network where it is published.
        facts: what the header of its weights says.
        config: the run's config.json, without paths of this machine.
        evaluation: the content of evaluation.json; empty if these weights were not evaluated.
        image_shape: (C, H, W).
        build: the expression that makes the network, once `imports` are imported from model.py.
        normalises: whether the network normalises its images itself.
    """

    name: str
    weights: Path
    sha256: str
    facts: Facts
    config: dict[str, Any]
    evaluation: dict[str, Any]
    image_shape: tuple[int, int, int]
    build: str
    normalises: bool

    @property
    def imports(self) -> str:
        """Return the names in model.py that make the network, as one imports them."""
        return ", ".join(re.findall(r"(?:^|\()([A-Za-z]\w*)(?=[(.])", self.build))

    @property
    def is_wrapped(self) -> bool:
        """Say whether it is a layer before the architecture that normalises the images."""
        return self.build.startswith("Normalised(")

    @property
    def title(self) -> str:
        """Return the name of the architecture, as RobustBench writes it where it is known."""
        return TITLES.get(str(self.facts.model), Path(str(self.facts.model)).name)

    @property
    def is_known(self) -> bool:
        """Say whether retemper has the network itself: it has none of net.py:build, and none of timm's."""
        return self.facts.model in MODELS

    @property
    def path(self) -> str:
        """Return the path of the network in RobustBench's folders, without the suffix."""
        return f"{self.facts.dataset}/Linf/{self.name}"

    @property
    def example(self) -> str:
        """Return a Python expression that makes a batch of one image."""
        return f"torch.rand({', '.join(map(str, (1, *self.image_shape)))})"

    @property
    def protocol(self) -> dict[str, Any]:
        return self.evaluation.get("protocol", {})

    @property
    def attacks(self) -> dict[str, Any]:
        """Return the results by attack."""
        return self.evaluation.get("attacks", {})

    @property
    def checks(self) -> dict[str, Any]:
        """Return the findings of the checks for masked gradients; empty if they were not run."""
        return self.evaluation.get("checks", {})

    @property
    def eps(self) -> str:
        """Return the radius of the evaluation, or else of training, in 255ths where it is a whole number of them."""
        eps = self.protocol.get("eps", self.config["recipe"]["eps"])
        steps = round(255 * eps)
        return f"{steps}/255" if abs(255 * eps - steps) < 1e-6 else f"{eps:g}"


def model_card(network: ExportedNetwork, robustbench: bool = False) -> str:
    """Return README.md: for a folder that the Hugging Face Hub takes, or for a RobustBench submission."""
    method = network.config["method"]
    results = {name + " (upper bound)" * bool(r.get("upper_bound")): r for name, r in network.attacks.items()}
    return render(
        Path(__file__).parent,
        "card.md.jinja",
        network=network,
        robustbench=robustbench,
        facts=network.facts,
        config=network.config,
        paper=(method_module(method).__doc__ or "").partition("\n")[0] if method in methods() else "",
        evaluate=_evaluate(network, robustbench),
        protocol=network.protocol,
        attacks={name: _in_words(how) for name, how in network.protocol.get("attacks", {}).items()},
        results=results,
        table=_table(results, network.protocol.get("classes", [])),
        flags=_flags(network),
    )


def _evaluate(network: ExportedNetwork, robustbench: bool) -> str:
    """Return the command that evaluates the exported file."""
    root = None if network.facts.dataset == "digits" else "DIR"
    if robustbench:  # whose files do not say what they hold
        told = {"model": network.facts.model, "dataset": network.facts.dataset}
        return command("retemper", "evaluate", f"models/{network.path}.pt", **told, data_root=root, eps=network.eps)
    is_usual = network.protocol.get("eps") in (None, usual_eps(str(network.facts.dataset)))
    return command("retemper", "evaluate", "model.safetensors", data_root=root, eps=None if is_usual else network.eps)


def model_info(network: ExportedNetwork) -> dict[str, Any]:
    """Return RobustBench's JSON of a network.

    Accuracies are text, in percent, and null where the attack did not see the whole test set.
    """
    to_fill_in = dict.fromkeys(("link", "name", "authors", "venue", "reported", "footnote"))
    return to_fill_in | {
        "dataset": network.facts.dataset,
        "architecture": network.title,
        "eps": network.eps,
        "clean_acc": _of_all(network, "clean"),
        "autoattack_acc": _of_all(network, "autoattack"),
        "additional_data": False,
        "number_forward_passes": 1,
        "unreliable": network.checks.get("verdict") == "suspect",
    }


def _of_all(network: ExportedNetwork, attack: str) -> str | None:
    """Return an attack's average in percent; None unless it is of the whole test set and more than a bound."""
    result = network.attacks.get(attack)
    if result is None or result.get("upper_bound"):
        return None
    whole = network.protocol["subset"] == "all" and sum(result["count"]) == network.protocol["images"]
    return f"{100 * result['average']:.2f}" if whole else None


def _table(results: Mapping[str, Any], classes: list[str]) -> list[list[str]]:
    """Return the cells of a table: a column for each attack, a row for each class and for each summary."""
    rows = [["class", *results], ["---"] * (1 + len(results))]
    for k, label in enumerate(classes):
        rows.append([label.replace("|", "\\|"), *(_share(result["accuracy"][k]) for result in results.values())])
    written = ("average", "average", _share), ("worst class", "worst", _share), ("NSD", "nsd", "{:.3f}".format)
    for title, name, write in written:
        rows.append([f"**{title}**", *(_with_interval(result, name, write) for result in results.values())])
    return rows


def _in_words(how: Mapping[str, Any]) -> str:
    """Return the constants of an attack on one line: numbers to six digits, and what is so by its name alone."""
    shown = {name: f"{value:g}" if isinstance(value, float) else value for name, value in how.items()}
    return ", ".join(name if value is True else f"{name} {value}" for name, value in shown.items())


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _with_interval(result: Mapping[str, Any], name: str, write: Callable[[float], str]) -> str:
    low, high = result.get("interval", {}).get(name) or (None, None)
    value = "-" if result[name] is None else write(result[name])
    return f"{value} ({write(low)} to {write(high)})" if low is not None and high is not None else value


def _flags(network: ExportedNetwork) -> list[str]:
    """Return the warnings of the attacks, and the checks that raised a flag."""
    found = [f"{name}: {flag}" for name, result in network.attacks.items() for flag in result.get("flags", [])]
    return found + [f"{flag['name']}: {flag['text']}" for flag in network.checks.get("flags", []) if flag["raised"]]
