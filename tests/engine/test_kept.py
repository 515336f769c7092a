"""What FGSM-PGI keeps of each image: it follows the formula, the crop and the flip, and a resumed run has it."""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from retemper.cli import run
from retemper.engine import Recipe, State, create_model, train_step
from retemper.engine.catalogue import find_setting
from retemper.engine.kept import SCALE, Kept
from retemper.engine.maximise import attacked_images
from retemper.engine.run.run_folder import RunFolder
from retemper.engine.run.state_file import unpack
from retemper.engine.step import observe
from retemper.kernels import identity_view, num_views

EPS, PADDING, SIZE = 0.1, 2, 8
IMAGES = 12


def kept(device: torch.device, file: Path | None = None, shape: tuple[int, int, int] = (SIZE, SIZE, 1)) -> Kept:
    return Kept(IMAGES, shape, PADDING, eps=EPS, reset=3, rows=6, device=device, file=file)


def made(method: str, device: torch.device, **options: Any) -> tuple[State, Recipe]:
    torch.manual_seed(0)
    recipe = find_setting(f"{method}:digits")[2].recipe
    recipe = recipe.replace(eps=EPS, padding=PADDING, fold=False, attack_bn="eval", attack="pgi", **options)
    teacher = create_model("tiny_resnet", 10).double().to(device).eval().requires_grad_(False)
    state = State(recipe, create_model("tiny_resnet", 10).double(), teacher if method == "rslad" else None, 10, device)
    state.prior = kept(device)
    state.start_epoch(recipe, 1, 5)
    state.prior.places["momentum"].uniform_(-SCALE / 64, SCALE / 64)
    return state, recipe


def batch(device: torch.device, size: int = 6) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    gen = torch.Generator().manual_seed(1)
    clean = torch.rand(size, 1, SIZE, SIZE, generator=gen, dtype=torch.float64)
    view = torch.randint(num_views(PADDING), (size,), generator=gen)
    view[:2] = torch.tensor([identity_view(PADDING), 2 * (2 * PADDING + 1) ** 2 - 1])  # the last corner, mirrored
    index = torch.randperm(IMAGES, generator=gen)[:size]
    return clean.to(device), (torch.arange(size) % 10).to(device), index.to(device), view.to(device)


def seen(place: Tensor, index: Tensor, view: Tensor) -> Tensor:
    """Return the pixels of padded frames that are seen, (B, C, H, W), written out image by image."""
    side, parts = 2 * PADDING + 1, []
    for number, one in zip(index.tolist(), view.tolist(), strict=True):
        down, along, mirrored = one // 2 // side, one // 2 % side, one % 2
        crop = place[number, down : down + SIZE, along : along + SIZE].permute(2, 0, 1)
        parts.append(crop.flip(2) if mirrored else crop)
    return torch.stack(parts)


@pytest.mark.parametrize("method", ["sat", "rslad"])
def test_a_step_is_the_papers_formula(method: str, device: torch.device) -> None:
    state, recipe = made(method, device)
    assert state.prior is not None
    clean, label, index, view = batch(device)
    before = {name: place.clone() for name, place in state.prior.places.items()}
    perturbation, momentum = (seen(before[name], index, view).double() for name in ("perturbation", "momentum"))
    assert perturbation.abs().sub(EPS).abs().max() < EPS / 2048

    student, teacher = create_model("tiny_resnet", 10).double().to(device), state.teacher
    student.load_state_dict(state.student.state_dict())
    wanted = None if teacher is None else teacher(clean).log_softmax(1).detach()

    def raised(logits: Tensor) -> Tensor:
        if wanted is None:
            return nn.functional.cross_entropy(logits, label, reduction="sum")
        return (wanted.exp() * (wanted - logits.log_softmax(1))).sum()

    start = (clean + perturbation).clamp(0, 1).requires_grad_()
    (grad,) = torch.autograd.grad(raised(student.eval()(start)), start)
    start = start.detach()

    def stepped(along: Tensor) -> Tensor:
        moved = start + EPS * along.sign()
        return torch.min(torch.max(moved, clean - EPS), clean + EPS).clamp(0, 1)

    adv = stepped(grad)
    momentum = 0.3 * momentum / SCALE + grad / grad.abs().sum((1, 2, 3), keepdim=True)
    loss = train_step(state, recipe, clean, label, None, index, view)
    found = seen(state.prior.places["perturbation"], index, view).double()
    torch.testing.assert_close(found, stepped(momentum) - clean, rtol=0, atol=EPS / 2048)
    found = seen(state.prior.places["momentum"], index, view).double() / SCALE
    torch.testing.assert_close(found, momentum, rtol=2**-11, atol=1e-8 / SCALE)

    logits = {"adv": adv, "clean": clean, "start": start}
    logits = {name: student.train()(logits[name]) for name in (*state.forwards.before, "start")}
    own = nn.functional.cross_entropy(logits["adv"], label)
    if wanted is not None:  # RSLAD: 5/6 of the attacked images' KL and 1/6 of the clean ones'
        kl = {name: (wanted.exp() * (wanted - logits[name].log_softmax(1))).sum(1).mean() for name in ("adv", "clean")}
        own = 5 / 6 * kl["adv"] + 1 / 6 * kl["clean"]
    expected = own + 10 * (logits["adv"] - logits["start"]).square().mean()
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-9)
    optim = recipe.optim
    expected.backward()
    torch.optim.SGD(student.parameters(), optim.lr, optim.momentum, weight_decay=optim.weight_decay).step()
    for name, value in student.state_dict().items():  # both sides of the distance have a gradient
        torch.testing.assert_close(state.student.state_dict()[name], value, rtol=1e-8, atol=1e-10)


def note(given: list[int], _: nn.Module, images: tuple[Tensor]) -> None:
    given.append(len(images[0]))


def test_without_the_weight_there_is_no_further_forward(device: torch.device) -> None:
    clean, label, index, view = batch(device)
    for weight, forwards in ((10.0, 4), (0.0, 3)):
        state, recipe = made("rslad", device, pgi_weight=weight)
        given: list[int] = []
        state.student.register_forward_pre_hook(partial(note, given))
        train_step(state, recipe, clean, label, None, index, view)
        assert sum(given) == forwards * len(clean)


def test_a_process_without_rows_takes_the_forwards_of_the_others(device: torch.device) -> None:
    """Or it would ask by itself which logits the loss has a gradient at, where a loss may add up over all of them."""
    state, recipe = made("rslad", device)
    clean, label, *seen = batch(device)
    targets = observe(state, recipe, state.student, clean, label, None)
    with_rows = attacked_images(state, recipe, state.student, clean, targets, (seen[0], seen[1]))
    assert attacked_images(state, recipe, state.student, clean, targets).keys() == with_rows.keys() == {"adv", "start"}


def test_a_step_never_waits_for_the_device(device: torch.device) -> None:
    state, recipe = made("rslad", device)
    clean, label, index, view = batch(device)
    called: set[str] = set()

    class Listener(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            called.add(func.__name__.split(".")[0])
            return func(*args, **(kwargs or {}))

    train_step(state, recipe, clean, label, None, index, view)
    with Listener():
        train_step(state, recipe, clean, label, None, index, view)
    assert not called & {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "unique", "equal"}
    assert "index_put_" in called


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("on_disk", [False, True])
def test_two_views_agree_on_the_pixels_of_both(
    channels: int, on_disk: bool, device: torch.device, tmp_path: Path
) -> None:
    prior = kept(device, tmp_path / "kept" if on_disk else None, (SIZE, SIZE, channels))
    index = torch.tensor([3, 0, 7, 11], device=device)
    one, two = (torch.tensor(ids, device=device) for ids in ([0, 13, 24, 49], [37, 13, 25, 6]))
    values = (torch.rand(2, 4, channels, SIZE, SIZE, device=device) / 8 + 0.01).half().float()
    prior.begin_step(index.cpu().numpy())
    prior.write(index, one, *values)
    prior.end_step(index.cpu().numpy())
    prior.begin_step(index.cpu().numpy() if not on_disk else np.array([1]))  # another batch comes between
    prior.end_step(np.array([1]))
    prior._store()
    prior.begin_step(index.cpu().numpy())
    like = torch.zeros(4, channels, SIZE, SIZE, device=device)
    found, moment = prior.read(like, index, one)
    assert torch.equal(found, values[0]) and torch.allclose(moment, values[1], rtol=2**-10)
    assert found.stride() == like.stride()

    frame = torch.full((IMAGES, SIZE + 2 * PADDING, SIZE + 2 * PADDING, channels), -1.0, device=device)
    side = 2 * PADDING + 1
    for row in range(4):  # where each pixel lies, image by image
        down, along, mirrored = one[row] // 2 // side, one[row] // 2 % side, one[row] % 2
        image = values[0, row].flip(2) if mirrored else values[0, row]
        frame[index[row], down : down + SIZE, along : along + SIZE] = image.permute(1, 2, 0)
    expected = seen(frame, index, two)
    assert torch.equal(prior.read(like, index, two)[0], expected.clamp(min=0))  # the others are as they were
    assert (expected >= 0).float().mean() > 0.5 and (expected < 0).any()
    others = [k for k in range(IMAGES) if k not in index.tolist()]
    assert not prior.places["perturbation"][others].any()


def test_everything_begins_anew_after_so_many_epochs(device: torch.device, tmp_path: Path) -> None:
    places = []
    for file in (None, tmp_path / "kept"):
        prior = kept(device, file)
        found = []
        for epoch in range(1, 5):
            prior.start_epoch(epoch, seed=epoch)
            found.append(prior.places["perturbation"].float().cpu())
            prior.places["momentum"].fill_(1)
        assert torch.equal(found[0], found[1]) and torch.equal(found[1], found[2])
        assert found[0].abs().sub(EPS).abs().max() < EPS / 2048 and abs(found[0].sign().mean()) < 0.1
        assert 0.3 < (found[3] != found[0]).float().mean() < 0.7
        prior.start_epoch(7, seed=7)
        assert not prior.places["momentum"].any()
        places.append(found[3])
    assert torch.equal(*places) and not list(tmp_path.iterdir())


def test_a_step_asks_for_the_images_places(device: torch.device) -> None:
    state, recipe = made("sat", device)
    clean, label, index, view = batch(device)
    for given in ((), (index,), (index[:3], view)):
        with pytest.raises(ValueError, match=r"index, view: the attack pgi asks for both, \(6,\) int64"):
            train_step(state, recipe, clean, label, None, *given)


COMMAND = (
    "train sat:digits_student --attack pgi --guard off --device cpu --epochs 3 --pgi-reset 2 --holdout-per-class 5 "
    "--batch-size 256 --select-every 3 --select-steps 2 --padding 1 --flip true"
).split()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    assert run([*COMMAND, "--out", str(out)]) == 0
    return out


def require_same(one: Path, two: Path) -> None:
    for first, second in (
        [load_file(folder / "last.safetensors") for folder in (one, two)],
        [unpack(folder / "prior-3-0.state") for folder in (one, two)],
    ):
        assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("where", ["device", "disk"])
def test_a_run_that_is_cut_within_an_epoch_changes_no_bit(where: str, whole: Path, tmp_path: Path) -> None:
    words = [*COMMAND, "--kept", where, "--out", str(tmp_path / "run")]
    for most in (3, 9, 14):
        assert run([*words, f"--max-steps={most}"]) == 0
        state = unpack(tmp_path / "run" / "last.state")
        assert state["step"] > 0 and (tmp_path / "run" / f"prior-{state['epoch']}-{state['step']}.state").exists()
    assert run(words) == 0
    require_same(whole, tmp_path / "run")
    assert {path.name for path in (tmp_path / "run").glob("*kept*")} == set()
    assert len([*(tmp_path / "run").glob("prior-*")]) == 2  # of the newest state and the one before


def test_a_kill_between_the_two_files_loses_nothing(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    words = [*COMMAND, "--out", str(out)]
    assert run([*words, "--max-steps=9"]) == 0
    (out / "prior-2-0.state").write_bytes(b"half of what the next save was to write")
    shutil.copytree(out, tmp_path / "gone")
    assert run(words) == 0
    require_same(whole, out)
    # where the file of the newest state is gone or damaged, the state before it is gone on from
    out = tmp_path / "gone"
    state = unpack(out / "last.state")
    (out / f"prior-{state['epoch']}-{state['step']}.state").unlink()
    assert run([*COMMAND, "--out", str(out)]) == 0
    assert "which is gone: going on from the one before it" in capsys.readouterr().err
    require_same(whole, out)


def test_no_file_is_left_that_no_state_asks_for(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for epoch, step in ((0, 3), (1, 0), (1, 2)):
        state = {name: {} for name in ("student", "optimizer", "scaler", "class_state", "generators")}
        best = {"score": 0.0, "epoch": 0}
        prior = {"perturbation": torch.ones(2) * step}
        folder.save_state(state | {"epoch": epoch, "step": step, "best": best, "prior": prior})
    assert {path.name for path in tmp_path.glob("prior-*")} == {"prior-1-0.state", "prior-1-2.state"}
    loaded = folder.load_state()
    assert loaded is not None and torch.equal(loaded["prior"]["perturbation"], torch.full((2,), 2.0))


def test_a_report_and_the_config_name_the_attack(whole: Path) -> None:
    recipe = json.loads((whole / "config.json").read_text())["recipe"]
    assert recipe["attack"]["attack"] == "pgi" and recipe["execution"]["kept"] == "device"
