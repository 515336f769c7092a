"""The verbs of the command line: what each does with the words that the user gave."""

import os
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from retemper.console import say
from retemper.errors import UsageError, nearest
from retemper.index import read_index
from retemper.options import read_options, shown_value

PROTOCOLS = {  # of an evaluation, with their attacks: those of retemper.engine.evaluation.protocols
    "standard": ("clean", "fgsm", "pgd20", "cw", "autoattack"),
    "fair-ard": ("clean", "fgsm", "pgd20", "cw", "autoattack"),
    "rslad": ("clean", "fgsm", "pgd-sat", "pgd-trades", "cw", "autoattack"),
}
OTHERS = {"standard": ("fmn",)}  # attacks that come with a protocol and are not run unless they are named


def train(arguments: Namespace) -> None:
    """Train one run; every option of the recipe can be set (--epochs 5, --eps 8/255)."""
    known = {name: one for name, (_, one) in read_index().find(arguments.METHOD_SETTING).options.items()}
    texts = {name: text for name, text in vars(arguments).items() if name in known}
    read_options(known, texts)  # before PyTorch is imported, which takes seconds

    from retemper.engine.catalogue import find_setting, override
    from retemper.engine.distributed.join import joined
    from retemper.engine.run.job import Job, default_cache, default_out
    from retemper.engine.run.teachers import with_teacher
    from retemper.engine.run.train import train as train_job

    method, name, setting = find_setting(arguments.METHOD_SETTING)
    recipe = override(setting.recipe, texts)
    for note in _notes(method, recipe, texts):
        say(f"note: {note}")
    if arguments.show:
        print("\n".join(f"{field:20} {value!r}" for field, value in recipe.flat().items()))
        return
    given = (
        "seed data_root extra teacher clean_teacher start beton tensorboard save_every max_steps deterministic".split()
    )
    with joined(arguments.device) as (ranks, device):
        job = Job(
            method=method,
            setting=name,
            recipe=recipe,
            out=arguments.out or default_out(method, name, arguments.seed, recipe.optim.preset),
            cache=arguments.cache or default_cache(),
            device=device,
            ranks=ranks,
            **{name: getattr(arguments, name) for name in given},
        )
        out = train_job(with_teacher(job))
    if ranks.is_first:
        print(out)


def _notes(method: str, recipe: Any, texts: Mapping[str, str]) -> Iterator[str]:
    """Yield what the user may not have meant with the options that are in `texts`."""
    if recipe.attack.kind == "pgd" and recipe.attack.step > recipe.attack.eps and "attack_step" not in texts:
        step, eps = shown_value(recipe.attack.step), shown_value(recipe.attack.eps)
        yield f"one step of the attack ({step}) is longer than eps ({eps}): --attack-step says how long it is"
    if recipe.attack.kind != "pgd":
        for name in ("attack_step", "attack_steps", "attack_start", "clip_start"):
            if name in texts:
                yield f"--attack {recipe.attack.kind} has its own steps and start, so --{_word(name)} changes nothing"
    if recipe.data.augment == "resized-crop":
        for name in sorted({"padding", "padding_mode"} & texts.keys()):
            yield f"--augment resized-crop pads nothing, so --{_word(name)} changes nothing"
    elif "crop_area" in texts:
        yield "--crop-area is of --augment resized-crop, so it changes nothing"
    if recipe.optim.ema_warmup and "ema_warmup" in texts and recipe.optim.average != "ema":
        yield "--ema-warmup is of --average ema, so it changes nothing"
    if "extra_on" in texts and not recipe.data.extra_fraction:
        yield "--extra-on is of --extra, so it changes nothing"
    if recipe.optim.optimizer == "adamw" and "lr" not in texts:
        yield f"AdamW at SGD's learning rate ({shown_value(recipe.optim.lr)}) seldom learns: --lr 0.001 is usual"
    if recipe.optim.label_smoothing and "label_smoothing" in texts and not recipe.method.smooths_labels():
        yield f"{method} has no labels in its loss, so --label-smoothing changes nothing"


def _word(name: str) -> str:
    """Return an option's flat name as one types it."""
    return name.replace("_", "-")


def evaluate(arguments: Namespace) -> None:
    """Attack a trained network and report by class."""
    attacks = _attacks(arguments)
    if arguments.check and arguments.shard:
        raise UsageError("--check is not for a shard: give it once, in a run without --shard")
    if arguments.corruptions and arguments.shard:
        raise UsageError("--corruptions is not for a shard: give it once, in a run without --shard")
    if arguments.shard and attacks != ("autoattack",):
        raise UsageError("--shard is for AutoAttack: give it with --attacks autoattack, the others in a run without it")

    from retemper.engine.checkpoints.header import Facts
    from retemper.engine.distributed.join import joined
    from retemper.engine.evaluation.consistency import consistency_lines
    from retemper.engine.evaluation.corrupted import corruption_table
    from retemper.engine.evaluation.curve_summary import beaten_lines, curve_summary
    from retemper.engine.evaluation.evaluate import EvaluationRequest, evaluate_target
    from retemper.engine.evaluation.review import review
    from retemper.engine.evaluation.summary import summary

    same = (
        "target out data_root limit weights batch_size seed suite fold autoattack_limit check shard eps protocol norm"
    )
    with joined(arguments.device) as (ranks, device):
        if arguments.shard and ranks.joined:
            raise UsageError("--shard is for separate commands: torchrun shares the images out itself")
        request = EvaluationRequest(
            **{name: getattr(arguments, name) for name in same.split()},
            capture=arguments.capture,
            corruptions=arguments.corruptions,
            cross_check=arguments.cross_check,
            attacks=attacks,
            device=device,
            ranks=ranks,
            facts=Facts(model=arguments.model, dataset=arguments.dataset),
            budget_s=arguments.budget and 60 * arguments.budget,
        )
        for asked in review(request) if arguments.review else (request,):
            path, content = evaluate_target(asked)
            if not ranks.is_first:
                continue
            print(curve_summary(content) if asked.is_curve else summary(content))
            if asked.corruptions:
                print(corruption_table(content))
            said = [*beaten_lines(content), *consistency_lines(content.get("consistency")), str(path)]
            print("\n".join(said), flush=True)


def _attacks(arguments: Namespace) -> tuple[str, ...]:
    """Return the attacks that are asked for: of no --attacks, all of the protocol but AutoAttack."""
    known = PROTOCOLS[arguments.protocol]
    if arguments.attacks is None:
        return known[:-1]
    known += OTHERS.get(arguments.protocol, ())
    attacks = tuple(name.strip() for name in arguments.attacks.split(",") if name.strip())
    if not attacks:
        raise UsageError(f"--attacks names none: choose of {', '.join(known)}")
    for name in attacks:
        if name not in known:
            raise UsageError(f"there is no attack {name!r}{_hint(name, known)}: choose of {', '.join(known)}")
    return attacks


def _hint(name: str, known: Sequence[str]) -> str:
    """Return in brackets what was meant: an attack of another protocol, or of this one, under another name."""
    for protocol, names in PROTOCOLS.items():
        attack = name.removesuffix(f"-{protocol}")
        if attack in names:
            return f" (--attacks {attack} is for --protocol {protocol})"
    return nearest(name, known)


def teacher(arguments: Namespace) -> None:
    """Check a teacher before students are trained: accuracy by class, soft labels, and a line of advice."""
    from retemper.engine.checkpoints.header import Facts
    from retemper.engine.device import pick_device
    from retemper.engine.teacher_check.check import TeacherRequest, check_teacher

    same = "target split out eps data_root limit batch_size seed"
    request = TeacherRequest(
        **{name: getattr(arguments, name) for name in same.split()},
        students=tuple(arguments.student),
        device=pick_device(arguments.device),
        facts=Facts(model=arguments.model, dataset=arguments.dataset),
    )
    path, said = check_teacher(request)
    print(said)
    print(path)


def even(arguments: Namespace) -> None:
    """Even the classes of a trained network, in two epochs or in none, into a run of its own."""
    if arguments.seed is not None and arguments.by not in ("csr", "plain"):
        raise UsageError("--seed is of a fine-tune: give it with --by csr or plain, nothing else is drawn")

    from retemper.engine.checkpoints.header import Facts
    from retemper.engine.device import pick_device
    from retemper.engine.even.even import even as even_network
    from retemper.engine.even.subject import EvenRequest

    same = "target by out data_root weights holdout seed".split()
    request = EvenRequest(
        **{name: getattr(arguments, name) for name in same},
        eps=None if arguments.eps == "trained" else arguments.eps,
        device=pick_device(arguments.device),
        facts=Facts(model=arguments.model, dataset=arguments.dataset),
    )
    out, table = even_network(request)
    print(table)
    print(out)


def report(arguments: Namespace) -> None:
    """Write one page and its plots for one or more runs."""
    from retemper.engine.report import write_report

    print(write_report(arguments.runs, arguments.out))


def compare(arguments: Namespace) -> None:
    """Compare two runs image by image; or with --out many methods, a row each, on one page."""
    if arguments.out is None:
        _compare_two(arguments)
        return
    if arguments.attack or arguments.json:
        given = "--attack" if arguments.attack else "--json"
        raise UsageError(f"{given} is for two runs: with --out every attack and number is in comparison.csv")

    from retemper.engine.report.methods import write_comparison

    runs = [Path(name) for name in arguments.runs]
    print(write_comparison(runs, arguments.out, arguments.against, other_data=arguments.other_data))


def _compare_two(arguments: Namespace) -> None:
    """Print the differences of two runs, or of the seeds of two recipes, on the same images."""
    if arguments.against or arguments.other_data:
        raise UsageError("--against and --other-data are for the page of many methods: name its folder with --out")
    if len(arguments.runs) != 2:
        known = f"not {len(arguments.runs)}; --out DIR makes a page of any number"
        raise UsageError(f"compare takes two runs, several seeds as A1,A2,A3 B1,B2,B3, {known}")

    from dataclasses import asdict

    from retemper.engine.evaluation.compare import as_text
    from retemper.engine.evaluation.compare import compare as compare_runs
    from retemper.engine.evaluation.verdicts import read_evaluated
    from retemper.files import finite, write_json

    a, b = ([read_evaluated(Path(name), name) for name in side.split(",")] for side in arguments.runs)
    found = compare_runs(a, b, arguments.attack)
    if arguments.json:
        write_json(arguments.json, finite(asdict(found)))
    print(as_text(found))


def export(arguments: Namespace) -> None:
    """Write a run's network for others: with a model card, or as RobustBench asks."""
    from retemper.engine.export.export import export as export_run

    print(export_run(arguments.run, arguments.out, arguments.format, arguments.weights, arguments.name))


def convert(arguments: Namespace) -> None:
    """Write a data set as an FFCV file."""
    from retemper.loaders import convert as convert_split
    from retemper.loaders import load_split

    where = arguments.data_root, arguments.image_size, arguments.max_side
    convert_split(
        load_split(arguments.dataset, arguments.split, *where), arguments.out, jpeg_quality=arguments.jpeg_quality
    )
    print(arguments.out)


def ls(arguments: Namespace) -> None:
    """List the recipes that were trained; all of them with --all or WORDs."""
    trained, others = [], []
    for setting in (setting for settings in read_index().methods.values() for setting in settings.values()):
        values = setting.values
        teacher = "no teacher" if values["teacher_model"] == "none" else values["teacher_model"]
        line = setting.name, setting.paper, values["dataset"], f"{values['student']} <- {teacher}", setting.status
        if all(word in " ".join(line) for word in arguments.words):
            (trained if setting.is_trained else others).append(line)
    shown = trained + (others if arguments.all or arguments.words else [])
    if not trained + others:
        raise UsageError(f"no recipe's line holds {' and '.join(arguments.words)}; retemper ls --all lists them all")
    lines = [("recipe", "source", "data set", "student <- teacher", "measured (--preset paper)"), *shown]
    widths = [max(len(line[column]) for line in lines) for column in range(4)]
    for line in lines:
        print("  ".join(f"{text:{width}}" for text, width in zip(line, [*widths, 0], strict=True)).rstrip())
    if len(shown) < len(trained + others):
        print(f"and {len(others)} settings that were not trained yet: retemper ls --all")


def bench(arguments: Namespace) -> None:
    """Time the step, the kernels, the loaders or the attack beside what else there is."""
    if arguments.sweep and arguments.what != "kernels":
        raise UsageError("--sweep: only bench kernels has block sizes to try")
    if arguments.profile and arguments.what != "step":
        raise UsageError("--profile: only bench step has phases to tell apart")
    if arguments.profile and (arguments.json or arguments.only):
        raise UsageError("--profile writes a table and a trace of the whole step: leave out --json and --only")
    path = arguments.json
    if path and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise UsageError(f"--json {path}: name a file in a folder that exists")

    from retemper.bench import Request, as_table, as_text, begun, save
    from retemper.bench import bench as measure
    from retemper.engine.device import pick_device

    def show(result: dict[str, Any], rows: list[dict[str, Any]]) -> None:
        print(as_table(rows), end="\n\n", flush=True)
        if path:
            save(path, result)

    words = {name: getattr(arguments, name) for name in ("what", "rounds", "batch", "quick", "sweep", "seconds")}
    chosen: dict[str, Any] = {"only": tuple(arguments.only), "rows": tuple(arguments.rows)}
    checked = not os.environ.get("RETEMPER_REHEARSAL")  # on a stand-in for a GPU, which computes nothing
    request = Request(**words, **chosen, device=pick_device(arguments.device), checked=checked)
    if arguments.profile:
        from retemper.bench.step_phases import profile_step

        profile_step(request, arguments.profile)
        return
    result = measure(request, show, begun(path, request) if path else None)
    if path:
        save(path, result)
    print(as_text(result))


def doctor(_: Namespace) -> None:
    """Say what is installed, what works, and the command for what is missing."""
    from retemper.engine.doctor import examine

    for line in examine():
        print(line, flush=True)


def demo(arguments: Namespace) -> None:
    """Train a robust teacher and two students on real digits, and compare them by class."""
    from retemper.engine.demo import run_demo

    print(run_demo(arguments.out, arguments.seed))
