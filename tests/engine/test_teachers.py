"""Teachers and starts that are trained first: they follow what the user changed, and are found again."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from retemper.engine.catalogue import find_setting, override
from retemper.engine.checkpoints.weights import save_weights
from retemper.engine.run import teachers
from retemper.engine.run.commands import train_again
from retemper.engine.run.job import Job
from retemper.engine.run.run_folder import RunFolder
from retemper.errors import UsageError


def job_of(name: str, out: Path, **texts: str) -> Job:
    method, setting, found = find_setting(name)
    recipe = override(found.recipe, texts)
    return Job(method=method, setting=setting, recipe=recipe, out=out, cache=out, device=torch.device("cpu"), seed=3)


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """The jobs that would have been trained; each leaves a finished run. The working directory is empty."""
    jobs: list[Job] = []

    def finish(job: Job) -> Path:
        jobs.append(job)
        job.out.mkdir(parents=True)
        root = None if job.data_root is None else str(job.data_root.absolute())
        said = {"method": job.method, "setting": job.setting, "recipe": job.recipe.grouped(), "seed": job.seed}
        RunFolder(job.out).config.write_text(json.dumps(said | {"classes": [], "teacher": None, "data_root": root}))
        for path in (RunFolder(job.out).best, RunFolder(job.out).last):
            save_weights(path, {"weight": torch.zeros(1)}, {"epoch": str(job.recipe.optim.epochs)})
        return job.out

    monkeypatch.setattr(teachers, "train", finish)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return jobs


def test_the_teacher_sees_the_students_images_and_radius(trained: list[Job], tmp_path: Path) -> None:
    texts = {"dataset": "folder", "image_size": "16", "eps": "0.3", "padding": "0", "epochs": "1"}
    job = replace(job_of("absld:fashion_mnist_small", tmp_path / "run", **texts), data_root=tmp_path / "pets")
    found = teachers.with_teacher(job)
    assert found.teacher == tmp_path / "sat-fashion_mnist_small-seed0-folder-pets-px16-padding0-eps0.3"
    (first,) = trained
    changed = dict(dataset="folder", image_size=16, eps=0.3, padding=0)
    assert first.recipe == find_setting("sat:fashion_mnist_small")[2].recipe.replace(**changed)
    assert (first.out, first.seed, first.data_root) == (found.teacher, 0, tmp_path / "pets")
    assert teachers.with_teacher(job).teacher == found.teacher and len(trained) == 1
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(UsageError, match=r"pets, not .*elsewhere/pets: name another --out or --teacher"):
        teachers.with_teacher(replace(job, data_root=tmp_path / "elsewhere" / "pets"))


def test_every_network_that_is_trained_first_follows(trained: list[Job], tmp_path: Path) -> None:
    found = teachers.with_teacher(job_of("mtard:digits", tmp_path / "a", eps="8/255"))
    assert found.teacher == tmp_path / "sat-digits-seed0-eps8_255"
    assert found.clean_teacher == tmp_path / "sat-digits_clean-seed0-eps8_255"
    start = teachers.with_teacher(job_of("faal:digits", tmp_path / "b", images_per_class="20")).start
    assert start == tmp_path / "sat-digits_student-seed0-perclass20"
    assert [job.recipe.attack.eps for job in trained] == [8 / 255, 8 / 255, 0.15]
    tail = teachers.with_teacher(job_of("absld:digits", tmp_path / "c", imbalance="10")).teacher
    assert tail == tmp_path / "sat-digits-seed0-tail10" and trained[-1].recipe.data.imbalance == 10


def test_how_images_are_varied_is_followed(trained: list[Job], tmp_path: Path) -> None:
    found = teachers.with_teacher(job_of("absld:digits", tmp_path / "run", padding_mode="reflect"))
    assert found.teacher == tmp_path / "sat-digits-seed0-reflect"
    assert trained[0].recipe.data.padding_mode == "reflect"


def test_what_the_user_left_alone_stays_the_teachers_own(trained: list[Job], tmp_path: Path) -> None:
    found = teachers.with_teacher(job_of("absld:digits", tmp_path / "run", epochs="1", attack_steps="2"))
    assert found.teacher == tmp_path / "sat-digits-seed0"
    assert trained[0].recipe == find_setting("sat:digits")[2].recipe


def test_a_finished_teacher_is_found_in_runs_if_it_agrees(trained: list[Job], tmp_path: Path) -> None:
    teachers.with_teacher(job_of("absld:digits", Path("runs/first")))
    usual = Path("runs/sat-digits-seed0")
    assert teachers.with_teacher(job_of("absld:digits", tmp_path / "far" / "run")).teacher == usual
    assert len(trained) == 1
    config = json.loads((usual / "config.json").read_text())
    config["recipe"]["attack"]["eps"] = 0.2
    (usual / "config.json").write_text(json.dumps(config))
    assert (
        teachers.with_teacher(job_of("absld:digits", tmp_path / "far" / "run")).teacher == tmp_path / "far" / usual.name
    )
    assert len(trained) == 2


def test_the_command_for_a_teacher_that_takes_days_has_what_was_changed(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"train trades:cifar10_wrn34_10 --eps 4/255 --out \S*-seed0-eps4_255$"):
        teachers.with_teacher(job_of("absld:cifar10_resnet18", tmp_path / "run", eps="4/255"))


def test_a_published_teacher_is_named_and_not_trained(trained: list[Job], tmp_path: Path) -> None:
    job = job_of("adaad:cifar10_resnet18_authors_teacher", tmp_path / "run")
    assert teachers.with_teacher(job).teacher == "robustbench:Chen2021LTD_WRN34_20@cifar10/Linf" and not trained
    own = replace(job, teacher=tmp_path / "own.pt")
    assert teachers.with_teacher(own).teacher == tmp_path / "own.pt"


def test_a_start_is_the_students_network(trained: list[Job], tmp_path: Path) -> None:
    texts = {"student": "tiny_resnet_wide", "normalise": "true"}
    found = teachers.with_teacher(job_of("faal:digits", tmp_path / "run", **texts))
    assert found.start == tmp_path / "sat-digits_student-seed0-tiny_resnet_wide-normalisetrue"
    assert (trained[0].recipe.networks.student, trained[0].recipe.networks.normalise) == ("tiny_resnet_wide", True)
    assert teachers.with_teacher(job_of("absld:digits", tmp_path / "other", **texts)).teacher == (
        tmp_path / "sat-digits-seed0"  # a teacher goes its own way
    )
    long = r"train sat:cifar10_preact_resnet18 --student preact_resnet18_frl --out \S*-preact_resnet18_frl$"
    with pytest.raises(UsageError, match=f"name a preact_resnet18_frl checkpoint with --start, .*{long}"):
        teachers.with_teacher(job_of("frl:cifar10_preact_resnet18", tmp_path / "c", student="preact_resnet18_frl"))


@pytest.fixture
def other_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the authors' code of ABSLD have another teacher than its paper."""
    options = {"released": dict(teacher_model="tiny_resnet", teacher_recipe="sat:digits_student")}
    monkeypatch.setattr(type(find_setting("absld:digits")[2].recipe.method), "variant_options", options)


@pytest.mark.usefixtures("other_teacher")
def test_a_variant_may_have_a_teacher_of_its_own(trained: list[Job], tmp_path: Path) -> None:
    job = job_of("absld:digits", tmp_path / "run", variant="released", eps="0.3")
    assert teachers.with_teacher(job).teacher == tmp_path / "sat-digits_student-seed0-eps0.3"
    assert (trained[0].recipe.networks.student, trained[0].recipe.attack.eps) == ("tiny_resnet", 0.3)
    paper = job_of("absld:digits", tmp_path / "paper")
    assert teachers.with_teacher(paper).teacher == tmp_path / "sat-digits-seed0"


@pytest.mark.usefixtures("other_teacher")
def test_the_commands_of_a_variants_own_teacher_name_it(tmp_path: Path) -> None:
    job = job_of("absld:digits", tmp_path / "run", variant="released", train_teacher="false")
    with pytest.raises(UsageError, match=r"name a tiny_resnet checkpoint with --teacher, .* train sat:digits_student "):
        teachers.with_teacher(job)
    said = {"method": "absld", "setting": "digits", "recipe": job.recipe.flat(), "seed": 0}
    again = train_again(said, tmp_path)
    assert "--variant released" in again and "--train-teacher false" in again and "--teacher-" not in again


def test_a_teacher_of_the_students_size_may_take_the_place_of_the_settings(tmp_path: Path) -> None:
    texts = {"teacher_model": "resnet18", "teacher_recipe": "sat:cifar10_resnet18"}  # as IAD's own
    said = r"iad:cifar10_resnet18 needs a teacher: name a resnet18 checkpoint .* train sat:cifar10_resnet18 --out "
    with pytest.raises(UsageError, match=said):
        teachers.with_teacher(job_of("iad:cifar10_resnet18", tmp_path / "run", **texts))
