"""The evaluations by name: which attacks each has, and at which radius.

    standard   the library's own: predict.py's attacks, AutoAttack's standard suite
    fair-ard   what Fair-ARD's authors ran (NISP-official/Fair-ARD, eval.py): FGSM from a little noise, C&W of 20 steps,
               random starts that may leave [0, 1], and AutoAttack as torchattacks has it since 3.3.0 (autoattack.py)
    rslad      the columns of the RSLAD and MTARD papers: PGD with the step of SAT (2/255) and of TRADES (0.003)

The last two judge the attacked image alone. They are weaker than the standard one, and there to compare published
numbers like with like: their results have names of their own ("cw-fair-ard") and are called upper bounds.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from retemper.engine.predict import ATTACKS, Attack
from retemper.errors import UsageError
from retemper.loaders import usual_eps

STANDARD = "standard"
CURVE = "curve"  # the name of `curve_radii`
OF_USUAL = (0.25, 0.5, 1.0, 1.5)


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """An evaluation by name.

    Attributes:
        name: as --protocol takes it.
        attacks: by the names that --attacks takes; "autoattack" comes with each protocol.
        suite: of AutoAttack.
    """

    name: str
    attacks: Mapping[str, Attack]
    suite: str = STANDARD


_ALL = (
    Protocol(name=STANDARD, attacks=ATTACKS),
    Protocol(
        name="fair-ard",
        attacks={
            "clean": ATTACKS["clean"],
            "fgsm": Attack(steps=1, step=1, start="normal", clip_start=False, alone=True),
            "pgd20": Attack(steps=20, clip_start=False, alone=True),
            "cw": Attack(steps=20, loss="margin", clip_start=False, alone=True),
        },
        suite="fair-ard",
    ),
    Protocol(
        name="rslad",
        attacks={
            "clean": ATTACKS["clean"],
            "fgsm": Attack(steps=1, step=1, start="none", alone=True),
            "pgd-sat": Attack(steps=20, alone=True),
            "pgd-trades": Attack(steps=20, step=0.003 * 255 / 8, alone=True),  # 0.003 at 8/255
            "cw": Attack(steps=30, loss="margin", alone=True),
        },
    ),
)
PROTOCOLS = {one.name: one for one in _ALL}


def result_name(attack: str, protocol: str) -> str:
    """Return what the files call an attack of a protocol: what is as in the standard one has the same name there."""
    of = PROTOCOLS[protocol]
    if attack == "autoattack":
        return attack if of.suite == STANDARD else f"{attack}-{of.suite}"
    return attack if attack == "fmn" or of.attacks[attack] == ATTACKS.get(attack) else f"{attack}-{protocol}"


def protocol_of(result: str) -> tuple[str, str]:
    """Return the attack and the protocol that a result is named after; one of the standard protocol names none."""
    for name in PROTOCOLS.keys() - {STANDARD}:
        if result.endswith(f"-{name}"):
            return result.removesuffix(f"-{name}"), name
    return result, STANDARD


def attack_options(result: str, protocol: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of `retemper evaluate` that lead to a result: the names of results are no names of attacks.

    Args:
        result: as evaluation.json names it, or another evaluation's.
        protocol: of evaluation.json.
    """
    if result == "cross-check":
        return attack_options("autoattack", protocol) | {"cross_check": True}
    attack, paper = protocol_of(result)
    attack, _, suite = attack.partition("-") if attack.startswith("autoattack") else (attack, "", "")
    images = ((protocol.get("attacks") or {}).get(result) or {}).get("images")
    return {
        "attacks": attack,
        "protocol": None if paper == STANDARD else paper,
        "suite": suite or None,
        "autoattack_limit": None if images == protocol.get("images") else images,
    }


def radius(asked: float | str | None, dataset: str, trained: float | None, name: str, norm: str = "linf") -> float:
    """Return the radius that a network is evaluated at, in pixel units.

    Args:
        asked: the radius; None for the data set's usual one, "trained" for that of the network's training.
        trained: the radius that the network was trained for, where that is known.
        name: the network's.
        norm: of the radius.
    Raises:
        UsageError: "trained" is asked for, and unknown.
    """
    if asked == "trained":
        if trained is None:
            raise UsageError(f"--eps trained: {name} does not say its radius: give it in [0, 1] pixels (--eps 8/255)")
        return trained
    return usual_eps(dataset, norm) if asked is None else float(asked)


def curve_radii(dataset: str, norm: str = "linf") -> tuple[float, ...]:
    """Return a quarter, half, one and one and a half of the usual radius: 2/255, 4/255, 8/255 and 12/255 on CIFAR."""
    radii = [share * usual_eps(dataset, norm) for share in OF_USUAL]
    return tuple(short if math.isclose(short := round(eps, 6), eps, rel_tol=1e-12) else eps for eps in radii)


def strongest_first() -> tuple[str, ...]:
    """Return the names of all results, those of stronger attacks first, of the standard protocol before others."""
    rank = ("autoattack", "autoattack-fast", "pgd20", "cw", "fgsm")
    others = [
        result_name(attack, name)
        for name, protocol in PROTOCOLS.items()
        for attack in ("autoattack", *reversed(tuple(protocol.attacks)))
    ]
    return tuple(dict.fromkeys((*rank, *(name for name in others if name != "clean"), "clean")))
