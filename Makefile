# make demo   tune SqueezeNet on this machine's CPU (random weights, two minutes): before and after
# make test   everything that needs no GPU: ruff, mypy, tests
# make gpu-check   the ten checks on this machine's GPU, then tests/gpu; exit code 3 without a GPU
# make gpu-bench   the GPU benchmarks, under nine minutes; GPU_PARTS=share_gain runs one of them
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:

VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --progress-bar off
DEMO := build/demo

GPU_PARTS ?= vs_metaschedule share_gain vs_torch

.PHONY: demo test gpu-check gpu-bench clean

demo: $(VENV)/.installed
	$(BIN)/python benchmarks/light_models.py squeezenet $(DEMO)/squeezenet.onnx
	$(BIN)/tune $(DEMO)/squeezenet.onnx --time 60s --db $(DEMO)/tuning_logs -o $(DEMO)/squeezenet.tuned
	$(BIN)/tune run $(DEMO)/squeezenet.tuned

test: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/null tests/tvm --durations=15

gpu-check: $(VENV)/.installed-dev
	status=0
	$(BIN)/python -m benchmarks.gpu.checks || status=$$?
	if [ $$status != 3 ]; then $(BIN)/python -m pytest tests/gpu || status=$$?; fi
	exit $$status

gpu-bench: $(VENV)/.installed-dev
	status=0
	for part in $(GPU_PARTS); do
	    case $$part in
	        vs_metaschedule) limits="--seconds 25" ;;
	        share_gain) limits="--time 15" ;;
	        *) limits="--time 10 --budget 130" ;;
	    esac
	    $(BIN)/python -m benchmarks.gpu.$$part $$limits || status=$$?
	done
	exit $$status

clean:
	rm -rf $(VENV) build

$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	$(PIP) --editable .
	touch $@

$(VENV)/.installed-dev: pyproject.toml | $(VENV)/bin/python
	$(PIP) --editable '.[dev,cuda]'
	touch $@ $(VENV)/.installed

# The first Python from 3.11 to 3.13 that can make an environment.
$(VENV)/bin/python:
	for python in python3 python3.13 python3.12 python3.11; do
	    if "$$python" -c 'import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then
	        exec "$$python" -m venv $(VENV)
	    fi
	done
	echo "error: no Python 3.11 to 3.13 with venv found: install one (Debian: apt-get install python3-venv)" >&2
	exit 3
