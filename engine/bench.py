"""How long the step, the kernels and the loaders take on whatever device is there: `retemper bench`.

Contestants take turns within each round, so that a machine whose speed drifts is unfair to none, and what they compute
is compared before any time is taken. Figures are milliseconds: p10, median, p90 over the rounds.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from retemper.engine.catalogue import find_setting
from retemper.engine.models import channels_last, create_model
from retemper.engine.run_folder import commit, device_name, versions
from retemper.engine.step import State, train_step
from retemper.kernels import augment, class_sums, class_temperature_kl, pgd_step_
from retemper.loaders import LoaderKind, ViewSpace, ffcv_problem, make_loader, split_of_arrays

Contestants = dict[str, Callable[[], Any]]


def bench(what: str, device: torch.device, rounds: int = 20) -> dict[str, Any]:
    """Time `what` ("step", "kernels" or "loaders"): contestant -> its figures, with what they were measured on."""
    rows = {"step": bench_step, "kernels": bench_kernels, "loaders": bench_loaders}[what](device, rounds)
    return {"what": what, "device": device_name(device), "versions": versions(), "commit": commit(), "rows": rows}


def take_turns(contestants: Contestants, rounds: int, device: torch.device) -> dict[str, dict[str, float]]:
    """Time each contestant once a round, after two rounds that do not count."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(rounds + 2):
        for name, work in contestants.items():
            _wait(device)
            started = time.perf_counter()
            work()
            _wait(device)
            if turn >= 2:
                times[name].append(1e3 * (time.perf_counter() - started))
    percentiles = {name: np.percentile(values, (10, 50, 90)) for name, values in times.items()}
    return {name: {"p10": p[0], "median": p[1], "p90": p[2]} for name, p in percentiles.items()}


def bench_step(device: torch.device, rounds: int) -> dict[str, dict[str, float]]:
    """One training step of each method on its digits setting, batch 128."""
    contestants: Contestants = {}
    label = torch.arange(128, device=device) % 10
    clean = torch.rand(128, 1, 8, 8, device=device)
    for method in ("sat", "trades", "rslad", "absld"):
        recipe = replace(find_setting(f"{method}:digits")[2].recipe, batch_size=128)
        teacher = channels_last(create_model("tiny_resnet_wide", 10), device).eval().requires_grad_(False)
        student = create_model("tiny_resnet", 10)
        state = State.begin(recipe, student, teacher if recipe.teacher_model else None, 10, device)
        contestants[method] = lambda s=state, r=recipe: train_step(s, r, clean, label)
    return take_turns(contestants, rounds, device)


def bench_kernels(device: torch.device, rounds: int) -> dict[str, dict[str, float]]:
    """Each kernel against the chain of eager operations that it stands for, at the shapes of CIFAR, batch 128."""
    image = torch.randint(256, (128, 32, 32, 3), dtype=torch.uint8, device=device)
    view, label = torch.arange(128, device=device), torch.arange(128, device=device) % 10
    clean = augment(image, view)
    grad, adv = torch.randn_like(clean), clean.clone()
    student, teacher = torch.randn(128, 10, device=device), torch.randn(128, 10, device=device)
    temperature = torch.linspace(0.5, 5, 10, device=device)
    step, eps = 2 / 255, 8 / 255

    def eager_step() -> Tensor:
        moved = adv + step * grad.sign()
        return torch.min(torch.max(moved, clean - eps), clean + eps).clamp(0, 1)

    def eager_kl() -> Tensor:
        tempered = teacher / temperature[label][:, None]
        return F.kl_div(student.log_softmax(1), tempered.softmax(1), reduction="batchmean")

    def eager_sums() -> Tensor:
        loss = F.cross_entropy(student, label, reduction="none")
        return torch.zeros(10, device=device).index_add_(0, label, loss)

    agree: dict[str, Any] = dict(rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(pgd_step_(adv.clone(), grad, clean, step, eps), eager_step(), rtol=0, atol=0)
    torch.testing.assert_close(class_temperature_kl(student, teacher, label, temperature), eager_kl(), **agree)
    torch.testing.assert_close(class_sums(student, label, 10)[0], eager_sums(), **agree)
    return take_turns(
        {
            "pgd_step_": lambda: pgd_step_(adv, grad, clean, step, eps),
            "pgd_step_, eager chain": eager_step,
            "class_temperature_kl": lambda: class_temperature_kl(student, teacher, label, temperature),
            "class_temperature_kl, eager chain": eager_kl,
            "class_sums (loss, correct, count)": lambda: class_sums(student, label, 10),
            "class_sums, eager chain (loss alone)": eager_sums,
            "augment": lambda: augment(image, view),
        },
        rounds,
        device,
    )


def bench_loaders(device: torch.device, rounds: int) -> dict[str, dict[str, float]]:
    """An epoch of 50,000 random 32 x 32 images in batches of 128 through each backend, compared first."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (50_000, 32, 32, 3), dtype=np.uint8)
    split = split_of_arrays("random", "train", images, np.arange(50_000) % 10, tuple("0123456789"), "random")
    kinds: list[LoaderKind] = ["resident", "ffcv"] if ffcv_problem() is None else ["resident"]
    with TemporaryDirectory() as folder:
        loaders = {
            kind: make_loader(
                kind, split, batch_size=128, seed=0, views=ViewSpace(), device=device, cache_dir=Path(folder)
            )
            for kind in kinds
        }
        first = [next(iter(loader.epoch(1))) for loader in loaders.values()]
        assert all(torch.equal(batch.image, first[0].image) for batch in first)

        def epoch(kind: LoaderKind) -> None:
            for batch in loaders[kind].epoch(1):
                assert len(batch.label)

        try:
            return take_turns({kind: lambda k=kind: epoch(k) for kind in kinds}, max(3, rounds // 5), device)
        finally:
            for loader in loaders.values():
                loader.close()


def as_table(result: dict[str, Any]) -> str:
    """For the terminal."""
    lines = [f"{result['what']} on {result['device']}, ms", f"{'':38}{'p10':>9}{'median':>9}{'p90':>9}"]
    lines += [f"{name:38}{r['p10']:9.3f}{r['median']:9.3f}{r['p90']:9.3f}" for name, r in result["rows"].items()]
    return "\n".join(lines)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
