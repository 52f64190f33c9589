# make demo, make test and make clients need only Python >= 3.11, pip and make.
PYTHON ?= python3
PY := .venv/bin/python
READY := .venv/.ready

# Idle threads must not spin: otherwise two processes on two cores slow each other down.
export OMP_WAIT_POLICY ?= passive

.PHONY: demo test clients lint oldest release-check setup clean

demo: $(READY)
	$(PY) -m trex_models.demo --output runs/demo

# Two workers on two cores, with one thread each.
test: export OMP_NUM_THREADS = 1
test: lint
	$(PY) -m pytest -n 2 --dist worksteal -m "not client"

# Third-party code with ours: timm's own tests, other libraries, every code block of the documentation;
# and long tests that rarely find a bug on their own.
clients: export OMP_NUM_THREADS = 1
clients: $(READY)
	$(PY) -m pytest -n 2 --dist worksteal -m client

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

# Tests with the oldest supported versions, in a separate environment. Old packages call functions
# that newer dependencies have deprecated.
OLDEST ?= .venv-oldest
oldest: export OMP_NUM_THREADS = 1
oldest: $(OLDEST)/.ready
	$(OLDEST)/bin/python -m pytest -n 2 --dist worksteal -W ignore::DeprecationWarning

# Build and check the release for PyPI, and the citation; docs/versions.md lists the other steps.
RELEASE := build/release
release-check: $(READY)
	rm -rf dist $(RELEASE)
	$(PY) -m build --outdir dist
	$(PYTHON) -m venv $(RELEASE)
	$(RELEASE)/bin/python -m pip install --quiet -c constraints.txt twine cffconvert 'setuptools<81'
	$(RELEASE)/bin/python -m twine check --strict dist/*
	$(RELEASE)/bin/cffconvert --validate -i CITATION.cff

setup: $(READY)

# timm's wheel has no tests; its source distribution of the same version has.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python >= 3.11 is required; run make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --upgrade pip
	$(PY) -m pip install --quiet -c constraints.txt -e '.[dev]'
	rm -rf .timm-src
	$(PY) -m pip download --quiet --no-deps --no-binary timm -c constraints.txt -d .timm-src timm
	tar -xzf .timm-src/timm-*.tar.gz -C .timm-src
	touch $(READY)

$(OLDEST)/.ready: pyproject.toml constraints-oldest.txt $(READY)
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --upgrade pip
	$(OLDEST)/bin/python -m pip install --quiet -c constraints-oldest.txt -e '.[dev]'
	touch $(OLDEST)/.ready

clean:
	rm -rf .venv $(OLDEST) .timm-src build dist
