"""The files of a folder's evaluations: which belongs to which network, and which of several is the fullest.

    evaluation.json         of a run's best weights, or of the first network that was evaluated there
    evaluation-NAME.json    of other weights; NAME is "last" for a run's newest
    evaluation.1.json ...   of the same network under another protocol, or on fewer images

Beside each lies a file of the same name with the verdicts image by image, in CSV.
"""

import re
from collections.abc import Mapping
from glob import escape
from itertools import count
from pathlib import Path
from typing import Any

from retemper.engine.checkpoints.find import Network
from retemper.engine.checkpoints.header import is_run
from retemper.engine.evaluation.content import read_evaluation
from retemper.engine.evaluation.corruptions import CONSTANTS
from retemper.errors import DataError
from retemper.files import file_digest, read_json

UNSAFE = r"[^\w.-]+"  # in a file's name
QUESTION = ("dataset", "split", "image_size", "eps", "norm", "precision", "classes")  # of a protocol: what was asked


def beside(path: Path) -> list[Path]:
    """Return the numbered neighbours of an evaluation that exist: evaluation.1.json, evaluation.2.json, ..."""
    found = path.parent.glob(f"{escape(path.stem)}.*{escape(path.suffix)}")
    numbers = {int(n): one for one in found if (n := one.stem[len(path.stem) + 1 :]).isdecimal()}
    return [numbers[n] for n in sorted(numbers)]


def free_name(path: Path) -> Path:
    """Return the first numbered neighbour of an evaluation that does not exist, nor its verdicts."""
    names = (path.with_name(f"{path.stem}.{n}{path.suffix}") for n in count(1))
    return next(name for name in names if not name.exists() and not name.with_suffix(".csv").exists())


def content_of(path: Path) -> dict[str, Any] | None:
    """Return what an evaluation holds; None if there is none, or what is there is not one."""
    try:
        content = read_evaluation(path, partial=True)
    except DataError:
        return None
    return content if {"protocol", "attacks"} <= content.keys() else None


def same_question(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Say whether two protocols ask the same of the same network: they may differ in images, seed and versions."""
    return all(one.get(name) == other.get(name) for name in (*QUESTION, "weights_sha256"))


def fullness(content: dict[str, Any]) -> tuple[int, int]:
    """Return the number of images and the number of attacks of an evaluation: the larger pair is the fuller one."""
    images = content["protocol"].get("images")
    return images if isinstance(images, int) else 0, len(content["attacks"])


def fuller(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the corruptions of two contents of evaluation.json with more of them, under their key; or nothing."""
    found = [one["corruptions"] for one in (mine, theirs) if "corruptions" in one]
    best = max(found, key=lambda one: (one.get("constants") == CONSTANTS, len(one.get("accuracy", ()))), default=None)
    return {} if best is None else {"corruptions": best}


def fullest(path: Path) -> Path:
    """Return the fullest evaluation that asks the same as the one at `path`: that one, or a numbered neighbour.

    Where there is none at `path`, the newest neighbour says what was asked.
    """
    others = {one: content for one in beside(path) if (content := content_of(one)) is not None}
    main = content_of(path)
    if not others or (main is None and path.exists()):
        return path
    if main is None:
        path = max(others, key=lambda one: one.stat().st_mtime_ns)
        main = others[path]
    asked = main["protocol"]
    alike = {one: content for one, content in others.items() if same_question(content["protocol"], asked)}
    return max({path: main} | alike, key=lambda one: fullness(({path: main} | alike)[one]))


def is_stale(path: Path, protocol: Mapping[str, Any]) -> bool:
    """Say whether the run that an evaluation lies in holds other weights now than those that it is of."""
    weights = path.parent / str(protocol.get("weights"))
    if not is_run(path.parent) or not weights.is_file() or "weights_sha256" not in protocol:
        return False
    return file_digest(weights) != protocol["weights_sha256"]


def all_of(path: Path) -> list[Path]:
    """Return where the evaluations and curves of a network go in each norm, whose evaluation goes to `path`."""
    stems = (path.stem, path.stem.replace("evaluation", "curve", 1))
    return [path.with_name(f"{stem}{norm}.json") for stem in stems for norm in ("", "-l2", "-l1")]


def protocol_in(path: Path) -> dict[str, Any]:
    """Return the protocol of an evaluation or a curve; nothing where there is none, or it cannot be read."""
    try:
        protocol = read_json(path).get("protocol")
    except DataError:
        return {}
    return protocol if isinstance(protocol, dict) else {}


def place(folder: Path, weights: str, network: str, *, best: bool, chosen: bool) -> Path:
    """Return where a network's evaluation goes in `folder`, so that no two networks take turns at one file.

    Args:
        weights: the name of the weights' file, or the network's own where it has none.
        network: the name of the run's folder, or of the network.
        best: whether the first place may be taken; of a run only its best weights may.
        chosen: whether the user chose the folder; else the weights lie in it, and their name tells them apart.
    """

    def is_own(path: Path, free: tuple[None, ...] = (None,)) -> bool:
        was = protocol_in(path)
        return was.get("weights") in (*free, weights) and (not chosen or was.get("network") in (*free, network))

    file, _, entry = weights.partition(":")  # of several networks in one file, each is another
    stem = "-".join(filter(None, [Path(file).stem, entry]))
    first = "evaluation" if best else f"evaluation-{stem}"
    own = [f"evaluation-{network}", f"evaluation-{network}-{stem}"] if chosen else []
    names = (first, *own, f"evaluation-{stem}", f"evaluation-{weights}")
    told_apart = [f"{name}-weights" if re.search("-l[12]$", name) else name for name in names]  # else a norm's file
    paths = [folder / f"{re.sub(UNSAFE, '-', name)}.json" for name in told_apart]
    known = next((path for path in paths if is_own(path, free=())), None)
    return known or next((path for path in paths if all(map(is_own, all_of(path)))), paths[-1])


def destination(network: Network, out: Path | None) -> Path:
    """Return where the evaluation goes: in `out`, or else beside the weights; each network has a file of its own.

    For weights of a run that are not its best the name is another: evaluation-last.json.
    """
    weights = network.weights
    if weights is None:
        return place(out or _default_out(network.name), network.name, label(network), best=True, chosen=out is not None)
    best = weights.name == "best.safetensors" or not is_run(weights.parent)
    return place(out or weights.parent, weights_name(network), label(network), best=best, chosen=out is not None)


def weights_name(network: Network) -> str:
    """Return the name of a network's weights: that of their file, and behind a colon of the entry that was chosen."""
    if network.weights is None:
        return network.name
    return network.weights.name if network.entry is None else f"{network.weights.name}:{network.entry}"


def label(network: Network) -> str:
    """Return a short name of a network: of a run its folder's, of a checkpoint its file's."""
    if network.weights is None:
        return _default_out(network.name).name
    folder = network.weights.resolve().parent
    return folder.name if is_run(folder) else network.weights.name


def _default_out(name: str) -> Path:
    """Return the folder for the evaluation of an external network: runs/robustbench-NAME, runs/net-factory."""
    plain = re.sub(r"[^\w.-]+", "-", re.sub(r"^.*/(?=[^/]*\.py:)|\.py(?=:)", "", name))
    return Path("runs") / plain
