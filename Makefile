# make demo   tune SqueezeNet on this machine's CPU (random weights, two minutes): side by side with
#             TVM without schedules, with our default ones, and ONNX Runtime
# make check  about a minute: ruff, mypy and the tests that do no TVM work, on all cores
# make test   everything that needs no GPU: ruff, mypy, tests; TEST_JOBS of them side by side (3)
# make docs   the documentation site in build/site, with the API reference
# make gpu-check   tests/gpu on this machine's GPU, its ten checks first; exit code 3 without a GPU
# make gpu-bench   the GPU benchmarks, under nine minutes; GPU_PARTS=share_gain runs one of them
#
# The GPU targets end in time whatever hangs, and write their results after each piece: CHECK_S=240 TEST_S=180
# BENCH_S=500 are their seconds, GPU_RESULTS the folder. On a machine without network, PYTHON=python3
# takes that interpreter as it is and installs nothing: see docs/hardware-status.md.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:

VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --progress-bar off
DEMO := build/demo

# pytest-xdist's workers: `auto` is one for each core. An idle one takes tests from the others; half of
# the time of `make test` is waiting, so it has more workers than cores.
CHECK_JOBS ?= auto
TEST_JOBS ?= 3

GPU_PARTS ?= neighbour_order share_gain vs_metaschedule vs_torch
GPU_MODELS ?= bert,resnet50
GPU_RESULTS ?= benchmarks/results
CHECK_S ?= 240
TEST_S ?= 180
BENCH_S ?= 500

# What the GPU targets run with: the environment made here, or the interpreter that is named.
GPU_PYTHON := $(or $(PYTHON),$(BIN)/python)
GPU_NEEDS := $(if $(PYTHON),,$(VENV)/.installed-dev)

.PHONY: demo check test docs gpu-check gpu-bench lint clean

demo: $(VENV)/.installed
	$(BIN)/python -m benchmarks.light_models squeezenet $(DEMO)/squeezenet.onnx
	$(BIN)/tune $(DEMO)/squeezenet.onnx --time 40s --db $(DEMO)/tuning_logs -o $(DEMO)/squeezenet.tuned
	$(BIN)/tune run $(DEMO)/squeezenet.tuned
	$(BIN)/python -m benchmarks.model_latency --models squeezenet --sides plain,untuned --rounds 4 \
	    --tuned squeezenet=$(DEMO)/squeezenet.tuned --results $(DEMO)/latency.json

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check: lint
	$(BIN)/python -m pytest tests/null -n $(CHECK_JOBS)

test: lint
	$(BIN)/python -m pytest tests/null tests/tvm tests/fuzz -n $(TEST_JOBS) --dist worksteal --durations=15

docs: $(VENV)/.installed-docs
	$(BIN)/mkdocs build --strict

gpu-check: $(GPU_NEEDS)
	timeout -k 10 $$(($(CHECK_S) + $(TEST_S))) $(GPU_PYTHON) -m pytest tests/gpu -v --need-gpu \
	    --check-seconds $(CHECK_S) --gpu-results $(GPU_RESULTS) --durations=8

gpu-bench: $(GPU_NEEDS)
	status=0
	end=$$((SECONDS + $(BENCH_S)))
	left=$(words $(GPU_PARTS))
	for part in $(GPU_PARTS); do
	    limit=$$(((end - SECONDS) / left))
	    left=$$((left - 1))
	    case $$part in
	        neighbour_order) options="--trials 64 --time 15 --repeats 1" ;;
	        share_gain) options="--time 12" ;;
	        vs_metaschedule) options="--seconds 20" ;;
	        *) options="--time 10 --budget $$((limit - 10))" ;;
	    esac
	    timeout -k 10 $$limit $(GPU_PYTHON) -m benchmarks.gpu.$$part --models $(GPU_MODELS) \
	        --results $(GPU_RESULTS) $$options || status=$$?
	done
	exit $$status

clean:
	rm -rf $(VENV) build

$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	$(PIP) --editable .
	touch $@

$(VENV)/.installed-dev: pyproject.toml | $(VENV)/bin/python
	$(PIP) --editable '.[dev,cuda]'
	$(PIP) --no-deps --editable .  # last: Ray's command `tune` would have the name
	touch $@ $(VENV)/.installed

$(VENV)/.installed-docs: pyproject.toml | $(VENV)/bin/python
	$(PIP) --editable '.[docs]'
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
