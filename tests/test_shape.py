"""What is read back has the shape that its reader relies on, or is refused in one line: fuzzed field by field."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from retemper.engine.evaluation.compare import as_text, compare
from retemper.engine.evaluation.content import read_evaluation
from retemper.engine.evaluation.ledger import Ledger
from retemper.engine.evaluation.summary import summary
from retemper.engine.evaluation.verdicts import read_evaluated
from retemper.engine.report.build import build_report
from retemper.engine.report.read import read_run
from retemper.engine.run.run_folder import RunFolder
from retemper.errors import DataError, UsageError
from retemper.files import read_json_lines
from retemper.shape import PathText, misfit, parse_json


class Told(TypedDict):
    name: str


class Sample(Told, total=False):
    size: int
    shares: list[float | None]
    ends: tuple[float, float] | None
    inner: dict[str, Told]
    place: PathText | None


@dataclass
class Sizes:
    height: int
    names: tuple[str, ...]


@pytest.mark.parametrize(
    ("value", "kind", "words"),
    [
        ({"name": "a", "other": [1]}, Sample, None),
        ({}, Sample, "it has no name"),
        ([], Sample, "it is a list, not an object"),
        ({"name": None}, Sample, "name is null, not text"),
        ({"name": "a", "size": True}, Sample, "size is true, not a whole number"),
        ({"name": "a", "size": 1.5}, Sample, "size is 1.5, not a whole number"),
        ({"name": "a", "shares": [1, None, 0.5]}, Sample, None),
        ({"name": "a", "shares": [1, "2"]}, Sample, 'shares[1] is "2", not a number'),
        ({"name": "a", "ends": [1]}, Sample, "ends holds 1 values, not 2"),
        ({"name": "a", "inner": {"b": {}}}, Sample, "it has no inner.b.name"),
        ({"name": "a", "inner": {"b": 3}}, Sample, "inner.b is 3, not an object"),
        ({"name": "a", "place": "a\0"}, Sample, 'place is "a\\u0000", not a path'),
        ({"name": "a", "place": "a\udcff"}, Sample, None),
        ({"height": 1, "names": ["a", 2]}, Sizes, "names[1] is 2, not text"),
        ({"height": 1}, Sizes, "it has no names"),
    ],
)
def test_a_misfit_is_named(value: Any, kind: Any, words: str | None) -> None:
    assert misfit(value, kind) == words


def test_what_is_missing_may_be_missing_in_part() -> None:
    assert misfit({"inner": {"b": {}}}, Sample, partial=True) is None
    assert misfit({"inner": {"b": {"name": 1}}}, Sample, partial=True) == "inner.b.name is 1, not text"


@pytest.mark.parametrize(
    "data",
    [b"", b"\xff", b"[" * 10_000, b"[" * 60 + b"]" * 60, b"1e400", b"NaN", b"-Infinity", b"9" * 400, b"9" * 9_000],
    ids=range(9),
)
def test_json_that_nobody_can_work_with_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError):
        parse_json(data)
    with pytest.raises(ValueError):
        parse_json(b'{"a": [1, ' + data + b"]}")


def test_lines_that_hold_something_else_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"name": "a\xe2\x80\xa8b"}\n\n{"name": 1}\n{"name": NaN}\n\xff\n' + b"[" * 10_000 + b"\n3\n{")
    assert read_json_lines(path, Told) == ([{"name": "a\u2028b"}], 6)
    assert read_json_lines(tmp_path / "none", Told) == ([], 0)


# every field of every file

ENTRY = {
    "accuracy": [0.5, None, 1.0], "count": [2, 0, 2], "average": 0.75, "worst": 0.5, "worst_class": 0,
    "worst_tenth": 0.5, "nsd": 0.3, "interval": {"average": [0.1, 0.9], "nsd": None, "class": [[0, 1]]},
    "measures": {"class_average": 0.75, "honest_worst": None, "interval": {"gini": [0.1, 0.2], "class_average": None}},
    "confusion": [[1, 0, 1], [0, 0, 0], [0, 0, 2]], "seconds": 1.0, "complete": True, "upper_bound": False,
    "flags": ["a"], "broken_by": {"square": 1},
}  # fmt: skip
PROTOCOL = {
    "dataset": "digits", "split": "test", "images": 4, "subset": "all", "eps": 0.1, "image_size": 8, "norm": "linf",
    "precision": "fp32", "seed": 0, "batch_size": 4, "weights": "best.safetensors", "weights_sha256": "0",
    "classes": ["a", "b", "c"], "versions": {"torch": "2"}, "attacks": {"clean": {"steps": 0, "step": 0.0}},
    "data_root": None,
}  # fmt: skip
FLAG = {"name": "radius", "raised": True, "value": None, "threshold": 0.1, "text": "so"}
CHECKS = {"verdict": "suspect", "images": 3, "flags": [FLAG], "ladder": {"radius": [{"eps": 0.0, "accuracy": 1.0}]}}
WHOLE: dict[str, Any] = {
    "config.json": {
        "method": "sat", "setting": "digits", "seed": 0, "classes": ["a", "b", "c"], "channels": 1, "out": "x",
        "recipe": {"data": {"dataset": "digits", "image_size": 8}, "attack": {"eps": 0.1},
                   "networks": {"student": "tiny_resnet"}, "optim": {"epochs": 2}, "method": {"variant": "paper"}},
        "teacher": {"path": "x", "model": "tiny_resnet", "sha256": "0"}, "start": None, "data_root": "/",
        "versions": {"torch": "2"}, "device": "cpu", "processes": 1, "commit": None, "started": "now",
    },
    "metrics.jsonl": {
        "epoch": 1, "loss": 1.0, "lr": 0.1, "seconds": 1.0, "images_per_second": 2.0, "class_loss": [1.0, None, 1.0],
        "class_accuracy": [0.5, None, 1.0], "class_weight": [1.0, 1.0, 1.0], "holdout": {"average": 0.5, "worst": 0.5},
    },
    "evaluation.json": {"protocol": PROTOCOL, "attacks": {"clean": ENTRY}, "checks": CHECKS},
    "autoattack.csv": {"facts": {"eps": 0.1, "seed": 0}, "notes": {"flags": [], "seconds": 1.0, "perturbation": 0.1},
                       "sha256": "0"},
}  # fmt: skip
VERDICTS = "image,label,clean\n0,0,1\n1,0,0\n2,2,1\n3,2,1\n"
PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
VALUES = PLAIN | st.sampled_from([10**400, -(2**62), 1e308, "\0", "\ud800"])
VALUES |= st.recursive(
    PLAIN, lambda of: st.lists(of, max_size=3) | st.dictionaries(st.text(max_size=3), of, max_size=3)
)


def fields_of(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the way to each field of a value, and to the value itself."""
    yield at
    if isinstance(value, dict | list):
        for name, one in value.items() if isinstance(value, dict) else enumerate(value):
            yield from fields_of(one, (*at, name))


def with_field(value: Any, at: tuple[Any, ...], new: Any) -> Any:
    """Return a copy of a value with another field, or without it where `new` is the ellipsis."""
    if not at:
        return {} if new is ... else new
    copy = value.copy()
    if new is ... and len(at) == 1:
        del copy[at[0]]
    else:
        copy[at[0]] = with_field(copy[at[0]], at[1:], new)
    return copy


def evaluated(folder: Path) -> None:
    summary(read_evaluation(folder / "evaluation.json"))


def compared(folder: Path) -> None:
    run = read_evaluated(folder)
    as_text(compare([run], [run], draws=10))


READERS: dict[str, list[Callable[[Path], object]]] = {
    "config.json": [read_run, lambda folder: RunFolder(folder).read_config()],
    "metrics.jsonl": [read_run, lambda folder: RunFolder(folder).load_state()],
    "evaluation.json": [read_run, evaluated, compared],
    "autoattack.csv": [lambda folder: Ledger.read(folder / "autoattack.csv")],
}
CASES = [(file, at) for file, content in WHOLE.items() for at in fields_of(content)]


def written(folder: Path, file: str = "", at: tuple[Any, ...] = (), new: Any = None) -> Path:
    """Write a run's files with one field that is another."""
    for name, content in WHOLE.items():
        text = json.dumps(with_field(content, at, new) if name == file else content)
        rows = "\nimage,label,clean,tried,broken_by,predicted,margin,seed\n" if name == "autoattack.csv" else "\n"
        (folder / name).write_text(("# " if name == "autoattack.csv" else "") + text + rows)
    (folder / "evaluation.csv").write_text(VERDICTS)
    return folder


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=st.sampled_from(CASES), new=VALUES | st.just(...))
def test_another_value_in_any_field_is_read_or_refused_in_one_line(
    case: tuple[str, tuple[Any, ...]], new: Any, tmp_path: Path
) -> None:
    file, at = case
    folder = written(tmp_path, file, at, new)
    for read in READERS[file]:
        try:
            read(folder)
        except (DataError, UsageError) as error:
            assert "\n" not in str(error)


@settings(max_examples=2, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=st.sampled_from([case for case in CASES if case[0] != "autoattack.csv"]), new=VALUES)
def test_a_report_is_made_of_what_was_read(case: tuple[str, tuple[Any, ...]], new: Any, tmp_path: Path) -> None:
    try:
        build_report([written(tmp_path, *case, new)], tmp_path / "out")
    except DataError as error:
        assert "\n" not in str(error)
