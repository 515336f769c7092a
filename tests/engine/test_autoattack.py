"""Our AutoAttack runner: the library's verdicts, whatever happens on the way."""

import json
import signal
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from retemper.cli import run
from retemper.engine.evaluation import autoattack, library
from retemper.engine.evaluation.autoattack import SUITES, SuiteRequest, run_suite, suite_attacks, suite_entry
from retemper.engine.evaluation.ledger import Ledger
from retemper.engine.evaluation.shards import evaluate_suite
from retemper.engine.predict import as_float, balanced_order
from retemper.errors import DataError, UsageError
from retemper.loaders import Split, load_split

CPU = torch.device("cpu")
EPS = 0.08


class Linear(nn.Module):
    """A linear model fitted to the digits by least squares, so robust that every attack finds images left to break."""

    def __init__(self, split: Split, scale: float = 10.0) -> None:
        super().__init__()
        images = as_float(split, torch.arange(len(split)), CPU).flatten(1).double()
        wanted = nn.functional.one_hot(torch.from_numpy(split.labels), 10).double() - 0.1
        gram = images.T @ images + 5 * torch.eye(images.shape[1], dtype=torch.float64)
        self.weight = nn.Parameter(scale * torch.linalg.solve(gram, images.T @ wanted).T.float())

    def forward(self, image: Tensor) -> Tensor:
        return image.flatten(1) @ self.weight.T


@pytest.fixture(scope="module")
def digits() -> Split:
    return load_split("digits", "test", None, None)


@pytest.fixture(scope="module")
def model() -> Linear:
    return Linear(load_split("digits", "train", None, None)).eval().requires_grad_(False)


def shortened(attacks: dict[str, Any]) -> dict[str, Any]:
    """The same attacks with fewer steps, so that a suite takes a second."""
    for name in ("apgd-ce", "apgd-t"):
        attacks[name].n_iter = 12
    for name in ("apgd-t", "fab-t"):
        attacks[name].n_target_classes = min(2, attacks[name].n_target_classes)
    attacks["fab-t"].n_iter, attacks["square"].n_queries = 5, 60
    return attacks


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = autoattack.library_attacks
    monkeypatch.setattr(autoattack, "library_attacks", lambda *words: shortened(whole(*words)))


def begun(folder: Path, split: Split, images: int = 60, **facts: Any) -> Ledger:
    order = balanced_order(split.labels, images)
    return Ledger.begin(folder / "autoattack.csv", {"eps": EPS, "seed": 0, **facts}, order, split.labels[order])


def rows(path: Path) -> str:
    return path.read_text().partition("\n")[2]


def request(**changes: Any) -> SuiteRequest:
    return SuiteRequest(**{"eps": EPS, "device": CPU, "batch_size": 16, **changes})


def test_verdicts_are_the_librarys_own(short: None, model: Linear, digits: Split, tmp_path: Path) -> None:
    from pyautoattack import AutoAttack

    ledger = begun(tmp_path, digits)
    assert run_suite(model, digits, request(), ledger)

    suite = AutoAttack(model, eps=EPS, version="standard", seed=0, device="cpu")
    suite.fab.targeted = True
    shortened({"apgd-ce": suite.apgd, "apgd-t": suite.apgd_targeted, "fab-t": suite.fab, "square": suite.square})
    clean = as_float(digits, torch.from_numpy(ledger.image_N), CPU).contiguous()
    label_N = torch.from_numpy(ledger.label_N)
    _, given_N = suite.run_standard_evaluation(clean, label_N, batch_size=16)
    assert ledger.holds(SUITES["standard"]).tolist() == (given_N == label_N).tolist()
    assert ledger.predicted_under(SUITES["standard"]).tolist() == given_N.tolist()
    fresh = Ledger(tmp_path / "fresh.csv", {}, ledger.image_N, ledger.label_N)
    assert fresh.predicted_under(SUITES["standard"]).tolist() == ledger.label_N.tolist()  # an upper bound
    assert 5 < ledger.holds(SUITES["standard"]).sum() < (ledger.clean_N == 1).sum()
    assert np.isfinite(ledger.margin_N).all() and ((ledger.margin_N > 0) == ledger.holds(SUITES["standard"])).all()


def test_a_run_stopped_after_any_batch_ends_alike(
    short: None, model: Linear, digits: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "alone").mkdir()
    alone = begun(tmp_path / "alone", digits)
    assert run_suite(model, digits, request(), alone)
    clock = count(0.0)  # every look at it, one before each batch and one behind, takes a second
    monkeypatch.setattr(autoattack, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    turns = 0
    while not run_suite(model, digits, request(budget_s=10 if turns % 2 else 1e-9), begun(tmp_path, digits)):
        turns += 1  # every second turn has no time at all, and must not lose anything
    assert turns > 2
    assert rows(tmp_path / "autoattack.csv") == rows(alone.path)


def test_the_fast_suite_is_the_standard_ones_beginning(
    short: None, model: Linear, digits: Split, tmp_path: Path
) -> None:
    ledger = begun(tmp_path, digits)
    assert run_suite(model, digits, request(suite="fast"), ledger)
    fast = ledger.holds(SUITES["fast"]).copy()
    assert suite_entry(ledger, "fast")["upper_bound"] and suite_entry(ledger, "fast")["complete"]
    assert not suite_entry(ledger, "standard")["complete"]
    again = begun(tmp_path, digits)
    assert run_suite(model, digits, request(), again)
    assert (fast >= again.holds(SUITES["standard"])).all()
    assert (again.holds(SUITES["fast"]) == fast).all()
    assert not suite_entry(again, "standard")["upper_bound"]


def test_shards_together_are_runs_on_their_images(short: None, model: Linear, digits: Split, tmp_path: Path) -> None:
    order = balanced_order(digits.labels, 60)
    options: dict[str, Any] = dict(known={"dataset": "digits"}, path=tmp_path / "autoattack.csv")
    assert evaluate_suite(model, digits, order, request(), shard=(2, 2), **options) is None
    assert not (tmp_path / "autoattack.csv").exists()
    whole = evaluate_suite(model, digits, order, request(), shard=(1, 2), **options)
    assert whole is not None and whole.is_complete(SUITES["standard"])
    assert whole.image_N.tolist() == order.tolist() and whole.facts["shards"] == 2
    for part in np.array_split(order, 2):
        (tmp_path / "part").mkdir(exist_ok=True)
        alone = Ledger(tmp_path / "part" / "autoattack.csv", {"eps": EPS, "seed": 0}, part, digits.labels[part])
        run_suite(model, digits, request(), alone)
        own = np.isin(whole.image_N, part)
        assert whole.holds(SUITES["standard"])[own].tolist() == alone.holds(SUITES["standard"]).tolist()
    assert evaluate_suite(model, digits, order, request(), **options) is not None  # goes on with the merged one
    assert not (tmp_path / "autoattack.1.csv").exists()


def test_a_ledger_of_another_protocol_is_kept_and_a_damaged_one_refused(digits: Split, tmp_path: Path) -> None:
    first = begun(tmp_path, digits)
    first.write()
    assert begun(tmp_path, digits, seed=1).facts["seed"] == 1
    assert (tmp_path / "autoattack.1.csv").exists()
    first.write()
    path = tmp_path / "autoattack.csv"
    content = bytearray(path.read_bytes())
    for place in (5, len(content) // 2, len(content) - 3):
        damaged = bytearray(content)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(DataError, match="damaged"):
            begun(tmp_path, digits)


def test_two_processes_do_not_share_a_ledger(digits: Split, tmp_path: Path) -> None:
    ledger = begun(tmp_path, digits)
    with ledger.locked(), pytest.raises(UsageError, match="another process"), ledger.locked():
        pass


def test_the_librarys_flags_are_results(short: None, model: Linear, digits: Split, tmp_path: Path) -> None:
    class Noisy(nn.Module):
        def forward(self, image: Tensor) -> Tensor:
            return model(image) + 0.1 * torch.randn(len(image), 10)

    ledger = begun(tmp_path, digits, images=20)
    run_suite(Noisy(), digits, request(suite="fast"), ledger)
    assert any("randomized" in flag for flag in suite_entry(ledger, "fast")["flags"])
    assert any("randomized" in flag for flag in Ledger.read(ledger.path).notes["flags"])


def test_square_helping_is_flagged(digits: Split, tmp_path: Path) -> None:
    ledger = begun(tmp_path, digits)
    ledger.clean_N[:], ledger.tried_N[:], ledger.broken_by[:3] = 1, 4, "square"
    flags = suite_entry(ledger, "standard")["flags"]
    assert len(flags) == 1 and "Square broke 3 images" in flags[0]


def test_a_missing_library_is_told_in_a_line(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(library, "version", missing)
    words = ["--attacks", "autoattack", "--limit", "8", "--out", str(tmp_path)]
    assert run(["evaluate", str(teacher), *words]) == 2
    error = capsys.readouterr().err
    assert "pip install 'retemper[eval]'" in error and error.count("\n") == 1


@pytest.mark.parametrize(("classes", "attacks"), [(2, "apgd-ce,fab-t,square"), (3, "apgd-ce,apgd-dlr,fab-t,square")])
def test_few_classes_get_what_the_library_can_and_the_rest_is_named(
    classes: int, attacks: str, short: None, model: Linear, digits: Split, tmp_path: Path
) -> None:
    class Few(nn.Module):
        def forward(self, image: Tensor) -> Tensor:
            return model(image)[:, :classes]

    chosen = np.flatnonzero(digits.labels < classes)[:30]
    names = digits.classes[:classes]
    few = replace(digits, read=lambda: digits.images[chosen], labels=digits.labels[chosen], classes=names)
    ledger = Ledger.begin(tmp_path / "autoattack.csv", {"eps": 0.2}, np.arange(30), few.labels)
    assert run_suite(Few(), few, request(eps=0.2), ledger)
    entry = suite_entry(ledger, "standard", classes)
    assert list(entry["broken_by"]) == attacks.split(",") == list(suite_attacks("standard", classes))
    assert entry["complete"] and entry["upper_bound"] and entry["left_out"] == ["apgd-t"]
    assert f"on {classes} classes without apgd-t" in entry["flags"][0]
    assert entry["broken_by"]["apgd-ce"] > 0
    with pytest.raises(UsageError, match="two classes"):
        suite_attacks("standard", 1)


def test_a_ledger_that_was_kept_is_found_again(digits: Split, tmp_path: Path) -> None:
    first = begun(tmp_path, digits)
    first.clean_N[:3] = 1
    first.write()
    begun(tmp_path, digits, images=5).write()
    again = begun(tmp_path, digits)
    assert again.path.name == "autoattack.1.csv" and (again.clean_N == 1).sum() == 3


def test_a_network_that_cannot_be_folded_is_not_attacked_as_if_it_were(
    model: Linear, digits: Split, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="--fold"):
        run_suite(model, digits, request(fold=True), begun(tmp_path, digits))


def test_random_draws_of_others_are_left_alone(short: None, model: Linear, digits: Split, tmp_path: Path) -> None:
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    run_suite(model, digits, request(suite="fast"), begun(tmp_path, digits, images=10))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_killed_with_9_the_command_ends_with_the_same_ledger(
    teacher: Path, start: Callable[..., Any], tmp_path: Path
) -> None:
    words = ["evaluate", str(teacher), "--weights", "last", "--attacks", "autoattack", "--limit", "8"]
    words += ["--batch-size", "3", "--suite", "fast", "--device", "cpu"]
    assert run([*words, "--out", str(tmp_path / "alone")]) == 0
    alone = tmp_path / "alone" / "autoattack-last.csv"
    hunted = tmp_path / "hunted" / "autoattack-last.csv"
    for _ in range(2):
        write = "retemper.engine.evaluation.ledger.write_atomically"
        process = start(*words, "--out", hunted.parent, place=write, at={2: signal.SIGKILL})
        assert process.wait()[0] == -signal.SIGKILL
        assert not Ledger.read(hunted).is_complete(SUITES["fast"])
    assert run([*words, "--out", str(hunted.parent)]) == 0
    assert rows(alone) == rows(hunted)
    entry = json.loads((hunted.parent / "evaluation-last.json").read_text())["attacks"]["autoattack-fast"]
    assert entry["complete"] and entry["upper_bound"] and sum(entry["count"]) == 8


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--shard", "3/2"], "write it as 1/4"),
        (["--shard", "1/2"], "with --attacks autoattack"),
        (["--budget", "soon"], "in minutes"),
        (["--autoattack-limit", "0"], "at least 1"),
    ],
)
def test_wrong_options_are_told_in_a_line(
    words: list[str], told: str, teacher: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["evaluate", str(teacher), "--attacks", "clean", *words]) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1
