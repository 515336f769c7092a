"""The rows of the comparison: runs by method and by how they were evaluated, their teachers, published numbers."""

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

from retemper.engine.checkpoints.header import is_run
from retemper.engine.report.methods.measured import Measured, measured
from retemper.engine.report.methods.published import Published
from retemper.engine.report.read import RunRecord, as_dict, as_number, read_run
from retemper.errors import DataError
from retemper.loaders import usual_eps
from retemper.options import shown_value

ATTACKS = {"clean": ("clean",), "pgd20": ("pgd20",), "autoattack": ("autoattack", "autoattack-fast")}  # by column
ALIKE = ("dataset", "split", "images", "image_size", "eps", "norm", "precision", "classes")
PASSED_OVER = ("seed", "batch_size", "shards", "fold", "library")  # of an attack's settings: what makes no other attack
Key = tuple[str, str, str, str]
SEVERAL = " or "  # between what the seeds of one method have otherwise
METHOD, TEACHER, PUBLISHED = "method", "teacher", "published"


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a method's training took, the median over the epochs of all its seeds; NaN where it was not recorded.

    Attributes:
        peak_memory_mib: the most of all seeds.
        device: on which it was measured; "" where that is not known, or differs.
    """

    seconds_per_step: float = math.nan
    images_per_second: float = math.nan
    peak_memory_mib: float = math.nan
    epochs: str = ""
    device: str = ""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the comparison.

    Attributes:
        kind: METHOD, TEACHER, or PUBLISHED for numbers of others.
        numbers: by column of `ATTACKS`, each of `MEASURES`; what is not known is missing.
        source: where published numbers were read.
    """

    name: str
    kind: str = METHOD
    network: str = ""
    numbers: Mapping[str, Mapping[str, Measured]] = field(default_factory=dict)
    runs: Sequence[RunRecord] = ()
    cost: Cost = Cost()
    teacher: str = ""
    source: str = ""

    @property
    def key(self) -> Key:
        """Return what tells the rows of a group apart."""
        return self.kind, self.name, self.network, self.source

    def get(self, attack: str, measure: str) -> Measured | None:
        return self.numbers.get(attack, {}).get(measure)


@dataclass(frozen=True, kw_only=True)
class Group:
    """The rows that were evaluated alike: their numbers may be compared.

    Attributes:
        protocol: what of it they share.
    """

    protocol: Mapping[str, Any]
    rows: Sequence[Row]

    def of(self, *kinds: str) -> list[Row]:
        """Return the rows of these kinds."""
        return [row for row in self.rows if row.kind in kinds]


def run_folders(targets: Iterable[Path]) -> list[Path]:
    """Return the runs and evaluations that the targets are or hold, each once.

    Args:
        targets: the folder of a run or an evaluation, the file of one, or a folder of such folders.
    Raises:
        DataError: there is no such file, or a folder holds no run.
    """
    found: list[Path] = []
    for target in targets:
        inside = [one for one in sorted(target.glob("*/")) if _is_one(one)] if target.is_dir() else []
        if not target.exists():
            raise DataError(f"{target} does not exist: name a run's folder, or a folder of runs")
        if not inside and target.is_dir() and not _is_one(target):
            raise DataError(f"{target} holds no run: name a run's folder, or a folder of runs")
        found += [target] if target.is_file() or _is_one(target) else inside
    return list({one.resolve(): one for one in found}.values())


def _is_one(folder: Path) -> bool:
    return is_run(folder) or (folder / "evaluation.json").is_file()


def groups_of(runs: Sequence[RunRecord]) -> list[Group]:
    """Return the evaluated runs in groups that may be compared, the largest first, each with its teachers' rows."""
    alike: dict[str, list[RunRecord]] = {}
    for run in runs:
        if run.results:
            alike.setdefault(_key([run.protocol.get(name) for name in ALIKE]), []).append(run)
    return [_group(members, runs) for members in sorted(alike.values(), key=len, reverse=True)]


def _key(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _group(runs: Sequence[RunRecord], everything: Sequence[RunRecord]) -> Group:
    protocol = {name: runs[0].protocol.get(name) for name in ALIKE}
    taught = {_teacher(run).get("sha256") for run in everything} - {None}
    recipes = {_recipe(run) for run in runs if _weights(run) not in taught}
    students = [run for run in runs if _weights(run) not in taught or _recipe(run) in recipes]
    teachers = _teachers(students, runs, protocol)
    others = [run for run in runs if run not in students and _weights(run) not in teachers]
    rows = [_row(name, METHOD, members) for name, members in _methods(students).items()]
    rows.sort(key=_strength, reverse=True)
    rows += [*teachers.values(), *(_row(run.label, TEACHER, [run]) for run in others)]
    return Group(protocol=protocol, rows=_told_apart(rows))


def _weights(run: RunRecord) -> Any:
    return run.protocol.get("weights_sha256")


def _recipe(run: RunRecord) -> str:
    """Return what the seeds of one method share; a network from elsewhere shares nothing."""
    what = [run.config.get("method"), run.config.get("setting"), run.recipe, _teacher(run).get("sha256")]
    return _key(what if run.config else str(run.evaluation))


def _strength(row: Row) -> tuple[float, ...]:
    """Return what rows are sorted by: the worst class under the strongest attack."""
    found = (row.get(attack, "worst") for attack in ("autoattack", "pgd20", "clean"))
    return tuple(-1.0 if one is None else one.mean for one in found)


def _methods(runs: Sequence[RunRecord]) -> dict[str, list[RunRecord]]:
    """Return the runs of one recipe with different seeds, by a name that no two have."""
    members: dict[str, list[RunRecord]] = {}
    for run in runs:
        key = _recipe(run)
        seeds = [one.config.get("seed") for one in members.get(key, ())]
        members.setdefault(f"{key} {run.folder}" if run.config.get("seed") in seeds else key, []).append(run)
    groups = list(members.values())
    names = [_name(group[0]) for group in groups]
    named: dict[str, list[RunRecord]] = {}
    for name, group in zip(names, groups, strict=True):
        others = [other[0] for other, called in zip(groups, names, strict=True) if called == name]
        full = name + (_apart(group[0], others) or f" ({group[0].name})" if len(others) > 1 else "")
        named[f"{full} ({len(named) + 1})" if full in named else full] = group
    return named


def _name(run: RunRecord) -> str:
    if run.is_foreign:
        return run.label
    preset = run.recipe.get("preset", "paper")
    return f"{run.config.get('method')}:{run.config.get('setting')}" + f", {preset}" * (preset != "paper")


def _apart(run: RunRecord, others: Sequence[RunRecord]) -> str:
    """Return the options of a run that others of the same name have otherwise, as `, igdm 1`."""
    differing = [name for name, value in run.recipe.items() if any(other.recipe.get(name) != value for other in others)]
    return "".join(f", {name.replace('_', '-')} {shown_value(run.recipe[name])}" for name in differing[:3])


def _teacher(run: RunRecord) -> dict[str, Any]:
    return as_dict(run.config.get("teacher"))


def _row(name: str, kind: str, runs: Sequence[RunRecord]) -> Row:
    numbers = {}
    for column, attacks in ATTACKS.items():
        found = next((of for attack in attacks if (of := measured(runs, attack))), None)
        numbers |= {column: found} if found else {}
    teacher = _teacher(runs[0])
    return Row(
        name=name,
        kind=kind,
        network=str(runs[0].recipe.get("student") or runs[0].protocol.get("network") or ""),
        numbers=numbers,
        runs=runs,
        cost=_cost(runs),
        teacher=f"{teacher.get('model')}, {Path(str(teacher.get('path'))).name}" if teacher else "none",
    )


def _cost(runs: Sequence[RunRecord]) -> Cost:
    lines = [(run, line) for run in runs for line in run.metrics]
    speeds, steps = [], []
    for run, line in lines:
        speed, seconds = as_number(line.get("images_per_second")), as_number(line.get("seconds"))
        batch = as_number(run.recipe.get("batch_size"))
        if speed > 0 and seconds > 0:
            speeds.append(speed)
            steps += [seconds / math.ceil(round(speed * seconds) / batch)] if batch >= 1 else []
    peaks = [peak for _, line in lines if (peak := as_number(line.get("peak_memory_mib"))) > 0]
    done = [f"{len(run.metrics)} of {asked}" if (asked := run.recipe.get("epochs")) != len(run.metrics) else str(asked)
            for run in runs if run.config]  # fmt: skip
    devices = {str(run.config.get("device", "")) for run in runs}
    return Cost(
        seconds_per_step=median(steps) if steps else math.nan,
        images_per_second=median(speeds) if speeds else math.nan,
        peak_memory_mib=max(peaks, default=math.nan),
        epochs=", ".join(dict.fromkeys(done)),
        device=devices.pop() if len(devices) == 1 else "",
    )


def _teachers(students: Sequence[RunRecord], runs: Sequence[RunRecord], protocol: Mapping[str, Any]) -> dict[str, Row]:
    """Return the row of each network that students learned from, by its digest; without numbers where it has none."""
    found: dict[str, Row] = {}
    for teacher in map(_teacher, students):
        sha256, path = str(teacher.get("sha256")), Path(str(teacher.get("path")))
        if not teacher or sha256 in found:
            continue
        given = next((run for run in runs if _weights(run) == sha256), None)
        run = given or _evaluated_alike(path, sha256, protocol)
        name, network = path.parent.name if path.suffix == ".safetensors" else path.name, str(teacher.get("model"))
        row = Row(name=name, kind=TEACHER, network=network) if run is None else _row(name, TEACHER, [run])
        found[sha256] = replace(row, network=network, source=str(path))
    return found


def _evaluated_alike(path: Path, sha256: str, protocol: Mapping[str, Any]) -> RunRecord | None:
    """Return the run at `path`, if it has been evaluated under the protocol with the weights that taught."""
    folder = path if path.is_dir() else path.parent
    norm = protocol.get("norm")
    target = folder if norm in (None, "linf") else folder / f"evaluation-{norm}.json"
    if not path.exists() or not (target.is_file() or (target == folder and _is_one(folder))):
        return None
    try:
        run = read_run(target)
    except DataError:
        return None
    alike = _key([run.protocol.get(name) for name in ALIKE]) == _key([protocol.get(name) for name in ALIKE])
    return run if alike and run.results and _weights(run) == sha256 else None


def _told_apart(rows: Sequence[Row]) -> list[Row]:
    """Return the rows with a note at each number whose attack, or images, are not those of most of its column."""
    told = list(rows)
    for column in ATTACKS:
        kinds = {i: _attacked(row, column) for i, row in enumerate(told) if column in row.numbers}
        usual = Counter(kinds.values()).most_common(1)
        for i, kind in kinds.items():
            mixed = SEVERAL in kind[0] or SEVERAL in kind[2]  # the seeds differ among themselves
            if kind != usual[0][0] or mixed:
                other_images = kind[0] != usual[0][0][0] or SEVERAL in kind[0]
                note = f"{kind[0]} images" if other_images else kind[1] or "other settings"
                numbers = {name: replace(one, note=note) for name, one in told[i].numbers[column].items()}
                told[i] = replace(told[i], numbers={**told[i].numbers, column: numbers})
    return told


def _attacked(row: Row, column: str) -> tuple[str, str, str]:
    """Return what a row's numbers in a column were measured with: images, the name of a weaker suite, settings."""
    attack = next(name for name in ATTACKS[column] if all(name in run.results for run in row.runs))
    images = sorted({sum(run.results[attack].report.count) for run in row.runs})
    settings = [as_dict(as_dict(run.protocol.get("attacks")).get(attack)) for run in row.runs]
    known = [{name: value for name, value in one.items() if name not in PASSED_OVER} for one in settings]
    weaker = "fast suite" if attack != column else ""
    return SEVERAL.join(f"{n:,}" for n in images), weaker, SEVERAL.join(sorted(set(map(_key, known))))


def with_published(group: Group, published: Sequence[Published], *, other_data: bool = False) -> Group:
    """Return the group with a row for each of the published numbers that may stand beside it.

    Args:
        other_data: take those on other data, or at another radius, too.
    """
    rows = [_published(one) for one in published if other_data or is_alike(group, one)]
    return replace(group, rows=[*group.rows, *rows])


def is_alike(group: Group, one: Published) -> bool:
    """Say whether published numbers are of the group's data and radius."""
    dataset, eps = str(group.protocol.get("dataset")), group.protocol.get("eps")
    ours = usual_eps(dataset) if eps is None else float(eps)
    return one.data == dataset and abs(one.eps - ours) < 1e-4 and group.protocol.get("norm") in (None, "linf")


def _published(one: Published) -> Row:
    averages = {name: {"average": value} for name in ATTACKS if (value := getattr(one, name)) is not None}
    under = {name: value for name, value in (("worst", one.worst), ("nsd", one.nsd)) if value is not None}
    averages["autoattack"] = averages.get("autoattack", {}) | under
    numbers = {
        attack: {name: Measured(mean=value, low=value, high=value) for name, value in of.items()}
        for attack, of in averages.items()
    }
    about = f"{one.source} ({one.data}, eps {shown_value(one.eps)})"
    return Row(name=one.method, kind=PUBLISHED, network=one.network, numbers=numbers, source=about)
