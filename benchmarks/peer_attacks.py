"""Is our PGD as strong as torchattacks' and foolbox's? The same attack by each, on the same network and images.

    python benchmarks/peer_attacks.py --json benchmarks/results/cpu/peer_attacks.json

A small network is trained against attacks on scikit-learn's digits, in seconds, and 500 images that it has not seen are
attacked: in L-inf and in L2, away from their class and towards the next one, with pixels in [0, 1] and in [-1, 1]; from
the images, from the very start that the peer has drawn, and from ten starts that each draws for itself. "left" is how
many images an attack leaves as they were: of the right class, or not yet of the one aimed at, the mean of the starts.
Ours may leave one more in 500. "equal" is how many images are the peer's, to 1e-5 of a pixel. At the end stand ours
with momentum beside torchattacks' MIFGSM, and with restarts and the best iterate. On a CPU it takes one thread, so that
the same seeds give the same numbers.

Needs no network: pip install 'retemper[bench]'. Exit code: 0, or 1 where ours is weaker or leaves the ball.
"""

import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from runs import DEVICE
from sklearn.datasets import load_digits
from summary import markdown, words_of, write_summary
from torch import Tensor, nn

from retemper.bench import peers
from retemper.engine import cross_entropy_objective, pgd

IMAGES, STEPS, DRAWS, EPOCHS = 500, 40, 10, 15
EPS = {"linf": 0.15, "l2": 0.5}  # in [0, 1]; in [-1, 1] they are twice as long, as are the steps
SLACK = IMAGES // 500  # by how many images ours may be weaker
NEAR = 1e-5


class InRange(nn.Module):
    """A network for pixels in [lower, 1] that has learned from pixels in [0, 1], and keeps the first it is asked of.

    Attributes:
        first: the first images since it was None: where an attack has started.
    """

    def __init__(self, network: nn.Module, lower: float) -> None:
        super().__init__()
        self.network, self.lower = network, lower
        self.first: Tensor | None = None

    def forward(self, image: Tensor) -> Tensor:
        """Map (B, 1, 8, 8) pixels in [lower, 1] to (B, 10) logits."""
        if self.first is None:
            self.first = image.detach().clone()
        return self.network((image - self.lower) / (1 - self.lower))


@dataclass(frozen=True, kw_only=True)
class Aim:
    """What an attack is after, and where it may go.

    Attributes:
        norm: "linf" or "l2".
        lower: the lowest pixel, 0 or -1; the highest is 1.
        targeted: whether the attack is to reach the class that it is given, or to leave it.
    """

    norm: str
    lower: float
    targeted: bool

    @property
    def eps(self) -> float:
        return EPS[self.norm] * (1 - self.lower)

    @property
    def step(self) -> float:
        return self.eps / 8


Attack = Callable[[Aim, InRange, Tensor, Tensor, bool], Tensor]  # aim, model, images, classes, from a random start


def torchattacks_pgd(aim: Aim, model: InRange, image: Tensor, classes: Tensor, random: bool) -> Tensor:
    """Attack by torchattacks. It knows pixels in [0, 1], and others as normalised ones."""
    library, unit = peers.library("torchattacks"), 1 - aim.lower
    kind = library.PGD if aim.norm == "linf" else library.PGDL2
    attack = kind(model, eps=aim.eps / unit, alpha=aim.step / unit, steps=STEPS, random_start=random)
    return _by_torchattacks(attack, aim, image, classes)


def torchattacks_momentum(aim: Aim, model: InRange, image: Tensor, classes: Tensor, random: bool) -> Tensor:
    """Attack by torchattacks' MI-FGSM, which starts from the images."""
    unit = 1 - aim.lower
    attack = peers.library("torchattacks").MIFGSM(model, eps=aim.eps / unit, alpha=aim.step / unit, steps=STEPS)
    return _by_torchattacks(attack, aim, image, classes)


def _by_torchattacks(attack: Any, aim: Aim, image: Tensor, classes: Tensor) -> Tensor:
    if aim.lower:
        attack.set_normalization_used(mean=[-aim.lower / (1 - aim.lower)], std=[1 / (1 - aim.lower)])
    if aim.targeted:
        attack.set_mode_targeted_by_label(quiet=True)
    return attack(image, classes)


def foolbox_pgd(aim: Aim, model: InRange, image: Tensor, classes: Tensor, random: bool) -> Tensor:
    """Attack by foolbox."""
    library = peers.library("foolbox")
    kind = library.attacks.LinfPGD if aim.norm == "linf" else library.attacks.L2PGD
    criterion = library.criteria.TargetedMisclassification if aim.targeted else library.criteria.Misclassification
    attack = kind(abs_stepsize=aim.step, steps=STEPS, random_start=random)
    known = library.PyTorchModel(model, bounds=(aim.lower, 1), device=image.device)
    return attack.run(known, image, criterion(classes), epsilon=aim.eps)


def our_pgd(aim: Aim, model: InRange, image: Tensor, classes: Tensor, **options: Any) -> Tensor:
    """Attack by this library; a negative step aims at a class."""
    ball: dict[str, Any] = dict(norm=aim.norm, lower=aim.lower, upper=1.0, eps=aim.eps)
    objective, step = cross_entropy_objective(classes), -aim.step if aim.targeted else aim.step
    return pgd(model, image, objective=objective, steps=STEPS, step=step, **ball, **options)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One attack by a peer, and by us.

    Attributes:
        left, ours_left: how many images are left as they were, of each draw of a start.
        equal: the images that are the same; None where the starts are not.
        inside: whether ours are in the ball and the range.
    """

    peer: str
    aim: Aim
    start: str
    left: list[int]
    ours_left: list[int]
    equal: int | None
    inside: bool

    @property
    def holds(self) -> bool:
        """True where ours is as strong, and in the ball."""
        return self.inside and statistics.mean(self.ours_left) - statistics.mean(self.left) <= SLACK

    @property
    def cells(self) -> list[object]:
        """The row of a table."""
        aim = "towards a class" if self.aim.targeted else "away"
        equal, verdict = "" if self.equal is None else self.equal, "yes" if self.holds else "NO"
        left = (f"{statistics.mean(one):g}" for one in (self.left, self.ours_left))
        return [self.peer, self.aim.norm, f"[{self.aim.lower:g}, 1]", aim, self.start, *left, equal, verdict]


@dataclass(frozen=True, kw_only=True, eq=False)
class Contest:
    """The network and the images on which attacks are compared.

    Attributes:
        network: (B, 1, 8, 8) pixels in [0, 1] to (B, 10) logits.
        image, label: (B, 1, 8, 8) in [0, 1], and (B,).
    """

    network: nn.Module
    image: Tensor
    label: Tensor

    def row(self, name: str, peer: Attack, aim: Aim, start: str, draws: int = 1, **options: Any) -> Row:
        """Return one comparison. `options` are those of ours."""
        model, image = InRange(self.network, aim.lower).eval(), self.image * (1 - aim.lower) + aim.lower
        classes = (self.label + 1) % 10 if aim.targeted else self.label
        theirs, ours = [], []
        for seed in range(draws):
            torch.manual_seed(seed)
            model.first = None
            theirs.append(peer(aim, model, image, classes, start != "none"))
            where = {"none": "none", "own": "uniform"}.get(start, model.first)
            ours.append(our_pgd(aim, model, image, classes, start=where, seed=seed, **options))
        moved = torch.cat(ours) - torch.cat([image] * draws)
        length = moved.abs().amax() if aim.norm == "linf" else moved.flatten(1).norm(dim=1).amax()
        inside = length <= aim.eps * (1 + NEAR) and all(
            one.aminmax()[0] >= aim.lower and one.max() <= 1 for one in ours
        )
        near = (theirs[0] - ours[0]).abs().amax((1, 2, 3)) < NEAR
        return Row(
            peer=name,
            aim=aim,
            start=start,
            left=[left(model, one, classes, aim) for one in theirs],
            ours_left=[left(model, one, classes, aim) for one in ours],
            equal=None if start == "own" else int(near.sum()),
            inside=bool(inside),
        )


def left(model: nn.Module, image: Tensor, classes: Tensor, aim: Aim) -> int:
    """Return how many images are of their class, or not yet of the one that is aimed at."""
    with torch.no_grad():
        reached = model(image).argmax(1) == classes
    return int((~reached if aim.targeted else reached).sum())


def contest() -> Contest:
    """Return a network trained against attacks, and images that it has not seen."""
    digits: Any = load_digits()
    image = torch.from_numpy(digits.images / 16).float()[:, None].to(DEVICE)
    label = torch.from_numpy(digits.target).long().to(DEVICE)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Flatten())
    network = network.extend([nn.Linear(512, 100), nn.ReLU(), nn.Linear(100, 10)]).to(DEVICE)
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(label) - IMAGES, device=DEVICE).split(64):
            objective = cross_entropy_objective(label[batch])
            adv = pgd(network, image[batch], objective=objective, steps=3, step=EPS["linf"] / 2, eps=EPS["linf"])
            optimizer.zero_grad()
            objective(network(adv)).div(len(batch)).backward()
            optimizer.step()
    return Contest(network=network.eval(), image=image[-IMAGES:], label=label[-IMAGES:])


def compared(between: Contest) -> list[Row]:
    """Return all comparisons."""
    peer_attacks: dict[str, Attack] = {"torchattacks": torchattacks_pgd, "foolbox": foolbox_pgd}
    aims = [Aim(norm=norm, lower=lower, targeted=to) for norm, lower, to in product(EPS, (0.0, -1.0), (False, True))]
    rows = []
    for (name, peer), aim in product(peer_attacks.items(), aims):
        rows += [between.row(name, peer, aim, start) for start in ("none", "the peer's")]
        rows.append(between.row(name, peer, aim, "own", DRAWS))
    in_linf = [aim for aim in aims if aim.norm == "linf"]
    rows += [between.row("torchattacks MIFGSM", torchattacks_momentum, aim, "none", momentum=1.0) for aim in in_linf]
    for aim in aims:
        more: dict[str, Any] = dict(restarts=5, keep="best")
        rows.append(between.row("foolbox; ours 5 restarts, best", foolbox_pgd, aim, "own", **more))
    return rows


def main() -> int:
    parser = words_of(__doc__)
    parser.add_argument("--json", type=Path)
    words = parser.parse_args()
    reason = peers.missing("torchattacks", "foolbox")
    if reason is not None:
        print(reason, file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    rows = compared(contest())
    head = ["peer", "norm", "pixels", "aim", "start", "left by the peer", "left by ours", "equal", "as strong"]
    print(markdown(head, [row.cells for row in rows]))
    write_summary(words.json, {"images": IMAGES, "steps": STEPS, "rows": [asdict(row) for row in rows]}, DEVICE)
    return 0 if all(row.holds for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
