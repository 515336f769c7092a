"""The evaluations by name and their radius: the papers' own against loops written out, and what is told of them."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from retemper import verbs
from retemper.cli import run
from retemper.engine import create_model, save_weights
from retemper.engine.checkpoints.header import Facts
from retemper.engine.evaluation import autoattack
from retemper.engine.evaluation.library import WEAKER, Strength, library_attacks
from retemper.engine.evaluation.protocols import (
    PROTOCOLS,
    protocol_of,
    radius,
    result_name,
    strongest_first,
)
from retemper.engine.predict import ATTACKS, Attack, as_float, predicted, predictions, survivors
from retemper.errors import UsageError
from retemper.loaders import load_split, split_of_arrays, usual_eps

CPU, EPS = torch.device("cpu"), 0.1
IMAGES = 60


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)).eval()


def written_out(model: nn.Module, clean: Tensor, label: Tensor, begin: Tensor, name: str) -> Tensor:
    """Return the images that Fair-ARD's script makes: one or 20 steps on the loss."""
    steps, step = (1, EPS) if name == "fgsm" else (20, EPS / 4)
    adv = begin
    for _ in range(steps):
        adv = adv.detach().requires_grad_()
        logits = model(adv)
        if name == "cw":
            own = logits[torch.arange(len(label)), label]
            other = logits.scatter(1, label[:, None], -1e4).max(1).values
            loss = -(own - other + 50).clamp(min=0).sum()
        else:
            loss = F.cross_entropy(logits, label)
        (gradient,) = torch.autograd.grad(loss, adv)
        adv = (clean + (adv.detach() + step * gradient.sign() - clean).clamp(-EPS, EPS)).clamp(0, 1)
    return adv


@pytest.mark.parametrize("name", ["fgsm", "pgd20", "cw"])
def test_fair_ards_attacks_are_its_scripts(name: str) -> None:
    model, digits = network(), load_split("digits", "test")
    order = torch.arange(IMAGES)
    clean, label = as_float(digits, order, CPU), torch.from_numpy(digits.labels[:IMAGES])
    attack = PROTOCOLS["fair-ard"].attacks[name]
    begin = replace(attack, steps=0).on(model, EPS)(clean, model(clean), label, 0)
    assert begin.min() < 0  # the script does not clip its start
    spread = 0.001 if name == "fgsm" else EPS / 3**0.5  # a Gaussian's, and a uniform draw's
    assert abs((begin - clean).std() / spread - 1) < 0.1
    found = predictions(model, digits, attack, eps=EPS, device=CPU, indices=order.numpy())
    wanted = written_out(model, clean, label, begin, name)
    torch.testing.assert_close(attack.on(model, EPS)(clean, model(clean), label, 0), wanted)
    assert torch.equal(found, model(wanted).argmax(1))


@pytest.mark.parametrize("protocol", ["fair-ard", "rslad"])
def test_the_papers_attacks_judge_the_attacked_image_alone(protocol: str) -> None:
    class Darker(nn.Module):
        """Answers 1 for an image that is light; its logits rise with the brightness, or fall."""

        def __init__(self, sign: int) -> None:
            super().__init__()
            self.sign = sign

        def forward(self, image: Tensor) -> Tensor:
            score = self.sign * (image.flatten(1).mean(1) - 0.5)
            return 50 * torch.stack([-score, score], 1)

    grey = torch.full((4, 4, 4, 1), 120, dtype=torch.uint8).numpy()
    wrong = split_of_arrays("digits", "test", grey, torch.ones(4, dtype=torch.int64).numpy(), ("dark", "light"), "")
    for name, attack in PROTOCOLS[protocol].attacks.items():
        judged = survivors(Darker(1), wrong, attack, eps=0.2, device=CPU, source=Darker(-1))  # it helps the network
        assert judged.all() == (name != "clean")
        assert not survivors(Darker(1), wrong, replace(attack, alone=False), eps=0.2, device=CPU).any()


def test_rslads_columns_have_the_steps_of_sat_and_trades() -> None:
    attacks = PROTOCOLS["rslad"].attacks
    steps = {name: attacks[name].described(8 / 255)["step"] for name in ("pgd-sat", "pgd-trades")}
    assert steps == pytest.approx({"pgd-sat": 2 / 255, "pgd-trades": 0.003})
    assert (attacks["cw"].steps, attacks["cw"].loss, attacks["fgsm"].start) == (30, "margin", "none")


def test_a_standard_attack_is_described_as_before() -> None:
    assert ATTACKS["pgd20"].described(0.1) == dict(loss="cross-entropy", steps=20, step=0.025, start="uniform")
    told = Attack(steps=1, step=1, start="normal", clip_start=False, alone=True).described(0.1)
    assert told == dict(loss="cross-entropy", steps=1, step=0.1, start="normal", clip_start=False, alone=True)


def test_fair_ards_suite_has_torchattacks_defaults() -> None:
    of_suite = {suite: WEAKER.get(suite, Strength()) for suite in ("standard", "fair-ard")}
    found = {suite: library_attacks(network(), 100, EPS, 0, CPU, strength) for suite, strength in of_suite.items()}

    def described(suite: str) -> list[tuple[int, ...]]:
        attacks = found[suite]
        apgd = [
            (one.n_iter, one.n_iter_2, one.n_iter_min, one.size_decr) for one in (attacks["apgd-ce"], attacks["apgd-t"])
        ]
        targets = [attacks[name].n_target_classes for name in ("apgd-t", "fab-t")]
        return [
            *apgd,
            (attacks["fab-t"].n_iter, *targets),
            (attacks["square"].n_queries, attacks["square"].rescale_schedule),
        ]

    assert described("standard") == [(100, 22, 6, 3)] * 2 + [(100, 9, 9), (5000, False)]
    assert described("fair-ard") == [(10, 2, 1, 1)] * 2 + [(10, 99, 99), (5000, True)]


def test_fair_ards_suite_gives_torchattacks_verdicts(tmp_path: Path) -> None:
    torchattacks = pytest.importorskip("torchattacks")
    digits, model = load_split("digits", "test"), network()
    images, labels = as_float(digits, torch.arange(40), CPU).contiguous(), torch.from_numpy(digits.labels[:40])
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    model.requires_grad_(False)
    rows, eps = torch.arange(40).numpy(), 0.14
    asked = autoattack.SuiteRequest(suite="fair-ard", eps=eps, device=CPU, batch_size=40)
    ledger = autoattack.Ledger(tmp_path / "ledger.csv", {"eps": eps}, rows, digits.labels[:40])
    assert autoattack.run_suite(model, digits, asked, ledger)
    adv = torchattacks.AutoAttack(model, eps=eps, n_classes=10, seed=0)(images, labels)
    theirs = predicted(model(adv)) == labels
    assert 5 < int(theirs.sum()) < 35
    assert int((torch.from_numpy(ledger.holds(asked.attacks)) != theirs).sum()) <= 1


def test_a_papers_evaluation_stands_beside_the_standard_one(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def quick(*words: Any) -> dict[str, Any]:
        attacks = library_attacks(*words)
        attacks["square"].n_queries = attacks["fab-t"].n_target_classes = attacks["apgd-t"].n_target_classes = 2
        attacks["apgd-ce"].n_iter = attacks["apgd-t"].n_iter = attacks["fab-t"].n_iter = 2
        return attacks

    monkeypatch.setattr(autoattack, "library_attacks", quick)
    words = ["evaluate", str(teacher), "--limit", "20", "--out", str(tmp_path)]
    assert run([*words, "--attacks", "clean,cw,autoattack"]) == 0
    assert run([*words, "--attacks", "clean,cw,autoattack", "--protocol", "fair-ard"]) == 0
    content = json.loads((tmp_path / "evaluation.json").read_text())
    told, attacks = content["protocol"]["attacks"], content["attacks"]
    assert list(attacks) == ["clean", "cw", "autoattack", "cw-fair-ard", "autoattack-fair-ard"]
    for name in ("cw-fair-ard", "autoattack-fair-ard"):
        assert told[name]["protocol"] == "fair-ard" and attacks[name]["upper_bound"]
    assert "protocol" not in told["cw"] and not attacks["autoattack"]["upper_bound"]
    assert (told["autoattack-fair-ard"]["steps"], "steps" in told["autoattack"]) == (10, False)
    assert attacks["autoattack-fair-ard"]["ledger"] == "autoattack-fair-ard.csv"
    assert attacks["autoattack"]["ledger"] == "autoattack.csv" and (tmp_path / "autoattack.csv").exists()
    assert (tmp_path / "evaluation.csv").read_text().splitlines()[0].endswith(",cw-fair-ard,autoattack-fair-ard")
    printed = capsys.readouterr().out
    assert "cw-fair-ard, autoattack-fair-ard: a paper's own evaluation, weaker than the standard one" in printed
    assert run([*words, "--protocol", "rslad"]) == 0
    assert "pgd-trades-rslad" in json.loads((tmp_path / "evaluation.json").read_text())["attacks"]


def test_names_say_the_protocol() -> None:
    assert result_name("cw", "standard") == "cw" and result_name("cw", "fair-ard") == "cw-fair-ard"
    assert result_name("clean", "fair-ard") == "clean" and result_name("autoattack", "rslad") == "autoattack"
    assert protocol_of("autoattack-fair-ard") == ("autoattack", "fair-ard")
    assert protocol_of("autoattack-fast") == ("autoattack-fast", "standard")
    order = strongest_first()
    assert order[0] == "autoattack" and order[-1] == "clean" and len(set(order)) == len(order)
    assert order.index("fgsm") < order.index("autoattack-fair-ard") < order.index("cw-fair-ard")


def test_the_command_line_names_the_same_protocols() -> None:
    assert verbs.PROTOCOLS == {name: (*one.attacks, "autoattack") for name, one in PROTOCOLS.items()}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("--protocol rslad --attacks pgd20", "attack 'pgd20' (--attacks pgd20 is for --protocol standard): choose of"),
        ("--attacks pgd-sat", "there is no attack 'pgd-sat' (--attacks pgd-sat is for --protocol rslad)"),
        ("--attacks cw-fair-ard", "there is no attack 'cw-fair-ard' (--attacks cw is for --protocol fair-ard)"),
        ("--attacks pgd", "there is no attack 'pgd' (did you mean 'pgd20'?)"),
        ("--protocol fair-ard --attacks autoattack --suite fast", "has a suite of its own, leave it out"),
        ("--protocol ard", "invalid choice"),
    ],
)
def test_what_a_protocol_does_not_have_is_refused(
    given: str, said: str, teacher: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["evaluate", str(teacher), *given.split()]) == 2
    assert said in capsys.readouterr().err


def test_each_data_set_has_one_radius() -> None:
    found = {name: usual_eps(name) for name in ("digits", "fashion-mnist", "cifar10", "cifar100", "svhn", "folder")}
    assert found == {"digits": 0.15, "fashion-mnist": 0.1} | dict.fromkeys(
        ("cifar10", "cifar100", "svhn", "folder"), 8 / 255
    )
    assert radius(None, "cifar10", 0.031, "x") == 8 / 255 and radius("trained", "cifar10", 0.031, "x") == 0.031
    assert radius(0.05, "cifar10", 0.031, "x") == 0.05
    with pytest.raises(UsageError, match="--eps trained: x does not say its radius"):
        radius("trained", "cifar10", None, "x")


def test_an_evaluation_is_at_the_data_sets_radius(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network, path = tmp_path / "net.safetensors", tmp_path / "evaluation.json"
    facts = Facts(model="tiny_resnet", num_classes=10, channels=1, image_size=8, dataset="digits", eps=0.031)
    save_weights(network, create_model("tiny_resnet", 10, channels=1), facts.as_metadata())

    def evaluated(*words: str) -> str:
        assert run(["evaluate", str(network), "--attacks", "fgsm", "--limit", "10", *words]) == 0
        return capsys.readouterr().err

    assert "note: net.safetensors was trained at eps 0.031, evaluated at 0.15 (--eps trained" in evaluated()
    assert json.loads(path.read_text())["protocol"]["eps"] == 0.15
    said = evaluated("--eps", "trained")
    assert "note:" not in said and f"{path} stays: it was made at digits's usual radius, 0.15" in said
    assert json.loads(path.read_text())["protocol"]["eps"] == 0.15
    other = tmp_path / "evaluation.1.json"
    assert json.loads(other.read_text())["protocol"]["eps"] == 0.031
    for suffix in (".json", ".csv"):  # as an earlier version left it
        other.with_suffix(suffix).replace(path.with_suffix(suffix))
    assert f"{path} was made under another protocol (eps 0.031) and is now {other}" in evaluated()
    assert json.loads(path.read_text())["protocol"]["eps"] == 0.15
    assert json.loads(other.read_text())["protocol"]["eps"] == 0.031
