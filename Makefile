# Everything runs in .venv. PIP_ARGS is handed to pip, for instance where the package index has no
# CPU build of torch:
#
#     make venv PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"

PIP_ARGS   ?=
SERVE_ARGS ?=
PYTEST_ARGS ?=

# Processes that test side by side; 1 for none beside the first.
JOBS ?= 2
MUTANT_ARGS ?=

# The first of these that is Python 3.11 or newer.
PYTHON ?= $(shell for python in python3.11 python3; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& echo $$python && break; done)

VENV       := .venv
BIN        := $(VENV)/bin
VENV_STAMP := $(VENV)/.installed
MODEL      := build/models/SmolLM2-135M-Instruct
VLLM_CUDA  := build/vllm-cuda
TEXT       := examples/data/alice.txt
DEMO       := build/demo
BENCH      := docs/benchmarks

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help compilers venv model vllm-cuda demo test families mutants bench serve lint format clean

help:  ## say what there is
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: $(VENV_STAMP)  ## install the pinned CPU environment and this package into .venv

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or newer found." \
		"Install it, or name it: make venv PYTHON=/path/to/python3" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV_STAMP): requirements-cpu.txt pyproject.toml vllm_lminf/cli/metadata_shim.py | $(BIN)/python
	$(BIN)/python -m pip install --no-deps $(PIP_ARGS) -r requirements-cpu.txt
	$(BIN)/python -m pip install --no-deps --no-build-isolation $(PIP_ARGS) -e .
	@$(BIN)/vllm-lminf doctor --fix || { echo "If torch is a CUDA build, type:" \
		"rm -r $(VENV) && make venv" \
		"PIP_ARGS='--extra-index-url https://download.pytorch.org/whl/cpu'" >&2; exit 1; }
	@touch $@

model: $(MODEL)/config.json  ## unpack the small trained model that the examples and tests use

# The folder appears under this name only when it is whole.
$(MODEL)/config.json: | $(VENV_STAMP)
	$(BIN)/python examples/prepare_model.py --output $(MODEL)

vllm-cuda: $(VLLM_CUDA)/vllm/__init__.py  ## unpack vLLM for GPUs, its Python files alone, to test with

$(VLLM_CUDA)/vllm/__init__.py: requirements-vllm-cuda.txt tools/vllm_cuda_sources.py | $(VENV_STAMP)
	$(BIN)/python tools/vllm_cuda_sources.py --output $(VLLM_CUDA) -- $(PIP_ARGS)

demo: venv model  ## compare full attention and LM-Infinite on a book, far past the trained length
	$(BIN)/vllm-lminf eval nll --model $(MODEL) --text $(TEXT) --output $(DEMO)
	$(BIN)/vllm-lminf eval passkey --model $(MODEL) --lengths 12288 --depths 1 --keys 1 \
		--systems lminf,middle --n-local 2048 --middle-top-k 16 --output $(DEMO)/passkey

# What other compilers and other CPUs the kernels for CPUs are tested with, where Debian or Ubuntu
# have them; a test whose compiler is missing is skipped, and says which.
COMPILERS := g++-11 clang-14 clang-19 g++-aarch64-linux-gnu qemu-user

compilers:  ## install compilers and an emulator to test the CPU kernels with (root, Debian, Ubuntu)
	apt-get update
	for package in $(COMPILERS); do \
		DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends $$package \
		|| echo "$$package isn't to be had here: its tests are skipped"; done

test: venv model vllm-cuda  ## lint, check types and run every test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/pytest -n $(JOBS) --dist loadscope --no-loadscope-reorder $(PYTEST_ARGS)

families: venv  ## test every model family, and write what was measured into docs/families.md
	$(BIN)/pytest tests/engine/test_families.py -k "not page" $(PYTEST_ARGS)
	$(BIN)/python -m tools.families_table

# MUTANT_ARGS="--file attention.py --every 10" tests some of them; all take hours.
mutants: venv  ## change the Triton kernels one place at a time, and list what no test notices
	$(BIN)/python tools/mutants.py $(MUTANT_ARGS)

bench: venv model  ## time LMINF beside vLLM's own attention, and write docs/benchmarks.md
	$(BIN)/python -m benchmarks.kernels --output $(BENCH)/kernels-cpu.json
	$(BIN)/python -m benchmarks.engines --model $(MODEL) --output $(BENCH)/engines-cpu.json
	$(BIN)/python -m benchmarks.page

# Eager, because vLLM compiles a model for CPUs anew at every start, which takes minutes on two
# cores; SERVE_ARGS=--no-enforce-eager has it compiled. The cache holds about seven requests of any
# length; without a size vLLM takes nearly all memory that there is.
serve: venv model  ## start an OpenAI-compatible server with LM-Infinite on port 8000
	VLLM_ATTENTION_BACKEND=LMINF $(BIN)/vllm serve $(MODEL) \
		--served-model-name smollm2 --max-model-len 1000000 --enforce-eager \
		--kv-cache-memory-bytes 2G $(SERVE_ARGS)

lint: venv  ## check style and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: venv  ## put the code in the house format
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:  ## remove what was built, the model included; .venv stays
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
