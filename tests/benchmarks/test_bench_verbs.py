"""`retemper bench` at tiny sizes on a CPU: whole results, and no time for a wrong kernel, attack or loader."""

import json
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from retemper.bench import (
    attack,
    first_call,
    host_time,
    image_cases,
    kernels,
    loaders,
    logit_cases,
    peers,
    step,
    step_phases,
    step_problem,
    step_variants,
    strong_cases,
    sweep,
)
from retemper.bench.case import EXACTNESS, Case, Request
from retemper.bench.machine import Rates
from retemper.bench.result import COLUMNS
from retemper.bench.timing import measure
from retemper.cli import run
from retemper.engine import Recipe
from retemper.engine.catalogue import find_setting
from retemper.engine.speed.execution import EXACTNESS as MOVES
from retemper.kernels import augment_reference

CPU = torch.device("cpu")
SMALL = {  # tables of each verb; what must have a time in the first
    "step": (["phases, tiny_resnet"], {"whole step", "attack"}),
    "kernels": (["pgd_step_", "kl forward", "class_sums"], {"retemper", "eager chain"}),
    "loaders": (
        ["images"],
        {"retemper, resident", "retemper, ffcv", "torchvision, 2 workers", "torchvision, 0 workers"},
    ),
    "attack": (["kl PGD-10"], {"retemper", "plain loop", "torchattacks.PGD", "foolbox.LinfPGD"}),
}


@pytest.mark.parametrize("what", SMALL)
def test_a_verb_finishes_and_writes_its_result(what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    only, timed = SMALL[what]
    out = tmp_path / "result.json"
    words = ["bench", what, "--quick", "--rounds", "2", "--device", "cpu", "--json", str(out), "--only", *only]
    assert run(words) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]
    result = json.loads(out.read_text())
    for key in ("command", "device", "versions", "commit", "date", "rates"):
        assert key in result, key
    assert result["what"] == what and result["complete"] and result["rounds"] == 2
    first = [row for row in result["rows"] if row["table"] == result["rows"][0]["table"]]
    assert timed <= {row["name"] for row in first if row["ms"]}
    printed = capsys.readouterr().out
    for row in result["rows"]:
        assert set(row) == set(COLUMNS) and row["exactness"] in EXACTNESS
        assert (row["ms"] is None) == (row["reason"] is not None)
        assert row["ms"] is None or 0 < row["ms"]["p10"] <= row["ms"]["median"] <= row["ms"]["p90"]
        assert row["reason"] is None or not row["reason"].startswith(("disagrees", "fails"))
        assert row["table"] in printed and row["name"] in printed


def test_the_profile_tells_the_phases_of_a_step_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", "step", "--quick", "--batch", "2", "--device", "cpu", "--profile", str(tmp_path / "to")]
    assert run(words) == 0
    assert {path.name for path in (tmp_path / "to").iterdir()} == {
        "profile_tiny_resnet.txt",
        "profile_tiny_resnet.json.gz",
    }
    said, kept = capsys.readouterr().out, (tmp_path / "to/profile_tiny_resnet.txt").read_text()
    assert said in kept and "3 steps, tiny_resnet, batch 2" in kept
    for phase in ("folding", "teacher", "attack", "the same with SGD and class sums"):
        assert f"phase: {phase}" in kept


def test_a_profile_has_the_convolutions_of_training(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tuned: list[bool] = []
    parts = dict.fromkeys(step_phases.PHASES, lambda: tuned.append(torch.backends.cudnn.benchmark))
    monkeypatch.setattr(step_phases, "phases", lambda problem, recipe: (parts, {}))
    step_phases.profile_step(Request(what="step", device=CPU, quick=True, batch=2), tmp_path)
    assert tuned and all(tuned) and not torch.backends.cudnn.benchmark


def test_the_slowest_phase_is_named() -> None:
    rows = [{"table": "phases, x", "name": "whole step", "ms": {"median": 9.0}}]
    rows += [{"table": "phases, x", "name": name, "ms": {"median": 1.0}} for name in step_phases.PHASES]
    rows[3]["ms"] = {"median": 5.0}
    assert step_phases.slowest_phase(rows) == "phases, x: the slowest is attack, 5 ms of 8 ms (62%)"
    assert step_phases.slowest_phase(rows[:3]) is None


def test_each_phase_is_replayed_from_a_graph_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = {name: (lambda name=name: name) for name in ("whole step", *step_phases.PHASES)}
    monkeypatch.setattr(step_phases, "phases", lambda problem, recipe: (parts, {}))
    monkeypatch.setattr(step_phases, "whole", lambda problem, captured: None)
    monkeypatch.setattr(step_phases, "in_a_graph", lambda part: lambda: f"replay of {part()}")
    for device, replayed in (("cpu", ""), ("cuda", "replay of ")):
        problem: Any = SimpleNamespace(request=Request(what="step", device=torch.device(device)))
        rows = step_phases.phase_rows(problem)
        assert [row.call and row.call() for row in rows] == [f"{replayed}{name}" for name in parts]


def test_a_benchmark_that_was_cut_short_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    only = ["ladder, tiny_resnet", "phases, tiny_resnet"]
    words = ["bench", "step", "--quick", "--batch", "2", "--device", "cpu", "--rounds", "1", "--json", str(path)]
    words += ["--only", *only, "--rows", "careful PyTorch", "whole step"]
    assert run([*words, "--seconds", "0"]) == 0
    assert json.loads(path.read_text())["rows"] == []
    assert run(words) == 0
    whole = json.loads(path.read_text())
    assert [row["name"] for row in whole["rows"]] == ["careful PyTorch", "whole step"] and whole["complete"]
    path.write_text(json.dumps(whole | {"rows": whole["rows"][:1], "complete": False}))
    assert run(words) == 0
    again = json.loads(path.read_text())
    assert again["complete"] and again["rows"][0] == whole["rows"][0]
    assert again["rows"][1]["name"] == "whole step" and again["rows"][1] != whole["rows"][1]
    assert run([*words, "--batch", "3"]) == 0
    assert json.loads(path.read_text())["rows"][0]["table"].endswith("batch 3"), "another request begins anew"


@pytest.mark.parametrize("row", ["retemper", "eager chain"])
def test_one_row_of_a_kernel_is_measured_alone(row: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", "kernels", "--quick", "--rounds", "1", "--device", "cpu", "--only", "class_sums fp32"]
    assert run([*words, "--rows", row]) == 0
    told = capsys.readouterr().out
    assert [name for name in ("retemper ", "eager chain ", "torch.compile") if f"\n{name}" in told] == [f"{row} "]


def test_a_rehearsal_checks_no_values(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(attack, "examples_check", lambda problem: lambda adv: "it is garbage")
    words = ["bench", "attack", "--quick", "--rounds", "1", "--device", "cpu", "--only", "ce PGD-10"]
    words += ["--rows", "retemper", "--json", str(tmp_path / "x.json")]
    for rehearsed in ("", "1"):
        monkeypatch.setenv("RETEMPER_REHEARSAL", rehearsed)
        assert run(words) == 0
        result = json.loads((tmp_path / "x.json").read_text())
        assert result["checked"] == (not rehearsed)
        assert [row["ms"] is None for row in result["rows"]] == [not rehearsed]


@pytest.mark.parametrize(
    "words, said",
    [
        ("bench attack --batch 0", "--batch 0"),
        ("bench step --sweep", "--sweep"),
        ("bench attack --profile x", "--profile"),
        ("bench loaders --only nothing", "--only nothing"),
        ("bench everything", "invalid choice"),
    ],
)
def test_wrong_usage_is_one_line(words: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(words.split()) == 2
    assert said in capsys.readouterr().err


def refused(case: Case, name: str) -> str:
    """The reason that `name` has instead of a time, when the first and it run alone."""
    chosen = [contender for contender in case.contenders if contender.name == name]
    rows = measure(replace(case, contenders=chosen), CPU, 1, Rates(CPU, quick=True))
    assert rows[0]["ms"] is None
    return str(rows[0]["reason"])


def test_a_step_that_cannot_be_made_leaves_the_others_their_times(monkeypatch: pytest.MonkeyPatch) -> None:
    made = step.our_step

    def failing(problem: step.StepProblem, recipe: Recipe, logits: str) -> step.Call:
        if not recipe.execution.fused_sgd:
            raise RuntimeError("no such plan")
        return made(problem, recipe, logits)

    monkeypatch.setattr(step, "our_step", failing)
    problem = step.StepProblem(Request(what="step", device=CPU, quick=True), "tiny_resnet", 2)
    reasons = {row.name: row.reason for row in step.one_by_one(problem)}
    assert reasons["+ channels-last"] == "fails: RuntimeError: no such plan" and reasons["+ fused SGD"] is None


def test_the_ladder_begins_without_and_ends_with_what_makes_a_step_fast() -> None:
    assert set(step_problem.BARE) >= set(MOVES), "benchmarks/bench/step_problem.py: BARE"
    gpu = torch.device("cuda")
    problem: Any = SimpleNamespace(
        request=Request(what="step", device=gpu), recipe=step_problem.bare_recipe("resnet18")
    )
    whole, usual = (
        recipe.execution for recipe in (step_variants.whole(problem), find_setting("rslad:digits")[2].recipe)
    )
    ours = {name: getattr(whole, name) for name in MOVES} | {"epilogue": whole.epilogue_on(gpu)}
    assert ours["epilogue"] == usual.epilogue_on(gpu), "benchmarks/bench/step_variants.py: ADDITIONS"
    for name in set(MOVES) - {"teacher_ahead", "teacher_table", "precision", "epilogue", "capture"}:
        assert ours[name] in (getattr(usual, name), "on"), f"{name}: benchmarks/bench/step_variants.py: ADDITIONS"


def test_every_variant_of_the_step_is_a_recipe_of_a_gpu() -> None:
    request = Request(what="step", device=torch.device("cuda"))
    problem: Any = SimpleNamespace(request=request, recipe=step_problem.bare_recipe("resnet18"))
    for variant in (*step_variants.ADDITIONS, *step_variants.OTHERWISE):
        recipe = step_variants.changed(problem, step_variants.whole(problem), variant)
        recipe.execution.captures_on(torch.device("cuda"))


def test_a_wrong_kernel_is_refused_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    step, views, strong = image_cases.pgd_step_, image_cases.augment, strong_cases.strong_augment
    gradient, sums = logit_cases.class_temperature_kl_grad_, logit_cases.class_sums
    wrong = {
        (image_cases, "pgd_step_"): lambda adv, grad, clean, by, eps, **options: step(
            adv, grad, clean, by, 2 * eps, **options
        ),
        (image_cases, "augment"): lambda image, view, **options: views(image, view ^ 1, **options),
        (strong_cases, "strong_augment"): lambda image, view, **options: strong(image, view ^ 1, **options),
        (logit_cases, "class_temperature_kl_grad_"): lambda own, other, label, k: gradient(
            own, other, label, k.flip(0)
        ),
        (logit_cases, "class_sums"): lambda x, label, k: tuple(part + 1 for part in sums(x, label, k)),
    }
    for (module, name), function in wrong.items():
        monkeypatch.setattr(module, name, function)
    request = Request(what="kernels", device=CPU, quick=True)
    planned = {case.name.split(" fp32")[0]: case for case in kernels.cases(request)}
    for name in ("pgd_step_", "pgd_step_ l2", "class_temperature_kl_grad_", "class_sums", "augment", *kernels.STRONG):
        assert "disagrees" in refused(planned[name].build(), "retemper"), name


def test_the_host_time_of_a_call_is_told_apart_from_that_of_its_operators() -> None:
    request = Request(what="kernels", device=CPU, rounds=2)
    planned = {case.name: case for case in kernels.cases(request)}
    case = planned["host time, epilogue shift residual relu, forward and backward"].build()
    assert [one.name for one in case.contenders] == ["retemper", "the operators alone", "eager chain"]
    ours, alone, eager = measure(case, CPU, 2, Rates(CPU, quick=True))
    assert ours["ms"] and eager["ms"] and alone["launches"] >= 2, "a forward and a backward"
    assert ours["ratio"]["median"] == 1 and ours["share_of_bound"] is None
    without = replace(case.contenders[0], call=lambda: torch.ones(1) + 1)
    assert host_time.operators_alone(without) is None


def test_a_first_call_is_that_of_a_process_of_its_own() -> None:
    request = Request(what="kernels", device=CPU, quick=True)
    (planned,) = first_call.first_call_cases(request)
    (row,) = measure(planned.build(), CPU, 20, Rates(CPU, quick=True))
    assert row["table"] == "first call, pgd_step_" and row["reason"] is None and row["rounds"] == 1
    assert 0 < row["ms"]["median"] < 1e4 and row["start_up_s"] is row["launches"] is None
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        first_call.seconds_of("1 // 0", "cpu")
    whole = [case.name for case in first_call.first_call_cases(replace(request, quick=False))]
    assert whole[0] == "first call, imports" and len(whole) == 1 + len(first_call.CALLS)


@pytest.mark.parametrize("name", first_call.CALLS)
def test_what_a_first_call_does_is_what_its_chain_does(name: str) -> None:
    results = []
    for what in first_call.CALLS[name]:
        names: dict = {}
        exec(first_call.INPUTS, names)
        names["student"] = names["student"].clone().requires_grad_("backward" in what)
        result = eval(what, names)
        result = result[0] if isinstance(result, tuple) else result
        results.append(names["student"].grad if "backward" in what else result)
    assert results[0].shape == results[1].shape


def problem(steps: int = 3) -> attack.AttackProblem:
    torch.manual_seed(0)
    clean = torch.rand(8, 1, 8, 8)
    model = attack.settled("tiny_resnet", CPU, clean, "fp32")
    label = model(clean).argmax(1)
    return attack.AttackProblem(
        model=model, clean_BCHW=clean, label_B=label, steps=steps, temperature_K=torch.linspace(0.5, 5, 10)
    )


def test_a_weak_or_wild_attack_is_refused_a_time() -> None:
    given = problem()
    check, adv = attack.examples_check(given), attack.folded(given)()
    assert check(adv) is None
    assert "reaches a loss" in str(check(attack.folded(replace(given, steps=2))()))
    assert "away from its own" in str(check(given.clean_BCHW + 2 * (adv - given.clean_BCHW)))
    assert "leaves [0, 1]" in str(check(torch.where(given.clean_BCHW < attack.EPS, -1e-7, adv)))
    assert given.flop_of_a_step() > 8 * 2 * 8 * 8 * 9  # the first convolution alone has 16 outputs


def test_a_loader_that_gives_other_images_is_refused_a_time() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
    index = torch.arange(20).flip(0)
    image = augment_reference(torch.from_numpy(pixels)[index], torch.arange(20))
    assert loaders.wrong_views([(image, index)], pixels) is None
    assert "is no crop" in str(loaders.wrong_views([(image.flip(2), index)], pixels))
    assert "is no crop" in str(loaders.wrong_views([(image, index.flip(0))], pixels))
    assert "gives 19 images" in str(loaders.wrong_views([(image[1:], index[1:])], pixels))
    assert "19 different" in str(loaders.wrong_views([(image, index.clamp(max=18))], pixels))


def test_a_package_that_is_missing_is_named_with_what_installs_it() -> None:
    assert peers.missing("json") is None
    assert "retemper[bench]" in str(peers.missing("no_such_package"))


def test_every_kernel_has_constants_to_sweep_and_gets_them_back() -> None:
    for name in set(sweep.MODULES.values()):
        module = import_module(f"retemper.kernels.{name}")
        now = sweep.constants_of(module)
        assert now, f"kernels/{name}.py has none of {', '.join(sweep.VALUES)}"
        others = sweep.settings(now)
        assert now not in others and len(others) >= 3
        with sweep.in_place(module, others[0]):
            assert sweep.constants_of(module) == others[0]
        assert sweep.constants_of(module) == now


def test_the_best_setting_is_named() -> None:
    def row(name: str, ms: float | None) -> dict:
        spread = None if ms is None else {"p10": ms, "median": ms, "p90": ms}
        return {"table": "sweep x", "name": name, "ms": spread, "ratio": spread}

    best = sweep.best([row("as it is: A=1", 1), row("A=2", 0.5), row("A=4", None)])
    assert best is not None and "best is A=2, 0.500 of the time of as it is: A=1" in best
    assert sweep.best([row("as it is: A=1", None)]) is None


BARE = """
import sys
from importlib.machinery import PathFinder

absent = "safetensors tqdm PIL sklearn scipy matplotlib ffcv torchvision torchattacks pytest".split() + sys.argv[1:]
find = PathFinder.find_spec

def find_others(name, path=None, target=None):
    return None if name.split(".")[0] in absent else find(name, path, target)

PathFinder.find_spec = find_others
from retemper.cli import run
for what in ("kernels", "step", "attack")[: 1 if sys.argv[1:] else 3]:
    only = {"kernels": "pgd_step_ fp32", "step": "phases, tiny_resnet", "attack": "ce PGD-10"}[what]
    assert run(["bench", what, "--quick", "--rounds", "1", "--device", "cpu", "--only", only]) == 0
run(["bench", "--help"])
"""


@pytest.mark.parametrize("absent", [(), ("triton",)])
def test_the_benchmarks_need_torch_and_numpy_alone(tmp_path: Path, absent: tuple[str, ...]) -> None:
    ran = subprocess.run([sys.executable, "-c", BARE, *absent], capture_output=True, text=True, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert "--sweep" in ran.stdout
    if not absent:
        assert "whole step" in ran.stdout and "no time: needs torchattacks" in ran.stdout
        assert "no time: fails: ModuleNotFoundError" in ran.stdout  # foolbox


def test_a_case_that_cannot_be_built_does_not_end_the_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def out_of_memory(*_: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setitem(kernels.IMAGES, "pgd_step_", (out_of_memory, ""))
    words = ["bench", "kernels", "--quick", "--rounds", "1", "--device", "cpu", "--json", str(tmp_path / "x.json")]
    assert run([*words, "--only", "pgd_step_ fp32", "random_start_ fp32"]) == 0
    rows = json.loads((tmp_path / "x.json").read_text())["rows"]
    assert rows[0]["reason"] == "fails: RuntimeError: out of memory" and rows[1]["ms"] is not None
    assert set(rows[0]) == set(COLUMNS) and "no time: fails" in capsys.readouterr().out
