# `make help` lists the commands. Every step leaves a stamp, so a repeat does only what changed.
SHELL := /bin/bash -o pipefail
.DEFAULT_GOAL := help

PYTHON ?=
DEFAULT_TORCH := $(shell sed -n 's/^torch==//p' requirements-dev.txt)
DEFAULT_TRANSFORMERS := $(shell sed -n 's/^transformers==//p' requirements-dev.txt)
TORCH ?= $(DEFAULT_TORCH)
TRANSFORMERS ?= $(DEFAULT_TRANSFORMERS)
PYTEST_ARGS ?=
PRETRAIN_ARGS ?=

# Other versions than the pinned ones get an environment of their own; lint is judged with the pinned ones.
IS_DEFAULT := $(and $(filter $(DEFAULT_TORCH),$(TORCH)),$(filter $(DEFAULT_TRANSFORMERS),$(TRANSFORMERS)))
VENV := $(if $(IS_DEFAULT),.venv,.venv-$(TORCH)-$(TRANSFORMERS))
PY := $(VENV)/bin/python
STAMPS := $(VENV)/stamps

HEADERS := $(shell find csrc -name '*.h' -o -name '*.cuh')
HOST_SOURCES := $(shell find csrc -name '*.cpp')
MODEL_SOURCES := $(shell find tests/hopper_model -name '*.h' -o -name '*.cuh' -o -name '*.cpp')
CUDA_SOURCES := $(shell find csrc -name '*.cu')
TIDY_STAMPS := $(HOST_SOURCES:%=$(STAMPS)/tidy/%)
PYTHON_FOLDERS := setup.py torch_moe_ep tests benchmarks examples .ci docs/images
JOBS ?= $(or $(MAX_JOBS),$(shell nproc))

.PHONY: help
help:
	@echo 'make pretrain       train a small Mixtral on real text; results under runs/'
	@echo 'make smp-example    an SMP v2 style script on 4 CPU ranks: train, validate, save, resume'
	@echo 'make test           lint and all tests but the long ones'
	@echo 'make test-full      lint and all tests, packages, worlds of 8 ranks and soaks among them'
	@echo 'make test-sagemaker what the SageMaker example asks AWS for, with its 300 MB of packages, no account'
	@echo 'make lint           ruff, mypy, clang-format, clang-tidy'
	@echo 'make format         let ruff and clang-format rewrite what lint would refuse'
	@echo 'make build          compile the operator library (with CUDA where torch and nvcc have it)'
	@echo 'make setup          the virtual environment alone, in $(VENV)'
	@echo 'make info           versions, how the library was built, what this machine can use'
	@echo 'make sanitize       compute-sanitizer over the small GPU tests (needs a GPU)'
	@echo 'make kernel-report  registers, shared memory and main loops of the CUDA kernels'
	@echo 'make docs           the documents as a site in build/site; a link that leads nowhere is an error'
	@echo 'make clean          remove everything that was built and every environment'
	@echo
	@echo 'PYTHON=python3.12   the interpreter, 3.10 to 3.13'
	@echo 'TORCH=2.15.0 TRANSFORMERS=5.24.0   other versions, in an environment of their own'
	@echo 'TORCH_MOE_EP_CUDA=auto|0|1  TORCH_CUDA_ARCH_LIST="8.0+PTX;9.0a"  MAX_JOBS=2   for the build'
	@echo 'PYTEST_ARGS="-k route"  PRETRAIN_ARGS=--quick   handed on'

# Set-up

.PHONY: setup venv
setup venv: $(STAMPS)/requirements

$(STAMPS)/python:
	@.ci/make-venv "$(VENV)" "$(PYTHON)"
	@mkdir -p $(@D) && touch $@

$(STAMPS)/requirements: requirements-dev.txt $(STAMPS)/python
	@echo '== installing torch $(TORCH), transformers $(TRANSFORMERS) and the tools into $(VENV)'
	@sed -e 's/^torch==.*/torch==$(TORCH)/' -e 's/^transformers==.*/transformers==$(TRANSFORMERS)/' \
		$(if $(IS_DEFAULT),,-e 's/^tokenizers==.*/tokenizers/' -e 's/^datasets==.*/datasets/') requirements-dev.txt > $(VENV)/requirements.txt
	@$(PY) -m pip install --quiet --disable-pip-version-check -r $(VENV)/requirements.txt
	@touch $@

# The build: ninja recompiles what changed; the log is kept and shown when it fails.

.PHONY: build
build: $(STAMPS)/build

$(STAMPS)/build: $(STAMPS)/requirements setup.py pyproject.toml $(HEADERS) $(HOST_SOURCES) $(CUDA_SOURCES)
	@echo '== compiling the operator library (minutes at the first time; log in $(VENV)/build.log)'
	@command -v g++ > /dev/null || { echo 'g++ is missing: apt install g++' >&2; exit 1; }
	@$(PY) -m pip install --verbose --disable-pip-version-check --no-build-isolation --no-deps --editable . \
		> $(VENV)/build.log 2>&1 || { .ci/show-build-error $(VENV)/build.log; exit 1; }
	@grep -E -o 'torch_moe_ep: (building|/).*' $(VENV)/build.log | sort -u
	@touch $@

# Lint

.PHONY: lint format
lint: $(STAMPS)/requirements
	@echo '== ruff'
	@$(VENV)/bin/ruff check --quiet $(PYTHON_FOLDERS)
	@$(VENV)/bin/ruff format --quiet --check $(PYTHON_FOLDERS)
	@echo '== mypy'
	@$(VENV)/bin/mypy
	@echo '== clang-format'
	@$(VENV)/bin/clang-format --dry-run -Werror $(HEADERS) $(HOST_SOURCES) $(CUDA_SOURCES) $(MODEL_SOURCES)
	@echo '== clang-tidy on the host files that changed'
	@$(MAKE) --no-print-directory --jobs=$(JOBS) --output-sync $(TIDY_STAMPS)

format: $(STAMPS)/requirements
	@$(VENV)/bin/ruff check --quiet --fix-only $(PYTHON_FOLDERS)
	@$(VENV)/bin/ruff format --quiet $(PYTHON_FOLDERS)
	@$(VENV)/bin/clang-format -i $(HEADERS) $(HOST_SOURCES) $(CUDA_SOURCES) $(MODEL_SOURCES)

# The compiler's flags: headers of torch and CUDA are system headers here as in the build.
$(STAMPS)/tidy-flags: $(STAMPS)/requirements .ci/tidy_flags.py
	@$(PY) .ci/tidy_flags.py > $@

$(TIDY_STAMPS): $(STAMPS)/tidy/%: % $(HEADERS) .clang-tidy $(STAMPS)/tidy-flags
	@.ci/tidy $(VENV)/bin/clang-tidy $(STAMPS)/tidy-flags $<
	@mkdir -p $(@D) && touch $@

# Tests

.PHONY: test test-full test-sagemaker sanitize
test: $(if $(IS_DEFAULT),lint) $(STAMPS)/build
	@echo '== tests'
	@$(PY) -m pytest $(PYTEST_ARGS)

test-full: $(if $(IS_DEFAULT),lint) $(STAMPS)/build
	@echo '== all tests'
	@$(PY) -m pytest -m 'full or not full' $(PYTEST_ARGS)

# In an environment of its own: the package pins older versions of packages that the tools want newer.
SAGEMAKER_VENV := .venv-sagemaker
$(SAGEMAKER_VENV)/done:
	@.ci/make-venv "$(SAGEMAKER_VENV)" "$(PYTHON)"
	@$(SAGEMAKER_VENV)/bin/python -m pip install --quiet --disable-pip-version-check \
		sagemaker==2.257.7 sagemaker-training==5.1.4 pytest==9.2.0
	@touch $@

test-sagemaker: $(SAGEMAKER_VENV)/done
	@$(SAGEMAKER_VENV)/bin/python -m pytest --noconftest tests/test_sagemaker_request.py

# On a machine with a GPU: compute-sanitizer over the GPU tests' small cases.
sanitize: $(STAMPS)/build
	@$(PY) -m tests.sanitize $(SANITIZE_ARGS)

# Use

.PHONY: pretrain smp-example info kernel-report
pretrain: $(STAMPS)/build
	@$(PY) -m examples.pretrain $(PRETRAIN_ARGS)

SMP_EXAMPLE = CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(PY) -m torch.distributed.run --standalone \
	--nproc-per-node=4 -m examples.smp_style.train --bf16=0 --lr_decay_iters=40 --warmup=0.1 $(SMP_ARGS)
smp-example: $(STAMPS)/build
	@$(SMP_EXAMPLE) --max_steps=8
	@$(SMP_EXAMPLE) --max_steps=16 --resume_from_checkpoint=runs/smp-example

info: $(STAMPS)/build
	@$(PY) -m torch_moe_ep.info

kernel-report: $(STAMPS)/build
	@$(PY) .ci/kernel_report.py

.PHONY: docs
docs: $(STAMPS)/requirements
	@NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict 2>&1 | sed '/^INFO/d'  # --quiet would not be strict
	@echo 'build/site/index.html'

.PHONY: clean
clean:
	rm -rf build dist .venv .venv-* *.egg-info torch_moe_ep/_ops.* torch_moe_ep/_hooks.*.so .mypy_cache .ruff_cache .pytest_cache
