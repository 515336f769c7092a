"""The wheel: one top-level name, and kernels that pull in nothing but torch and triton."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
KERNELS_ALONE = """
import sys, retemper.kernels, torch
from retemper.kernels import class_temperature_kl, pgd_step_
x = torch.zeros(1, 1, 2, 2)
pgd_step_(x, torch.ones_like(x), torch.zeros_like(x), 0.5, 1.0)
assert x.eq(0.5).all()
assert retemper.__file__.startswith(sys.argv[1]), retemper.__file__
heavy = "retemper.engine retemper.loaders sklearn scipy PIL ffcv matplotlib".split()
print(*(name for name in heavy if name in sys.modules))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built through the source distribution, as it is published."""
    out = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    built = subprocess.run(build, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    (found,) = out.glob("*.whl")
    return found


def test_holds_every_module_under_one_name(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"retemper"}
    for part in ("engine", "kernels", "loaders", "recipes"):
        for source in (ROOT / part).rglob("*.py"):
            assert f"retemper/{source.relative_to(ROOT)}" in names, source
    assert "retemper/py.typed" in names


def test_kernels_import_alone_from_it(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    code = f"import sys; sys.path.insert(0, {str(site)!r})\n{KERNELS_ALONE}"
    ran = subprocess.run([sys.executable, "-c", code, str(site)], capture_output=True, text=True, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == "", f"retemper.kernels imports {ran.stdout}"
