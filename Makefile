# What a newcomer runs: `make demo` trains a small model on two ranks, `make test` proves the package, `make lint` reads it.
VENV   := .venv
PYTHON := $(VENV)/bin/python
PIP    := $(PYTHON) -m pip install --quiet -c constraints.txt
MPIRUN := OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMP_NUM_THREADS=1 $(VENV)/bin/mpirun --oversubscribe -n 4
SETUP  := setup.py pyproject.toml constraints.txt

.PHONY: demo test test-single test-distributed test-slow lint format clean

demo: $(VENV)/.train
	$(VENV)/bin/lasp train demo --sp 2

test: test-single test-distributed

test-single: $(VENV)/.test
	$(PYTHON) -m pytest tests --ignore tests/distributed -m "not slow"

test-distributed: $(VENV)/.test
	$(MPIRUN) $(PYTHON) -m pytest tests/distributed --with-mpi -m "not slow" -p no:cacheprovider --color=no

test-slow: $(VENV)/.test
	$(PYTHON) -m pytest tests --ignore tests/distributed -m slow
	$(MPIRUN) $(PYTHON) -m pytest tests/distributed --with-mpi -m slow -p no:cacheprovider --color=no

lint: $(VENV)/.test
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .
	$(VENV)/bin/lint-imports
	$(PYTHON) -m mypy

format: $(VENV)/.test
	$(PYTHON) -m ruff format .
	$(PYTHON) -m ruff check --fix .

# One stamp per set of extras: installed anew when the package's own files change.
$(VENV)/.train: $(SETUP) | $(PYTHON)
	$(PIP) -e ".[train]"
	touch $@

$(VENV)/.test: $(SETUP) | $(PYTHON)
	$(PIP) -e ".[train,hf,bench,test,dev]"
	touch $@ $(VENV)/.train

$(PYTHON):
	python3 -m venv $(VENV)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
