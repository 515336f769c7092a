# Everything a fresh machine needs: `make demo` and `make test` install what is missing, system packages too as root.
PYTHON ?= python3
BIN := .venv/bin
SYSTEM := pkg-config libturbojpeg0-dev libopencv-dev dataset-fashion-mnist
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: setup system demo test check bench wheel clean

setup: .venv/installed

# FFCV names no build needs of its own: what it compiles with is installed first, and seen by its build.
.venv/installed: pyproject.toml constraints.txt | system
	$(PYTHON) -m venv .venv
	$(PIP) install --quiet --constraint constraints.txt torch setuptools wheel numpy
	$(PIP) install --quiet --constraint constraints.txt --no-build-isolation --editable '.[all]'
	touch $@

system:
	@if dpkg -s $(SYSTEM) >/dev/null 2>&1; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		apt-get update --quiet=2 && DEBIAN_FRONTEND=noninteractive apt-get install --quiet=2 --no-install-recommends $(SYSTEM) g++ >/dev/null; \
	else \
		echo "system packages are missing; as root, run:  apt-get install $(SYSTEM)" >&2; exit 1; \
	fi

demo: setup
	$(BIN)/retemper demo

test: setup
	$(BIN)/pytest

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

bench: setup
	$(BIN)/retemper bench step

wheel: setup
	rm -rf dist
	$(BIN)/python -m build --no-isolation --outdir dist .

clean:
	rm -rf .venv build dist src/*.egg-info
