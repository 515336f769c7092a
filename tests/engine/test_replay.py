"""A replayed network gives the network's answers and gradients, whatever order and sizes the calls come in."""

import runpy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from retemper import console
from retemper.engine import create_model
from retemper.engine.evaluation import autoattack
from retemper.engine.evaluation.autoattack import STANDARD, SuiteRequest, run_suite
from retemper.engine.evaluation.ledger import Ledger
from retemper.engine.predict import ATTACKS, balanced_order, predictions
from retemper.engine.speed.replay import LEAST, RECORD_AFTER, Replayed, eighths
from retemper.loaders import Split, load_split

Graphs = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("stand_in.py")))).Graphs  # no package
CPU = torch.device("cpu")
EPS = 0.05
CLOSE: dict[str, Any] = dict(rtol=1e-4, atol=1e-6)  # other shapes, other order of sums


@pytest.fixture(autouse=True)
def nothing_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "_once", set())


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return create_model("tiny_resnet", 10).eval().requires_grad_(False)


def images(number: int) -> Tensor:
    return torch.rand(number, 1, 8, 8).to(memory_format=torch.channels_last)


def gradient(network: nn.Module, image: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
    image = image.clone().requires_grad_()
    logits = network(image)
    (grad,) = torch.autograd.grad(logits, image, upstream)
    return logits.detach(), grad


def recorded(replayed: Replayed, number: int, asked: bool = True) -> None:
    """Call often enough that calls with so many images are replayed."""
    for _ in range(RECORD_AFTER + 1):
        replayed(images(number).requires_grad_(asked))


def test_answers_and_gradients_are_those_of_the_network(net: nn.Module) -> None:
    graphs = Graphs()
    replayed = Replayed(net, graphs, 16)
    for number in (16, 16, 16, 16, 16, 13, 13, 13, 13, 16, 9, 3, 3, 3, 3, 3):
        image, upstream = images(number), torch.randn(number, 10)
        for found, wanted in zip(gradient(replayed, image, upstream), gradient(net, image, upstream), strict=True):
            torch.testing.assert_close(found, wanted, **CLOSE)
            assert found.shape == wanted.shape and found.stride() == wanted.stride()
        with torch.no_grad():
            torch.testing.assert_close(replayed(image), net(image), **CLOSE)
    assert graphs.recorded == 3 * 3 and graphs.replayed > 10  # of 16, 14 and 8: forward, backward, forward alone


def test_answers_of_whole_batches_are_bit_for_bit_the_networks(net: nn.Module) -> None:
    graphs = Graphs()
    replayed = Replayed(net, graphs, 16, pad=False)
    for number in (16, 16, 16, 16, 5, 16, 17):
        image = images(number)
        assert torch.equal(replayed(image), net(image))
    assert graphs.replayed == 2


def test_a_backward_finds_its_activations_though_other_replays_came_between(net: nn.Module) -> None:
    replayed = Replayed(net, Graphs(), 16)
    recorded(replayed, 16)
    first, second = images(16).requires_grad_(), images(16).requires_grad_()
    one, other = replayed(first), replayed(second)
    with torch.no_grad():
        one.clone()
    upstream = torch.randn(16, 10)
    for image, logits in ((first, one), (second, other)):
        for _ in range(2):  # twice, as FAB asks for the gradient of each class
            (grad,) = torch.autograd.grad(logits, image, upstream, retain_graph=True)
            torch.testing.assert_close(grad, gradient(net, image.detach(), upstream)[1], **CLOSE)


def test_logits_may_be_overwritten_and_kept(net: nn.Module) -> None:
    replayed = Replayed(net, Graphs(), 8)
    recorded(replayed, 8, asked=False)
    image = images(8)
    with torch.no_grad():
        logits = replayed(image)
        kept = logits.clone()
        replayed(images(8))
        assert torch.equal(logits, kept)
        logits.fill_(0)
        assert torch.equal(replayed(image), kept)


def test_a_network_whose_images_know_of_each_other_is_not_padded(net: nn.Module) -> None:
    class Centred(nn.Module):
        def forward(self, image: Tensor) -> Tensor:
            logits = net(image)
            return logits - logits.mean(0)

    graphs = Graphs()
    replayed, network = Replayed(Centred(), graphs, 16), Centred()
    for _ in range(6):
        image = images(11)
        assert torch.equal(replayed(image), network(image))
    assert graphs.recorded == 0
    recorded(replayed, 16, asked=False)
    assert graphs.recorded == 1


def test_a_network_that_cannot_be_recorded_answers_and_one_line_says_so(net: nn.Module, capsys: Any) -> None:
    def never(work: Callable[[], Tensor]) -> Any:
        raise RuntimeError("operation not permitted")

    replayed = Replayed(net, never, 8)
    for _ in range(6):
        image = images(8)
        upstream = torch.randn(8, 10)
        assert torch.equal(gradient(replayed, image, upstream)[1], gradient(net, image, upstream)[1])
    assert capsys.readouterr().err == "note: the network runs without a CUDA graph: operation not permitted\n"


@pytest.mark.parametrize("most", [1, 5, 8, 100, 128, 256])
def test_little_is_padding(most: int) -> None:
    sizes = eighths(most)
    assert sizes[-1] == most and list(sizes) == sorted(set(sizes)) and len(sizes) < 25
    for number in range(LEAST, most + 1):
        size = min(size for size in sizes if size >= number)
        assert size <= max(LEAST, 1.25 * number + 1)


@pytest.fixture(scope="module")
def digits() -> Split:
    return load_split("digits", "test", None, None)


@pytest.mark.parametrize("name", ["clean", "pgd20", "cw"])
def test_an_evaluation_has_the_same_answers(
    name: str, net: nn.Module, digits: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs, order = Graphs(), balanced_order(digits.labels, 52)
    options: dict[str, Any] = dict(eps=0.1, device=CPU, indices=order, batch_size=8)
    wanted = predictions(net, digits, ATTACKS[name], **options)
    monkeypatch.setattr("retemper.engine.predict.graphs_for", lambda *_: graphs)
    assert torch.equal(predictions(net, digits, ATTACKS[name], capture=True, **options), wanted)
    assert graphs.recorded == (1 if name == "clean" else 2)
    assert torch.equal(predictions(net, digits, ATTACKS[name], **options), wanted)


def test_autoattack_has_the_same_verdicts(
    net: nn.Module, digits: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("pyautoattack")
    whole = autoattack.library_attacks

    def shortened(*words: Any) -> dict[str, Any]:
        attacks = whole(*words)
        for name in ("apgd-ce", "apgd-t"):
            attacks[name].n_iter = 6
        attacks["apgd-t"].n_target_classes = attacks["fab-t"].n_target_classes = 2
        attacks["fab-t"].n_iter, attacks["square"].n_queries = 5, 30
        return attacks

    monkeypatch.setattr(autoattack, "library_attacks", shortened)
    torch.manual_seed(1)
    order, graphs = balanced_order(digits.labels, 40), Graphs()
    own_N = predictions(net, digits, ATTACKS["clean"], eps=0, device=CPU).numpy()
    labels = replace(digits, labels=own_N)  # those that the network, which is not trained, gives

    def verdicts(folder: str, capture: bool = True) -> np.ndarray:
        path = tmp_path / folder
        path.mkdir()
        facts = {"eps": EPS, "seed": 0}
        ledger = Ledger.begin(path / "autoattack.csv", facts, order, labels.labels[order])
        assert run_suite(net, labels, SuiteRequest(eps=EPS, device=CPU, batch_size=16, capture=capture), ledger)
        return ledger.predicted_under(STANDARD)

    wanted = verdicts("eager")
    monkeypatch.setattr(autoattack, "graphs_for", lambda *_: graphs)
    assert np.array_equal(verdicts("off", capture=False), wanted) and graphs.recorded == 0
    assert np.array_equal(verdicts("replayed"), wanted)
    assert graphs.recorded >= 6 and graphs.replayed > 100
    right = (wanted == labels.labels[order]).mean()
    assert 0.1 < right < 0.95  # some hold, some do not
