"""What is exported loads without retemper, answers as the run's network does, and says only what was measured."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from retemper.cli import run
from retemper.engine import create_model, load_checkpoint
from retemper.engine.export.export import architecture_source
from retemper.engine.models import MODELS


@pytest.fixture(scope="module")
def evaluated(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The teacher's folder, evaluated on all test images."""
    out = tmp_path_factory.mktemp("evaluated") / "robust-one"
    shutil.copytree(teacher, out)
    assert run(["evaluate", str(out), "--attacks", "clean,fgsm"]) == 0
    return out


def answers(folder: Path, code: str) -> Tensor:
    """Return what a README's code computes in `folder`, where no retemper can be imported, on a fixed image."""
    fixed = re.sub(r"torch\.rand\((.*)\)\)", r"torch.linspace(0, 1, 64).view(\1))", code)
    assert fixed != code
    script = f"import sys; sys.modules['retemper'] = None\n{fixed}\ntorch.save(logits.detach(), 'logits.pt')\n"
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "logits.pt", weights_only=True)


def expected(folder: Path) -> Tensor:
    model = create_model("tiny_resnet_wide", 10)
    load_checkpoint(folder / "best.safetensors", model)
    with torch.no_grad():
        return model.eval()(torch.linspace(0, 1, 64).view(1, 1, 8, 8))


def assert_rounds_to(answer: Tensor, expected: Tensor) -> None:
    """Check that two results agree but for the order of additions, which depends on the number of threads."""
    torch.testing.assert_close(answer, expected, rtol=1e-4, atol=1e-5)


def blocks(readme: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", readme.read_text(), flags=re.DOTALL)


def edit(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text())
    for where, value in changes.items():
        *parents, name = where.split("__")
        into = content
        for parent in parents:
            into = into[parent]
        into[name] = value
    path.write_text(json.dumps(content))


def test_safetensors_come_with_a_card_that_loads_them(evaluated: Path, teacher: Path, tmp_path: Path) -> None:
    out = tmp_path / "hub"
    assert run(["export", str(evaluated), "--out", str(out)]) == 0
    assert (out / "model.safetensors").read_bytes() == (evaluated / "best.safetensors").read_bytes()
    plain, ours = blocks(out / "README.md")
    assert_rounds_to(answers(out, plain), expected(evaluated))
    space: dict[str, Any] = {}
    exec(ours.replace('"model.safetensors"', repr(str(out / "model.safetensors"))), space)
    assert space["logits"].shape == (1, 10)
    assert subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=out).returncode == 0
    assert json.loads((out / "evaluation.json").read_text())["attacks"].keys() == {"clean", "fgsm"}
    config = json.loads((out / "config.json").read_text())
    assert config["recipe"]["student"] == "tiny_resnet_wide" and str(teacher) not in json.dumps(config)


def test_the_card_says_what_was_measured(evaluated: Path, tmp_path: Path) -> None:
    copy, out = tmp_path / "run", tmp_path / "hub"
    shutil.copytree(evaluated, copy)
    result = json.loads((copy / "evaluation.json").read_text())["attacks"]["fgsm"]
    edit(
        copy / "evaluation.json",
        attacks__autoattack=result | {"upper_bound": True, "flags": ["Square broke 9 images"]},
        protocol__attacks__autoattack={"suite": "standard", "step": 0.003 * 255 / 8 * 0.15, "alone": True},
    )
    edit(copy / "config.json", recipe__selection__select_on="test")
    assert run(["export", str(copy), "--out", str(out), "--name", "Mine 2026"]) == 0
    card = (out / "README.md").read_text()
    _, head, body = card.split("---\n", 2)
    assert "license" not in re.sub(r"#.*", "", head)
    assert '- name: "Mine-2026"' in head and f"value: {result['average']:.4f}" in head
    assert "| class | clean | fgsm | autoattack (upper bound) |" in body
    assert f"| 3 | {json.loads((out / 'evaluation.json').read_text())['attacks']['clean']['accuracy'][3]:.1%} |" in body
    low, high = result["interval"]["worst"]
    assert f"{result['worst']:.1%} ({low:.1%} to {high:.1%})" in body
    assert "- autoattack: suite standard, step 0.0143437, alone\n" in body
    assert "- autoattack: Square broke 9 images" in body and "eps 0.15" in body and "599 test images" in body
    assert "**Its best epoch was chosen on the test images: its numbers flatter it.**" in body


def test_no_evaluation_of_other_weights_is_told(
    evaluated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy, out = tmp_path / "run", tmp_path / "hub"
    shutil.copytree(evaluated, copy)
    edit(copy / "evaluation.json", protocol__weights_sha256="0" * 64)
    assert run(["export", str(copy), "--out", str(out)]) == 0
    assert "other weights" in capsys.readouterr().err
    assert "Not evaluated." in (out / "README.md").read_text() and not (out / "evaluation.json").exists()


def test_robustbench_gets_a_state_dict_its_json_and_the_architecture(evaluated: Path, tmp_path: Path) -> None:
    out = tmp_path / "rb"
    words = ["export", str(evaluated), "--out", str(out), "--format", "robustbench", "--name", "Doe2026Robust"]
    assert run(words) == 0
    state = torch.load(out / "models/digits/Linf/Doe2026Robust.pt", weights_only=True)
    weights = load_file(evaluated / "best.safetensors")
    assert state.keys() == weights.keys() and all(torch.equal(state[name], weights[name]) for name in weights)
    entry, plain = blocks(out / "README.md")
    assert_rounds_to(answers(out, plain), expected(evaluated))
    name, made = eval(entry, {"tiny_resnet": MODELS["tiny_resnet"]})
    made["model"]().load_state_dict(state)
    assert name == "Doe2026Robust"
    info = json.loads((out / "model_info/digits/Linf/Doe2026Robust.json").read_text())
    clean = json.loads((evaluated / "evaluation.json").read_text())["attacks"]["clean"]["average"]
    assert info["clean_acc"] == f"{100 * clean:.2f}" and info["autoattack_acc"] is None and info["eps"] == "0.15"
    assert (info["dataset"], info["number_forward_passes"], info["unreliable"]) == ("digits", 1, False)


@pytest.mark.parametrize(
    "changes, told",
    [({}, "50.00"), ({"attacks__autoattack__upper_bound": True}, None), ({"protocol__subset": "the first"}, None)],
)
def test_robustbench_is_told_of_no_bound_and_no_subset(
    changes: dict[str, Any], told: str | None, evaluated: Path, tmp_path: Path
) -> None:
    copy, out = tmp_path / "run", tmp_path / "rb"
    shutil.copytree(evaluated, copy)
    result = json.loads((copy / "evaluation.json").read_text())["attacks"]["fgsm"]
    edit(copy / "evaluation.json", attacks__autoattack=result | {"average": 0.5}, protocol__eps=8 / 255)
    edit(copy / "evaluation.json", protocol__attacks__autoattack={"suite": "standard"}, **changes)
    assert run(["export", str(copy), "--out", str(out), "--format", "robustbench"]) == 0
    info = json.loads((out / "model_info/digits/Linf/run.json").read_text())
    assert info["autoattack_acc"] == told and info["eps"] == "8/255"


def test_something_else_is_refused_in_a_line(
    evaluated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["export", str(tmp_path), "--out", str(tmp_path / "out")]) == 3
    assert "is no run's folder" in capsys.readouterr().err
    assert run(["export", str(evaluated), "--out", str(evaluated)]) == 2
    assert "is the run itself" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert run(["export", str(evaluated), "--out", str(tmp_path / "file/out")]) == 2
    assert "--out" in capsys.readouterr().err


@pytest.mark.parametrize("name", MODELS)
def test_every_architecture_is_one_file_of_plain_pytorch(name: str) -> None:
    source, function = architecture_source(name), getattr(MODELS[name], "func", MODELS[name])
    assert set(re.findall(r"^(?:from|import) (\w+)", source, flags=re.MULTILINE)) <= {
        "torch",
        "math",
        "functools",
        "collections",
    }
    written: dict[str, Any] = {}
    exec(source, written)  # what a user of the file imports
    keywords = getattr(MODELS[name], "keywords", {})
    with torch.device("meta"):
        theirs, ours = written[function.__name__](7, **keywords), create_model(name, 7)
    assert {key: value.shape for key, value in theirs.state_dict().items()} == {
        key: value.shape for key, value in ours.state_dict().items()
    }
