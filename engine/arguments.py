"""The words of the command line: every verb and its options, and a recipe's options with their meaning."""

import argparse
import re
from argparse import SUPPRESS, ArgumentParser, Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, get_args

from retemper.engine import verbs
from retemper.engine.catalogue import find_setting, methods, parse_value
from retemper.engine.options import Option
from retemper.engine.recipe import Recipe
from retemper.errors import UsageError

NETWORK = "a run's folder, a checkpoint file, robustbench:NAME, or net.py:build (your own nn.Module)"
FEW = 4  # choices; more stand behind the option's meaning, not before it
GROUPS = {  # of the recipe's options, in the order of the help
    "method": "the method",
    "attack": "the inner maximisation",
    "optim": "the outer minimisation",
    "data": "the images",
    "networks": "the networks",
    "selection": "which epoch is kept as the best",
    "execution": "how the step is executed (no option here changes the algorithm)",
}


class Parser(ArgumentParser):
    """argparse that raises UsageError in place of printing its usage and leaving."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see {self.prog} --help")


def named_recipe(argv: list[str]) -> str | None:
    """Return the METHOD:SETTING among the words of `train`, or None where no word begins with a method's name."""
    if argv[:1] != ["train"]:
        return None
    return next((word for word in argv[1:] if ":" in word and word.partition(":")[0] in methods()), None)


def command_line(recipe: str | None = None) -> tuple[Parser, dict[str, Parser]]:
    """Return the parser of the command line, and that of each verb.

    Args:
        recipe: METHOD:SETTING, whose options `train` then has.
    Raises:
        UsageError: there is no such recipe.
    """
    top = Parser(prog="retemper", description="Adversarial robustness distillation, fast and fair.", allow_abbrev=False)
    added = top.add_subparsers(dest="verb", required=True, metavar="VERB", parser_class=Parser)
    parsers: dict[str, Parser] = {}
    for name, (act, add_options) in VERBS.items():
        about = act.__doc__
        parsers[name] = added.add_parser(name, help=about, description=about, allow_abbrev=False)
        parsers[name].set_defaults(act=act)
        add_options(parsers[name])
    if recipe is not None:
        _add_recipe(parsers["train"], find_setting(recipe)[2].recipe)
    return top, parsers


def _add_recipe(train_: Parser, recipe: Recipe) -> None:
    """Add every option of the recipe, grouped as config.json shows them, with its meaning, values and default."""
    options, values = recipe.options(), recipe.flat()
    for group, title in GROUPS.items():
        shown = train_.add_argument_group(title)
        for name, (of, one) in options.items():
            if of == group:
                about = f"{_about(one)} (default {shown_value(values[name])})".strip().replace("%", "%%")
                shown.add_argument(f"--{name.replace('_', '-')}", default=SUPPRESS, metavar=_metavar(one), help=about)


def _about(one: Option) -> str:
    """Return the option's meaning, with its choices where they are too many to stand before it."""
    many = one.choices is not None and len(one.choices) > FEW
    return f"{one.help}: {', '.join(map(str, one.choices or ()))}".replace("None", "none") if many else one.help


def _metavar(one: Option) -> str:
    """Return what stands behind the option in the help: its choices, or its type."""
    if one.choices is not None and len(one.choices) <= FEW:
        return "{" + ",".join("none" if choice is None else choice for choice in one.choices) + "}"
    kinds = [kind for kind in (get_args(one.kind) or (one.kind,)) if kind not in (type(None), Ellipsis)]
    words = {bool: "{true,false}", int: "N", float: "X", str: "NAME"}
    return f"{words[kinds[0]]},..." if Ellipsis in get_args(one.kind) else words[kinds[0]]


def shown_value(value: Any) -> str:
    """Return an option's value as one types it: 8/255, true, 215,260, none."""
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, tuple | list):
        return ",".join(map(shown_value, value)) or "none"
    if isinstance(value, float):
        if float(f"{value:g}") != value:  # no short decimal: a pixel value, or a weight such as 5/6
            for bottom in (255, 6):
                if value == round(value * bottom) / bottom:
                    return f"{round(value * bottom)}/{bottom}"
        return f"{value:g}"
    return str(value)


def _kind(read: Callable[[str], Any], fits: Callable[[Any], bool], advice: str) -> Callable[[str], Any]:
    """Return the type of an option: it reads a word, and answers one that does not fit with advice."""

    def kind(text: str) -> Any:
        try:
            value = read(text)
        except (ValueError, TypeError):
            value = None
        if value is None or not fits(value):
            raise argparse.ArgumentTypeError(f"{text}: {advice}")
        return value

    return kind


def _pair(text: str) -> tuple[int, int] | None:
    """Read 2/4, the second of four."""
    found = re.fullmatch("([0-9]+)/([0-9]+)", text)
    return (int(found[1]), int(found[2])) if found else None


SEED = _kind(int, lambda seed: 0 <= seed < 2**23, "a seed lies in 0 .. 2^23 - 1")
COUNT = _kind(int, lambda number: number >= 1, "it must be at least 1")
RADIUS = _kind(
    partial(parse_value, float), lambda eps: 0 <= eps <= 1, "write it in [0, 1] pixels: 8/255 or 0.031, not 8"
)
SHARD = _kind(_pair, lambda pair: 1 <= pair[0] <= pair[1], "write it as 1/4 to 4/4")
MINUTES = _kind(float, lambda minutes: minutes > 0, "write it in minutes, as 90")


def _train_options(parser: Parser) -> None:
    parser.usage = "retemper train METHOD:SETTING [--OPTION VALUE ...]"
    parser.epilog = "With METHOD:SETTING before --help, every option of the recipe is listed."
    parser.add_argument("METHOD_SETTING", metavar="METHOD:SETTING", help="the recipe; retemper ls lists them")
    parser.add_argument("--data-root", type=Path, metavar="DIR", help="where the data set lies")
    parser.add_argument("--teacher", metavar="NETWORK", help=NETWORK)
    parser.add_argument("--clean-teacher", metavar="NETWORK", help="the second teacher, trained without attacks")
    parser.add_argument("--start", metavar="NETWORK", help="the weights that the student begins with")
    parser.add_argument("--out", type=Path, metavar="DIR", help="the run's folder (runs/METHOD-SETTING-seedN)")
    parser.add_argument("--seed", type=SEED, default=0, metavar="N", help="of weights, order, views and attacks (0)")
    _device_option(parser)
    parser.add_argument(
        "--cache", type=Path, metavar="DIR", help="where converted data and teachers' answers go (~/.cache/retemper)"
    )
    parser.add_argument("--beton", type=Path, metavar="FILE", help="a converted training set to read instead")
    parser.add_argument(
        "--save-every", type=float, default=600.0, metavar="SECONDS",
        help="save the state within an epoch this often; 0 after every step (600)",
    )  # fmt: skip
    parser.add_argument("--deterministic", action="store_true", help="the same bits every time on a GPU too, slower")
    parser.add_argument("--tensorboard", action="store_true", help="write RUN/tensorboard too (an extra)")
    parser.add_argument("--show", action="store_true", help="print the resolved recipe and leave")


def _evaluate_options(parser: Parser) -> None:
    parser.add_argument("target", metavar="NETWORK", help=NETWORK)
    parser.add_argument(
        "--attacks", default="clean,fgsm,pgd20,cw", metavar="NAMES",
        help="of clean, fgsm, pgd20, cw, autoattack (clean,fgsm,pgd20,cw)",
    )  # fmt: skip
    parser.add_argument("--data-root", type=Path, metavar="DIR", help="where the data set lies (as in training)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where evaluation.json goes (beside the weights)")
    parser.add_argument("--limit", type=COUNT, metavar="N", help="only N images, balanced over the classes")
    parser.add_argument("--weights", choices=("best", "last"), default="best", help="which of a run's weights (best)")
    parser.add_argument("--batch-size", type=COUNT, default=256, metavar="N", help="images at once (256)")
    parser.add_argument("--seed", type=SEED, default=0, metavar="N", help="of the random starts (0)")
    parser.add_argument("--check", action="store_true", help="also look for masked gradients, on 300 of the images")
    _device_option(parser)
    suite = parser.add_argument_group("AutoAttack")
    suite.add_argument(
        "--suite", choices=("standard", "fast"), default="standard",
        help="the standard suite, or APGD-CE and APGD-T alone, an upper bound (standard)",
    )  # fmt: skip
    suite.add_argument("--autoattack-limit", type=COUNT, metavar="N", help="the suite on N of the images, balanced")
    suite.add_argument("--fold", action="store_true", help="let it look at the folded twin: faster, other rounding")
    suite.add_argument(
        "--shard", type=SHARD, metavar="I/N", help="only the Ith of N pieces; the last one done puts them together"
    )
    suite.add_argument(
        "--budget", type=MINUTES, metavar="MINUTES", help="begin nothing after that; the same command goes on"
    )
    bare = parser.add_argument_group("what a bare checkpoint does not say")
    bare.add_argument("--model", metavar="NAME", help="its architecture")
    bare.add_argument("--dataset", metavar="NAME", help="its data set")
    bare.add_argument("--eps", type=RADIUS, metavar="X", help="the radius, in [0, 1] pixels (8/255)")


def _report_options(parser: Parser) -> None:
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="the folder of a run or of an evaluation")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the page goes")


def _compare_options(parser: Parser) -> None:
    parser.add_argument("a", metavar="A", help="a run's folder; several seeds as A1,A2,A3")
    parser.add_argument("b", metavar="B", help="another; seed i of B is paired with seed i of A")
    parser.add_argument("--attack", metavar="NAME", help="the attack (the strongest that all were evaluated with)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number there too")


def _export_options(parser: Parser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="the run's folder")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the files go")
    parser.add_argument(
        "--format", choices=("safetensors", "robustbench"), default="safetensors",
        help="weights with a model card, or what RobustBench asks for (safetensors)",
    )  # fmt: skip
    parser.add_argument("--weights", choices=("best", "last"), default="best", help="which of the run's weights (best)")
    parser.add_argument("--name", metavar="NAME", help="the network's name there (the run folder's)")


def _convert_options(parser: Parser) -> None:
    parser.add_argument("dataset", metavar="DATASET", help="digits, fashion-mnist, cifar10, ..., or folder")
    parser.add_argument("--data-root", type=Path, metavar="DIR", help="where the data set lies")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.beton", help="the file to write")
    parser.add_argument("--split", choices=("train", "test"), default="train", help="which images (train)")
    parser.add_argument("--image-size", type=int, metavar="N", help="resize to N pixels a side (as they are)")


def _ls_options(parser: Parser) -> None:
    parser.add_argument("words", nargs="*", metavar="WORD", help="only recipes whose line holds all of these")
    parser.add_argument("--all", action="store_true", help="also settings that were not trained yet")


def _bench_options(parser: Parser) -> None:
    parser.add_argument("what", choices=("step", "kernels", "loaders", "attack"), help="what is timed")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    parser.add_argument("--rounds", type=COUNT, default=20, metavar="N", help="interleaved rounds that count (20)")
    parser.add_argument("--batch", type=COUNT, metavar="N", help="this batch size in place of the usual ones")
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="tables whose name holds one of these")
    parser.add_argument("--quick", action="store_true", help="tiny sizes and nothing compiled: to try it out")
    parser.add_argument("--profile", type=Path, metavar="DIR", help="step: a table and a trace of its phases into DIR")
    parser.add_argument("--sweep", action="store_true", help="kernels: try block sizes on a GPU, and name the best")
    _device_option(parser)


def _demo_options(parser: Parser) -> None:
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), metavar="DIR", help="where it goes (runs/demo)")
    parser.add_argument("--seed", type=SEED, default=0, metavar="N", help="of the three runs (0)")


def _device_option(parser: Parser) -> None:
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda or cuda:N (cuda where there is one)")


VERBS: dict[str, tuple[Callable[[Namespace], None], Callable[[Parser], None]]] = {
    "demo": (verbs.demo, _demo_options),
    "ls": (verbs.ls, _ls_options),
    "train": (verbs.train, _train_options),
    "evaluate": (verbs.evaluate, _evaluate_options),
    "report": (verbs.report, _report_options),
    "compare": (verbs.compare, _compare_options),
    "export": (verbs.export, _export_options),
    "convert": (verbs.convert, _convert_options),
    "bench": (verbs.bench, _bench_options),
    "doctor": (verbs.doctor, lambda _: None),
}
