"""CSR: free steps of the variant `released` end where train_fair.py and trades_fair.py end.

The scripts are those of Alexkael/CONFUSIONAL-SPECTRAL-REGULARIZATION, on top of TRADES. Dimension key: K classes.
"""

from functools import partial
from pathlib import Path

import pytest
import torch
from driver import Batch, Run, assert_same, free_run
from reference import climb
from test_training import cross_entropy, divergence, on_prediction, replay
from torch import Tensor, nn
from torch.nn import functional as F

from retemper.engine.catalogue import find_setting
from retemper.engine.run import survey


def confusions(run: Run, student: nn.Module, batches: list[Batch]) -> Tensor:
    """Return the weight of each pair, as the script computes it before an epoch: (K, K), by class given and true."""
    attack, counts_KK = run.recipe.attack, torch.zeros(10, 10, dtype=torch.float64)
    student.eval()
    for batch in batches:
        start = run.start(batch.image, attack.eps, batch.seed ^ survey.OWN_NOISE, "uniform", False)
        value = partial(cross_entropy, student, batch)
        adv = climb(batch.image, start, value, eps=attack.eps, step=attack.step, steps=attack.steps)
        with torch.no_grad():
            output = student(adv)
        for row, target in zip(output, batch.label.tolist(), strict=True):
            row[target] -= row[target] * 0.1
            if int(row.argmax()) != target:
                counts_KK[int(row.argmax()), target] += 1
    u, _, v = torch.svd(counts_KK)
    pull = torch.outer(u[:, 0], v[:, 0])
    return 2 * (pull - pull.min()) / (pull.max() - pull.min()) + 0.01


def csr(run: Run, twice: bool) -> tuple[nn.Module, list[float], list[Tensor]]:
    """Train as the scripts do; `twice` to take each of the two forwards a second time, as they do."""
    weights: list[Tensor] = []

    def around(epoch: int, student: nn.Module) -> None:
        if epoch <= len(run.batches):
            weights.append(confusions(run, student, run.batches[epoch - 1]))

    def loss(student: nn.Module, batch: Batch, adv: Tensor) -> Tensor:
        clean_BK, adv_BK = student(batch.image), student(adv)
        natural, robust = F.cross_entropy(clean_BK, batch.label), divergence(adv_BK, clean_BK) / len(adv)
        if twice:
            robust, adv_BK = divergence(adv_BK, student(batch.image)) / len(adv), student(adv)
        weight_B = weights[-1][adv_BK.argmax(1), batch.label]
        target_BK = F.one_hot(batch.label, 10) * weight_B[:, None]
        confusion = F.kl_div(adv_BK.log_softmax(1), target_BK, reduction="sum") / len(adv)
        return 0.7 * natural + 6.0 * robust + 0.3 * confusion

    return *replay(run, on_prediction(run), loss, around=around), weights


@pytest.mark.parametrize("variant", ["released", "paper"])
def test_csr(variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = survey.clean_images
    monkeypatch.setattr(survey, "clean_images", lambda *arguments: images(*arguments).double())
    run = free_run("csr:cifar10_resnet18", tmp_path, monkeypatch, variant, lr=0.02)
    student, rates, weights = csr(run, twice=variant == "released")
    assert assert_same(run, student, lr=rates, class_state={"pair_weight": weights[-1]}) < 1e-10
    torch.testing.assert_close(run.class_state[0]["pair_weight"], weights[0], rtol=0, atol=1e-10)
    assert variant == "paper" or run.best_epoch == 2  # the last


def test_the_run_around_the_steps_is_the_scripts() -> None:
    recipe = find_setting("csr:cifar10_preact_resnet18")[2].recipe.as_variant("released")
    script = dict(
        normalise=False, padding=4, padding_mode="zeros", flip=True, batch_size=128, eps=8 / 255, attack_step=2 / 255,
        attack_steps=10, attack_start="normal", epochs=2, lr=0.001, momentum=0.9, weight_decay=5e-4, nesterov=False,
        beta=6.0, gamma=0.1, share=0.3, holdout_per_class=0, precision="fp32",
    )  # fmt: skip
    assert {option: recipe.flat()[option] for option in script} == script
    assert recipe.optim.lr_at(2) == 0.001
