"""Measured batch-norm statistics: of which images, and that nothing else moves."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from retemper.engine import Objective, Recipe, State, Targets, create_model, cross_entropy_objective
from retemper.engine.batch_statistics import with_measured_statistics
from retemper.engine.evaluation.evaluate import as_float
from retemper.engine.step import attack, observe
from retemper.loaders import load_split, split_of_arrays


@dataclass(frozen=True, kw_only=True)
class Plain(Recipe):
    dataset: str = "digits"
    student: str = "tiny_resnet"
    eps: float = 0.2
    attack_step: float = 0.1
    attack_steps: int = 2
    batch_size: int = 16
    precision: str = "fp32"  # pyright: ignore[reportIncompatibleVariableOverride]

    def objective(self, targets: Targets) -> Objective:
        return cross_entropy_objective(targets.label_B)

    def loss(self, logits: Mapping[str, Tensor], targets: Targets) -> Tensor:
        return F.cross_entropy(logits["adv"], targets.label_B)


def made(recipe: Recipe) -> State:
    torch.manual_seed(0)
    return State.begin(recipe, create_model("tiny_resnet", 10), None, 10, torch.device("cpu"))


def images(count: int):
    split = load_split("digits", "train")
    return split_of_arrays("digits", "train", split.read()[:count], split.labels[:count], split.classes, "x")


def test_they_are_the_means_over_attacked_and_clean_batches() -> None:
    recipe, split = Plain(fold=False), images(40)  # two batches, and a rest that is left out
    state = made(recipe)
    before = {name: value.clone() for name, value in state.student.state_dict().items()}
    measured = with_measured_statistics(state, recipe, split)
    seen: list[Tensor] = []
    state.student.eval()
    stem = next(module for module in state.student.modules() if isinstance(module, nn.Conv2d))
    for rows in torch.arange(32).split(16):
        label, clean = torch.from_numpy(split.labels)[rows], as_float(split, rows, torch.device("cpu"))
        adv = attack(state, recipe, state.student, clean, observe(state, recipe, state.student, clean, label, None))
        assert not torch.equal(adv, clean)
        seen += [stem(adv), stem(clean)]
        state.noise_seed += 1
    norm = next(module for module in measured.modules() if isinstance(module, nn.BatchNorm2d))
    assert norm.running_mean is not None and norm.running_var is not None
    torch.testing.assert_close(norm.running_mean, torch.stack([one.mean((0, 2, 3)) for one in seen]).mean(0))
    variances = torch.stack([one.transpose(0, 1).flatten(1).var(1) for one in seen])
    torch.testing.assert_close(norm.running_var, variances.mean(0))
    assert norm.momentum == 0.1 and not measured.training
    for name, value in state.student.state_dict().items():
        assert torch.equal(value, before[name]), name  # the student's own were not touched
    for name, value in measured.named_parameters():
        assert torch.equal(value, before[name]), name


def test_a_run_keeps_them_and_trains_as_without(train: Callable[..., int], tmp_path: Path) -> None:
    for name, count in (("plain", 0), ("measured", 256)):
        assert train("rslad:digits", tmp_path / name, "--statistics-images", str(count)) == 0
    plain, measured = (load_file(tmp_path / name / "last.safetensors") for name in ("plain", "measured"))
    for name in plain:
        assert torch.equal(plain[name], measured[name]) != ("running_" in name or "num_batches" in name), name
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("plain", "measured")
    ]
    assert losses[0] == losses[1]


def test_fewer_images_than_a_batch_are_one_batch_and_the_folded_twin_is_as_good() -> None:
    split = images(10)
    one, folded = (with_measured_statistics(made(Plain(fold=fold)), Plain(fold=fold), split) for fold in (False, True))
    for (name, value), other in zip(one.named_buffers(), folded.buffers(), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-3, atol=1e-3, msg=name)
    assert any(not torch.equal(value, torch.zeros_like(value)) for value in one.buffers())
