"""Several processes train and evaluate as one does; where no launcher is tried, they are forks of this process."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.distributed_c10d import _set_pg_timeout

from retemper.cli import run
from retemper.engine import EpochStats, State, create_model, train_step
from retemper.engine.catalogue import find_setting
from retemper.engine.device import is_out_of_memory
from retemper.engine.distributed.join import join
from retemper.engine.distributed.pulse import Pulse, pulse_of
from retemper.engine.distributed.ranks import ALONE, RankLost, Ranks
from retemper.engine.models import normalising
from retemper.engine.run.state_file import unpack
from retemper.engine.speed.capture import captured
from retemper.engine.speed.fold import Folded
from retemper.errors import UsageError
from retemper.loaders import ViewSpace, convert, make_loader, split_of_arrays

Start = Callable[..., Any]
STEPS = 14  # an epoch
ROOT, BIN = Path(__file__).parent.parent.parent, Path(sys.executable).parent
CPU = torch.device("cpu")
SHORT = (  # 868 images in batches of 64
    "--device cpu --epochs 2 --attack-steps 2 --holdout-per-class 33 --select-steps 2 --batch-size 64 "
    "--select-every 1 --select-from 1 --average ema --ema-decay 0.9"
).split()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def places(rank: int, world_size: int, port: int) -> dict[str, str]:
    """Return the variables that a launcher sets for each process."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port}
    return {name: str(number) for name, number in numbers.items()} | {"MASTER_ADDR": "127.0.0.1"}


def start_both(start: Start, *words: object, at: dict[int, dict[int, Any]] | None = None) -> list[Any]:
    """Start `retemper WORDS` in two processes; `at` holds what each does just before a step, by its number."""
    port, at = free_port(), at or {}
    each = [places(rank, 2, port) for rank in range(2)]
    return [
        start(*words, at=at.get(rank), prepare=lambda own=own: os.environ.update(own)) for rank, own in enumerate(each)
    ]


def forked(world_size: int, work: Callable[[], object]) -> list[int]:
    """The exit codes of so many processes that each do `work` and leave with what it gives."""
    port, pids = free_port(), []
    for rank in range(world_size):
        pids.append(os.fork())
        if not pids[-1]:
            code: Any = 99
            try:
                os.environ.update(places(rank, world_size, port))
                code = work()
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def in_processes(world_size: int, work: Callable[[Ranks], Any], folder: Path) -> list[Any]:
    """Return the result of `work` in each process of a group of this size."""

    def meet() -> int:
        ranks = join(CPU)
        torch.save(work(ranks), folder / f"{ranks.rank}.pt")
        return 0

    assert forked(world_size, meet) == [0] * world_size
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world_size)]


def lines(folder: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: line[key] for key in line.keys() - {"seconds", "images_per_second", "peak_memory_mib"}} for line in found
    ]


def require_same(one: Path, two: Path) -> None:
    """Check that two runs' weights, best weights, metrics and training state are equal."""
    for name in ("last.safetensors", "best.safetensors"):
        torch.testing.assert_close(load_file(one / name), load_file(two / name), rtol=0, atol=0)
    assert lines(one) == lines(two)
    states = [unpack(folder / "last.state") for folder in (one, two)]
    assert [state.pop("seconds") for state in states] == [0, 0]
    torch.testing.assert_close(*states, rtol=0, atol=0)


def position(folder: Path) -> tuple[int, int]:
    state = unpack(folder / "last.state")
    return state["epoch"], state["step"]


# the same steps


class Plain(nn.Module):
    """A network without batch statistics."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, width, 3, stride=2), nn.Linear(9 * width, 10)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(torch.tanh(self.conv(image)).flatten(1))


METHODS: dict[str, dict[str, Any]] = {  # all that is done with a batch as a whole, and what goes beside the gradient
    "absld": dict(igdm=1.0),
    "mtard": {},
    "b_mtard": {},
    "fair_rslad": dict(normalise=True, average="swa"),
    "frl": {},
    "faal": {},
    "rslad": dict(awp_gamma=0.01, average="ema", ema_decay=0.9),
    "bat": dict(attack_start="uniform"),
    "peeraid": dict(average_from=2),
    "saad": dict(clean_weight=0.5, average_from=1, average_every="step"),
}
SIZES = [12, 12, 2]  # of batches: of three processes one has nothing of the last


def trained(ranks: Ranks) -> dict[str, Any]:
    """Train two epochs of each method in float64; return losses, weights and class state."""
    found = {}
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.rand(n, 1, 8, 8, generator=generator).double(), torch.arange(n) * 7 % 10) for n in SIZES]
    for method, fields in METHODS.items():
        recipe = find_setting(f"{method}:digits")[2].recipe.replace(attack_steps=2, fold=False, lr=0.3, **fields)
        torch.manual_seed(1)
        student, *teachers = (Plain(width).double() for width in (6, 8, 8))
        student = normalising(student, "digits") if recipe.networks.normalise else student
        wanted = recipe.networks.teacher_model, recipe.networks.clean_teacher_model
        teacher, clean_teacher = (one if name else None for one, name in zip(teachers, wanted, strict=True))
        peer = Plain(8).double() if recipe.method.trains_peer else None
        state = State(recipe, student, teacher, 10, CPU, clean_teacher, ranks, peer)
        for name, value in state.class_state.items():
            state.class_state[name] = value.double()
        state.loss_sum = state.loss_sum.double()
        state.sums = {name: replace(sums, loss_K=sums.loss_K.double()) for name, sums in state.sums.items()}
        losses = []
        for epoch in (1, 2):
            state.start_epoch(recipe, epoch, epoch << 24)
            for clean, label in batches:
                own = slice(ranks.rank, None, ranks.world_size)
                state.part.take(len(label[own]), len(label))
                losses.append(train_step(state, recipe, clean[own].contiguous(), label[own].contiguous()))
            state.all_reduce()
            losses.append(state.loss_sum / sum(SIZES))
            if not recipe.method.validates_by:
                stats = EpochStats(forwards=state.sums, measured=state.measured)
                state.move_classes(recipe.method.next_class_state(state.class_state, stats, epoch, recipe))
        found[method] = {
            "losses": torch.stack(losses).double(),
            "weights": dict(state.trained.named_parameters()),
            "kept": state.kept.state_dict(),
            "classes": state.class_state,
            "counts": {name: sums.count_K for name, sums in state.sums.items()},
            "correct": {name: sums.correct_K for name, sums in state.sums.items()},
            "same": ranks.hold_same_bits(list(state.trained.parameters())),
        }
    return found


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the results of one process, and of three."""
    return trained(ALONE), in_processes(3, trained, tmp_path_factory.mktemp("steps"))


@pytest.mark.parametrize("method", METHODS)
def test_three_processes_do_the_steps_of_one(steps: tuple[dict[str, Any], list[dict[str, Any]]], method: str) -> None:
    """Losses, weights, averages and class state agree, in float64; an uneven last batch is included."""
    alone, each = steps[0][method], [found[method] for found in steps[1]]
    assert len(set(alone["losses"].tolist())) > 4 and alone["losses"].isfinite().all()
    for found in each:
        assert found["same"]
        torch.testing.assert_close(found["losses"], each[0]["losses"], rtol=0, atol=0)
        torch.testing.assert_close(found["classes"], each[0]["classes"], rtol=0, atol=0)
        for what in ("counts", "correct"):
            assert all(torch.equal(value, alone[what][name]) for name, value in found[what].items())
        for what in ("losses", "weights", "kept", "classes"):
            torch.testing.assert_close(found[what], alone[what], rtol=1e-10, atol=1e-10)


class Clock:
    """A store and the clock of two processes that share it."""

    def __init__(self) -> None:
        self.now, self.sums = 0.0, dict[str, int]()

    def add(self, key: str, number: int) -> int:
        self.sums[key] = self.sums.get(key, 0) + number
        return self.sums[key]


def test_one_that_is_busy_gives_signs_of_life_and_one_that_is_stopped_does_not() -> None:
    clock = Clock()
    first, second = (Pulse(clock, rank, 2, 10.0, lambda: clock.now) for rank in range(2))
    first.listen()
    for moment in range(100):
        clock.now = float(moment)
        second.beat()
        first.beat()
        assert first.silent() == []
    for moment in range(100, 121):  # the second one is stopped
        clock.now = moment - 0.5
        first.beat()
        assert first.silent() == ([] if moment < 110 else [1]), moment
    clock.now += 1000  # both were stopped: the limit begins anew
    assert first.silent() == []


def test_a_rank_that_is_stopped_is_named_and_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RETEMPER_RANK_TIMEOUT", "2")
    stopped = tmp_path / "stopped"

    def wait() -> int:
        ranks = join(CPU)
        if ranks.rank == 1:
            stopped.write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGSTOP)
            return 0
        try:
            ranks.barrier(patiently=True)
        except RankLost as error:
            (tmp_path / "said").write_text(str(error))
        os.kill(int(stopped.read_text()), signal.SIGKILL)
        return 0

    assert forked(2, wait) == [0, -signal.SIGKILL]
    said = (tmp_path / "said").read_text()
    assert said.startswith("process 1 of 2 has given no sign of life for 2 s (RETEMPER_RANK_TIMEOUT)"), said


@pytest.mark.parametrize(
    ("name", "value"),
    [("RETEMPER_RANK_TIMEOUT", "soon"), ("RETEMPER_RANK_TIMEOUT", "nan"), ("RANK", "7"), ("MASTER_PORT", "99999")],
)
def test_a_launchers_wrong_variable_is_told(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for one, number in (places(0, 2, 1) | {name: value}).items():
        monkeypatch.setenv(one, number)
    with pytest.raises(UsageError, match=f"{name}={value}"):
        join(CPU)


def test_a_rank_that_differs_is_told(tmp_path: Path) -> None:
    def differ(ranks: Ranks) -> list[bool]:
        one, two = torch.zeros(3), torch.tensor([float(ranks.rank), 0.0])
        return [
            ranks.hold_same_bits([one]),
            ranks.hold_same_bits([one, two]),
            ranks.any(False, ranks.rank == 1) == [False, True],
        ]

    assert in_processes(2, differ, tmp_path) == [[True, False, True]] * 2


def test_too_little_memory_is_not_taken_for_a_process_that_is_gone() -> None:
    ranks = Ranks(0, 2, True)
    with pytest.raises(RuntimeError) as error, ranks.checked():
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(error.value)
    with pytest.raises(RankLost, match="another of the 2 processes is gone"), ranks.checked():
        raise RuntimeError("[/gloo/pair.cc:589] Connection closed by peer")


def test_values_reach_all_processes(tmp_path: Path) -> None:
    def talk(ranks: Ranks) -> list[Any]:
        own = {"rank": ranks.rank, "tensor": torch.full((ranks.rank + 1,), 0.1)}
        ranks.barrier()
        return [ranks.broadcast(own), ranks.gather(own)]

    first, second = in_processes(2, talk, tmp_path)
    assert [one["rank"] for one in first[1]] == [0, 1] and second[1] == []
    assert [len(one["tensor"]) for one in first[1]] == [1, 2]
    assert first[0]["rank"] == second[0]["rank"] == 0 and torch.equal(second[0]["tensor"], torch.tensor([0.1]))


def test_no_process_leaves_before_all_have_joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def late(rank: int, *rest: Any) -> Pulse:
        """Come to the store last, when a process that does not wait is gone, and the store with it."""
        time.sleep(rank)
        return pulse_of(rank, *rest)

    monkeypatch.setattr("retemper.engine.distributed.join.pulse_of", late)
    assert in_processes(2, lambda ranks: ranks.rank, tmp_path) == [0, 1]


@pytest.mark.parametrize("kind", ["resident", "ffcv"])
def test_each_image_comes_once_an_epoch_in_one_of_two_processes(kind: Any, tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (131, 6, 5, 3), dtype=np.uint8)
    split = split_of_arrays("toy", "train", images, np.arange(131) % 10, tuple("0123456789"), "")
    if kind == "ffcv":
        pytest.importorskip("ffcv")
        convert(split, tmp_path / "toy.beton", progress=False)

    def visited(ranks: Ranks) -> list[list[list[int]]]:
        part: Any = dict(rank=ranks.rank, world_size=ranks.world_size)
        part["beton"] = tmp_path / "toy.beton" if kind == "ffcv" else None
        loader = make_loader(kind, split, batch_size=32, seed=3, views=ViewSpace(1, True), device=CPU, **part)
        found = []
        for epoch in (1, 2):
            batches = list(loader.epoch(epoch))
            assert all(torch.equal(batch.image, torch.from_numpy(images)[batch.index]) for batch in batches)
            found.append([batch.index.tolist() for batch in batches])
        return found

    one, two = in_processes(2, visited, tmp_path)
    for epoch in range(2):
        assert [len(batch) for batch in one[epoch]] == [16, 16, 16, 16, 2]
        assert [len(batch) for batch in two[epoch]] == [16, 16, 16, 16, 1]
        assert sorted(index for part in (one, two) for batch in part[epoch] for index in batch) == list(range(131))
    assert one[0] != one[1]


def test_synced_batch_norm_folds_like_the_local_one(device: torch.device) -> None:
    torch.manual_seed(0)
    model = create_model("tiny_resnet", 10).to(device)
    model(torch.rand(8, 1, 8, 8, device=device))
    image, model = torch.rand(4, 1, 8, 8, device=device), model.eval()
    folded = Folded(nn.SyncBatchNorm.convert_sync_batchnorm(model).eval())
    assert len(folded.folded) == len(Folded(model).folded) > 5
    torch.testing.assert_close(folded(image), model(image), rtol=1e-4, atol=1e-5)


# whole runs


@pytest.fixture(scope="module")
def words(teacher: Path) -> list[object]:
    return ["train", "absld:digits", *SHORT, "--teacher", teacher]


@pytest.fixture(scope="module")
def whole(words: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run of two processes."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert forked(2, lambda: run([str(word) for word in [*words, "--out", out]])) == [0, 0]
    return out


def test_two_processes_train_as_one_does(whole: Path, words: list[object], tmp_path: Path) -> None:
    """The global batch is the same; each has its own batch norm, whose statistics are of half as many images."""
    assert run([str(word) for word in [*words, "--out", tmp_path / "one"]]) == 0
    for two, one in zip(lines(whole), lines(tmp_path / "one"), strict=True):
        assert two["lr"] == one["lr"] and two["loss"] == pytest.approx(one["loss"], rel=0.1)
        assert two.keys() == one.keys()
    assert json.loads((whole / "config.json").read_text())["processes"] == 2
    state = unpack(whole / "last.state")
    assert state["world_size"] == 2 and state["step"] == 0
    first, second = (own["statistics"] for own in state["processes"])
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    weights = load_file(whole / "last.safetensors")
    for name, value in first.items():
        if name.startswith("kept."):
            assert torch.equal(value, weights[name.removeprefix("kept.")]), name


def test_two_processes_keep_what_each_saw_of_the_images(tmp_path: Path) -> None:
    """One-step attacks from what is kept: the guard agrees, rows meet in one file, and a resume changes no bit."""
    words = ["train", "sat:digits_student", *SHORT, "--attack", "pgi"]
    out, cut = tmp_path / "whole", tmp_path / "cut"
    assert forked(2, lambda: run([str(word) for word in [*words, "--out", out]])) == [0, 0]
    assert all(line["guard"].keys() == {"attack", "own", "pgd10", "next"} for line in lines(out))
    state, prior = unpack(out / "last.state"), unpack(out / "prior-2-0.state")
    assert state["prior"] is True
    moved = prior["momentum"].flatten(1).ne(0).any(1)  # an image that no process had written of would be as at first
    assert moved.sum() == 868
    for more in ("--max-steps=20", "--max-steps=1000"):
        assert forked(2, lambda more=more: run([str(word) for word in [*words, "--out", cut, more]])) == [0, 0]
    for name, value in unpack(cut / "prior-2-0.state").items():
        assert torch.equal(value, prior[name])
    require_same(out, cut)


def test_one_that_is_killed_ends_the_other(
    whole: Path, words: list[object], start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    command = [*words, "--out", out, "--cache", tmp_path / "cache", "--save-every", 0]
    for killed in (1, 0):
        both = start_both(start, *command, at={killed: {4: signal.SIGKILL}})
        code, said = both[1 - killed].wait()
        assert code == 3 and "Traceback" not in said
        last = said.splitlines()[-1]
        assert last.startswith(f"retemper: error: process {1 - killed} of 2: another of the 2 processes is gone"), said
    assert run([str(word) for word in command]) == 2
    assert "within an epoch, on 2 processes: start as many again" in capsys.readouterr().err
    assert [process.wait()[0] for process in start_both(start, *command)] == [0, 0]
    require_same(whole, out)


def soon_out_of_patience() -> None:
    """Have this process wait for the others for two seconds from now on."""
    _set_pg_timeout(timedelta(seconds=2), dist.group.WORLD)


def test_one_that_stalls_is_not_waited_for_and_one_process_may_go_on_between_epochs(
    words: list[object], start: Start, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    command = [*words, "--out", out, "--save-every", 1000]
    second = STEPS + 1  # the first step of the second epoch; how long the first epoch takes is no matter
    both = start_both(start, *command, at={0: {second: soon_out_of_patience}, 1: {second: signal.SIGSTOP}})
    code, said = both[0].wait()
    assert code == 3 and "is gone or has stalled" in said.splitlines()[-1], said
    both[1].send(signal.SIGKILL)
    assert position(out) == (1, 0)
    assert run([str(word) for word in command]) == 0
    assert unpack(out / "last.state")["world_size"] == 1 and [line["epoch"] for line in lines(out)] == [1, 2]


def test_a_signal_to_one_has_both_save_and_leave(
    whole: Path, words: list[object], start: Start, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    command = [*words, "--out", out, "--cache", tmp_path / "cache", "--save-every", 0]
    both = start_both(start, *command, at={1: {4: signal.SIGTERM}})
    assert both[1].wait()[0] == 75
    code, said = both[0].wait()
    assert code == 75 and said.splitlines()[-1].startswith("retemper: interrupted; saved at "), said
    assert both[1].log.read_text() == "", "the first one speaks"
    assert [process.wait()[0] for process in start_both(start, *command)] == [0, 0]
    require_same(whole, out)


@pytest.mark.parametrize(
    ("wrong", "code", "line"),
    [
        (["--batch-size", "63"], 2, "a batch of 63 does not divide among 2 processes"),
        (["--batch-norm", "synced"], 2, "PyTorch has it on GPUs alone"),
        (["--device", "cuda:0"], 2, "every process takes the GPU of its number"),
        (["--lr", "1e30"], 4, "the loss is nan at epoch 1, step 2"),
    ],
    ids=["batch", "synced", "device", "diverged"],
)
def test_each_process_says_what_is_wrong(
    wrong: list[str], code: int, line: str, words: list[object], start: Start, tmp_path: Path
) -> None:
    both = start_both(start, *words, *wrong, "--out", tmp_path / "run", "--teacher-ahead", 0)
    for rank, process in enumerate(both):
        found, said = process.wait()
        last = said.splitlines()[-1]
        assert found == code and last.startswith(f"retemper: error: process {rank} of 2: ") and line in last, said
    if code == 4:
        first, second = (torch.load(tmp_path / "run" / f"diverged{n}.pt", weights_only=True) for n in ("", ".rank1"))
        assert first["step"] == second["step"] == 2
        assert not set(first["index"].tolist()) & set(second["index"].tolist())


def test_two_processes_give_the_verdicts_of_one(whole: Path, start: Start, tmp_path: Path) -> None:
    command = ["evaluate", whole, "--attacks", "clean,pgd20", "--limit", 200, "--batch-size", 64, "--device", "cpu"]
    assert run([str(word) for word in [*command, "--out", tmp_path / "one"]]) == 0
    both = start_both(start, *command, "--out", tmp_path / "two")
    assert [process.wait()[0] for process in both] == [0, 0], both[1].wait()[1]
    one, two = (json.loads((tmp_path / name / "evaluation.json").read_text()) for name in ("one", "two"))
    for name in ("clean", "pgd20"):
        assert one["attacks"][name].pop("seconds") and two["attacks"][name].pop("seconds")
    assert one == two
    tables = [(tmp_path / name / "evaluation.csv").read_text() for name in ("one", "two")]
    assert tables[0] == tables[1] and len(tables[0].splitlines()) > 200


def test_two_processes_share_autoattack_out(teacher: Path, start: Start, tmp_path: Path) -> None:
    pytest.importorskip("pyautoattack")
    command = ["evaluate", teacher, "--attacks", "autoattack", "--suite", "fast", "--device", "cpu"]
    both = start_both(start, *command, "--limit", 8, "--batch-size", 4, "--out", tmp_path)
    assert [process.wait()[0] for process in both] == [0, 0], both[1].wait()[1]
    content = json.loads((tmp_path / "evaluation.json").read_text())
    assert content["protocol"]["attacks"]["autoattack-fast"]["shards"] == 2
    assert sum(content["attacks"]["autoattack-fast"]["count"]) == 8
    assert len(list(tmp_path.glob("autoattack-?-of-2.csv"))) == 2


LEAVING = """
import os, runpy, signal, sys, time
from itertools import count
from retemper import interrupts
from retemper.engine.run import steps

train_step, number = steps.train_step, count(1)

def watched(*words, **options):
    if next(number) == 4 and os.environ["RANK"] == "0":
        os.kill(os.getppid(), signal.SIGTERM)
        while not interrupts.asked():  # torchrun tells its processes
            time.sleep(0.01)
    return train_step(*words, **options)

steps.train_step = watched
runpy.run_path("recipes/absld.py", run_name="__main__")
"""  # the recipe's script, with a signal to torchrun before its fourth step


def launch(log: Path, *words: object) -> subprocess.Popen[bytes]:
    """Start torchrun as users do."""
    variables = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [str(BIN / "torchrun"), *map(str, words)]
    with open(log, "w") as file:
        return subprocess.Popen(command, cwd=ROOT, env=variables, stdout=file, stderr=subprocess.STDOUT)


def test_torchrun_is_left_by_a_signal_and_goes_on_from_two_hosts(
    whole: Path, words: list[object], tmp_path: Path
) -> None:
    """A run of two processes on one machine is stopped, and resumed by two machines with one process each."""
    out, logs = tmp_path / "run", [tmp_path / f"log{n}" for n in range(3)]
    options = [*words[2:], "--out", out, "--cache", tmp_path / "cache", "--save-every", 0]
    (tmp_path / "leaving.py").write_text(LEAVING)
    script = [tmp_path / "leaving.py", "digits"]
    first = launch(logs[0], "--nproc-per-node", 2, "--master-port", free_port(), *script, *options)
    first.wait(600)
    said = logs[0].read_text()
    assert said.count("retemper: interrupted; saved at ") == 1 and "retemper: error" not in said, said
    assert position(out) == (0, 4)
    port = free_port()
    hosts = [
        launch(
            logs[1 + node],
            *("--nnodes", 2, "--node-rank", node, "--master-addr", "127.0.0.1", "--master-port", port),
            *("--no-python", BIN / "retemper", "train", "absld:digits", *options),
        )
        for node in range(2)
    ]
    assert [host.wait(600) for host in hosts] == [0, 0], logs[1].read_text()
    require_same(whole, out)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_graph_holds_the_call_to_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL with a single process: the bucket, its all-reduce and the update, eager and captured, to the same bits."""
    device = torch.device("cuda", 0)
    for name, value in places(0, 1, free_port()).items():
        monkeypatch.setenv(name, value)
    ranks = join(device)
    assert ranks.joined
    recipe = find_setting("absld:cifar10_resnet18")[2].recipe.replace(student="tiny_resnet", attack_steps=2)
    image = torch.rand(32, 1, 8, 8, device=device).contiguous(memory_format=torch.channels_last)
    label = torch.arange(32, device=device) % 10

    def losses(capture: bool, ranks: Ranks) -> list[Tensor]:
        torch.manual_seed(0)
        student, teacher = create_model("tiny_resnet", 10), create_model("tiny_resnet", 10).to(device).eval()
        state = State(recipe, student, teacher, 10, device, None, ranks)
        state.start_epoch(recipe, 1, 0)

        def step(clean: Tensor, label: Tensor) -> Tensor:
            return train_step(state, recipe, clean, label)

        taken = captured(step) if capture else step
        return [taken(image, label) for _ in range(8)]

    eager, replayed, alone = losses(False, ranks), losses(True, ranks), losses(False, ALONE)
    torch.distributed.destroy_process_group()
    assert torch.equal(torch.stack(eager), torch.stack(replayed))
    torch.testing.assert_close(torch.stack(eager), torch.stack(alone), rtol=1e-3, atol=1e-3)
