"""The table of an evaluation for the terminal."""

from typing import Any

from retemper.engine.evaluation.norms import TITLES
from retemper.engine.sanity.check import check_lines


def summary(content: dict[str, Any]) -> str:
    """Return a table of evaluation.json for the terminal, a line an attack; upper bounds are marked as such."""
    protocol = content["protocol"]
    wide = max([16, *(len(name) + 2 for name in content["attacks"])])
    weaker: list[str] = []
    lines, notes = [f"{'':{wide}}{'average':>10}{'worst':>10}  {'class':16}{'worst tenth':>12}{'NSD':>8}"], []
    for name, result in content["attacks"].items():
        worst, images = protocol["classes"][result["worst_class"]], sum(result["count"])
        nsd = "-" if result["nsd"] is None else f"{result['nsd']:.3f}"
        bound = "<= " if result.get("upper_bound") else ""
        shares = [result[key] for key in ("average", "worst", "worst_tenth")]
        average, least, tenth = ("-" if share is None else f"{bound}{share:.1%}" for share in shares)
        lines.append(f"{name:{wide}}{average:>10}{least:>10}  {worst:16}{tenth:>12}{nsd:>8}")
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
    ball = f"{TITLES[protocol.get('norm', 'linf')]} eps {protocol['eps']:.4g}"
    lines.append(f"{protocol['images']} {protocol['split']} images, {ball}, fp32")
    if "training_cut" in protocol:
        notes.append(f"the training was cut {protocol['training_cut']}: these are no numbers of a full run")
    return "\n".join(lines + notes + (check_lines(content["checks"]) if "checks" in content else []))
