"""A user's mistake ends in one clear line on stderr, the contract's exit code, and nothing lost."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from shlex import quote
from types import ModuleType

import pytest
import torch

from retemper import __version__
from retemper.cli import run
from retemper.engine import create_model, save_weights
from retemper.engine.catalogue import find_setting, method_module, methods
from retemper.options import shown_value

Capture = pytest.CaptureFixture[str]


def fails(capsys: Capture, code: int, *words: object) -> str:
    """Run the words, expect `code` and one line on stderr; the line."""
    capsys.readouterr()
    assert run([str(word) for word in words]) == code
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("retemper: error: ")]
    assert len(lines) == 1 and "Traceback" not in lines[0]
    return lines[0]


@pytest.mark.parametrize(
    "words, said",
    [
        (["trian"], "there is no verb 'trian' (did you mean 'train'?); see retemper --help"),
        (["train", "abld:digits"], "did you mean 'absld'?"),
        (["train", "ABSLD:digits"], "did you mean 'absld'?"),
        (["train", "absld:digit"], "did you mean 'digits'?"),
        (["train", "abld:digits", "--epochs", "2"], "did you mean 'absld'?"),
        (["train", "--teacher", "robustbench:X", "--epochs", "2", "abld:digits"], "did you mean 'absld'?"),
        (["train", "absld", "--epochs", "2"], "absld needs a setting"),
        (["train", "absld"], "absld needs a setting"),
        (["train", "absld:digits", "--attack-setps", "3"], "did you mean '--attack-steps'?"),
        (["train", "absld:digits", "--tempreature-rate=1"], "did you mean '--temperature-rate'?"),
        (["train", "absld:digits", "--epochs", "many"], "--epochs many: it must be a whole number"),
        (["train", "absld:digits", "--eps", "8/0"], "--eps 8/0: it must be a number or a fraction"),
        (["train", "absld:digits", "--eps", "8"], "8/255, not 8"),
        (["train", "absld:digits", "--variant", "secret"], "paper, released"),
        (["train", "label_trust:digits", "--variant", "released"], "variant"),
        (["train", "absld:digits", "--seed", "-1"], "seed"),
        (["train", "absld:digits", "--device", "tpu"], "cpu, cuda or cuda:N"),
        (["evaluate", "x", "--attacks", "pgd"], "there is no attack 'pgd'"),
        (["evaluate", "x", "--limit", "0"], "--limit 0"),
        (["convert", "cifar", "--out", "x.beton"], "no data set 'cifar'"),
        (["convert", "digits", "--out", "x.npz"], ".beton"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_usage_names_the_right_one(words: list[str], said: str, capsys: Capture) -> None:
    assert said in fails(capsys, 2, *words)


def test_a_file_in_the_place_of_the_folder_is_said_before_a_teacher_is_trained(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "file").touch()
    for out in ("file", "file/run"):
        assert "is a file" in fails(capsys, 2, "train", "absld:digits", "--out", tmp_path / out)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.own_process
def test_missing_data_is_named_with_its_place(tmp_path: Path, capsys: Capture) -> None:
    teacher = tmp_path / "t.safetensors"
    save_weights(teacher, create_model("wrn34_10", 10))
    words = ["train", "absld:cifar10_resnet18", "--teacher", teacher, "--out", tmp_path / "run"]
    assert "nowhere" in fails(capsys, 3, *words, "--data-root", tmp_path / "nowhere")
    assert "data-root" in fails(capsys, 3, *words)
    assert "nowhere" in fails(capsys, 3, "evaluate", tmp_path / "nowhere")
    assert "is no run" in fails(capsys, 3, "evaluate", tmp_path)


def bad_checkpoints(folder: Path) -> dict[str, Path]:
    """Return files that are no weights, by what is wrong with them."""

    class Bomb:
        def __reduce__(self) -> tuple:
            return os.system, (f"touch {quote(str(folder / 'ran'))}",)

    made = {name: folder / f"{name}.pt" for name in ("page", "bomb", "torn", "other")}
    made["page"].write_text("<!DOCTYPE html><html>Google Drive - Quota exceeded</html>")
    torch.save({"state_dict": Bomb()}, made["bomb"])
    torch.save(create_model("tiny_resnet_wide", 10).state_dict(), made["torn"])
    made["torn"].write_bytes(made["torn"].read_bytes()[:5000])
    torch.save(create_model("tiny_resnet_wide", 7).state_dict(), made["other"])
    return made


@pytest.mark.parametrize(
    "name, said", [("page", "web page"), ("bomb", "run code"), ("torn", "torn.pt"), ("other", "7 classes")]
)
def test_a_bad_teacher_is_refused_before_anything_is_written(
    name: str, said: str, tmp_path: Path, capsys: Capture
) -> None:
    path = bad_checkpoints(tmp_path)[name]
    out = tmp_path / "run"
    assert said in fails(capsys, 3, "train", "absld:digits", "--teacher", path, "--out", out)
    assert not (tmp_path / "ran").exists(), "a checkpoint ran code"
    assert not (out / "config.json").exists()
    words = ["evaluate", path, "--model", "tiny_resnet_wide", "--dataset", "digits", "--attacks", "clean"]
    assert said in fails(capsys, 3, *words)
    assert not (tmp_path / "ran").exists(), "a checkpoint ran code"


def test_a_truncated_beton_is_refused(tmp_path: Path, teacher_checkpoint: Path, capsys: Capture) -> None:
    beton = tmp_path / "digits.beton"
    assert run(["convert", "digits", "--out", str(beton)]) == 0
    beton.write_bytes(beton.read_bytes()[:-1000])
    words = ["train", "absld:digits", "--teacher", teacher_checkpoint, "--out", tmp_path / "run", "--loader", "ffcv"]
    assert "truncated" in fails(capsys, 3, *words, "--beton", beton)


@pytest.fixture
def teacher_checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "teacher.pt"
    torch.save({"state_dict": create_model("tiny_resnet_wide", 10).state_dict()}, path)
    return path


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "file").write_text("")
    assert "--out" in fails(capsys, 2, "train", "sat:digits", "--out", tmp_path / "file" / "run")


def test_the_report_of_something_else_is_refused(tmp_path: Path, capsys: Capture) -> None:
    assert str(tmp_path) in fails(capsys, 3, "report", tmp_path, "--out", tmp_path / "page")


def test_ls_shows_every_setting_of_the_contract(capsys: Capture) -> None:
    assert run(["ls", "--all"]) == 0
    lines = capsys.readouterr().out.splitlines()
    settings = (
        "digits fashion_mnist_small cifar10_small fashion_mnist_resnet18 cifar10_resnet18 cifar10_mobilenet_v2 "
        "cifar100_resnet18"
    )
    for method in ("absld", "rslad"):
        for setting in [*settings.split(), "tiny_imagenet_preact_resnet18"]:
            assert any(line.startswith(f"{method}:{setting} ") for line in lines)
    assert any("NeurIPS 2024" in line for line in lines)
    capsys.readouterr()
    assert run(["ls", "cifar100", "absld"]) == 0
    head, *found = capsys.readouterr().out.splitlines()
    assert head.startswith("recipe ") and head.endswith("measured (--preset paper)") and len(found) == 1


def test_ls_hides_settings_that_were_not_trained_unless_asked(capsys: Capture) -> None:
    settings = {
        f"{method}:{name}": setting.is_trained
        for method in methods()
        for name, setting in method_module(method).SETTINGS.items()
    }
    assert {*settings.values()} == {True, False}

    def listed(*words: str) -> list[str]:
        assert run(["ls", *words]) == 0
        return [line.split()[0] for line in capsys.readouterr().out.splitlines()]

    head, *trained, rest = listed()
    assert head == "recipe" and trained == [name for name, is_trained in settings.items() if is_trained]
    assert rest == "and"
    assert run(["ls"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == (
        f"and {len(settings) - len(trained)} settings that were not trained yet: retemper ls --all"
    )
    head, *every = listed("--all")
    assert head == "recipe" and sorted(every) == sorted(settings) and every[: len(trained)] == trained
    assert listed("absld:cifar10_resnet18") == ["recipe", "absld:cifar10_resnet18"], "words find untrained ones too"
    assert "no recipe's line holds absld and nowhere" in fails(capsys, 2, "ls", "absld", "nowhere")


@pytest.mark.parametrize("name", ["absld:cifar10_resnet18", "label_trust:digits", "frl:digits"])
def test_the_help_explains_every_option_of_the_recipe_with_its_default(
    name: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")  # argparse cuts long words where a terminal is narrow
    with pytest.raises(SystemExit) as left:
        run(["train", name, "--help"])
    assert left.value.code == 0
    entries = [" ".join(entry.split()) for entry in re.split(r"\n(?=  -|\n)", capsys.readouterr().out)]
    recipe = find_setting(name)[2].recipe
    for option, value in recipe.flat().items():
        (entry,) = (entry for entry in entries if entry.startswith(f"--{option.replace('_', '-')} "))
        assert recipe.options()[option][1].help in entry and entry.endswith(f"(default {shown_value(value)})"), entry


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (8 / 255, "8/255"),
        (0.15, "0.15"),
        (5 / 6, "5/6"),
        (300, "300"),
        (1.0, "1"),
        (2e-4, "0.0002"),
        (True, "true"),
        (None, "none"),
        ((215, 260), "215,260"),
        ((), "none"),
        ("paper", "paper"),
    ],
)
def test_a_default_is_shown_as_one_types_it(value: object, shown: str) -> None:
    assert shown_value(value) == shown


def test_doctor_tells_what_is_there(capsys: Capture) -> None:
    assert run(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "torch" in out and "ffcv" in out and "fashion-mnist" in out


def test_every_field_is_an_option_and_shown(capsys: Capture) -> None:
    words = [
        "--eps",
        "4/255",
        "--lr-drops",
        "3,5",
        "--nesterov",
        "true",
        "--image-size",
        "none",
        "--temperature-rate=.2",
    ]
    assert run(["train", *words, "absld:cifar10_resnet18", "--show"]) == 0
    shown = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert float(shown["eps"]) == 4 / 255 and shown["lr_drops"] == "(3, 5)" and shown["nesterov"] == "True"
    assert shown["image_size"] == "None" and shown["temperature_rate"] == "0.2"


def test_a_recipe_file_is_a_script(tmp_path: Path) -> None:
    recipe = Path(__file__).parents[1] / "recipes/absld.py"
    shown = subprocess.run(
        [sys.executable, str(recipe), "digits", "--epochs", "7", "--show"], capture_output=True, text=True, cwd=tmp_path
    )
    assert shown.returncode == 0, shown.stderr
    assert "epochs               7" in shown.stdout
    wrong = subprocess.run([sys.executable, str(recipe), "--epochs", "7"], capture_output=True, text=True, cwd=tmp_path)
    assert wrong.returncode == 2 and "absld needs a setting" in wrong.stderr


def test_convert_writes_the_file_and_its_digest(tmp_path: Path, datafiles: ModuleType) -> None:
    datafiles.make_cifar10(tmp_path / "data", n=10)
    out = tmp_path / "train.beton"
    assert run(["convert", "cifar10", "--data-root", str(tmp_path / "data"), "--out", str(out)]) == 0
    assert len(json.loads((tmp_path / "train.beton.json").read_text())["sha256"]) == 64


@pytest.mark.parametrize(
    "words, said",
    [
        ("train sat:digits --lr -1", "lr = -1.0"),
        ("train sat:digits --eps nan", "finite"),
        ("train sat:digits --student resnet19", "--student resnet19 (did you mean 'resnet18'?)"),
        ("train sat:digits --dataset mnist", "dataset = 'mnist'"),
        ("train sat:digits --momentum 1", "momentum"),
        ("train sat:digits --images-per-class -1", "images_per_class"),
        ("train sat:digits --cpu-threads 0", "cpu_threads"),
        ("train sat:digits --lr-drops 0,3", "lr_drops"),
        ("train absld:digits --temperature-lower 9", "temperature_lower"),
        ("train sat:digits --device cpu:abc", "cpu, cuda or cuda:N"),
        ("train --device cuda:9 sat:digits", "cuda"),
        ("evaluate x --batch-size -1", "--batch-size -1"),
        ("evaluate x --eps 8", "8/255 not 8"),
        ("evaluate x --eps nan", "--eps nan"),
        ("evaluate x --attacks ,", "names none"),
        ("bench kernels --rounds 0", "--rounds 0"),
        ("bench kernels --json nowhere/x.json", "--json nowhere/x.json"),
    ],
)
def test_impossible_values_are_named_before_any_work(words: str, said: str, capsys: Capture) -> None:
    assert said in fails(capsys, 2, *words.split())


def test_a_step_of_the_attack_that_is_longer_than_its_radius_is_told_of(capsys: Capture) -> None:
    shorter = ["train", "rslad:digits", "--eps", "8/255", "--show"]
    assert run(shorter) == 0 and "is longer than eps (8/255)" in capsys.readouterr().err
    assert run([*shorter, "--attack-step", "2/255"]) == 0 and "longer" not in capsys.readouterr().err


def test_options_may_stand_before_the_recipe(capsys: Capture) -> None:
    assert run(["train", "--out", "a:b", "--epochs", "3", "sat:digits", "--show"]) == 0
    assert "epochs               3" in capsys.readouterr().out


def test_files_that_cannot_be_written_end_in_a_line(tmp_path: Path, teacher: Path, capsys: Capture) -> None:
    (tmp_path / "page/report.html").mkdir(parents=True)
    assert "report.html" in fails(capsys, 3, "report", teacher, "--out", tmp_path / "page")


@pytest.mark.parametrize("content", ["{}", "[]", "not json", '{"recipe": []}'])
def test_a_damaged_config_is_named(content: str, tmp_path: Path, teacher: Path, capsys: Capture) -> None:
    run_folder = tmp_path / "run"
    shutil.copytree(teacher, run_folder)
    (run_folder / "config.json").write_text(content)
    assert "config.json" in fails(capsys, 3, "evaluate", run_folder, "--attacks", "clean")
    assert "config.json" in fails(capsys, 3, "train", "sat:digits", "--out", run_folder)


def test_weights_for_other_images_are_refused(tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "colour.safetensors"
    metadata = {"model": "tiny_resnet_wide", "num_classes": "10", "channels": "3", "dataset": "digits"}
    save_weights(path, create_model("tiny_resnet_wide", 10, channels=3), metadata)
    assert "3 channels" in fails(capsys, 3, "evaluate", path, "--attacks", "clean")
    assert "3 channels" in fails(capsys, 3, "train", "rslad:digits", "--teacher", path, "--out", tmp_path / "run")


def test_weights_that_are_not_finite_are_refused(tmp_path: Path, capsys: Capture) -> None:
    model = create_model("tiny_resnet_wide", 10)
    model.get_parameter("linear.bias").data.fill_(float("nan"))
    path = tmp_path / "nan.safetensors"
    save_weights(path, model, {"model": "tiny_resnet_wide", "num_classes": "10", "dataset": "digits"})
    assert "not finite" in fails(capsys, 3, "evaluate", path, "--attacks", "clean")


def test_sigterm_ends_a_run_as_an_interruption(tmp_path: Path, teacher: Path) -> None:
    words = [sys.executable, "-m", "retemper", "train", "rslad:digits", "--teacher", str(teacher)]
    words += ["--out", str(tmp_path / "run"), "--epochs", "10000"]  # not to be at its end before it is told to leave
    child = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    assert child.stderr is not None
    for line in child.stderr:
        if line.startswith("epoch 1/"):
            child.terminate()
            break
    assert "the same command goes on" in child.communicate()[1]
    assert child.returncode == 75


AT_ONCE = ["--help", "--version", "", "ls", "ls --all", "ls nothing", "trian", "train", "train abld:digits", "evaluate"]
AT_ONCE += ["train absld:digits --help", "train absld:digits --epohcs 3", "train absld:digits --epochs x", "bench x"]
AT_ONCE += ["evaluate x --attacks pgd", "report --help"]


def test_help_lists_and_wrong_usage_do_without_what_takes_seconds_to_import() -> None:
    code = "import sys; from retemper.cli import run\nfor words in sys.argv[1:]:\n"
    code += "    try: run(words.split())\n    except SystemExit: pass\n"
    code += "print(*({'torch', 'numpy', 'triton', 'jinja2', 'scipy'} & sys.modules.keys()), file=sys.stderr)"
    ran = subprocess.run([sys.executable, "-c", code, *AT_ONCE], capture_output=True, text=True)
    assert ran.returncode == 0 and "Traceback" not in ran.stderr
    assert ran.stderr.splitlines()[-1] == ""


def complete(line: str) -> list[str]:
    """Ask for what a shell would offer at the end of the line; `python -m retemper` answers on a file of its own."""
    asked = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE_IFS": "\n"}
    words = ["sh", "-c", f"exec {sys.executable} -m retemper 8>&1 >/dev/null"]
    ran = subprocess.run(words, env=os.environ | asked, capture_output=True, text=True)
    return [word.strip() for word in ran.stdout.splitlines()]


@pytest.mark.parametrize(
    "line, offered",
    [
        ("retemper tr", ["train"]),
        ("retemper train absld:cifar10_m", ["absld:cifar10_mobilenet_v2"]),
        ("retemper train absld:digits --temperature-l", ["--temperature-lower"]),
        ("retemper train absld:digits --loader ", ["auto", "ffcv", "resident"]),
        ("retemper train no:recipe --data-r", ["--data-root"]),
    ],
)
def test_a_shell_completes_verbs_recipes_options_and_values(line: str, offered: list[str]) -> None:
    assert sorted(complete(line)) == sorted(offered)


def test_the_version_is_said(capsys: Capture) -> None:
    with pytest.raises(SystemExit):
        run(["--version"])
    assert capsys.readouterr().out == f"retemper {__version__}\n"


@pytest.mark.parametrize("words", [[], ["help"]])
def test_no_word_at_all_is_answered_with_the_help(words: list[str], capsys: Capture) -> None:
    with pytest.raises(SystemExit):
        run(words)
    assert "train" in capsys.readouterr().out
