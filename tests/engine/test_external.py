"""Networks of other people's code: RobustBench's and the user's own; refused in a line, recorded by what they are."""

import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from shlex import quote
from typing import Any

import pytest
import torch

from retemper.cli import run
from retemper.engine import create_model, load_checkpoint
from retemper.engine.checkpoints.external import external_network, load_external
from retemper.engine.device import is_out_of_memory

CPU = torch.device("cpu")
DIGITS = (8, 8, 1)
Train = Callable[..., int]

NET = """
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes, channels, width=4):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(channels, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width)
        self.head = nn.Linear(16 * width, num_classes)

    def forward(self, image):
        x = self.norm(self.conv(image)).relu()
        return self.head(x.view(len(x), -1))  # of no channels-last x of more than one channel

def build(num_classes, channels):
    return Net(num_classes, channels)

def fixed():
    return Net(10, 1)

def few(num_classes):
    return Net(num_classes - 1, 1)

def colour():
    return Net(10, 3)

def needy(depth):
    return Net(depth)

def number():
    return 3

def missing():
    raise FileNotFoundError("no weights")

def weights():
    return fixed().state_dict()

def lazy():
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(10))

def diverged():
    net = fixed()
    net.head.bias.data.fill_(float("nan"))
    return net

constant = 3
"""


@pytest.fixture
def net(tmp_path: Path) -> Path:
    path = tmp_path / "net.py"
    path.write_text(NET)
    return path


@pytest.fixture
def robustbench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package of that name whose zoo holds what lies in the folder that is returned."""
    package = tmp_path / "site/robustbench"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "utils.py").write_text(f"""
import pathlib, torch
from retemper.engine import create_model

def load_model(model_name, dataset, threat_model, model_dir):
    with open({str(tmp_path / "asked")!r}, "a") as file:
        file.write(f"{{dataset}}/{{threat_model}}/{{pathlib.Path(model_dir).name}} ")
    model = create_model("tiny_resnet_wide", 10)
    state = torch.load({str(tmp_path)!r} + f"/{{model_name}}.pt", weights_only=False)  # as careless as can be
    model.load_state_dict(state)
    return model
""")
    monkeypatch.syspath_prepend(str(package.parent))
    yield tmp_path
    for name in [name for name in sys.modules if name.split(".")[0] == "robustbench"]:
        del sys.modules[name]


def state_of(teacher: Path) -> dict[str, torch.Tensor]:
    model = create_model("tiny_resnet_wide", 10)
    load_checkpoint(teacher / "best.safetensors", model)
    return model.state_dict()


def config(out: Path) -> dict[str, Any]:
    return json.loads((out / "config.json").read_text())


def evaluation(out: Path) -> dict[str, Any]:
    return json.loads((out / "evaluation.json").read_text())


def fails(capsys: pytest.CaptureFixture[str], code: int, *words: object) -> str:
    capsys.readouterr()
    assert run([str(word) for word in words]) == code
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("retemper: error: "))
    return line


def test_a_network_of_robustbench_teaches_and_is_evaluated(
    robustbench: Path, teacher: Path, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(state_of(teacher), robustbench / "Known2020.pt")
    out, words = tmp_path / "run", ["--epochs", "1", "--teacher"]
    assert train("rslad:digits", out, *words, "robustbench:Known2020") == 0
    source = config(out)["teacher"]
    assert source["path"] == "robustbench:Known2020" and source["model"] == "robustbench:Known2020@digits/Linf"
    assert (robustbench / "asked").read_text() == "digits/Linf/robustbench "
    # the same answers as the checkpoint itself, and the same run again is known as the same
    assert train("rslad:digits", tmp_path / "other", *words, str(teacher)) == 0
    metrics = [json.loads((path / "metrics.jsonl").read_text()) for path in (out, tmp_path / "other")]
    assert metrics[0]["loss"] == metrics[1]["loss"]
    assert train("rslad:digits", out, *words, "robustbench:Known2020") == 0
    torch.save({name: 1 + value for name, value in state_of(teacher).items()}, robustbench / "Known2020.pt")
    assert train("rslad:digits", out, *words, "robustbench:Known2020") == 2

    torch.save(state_of(teacher), robustbench / "Known2020.pt")
    monkeypatch.chdir(tmp_path)
    assert run(["evaluate", "robustbench:Known2020@digits/L2", *"--attacks clean --limit 50 --eps 0.1".split()]) == 0
    content = evaluation(tmp_path / "runs/robustbench-Known2020-digits-L2")
    assert content["protocol"]["weights"] == "robustbench:Known2020@digits/L2"
    assert content["protocol"]["weights_sha256"] == source["sha256"]
    assert run(["evaluate", str(teacher), "--attacks", "clean", "--limit", "50", "--out", str(tmp_path / "e")]) == 0
    assert evaluation(tmp_path / "e")["attacks"]["clean"]["accuracy"] == content["attacks"]["clean"]["accuracy"]


def test_no_checkpoint_of_robustbench_runs_code(robustbench: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Bomb:
        def __reduce__(self) -> tuple:
            return os.system, (f"touch {quote(str(robustbench / 'ran'))}",)

    torch.save(Bomb(), robustbench / "Bomb.pt")
    before = {name: value for name, value in os.environ.items() if name.startswith("TORCH_FORCE")}
    said = fails(capsys, 3, "evaluate", "robustbench:Bomb", "--dataset", "digits", "--attacks", "clean")
    assert "does not load" in said and not (robustbench / "ran").exists(), "a checkpoint ran code"
    assert {name: value for name, value in os.environ.items() if name.startswith("TORCH_FORCE")} == before
    assert "Absent2020" in fails(capsys, 3, "evaluate", "robustbench:Absent2020", "--dataset", "digits")


def test_what_robustbench_cannot_load_is_told_with_what_to_do(
    robustbench: Path, capsys: pytest.CaptureFixture[str], cache: Path
) -> None:
    utils, file = robustbench / "site/robustbench/utils.py", cache / "robustbench/digits/Linf/A.pt"
    words = ["evaluate", "robustbench:A", "--dataset", "digits"]
    cases = {
        "raise KeyError('A')": "the names of its networks are at https://robustbench.github.io",
        "raise ValueError('digits is not a valid BenchmarkDataset')": "the names of its networks are at",
        "print('Download started'); raise ConnectionError('no route')": f"go online, or put its file at {file}",
        "raise SystemExit(3)": "SystemExit: 3",
    }
    for code, said in cases.items():
        utils.write_text(f"def load_model(**_): {code}")
        sys.modules.pop("robustbench.utils", None)
        assert said in fails(capsys, 3, *words)
    utils.write_text("def load_model(**_): raise RuntimeError('unexpected end')")
    sys.modules.pop("robustbench.utils", None)
    file.parent.mkdir(parents=True)
    file.touch()
    assert fails(capsys, 3, *words).endswith(f"if its download broke off, delete {file}")
    for code in ("raise AttributeError('module numpy has no attribute float')", "raise RuntimeError('broken')"):
        utils.write_text(code)
        sys.modules.pop("robustbench.utils", None)
        assert (
            "the package robustbench cannot be imported" in (line := fails(capsys, 2, *words)) and "pip install" in line
        )


def test_robustbench_is_imported_beside_a_torchvision_that_cannot_be(
    robustbench: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its import raises RuntimeError where torchvision's library was built for another torch; and it prints."""
    monkeypatch.setattr(sys, "tried", [], raising=False)
    utils = robustbench / "site/robustbench/utils.py"
    utils.write_text(f"""
import sys
sys.tried.append(1)
if len(sys.tried) == 1:
    raise RuntimeError("operator torchvision::nms does not exist")
{utils.read_text().replace("model = create", "print('Download started'); model = create")}""")
    torch.save(state_of(teacher), robustbench / "Known2020.pt")
    words = ["--dataset", "digits", "--attacks", "clean", "--limit", "20", "--out", str(robustbench / "out")]
    assert run(["evaluate", "robustbench:Known2020", *words]) == 0
    captured = capsys.readouterr()
    assert "Download started" in captured.err and "Download" not in captured.out


def test_robustbench_is_asked_for_in_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "robustbench", None)
    assert "pip install" in fails(capsys, 2, "evaluate", "robustbench:A", "--dataset", "digits")
    assert "--dataset" in fails(capsys, 2, "evaluate", "robustbench:A")


def test_the_users_own_network_teaches_and_is_evaluated(
    net: Path, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, out = f"{net}:build", tmp_path / "run"
    assert train("rslad:digits", out, "--epochs", "1", "--teacher", name) == 0
    source = config(out)["teacher"]
    assert source["path"] == source["model"] == name and len(source["sha256"]) == 64
    assert train("rslad:digits", out, "--epochs", "1", "--teacher", name) == 0  # the same run
    net.write_text(NET.replace(".relu()", ".tanh()"))
    assert train("rslad:digits", out, "--epochs", "1", "--teacher", name) == 2  # the same weights, other code
    monkeypatch.chdir(tmp_path)
    assert run(["evaluate", name, "--dataset", "digits", "--attacks", "clean,fgsm", "--limit", "20"]) == 0
    assert evaluation(tmp_path / "runs/net-build")["protocol"]["weights"] == name


@pytest.mark.parametrize("shape", [DIGITS, (8, 8, 3)])
def test_it_is_frozen_in_eval_mode_and_channels_last_where_it_can(shape: tuple[int, int, int], net: Path) -> None:
    (net.parent / "reshaped.py").write_text(NET.replace(".view(len(x), -1)", ".flatten(1)"))
    for name in (f"{net}:build", f"{net.parent}/reshaped.py:build"):
        builder = external_network(name, None)
        assert builder is not None
        torch.manual_seed(0)
        model, _ = load_external(builder, 10, shape, CPU, net.parent)
        assert not model.training and not any(weight.requires_grad for weight in model.parameters())
        image = torch.rand(3, shape[2], 8, 8).clone(memory_format=torch.channels_last)
        assert model(image).shape == (3, 10)
        layout = next(value for value in model.state_dict().values() if value.dim() == 4)
        if "reshaped" in name:
            assert layout.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "name, code, said",
    [
        ("net.py", 2, "net.py:build"),
        ("net.py:", 2, "net.py:build"),
        ("nowhere.py:build", 3, "nowhere.py does not exist"),
        ("net.py:biuld", 2, "did you mean 'build'?"),
        ("net.py:constant", 2, "no function 'constant'"),
        ("net.py:number", 2, "is a int: it must be an nn.Module"),
        ("net.py:needy", 3, "TypeError"),
        ("net.py:needy", 3, "it is given num_classes and channels alone"),
        ("net.py:missing", 3, "FileNotFoundError: no weights); line"),
        ("net.py:weights", 2, "is a OrderedDict: it must be an nn.Module"),
        ("net.py:lazy", 3, "is not ready for use (RuntimeError"),
        ("net.py:diverged", 3, "has weights that are not finite: head.bias"),
        ("syntax.py:build", 3, "cannot be imported (SyntaxError"),
        ("leaves.py:build", 3, "it leaves Python: put what it does as a script"),
        ("folder.py:build", 3, "folder.py is a folder"),
        ("folder.py", 3, "folder.py holds no best.safetensors"),
        ("net.py:few", 3, "answers two images of 10 classes with (2, 9)"),
        ("net.py:colour", 3, "does not take images of 1 x 8 x 8"),
        ("broken.py:build", 3, "cannot be imported (ZeroDivisionError"),
        ("robustbench:", 2, "robustbench:NAME@cifar10/Linf"),
    ],
)
def test_a_network_that_cannot_be_used_is_refused_in_a_line(
    name: str, code: int, said: str, net: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(net.parent)
    (net.parent / "broken.py").write_text("1 / 0")
    (net.parent / "syntax.py").write_text("def build(:")
    (net.parent / "leaves.py").write_text("import sys\nsys.exit('usage: leaves.py WEIGHTS')")
    (net.parent / "folder.py").mkdir()
    assert said in fails(capsys, code, "evaluate", name, "--dataset", "digits", "--attacks", "clean")
    assert said in fails(capsys, code, "train", "rslad:digits", "--teacher", name, "--out", net.parent / "run")
    assert not (net.parent / "run/config.json").exists()


def test_it_may_load_its_weights_and_import_its_neighbours(net: Path, teacher: Path) -> None:
    path = net.parent / "mine.py"
    path.write_text(f"""
import net
from retemper.engine import create_model, load_checkpoint

def build(num_classes, channels):
    assert net.constant == 3
    model = create_model("tiny_resnet_wide", num_classes, channels=channels)
    load_checkpoint({str(teacher / "best.safetensors")!r}, model)
    return model
""")
    builder = external_network(f"{path}:build", None)
    assert builder is not None
    model, _ = load_external(builder, 10, DIGITS, CPU, net.parent)
    expected = state_of(teacher)
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert str(net.parent) not in sys.path


@pytest.mark.parametrize(
    "build",
    ["torch.compile(fixed())", "nn.DataParallel(fixed())", "fixed().half()", "torch.jit.trace(fixed(), image)"],
)
def test_wrapped_and_scripted_networks_are_taken_as_they_are(build: str, net: Path) -> None:
    path = net.parent / "my other-net.py"  # no name of a module
    made = f"torch.manual_seed(0); image = torch.zeros(2, 1, 8, 8); return {build}"
    path.write_text(
        f"import torch, warnings\n{NET}\ndef build():\n    {made}".replace(".view(len(x), -1)", ".flatten(1)")
    )
    builder = external_network(f"{path}:build", None)
    assert builder is not None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        model, digest = load_external(builder, 10, DIGITS, CPU, net.parent)
    weights = [*model.parameters()]
    assert not any(weight.requires_grad or weight.dtype != torch.float32 for weight in weights) and not model.training
    assert not isinstance(model, torch.nn.DataParallel) and not hasattr(model, "_orig_mod") and len(digest) == 64
    image = torch.rand(2, 1, 8, 8, requires_grad=True)
    model(image).sum().backward()
    assert image.grad is not None


def test_a_network_that_loads_its_weights_in_part_is_told_of(net: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`strict=False` passes over a prefix without a word, and the network keeps its random weights."""
    load, net_load = torch.nn.Module.load_state_dict, "net.load_state_dict(state, strict=False); return net"
    state = "state = {prefix + name: value for name, value in net.state_dict().items() if 'num' not in name}"
    for prefix, said in (
        ("module.", "without 7 of its 8 tensors (conv.weight, norm.weight, norm.bias, ...)"),
        ("", None),
    ):
        net.write_text(f"{NET}\ndef part():\n    net, prefix = fixed(), {prefix!r}; {state}; {net_load}")
        builder = external_network(f"{net}:part", None)
        assert builder is not None
        load_external(builder, 10, DIGITS, CPU, net.parent)
        told = capsys.readouterr().err
        assert said in told if said else not told
    assert torch.nn.Module.load_state_dict is load


def test_two_folders_may_hold_modules_of_one_name(net: Path) -> None:
    """What `import models` means in a user's file is the file beside it, whatever another network has imported."""
    built = []
    for folder, width in (("a", 2), ("b", 3), ("a", 2)):
        (net.parent / folder).mkdir(exist_ok=True)
        (net.parent / folder / "net.py").write_text("import models\nfixed = models.fixed")
        (net.parent / folder / "models.py").write_text(NET.replace("return Net(10, 1)", f"return Net(10, 1, {width})"))
        builder = external_network(f"{net.parent / folder}/net.py:fixed", None)
        assert builder is not None
        built.append(load_external(builder, 10, DIGITS, CPU, net.parent)[0])
    assert [len(model.state_dict()["module.norm.bias"]) for model in built] == [2, 3, 2]


def test_a_run_may_start_from_any_network_that_answers_as_its_student(
    robustbench: Path, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(state_of(teacher), robustbench / "Known2020.pt")
    words = ["train", "sat:digits", "--epochs", "1", "--attack-steps", "1", "--lr", "1e-9", "--holdout-per-class", "0"]
    assert run([*words, "--start", "robustbench:Known2020", "--out", str(tmp_path / "run")]) == 0
    expected, weights = state_of(teacher), state_of(tmp_path / "run")
    assert all(torch.allclose(weights[name], expected[name], atol=1e-5) for name in weights if "weight" in name)
    mine = tmp_path / "mine.py"
    mine.write_text("""
from retemper.engine.models.resnet import ResNet

class Normalising(ResNet):
    def forward(self, image):
        return super().forward((image - 0.5) / 0.2)

def build():
    return Normalising(10, 1, (32, 64, 128), (1, 1, 1))
""")
    assert "normalise" in fails(capsys, 3, *words, "--start", f"{mine}:build", "--out", tmp_path / "other")
    mine.write_text(NET)
    assert "another architecture" in fails(capsys, 3, *words, "--start", f"{mine}:build", "--out", tmp_path / "third")


def test_a_teacher_at_chance_is_warned_of(net: Path, train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    assert train("rslad:digits", net.parent / "run", "--epochs", "1", "--teacher", f"{net}:fixed") == 0
    assert "little better than chance" in capsys.readouterr().err


def test_a_teacher_that_cannot_be_traced_teaches_as_it_is(net: Path, train: Train) -> None:
    net.write_text(NET.replace("        x = ", "        if image.sum() < -1: raise ValueError\n        x = "))
    assert train("rslad:digits", net.parent / "run", "--epochs", "1", "--teacher", f"{net}:build") == 0


@pytest.mark.parametrize("place", ["conv2d", "batch_norm"])
def test_too_little_memory_is_not_taken_for_a_fault_of_the_network(
    place: str, net: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory runs out while the factory builds the network, and while the network is tried."""
    net.write_text(
        NET.replace("def fixed():", "def fixed():\n    Net(10, 1)(torch.zeros(1, 1, 8, 8))").replace(
            "from torch", "import torch\nfrom torch", 1
        )
    )
    monkeypatch.setattr(f"torch.nn.functional.{place}", lambda *_, **__: torch.empty(1 << 60, dtype=torch.uint8))
    builder = external_network(f"{net}:{'fixed' if place == 'conv2d' else 'build'}", None)
    assert builder is not None
    with pytest.raises(RuntimeError) as error:
        load_external(builder, 10, DIGITS, CPU, net.parent)
    assert is_out_of_memory(error.value)
