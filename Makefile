# make demo and make test do everything on a machine with Python >= 3.11, pip and make.
PYTHON ?= python3
PY := .venv/bin/python
READY := .venv/.ready

# Threads that wait without spinning: two processes on two cores do not slow each other down.
export OMP_WAIT_POLICY ?= passive

.PHONY: demo test lint setup clean

demo: $(READY)
	$(PY) -m trex_models.demo --output runs/demo

# Two workers on two cores: a thread each.
test: export OMP_NUM_THREADS = 1
test: lint
	$(PY) -m pytest -n 2 --dist worksteal

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

setup: $(READY)

# timm's wheel has no tests; its source distribution of the same version has.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python >= 3.11 is needed; run make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --upgrade pip
	$(PY) -m pip install --quiet -c constraints.txt -e '.[dev]'
	rm -rf .timm-src
	$(PY) -m pip download --quiet --no-deps --no-binary timm -c constraints.txt -d .timm-src timm
	tar -xzf .timm-src/timm-*.tar.gz -C .timm-src
	touch $(READY)

clean:
	rm -rf .venv .timm-src build dist
