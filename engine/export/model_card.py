"""What is told of an exported network: a model card as Hugging Face reads it, and RobustBench's entry."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retemper.engine.catalogue import method_module, methods
from retemper.engine.checkpoints.header import Facts

TITLES = {  # of the architectures, as RobustBench writes them
    "resnet18": "ResNet-18",
    "mobilenet_v2": "MobileNetV2",
    "wrn34_10": "WideResNet-34-10",
    "preact_resnet18": "PreActResNet-18",
    "preact_resnet34": "PreActResNet-34",
    "resnet56": "ResNet-56",
}


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is exported.

    Attributes:
        name: of the network there.
        config: the run's, without this machine's paths.
        evaluation: what evaluation.json holds, if these weights were evaluated.
        image_shape: (C, H, W).
        build: the expression that makes the network, once the function in it is imported from model.py.
    """

    name: str
    weights: Path
    sha256: str
    facts: Facts
    config: dict[str, Any]
    evaluation: dict[str, Any] | None
    image_shape: tuple[int, int, int]
    build: str

    @property
    def function(self) -> str:
        """What model.py calls it."""
        return self.build.partition("(")[0]

    @property
    def title(self) -> str:
        """Of the architecture."""
        return TITLES.get(str(self.facts.model), str(self.facts.model))

    @property
    def attacks(self) -> dict[str, Any]:
        """The results of evaluation.json by attack; none without one."""
        return {} if self.evaluation is None else self.evaluation["attacks"]


def model_card(subject: Subject) -> str:
    """README.md of the safetensors folder."""
    return f"""{_header(subject)}
# {subject.name}

{_about(subject)}

## Load

With plain PyTorch: `model.py` beside the weights is the architecture. Pixels lie in [0, 1] and are not normalised.

```python
{_plain_code(subject, 'load_file("model.safetensors")', "from safetensors.torch import load_file")}
```

With retemper:

```python
import torch
from retemper.engine import create_model, load_checkpoint

model = create_model("{subject.facts.model}", {subject.facts.num_classes}, channels={subject.facts.channels})
load_checkpoint("model.safetensors", model)
logits = model.eval()({_example(subject)})
```

`retemper evaluate model.safetensors --attacks clean,pgd20,autoattack` attacks it again.

## Results

{_results(subject)}

## Protocol

{_protocol(subject)}

## Files

`config.json` is the whole recipe that it was trained by; `evaluation.json` holds these results and their protocol. The
SHA-256 of `model.safetensors` is `{subject.sha256}`; `sha256sum -c SHA256SUMS` checks all files.
"""


def submission_card(subject: Subject) -> str:
    """README.md of the RobustBench folder."""
    where = f"{subject.facts.dataset}/Linf/{subject.name}"
    return f"""# {subject.name}, for RobustBench

{_about(subject)}

| file | goes |
|---|---|
| `models/{where}.pt` | where the link of the entry points; `load_model(..., model_dir="models")` finds it here |
| `model_info/{where}.json` | into RobustBench's `model_info/` |
| `model.py` | the architecture, into `robustbench/model_zoo/architectures/`; it takes pixels in [0, 1] as they are |

The entry of `model_dicts`:

```python
("{subject.name}", {{"model": lambda: {subject.build}, "gdrive_id": "the file's own"}})
```

Still to be filled in: `link`, `name`, `authors`, `venue`, `reported`, and whatever accuracy is null, because nothing
complete on all test images gave it. `additional_data` is true if a teacher or a start has seen other images.

```python
{_plain_code(subject, f'torch.load("models/{where}.pt", weights_only=True)')}
```

## Results

{_results(subject)}

## Protocol

{_protocol(subject)}
"""


def model_info(subject: Subject) -> dict[str, Any]:
    """RobustBench's JSON of a network; accuracies in percent, as text, and null where not all test images saw them."""
    checks = {} if subject.evaluation is None else subject.evaluation.get("checks", {})
    return {
        "link": None,
        "name": None,
        "authors": None,
        "additional_data": False,
        "number_forward_passes": 1,
        "dataset": subject.facts.dataset,
        "venue": None,
        "architecture": subject.title,
        "eps": _eps(subject),
        "clean_acc": _of_all(subject, "clean"),
        "reported": None,
        "autoattack_acc": _of_all(subject, "autoattack"),
        "footnote": None,
        "unreliable": checks.get("verdict") == "suspect",
    }


def _of_all(subject: Subject, attack: str) -> str | None:
    """An average in percent, if it is of the whole test set and no mere bound."""
    result = subject.attacks.get(attack)
    if result is None or result.get("upper_bound") or subject.evaluation is None:
        return None
    protocol = subject.evaluation["protocol"]
    whole = protocol["subset"] == "all" and sum(result["count"]) == protocol["images"]
    return f"{100 * result['average']:.2f}" if whole else None


def _eps(subject: Subject) -> str:
    """The radius, in 255ths where it is a whole number of them."""
    eps = subject.config["recipe"]["eps"] if subject.evaluation is None else subject.evaluation["protocol"]["eps"]
    steps = round(255 * eps)
    return f"{steps}/255" if abs(255 * eps - steps) < 1e-6 else f"{eps:g}"


def _header(subject: Subject) -> str:
    """YAML; every text in it is quoted as JSON, which is YAML too."""
    dataset = json.dumps(subject.facts.dataset)
    metrics = [
        f"    - {{type: accuracy, name: {json.dumps(_title(name, result))}, value: {result['average']:.4f}}}"
        for name, result in subject.attacks.items()
    ]
    results = [
        "model-index:",
        f"- name: {json.dumps(subject.name)}",
        "  results:",
        "  - task: {type: image-classification}",
        f"    dataset: {{name: {dataset}, type: {dataset}, split: test}}",
        "    metrics:",
        *metrics,
    ]
    lines = [
        "# license: yours to name",
        "pipeline_tag: image-classification",
        "tags: [image-classification, adversarial-robustness, retemper]",
        *(results if metrics else ()),
    ]
    return "\n".join(["---", *lines, "---"])


def _about(subject: Subject) -> str:
    config, facts = subject.config, subject.facts
    channels, side, _ = subject.image_shape
    name = config["method"]
    paper = (method_module(name).__doc__ or "").partition("\n")[0] if name in methods() else ""
    teacher = config["teacher"]
    taught = f" Its teacher was {teacher['path']} ({teacher['model']}, SHA-256 {teacher['sha256']})." if teacher else ""
    return (
        f"A {subject.title} for {facts.dataset}, {facts.num_classes} classes of {channels} x {side} x {side} pixels, "
        f"trained against L-inf attacks with `{name}:{config['setting']}` of retemper, seed {config['seed']}. {paper}"
        f"{taught}"
    )


def _plain_code(subject: Subject, state: str, more: str | None = None) -> str:
    lines = [
        "import torch",
        *([] if more is None else [more]),
        f"from model import {subject.function}",
        "",
        f"model = {subject.build}",
        f"model.load_state_dict({state})",
        f"logits = model.eval()({_example(subject)})",
    ]
    return "\n".join(lines)


def _example(subject: Subject) -> str:
    return f"torch.rand({', '.join(map(str, (1, *subject.image_shape)))})"


def _title(name: str, result: Mapping[str, Any]) -> str:
    return f"{name} (upper bound)" if result.get("upper_bound") else name


def _results(subject: Subject) -> str:
    """A row a class, a column an attack, and the summaries with their intervals."""
    if subject.evaluation is None:
        return "Not evaluated."
    results = subject.attacks
    rows = [["class", *(_title(name, result) for name, result in results.items())], ["---"] * (1 + len(results))]
    for k, label in enumerate(subject.evaluation["protocol"]["classes"]):
        rows.append([label.replace("|", "\\|"), *(_share(result["accuracy"][k]) for result in results.values())])
    for title, name, write in (
        ("average", "average", _share),
        ("worst class", "worst", _share),
        ("NSD", "nsd", _number),
    ):
        rows.append([f"**{title}**", *(_with_interval(result, name, write) for result in results.values())])
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"""{table}

In brackets, the 95 % interval. An accuracy under attack is an upper bound on robustness: a stronger attack can only
lower it. A column that says so is one of a suite that was cut short or leaves attacks out.{_flags(subject)}"""


def _with_interval(result: Mapping[str, Any], name: str, write: Any) -> str:
    low, high = result.get("interval", {}).get(name) or (None, None)
    return write(result[name]) + (f" ({write(low)} to {write(high)})" if low is not None and high is not None else "")


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _flags(subject: Subject) -> str:
    """What speaks against the numbers, and whether anybody looked."""
    assert subject.evaluation is not None
    found = [f"{name}: {flag}" for name, result in subject.attacks.items() for flag in result.get("flags", [])]
    checks = subject.evaluation.get("checks")
    found += [f"{flag['name']}: {flag['text']}" for flag in (checks or {}).get("flags", []) if flag["raised"]]
    if found:
        return "\n\nFlags raised:\n\n" + "\n".join(f"- {one}" for one in found)
    looked = "Checks for masked gradients raised no flag." if checks else "Masked gradients were not looked for."
    return f"\n\n{looked}"


def _protocol(subject: Subject) -> str:
    if subject.evaluation is None:
        return "None yet: `retemper evaluate` makes it."
    protocol = subject.evaluation["protocol"]
    lines = [
        f"{protocol['images']:,} {protocol['split']} images of {protocol['dataset']} ({protocol['subset']}), "
        f"L-inf, eps {_eps(subject)}, {protocol['precision']}, seed {protocol['seed']}",
        *(f"{name}: {', '.join(f'{k} {v}' for k, v in how.items())}" for name, how in protocol["attacks"].items()),
        "versions: " + ", ".join(f"{name} {version}" for name, version in protocol["versions"].items()),
    ]
    return "\n".join(f"- {line}" for line in lines)
