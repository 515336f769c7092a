"""Results that are there are kept: ledgers, curves and evaluations of other images, networks and processes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from retemper.engine.evaluation import shards
from retemper.engine.evaluation.autoattack import SuiteRequest
from retemper.engine.evaluation.consistency import consistency
from retemper.engine.evaluation.curve_file import CurveFile
from retemper.engine.evaluation.curve_summary import curve_summary
from retemper.engine.evaluation.evaluation_file import EvaluationFile, Outcome
from retemper.engine.evaluation.ledger import Ledger
from retemper.engine.evaluation.places import beside, place
from retemper.engine.evaluation.protocols import curve_radii
from retemper.engine.evaluation.shards import evaluate_suite
from retemper.files import write_json
from retemper.loaders.split import split_of_arrays

CPU = torch.device("cpu")
SPLIT = split_of_arrays(
    "digits", "test", np.zeros((8, 2, 2, 1), dtype=np.uint8), np.arange(8) % 4, tuple("abcd"), "made"
)


@pytest.fixture
def suite(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A suite that every image withstands; the list holds how many images it was given, time after time."""
    given: list[int] = []

    def run_suite(model: nn.Module, split: Any, request: SuiteRequest, ledger: Ledger) -> bool:
        given.append(len(ledger.image_N))
        ledger.clean_N[:], ledger.tried_N[:], ledger.predicted_N[:] = 1, len(request.attacks), ledger.label_N
        ledger.write()
        return True

    monkeypatch.setattr(shards, "run_suite", run_suite)
    monkeypatch.setattr(shards, "library_version", lambda: "made")
    return given


def suite_on(path: Path, images: int, shard: tuple[int, int] | None = None) -> Ledger | None:
    request = SuiteRequest(classes=4, suite="standard", fold=False, budget_s=None, eps=0.1, device=CPU, batch_size=4)
    return evaluate_suite(nn.Identity(), SPLIT, np.arange(images), request, known={}, path=path, shard=shard)


def test_shards_put_the_ledger_of_other_images_aside_and_take_a_finished_one(suite: list[int], tmp_path: Path) -> None:
    path = tmp_path / "autoattack.csv"
    suite_on(path, 8)
    assert suite_on(path, 4, (1, 2)) is None
    whole = suite_on(path, 4, (2, 2))
    assert whole is not None and len(Ledger.read(path).image_N) == 4 and suite == [8, 2, 2]
    assert [len(Ledger.read(kept).image_N) for kept in beside(path)] == [8]
    again, kept = suite_on(path, 4, (1, 2)), suite_on(path, 8, (1, 2))
    assert again is not None and kept is not None and len(kept.image_N) == 8 and suite == [8, 2, 2]


def entry(eps: float, images: int, **more: Any) -> dict[str, Any]:
    interval = {"average": [0.4, 0.6], "worst": [0.4, 0.6]}
    figures = {"average": 0.5, "worst": 0.5, "worst_class": 0, "worst_tenth": 0.5, "nsd": 0.0, "interval": interval}
    return {"eps": eps, "count": [images], "accuracy": [0.5], **figures, **more}


def test_a_finished_curve_is_not_replaced_by_less() -> None:
    file = CurveFile.empty(Path("curve.json"), {"eps": [0.1, 0.2]})
    full = [entry(0.1, 8), entry(0.2, 8)]
    file.set("autoattack", {}, full, {})
    file.set("autoattack", {}, [entry(0.1, 4), entry(0.2, 4)], {})
    file.set("autoattack", {}, [entry(0.1, 8), entry(0.2, 8, complete=False)], {})
    assert file.content["attacks"]["autoattack"]["radii"] == full
    more = [entry(0.1, 9), entry(0.2, 9)]
    file.set("autoattack", {}, more, {})
    assert file.content["attacks"]["autoattack"]["radii"] == more


def curve_protocol(norm: str, images: int) -> dict[str, Any]:
    known = {"dataset": "digits", "split": "test", "image_size": 2, "weights_sha256": "w", "classes": ["a"]}
    return known | {"eps": [0.1, 0.2], "images": images, "norm": norm}


def curve_under(path: Path, images: int, *attacks: str) -> CurveFile:
    """The curve on so many images, with these attacks added."""
    file = CurveFile.begin(path, curve_protocol("linf", images))
    for name in attacks:
        broken = {image: (0, float("inf")) for image in range(images)}
        file.set(name, {}, [entry(0.1, images), entry(0.2, images)], broken)
    file.write()
    return file


def test_curves_take_turns_at_their_file_and_none_forgets(tmp_path: Path) -> None:
    path = tmp_path / "curve.json"
    curve_under(path, 2, "pgd20")
    curve_under(path, 3, "pgd20")
    curve_under(path, 2, "cw")
    curve_under(path, 3)
    assert set(curve_under(path, 2).content["attacks"]) == {"pgd20", "cw"}
    assert len(list(tmp_path.glob("curve*.json"))) == len(list(tmp_path.glob("curve*.csv"))) == 2


def test_a_process_does_not_write_back_what_it_found(tmp_path: Path) -> None:
    main, protocol = tmp_path / "evaluation.json", {"dataset": "digits", "eps": 0.1, "norm": "linf"}
    image_N = np.arange(8)

    def add(file: EvaluationFile, name: str, right: bool, **more: Any) -> None:
        given_N = SPLIT.labels if right else (SPLIT.labels + 1) % 4
        file.add(Outcome(name, {}, image_N, given_N, more), SPLIT, 1.0)
        file.write()

    add(EvaluationFile.begin(main, protocol), "autoattack", True, complete=False)
    slow, quick = (EvaluationFile.begin(main, protocol) for _ in range(2))
    add(quick, "autoattack", False, complete=True)
    add(slow, "pgd20", True)
    found = EvaluationFile.begin(main, protocol)
    assert found.content["attacks"]["autoattack"]["complete"] and found.content["attacks"]["autoattack"]["average"] == 0
    assert not any(right for _, right in found.verdicts["autoattack"].values())


@pytest.mark.parametrize("name", ["curve.json", "curve-l2.json", "evaluation-l1.json", "evaluation.json"])
def test_a_network_leaves_the_files_of_another_alone_in_every_norm(tmp_path: Path, name: str) -> None:
    write_json(tmp_path / name, {"protocol": {"weights": "a.pt", "network": "a.pt"}, "attacks": {}})
    assert place(tmp_path, "a.pt", "a.pt", best=True, chosen=False).name == "evaluation.json"
    assert place(tmp_path, "b.pt", "b.pt", best=True, chosen=False).name == "evaluation-b.json"


def test_a_network_keeps_its_place_beside_one_that_is_called_like_a_norm(tmp_path: Path) -> None:
    def go(weights: str) -> str:
        path = place(tmp_path, weights, weights, best=True, chosen=False)
        write_json(path, {"protocol": {"weights": weights, "network": weights}, "attacks": {}})
        return path.name

    assert [go(name) for name in ("linf.pt", "l2.pt", "linf.pt", "l2.pt")] == [
        "evaluation.json",
        "evaluation-l2-weights.json",
    ] * 2
    # a folder of an earlier version, where one network's curve lies beside another's evaluation
    write_json(tmp_path / "curve.json", {"protocol": {"weights": "l2.pt", "network": "l2.pt"}, "attacks": {}})
    assert go("linf.pt") == "evaluation.json"


def test_theory_is_checked_between_curves_of_any_weights_and_not_within_one(tmp_path: Path) -> None:
    protocol = curve_protocol("linf", 2)
    for name, norm, broken in (("curve-last", "linf", 0.1), ("curve-last-l2", "l2", float("inf"))):
        file = CurveFile.begin(tmp_path / f"{name}.json", protocol | {"norm": norm})
        file.set("pgd20", {}, [entry(0.1, 2), entry(0.2, 2)], {0: (0, broken), 1: (0, float("inf"))})
        file.write()
        if norm == "linf":  # of one curve alone there is nothing to say
            assert consistency(tmp_path, protocol, 4)["pairs"] == 0
    found = consistency(tmp_path, protocol, 4)
    assert found["pairs"] == 4 and len(found["violations"]) == 1  # broken in L-inf 0.1 and held in L2 0.2, of 2 x 0.1


def test_a_curve_says_on_how_many_images_an_attack_was_run() -> None:
    protocol = {"classes": ["a"], "images": 9, "split": "test", "norm": "linf"}
    attacks = {"pgd20": {"radii": [entry(0.1, 9)]}, "autoattack": {"radii": [entry(0.1, 4)]}}
    said = curve_summary({"protocol": protocol, "attacks": attacks})
    assert "autoattack: on the first 4 of the images" in said and "pgd20: on" not in said


def test_the_radii_of_a_curve_are_the_numbers_that_one_types() -> None:
    assert curve_radii("digits") == (0.0375, 0.075, 0.15, 0.225)
    assert curve_radii("fashion-mnist", "l2") == (0.125, 0.25, 0.5, 0.75)
    assert curve_radii("cifar10") == (2 / 255, 4 / 255, 8 / 255, 12 / 255)
    assert curve_radii("digits", "l2") == (0.15, 0.3, 0.6, 0.9)
