# Everything a fresh machine needs: `make demo` and `make test` install what is missing, system packages too as root.
PYTHON ?= python3
BIN := .venv/bin
SYSTEM := python3-venv python3-dev g++ pkg-config libturbojpeg0-dev libopencv-dev dataset-fashion-mnist chromium
SYSTEM_LOG := $(shell mktemp)
PIP := $(BIN)/python -m pip --disable-pip-version-check
DOCS_BIN := .venv-docs/bin
GPU_VENV ?= .venv-gpu-dry-run
SUITE := $(BIN)/pytest --numprocesses 2 --dist loadfile

.PHONY: setup system demo test test-everywhere check docs bench gpu-dry-run wheel hf-kernel matrix lock clean

setup: .venv/installed

# FFCV names no build needs of its own: what it compiles with is installed first, and seen by its build.
.venv/installed: pyproject.toml constraints.txt | system
	$(PYTHON) -m venv .venv
	$(PIP) install --quiet --constraint constraints.txt torch setuptools wheel numpy
	$(PIP) install --quiet --constraint constraints.txt --no-build-isolation --editable '.[all]'
	touch $@

# What is tested for is what is needed, so that a Python or an OpenCV from elsewhere serves as well as Debian's.
system:
	@if pkg-config --exists opencv4 libturbojpeg && command -v g++ && command -v chromium \
		&& [ -d /usr/share/datasets/fashion-mnist ] \
		&& $(PYTHON) -c 'import ensurepip, os, sysconfig; assert os.path.exists(sysconfig.get_path("include") + "/Python.h")'; \
	then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get; then \
		apt-get update --quiet=2 && DEBIAN_FRONTEND=noninteractive apt-get install --quiet=2 --no-install-recommends $(SYSTEM); \
	else \
		echo "system packages are missing; as root, run:  apt-get install $(SYSTEM)" >&2; exit 1; \
	fi >/dev/null 2>"$(SYSTEM_LOG)" || { cat "$(SYSTEM_LOG)" >&2; exit 1; }

demo: setup
	$(BIN)/retemper demo

# The site comes first: it takes seconds, and a broken link or docstring is as much a fault as a broken test.
test: setup docs
	$(SUITE)

# As other machines run it: with one thread, with two, and beside a busy loop on each core.
test-everywhere: setup
	OMP_NUM_THREADS=1 $(SUITE)
	OMP_NUM_THREADS=2 $(SUITE)
	loops=; trap 'kill $$loops' EXIT; \
	for core in $$(seq $$(nproc)); do while :; do :; done & loops="$$loops $$!"; done; \
	$(SUITE)

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports --no-cache --no-logo

# An environment of its own: torchattacks pins an old requests. It needs no torch, since the sources are read, not imported.
.venv-docs/installed: docs/requirements.txt | system
	$(PYTHON) -m venv .venv-docs
	$(DOCS_BIN)/python -m pip --disable-pip-version-check install --quiet --requirement docs/requirements.txt
	touch $@

docs: .venv-docs/installed
	NO_MKDOCS_2_WARNING=1 $(DOCS_BIN)/mkdocs build --strict --quiet

bench: setup
	$(BIN)/retemper bench step

# The GPU code on a recorder of CUDA's calls: no GPU is needed, but PyTorch's build for one, 5 GB of the disk. Another
# environment with such a build is taken by GPU_VENV=FOLDER, and parts of it by PARTS="counts host".
gpu-dry-run: $(filter .venv-gpu-dry-run/installed,$(GPU_VENV)/installed)
	$(GPU_VENV)/bin/python benchmarks/gpu_dry_run.py $(PARTS)

.venv-gpu-dry-run/installed: benchmarks/dry_run/requirements.txt | system
	$(PYTHON) -m venv .venv-gpu-dry-run
	.venv-gpu-dry-run/bin/python -m pip --disable-pip-version-check install --quiet --requirement $<
	touch $@

# retemper, and retemper-kernels: the kernels alone.
wheel: setup
	rm -rf dist
	$(BIN)/python -m build --no-isolation --outdir dist .
	$(BIN)/python -m build --no-isolation --outdir dist publish/retemper-kernels

hf-kernel:
	rm -rf dist/hf-kernel
	$(PYTHON) publish/hugging_face.py dist/hf-kernel

# Environments of its own, one after the other; a torch for GPUs takes several gigabytes of the network and of the disk.
matrix:
	$(PYTHON) .ci/matrix.py $(COMBINATIONS)

lock: setup
	$(BIN)/python .ci/lock.py

clean:
	rm -rf .venv .venv-docs .venv-gpu-dry-run build dist site src/*.egg-info
