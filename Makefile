# make demo   sets everything up and runs the quickstart (a few minutes on two cores)
# make test   sets everything up, then ruff, mypy and the tests
# make test-full   also the tests that take long
# make docs   sets up what the site needs and builds docs/_build/html; warnings are errors

VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
# The official SAM 2 is what the networks are compared with. It is installed without its own
# dependencies: the comparison needs no torchvision. Any torch will do; this one is tested.
TORCH ?= torch==2.13.0
# Processes that share the tests; each may need 4 GiB.
JOBS ?= 2
# Files in the order of tests/conftest.py, and not those with many tests first, however short.
PYTEST = $(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-full lint docs clean

demo: $(VENV)/.installed
	$(BIN)/rfmedsam2 quickstart --out demo --overwrite

test: lint
	$(PYTEST) -m "not full"

test-full: lint
	$(PYTEST)

lint: $(VENV)/.installed-for-tests
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: $(VENV)/.installed
	$(BIN)/python -m pip install -q -e ".[docs,serve]"
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html
	@echo docs/_build/html/index.html

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q -e .
	touch $@

$(VENV)/.installed-for-tests: $(VENV)/.installed
	$(BIN)/python -m pip install -q -e ".[test,docs]" $(TORCH) setuptools wheel
	SAM2_BUILD_CUDA=0 $(BIN)/python -m pip install -q --no-deps --no-build-isolation sam2==1.1.0
	# nnU-Net's own U-Net, as a witness; what else it asks for brings torchvision.
	$(BIN)/python -m pip install -q --no-deps "dynamic-network-architectures>=0.4.4"
	touch $@

# For benchmarks/accuracy: nnU-Net does not need the torchvision that it asks for, and one that does
# not fit the torch keeps it from starting.
.venv-nnunet/.installed:
	$(PYTHON) -m venv .venv-nnunet
	.venv-nnunet/bin/python -m pip install -q nnunetv2==2.8.1 $(TORCH)
	.venv-nnunet/bin/python -m pip uninstall -q -y torchvision
	touch $@

clean:
	rm -rf $(VENV) demo build docs/_build docs/_api *.egg-info
