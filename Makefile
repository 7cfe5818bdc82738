# Two commands are enough: `make lab` and `make test`. Both make the environment (.venv) first.

PYTHON ?= python3
PIP_FLAGS ?=
CUDA ?= auto
LAB_FLAGS ?=
TEST_FLAGS ?=
TEST_PROCESSES ?= 2
CHAPTER_FLAGS ?=
BENCH_FLAGS ?=
KERNEL_FLAGS ?=
STAGES ?=
BUDGET ?= 480
OUT ?= out/gpu-report
REPORT_FLAGS ?=
COURSE ?= .
SUBMISSIONS ?= out/classroom/submitted
ASSIGNMENTS ?=

BIN := .venv/bin
SETUP := .venv/.setup-done
ORACLES := .venv/oracles
CLIENTS := .venv/clients
BOOK := .venv/book
TEACHING := .venv/teaching
CHAPTERS := $(sort $(wildcard chapters/[0-9][0-9]_*.ipynb))
FIRST := $(firstword $(wildcard chapters/00_*.ipynb))

.DEFAULT_GOAL := help
.PHONY: help setup lab test lint chapters assignments release grade book browser picture peers ray kernels bench gpu-report
.DELETE_ON_ERROR:

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "  Variables: PYTHON=python3.12, CUDA=auto|12|13|none, PIP_FLAGS, LAB_FLAGS, TEST_FLAGS, TEST_PROCESSES=2, CHAPTER_FLAGS, KERNEL_FLAGS, BENCH_FLAGS"
	@echo "  of release and grade: ASSIGNMENTS=\"a02 a03\" (all), SUBMISSIONS=$(SUBMISSIONS), COURSE=$(COURSE)"
	@echo "  and of gpu-report: STAGES, BUDGET (seconds), OUT, REPORT_FLAGS=--rehearse|--list|--again"

setup: $(SETUP) ## make the environment .venv from requirements.lock

# torchao and peft lie apart, in a folder that only their tests see: transformers imports what it finds of them at each
# start, and here starts are what is measured. The clients that the server is tested with have an environment of their own.
$(SETUP): requirements.lock requirements-oracles.lock requirements-clients.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "sllm_mini needs Python 3.11 or newer; name one with: make setup PYTHON=python3.12" >&2; exit 1; }
	@echo "Making the environment .venv: some minutes and 2 GB the first time."
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) -r requirements.lock
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) --no-deps --no-build-isolation --editable .
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) --no-deps --upgrade --target $(ORACLES) -r requirements-oracles.lock
	$(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/python -m pip install --quiet $(PIP_FLAGS) --no-deps -r requirements-clients.lock
	@$(cuda_extra)
	@touch $@
	@echo "The environment is ready: make lab, make test, or source .venv/bin/activate and sllm-mini tour."

# cupy comes in one package per CUDA version and only one may be installed; the lock holds the one for CUDA 13, which
# needs no driver to be imported. It is exchanged only where a GPU is driven through CUDA 12.
define cuda_extra
set -e; want="$(CUDA)"; \
if [ "$$want" = auto ]; then \
  want=none; \
  if nvidia-smi -L >/dev/null 2>&1; then \
    want=$$($(BIN)/python -c 'import torch; print(torch.version.cuda.split(".")[0] if torch.cuda.is_available() else "none")'); \
    if [ "$$want" = none ]; then \
      echo "This machine has an NVIDIA GPU that the installed torch does not see, so GPU parts will be skipped. To use it, remove .venv"; \
      echo "and run: make setup PIP_FLAGS='--index-url ADDRESS' with the address that pytorch.org gives for this machine's driver."; \
    fi; \
  fi; \
fi; \
case "$$want" in \
  none) ;; \
  12) $(BIN)/python -m pip uninstall --quiet --yes cupy-cuda13x; $(BIN)/python -m pip install --quiet $(PIP_FLAGS) --no-build-isolation --editable '.[cuda12]' ;; \
  13) $(BIN)/python -m pip install --quiet $(PIP_FLAGS) --no-build-isolation --editable '.[cuda13]' ;; \
  *) echo "CUDA=$$want is not one of auto, 12, 13, none" >&2; exit 1 ;; \
esac
endef

# Jupyter refuses to run as root unless told; in a container root is who is there.
lab: $(SETUP) ## JupyterLab, open on chapter 00
	@test -n "$(FIRST)" || { echo "chapters/00_*.ipynb is missing; this checkout is not complete" >&2; exit 1; }
	$(BIN)/jupyter lab $(if $(filter 0,$(shell id -u)),--allow-root) --ServerApp.root_dir="$(CURDIR)" $(LAB_FLAGS) $(FIRST)

test: $(SETUP) $(TEACHING)/.done ## every test but those that drive a browser
	$(BIN)/python -m pytest -m "not browser" -n $(TEST_PROCESSES) --dist loadfile $(TEST_FLAGS)
	PYTHONPATH="$(CURDIR)/$(ORACLES)" $(BIN)/python -m pytest $(TEST_FLAGS) tests/test_04_lora.py tests/test_04_quantised.py tests/test_11_adapters.py::test_pefts_own_text || test $$? = 5 # 5: TEST_FLAGS chose none

lint: $(SETUP) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/mypy

chapters: $(SETUP) ## run every chapter and keep its outputs (CHAPTER_FLAGS=--check writes nothing)
	$(BIN)/python -m sllm_mini.lab.execute $(CHAPTER_FLAGS) $(CHAPTERS)

# nbgrader lies apart as well: installed in .venv it would add its buttons and servers to every reader's JupyterLab.
$(TEACHING)/.done: requirements-teaching.lock $(SETUP)
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) --no-deps --upgrade --target $(TEACHING) -r requirements-teaching.lock
	@touch $@

assignments: $(TEACHING)/.done ## grade every assignment's solution, stub, mistakes and attempts to cheat as a teacher would (minutes)
	$(BIN)/python -m pytest --slow $(TEST_FLAGS) tests/test_12_exercise.py tests/test_12_assignments.py

release: $(TEACHING)/.done ## the assignments as students get them, in out/classroom/release
	PYTHONPATH="$(CURDIR)/$(TEACHING)" $(BIN)/python -m sllm_mini.lab.classroom --course "$(COURSE)" release $(ASSIGNMENTS)

grade: $(TEACHING)/.done ## grade the notebooks in SUBMISSIONS/<student>/<assignment>/: feedback as HTML, grades.csv
	PYTHONPATH="$(CURDIR)/$(TEACHING)" $(BIN)/python -m sllm_mini.lab.classroom --course "$(COURSE)" grade "$(SUBMISSIONS)" $(ASSIGNMENTS)

$(BOOK)/.done: requirements-book.lock $(SETUP)
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) --no-deps --upgrade --target $(BOOK) -r requirements-book.lock
	@touch $@

book: $(BOOK)/.done ## the chapters, the systems they rebuild and a reference, as a static site in out/book/html
	PYTHONPATH="$(CURDIR)/$(BOOK)" $(BIN)/python -m sllm_mini.lab.book.build out/book

browser: $(SETUP) ## drive JupyterLab in chromium, as a reader would (TEST_FLAGS=--slow: run every chapter, not the quick ones)
	$(BIN)/python -m pytest -m browser $(TEST_FLAGS) tests/browser

picture: $(SETUP) ## measure a cold start and draw the README's picture
	$(BIN)/python -m sllm_mini.lab.picture chapters/images/anatomy.png

# With the Python that is named, as it is: no .venv, no network. Code 3 says that the budget ended first: the same command goes on.
gpu-report: ## record everything on a machine with a CUDA GPU, by PYTHON, into OUT
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "sllm_mini needs Python 3.11 or newer; name one with: make gpu-report PYTHON=python3.12" >&2; exit 1; }
	@set -f; PYTHONPATH="$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH}" $(PYTHON) -m sllm_mini.lab.report $(STAGES) --budget $(BUDGET) --out "$(OUT)" $(REPORT_FLAGS)

# Without their dependencies: every package that requirements.lock pins stays as it is.
peers: $(SETUP) ## install the loaders of other projects, to compare with
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) --no-deps -r requirements-peers.lock

ray: $(SETUP) ## install Ray, for clusters of machines (then: make test TEST_FLAGS="--slow -k ray")
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) --no-deps -r requirements-ray.lock

kernels: $(SETUP) ## compile the CUDA kernels ahead of time (KERNEL_FLAGS="--arch sm_90")
	$(BIN)/sllm-mini kernels $(KERNEL_FLAGS)

bench: $(SETUP) ## measure every loader (BENCH_FLAGS="small --rounds 3"; make peers first)
	$(BIN)/sllm-mini bench load $(BENCH_FLAGS)
