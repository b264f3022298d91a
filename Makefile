# `make demo` streams a story; `make test` runs everything that CI runs. Neither needs a GPU or a compiler.
#
#   VENV=.venv             the environment to make, or to use as it is
#   TORCH=torch==2.13.0    what pip installs first; a torch that the environment already has is kept
#   TRITON=triton==3.6.0   another Triton than pip picks
#   PROMPT="One day"       what `make demo` continues

VENV ?= .venv
PYTHON ?= python3
PROMPT ?= Once upon a time
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install $(if $(CI),--quiet)
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(if $(CI),--quiet)
PARALLEL ?= -n 2

# Without a GPU the CUDA packages of torch are 3 GB for nothing. PyTorch's own index has CPU builds, which pip prefers.
CPU_INDEX := https://download.pytorch.org/whl/cpu
NO_GPU := $(shell [ "$$(uname -s)" = Linux ] && ! nvidia-smi -L >/dev/null 2>&1 && ! [ -e /dev/kfd ] && echo yes)
TORCH ?= $(if $(NO_GPU),torch==2.13.0,torch)
TORCH_INDEX ?= $(if $(NO_GPU),$(shell curl -sfI --max-time 10 -o /dev/null $(CPU_INDEX)/torch/ && echo --extra-index-url $(CPU_INDEX)))

.PHONY: demo test gpu-test lint house reference interpret compile package clean always
.NOTPARALLEL:

demo: $(VENV)/.demo
	$(BIN)/qinfer generate "$(PROMPT)"

test: lint house reference interpret compile package

gpu-test: $(VENV)/.test
	$(PYTEST) -m "gpu or kernel"

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

house: $(VENV)/.test
	$(PYTEST) tests/test_house.py
	$(if $(CI),,$(BIN)/python -m tests.house)

reference: $(VENV)/.test
	$(PYTEST) $(PARALLEL) -m "not (gpu or kernel or compile)" --ignore tests/test_house.py

interpret: $(VENV)/.test
	TRITON_INTERPRET=1 $(PYTEST) $(PARALLEL) -m "kernel and not gpu"

compile: $(VENV)/.test
	$(PYTEST) $(PARALLEL) --maxschedchunk=1 -m compile

package: $(VENV)/.test
	$(BIN)/python -m tests.package

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	[ ! -e $(VENV)/.made ] || rm -rf $(VENV)
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# An environment that make did not make is used as it is and never removed.
$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	touch $(VENV)/.made

$(VENV)/.torch: | $(BIN)/python
	$(BIN)/python -c "import torch" 2>/dev/null || $(PIP) $(TORCH_INDEX) "$(TORCH)"
	touch $@

$(VENV)/.demo: pyproject.toml $(if $(TRITON),always) | $(VENV)/.torch
	$(PIP) --editable . $(TRITON)
	touch $@

$(VENV)/.test: pyproject.toml $(if $(TRITON),always) | $(VENV)/.torch
	$(PIP) --editable ".[test]" $(TRITON)
	touch $@ $(VENV)/.demo
