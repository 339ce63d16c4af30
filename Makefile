# The verbs of the book. A fresh machine needs only Python 3.10 to 3.13 and make:
#   make capstone   make test
# Everything goes into .venv, or into the conda environment `nanochat` when it is active.
# PYTHON=/path/to/python chooses the interpreter, VENV=/path/to/venv another environment.

ifeq ($(CONDA_DEFAULT_ENV),nanochat)
VENV ?= $(CONDA_PREFIX)
else
VENV ?= .venv
endif
PROFILE ?= laptop
ifeq ($(OS),Windows_NT)
BIN := $(VENV)/Scripts
else
BIN := $(VENV)/bin
endif
PY := $(BIN)/python
READY := $(VENV)/.nanochat-ready

.PHONY: help capstone test lab author-lab work grade chapter chapters check print export chat env

help:
	@echo "make capstone      train and question the laptop model (PROFILE=smoke is faster)"
	@echo "make chat          talk to the model of the last capstone"
	@echo "make lab           JupyterLab on your own copy of the chapters and exercises, in work/"
	@echo "make capstone MINE=1  the same with your answers to the exercises in place of the book's"
	@echo "make grade DIR=... grade a folder of submitted notebooks, into grades/ (HIDDEN=more.py)"
	@echo "make chapter N=03  run one chapter and show its time and memory"
	@echo "make chapters      run all of them"
	@echo "make test          the tests"
	@echo "make check         is every derived file fresh?"
	@echo "for authors:       make export, make print [N=03], make author-lab"

env: $(READY)

# Try the newest interpreter first. A name may exist and yet not run (version managers), so ask it.
$(READY): pyproject.toml constraints.txt
	@if [ ! -x "$(PY)" ]; then \
		for candidate in $(or $(PYTHON),python3.13 python3.12 python3.11 python3.10 python3 python); do \
			if "$$candidate" -c 'import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1; then \
				chosen="$$candidate"; break; \
			fi; \
		done; \
		if [ -z "$$chosen" ]; then \
			found=`$(or $(PYTHON),python3) --version 2>&1 | head -n 1`; \
			echo "nanochat needs Python 3.10 to 3.13 with venv; found: $$found. Install one of these or name it: make PYTHON=/path/to/python" >&2; \
			exit 2; \
		fi; \
		echo "creating $(VENV) with `$$chosen --version`"; \
		"$$chosen" -m venv "$(VENV)"; \
	fi
	"$(PY)" -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	"$(PY)" -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[serve,test]'
	@touch $@

capstone: $(READY)
	$(PY) -m nanochat capstone --profile $(PROFILE)$(if $(MINE), --set mine=work --set name=$(PROFILE)-mine)

chat: $(READY)
	$(PY) -m nanochat chat

test: $(READY)
	$(PY) -m pytest -q

lab: $(READY)
	$(PY) -m book lab --work

author-lab: $(READY)
	$(PY) -m book lab

work: $(READY)
	$(PY) -m book work $(N)

grade: $(READY)
	@if [ -z "$(DIR)" ]; then echo "which folder? make grade DIR=submissions" >&2; exit 2; fi
	$(PY) -m book grade "$(DIR)" $(if $(HIDDEN),--hidden "$(HIDDEN)")

chapter: $(READY)
	@if [ -z "$(N)" ]; then echo "which chapter? make chapter N=03" >&2; exit 2; fi
	$(PY) -m book run $(N)

chapters: $(READY)
	$(PY) -m book run

export: $(READY)
	$(PY) -m book export $(N)

print: $(READY)
	$(PY) -m book print $(N)

check: $(READY)
	@failed=0; \
	$(PY) -m ruff check . || failed=1; \
	$(PY) -m ruff format --check . || failed=1; \
	$(PY) -m book check || failed=1; \
	exit $$failed
