"""Writes requirements.lock and sbom.json from what pip resolves: every package that CI installs, pinned by its digest.

    make lock

Linux on x86-64, Python 3.11, torch from its CPU index. To install exactly that, and nothing that was changed since
(FFCV is built with the numpy that is there, so that comes first):

    grep -E "^(setuptools|numpy)==" requirements.lock >first.lock && pip install --require-hashes -r first.lock
    pip install --require-hashes --no-build-isolation -r requirements.lock
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--dry-run"]


def resolved() -> list[dict[str, str]]:
    """Name, version, SHA-256 and licence of each package, by name; retemper itself left out."""
    with tempfile.NamedTemporaryFile(suffix=".json") as report:
        words = ["--ignore-installed", "--no-build-isolation", "--constraint", "constraints.txt"]
        subprocess.run([*PIP, *words, "--report", report.name, ".[all]"], cwd=ROOT, check=True)
        installs = json.loads(Path(report.name).read_text())["install"]
    return sorted(map(_package, filter(_is_foreign, installs)), key=lambda package: package["name"].lower())


def _is_foreign(install: dict[str, Any]) -> bool:
    return install["metadata"]["name"] != "retemper"


def _package(install: dict[str, Any]) -> dict[str, str]:
    known = install["metadata"]
    licence = known.get("license_expression") or (known.get("license") or "").splitlines()[:1]
    return {
        "name": known["name"],
        "version": known["version"],
        "sha256": install["download_info"]["archive_info"]["hashes"]["sha256"],
        "licence": licence if isinstance(licence, str) else "".join(licence)[:80],
    }


def lock(packages: list[dict[str, str]]) -> str:
    """For pip's --require-hashes."""
    lines = ["# Written by `make lock`: Linux x86-64, Python 3.11, torch from its CPU index."]
    lines += [f"{one['name']}=={one['version']} --hash=sha256:{one['sha256']}" for one in packages]
    return "\n".join(lines) + "\n"


def bill(packages: list[dict[str, str]]) -> dict[str, Any]:
    """A bill of materials in CycloneDX 1.5."""
    components = [
        {
            "type": "library",
            "name": one["name"],
            "version": one["version"],
            "purl": f"pkg:pypi/{one['name'].lower().replace('_', '-')}@{one['version']}",
            "hashes": [{"alg": "SHA-256", "content": one["sha256"]}],
            **({"licenses": [{"license": {"name": one["licence"]}}]} if one["licence"] else {}),
        }
        for one in packages
    ]
    subject = {"type": "application", "name": "retemper"}
    return {"bomFormat": "CycloneDX", "specVersion": "1.5", "version": 1, "metadata": {"component": subject}} | {
        "components": components
    }


if __name__ == "__main__":
    found = resolved()
    (ROOT / "requirements.lock").write_text(lock(found))
    (ROOT / "sbom.json").write_text(json.dumps(bill(found), indent=1) + "\n")
    print(f"{len(found)} packages in requirements.lock and sbom.json")
