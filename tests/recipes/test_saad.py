"""SAAD: the teacher to first order, the doubt that weighs the images, and the loss by the formula, in float64."""

import pytest
import torch
from torch import Tensor, nn

from retemper.engine import Recipe, State, Targets, create_model, maximise, train_step
from retemper.engine.first_order import FirstOrder, slope_at
from retemper.recipes.adaad import disagreement
from retemper.recipes.saad import SETTINGS, Saad, entropy

CPU = torch.device("cpu")
LABEL = torch.arange(6) % 5


def kl(p: Tensor, q: Tensor) -> Tensor:
    """Return KL(p || q) of two softmaxes, (B,), written out."""
    return (p.softmax(1) * (p.softmax(1).log() - q.softmax(1).log())).sum(1)


def a_network() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 5)).double()
    return network.eval().requires_grad_(False), torch.rand(6, 2, 2, 2, dtype=torch.float64)


def test_the_first_order_moves_the_labels_logit_alone() -> None:
    network, image = a_network()
    logits, slope = slope_at(network, image, LABEL)
    assert not logits.requires_grad and torch.equal(logits, network(image))
    for row in range(6):
        at = image[row : row + 1].clone().requires_grad_()
        (alone,) = torch.autograd.grad(network(at)[0, LABEL[row]], at)
        torch.testing.assert_close(slope[row], alone[0], rtol=1e-12, atol=1e-14)
    moved = (image + 0.1 * torch.randn_like(image)).requires_grad_()
    found = FirstOrder(image, logits, 0.5 * slope, LABEL)(moved)
    expected = logits.clone()
    for row in range(6):
        expected[row, LABEL[row]] += 0.5 * (slope[row] * (moved[row] - image[row])).sum()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    weight = torch.randn(6, 5, dtype=torch.float64)
    own = weight.gather(1, LABEL[:, None])[:, 0].view(-1, 1, 1, 1)
    (back,) = torch.autograd.grad((weight * found).sum(), moved)
    torch.testing.assert_close(back, 0.5 * own * slope, rtol=1e-12, atol=1e-14)
    near = image + 1e-6 * slope
    true = network(near).gather(1, LABEL[:, None]) - logits.gather(1, LABEL[:, None])
    foreseen = FirstOrder(image, logits, slope, LABEL)(near) - logits
    torch.testing.assert_close(foreseen.gather(1, LABEL[:, None]), true, rtol=1e-4, atol=0)


@pytest.mark.parametrize("order", [1.0, 0.5, 2.0, 1 + 1e-7])
def test_the_entropy_is_renyis(order: float) -> None:
    logits = 3 * torch.randn(6, 5, dtype=torch.float64)
    p = logits.softmax(1)
    near_one = abs(order - 1) < 1e-5
    expected = -(p * p.log()).sum(1) if near_one else (p**order).sum(1).log() / (1 - order)
    torch.testing.assert_close(entropy(logits, order), expected, rtol=1e-5 if near_one else 1e-10, atol=1e-8)


@pytest.mark.parametrize("clean_weight", [0.0, 0.75])
@pytest.mark.parametrize("alpha", [0.0, 2.0])
def test_the_loss_and_its_gradients_are_the_formula(clean_weight: float, alpha: float) -> None:
    gen = torch.Generator().manual_seed(0)
    names = ("adv", "clean", "minus")
    drawn = [3 * torch.randn(6, 5, generator=gen, dtype=torch.float64) for _ in range(6)]
    student = {name: value.requires_grad_() for name, value in zip(names, drawn, strict=False)}
    teacher = dict(zip(names, drawn[3:], strict=True))
    targets = Targets(
        label_B=LABEL,
        teacher_BK=teacher["clean"],
        teacher_adv_BK=teacher["adv"],
        teacher_views={"minus": teacher["minus"]} if alpha else {},
        state={"igdm_weight": torch.tensor(0.5 * alpha)} if alpha else {},
    )
    given = student if alpha else {name: student[name] for name in names[:2]}
    method = Saad(igdm=alpha, clean_weight=clean_weight, doubt_scale=4.0)
    loss = method.training_loss(given, targets)
    p = teacher["adv"].softmax(1)
    doubt = -(p * p.log()).sum(1)
    weight = 4 * (doubt - doubt.min())
    share = (weight - weight.min()) / (weight.max() - weight.min() + 1e-8)
    turn = kl(teacher["adv"] - teacher["minus"], student["adv"] - student["minus"])
    rows = weight * (kl(teacher["adv"], student["adv"]) + 0.5 * alpha * turn)
    expected = (rows + clean_weight * (1 - share) * kl(teacher["clean"], student["clean"])).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    ours = torch.autograd.grad(loss, [*given.values()], allow_unused=True)
    theirs = torch.autograd.grad(expected, [*given.values()], allow_unused=True, materialize_grads=True)
    for found, wanted in zip(ours, theirs, strict=True):
        found = torch.zeros_like(wanted) if found is None else found
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-14)


def test_the_attack_foresees_the_teacher_by_one_backward_pass_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    recipe: Recipe = SETTINGS["digits"].recipe.replace(attack_steps=4, precision="fp32", fold=False, slope_weight=2.0)
    teacher = create_model("tiny_resnet", 10).double().eval().requires_grad_(False)
    asked: list[tuple[int, bool]] = []
    teacher.register_forward_pre_hook(lambda _, args: asked.append((len(args[0]), args[0].requires_grad)))
    state = State(recipe, create_model("tiny_resnet", 10).double(), teacher, 10, CPU)
    seen, ascend = [], maximise.ascend

    def watched(*arguments, objective, **options):
        seen.append((arguments[0], objective))
        return ascend(*arguments, objective=objective, **options)

    monkeypatch.setattr(maximise, "ascend", watched)
    clean, label = torch.rand(8, 1, 8, 8, dtype=torch.float64), torch.arange(8)
    state.start_epoch(recipe, 1, 0)
    train_step(state, recipe, clean.to(memory_format=torch.channels_last), label)
    assert asked == [(8, True), (16, False)]  # clean images, and both views in one batch
    ((attacked, objective),) = seen
    assert objective is disagreement
    near = (clean + 0.01 * torch.randn_like(clean)).requires_grad_()
    logits, slope = slope_at(teacher, clean, label)
    expected = FirstOrder(clean, logits, 2 * slope, label)(near)
    torch.testing.assert_close(attacked(near)[:, 10:], expected, rtol=1e-10, atol=1e-12)


def test_forwards_are_in_the_authors_order_and_the_average_begins_before_the_drop() -> None:
    for name, setting in SETTINGS.items():
        recipe = setting.recipe
        assert recipe.method.forwards_in(1, recipe).before == ("adv", "minus", "clean")
        assert (recipe.optim.average, recipe.optim.average_every) == ("swa", "epoch")
        assert recipe.optim.average_from <= recipe.optim.lr_drops[0], name
        large = recipe.data.dataset in ("cifar100", "tiny-imagenet", "folder")
        assert isinstance(recipe.method, Saad) and recipe.method.igdm == (10 if large else 1)
    recipe = SETTINGS["cifar10_resnet18"].recipe
    assert (recipe.optim.epochs, recipe.optim.lr_drops, recipe.optim.average_from) == (200, (100, 150), 95)
    assert recipe.as_variant("released").selection.holdout_per_class == 0
    assert recipe.method.shown_to_teacher() == ("adv", "minus")  # no table of its answers is of use
