"""`retemper evaluate`: the file it writes, what it adds to, and what it refuses."""

import errno
import json
import shutil
import tempfile
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from retemper.cli import run
from retemper.engine import create_model, save_weights
from retemper.engine.evaluation.evaluation_file import EvaluationFile
from retemper.engine.evaluation.verdicts import read_evaluated
from retemper.engine.report.read import read_run
from retemper.errors import DataError


def test_evaluate_writes_the_contracts_file_and_adds_to_it(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["evaluate", str(teacher), "--limit", "50"]
    assert run([*words, "--attacks", "clean"]) == 0
    assert run([*words, "--attacks", "fgsm,pgd20"]) == 0
    content = json.loads((teacher / "evaluation.json").read_text())
    protocol = content["protocol"]
    assert (protocol["dataset"], protocol["split"], protocol["images"], protocol["eps"]) == ("digits", "test", 50, 0.15)
    assert (protocol["norm"], protocol["precision"], protocol["seed"]) == ("linf", "fp32", 0)
    assert list(content["attacks"]) == ["clean", "fgsm", "pgd20"] == list(protocol["attacks"])
    for result in content["attacks"].values():
        assert len(result["accuracy"]) == len(result["count"]) == 10 and sum(result["count"]) == 50
        assert {"average", "worst", "worst_class", "worst_tenth", "nsd", "interval"} <= result.keys()
    assert "pgd20" in capsys.readouterr().out
    assert run(["evaluate", str(teacher), "--limit", "60", "--attacks", "clean"]) == 0  # another protocol
    assert list(json.loads((teacher / "evaluation.json").read_text())["attacks"]) == ["clean"]
    assert json.loads((teacher / "evaluation.1.json").read_text()) == content


def test_a_bare_checkpoint_is_evaluated_when_it_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "model.pt"
    torch.save({"state_dict": create_model("tiny_resnet", 10).state_dict()}, path)
    words = ["evaluate", str(path), "--attacks", "clean", "--limit", "20"]
    assert run(words) == 2
    assert "--dataset" in capsys.readouterr().err
    assert run([*words, "--dataset", "digits"]) == 2
    assert "--model" in capsys.readouterr().err
    assert run([*words, "--dataset", "digits", "--model", "tiny_resnet", "--eps", "0.1"]) == 0
    assert json.loads((tmp_path / "evaluation.json").read_text())["protocol"]["eps"] == 0.1


def test_a_checkpoint_of_another_data_set_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "hundred.safetensors"
    save_weights(
        path, create_model("tiny_resnet", 100), {"model": "tiny_resnet", "num_classes": "100", "dataset": "digits"}
    )
    assert run(["evaluate", str(path), "--attacks", "clean"]) == 3
    assert "100 classes" in capsys.readouterr().err


def test_autoattack_is_the_librarys(teacher: Path) -> None:
    assert run(["evaluate", str(teacher), "--attacks", "pgd20,autoattack", "--limit", "10", "--weights", "last"]) == 0
    content = json.loads((teacher / "evaluation-last.json").read_text())
    assert content["attacks"]["autoattack"]["average"] <= content["attacks"]["pgd20"]["average"]
    assert content["protocol"]["attacks"]["autoattack"]["suite"] == "standard"


def test_an_evaluation_that_cannot_be_read_is_kept_aside(teacher: Path, tmp_path: Path) -> None:
    path = tmp_path / "evaluation.json"
    for number, damaged in enumerate(("{", "[]", '{"protocol": {}, "attacks": {}}'), start=1):
        path.write_text(damaged)
        assert run(["evaluate", str(teacher), "--attacks", "clean", "--limit", "20", "--out", str(tmp_path)]) == 0
        assert (tmp_path / f"evaluation.{number}.json").read_text() == damaged
        assert list(json.loads(path.read_text())["attacks"]) == ["clean"]


def test_lost_verdicts_are_told_and_the_others_written(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["evaluate", str(teacher), "--limit", "20", "--out", str(tmp_path)]
    assert run([*words, "--attacks", "clean"]) == 0
    (tmp_path / "evaluation.csv").unlink()
    assert run([*words, "--attacks", "fgsm"]) == 0
    assert "the verdicts of clean are lost" in capsys.readouterr().err
    assert list(json.loads((tmp_path / "evaluation.json").read_text())["attacks"]) == ["clean", "fgsm"]
    assert (tmp_path / "evaluation.csv").read_text().startswith("image,label,fgsm\n")


def images_of(path: Path) -> int:
    return json.loads(path.read_text())["protocol"]["images"]


def test_a_failing_evaluation_leaves_the_finished_one_alone(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["evaluate", str(teacher), "--out", str(tmp_path), "--attacks", "clean,fgsm", "--limit"]
    assert run([*words, "20"]) == 0
    before = {name: (tmp_path / name).read_bytes() for name in ("evaluation.json", "evaluation.csv")}

    def fails(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("retemper.engine.evaluation.attacked.predictions", fails)
        assert run([*words, "40"]) != 0
    assert before == {name: (tmp_path / name).read_bytes() for name in before}
    assert run([*words, "40"]) == 0
    assert images_of(tmp_path / "evaluation.json") == 40 and images_of(tmp_path / "evaluation.1.json") == 20


def test_a_quick_run_does_not_take_the_place_of_a_full_one(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["evaluate", str(teacher), "--out", str(tmp_path), "--attacks"]
    assert run([*words, "clean,fgsm", "--limit", "40"]) == 0
    assert run([*words, "clean", "--limit", "20"]) == 0
    assert run([*words, "fgsm", "--limit", "20"]) == 0  # goes on with the small one
    assert run([*words, "clean", "--limit", "40", "--seed", "1"]) == 0  # fewer attacks
    assert [images_of(path) for path in sorted(tmp_path.glob("evaluation*.json"))] == [20, 40, 40]
    assert list(json.loads((tmp_path / "evaluation.1.json").read_text())["attacks"]) == ["clean", "fgsm"]
    captured = capsys.readouterr()
    assert "evaluation.json stays" in captured.err and captured.out.rstrip().endswith("evaluation.2.json")
    assert run([*words, "clean", "--limit", "20", "--eps", "0.01"]) == 0
    assert images_of(tmp_path / "evaluation.json") == 40


def test_readers_take_the_fullest_evaluation_or_the_one_that_is_named(teacher: Path, tmp_path: Path) -> None:
    words = ["evaluate", str(teacher), "--out", str(tmp_path), "--attacks", "clean", "--limit"]
    assert run([*words, "40"]) == 0 and run([*words, "20"]) == 0
    full, quick = tmp_path / "evaluation.json", tmp_path / "evaluation.1.json"
    for suffix in (".json", ".csv"):  # as earlier versions left them: the newest in the first place
        a, b, aside = (path.with_suffix(suffix) for path in (full, quick, tmp_path / "aside"))
        a.rename(aside)
        b.rename(a)
        aside.rename(b)
    assert read_evaluated(tmp_path).protocol["images"] == 40 == read_run(tmp_path).protocol["images"]
    assert read_evaluated(full).protocol["images"] == 20 == read_run(full).protocol["images"]
    assert read_run(quick).name == f"{tmp_path.name} (evaluation.1)"
    full.unlink()  # as an evaluation that failed left them
    assert read_evaluated(tmp_path).protocol["images"] == 40


def test_each_checkpoint_of_a_folder_has_its_own_evaluation(tmp_path: Path) -> None:
    facts = {"model": "tiny_resnet", "num_classes": "10", "dataset": "digits", "channels": "1"}
    words = ["--attacks", "clean", "--limit", "20"]
    for name in ("a", "b", "a", "b"):
        save_weights(tmp_path / f"{name}.safetensors", create_model("tiny_resnet", 10, channels=1), facts)
        assert run(["evaluate", str(tmp_path / f"{name}.safetensors"), *words]) == 0
    for name, place in (("a", "evaluation"), ("b", "evaluation-b")):
        protocol = json.loads((tmp_path / f"{place}.json").read_text())["protocol"]
        assert protocol["weights"] == f"{name}.safetensors"
        assert (tmp_path / f"{place}.1.json").exists(), "the one of the weights before"


def test_two_networks_in_one_out_have_each_its_own_evaluation(teacher: Path, tmp_path: Path) -> None:
    for name in ("first", "second"):
        shutil.copytree(teacher, tmp_path / name, ignore=shutil.ignore_patterns("evaluation*"))
        words = ["evaluate", str(tmp_path / name), "--out", str(tmp_path), "--attacks", "clean", "--limit", "20"]
        assert run(words) == 0
    networks = [json.loads(path.read_text())["protocol"]["network"] for path in sorted(tmp_path.glob("*.json"))]
    assert networks == ["second", "first"]  # evaluation-second.json, evaluation.json


def test_two_processes_add_to_one_evaluation(teacher: Path, tmp_path: Path) -> None:
    words = ["evaluate", str(teacher), "--out", str(tmp_path), "--limit", "20", "--attacks"]
    assert run([*words, "clean"]) == 0
    content = json.loads((tmp_path / "evaluation.json").read_text())
    protocol = {name: value for name, value in content["protocol"].items() if name != "attacks"}
    other = EvaluationFile.begin(tmp_path / "evaluation.json", protocol)
    assert run([*words, "fgsm"]) == 0
    other.write()
    assert list(json.loads((tmp_path / "evaluation.json").read_text())["attacks"]) == ["clean", "fgsm"]
    assert (tmp_path / "evaluation.csv").read_text().startswith("image,label,clean,fgsm\n")


NETWORKS = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, kind="plain"):
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.kind = nn.Linear(64, 10), kind

    def forward(self, image):
        if self.kind == "in_place":
            image = image.sub_(0.5)
        if self.kind == "no_grad":
            with torch.no_grad():
                return self.linear(image.flatten(1))
        logits = self.linear(image.flatten(1))
        return {"nan": logits * torch.nan, "constant": logits * 0 + torch.eye(10)[0]}.get(self.kind, logits)

class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, 10)

    def forward(self, image):
        return self.linear(image.flatten(1))

def no_grad(): return Net("no_grad")
def in_place(): return Net("in_place")
def nan(): return Net("nan")
def constant(): return Net("constant")
def scripted(): return torch.jit.script(Plain())
"""


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.parametrize("kind", ["no_grad", "in_place", "nan", "constant", "scripted"])
def test_networks_that_cannot_be_attacked_are_told_before_the_first_attack(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "net.py").write_text(NETWORKS)
    words = ["evaluate", f"{tmp_path}/net.py:{kind}", "--dataset", "digits", "--limit", "20", "--out", str(tmp_path)]
    code = run([*words, "--attacks", "clean,pgd20"])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    if kind in ("no_grad", "in_place"):
        assert code == 3 and not (tmp_path / "evaluation.json").exists()
        assert captured.err.count("\n") == 1 and kind in captured.err
        return
    assert code == 0, captured.err
    result = json.loads((tmp_path / "evaluation.json").read_text())["attacks"]["pgd20"]
    if kind == "nan":
        assert result["average"] == 0 and "not finite" in result["flags"][0]
    if kind == "constant":
        assert "exactly zero" in result["flags"][0] and "exactly zero" in captured.out


def test_what_would_stop_a_later_attack_stops_the_first(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    def refused(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    words = ["evaluate", str(teacher), "--out", str(tmp_path), "--limit", "20", "--attacks", "clean,autoattack"]
    (tmp_path / "autoattack.csv").write_text("damaged")
    assert run(words) == 3 and "damaged" in capsys.readouterr().err
    (tmp_path / "autoattack.csv").unlink()
    with monkeypatch.context() as patch:
        patch.setattr("retemper.engine.evaluation.library.version", missing)
        assert run(words) == 2 and "retemper[eval]" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "TemporaryFile", refused)
        assert run(words) == 2 and "Read-only file system" in capsys.readouterr().err
    (tmp_path / "evaluation.csv").mkdir()
    assert run(words) == 2 and "is a folder" in capsys.readouterr().err
    assert not (tmp_path / "evaluation.json").exists()


def test_each_network_of_one_file_has_its_own_evaluation(tmp_path: Path) -> None:
    torch.manual_seed(0)
    both = {name: create_model("tiny_resnet", 10).state_dict() for name in ("state_dict", "state_dict_ema")}
    torch.save(both, tmp_path / "two.pt")
    words = ["--model", "tiny_resnet", "--dataset", "digits", "--attacks", "clean", "--limit", "20"]
    for name in ("two.pt", "two.pt:state_dict", "two.pt", "two.pt:state_dict"):
        assert run(["evaluate", str(tmp_path / name), *words]) == 0
    files = {path.name: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    named = {name: content["protocol"]["weights"] for name, content in files.items()}
    assert named == {"evaluation.json": "two.pt", "evaluation-two-state_dict.json": "two.pt:state_dict"}


def test_an_evaluation_of_weights_that_are_gone_is_no_result_of_the_run(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(teacher, folder, ignore=shutil.ignore_patterns("evaluation*"))
    words = ["evaluate", str(folder), "--attacks", "clean", "--limit", "20"]
    assert run(words) == 0 and read_run(folder).results
    assert read_evaluated(folder).protocol["images"] == 20
    shutil.copy(folder / "last.safetensors", folder / "best.safetensors")
    weights = load_file(folder / "best.safetensors")
    save_file({name: value * 2 for name, value in weights.items()}, folder / "best.safetensors")
    run_ = read_run(folder)
    assert not run_.results and any("of other weights" in note.text for note in run_.notes)
    with pytest.raises(DataError, match="of other weights than best"):
        read_evaluated(folder)


def test_the_folder_of_the_images_makes_no_other_evaluation(teacher: Path, tmp_path: Path) -> None:
    words = ["evaluate", str(teacher), "--out", str(tmp_path / "out"), "--limit", "20"]
    assert run([*words, "--attacks", "clean"]) == 0
    assert run([*words, "--attacks", "fgsm", "--data-root", str(tmp_path)]) == 0
    assert [path.name for path in (tmp_path / "out").glob("*.json")] == ["evaluation.json"]


def test_a_limit_above_the_number_of_images_is_none(teacher: Path, tmp_path: Path) -> None:
    words = ["evaluate", str(teacher), "--out", str(tmp_path), "--attacks", "clean"]
    assert run([*words, "--limit", "99999"]) == 0 and run(words) == 0
    assert [path.name for path in tmp_path.glob("*.json")] == ["evaluation.json"]
