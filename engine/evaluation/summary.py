"""The table of an evaluation for the terminal."""

from typing import Any

from retemper.engine.evaluation.norms import TITLES
from retemper.engine.sanity.check import check_lines


def summary(content: dict[str, Any]) -> str:
    """Return a table of evaluation.json for the terminal, a line an attack; upper bounds are marked as such."""
    protocol = content["protocol"]
    wide = max([16, *(len(name) + 2 for name in content["attacks"])])
    weaker: list[str] = []
    many = len(protocol["classes"]) > 10  # else the worst tenth is the worst class
    head = f"{'':{wide}}{'average':>10}{'worst':>10}{'honest':>8}  {'class':16}"
    lines, notes = [head + f"{'tenth':>10}" * many + f"{'NSD':>7}"], []
    for name, result in content["attacks"].items():
        worst, images = protocol["classes"][result["worst_class"]], sum(result["count"])
        nsd = "-" if result["nsd"] is None else f"{result['nsd']:.3f}"
        bound = "<= " if result.get("upper_bound") else ""
        shares = [result[key] for key in ("average", "worst", "worst_tenth")]
        average, least, tenth = ("-" if share is None else f"{bound}{share:.1%}" for share in shares)
        honest = result.get("measures", {}).get("honest_worst")
        chosen = "-" if honest is None else f"{honest:.1%}"
        numbers = f"{name:{wide}}{average:>10}{least:>10}{chosen:>8}  {worst:16}"
        lines.append(numbers + f"{tenth:>10}" * many + f"{nsd:>7}")
        if result.get("complete") is False:
            notes.append(f"{name} was interrupted: these are upper bounds, and the same command goes on")
        elif bound and "protocol" in protocol["attacks"].get(name, {}):
            weaker.append(name)
        elif bound:
            notes.append(f"{name} leaves out attacks of the standard suite: these are upper bounds")
        notes += [f"{name}: {flag}" for flag in result.get("flags", [])]
        if images != protocol["images"]:
            notes.append(f"{name}: on the first {images} of the images, balanced over the classes")
    if weaker:
        notes.append(f"{', '.join(weaker)}: a paper's own evaluation, weaker than the standard one: upper bounds")
    if any(result.get("measures", {}).get("honest_worst") is not None for result in content["attacks"].values()):
        notes.append("honest: the worst class of one half of the images, on the other; worst alone is biased downwards")
    ball = f"{TITLES[protocol.get('norm', 'linf')]} eps {protocol['eps']:.4g}"
    lines.append(f"{protocol['images']} {protocol['split']} images, {ball}, fp32")
    if "training_cut" in protocol:
        notes.append(f"the training was cut {protocol['training_cut']}: these are no numbers of a full run")
    return "\n".join(lines + notes + (check_lines(content["checks"]) if "checks" in content else []))
