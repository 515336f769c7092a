"""A run's network for others: safetensors with a model card, or what RobustBench asks of a submission.

Either folder holds the architecture as one file of plain PyTorch, so that nobody needs retemper to load it. What is
said of the network is read from config.json and from an evaluation.json of these very weights.
"""

import inspect
import io
import re
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from retemper.console import say
from retemper.engine.checkpoints.header import find_weights, is_run, load_network, read_facts
from retemper.engine.export.model_card import Subject, model_card, model_info, submission_card
from retemper.engine.models import MODELS
from retemper.engine.run.run_folder import RunFolder
from retemper.errors import DataError, UsageError
from retemper.files import file_digest, json_bytes, read_json, write_atomically

FORMATS = ("safetensors", "robustbench")


def export(run: Path, out: Path, form: str, which: str = "best", name: str | None = None) -> Path:
    """Write the folder `out`, atomically file by file.

    Args:
        form: of FORMATS.
        which: the run's "best" or "last" weights.
        name: of the network; None: the run's folder.
    Returns:
        The README.
    Raises:
        UsageError, DataError: it is no run, its weights cannot be used, or `out` is the run or cannot be written.
    """
    if out.resolve() == run.resolve():
        raise UsageError(f"--out {out} is the run itself: name another folder")
    subject = _subject(run, which, name)
    files = _safetensors(subject) if form == "safetensors" else _robustbench(subject)
    files["model.py"] = _architecture(subject).encode()
    sums = "".join(f"{sha256(data).hexdigest()}  {path}\n" for path, data in sorted(files.items()))
    for path, data in (files | {"SHA256SUMS": sums.encode()}).items():
        try:
            (out / path).parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"cannot write to {out} ({error.strerror}): name another folder with --out") from None
        write_atomically(out / path, data)
    return out / "README.md"


def _subject(run: Path, which: str, name: str | None) -> Subject:
    if not is_run(run):
        raise DataError(f"{run} is no run's folder: name one that retemper train has made")
    weights = find_weights(run, which)
    config, facts = RunFolder(run).read_config(), read_facts(weights)
    load_network(weights, facts, torch.device("cpu"))  # nothing damaged goes out
    assert facts.model is not None and facts.channels is not None
    builder = MODELS[facts.model]
    words = [str(facts.num_classes), f"channels={facts.channels}"]
    words += [f"{word}={value}" for word, value in getattr(builder, "keywords", {}).items()]
    digest = file_digest(weights)
    evaluation = _evaluation(run, which, digest)
    side = facts.image_size or (evaluation or {"protocol": {}})["protocol"].get("image_size", 32)
    return Subject(
        name=re.sub(r"[^\w.-]+", "-", name or run.resolve().name),
        weights=weights,
        sha256=digest,
        facts=facts,
        config=_without_paths(config),
        evaluation=evaluation,
        image_shape=(facts.channels, side, side),
        build=f"{_function(facts.model).__name__}({', '.join(words)})",
    )


def _function(model: str) -> Any:
    """The function of engine/models that makes it."""
    return getattr(MODELS[model], "func", MODELS[model])


def _without_paths(config: dict[str, Any]) -> dict[str, Any]:
    """The config as others may see it: which networks were used, and not where on this machine they lay."""
    config = config | {"out": None, "data_root": None}
    for whose in ("teacher", "clean_teacher", "start"):
        if config.get(whose):
            config[whose] = config[whose] | {"path": Path(config[whose]["path"]).name}
    return config


def _evaluation(run: Path, which: str, digest: str) -> dict[str, Any] | None:
    """The run's evaluation of these weights, if there is one."""
    path = run / ("evaluation.json" if which == "best" else f"evaluation-{which}.json")
    content = read_json(path) if path.exists() else None
    if content is None:
        say(f"note: {run} is not evaluated, the card will say so; first: retemper evaluate {run}")
    elif content["protocol"].get("weights_sha256") != digest:
        say(f"note: {path} is of other weights and is left out; again: retemper evaluate {run}")
        return None
    else:
        content["protocol"] = content["protocol"] | {"data_root": None}
    return content


def _architecture(subject: Subject) -> str:
    """The source of its module of engine/models, which needs torch alone."""
    assert subject.facts.model is not None
    source = inspect.getsourcefile(_function(subject.facts.model))
    assert source is not None
    return Path(source).read_text()


def _safetensors(subject: Subject) -> dict[str, bytes]:
    files = {
        "README.md": model_card(subject).encode(),
        "model.safetensors": subject.weights.read_bytes(),
        "config.json": json_bytes(subject.config),
    }
    return files | ({} if subject.evaluation is None else {"evaluation.json": json_bytes(subject.evaluation)})


def _robustbench(subject: Subject) -> dict[str, bytes]:
    model = load_network(subject.weights, subject.facts, torch.device("cpu"))
    buffer, where = io.BytesIO(), f"{subject.facts.dataset}/Linf/{subject.name}"
    torch.save({name: value.contiguous() for name, value in model.state_dict().items()}, buffer)
    return {
        "README.md": submission_card(subject).encode(),
        f"models/{where}.pt": buffer.getvalue(),
        f"model_info/{where}.json": json_bytes(model_info(subject)),
    }
