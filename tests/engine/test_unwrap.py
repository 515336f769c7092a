"""Released files as the field has them: nested, prefixed, averaged, normalising; one network is found, or none."""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from retemper.engine.checkpoints.header import Facts, load_network
from retemper.engine.checkpoints.weights import CheckpointError, load_checkpoint, load_state
from retemper.engine.models import create_model
from retemper.engine.speed.fold import Folded
from retemper.errors import UsageError

State = dict[str, Any]
CPU = torch.device("cpu")
FACTS = Facts(model="tiny_resnet", num_classes=10, channels=3)
MEAN, STD = torch.tensor([0.49, 0.48, 0.44]), torch.tensor([0.25, 0.24, 0.26])
IMAGE = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return create_model("tiny_resnet", 10, channels=3).eval()


LAST, OTHER = network(1), network(2)
A, B = LAST.state_dict(), OTHER.state_dict()


def under(prefix: str, state: State) -> State:
    return {prefix + name: value for name, value in state.items()}


def averaged(model: nn.Module) -> State:
    return AveragedModel(model).state_dict()


def taken(path: Path, entry: str = "") -> nn.Module:
    model = network(3)
    load_checkpoint(f"{path}{entry and ':'}{entry}", model)
    return model


def same(model: nn.Module, state: State) -> bool:
    return all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


ONE: dict[str, tuple[State, str]] = {  # what a file holds, and the place that is named
    **{key: ({key: A, "epoch": 3}, key) for key in ("ema", "model_ema", "checkpoint", "student", "weights", "net")},
    **{f"{prefix}.": (under(f"{prefix}.", A), prefix) for prefix in ("model", "net", "student", "backbone", "0")},
    "prefixes": (under("module.model._orig_mod.", A), "model"),
    "nested and prefixed": ({"checkpoint": {"student": {"state_dict": under("module.net.", A)}}}, "state_dict.net"),
    "average alone": (averaged(LAST), "averaged"),
    "average of compiled": ({"swa": under("module._orig_mod.", A) | {"n_averaged": torch.tensor(3)}}, "swa, averaged"),
    "lightning": ({"state_dict": under("model.", A), "optimizer_states": [{"state": {}}], "hparams": {}}, "model"),
    "optimizer": (
        {"net": A, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}, 1: {}}, "param_groups": []}},
        "net",
    ),
    "timm": (
        {"state_dict": A, "args": argparse.Namespace(lr=0.1, out=Path("x")), "metric": np.float64(9)},
        "state_dict",
    ),
    "numpy": ({"state_dict": A, "best": np.float32(0.5), "curve": np.arange(3)}, "state_dict"),
    "twice": ({"model": A, "state_dict": {name: value.clone() for name, value in A.items()}}, "model"),
    "of another size": ({"student": A, "teacher": create_model("tiny_resnet_wide", 10).state_dict()}, "student"),
    "numbers of any size": (
        {"model": A, "mean": [10**400], "std": [float("nan")], "lr": [0.1] * 3, "seen": ()},
        "model",
    ),
    "mean of results": ({"model": A, "mean": torch.tensor(0.43), "std": torch.tensor(0.02)}, "model"),
    "lists within": ({"model": A, "loss_log": [torch.ones(1)], "best_acc": torch.tensor(0.9)}, "model"),
}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("form", ONE)
def test_the_one_network_in_a_file_is_found_and_named(
    form: str, zipped: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content, place = ONE[form]
    torch.save(content, tmp_path / "w.pt", _use_new_zipfile_serialization=zipped)
    assert same(taken(tmp_path / "w.pt"), A)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{tmp_path / 'w.pt'}: takes ") and place in line


def test_of_a_plain_file_nothing_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for state in (A, under("module.", A), under("_orig_mod.module.", A)):
        torch.save(state, tmp_path / "w.pt")
        assert same(taken(tmp_path / "w.pt"), A)
    assert capsys.readouterr().err == ""


AVERAGES: dict[str, State] = {  # A is the average
    "timm": {"state_dict": B, "state_dict_ema": A},
    "before": {"ema": A, "model": B},
    "AveragedModel": {"model": B, "swa_model": averaged(LAST)},
    "yolo": {"model": {"state_dict": B}, "model_ema": {"module": under("module.", A)}},
    "flat": under("model.", B) | under("ema_model.module.", A) | {"ema_model.n_averaged": torch.tensor(3)},
    "swa": {"net": B, "SWA": A, "epoch": 9},
}


@pytest.mark.parametrize("form", AVERAGES)
def test_the_averaged_weights_are_taken_and_the_user_may_choose(
    form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(AVERAGES[form], tmp_path / "w.pt")
    assert same(taken(tmp_path / "w.pt"), A)
    said = capsys.readouterr().err
    assert "averaged weights" in said
    _, other = said.rsplit(":", 1)
    assert same(taken(tmp_path / "w.pt", other.strip().rstrip(")")), B)


CHOICES: dict[str, State] = {
    "student and teacher": {"student": A, "teacher": B},
    "model and state_dict": {"model": A, "state_dict": B},
    "two averages": {"ema": A, "swa": B},
    "flat": under("student.", A) | under("teacher.", B),
}


def test_an_average_of_the_parameters_alone_is_told_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parameters = {name: tensor for name, tensor in A.items() if "running" not in name and "num_batches" not in name}
    torch.save({"model": B, "ema": parameters}, tmp_path / "both.pt")
    load_checkpoint(tmp_path / "both.pt", model := network(9))
    assert all(torch.equal(tensor, B[name]) for name, tensor in model.state_dict().items())
    said = capsys.readouterr().err
    assert "leaves the averaged weights ema alone, which lack" in said and "running_mean" in said


@pytest.mark.parametrize("form", CHOICES)
def test_a_choice_is_the_users(form: str, tmp_path: Path) -> None:
    torch.save(CHOICES[form], path := tmp_path / "w.pt")
    names = list(CHOICES[form]) if form != "flat" else ["student", "teacher"]
    with pytest.raises(
        CheckpointError, match=f"holds {names[0]}, {names[1]}: name the one you mean, as in .*:{names[0]}$"
    ):
        taken(path)
    assert same(taken(path, names[0]), A) and same(taken(path, names[1]), B)
    with pytest.raises(CheckpointError, match=f"no 'best' in it, but {names[0]}"):
        taken(path, "best")


def test_what_stands_beside_the_weights_is_not_dropped_in_silence(tmp_path: Path) -> None:
    torch.save(under("encoder.", A) | {"head.weight": torch.ones(2)}, path := tmp_path / "w.pt")
    with pytest.raises(
        CheckpointError, match=r"beside the weights encoder\.\* stand others \(head.weight\).*:encoder$"
    ):
        taken(path)
    assert same(taken(path, "encoder"), A)
    for more in ({"model.head.weight": torch.ones(2)}, {"model.running_mean": torch.ones(3)}):
        torch.save(under("model.", A) | more, path)
        with pytest.raises(CheckpointError, match="1 unexpected"):
            taken(path)


def test_two_tensors_of_one_name_are_refused(tmp_path: Path) -> None:
    """Half of a network stands under `module.` too, with other values: which is it?"""
    torch.save(A | {"module.conv1.weight": B["conv1.weight"]}, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=r"two tensors are called conv1\.weight"):
        taken(tmp_path / "w.pt")
    half = {f"module.{name}" if "layer" in name else name: value for name, value in A.items()}
    torch.save(half, tmp_path / "w.pt")  # of a network that was wrapped in part
    assert same(taken(tmp_path / "w.pt"), A)


def pixels(mean: str, std: str, state: State = A, values: tuple[Tensor, Tensor] = (MEAN, STD)) -> State:
    return state | {mean: values[0].view(1, 3, 1, 1), std: values[1]}


NORMALISING: dict[str, State] = {
    "buffers": pixels("mean", "std"),
    "sequential": pixels("normalize.mean", "normalize.std", under("model.", A)),
    "numbered": pixels("0.mean", "0.std", under("1.", A)),
    "sigma": pixels("mu", "sigma"),
    "wrapped": {"state_dict": pixels("module.norm.means", "module.norm.sds", under("module.net.", A))},
    "robustness": {
        "model": pixels("module.normalizer.new_mean", "module.normalizer.new_std", under("module.model.", A))
        | pixels("module.attacker.normalize.new_mean", "module.attacker.normalize.new_std", {})
        | under("module.attacker.model.", A)
    },
    "beside": {"state_dict": A, "mean": MEAN, "std": STD},
    "lists": {"state_dict": A, "mean": MEAN.tolist(), "std": tuple(STD.tolist())},
}


@pytest.mark.parametrize("form", NORMALISING)
def test_the_network_gets_the_mean_and_deviation_of_its_pixels(
    form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(NORMALISING[form], path := tmp_path / "w.pt")
    expected = LAST((IMAGE - MEAN.view(3, 1, 1)) / STD.view(3, 1, 1))
    model = load_network(path, FACTS, CPU)
    torch.testing.assert_close(model(IMAGE), expected)
    assert "normalises its images, (image - [0.49, 0.48, 0.44]) / [0.25, 0.24, 0.26]" in capsys.readouterr().err
    assert not any(weight.requires_grad for weight in model.parameters()) and not model.training
    with pytest.raises(CheckpointError, match="which the model does not"):
        taken(path)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)], ids=str)
def test_a_normalising_network_is_folded_as_others_are(dtype: torch.dtype, tolerance: float, tmp_path: Path) -> None:
    torch.save(NORMALISING["buffers"], tmp_path / "w.pt")
    model = load_network(tmp_path / "w.pt", FACTS, CPU)
    expected = model(IMAGE)
    folded = Folded(model, dtype)(IMAGE.to(dtype)).float()
    assert (folded - expected).abs().max() <= tolerance * expected.abs().max()


def test_pixels_that_are_not_normalised_need_nothing(tmp_path: Path) -> None:
    plain = (torch.zeros(3), torch.ones(3))
    torch.save(pixels("mean", "std", values=plain), tmp_path / "w.pt")
    assert same(taken(tmp_path / "w.pt"), A)
    assert same(load_network(tmp_path / "w.pt", FACTS, CPU), A)


@pytest.mark.parametrize(
    "content, said",
    [
        (pixels("mean", "std", values=(255 * MEAN, 255 * STD)), "not for pixels in"),
        (pixels("mean", "std", values=(MEAN, 0 * STD)), "not for pixels in"),
        (pixels("mean", "std", pixels("norm.mean", "norm.std", values=(STD, MEAN))), "in several ways"),
        (A | {"mean": MEAN}, r"1 unexpected \(mean\)"),
        (A | {"mean": MEAN, "std": torch.ones(7)}, r"2 unexpected \(mean, std\)"),
    ],
)
def test_a_mean_that_cannot_be_right_is_refused(content: State, said: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=said):
        load_network(tmp_path / "w.pt", FACTS, CPU)


def test_a_state_dict_at_hand_is_unwrapped_as_a_file_is() -> None:
    model = network(3)
    load_state("it", under("model.", A), model)
    assert same(model, A)
    with pytest.raises(CheckpointError, match="it: holds student, teacher"):
        load_state("it", CHOICES["flat"], model)


def test_no_class_of_a_file_is_made(tmp_path: Path) -> None:
    """What stands in for plain facts takes their arguments and their state, and holds nothing."""
    facts = argparse.Namespace(deep=argparse.Namespace(path=tmp_path), number=np.int64(3))
    torch.save({"model": A, "args": facts, "scores": np.ones(3), "object": np.array([None])}, tmp_path / "w.pt")
    assert same(taken(tmp_path / "w.pt"), A)
    torch.save(A | {"lr": np.float64(0.1)}, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match="not tensors: lr"):
        taken(tmp_path / "w.pt")
    torch.save(facts, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match="not a state_dict"):
        taken(tmp_path / "w.pt")


def test_the_statistics_of_batch_norm_are_never_left_out(tmp_path: Path) -> None:
    torch.save(under("model.", {name: value for name, value in A.items() if "running" not in name}), tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=r"missing \(bn1.running_mean"):
        taken(tmp_path / "w.pt")
    with pytest.raises(UsageError):
        load_network(tmp_path / "w.pt", Facts(model="tiny_resnet"), CPU)
