# Thin: each target is one or two commands that you can also type. See README.md.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
# What installs packages. Another one that takes pip's words may stand here: PIP="uv pip".
PIP ?= $(BIN)/pip
OUT ?= demo
SEED ?= 0

.PHONY: install demo bench bench-page test test-slurm test-container test-peers lint types layers check docs lock mlflow clean

demo: $(VENV)/installed
	$(BIN)/comir-hpc demo --out $(OUT) --seed $(SEED)

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder --durations=30 --durations-min=5

# The next two need root on Debian: what they test with is installed where it is missing.
test-slurm: $(VENV)/installed-dev
	dpkg -s slurmctld slurmd slurm-client munge iproute2 >/dev/null 2>&1 || { apt-get update -qq && apt-get install -y -qq \
	  --no-install-recommends slurmctld slurmd slurm-client munge iproute2; }
	$(BIN)/python -m pytest tests/test_slurm.py

test-container: $(VENV)/installed-dev
	tests/install_apptainer.sh
	$(BIN)/python -m pytest tests/test_container.py

# In a folder of their own: they ask for an older numpy.
test-peers: $(VENV)/installed-dev $(VENV)/peers
	PYTHONPATH=$(VENV)/peers $(BIN)/python -m pytest -m peers tests/test_transforms.py tests/test_conventions_peers.py tests/test_peers.py

$(VENV)/peers: | $(VENV)/bin/python
	$(PIP) install -q --target $@ 'itk-elastix>=0.23' 'antspyx>=0.5' 'picsl-greedy>=0.0.6'

# Predicted ten minutes on two quiet cores, nothing to fetch: the embedded pair, and the peers that are there (make .venv/peers).
bench: $(VENV)/installed
	$(BIN)/comir-hpc benchmark configs/benchmark_quick.yaml --out bench/table.csv --workers 2 \
	  $(if $(wildcard $(VENV)/peers),--peers $(VENV)/peers)

# docs/benchmarks.md out of the committed tables.
bench-page: $(VENV)/installed
	$(BIN)/python benchmarks/field/page.py

lint: $(VENV)/installed-dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: $(VENV)/installed-dev
	$(BIN)/mypy

layers: $(VENV)/installed-dev
	$(BIN)/lint-imports

check: lint types layers test

# Every warning is an error: a broken link, or a name in a reference page that the code does not have. Not --quiet, which
# keeps warnings from being counted.
docs: $(VENV)/installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "open site/index.html"

# What the image installs; after every change of the dependencies.
lock: $(VENV)/bin/python
	$(BIN)/pip install -q uv
	$(BIN)/uv pip compile -q --native-tls --python-version 3.11 --python-platform x86_64-manylinux_2_28 \
	  --generate-hashes --no-annotate --custom-compile-command "make lock" pyproject.toml -o containers/requirements.lock

mlflow: $(VENV)/installed
	$(PIP) install -q -e '.[mlflow]'
	@echo "open http://127.0.0.1:5000/#/experiments?workflowType=machine_learning"
	MLFLOW_DISABLE_TELEMETRY=true $(BIN)/mlflow server --host 127.0.0.1 --port 5000 \
	  --backend-store-uri sqlite:///$(abspath $(OUT))/mlflow.db

# All that developers and CI need in one call: pip takes as long to look at what is there as to install it.
install: | $(VENV)/bin/python
	$(PIP) install -q -e '.[dev,docs]'
	touch $(VENV)/installed $(VENV)/installed-dev $(VENV)/installed-docs

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: pyproject.toml | $(VENV)/bin/python
	$(PIP) install -q -e .
	touch $@

$(VENV)/installed-dev: pyproject.toml | $(VENV)/bin/python
	$(PIP) install -q -e '.[dev]'
	touch $@ $(VENV)/installed

$(VENV)/installed-docs: pyproject.toml | $(VENV)/bin/python
	$(PIP) install -q -e '.[docs]'
	touch $@ $(VENV)/installed

clean:
	rm -rf $(VENV) build dist site *.egg-info
