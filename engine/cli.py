"""The command line: `retemper VERB`. A user's mistake is one line on stderr and an exit code (engine/errors.py)."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

from retemper.engine.catalogue import find_setting, method_module, methods, nearest, override
from retemper.engine.distributed.join import is_first, speaker
from retemper.engine.recipe import describe
from retemper.engine.run import interrupts
from retemper.errors import EXIT_CODES, PREEMPTED, DataError, UsageError

FLAGS = ("--show", "--tensorboard", "--deterministic", "--help")  # of `train`: they take no value
NETWORKS = "a run's folder, a checkpoint file, robustbench:NAME, or net.py:factory (your own nn.Module)"
GOES_ON = "; the same command goes on from there"


class Parser(argparse.ArgumentParser):
    """argparse that raises instead of printing its usage and leaving."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> None:
    """The console script: runs a verb and leaves with its exit code."""
    interrupts.install()
    code = run(sys.argv[1:] if argv is None else list(argv))
    if code == PREEMPTED:
        interrupts.leave(code)
    sys.exit(code)


def run_as_script(file: str) -> None:
    """`python recipes/absld.py SETTING ...`: train the method that the file is named after."""
    method, words = Path(file).stem, sys.argv[1:]
    setting = words.pop(0) if words and not words[0].startswith("-") else ""
    main(["train", f"{method}:{setting}", *words])


def run(argv: list[str]) -> int:
    """One verb; its exit code."""

    def act() -> None:
        top = parser(_named_recipe(argv))
        arguments, unknown = top.parse_known_args(argv)
        if unknown:
            raise UsageError(
                f"{arguments.verb} has no option {unknown[0]!r}{nearest(unknown[0], _options(top, argv[0]))}"
            )
        arguments.act(arguments)

    return reported(act, goes_on=argv[:1] in (["train"], ["demo"]))


def reported(act: Callable[[], None], goes_on: bool) -> int:
    """Do it; the exit code, after one line where it fails. goes_on: whether the same command takes it up again."""
    try:
        act()
        return 0
    except KeyboardInterrupt as interrupt:
        saved = str(interrupt) or "what was saved before is whole"
        if is_first():
            print(f"retemper: interrupted{f'; {saved}{GOES_ON}' if goes_on else ''}", file=sys.stderr)
        return PREEMPTED
    except BrokenPipeError:
        return 0
    except tuple(EXIT_CODES) as error:
        print(f"retemper: error: {speaker()}{error}", file=sys.stderr)
        return next(code for kind, code in EXIT_CODES.items() if isinstance(error, kind))
    except OSError as error:
        print(f"retemper: error: {speaker()}{error.filename or 'a file'}: {error.strerror or error}", file=sys.stderr)
        return EXIT_CODES[DataError]


def _named_recipe(argv: list[str]) -> str | None:
    """The METHOD:SETTING in the words of `train`: the first that is neither an option nor the value of one."""
    for before, word in pairwise(argv):
        takes_value = before.startswith("--") and "=" not in before and before not in FLAGS
        if argv[0] == "train" and not word.startswith("-") and not takes_value:
            return word
    return None


def parser(recipe: str | None = None) -> Parser:
    """Every verb and its options; with METHOD:SETTING, also that recipe's fields as options of `train`."""
    top = Parser(prog="retemper", description="Adversarial robustness distillation, fast and fair.", allow_abbrev=False)
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB", parser_class=Parser)

    def verb(name: str, act: object, about: str) -> argparse.ArgumentParser:
        added = verbs.add_parser(name, help=about, description=about, allow_abbrev=False)
        added.set_defaults(act=act)
        return added

    demo_ = verb("demo", demo, "Train a robust teacher and two students on real digits, and compare them by class.")
    demo_.add_argument("--out", type=Path, default=Path("runs/demo"), metavar="DIR")
    demo_.add_argument("--seed", type=_seed, default=0)

    verb("ls", ls, "List the recipes.").add_argument("words", nargs="*", metavar="WORD", help="only lines with these")

    train_ = verb("train", train, "One training run; every field of the recipe is an option (--epochs 5, --eps 8/255).")
    train_.add_argument("METHOD_SETTING", metavar="METHOD:SETTING")
    train_.add_argument("--data-root", type=Path, metavar="DIR", help="where the data set lies")
    train_.add_argument("--teacher", metavar="NETWORK", help=NETWORKS)
    train_.add_argument("--clean-teacher", metavar="NETWORK", help="likewise, for methods with two teachers")
    train_.add_argument("--start", metavar="NETWORK", help="weights to begin with, likewise")
    train_.add_argument("--out", type=Path, metavar="DIR", help="the run's folder (runs/METHOD-SETTING-seedN)")
    train_.add_argument("--seed", type=_seed, default=0)
    train_.add_argument("--device", default=None, help="cpu or cuda (cuda where there is one)")
    train_.add_argument(
        "--cache", type=Path, metavar="DIR", help="where converted data and teachers' answers go (~/.cache/retemper)"
    )
    train_.add_argument("--beton", type=Path, metavar="FILE", help="a converted training set to read instead")
    train_.add_argument(
        "--save-every",
        type=float,
        default=600.0,
        metavar="SECONDS",
        help="within an epoch too (600; 0 after every step)",
    )
    train_.add_argument("--deterministic", action="store_true", help="the same bits every time on a GPU too, slower")
    train_.add_argument("--tensorboard", action="store_true", help="write RUN/tensorboard too, an extra")
    train_.add_argument("--show", action="store_true", help="print the resolved recipe and leave")
    group = train_.add_argument_group("the recipe's fields", "named METHOD:SETTING, this lists them")
    for name, value in describe(find_setting(recipe)[2].recipe).items() if recipe else ():
        group.add_argument(f"--{name.replace('_', '-')}", default=argparse.SUPPRESS, metavar="X", help=f"({value})")

    evaluate_ = verb("evaluate", evaluate, "Attack a trained network and report by class.")
    evaluate_.add_argument("target", metavar="NETWORK", help=NETWORKS)
    evaluate_.add_argument("--attacks", default="clean,fgsm,pgd20,cw", help="of clean,fgsm,pgd20,cw,autoattack")
    evaluate_.add_argument("--data-root", type=Path, metavar="DIR")
    evaluate_.add_argument("--out", type=Path, metavar="DIR", help="where the file goes (beside the weights)")
    evaluate_.add_argument("--limit", type=int, metavar="N", help="only N images, balanced over the classes")
    evaluate_.add_argument("--weights", choices=("best", "last"), default="best", help="which of a run's weights")
    evaluate_.add_argument("--batch-size", type=int, default=256)
    evaluate_.add_argument("--seed", type=_seed, default=0, help="of the random starts")
    suite = evaluate_.add_argument_group("AutoAttack")
    suite.add_argument("--suite", choices=("standard", "fast"), default="standard", help="fast: APGD-CE and APGD-T")
    suite.add_argument("--autoattack-limit", type=int, metavar="N", help="the suite on N of the images, balanced")
    suite.add_argument("--fold", action="store_true", help="let it look at the folded twin: faster, other rounding")
    suite.add_argument("--shard", metavar="I/N", help="only the Ith of N pieces; the last one done puts them together")
    suite.add_argument("--budget", metavar="MINUTES", help="begin nothing after that; the same command goes on")
    evaluate_.add_argument("--check", action="store_true", help="also look for masked gradients, on 300 of the images")
    evaluate_.add_argument("--device", default=None)
    evaluate_.add_argument("--model", help="the architecture of a bare checkpoint")
    evaluate_.add_argument("--dataset", help="the data set, where the checkpoint does not say")
    evaluate_.add_argument("--eps", help="the radius, where the checkpoint does not say (8/255)")

    report_ = verb("report", report, "One page and its plots for one or more runs.")
    report_.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    report_.add_argument("--out", type=Path, required=True, metavar="DIR")

    compare_ = verb("compare", compare, "Two runs on the same images: differences by class, intervals, McNemar's test.")
    compare_.add_argument("a", metavar="A", help="a run's folder; several seeds as A1,A2,A3")
    compare_.add_argument("b", metavar="B", help="likewise: seed i of B is paired with seed i of A")
    compare_.add_argument("--attack", metavar="NAME", help="the strongest that all were evaluated with")
    compare_.add_argument("--json", type=Path, metavar="FILE", help="write every number there too")

    export_ = verb("export", export, "Write a run's network for others: with a model card, or as RobustBench asks.")
    export_.add_argument("run", type=Path, metavar="RUN")
    export_.add_argument("--out", type=Path, required=True, metavar="DIR")
    export_.add_argument("--format", choices=("safetensors", "robustbench"), default="safetensors")
    export_.add_argument("--weights", choices=("best", "last"), default="best", help="which of the run's weights")
    export_.add_argument("--name", help="the network's there (the run folder's)")

    convert_ = verb("convert", convert, "Write a data set as an FFCV file.")
    convert_.add_argument("dataset")
    convert_.add_argument("--data-root", type=Path, metavar="DIR")
    convert_.add_argument("--out", type=Path, required=True, metavar="FILE.beton")
    convert_.add_argument("--split", choices=("train", "test"), default="train")
    convert_.add_argument("--image-size", type=int)

    bench_ = verb("bench", bench, "Time the step, the kernels, the loaders or the attack beside what else there is.")
    bench_.add_argument("what", choices=("step", "kernels", "loaders", "attack"))
    bench_.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    bench_.add_argument("--rounds", type=int, default=20, metavar="N", help="that count (20)")
    bench_.add_argument("--device", default=None)
    bench_.add_argument("--batch", type=int, metavar="N", help="this batch size in place of the usual ones")
    bench_.add_argument("--only", nargs="+", default=[], metavar="WORDS", help="tables whose name holds one of these")
    bench_.add_argument("--quick", action="store_true", help="tiny sizes and nothing compiled: to try it out")
    bench_.add_argument(
        "--sweep", action="store_true", help="kernels: try block sizes instead, on a GPU, and name the best"
    )
    bench_.add_argument(
        "--profile", type=Path, metavar="DIR", help="step: where its time goes instead, a table and a trace into DIR"
    )

    verb("doctor", doctor, "Say what is installed, what works, and the command for what is missing.")
    return top


def _seed(text: str) -> int:
    seed = int(text)
    if not 0 <= seed < 2**23:
        raise argparse.ArgumentTypeError("a seed lies in 0 .. 2^23 - 1")
    return seed


def _options(top: Parser, verb: str) -> list[str]:
    """The option strings that `verb` knows."""
    (verbs,) = (action for action in top._actions if isinstance(action, argparse._SubParsersAction))
    return list(verbs.choices[verb]._option_string_actions)


def train(arguments: argparse.Namespace) -> None:
    from retemper.engine.distributed.join import joined
    from retemper.engine.run.job import Job, default_cache, default_out
    from retemper.engine.run.teachers import with_teacher
    from retemper.engine.run.train import train as train_job

    method, name, setting = find_setting(arguments.METHOD_SETTING)
    texts = {field: text for field, text in vars(arguments).items() if field in describe(setting.recipe)}
    recipe = override(setting.recipe, texts)
    if arguments.show:
        print("\n".join(f"{field:20} {value!r}" for field, value in describe(recipe).items()))
        return
    with joined(arguments.device) as (ranks, device):
        job = Job(
            method=method,
            setting=name,
            recipe=recipe,
            out=arguments.out or default_out(method, name, arguments.seed),
            seed=arguments.seed,
            data_root=arguments.data_root,
            teacher=arguments.teacher,
            clean_teacher=arguments.clean_teacher,
            start=arguments.start,
            cache=arguments.cache or default_cache(),
            beton=arguments.beton,
            device=device,
            ranks=ranks,
            tensorboard=arguments.tensorboard,
            save_every=arguments.save_every,
            deterministic=arguments.deterministic,
        )
        out = train_job(with_teacher(job))
    if ranks.is_first:
        print(out)


def evaluate(arguments: argparse.Namespace) -> None:
    from retemper.engine.distributed.join import joined
    from retemper.engine.evaluation.evaluate import EvaluationRequest, evaluate_target, summary

    with joined(arguments.device) as (ranks, device):
        path, content = evaluate_target(EvaluationRequest.from_words(arguments, ranks, device))
    if ranks.is_first:
        print(summary(content))
        print(path)


def report(arguments: argparse.Namespace) -> None:
    from retemper.engine.report import write_report

    print(write_report(arguments.runs, arguments.out))


def compare(arguments: argparse.Namespace) -> None:
    from dataclasses import asdict

    from retemper.engine.evaluation.compare import as_text
    from retemper.engine.evaluation.compare import compare as compare_runs
    from retemper.engine.evaluation.verdicts import read_evaluated
    from retemper.files import finite, write_atomically

    sides = [[read_evaluated(Path(name), name) for name in side.split(",")] for side in (arguments.a, arguments.b)]
    found = compare_runs(*sides, arguments.attack)
    if arguments.json:
        write_atomically(arguments.json, json.dumps(finite(asdict(found)), indent=1).encode() + b"\n")
    print(as_text(found))


def export(arguments: argparse.Namespace) -> None:
    from retemper.engine.export.export import export as export_run

    print(export_run(arguments.run, arguments.out, arguments.format, arguments.weights, arguments.name))


def convert(arguments: argparse.Namespace) -> None:
    from retemper.loaders import convert as convert_split
    from retemper.loaders import load_split

    split = load_split(arguments.dataset, arguments.split, arguments.data_root, arguments.image_size)
    convert_split(split, arguments.out)
    print(arguments.out)


def ls(arguments: argparse.Namespace) -> None:
    lines = []
    for method in methods():
        module = method_module(method)
        paper = (module.__doc__ or "").partition("\n")[0].rpartition("(")[2].rstrip(").")
        for name, setting in module.SETTINGS.items():
            recipe = setting.recipe
            teacher = recipe.teacher_model or "no teacher"
            lines.append((f"{method}:{name}", paper, recipe.dataset, f"{recipe.student} <- {teacher}", setting.status))
    lines = [line for line in lines if all(word in " ".join(line) for word in arguments.words)]
    widths = [max((len(line[column]) for line in lines), default=0) for column in range(4)]
    for line in lines:
        print("  ".join(f"{text:{width}}" for text, width in zip(line, [*widths, 0], strict=True)).rstrip())


def bench(arguments: argparse.Namespace) -> None:
    from retemper.engine.bench import Request, as_table, as_text, save
    from retemper.engine.bench import bench as measure
    from retemper.engine.device import pick_device

    for name in ("rounds", "batch"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name} {value}: it must be at least 1")
    if arguments.sweep and arguments.what != "kernels":
        raise UsageError("--sweep: only bench kernels has block sizes to try")
    if arguments.profile and arguments.what != "step":
        raise UsageError("--profile: only bench step has phases to tell apart")
    path = arguments.json
    if path and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise UsageError(f"--json {path}: name a file in a folder that exists")

    def show(result: dict[str, Any], rows: list[dict[str, Any]]) -> None:
        print(as_table(rows), end="\n\n", flush=True)
        if path:
            save(path, result)

    words = {name: getattr(arguments, name) for name in ("what", "rounds", "batch", "quick", "sweep")}
    request = Request(**words, device=pick_device(arguments.device), only=tuple(arguments.only))
    if arguments.profile:
        from retemper.engine.bench.step import profile_step

        profile_step(request, arguments.profile)
        return
    result = measure(request, show)
    if path:
        save(path, result)
    print(as_text(result))


def doctor(_: argparse.Namespace) -> None:
    from retemper.engine.doctor import examine

    print(examine())


def demo(arguments: argparse.Namespace) -> None:
    from retemper.engine.demo import run_demo

    print(run_demo(arguments.out, arguments.seed))
