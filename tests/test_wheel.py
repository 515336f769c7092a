"""The wheel: one top-level name, kernels that pull in nothing but torch and triton, and the code of docs/kernels/."""

import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
KERNELS_ALONE = """
import sys, time
start = time.process_time()
import torch
middle = time.process_time()
import retemper.kernels
print((time.process_time() - middle) / (middle - start))
from retemper.kernels import class_temperature_kl, pgd_step_
x = torch.zeros(1, 1, 2, 2)
pgd_step_(x, torch.ones_like(x), torch.zeros_like(x), 0.5, 1.0)
assert x.eq(0.5).all()
heavy = "retemper.engine retemper.loaders retemper.recipes sklearn scipy PIL ffcv matplotlib torchattacks".split()
print(*(name for name in heavy if name in sys.modules))
"""
FROM_THE_WHEEL = """
import pathlib, retemper
assert pathlib.Path(retemper.__file__).is_relative_to({site!r}), retemper.__file__
"""
EACH_BLOCK = """
import json, traceback
wrong = {{}}
for name, code in {blocks!r}.items():
    try:
        exec(compile(code, name, "exec"), {{"__name__": "block"}})
        wrong[name] = ""
    except Exception:
        wrong[name] = traceback.format_exc()
print(json.dumps(wrong))
"""
IMPORT_SHARE = 0.5  # of the processor time that importing torch takes; most of it is Triton's


def drop_ins() -> dict[str, str]:
    """The Python in docs/kernels/: the page and the number of the block, and the block."""
    found = {}
    for page in sorted((ROOT / "docs/kernels").glob("*.md")):
        codes = re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE)
        found |= {f"{page.stem} {number}": code for number, code in enumerate(codes, 1)}
    return found


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel through the source distribution, as it is published, and return its path."""
    out = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    built = subprocess.run(build, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    (found,) = out.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel installed in it, and nothing else."""
    out = tmp_path_factory.mktemp("site")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(out), str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    return out


def run_with(site: Path, code: str) -> subprocess.CompletedProcess[str]:
    """Run it in a fresh process, away from the checkout; what it imports of ours must come from `site`."""
    command = [sys.executable, "-c", code + FROM_THE_WHEEL.format(site=str(site))]
    env = os.environ | {"PYTHONPATH": str(site)}
    return subprocess.run(command, capture_output=True, text=True, cwd=site.parent, env=env)


def test_holds_every_module_under_one_name(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"retemper"}
    for part in ("engine", "kernels", "loaders", "recipes"):
        for source in [*(ROOT / part).rglob("*.py"), *(ROOT / part).rglob("*.jinja"), *(ROOT / part).rglob("*.css")]:
            assert f"retemper/{source.relative_to(ROOT)}" in names, source
    assert "retemper/py.typed" in names


def test_kernels_import_alone_from_it_and_quickly(site: Path) -> None:
    shares = []
    while not shares or (min(shares) > IMPORT_SHARE and len(shares) < 5):  # a busy machine may slow down any one
        ran = run_with(site, KERNELS_ALONE)
        assert ran.returncode == 0, ran.stderr
        cost, others = ran.stdout.splitlines()
        assert others == "", f"retemper.kernels imports {others}"
        shares.append(float(cost))
    assert min(shares) <= IMPORT_SHARE, f"importing retemper.kernels takes {min(shares):.0%} of what torch takes"


@pytest.fixture(scope="module")
def ran(site: Path) -> dict[str, str]:
    """What is wrong with each block, run one after the other in a process that has the wheel alone."""
    if " " in tempfile.gettempdir():
        pytest.skip("torch.compile takes no temporary folder with a space in its name")
    done = run_with(site, EACH_BLOCK.format(blocks=drop_ins()))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", drop_ins())
def test_a_drop_in_does_what_plain_pytorch_does(name: str, ran: dict[str, str]) -> None:
    code = drop_ins()[name]
    assert "from retemper.kernels" in code and "assert" in code, "it compares nothing of ours"
    assert not ran[name]


def test_there_are_drop_ins() -> None:
    assert drop_ins()
