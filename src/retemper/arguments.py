"""The words of the command line: every verb and its options, and a recipe's options with their meaning."""

import re
from argparse import SUPPRESS, ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args

from retemper import __version__, verbs
from retemper.errors import UsageError
from retemper.index import Listed, read_index
from retemper.kinds import BATCH, COUNT, MINUTES, PATH, PERIOD, PIXELS, QUALITY, RADII, RADIUS, ROUNDS, SEED, SHARD
from retemper.options import Option, shown_value

NETWORK = "a run's folder, a checkpoint file, robustbench:NAME, or net.py:build (your own nn.Module)"
FEW = 4  # choices; more stand behind the option's meaning, not before it
NORMS = ("linf", "l2", "l1")
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
    """The argument parser, which raises UsageError in place of printing its usage and leaving."""

    def error(self, message: str) -> NoReturn:
        message = re.sub(r"^argument (--[\w-]+): ", r"\1 ", message)
        raise UsageError(f"{message}; see {self.prog} --help")


def named_recipe(argv: list[str]) -> str | None:
    """Return the METHOD:SETTING among the words of `train`, or None.

    It is the first word that begins with a method's name or, where none does, the first that has the form.
    """
    if argv[:1] != ["train"]:
        return None
    words = [word for word in argv[1:] if re.fullmatch(r"(?!robustbench:|timm:)\w+:\w*", word)]
    return next((word for word in words if word.partition(":")[0] in read_index().methods), next(iter(words), None))


def command_line(recipe: str | None = None) -> tuple[Parser, dict[str, Parser]]:
    """Return the parser of the command line, and that of each verb.

    Args:
        recipe: METHOD:SETTING, whose options `train` then has.
    Raises:
        UsageError: there is no such recipe.
    """
    top = Parser(prog="retemper", description="Adversarial robustness distillation, fast and fair.", allow_abbrev=False)
    top.add_argument("--version", action="version", version=f"retemper {__version__}")
    added = top.add_subparsers(dest="verb", required=True, metavar="VERB", parser_class=Parser)
    parsers: dict[str, Parser] = {}
    for name, options in OPTIONS.items():
        act = getattr(verbs, name)
        place = parsers[name] = added.add_parser(name, help=act.__doc__, description=act.__doc__, allow_abbrev=False)
        place.set_defaults(act=act)
        for one in options:
            if isinstance(one, str):
                place = parsers[name].add_argument_group(one)
            else:
                _add(place, one[0], **one[1])
    parsers["train"].usage = "retemper train METHOD:SETTING [--OPTION VALUE ...]"
    parsers["train"].epilog = "With METHOD:SETTING before --help, every option of the recipe is listed."
    if recipe is not None:
        _add_recipe(parsers["train"], read_index().find(recipe))
    return top, parsers


def _add_recipe(train_: Parser, recipe: Listed) -> None:
    """Add every option of the recipe, grouped as config.json shows them, with its meaning, values and default."""
    for group, title in GROUPS.items():
        shown = train_.add_argument_group(title)
        for name, one in ((name, one) for name, (of, one) in recipe.options.items() if of == group):
            metavar, about = _values(one)
            about = f"{one.help}{about} (default {recipe.values[name]})".strip().replace("%", "%%")
            choices = ("true", "false") if one.kind is bool else [shown_value(choice) for choice in one.choices or ()]
            word = f"--{name.replace('_', '-')}"
            _add(shown, word, default=SUPPRESS, metavar=metavar, help=about, completes=choices)


def _add(place: Any, name: str, *, completes: Sequence[str] = (), **words: Any) -> None:
    """Add an option or a positional word, and what a shell may complete it to."""
    added = place.add_argument(name, **words)
    if completes:
        added.completer = lambda **_: completes


def _values(one: Option) -> tuple[str, str]:
    """Return what stands behind the option in its help, a type or few choices; and what follows its meaning."""
    choices = [shown_value(choice) for choice in one.choices or ()]
    if 0 < len(choices) <= FEW:
        return f"{{{','.join(choices)}}}", ""
    kinds = [kind for kind in (get_args(one.kind) or (one.kind,)) if kind not in (type(None), Ellipsis)]
    word = {bool: "{true,false}", int: "N", float: "X", str: "NAME"}[kinds[0]]
    return word + ",..." * (Ellipsis in get_args(one.kind)), f": {', '.join(choices)}" if choices else ""


def _option(name: str, help: str, metavar: str | None = None, **rest: Any) -> tuple[str, dict[str, Any]]:
    """Return an option or a positional word as `add_argument` takes it."""
    return name, {"help": help, **({"metavar": metavar} if metavar else {}), **rest}


INDEX = read_index()
NAMES = [listed.name for settings in INDEX.methods.values() for listed in settings.values()]
DEVICE = _option("--device", "cpu, cuda or cuda:N (cuda where there is one)", "NAME")
OPTIONS: dict[str, tuple[str | tuple[str, dict[str, Any]], ...]] = {  # of each verb; a word alone begins a group
    "demo": (
        _option("--out", "where it goes (runs/demo)", "DIR", type=PATH, default=Path("runs/demo")),
        _option("--seed", "of the three runs (0)", "N", type=SEED, default=0),
    ),
    "ls": (
        _option("words", "only recipes whose line holds all of these", "WORD", nargs="*"),
        _option("--all", "also settings that were not trained yet", action="store_true"),
    ),
    "train": (
        _option("METHOD_SETTING", "the recipe; retemper ls lists them", "METHOD:SETTING", completes=NAMES),
        _option("--data-root", "where the data set lies", "DIR", type=PATH),
        _option("--extra", "generated or extra images: a .npz, or its parts (a folder or '*.npz')", "PATH", type=PATH),
        _option("--teacher", NETWORK, "NETWORK"),
        _option("--clean-teacher", "the second teacher, trained without attacks", "NETWORK"),
        _option("--start", "the weights that the student begins with", "NETWORK"),
        _option("--out", "the run's folder (runs/METHOD-SETTING-seedN)", "DIR", type=PATH),
        _option("--seed", "of weights, order, views and attacks (0)", "N", type=SEED, default=0),
        DEVICE,
        _option("--cache", "where converted data and teachers' answers go (~/.cache/retemper)", "DIR", type=PATH),
        _option("--beton", "a converted training set to read instead", "FILE", type=PATH),
        _option(
            "--save-every",
            "save within an epoch so often; 0: every step, on a GPU every 50 (600)",
            "SECONDS",
            type=PERIOD,
            default=600,
        ),
        _option("--max-steps", "cut the run after N steps in all: to try it out, or go on later", "N", type=COUNT),
        _option("--deterministic", "the same bits every time on a GPU too, slower", action="store_true"),
        _option("--tensorboard", "write RUN/tensorboard too (an extra)", action="store_true"),
        _option("--show", "print the resolved recipe and leave", action="store_true"),
    ),
    "evaluate": (
        _option("target", NETWORK, "NETWORK"),
        _option(
            "--attacks",
            "of clean, fgsm, pgd20, cw, autoattack, fmn (an extra); of rslad clean, fgsm, pgd-sat, pgd-trades, cw, "
            "autoattack (all but autoattack and fmn)",
            "NAMES",
            completes=sorted({name for names in (*verbs.PROTOCOLS.values(), *verbs.OTHERS.values()) for name in names}),
        ),
        _option(
            "--protocol",
            "standard, or a paper's own evaluation, which is weaker, to compare with its numbers (standard)",
            choices=tuple(verbs.PROTOCOLS),
            default="standard",
        ),
        _option(
            "--eps",
            "the radius, in [0, 1] pixels, or `trained`: that of its training (8/255; digits 0.15, Fashion-MNIST 0.1); "
            "several, 2/255,4/255,8/255, for a curve, or `curve`: a quarter, half, one and one and a half of the usual",
            "X",
            type=RADII,
        ),
        _option("--norm", "of the perturbation; pgd20 and its like have no l1 (linf)", choices=NORMS, default="linf"),
        _option("--data-root", "where the data set lies (as in training)", "DIR", type=PATH),
        _option("--out", "where evaluation.json goes (beside the weights)", "DIR", type=PATH),
        _option("--limit", "only N images, balanced over the classes", "N", type=COUNT),
        _option("--weights", "which of a run's weights (best)", choices=("best", "last"), default="best"),
        _option("--batch-size", "images at once (256)", "N", type=BATCH, default=256),
        _option("--seed", "of the random starts (0)", "N", type=SEED, default=0),
        _option(
            "--review",
            "all that there is: every attack, a curve in each norm, --check, --corruptions, --cross-check (an extra)",
            action="store_true",
        ),
        _option("--check", "also look for masked gradients, on 300 of the images", action="store_true"),
        _option("--corruptions", "also CIFAR-10-C's fifteen corruptions at five severities", action="store_true"),
        _option(
            "--capture",
            "replay what comes again from CUDA graphs, on a GPU (auto)",
            choices=("auto", "off"),
            default="auto",
        ),
        DEVICE,
        "AutoAttack",
        _option(
            "--suite",
            "the standard suite, or APGD-CE and APGD-T alone, an upper bound (standard)",
            choices=("standard", "fast"),
            default="standard",
        ),
        _option("--autoattack-limit", "the suite on N of the images, balanced", "N", type=COUNT),
        _option("--cross-check", "then try PMA, MT-APGD and FMN on what it leaves (an extra)", action="store_true"),
        _option("--fold", "let it look at the folded twin: faster, other rounding", action="store_true"),
        _option("--shard", "only the Ith of N pieces; the last one done puts them together", "I/N", type=SHARD),
        _option("--budget", "begin nothing after that; the same command goes on", "MINUTES", type=MINUTES),
        "what a bare checkpoint does not say",
        _option("--model", f"its architecture: {', '.join(INDEX.models)}", "NAME", completes=INDEX.models),
        _option("--dataset", f"its data set: {', '.join(INDEX.datasets)}", "NAME", completes=INDEX.datasets),
    ),
    "teacher": (
        _option("target", NETWORK, "NETWORK"),
        _option("--student", "networks whose attacks are tried on the teacher", "NETWORK", nargs="+", default=[]),
        _option(
            "--split",
            "the images; train where you choose a teacher for results on the test images (test)",
            choices=("test", "train"),
            default="test",
        ),
        _option("--eps", "the radius, in [0, 1] pixels, or `trained` (8/255; digits 0.15)", "X", type=RADIUS),
        _option("--data-root", "where the data set lies (as in training)", "DIR", type=PATH),
        _option("--out", "where teacher.json and its page go (the run's folder, or teachers/NAME)", "DIR", type=PATH),
        _option("--limit", "only N images, balanced over the classes", "N", type=COUNT),
        _option("--batch-size", "images at once (256)", "N", type=BATCH, default=256),
        _option("--seed", "of the random starts (0)", "N", type=SEED, default=0),
        DEVICE,
        "what a bare checkpoint does not say",
        _option("--model", f"its architecture: {', '.join(INDEX.models)}", "NAME", completes=INDEX.models),
        _option("--dataset", f"its data set: {', '.join(INDEX.datasets)}", "NAME", completes=INDEX.datasets),
    ),
    "even": (
        _option("target", NETWORK, "NETWORK"),
        _option(
            "--by",
            "the last layer's rows scaled to one norm, or half the way, or a bias that is fitted; or two epochs of csr "
            "or of its control, plain (the best of the first three on held-out training images)",
            choices=("norm", "half", "bias", "csr", "plain"),
        ),
        _option("--out", "the new run's folder (beside the network's, NAME-even-BY)", "DIR", type=PATH),
        _option("--data-root", "where the data set lies (as in training)", "DIR", type=PATH),
        _option("--weights", "which of a run's weights (best)", choices=("best", "last"), default="best"),
        _option(
            "--holdout",
            "training images of each class that choose, of a network whose training held none out (as csr's setting)",
            "N",
            type=COUNT,
        ),
        _option("--eps", "the radius, in [0, 1] pixels (that of its training, or the usual one)", "X", type=RADIUS),
        _option("--seed", "of a fine-tune (the run's own, or 0)", "N", type=SEED),
        DEVICE,
        "what a bare checkpoint does not say",
        _option("--model", f"its architecture: {', '.join(INDEX.models)}", "NAME", completes=INDEX.models),
        _option("--dataset", f"its data set: {', '.join(INDEX.datasets)}", "NAME", completes=INDEX.datasets),
    ),
    "report": (
        _option("runs", "the folder of a run or of an evaluation", "RUN", type=PATH, nargs="+"),
        _option("--out", "where the page goes", "DIR", type=PATH, required=True),
    ),
    "compare": (
        _option(
            "runs",
            "two runs' folders, several seeds as A1,A2,A3 B1,B2,B3, seed i of B paired with seed i of A; with --out "
            "any number of runs, or folders of runs",
            "RUN",
            nargs="+",
        ),
        _option("--attack", "the attack (the strongest that all were evaluated with)", "NAME"),
        _option("--json", "write every number there too", "FILE", type=PATH),
        "one page for many methods, seeds grouped by recipe",
        _option("--out", "where comparison.html, .md, .csv and .tex go", "DIR", type=PATH),
        _option(
            "--against", "published numbers to set beside them, as benchmarks/published/ has", "FILE.csv", type=PATH
        ),
        _option("--other-data", "even where they are on other data", action="store_true"),
    ),
    "export": (
        _option("run", "the run's folder", "RUN", type=PATH),
        _option("--out", "where the files go", "DIR", type=PATH, required=True),
        _option(
            "--format",
            "weights with a model card, or what RobustBench asks for (safetensors)",
            choices=("safetensors", "robustbench"),
            default="safetensors",
        ),
        _option("--weights", "which of the run's weights (best)", choices=("best", "last"), default="best"),
        _option("--name", "the network's name there (the run folder's)", "NAME"),
    ),
    "convert": (
        _option("dataset", "digits, fashion-mnist, cifar10, ..., or folder", "DATASET", completes=INDEX.datasets),
        _option("--data-root", "where the data set lies", "DIR", type=PATH),
        _option("--out", "the file to write", "FILE.beton", type=PATH, required=True),
        _option("--split", "which images (train)", choices=("train", "test"), default="train"),
        _option("--image-size", "resize to N pixels a side (as they are)", "N", type=PIXELS),
        _option("--max-side", "of a folder: store N pixels a side, to cut views from", "N", type=PIXELS),
        _option("--jpeg-quality", "store JPEG copies of this quality (pixels, as they are)", "1..100", type=QUALITY),
    ),
    "bench": (
        _option("what", "what is timed", choices=("step", "kernels", "loaders", "attack")),
        _option("--json", "write the figures there too", "FILE", type=PATH),
        _option("--rounds", "interleaved rounds that count (20)", "N", type=ROUNDS, default=20),
        _option("--batch", "this batch size in place of the usual ones", "N", type=BATCH),
        _option("--only", "tables whose name holds one of these", "WORD", nargs="+", default=[]),
        _option("--rows", "rows of these names alone", "NAME", nargs="+", default=[]),
        _option("--seconds", "begin no table after so many; the same command goes on", "S", type=PERIOD),
        _option("--quick", "tiny sizes and nothing compiled: to try it out", action="store_true"),
        _option("--profile", "step: a table and a trace of its phases into DIR", "DIR", type=PATH),
        _option("--sweep", "kernels: try block sizes on a GPU, and name the best", action="store_true"),
        DEVICE,
    ),
    "doctor": (),
}
