"""`retemper bench` at tiny sizes on a CPU: whole results, and no time for a wrong kernel, attack or loader."""

import json
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch

from retemper.bench import attack, kernel_cases, kernels, loaders, peers, sweep
from retemper.bench.case import EXACTNESS, Case, Request
from retemper.bench.machine import Rates
from retemper.bench.result import COLUMNS
from retemper.bench.timing import measure
from retemper.cli import run
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


def test_a_wrong_kernel_is_refused_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    step, views = kernel_cases.pgd_step_, kernel_cases.augment
    gradient, sums = kernel_cases.class_temperature_kl_grad_, kernel_cases.class_sums
    monkeypatch.setattr(
        kernel_cases, "pgd_step_", lambda adv, grad, clean, by, eps: step(adv, grad, clean, by, 2 * eps)
    )
    monkeypatch.setattr(kernel_cases, "augment", lambda image, view, **options: views(image, view ^ 1, **options))
    monkeypatch.setattr(
        kernel_cases, "class_temperature_kl_grad_", lambda own, other, label, k: gradient(own, other, label, k.flip(0))
    )
    monkeypatch.setattr(kernel_cases, "class_sums", lambda x, label, k: tuple(part + 1 for part in sums(x, label, k)))
    request = Request(what="kernels", device=CPU, quick=True)
    planned = {case.name.split()[0]: case for case in kernels.cases(request) if "fp32" in case.name}
    for name in ("pgd_step_", "class_temperature_kl_grad_", "class_sums", "augment"):
        assert "disagrees" in refused(planned[name].build(), "retemper"), name


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
from importlib.machinery import PathFinder

absent = "triton safetensors tqdm PIL sklearn scipy matplotlib ffcv torchvision torchattacks pytest".split()
find = PathFinder.find_spec

def find_others(name, path=None, target=None):
    return None if name.split(".")[0] in absent else find(name, path, target)

PathFinder.find_spec = find_others
from retemper.cli import run
for what in ("kernels", "step", "attack"):
    only = {"kernels": "pgd_step_", "step": "phases, tiny_resnet", "attack": "ce PGD-10"}[what]
    assert run(["bench", what, "--quick", "--rounds", "1", "--device", "cpu", "--only", only]) == 0
run(["bench", "--help"])
"""


def test_the_benchmarks_need_torch_and_numpy_alone(tmp_path: Path) -> None:
    ran = subprocess.run([sys.executable, "-c", BARE], capture_output=True, text=True, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert "--sweep" in ran.stdout and "whole step" in ran.stdout
    assert (
        "no time: needs torchattacks" in ran.stdout and "no time: fails: ModuleNotFoundError" in ran.stdout
    )  # foolbox


def test_a_case_that_cannot_be_built_does_not_end_the_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def out_of_memory(*_: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setitem(kernels.ON_IMAGES, "pgd_step_", (out_of_memory, ""))
    words = ["bench", "kernels", "--quick", "--rounds", "1", "--device", "cpu", "--json", str(tmp_path / "x.json")]
    assert run([*words, "--only", "pgd_step_ fp32", "random_start_ fp32"]) == 0
    rows = json.loads((tmp_path / "x.json").read_text())["rows"]
    assert rows[0]["reason"] == "fails: RuntimeError: out of memory" and rows[1]["ms"] is not None
    assert set(rows[0]) == set(COLUMNS) and "no time: fails" in capsys.readouterr().out
