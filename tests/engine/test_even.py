"""Evening a trained network: the formulas in float64, the images, the run that is written, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from retemper.cli import run
from retemper.engine import Recipe, create_model
from retemper.engine.catalogue import find_setting
from retemper.engine.checkpoints.header import Facts, read_header
from retemper.engine.even.even import even
from retemper.engine.even.head import evened_rows, find_head, fit_bias, margin, next_shift
from retemper.engine.even.images import FITTED, even_images
from retemper.engine.even.subject import EvenRequest, require_learned
from retemper.engine.even.tuning import Tuning
from retemper.engine.models import MODELS, Normalised
from retemper.engine.models.silu_resnets import SiluWideResNet
from retemper.engine.models.wide_resnet import WideResNet
from retemper.engine.run.commands import train_again
from retemper.engine.run.data import chosen_indices
from retemper.engine.run.run_folder import RunFolder
from retemper.errors import DataError, UsageError
from retemper.files import file_digest
from retemper.loaders import load_split, split_of_arrays

CPU = torch.device("cpu")
SHORT = (
    "--epochs 3 --lr-drops 2 --attack-steps 2 --eps 0.03 --attack-step 0.02 --batch-size 64 --select-steps 2".split()
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has learned every class."""
    out = tmp_path_factory.mktemp("runs") / "base"
    assert run(["train", "sat:digits_student", "--device", "cpu", "--seed", "4", "--out", str(out), *SHORT]) == 0
    return out


def request(target: object, **options: object) -> EvenRequest:
    return EvenRequest(**({"target": target, "device": CPU, "facts": Facts()} | options))  # pyright: ignore


def config_of(out: Path) -> dict[str, object]:
    return json.loads((out / "config.json").read_text())


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_rows_have_norms_between_their_own_and_the_mean(power: float) -> None:
    weight = np.random.default_rng(0).normal(size=(5, 7)) * np.arange(1, 6)[:, None]
    norm = np.sqrt((weight**2).sum(1))
    expected = weight * (norm.mean() / norm)[:, None] ** power
    found = evened_rows(torch.from_numpy(weight), power)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)
    if power == 1:
        np.testing.assert_allclose(found.norm(dim=1).numpy(), norm.mean())
    assert torch.equal(evened_rows(torch.eye(3) * torch.tensor([0.0, 1, 3]), 1.0)[0], torch.zeros(3))
    assert evened_rows(torch.randn(3, 4).half(), 1.0).dtype is torch.float16


def test_a_round_moves_each_class_by_how_far_it_is_from_the_mean() -> None:
    accuracy, shift = torch.tensor([0.2, 0.4, 0.9], dtype=torch.float64), torch.tensor([0.5, 0.0, -0.5])
    expected = shift.double() + 1.7 / 2 * (0.5 - accuracy)
    torch.testing.assert_close(next_shift(shift.double(), accuracy, 3, 1.7), expected)


def test_margin_is_the_labels_logit_above_the_largest_other() -> None:
    logits = torch.tensor([[3.0, 1.0, 2.0], [3.0, 1.0, 2.0], [0.0, 0.0, -1.0]])
    assert margin(logits, torch.tensor([0, 1, 1])).tolist() == [1.0, -2.0, 0.0]


def test_the_fit_is_a_plain_loop_and_leaves_the_bias_alone() -> None:
    """Without an attack, on a linear network, whose second class has too low a bias."""
    torch.manual_seed(0)
    head, label = nn.Linear(4, 3).double(), torch.arange(60) % 3
    image = torch.randn(60, 4).double()
    with torch.no_grad():
        image += 2 * head.weight[label]
        head.bias.copy_(torch.tensor([0.0, -1.0, 0.5]))
    before = head.bias.detach().clone()
    found = fit_bias(head, lambda: head(image).detach(), label, rounds=5)
    plain, shift = (image @ head.weight.T + before).detach().numpy(), np.zeros(3)
    own = np.take_along_axis(plain, label.numpy()[:, None], 1)[:, 0]
    others = np.where(np.eye(3, dtype=bool)[label.numpy()], -np.inf, plain).max(1)
    unit = float(np.sort(np.abs(own - others))[29])  # the lower median, as torch has it
    for number, one in enumerate(found):
        given = (plain + shift).argmax(1)
        accuracy = np.array([(given[label.numpy() == k] == k).mean() for k in range(3)])
        np.testing.assert_allclose(one.shift_K.numpy(), shift, atol=1e-12)
        np.testing.assert_allclose(one.accuracy_K.numpy(), accuracy)
        assert one.score == pytest.approx(accuracy.mean() + accuracy.min())
        shift = shift + unit / np.sqrt(1 + number) * (accuracy.mean() - accuracy)
    assert len(found) == 6 and max(one.score for one in found) > found[0].score
    assert torch.equal(head.bias.detach(), before)


@pytest.mark.parametrize("model", MODELS)
def test_every_network_ends_in_a_layer_that_is_found(model: str) -> None:
    wide = SiluWideResNet if model.endswith("silu") else WideResNet
    network = wide(10, 3, 10, 1) if model.startswith("wrn") else create_model(model, 10, channels=3)
    assert find_head(network.eval(), torch.rand(2, 3, 32, 32), "it").out_features == 10


class Twice(nn.Module):
    """A network whose answer is not its linear layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(12, 3)

    def forward(self, image: Tensor) -> Tensor:
        return 2 * self.head(image.flatten(1))


def test_a_network_without_such_a_layer_is_refused() -> None:
    image = torch.rand(2, 3, 2, 2)
    weighed = nn.Sequential(nn.Flatten(), parametrizations.weight_norm(nn.Linear(12, 3)))
    for network in (Twice(), nn.Sequential(nn.Conv2d(3, 3, 2), nn.Flatten()), weighed):
        with pytest.raises(UsageError, match=r"net.py:build does not end in one linear layer.*--by csr"):
            find_head(network.eval(), image, "net.py:build")
    normalised = Normalised(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), torch.zeros(3), torch.ones(3)).eval()
    assert find_head(normalised, image, "it").out_features == 3


def recipe(**options: object) -> Recipe:
    return find_setting("csr_control:digits")[2].recipe.replace(**options)


def test_images_that_choose_are_those_that_the_run_held_out_and_no_others_are_fitted_on() -> None:
    split = load_split("digits", "train")
    trained, held = chosen_indices(split, recipe(images_per_class=40))
    found = even_images(split, recipe(images_per_class=40))
    assert np.array_equal(found.held.images, split.images[held])
    unseen = np.setdiff1d(np.arange(len(split)), np.concatenate([trained, held]))
    pixels = {image.tobytes() for image in split.images[held]}
    assert not pixels & {image.tobytes() for image in found.fit.images}
    of_unseen = {image.tobytes() for image in split.images[unseen]}
    for k in range(10):
        own = [image.tobytes() in of_unseen for image in found.fit.images[found.fit.labels == k]]
        there = int((split.labels[unseen] == k).sum())
        assert sum(own) == min(there, FITTED) and len(own) == min(FITTED, there + 40)


def test_too_few_images_that_choose_are_refused() -> None:
    with pytest.raises(DataError, match=r"4 held-out images of class 0 are too few.*5 of each class"):
        even_images(load_split("digits", "train"), recipe(holdout_per_class=4))
    whole = load_split("digits", "train")
    lacking = split_of_arrays("digits", "train", whole.images[:200], whole.labels[:200] % 9, whole.classes, "")
    with pytest.raises(DataError, match="0 held-out images of class 9"):
        even_images(lacking, recipe())


def test_a_class_that_was_never_learned_is_named() -> None:
    split, found = load_split("digits", "train"), Tuning(setting="digits", recipe=recipe(), is_apart=False)
    report = {"accuracy": [0.5, 0.0, *[0.4] * 7, 0.0]}
    with pytest.raises(DataError, match=r"RUN never learned 1, 9: of 10 held-out images.*know no more: train it"):
        require_learned(report, found, split, "RUN")
    require_learned({"accuracy": [0.1] * 10}, found, split, "RUN")


@pytest.mark.parametrize("by", ["norm", "half", "bias"])
def test_the_run_that_is_written_is_the_network_with_another_last_layer(trained: Path, tmp_path: Path, by: str) -> None:
    out, table = even(request(trained, by=by, out=tmp_path / "evened"))
    before, after = (load_file(folder / "best.safetensors") for folder in (trained, out))
    changed = [name for name, value in before.items() if not torch.equal(value, after[name])]
    assert changed == [f"linear.{'bias' if by == 'bias' else 'weight'}"]
    if by != "bias":
        power = {"norm": 1.0, "half": 0.5}[by]
        torch.testing.assert_close(after["linear.weight"], evened_rows(before["linear.weight"], power))
    assert (out / "best.safetensors").read_bytes() == (out / "last.safetensors").read_bytes()
    config, lines = config_of(out), (out / "metrics.jsonl").read_text().splitlines()
    assert config["method"] == f"even_{by}" and config["setting"] == "sat:digits_student" and config["seed"] == 4
    assert config["start"]["sha256"] == file_digest(trained / "best.safetensors")  # pyright: ignore
    evened = config["evened"]
    assert isinstance(evened, dict) and evened["by"] == by and evened["held_out_of_its_training"] is True
    assert evened["chosen_on"] == "10 training images of each class"
    assert evened["before"]["average"] > 0 and [*evened["tried"]] == [by]
    header = read_header(out / "best.safetensors")
    report = next(line["holdout"] for line in map(json.loads, lines) if "holdout" in line)
    assert float(header["score"]) == report["average"] + report["worst"]
    assert len(lines) == (9 if by == "bias" else 1)
    if by == "bias":
        chosen = json.loads(lines[int(header["epoch"]) - 1])
        torch.testing.assert_close(
            after["linear.bias"], before["linear.bias"] + torch.tensor(chosen["bias"]), rtol=0, atol=1e-6
        )
    assert "10 training images of each class" in table and "worst class, %" in table


def test_without_a_way_the_best_of_the_three_is_written(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["even", str(trained), "--out", str(tmp_path / "evened"), "--device", "cpu"]) == 0
    said = capsys.readouterr()
    assert "which its training held out" in said.err and str(tmp_path / "evened") in said.out
    config = config_of(tmp_path / "evened")
    tried = config["evened"]["tried"]  # pyright: ignore
    score = {by: one["average"] + one["worst"] for by, one in tried.items()}
    assert [*score] == ["norm", "half", "bias"] and config["method"] == f"even_{max(score, key=lambda by: score[by])}"


def test_the_run_is_evaluated_reported_exported_and_made_again(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "evened"
    for _ in range(2):  # the same command again changes nothing
        assert run(["even", str(trained), "--by", "norm", "--out", str(out), "--device", "cpu"]) == 0
    words = ["--attacks", "clean,pgd20", "--limit", "60", "--device", "cpu", "--eps", "trained"]
    for folder in (trained, out):
        assert run(["evaluate", str(folder), *words]) == 0
    assert run(["report", str(trained), str(out), "--out", str(tmp_path / "page")]) == 0
    assert "evened by norm" in (tmp_path / "page/report.html").read_text()
    assert "none: not trained" in (tmp_path / "page/report.md").read_text()
    assert run(["compare", str(trained), str(out)]) == 0
    assert run(["export", str(out), "--out", str(tmp_path / "card")]) == 0
    card = (tmp_path / "card/README.md").read_text()
    assert (
        "by `retemper even --by norm`.\nNothing was trained; 10 training images" in card
        and "trained against" not in card
    )
    assert train_again(RunFolder(out).read_config(), out) == f"retemper even {trained} --by norm --out {out}"
    capsys.readouterr()
    assert run(["even", str(trained), "--by", "half", "--out", str(out), "--device", "cpu"]) == 2
    assert "holds another run (method: even_norm, now even_half)" in capsys.readouterr().err
    assert run(["train", "sat:digits_student", "--out", str(out), *SHORT]) == 2


def test_the_fine_tune_is_a_run_that_begins_with_the_network(trained: Path, tmp_path: Path) -> None:
    out, table = even(request(trained, by="plain", out=tmp_path / "tuned"))
    config = config_of(out)
    own, theirs = (RunFolder(folder).read_config()["recipe"] for folder in (out, trained))
    assert config["method"] == "csr_control" and config["setting"] == "digits" and config["seed"] == 4
    assert config["start"]["sha256"] == file_digest(trained / "best.safetensors")  # pyright: ignore
    assert own["epochs"] == 2 and own["lr"] == 0.001 and own["attack_steps"] == 10
    for name in ("eps", "attack_step", "padding", "holdout_per_class", "student", "dataset"):
        assert own[name] == theirs[name], name
    assert "plain" in table.splitlines()[1] and len((out / "metrics.jsonl").read_text().splitlines()) == 2


NET = """
from pathlib import Path
from retemper.engine import create_model, load_checkpoint

def build(num_classes, channels):
    network = create_model("tiny_resnet", num_classes, channels=channels)
    load_checkpoint(Path(__file__).with_name("copied.safetensors"), network)
    return network
"""


def test_networks_from_elsewhere(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A bare checkpoint, and a function of the user's own that has its weights in it: both may know what chooses."""
    copied, net, bare = tmp_path / "copied.safetensors", tmp_path / "net.py", tmp_path / "bare.pt"
    copied.write_bytes((trained / "best.safetensors").read_bytes())
    net.write_text(NET)
    torch.save(load_file(copied), bare)
    assert run(["even", str(bare), "--device", "cpu"]) == 2
    assert f"retemper even {bare} --model tiny_resnet" in capsys.readouterr().err
    known = ["--holdout", "20", "--eps", "0.03", "--device", "cpu"]
    weights = evened_rows(load_file(copied)["linear.weight"], 1.0)
    for target, told in ((copied, ()), (f"{net}:build", ("--dataset", "digits"))):
        out = tmp_path / f"of-{Path(str(target)).stem}"
        assert run(["even", str(target), "--by", "norm", "--out", str(out), *known, *told]) == 0
        said = capsys.readouterr().err
        assert "note: 20 training images" in said and "may have learned from them" in said
        assert config_of(out)["evened"]["held_out_of_its_training"] is False  # pyright: ignore
        torch.testing.assert_close(load_file(out / "best.safetensors")["linear.weight"], weights)
        assert run(["evaluate", str(out), "--attacks", "clean", "--limit", "20", "--device", "cpu"]) == 0
    assert run(["even", str(trained), "--by", "norm", "--holdout", "20", "--out", str(tmp_path / "x")]) == 2
    assert "the run held out 10 images" in capsys.readouterr().err


def test_a_class_that_falls_to_the_attack_writes_nothing(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    for by in ("bias", "csr"):
        assert run(["even", str(trained), "--by", by, "--eps", "0.9", "--out", str(out), "--device", "cpu"]) == 3
        assert "never learned" in capsys.readouterr().err and not out.exists()


def test_a_runs_newest_weights(trained: Path, tmp_path: Path) -> None:
    out, _ = even(request(trained, by="norm", weights="last", out=tmp_path / "evened"))
    assert config_of(out)["start"]["sha256"] == file_digest(trained / "last.safetensors")  # pyright: ignore
    assert train_again(RunFolder(out).read_config(), out).endswith("--weights last")
    with pytest.raises(UsageError, match="--weights last chooses among a run's"):
        even(request(trained / "last.safetensors", by="norm", weights="last"))


def test_what_robustbench_alone_can_build_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(["even", "robustbench:Some2020Net@cifar10/Linf", "--by", "norm", "--out", str(out)]) == 2
    assert "net.py:build" in capsys.readouterr().err and not out.exists()
