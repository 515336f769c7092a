"""The control of CSR: two more epochs of TRADES on a robust network, the same but for the confusions (ours).

min  CE(S(x), y) + beta KL(S(x) || S(x'))   where   x' = argmax KL(S(x) || S(x')) in the eps ball

Rate, epochs, radius and start are those of `recipes/csr.py`: what the two differ in is due to the method alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from retemper.engine import run_recipe
from retemper.recipes.settings import ON_DIGITS, TWO_EPOCHS, adversarial_training
from retemper.recipes.trades import Trades


@dataclass(frozen=True, kw_only=True)
class CsrControl(Trades):
    variants: ClassVar[tuple[str, ...]] = ("paper",)
    variant_options: ClassVar[Mapping[str, Mapping[str, Any]]] = {}


SETTINGS = adversarial_training(CsrControl, status=ON_DIGITS, from_robust="trades", **TWO_EPOCHS)

if __name__ == "__main__":
    run_recipe(__file__)
