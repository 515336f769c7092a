"""A run's network for others: safetensors with a model card, or the files of a RobustBench submission.

Either folder holds the architecture as one file of plain PyTorch, so that nobody needs retemper to load it. What is
said of the network comes from config.json, and from an evaluation.json of these very weights.
"""

import inspect
import io
import re
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import nn

from retemper.commands import command
from retemper.console import say
from retemper.engine.checkpoints.external import users_network
from retemper.engine.checkpoints.header import Facts, find_weights, is_run, load_network, read_facts, read_header
from retemper.engine.evaluation.content import read_evaluation
from retemper.engine.evaluation.places import fullest
from retemper.engine.export.model_card import ExportedNetwork, model_card, model_info
from retemper.engine.models import MODELS, Normalised, NormalisingNetwork, blocks, is_timm, normalised
from retemper.engine.models.from_timm import TimmNetwork, timm_keywords
from retemper.engine.run.data import SIDES_PX
from retemper.engine.run.run_folder import RunFolder
from retemper.errors import DataError, UsageError
from retemper.files import file_digest, json_bytes, write_atomically

TIMM_IMPORTS = '''"""A network of the package timm, which normalises its images itself: pip install timm."""

from collections.abc import Sequence
from typing import Any

import timm
import torch
from torch import Tensor, nn

Values = Sequence[float] | Tensor
'''


def export(run: str | Path, out: str | Path, form: str, which: str = "best", name: str | None = None) -> Path:
    """Write a run's network into the folder `out`, each file atomically.

    Args:
        form: "safetensors" or "robustbench".
        which: the run's "best" or "last" weights.
        name: of the network; None: that of the run's folder.
    Returns:
        The path of README.md.
    Raises:
        DataError: `run` is no run, or its weights cannot be used.
        UsageError: `out` is the run itself, or cannot be written.
    """
    run, out = Path(run), Path(out)
    if out.resolve() == run.resolve():
        raise UsageError(f"--out {out} is the run itself: name another folder")
    network = _read_network(run, which, name)
    if form == "robustbench" and not network.is_known:
        raise UsageError(
            f"RobustBench takes networks of the literature, and not {network.facts.model}: export safetensors"
        )
    files = _safetensors(network) if form == "safetensors" else _robustbench(network)
    files["model.py"] = architecture_source(str(network.facts.model), network.is_wrapped).encode()
    sums = "".join(f"{sha256(data).hexdigest()}  {path}\n" for path, data in sorted(files.items()))
    for path, data in (files | {"SHA256SUMS": sums.encode()}).items():
        try:
            (out / path).parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"cannot write to {out} ({error.strerror}): name another folder with --out") from None
        write_atomically(out / path, data)
    return out / "README.md"


def _read_network(run: Path, which: str, name: str | None) -> ExportedNetwork:
    if not is_run(run):
        raise DataError(f"{run} is no run's folder: name one that retemper train has made")
    weights = find_weights(run, which)
    config, facts = RunFolder(run).read_config(), read_facts(weights)
    config |= {"training_cut": cut} if (cut := read_header(weights).get("cut")) else {}
    model = load_network(weights, facts, torch.device("cpu"))  # so that nothing damaged goes out
    assert facts.model is not None and facts.num_classes is not None and facts.channels is not None
    digest = file_digest(weights)
    evaluation = _read_evaluation(run, which, digest)
    usual = SIDES_PX.get(facts.dataset or "", 32)
    side = facts.image_size or evaluation.get("protocol", {}).get("image_size", usual)
    return ExportedNetwork(
        name=re.sub(r"[^\w.-]+", "-", name or run.resolve().name),
        weights=weights,
        sha256=digest,
        facts=facts,
        config=_without_paths(config),
        evaluation=evaluation,
        image_shape=(facts.channels, side, side),
        build=_call(model, facts),
        normalises=isinstance(model, Normalised | NormalisingNetwork),
    )


def _call(network: nn.Module, facts: Facts) -> str:
    """Return the call that makes the network of `facts`, with the exported model.py imported."""
    pixels = ""
    if isinstance(network, Normalised | NormalisingNetwork):
        mean, std = (", ".join(f"{value:.7g}" for value in values.flatten()) for values in (network.mean, network.std))
        pixels = f", mean=[{mean}], std=[{std}]"
    if isinstance(network, Normalised):
        return f"Normalised({_call(network.network, facts)}{pixels})"
    model, num_classes, channels = str(facts.model), facts.num_classes, facts.channels
    assert num_classes is not None and channels is not None
    if own := users_network(model):
        return own.call(num_classes, channels)
    if is_timm(model):
        words = timm_keywords(model, num_classes, channels, facts.side) | {"pretrained": False}
        given = ", ".join(f"{word}={value}" for word, value in words.items())
        return f'TimmNetwork(timm.create_model("{model.removeprefix("timm:")}", {given}){pixels})'
    keywords = {"channels": channels} | getattr(MODELS[model], "keywords", {})
    words = [str(num_classes), *(f"{word}={value}" for word, value in keywords.items())]
    return f"{_function(model).__name__}({', '.join(words)}{pixels})"


def _function(model: str) -> Any:
    """Return the function of retemper.engine.models that makes the network."""
    return getattr(MODELS[model], "func", MODELS[model])


def _without_paths(config: dict[str, Any]) -> dict[str, Any]:
    """Return the config for others to read: with the names of the networks that were used, not their folders."""
    recipe = config["recipe"]
    student = Path(recipe["student"]).name  # of net.py:build the file alone
    config = config | {"out": None, "data_root": None, "recipe": recipe | {"student": student}}
    for whose in ("teacher", "clean_teacher", "start", "extra"):
        if config.get(whose):
            config[whose] = config[whose] | {"path": Path(config[whose]["path"]).name}
    return config


def _read_evaluation(run: Path, which: str, digest: str) -> dict[str, Any]:
    """Return the run's evaluation of these weights, empty if there is none."""
    path = run / ("evaluation.json" if which == "best" else f"evaluation-{which}.json")
    again = command("retemper", "evaluate", run, weights=None if which == "best" else which)
    if not path.exists():
        say(f"note: {run} is not evaluated, the card will say so; first: {again}")
        return {}
    path = fullest(path)
    content = read_evaluation(path)
    if content["protocol"].get("weights_sha256") != digest:
        say(f"note: {path} is of other weights and is left out; again: {again}")
        return {}
    content.pop("asked", None)  # it names the run's folder here
    return content | {"protocol": content["protocol"] | {"data_root": None}}


def architecture_source(model: str, normalises: bool = False) -> str:
    """Return the source of an architecture as one file that needs torch alone, or timm for one of timm's.

    What it shares with other architectures takes the place of the import.

    Args:
        normalises: whether the layer that normalises the images is to stand below it.
    """
    if normalises:
        layer = inspect.getsource(normalised).partition('"""\n')[2]  # without the module's docstring
        return f"{architecture_source(model).rstrip()}\n\n\n{layer.lstrip()}"
    if own := users_network(model):
        say(f"note: model.py is a copy of {own.file}; what it imports from beside it is not in the export")
        return own.file.read_text()
    if is_timm(model):
        parts = (inspect.getsource(one) for one in (NormalisingNetwork, Normalised, TimmNetwork))
        return "\n\n".join([TIMM_IMPORTS, *parts])
    source, shared = inspect.getsourcefile(_function(model)), inspect.getsource(blocks)
    assert source is not None
    body = shared.partition('"""\n')[2].lstrip()  # without the module's docstring
    return re.sub(
        r"^from retemper\.engine\.models\.blocks import .*\n", lambda _: body, Path(source).read_text(), flags=re.M
    )


def _safetensors(network: ExportedNetwork) -> dict[str, bytes]:
    files = {
        "README.md": model_card(network).encode(),
        "model.safetensors": network.weights.read_bytes(),
        "config.json": json_bytes(network.config),
    }
    return files | ({"evaluation.json": json_bytes(network.evaluation)} if network.evaluation else {})


def _robustbench(network: ExportedNetwork) -> dict[str, bytes]:
    model = load_network(network.weights, network.facts, torch.device("cpu"))
    buffer = io.BytesIO()
    torch.save({name: value.contiguous() for name, value in model.state_dict().items()}, buffer)
    return {
        "README.md": model_card(network, robustbench=True).encode(),
        f"models/{network.path}.pt": buffer.getvalue(),
        f"model_info/{network.path}.json": json_bytes(model_info(network)),
    }
