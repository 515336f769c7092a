"""Predictions under attack: what the numbers mean, and that they hang together."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from retemper.engine import create_model
from retemper.engine.checkpoints.header import load_network, read_facts
from retemper.engine.distributed.ranks import Ranks
from retemper.engine.predict import ATTACKS, Attack, attacked_batches, balanced_order, labelled_batches, survivors
from retemper.loaders import Split, load_split, split_of_arrays

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def digits() -> Split:
    return load_split("digits", "test", None)


class Brightness(nn.Module):
    """A network that answers class 1 where the mean pixel is above a half. Each margin is known: |mean - 1/2|."""

    def forward(self, image: Tensor) -> Tensor:
        score = image.flatten(1).mean(1) - 0.5
        return 50 * torch.stack([-score, score], 1)


def squares(means: list[int]) -> Split:
    images = np.stack([np.full((4, 4, 1), mean, dtype=np.uint8) for mean in means])
    labels = (np.array(means) > 127).astype(np.int64)
    return split_of_arrays("digits", "test", images, labels, ("dark", "light"), "")


@pytest.mark.parametrize("name", ["fgsm", "pgd20", "cw"])
def test_an_image_falls_exactly_when_its_margin_is_smaller_than_eps(name: str) -> None:
    split = squares([0, 100, 120, 126, 129, 140, 180, 255])
    eps = 20 / 255
    margin = np.abs(split.images.reshape(8, -1).mean(1) / 255 - 0.5)
    correct = survivors(Brightness(), split, ATTACKS[name], eps=eps, device=CPU)
    assert correct.tolist() == (margin > eps).tolist()


def test_a_radius_of_zero_is_clean(teacher: Path, digits: Split) -> None:
    model = trained(teacher)
    clean = survivors(model, digits, ATTACKS["clean"], eps=0, device=CPU)
    for name in ("fgsm", "pgd20", "cw"):
        assert torch.equal(survivors(model, digits, ATTACKS[name], eps=0, device=CPU), clean)


def test_more_radius_and_more_steps_break_more(teacher: Path, digits: Split) -> None:
    model = trained(teacher)
    order = balanced_order(digits.labels, 100)

    def robust(attack: Attack, eps: float) -> int:
        return int(survivors(model, digits, attack, eps=eps, device=CPU, indices=order).sum())

    counts = [robust(ATTACKS["pgd20"], eps) for eps in (0.0, 0.05, 0.15, 1.0)]
    assert counts == sorted(counts, reverse=True) and counts[0] > counts[2] and counts[-1] <= 10
    assert robust(ATTACKS["pgd20"], 0.15) <= robust(ATTACKS["fgsm"], 0.15)


def test_an_image_misclassified_when_clean_never_counts() -> None:
    right = squares([100, 160])
    wrong = split_of_arrays("digits", "test", right.images, 1 - right.labels, right.classes, "")
    assert not survivors(Brightness(), wrong, ATTACKS["pgd20"], eps=0.5, device=CPU).any()


def trained(run_folder: Path) -> nn.Module:
    weights = run_folder / "best.safetensors"
    return load_network(weights, read_facts(weights), CPU)


def test_an_answer_that_is_not_finite_is_no_answer(digits: Split) -> None:
    class Broken(nn.Module):
        def forward(self, image: Tensor) -> Tensor:
            return image.flatten(1)[:, :10] * float("nan")

    assert not survivors(Broken(), digits, ATTACKS["clean"], eps=0, device=CPU).any()


def test_any_prefix_is_balanced() -> None:
    labels = np.array([0, 0, 0, 0, 1, 2, 2, 1, 2, 2, 2])
    order = balanced_order(labels)
    assert sorted(order) == list(range(11))
    for size in (3, 6):
        assert np.bincount(labels[balanced_order(labels, size)]).tolist() == [size // 3] * 3
    assert balanced_order(labels, 3).tolist() == [0, 4, 5]


def test_batches_are_evaluated_in_fp32_without_tf32(digits: Split) -> None:
    seen = []

    class Watch(nn.Module):
        def forward(self, image: Tensor) -> Tensor:
            seen.append((image.dtype, torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32))
            return image.flatten(1)[:, :10]

    before = torch.backends.cudnn.allow_tf32
    survivors(Watch(), digits, ATTACKS["fgsm"], eps=0.1, device=CPU, indices=np.arange(4))
    assert set(seen) == {(torch.float32, False, False)} and torch.backends.cudnn.allow_tf32 == before


def test_an_attack_may_look_at_another_network(teacher: Path, digits: Split) -> None:
    model, order = trained(teacher), balanced_order(digits.labels, 100)
    torch.manual_seed(0)
    untrained = create_model("tiny_resnet", 10).eval()

    def robust(**source: nn.Module) -> Tensor:
        return survivors(model, digits, ATTACKS["pgd20"], eps=0.15, device=CPU, indices=order, **source)

    assert torch.equal(robust(source=model), robust())
    assert robust(source=untrained).sum() > robust().sum(), "what fools a network that knows nothing transfers badly"


def test_processes_take_turns_at_the_batches(digits: Split) -> None:
    order = balanced_order(digits.labels, 50)

    def firsts(ranks: Ranks) -> dict[int, list[int]]:
        batches = labelled_batches(digits, CPU, indices=order, batch_size=16, ranks=ranks)
        return {first: label_B.tolist() for first, _, label_B in batches}

    first, second = (firsts(Ranks(rank=rank, world_size=2)) for rank in range(2))
    assert (list(first), list(second)) == ([0, 32], [16, 48])
    assert first | second == {n: digits.labels[order][n : n + 16].tolist() for n in (0, 32, 16, 48)}


def test_each_batch_is_attacked_with_a_seed_of_its_own(digits: Split) -> None:
    seeds = []

    class Linear(nn.Module):
        def forward(self, image: Tensor) -> Tensor:
            return image.flatten(1)[:, :10]

    def darken(clean: Tensor, clean_BK: Tensor, label_B: Tensor, seed: int) -> Tensor:
        assert torch.equal(clean_BK, clean.flatten(1)[:, :10]) and len(label_B) == len(clean)
        seeds.append(seed)
        return clean / 2

    batches = attacked_batches(Linear(), digits, darken, device=CPU, indices=np.arange(20), batch_size=8, seed=100)
    for batch in batches:
        assert torch.equal(batch.adv_BK, batch.clean_BK / 2)
    assert seeds == [100, 108, 116]


def test_attacks_and_networks_that_do_not_fit_are_refused(digits: Split) -> None:
    for wrong in (dict(loss="crossentropy", steps=1), dict(steps=-1), dict(steps=1, step=2.0)):
        with pytest.raises(ValueError, match="the loss is cross-entropy or margin"):
            Attack(**wrong)  # pyright: ignore[reportArgumentType]
    narrow = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 5))
    with pytest.raises(ValueError, match=r"the model answers \(4, 5\) .* needs \(4, 10\)"):
        survivors(narrow, digits, ATTACKS["clean"], eps=0, device=CPU, indices=np.arange(4))
    with pytest.raises(ValueError, match="8/255, not 8"):
        survivors(narrow, digits, ATTACKS["fgsm"], eps=8, device=CPU, indices=np.arange(4))
