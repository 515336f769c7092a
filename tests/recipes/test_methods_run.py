"""Every method on digits, through the command line: it trains, keeps its class state, and no resume changes a bit."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from retemper.cli import run
from retemper.engine import Recipe, State, create_model, save_weights, train_step
from retemper.engine.catalogue import find_setting, method_module, methods, override
from retemper.engine.models import channels_last
from retemper.engine.run.saving import Saver
from retemper.recipes.igdm import Igdm

SHORT = "--epochs 2 --attack-steps 2 --holdout-per-class 5 --select-steps 2 --batch-size 256 --device cpu".split()
NAMES = [
    f"{method}:{name}"
    for method in methods()
    for name, setting in method_module(method).SETTINGS.items()
    if setting.recipe.data.dataset == "digits"
]
VARIANTS = [(name, variant) for name in NAMES for variant in find_setting(name)[2].recipe.method.variants]
WITH_IGDM = [name for name in NAMES if isinstance(find_setting(name)[2].recipe.method, Igdm)]
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "unique", "equal"}


def given_networks(recipe: Recipe, teacher: Path, start: Path) -> list[str]:
    """The options that keep a run from training its teachers and its start first."""
    words = []
    if recipe.networks.teacher_model:
        words += ["--teacher", str(teacher)]
    if recipe.networks.clean_teacher_model:
        words += ["--clean-teacher", str(teacher)]
    if recipe.networks.start_recipe:
        torch.manual_seed(1)
        save_weights(start, create_model(recipe.networks.student, 10))
        words += ["--start", str(start)]
    return words


def lines(out: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl without the fields that depend on the clock."""
    read = [json.loads(text) for text in (out / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: line[key] for key in line.keys() - {"seconds", "images_per_second", "peak_memory_mib"}} for line in read
    ]


@pytest.mark.parametrize(
    ("name", "options"),
    [*((name, {}) for name in NAMES), ("fair_iad:digits", {"igdm": "2"}), ("label_trust:digits", {"igdm": "2"})],
    ids=str,
)
def test_trains_and_goes_on_where_it_was(
    name: str, options: dict[str, str], teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = override(find_setting(name)[2].recipe, options)
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    save = Saver.save_epoch

    def save_and_copy(self: Saver, epoch: int, line: dict[str, Any]) -> None:
        """Save a run, and copy its folder as a kill after the first epoch would leave it."""
        save(self, epoch, line)
        if epoch == 1:
            self.settle()
            shutil.copytree(whole, resumed)

    monkeypatch.setattr(Saver, "save_epoch", save_and_copy)
    words = ["train", name, *SHORT, *(f"--{key}={value}" for key, value in options.items())]
    words += given_networks(recipe, teacher, tmp_path / "start.safetensors")
    assert run([*words, "--out", str(whole)]) == 0
    assert len(lines(resumed)) == 1
    assert run([*words, "--out", str(resumed)]) == 0

    saved, again = (torch.load(out / "last.state", weights_only=True) for out in (whole, resumed))
    first = recipe.method.class_state(10, recipe)
    assert saved["class_state"].keys() == again["class_state"].keys() == first.keys()
    for state, value in first.items():
        assert saved["class_state"][state].dtype is torch.float32
        assert saved["class_state"][state].shape == value.shape and saved["class_state"][state].isfinite().all()
        assert torch.equal(saved["class_state"][state], again["class_state"][state])
        assert all(torch.tensor(line[state]).shape == value.shape for line in lines(whole))
    assert all(line["loss"] == line["loss"] for line in lines(whole))
    assert lines(whole) == lines(resumed)
    weights, others = (load_file(out / "last.safetensors") for out in (whole, resumed))
    assert all(torch.equal(weights[key], others[key]) for key in weights)


@pytest.mark.usefixtures("values_unseen")
@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {"variant": variant}) for name, variant in VARIANTS),
        *((name, {"igdm": "2"}) for name in WITH_IGDM),
    ],
    ids=str,
)
def test_a_step_never_waits_for_the_device_and_keeps_its_state_in_place(name: str, options: dict[str, str]) -> None:
    """What a step must do to be captured in a CUDA graph; on a CPU, where every call of an operator can be seen."""
    torch.manual_seed(0)
    recipe = override(find_setting(name)[2].recipe, options).replace(attack_steps=2, precision="fp32")
    cpu = torch.device("cpu")
    networks = [recipe.networks.teacher_model, recipe.networks.clean_teacher_model]
    teacher, clean_teacher = (
        channels_last(create_model(model, 10), cpu).eval().requires_grad_(False) if model else None
        for model in networks
    )
    student = create_model(recipe.networks.student, 10)
    peer = create_model(recipe.networks.student, 10) if recipe.method.trains_peer else None
    state = State(recipe, student, teacher, 10, cpu, clean_teacher, peer=peer)
    label = torch.arange(20) % 10
    clean = torch.rand(20, 1, 8, 8).to(memory_format=torch.channels_last)
    train_step(state, recipe, clean, label)  # the first one may allocate
    places = {key: value.data_ptr() for key, value in state.class_state.items()}
    called = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.add(func.overloadpacket.__name__)
            indices = args[1] if func.overloadpacket.__name__ == "index" else ()
            assert not any(i is not None and i.dtype is torch.bool for i in indices), "a boolean index waits"
            return func(*args, **(kwargs or {}))

    with Watch():
        train_step(state, recipe, clean, label)
    assert "convolution" in called and not WAITS & called, WAITS & called
    assert {key: value.data_ptr() for key, value in state.class_state.items()} == places
