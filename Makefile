# What a newcomer runs: `make demo` trains a small model on two ranks, `make test` proves the package, `make lint` reads it.
VENV   := .venv
PYTHON := $(VENV)/bin/python
PIP    := $(PYTHON) -m pip install --quiet -c constraints.txt
MPIRUN := OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMP_NUM_THREADS=1 $(VENV)/bin/mpirun --oversubscribe -n 4
SETUP  := setup.py pyproject.toml constraints.txt
NEWEST := .venv-newest
ZERO   := .venv-deepspeed
# The tests of what meets transformers: they name it, or what is built on it. What torch.compile makes of it has no part
# in what a new release breaks, and takes the longest. Of the slow ones the sweep over all types is what one breaks.
MEETS  := grep -lrE "transformers|peft|lasp\.(models|train)|parallelize" --include "test_*.py" --exclude "*compile.py"
HF     = $(shell $(MEETS) tests --exclude-dir distributed)
HF_MPI = $(shell $(MEETS) tests/distributed)

# Both halves run, whatever the first one says.
define both
@single=passed; distributed=passed; \
$(1) || single=FAILED; \
$(2) || distributed=FAILED; \
echo "tests of one process: $$single; of four ranks: $$distributed"; \
[ $$single = passed ] && [ $$distributed = passed ]
endef

.PHONY: demo test test-single test-distributed test-slow test-newest newest-single newest-distributed test-deepspeed \
	lint format clean

demo: $(VENV)/.train
	$(VENV)/bin/lasp train demo --sp 2

test: $(VENV)/.test
	$(call both,$(MAKE) test-single,$(MAKE) test-distributed)

test-single: $(VENV)/.test
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest tests --ignore tests/distributed -m "not slow" -n 2 --dist worksteal

test-distributed: $(VENV)/.test
	$(MPIRUN) $(PYTHON) -m pytest tests/distributed --with-mpi -m "not slow" -p no:cacheprovider --color=no

test-slow: $(VENV)/.test
	$(PYTHON) -m pytest tests --ignore tests/distributed -m slow
	$(MPIRUN) $(PYTHON) -m pytest tests/distributed --with-mpi -m slow -p no:cacheprovider --color=no

# The newest releases of Hugging Face, beyond what constraints.txt pins and pyproject.toml allows.
test-newest: | $(NEWEST)
	grep -vE "^(transformers|accelerate|peft|tokenizers|safetensors)==" constraints.txt > $(NEWEST)/constraints.txt
	$(NEWEST)/bin/python -m pip install --quiet -c $(NEWEST)/constraints.txt -e ".[test]"
	$(NEWEST)/bin/python -m pip install --quiet -c $(NEWEST)/constraints.txt --upgrade transformers accelerate peft
	$(call both,$(MAKE) newest-single,$(MAKE) newest-distributed)

newest-single:
	OMP_NUM_THREADS=1 $(NEWEST)/bin/python -m pytest $(HF) -m "not slow" -n 2 --dist worksteal --timeout 300

newest-distributed:
	$(subst $(VENV),$(NEWEST),$(MPIRUN)) $(NEWEST)/bin/python -m pytest $(HF_MPI) --with-mpi -k "not slow or model_sweep" \
	    --timeout 300 -p no:cacheprovider --color=no

# The engines zero1 to zero3 and DeepSpeed's launcher, which skip where DeepSpeed is absent.
test-deepspeed: $(ZERO)/.deepspeed
	$(ZERO)/bin/python -m pytest tests/launch/test_launch.py -k deepspeed
	$(subst $(VENV),$(ZERO),$(MPIRUN)) $(ZERO)/bin/python -m pytest tests/distributed/test_engines.py -k zero --with-mpi \
	    -p no:cacheprovider --color=no

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

# DeepSpeed comes as source, whose set-up asks torch which kernels to compile: none, they are compiled when called.
$(ZERO)/.deepspeed: $(SETUP) | $(ZERO)
	$(ZERO)/bin/python -m pip install --quiet -c constraints.txt -e ".[test]"
	DS_ACCELERATOR=cpu DS_BUILD_OPS=0 $(ZERO)/bin/python -m pip install --quiet -c constraints.txt --no-build-isolation \
	    -e ".[deepspeed]"
	touch $@

$(PYTHON):
	python3 -m venv $(VENV)

$(NEWEST) $(ZERO):
	python3 -m venv $@

clean:
	rm -rf $(VENV) $(NEWEST) $(ZERO) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
