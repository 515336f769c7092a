"""The lock and the bill of materials say what CI installs."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def pins(name: str) -> dict[str, str]:
    """Return the version by normalised name, of every "package==version" line that holds for Python 3.11."""
    found = {}
    for line in (ROOT / name).read_text().splitlines():
        pin, _, marker = line.partition(";")
        match = re.match(r"([\w.-]+)==([^\s+]+)", pin)
        if match and "<" not in marker:
            found[match[1].lower().replace("_", "-")] = match[2]
    return found


def test_the_lock_has_every_constraint_at_its_version() -> None:
    constraints, locked = pins("constraints.txt"), pins("requirements.lock")
    assert len(constraints) > 20
    assert {name: locked.get(name) for name in constraints} == constraints, "run `make lock`"


def test_every_package_is_pinned_by_a_digest() -> None:
    lines = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"\S+==\S+ --hash=sha256:[0-9a-f]{64}", line) for line in lines)


def test_the_bill_of_materials_lists_the_same() -> None:
    bill = json.loads((ROOT / "sbom.json").read_text())
    assert bill["bomFormat"] == "CycloneDX"
    listed = [f"{c['name']}=={c['version']} --hash=sha256:{c['hashes'][0]['content']}" for c in bill["components"]]
    assert listed == (ROOT / "requirements.lock").read_text().splitlines()[1:]
