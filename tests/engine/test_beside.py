"""The teacher beside the attack: the same bits, and no method reads an answer that may not be there yet."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from retemper.engine import State, create_model, train_step
from retemper.engine.catalogue import find_setting, method_module, methods
from retemper.engine.models import channels_last
from retemper.engine.speed.beside import Awaiting, Branch

CPU = torch.device("cpu")
METHODS = [method for method in methods() if "digits" in method_module(method).SETTINGS]


class Late(Branch):
    """A branch whose results are there when it is joined, and NaN before."""

    def __init__(self) -> None:
        super().__init__(CPU, apart=True)
        self.late: list[tuple[Tensor, Tensor]] = []
        self.runs = 0

    def run(self, work: Callable[[], Tensor]) -> Tensor:
        result = work()
        self.late.append((torch.full_like(result, torch.nan), result))
        self.pending, self.runs = True, self.runs + 1
        return self.late[-1][0]

    def join(self) -> None:
        for shown, result in self.late:
            shown.copy_(result)
        self.late, self.pending = [], False


def trained(method: str, branch: Branch) -> list[Tensor]:
    """Return the losses and the weights of two steps with the teachers' answers from `branch`."""
    torch.manual_seed(0)
    recipe = find_setting(f"{method}:digits")[2].recipe.replace(attack_steps=2, precision="fp32")
    one, two = (channels_last(create_model("tiny_resnet", 10), CPU).eval().requires_grad_(False) for _ in range(2))
    teachers = one if recipe.networks.teacher_model else None, two if recipe.networks.clean_teacher_model else None
    peer = create_model("tiny_resnet", 10) if recipe.method.trains_peer else None
    state = State(recipe, create_model("tiny_resnet", 10), teachers[0], 10, CPU, teachers[1], peer=peer)
    state.beside = branch
    clean, label = torch.rand(8, 1, 8, 8), torch.arange(8)
    losses = [train_step(state, recipe, clean, label) for _ in range(2)]
    assert not branch.pending
    return [torch.stack(losses), *state.student.state_dict().values()]


@pytest.mark.parametrize("method", METHODS)
def test_what_is_late_is_read_by_no_method_too_soon(method: str) -> None:
    late = Late()
    for one, other in zip(trained(method, Branch(CPU, apart=False)), trained(method, late), strict=True):
        assert torch.equal(one, other) and one.isfinite().all()
    recipe = method_module(method).SETTINGS["digits"].recipe
    asked = [recipe.networks.teacher_model and recipe.method.teacher_sees]
    asked += [recipe.networks.clean_teacher_model and recipe.method.clean_teacher_sees]
    asked += [recipe.method.average_sees, ("clean",) * recipe.method.trains_peer]
    wanted = 2 * sum("clean" in (images or ()) for images in asked)
    assert late.runs == wanted, "a teacher, the average or the peer, and a step"


def test_an_attack_on_the_labels_does_not_wait_for_the_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    awaited = []
    monkeypatch.setattr(
        "retemper.engine.maximise.Awaiting", lambda make, branch: awaited.append(make) or Awaiting(make, branch)
    )
    trained("ard", Late())
    assert not awaited
    trained("rslad", Late())
    assert len(awaited) == 2


def test_on_a_cpu_work_beside_is_done_on_the_spot() -> None:
    branch = Branch(CPU, apart=True)
    assert float(branch.run(lambda: torch.ones(()))) == 1 and not branch.pending
    branch.join()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_branch_is_captured_and_joined() -> None:
    branch, x = Branch(torch.device("cuda"), apart=True), torch.ones(8, device="cuda")
    for _ in range(2):
        branch.run(lambda: x + 1)
        branch.join()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        beside = branch.run(lambda: x + 1)
        here = x * 3
        branch.join()
        total = beside + here
    graph.replay()
    assert total.shape == x.shape and not branch.pending
