# `make demo` and `make test` need nothing but python3 (3.10 or later) and a C++ compiler.

VENV := .venv
BIN := $(VENV)/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)

GPUS := $(shell nvidia-smi -L 2>/dev/null | grep -c GPU)
# Ranks of the demo, whose batch divides by two: one on a single GPU.
RANKS ?= $(if $(filter 1,$(GPUS)),1,2)
# Job and overrides of the demo, for example: make demo SET="train.epochs=2 name=short"
JOB ?= jobs/vit_digits.yaml
SET ?=

# DeepSpeed's own default is one port for every run on the machine.
FREE_PORT = $(BIN)/python -c 'from dst_train.processes import free_port; print(free_port())'

CORES := $(shell getconf _NPROCESSORS_ONLN)
export OMP_NUM_THREADS ?= $(shell expr $(CORES) / $(RANKS) \| 1)
ifeq ($(GPUS),0)
# Spares DeepSpeed's search for an accelerator, and its messages.
export DS_ACCELERATOR ?= cpu
endif

# Tests of the op that run on any backend.
OP_TESTS := tests/gpu $(addprefix tests/unit/ops/test_,op.py op_properties.py registration.py scores.py)

.PHONY: help install data demo test unit emulate gpu sanitize lint format clean
help:
	@echo "make demo    install, build the digits shards, train $(JOB) on $(RANKS) ranks"
	@echo "make test    install, run every test"
	@echo "make unit    the unit tests only"
	@echo "make emulate the op's tests with the CUDA kernels emulated on the host"
	@echo "make gpu     the op's tests and benchmark on this machine's GPU; installs nothing"
	@echo "make sanitize the op's tests with its kernels under AddressSanitizer and UBSan"
	@echo "make lint    ruff, mypy, import-linter"
	@echo "make format  let ruff format the code"
	@echo "make clean   remove .venv, caches and runs"

# No bytecode for all 17,000 modules, which takes a minute: Python makes that of each when it is imported first.
$(VENV)/installed: pyproject.toml
	test -x $(BIN)/python || python3 -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --no-compile --editable '.[dev]'
	touch $@

install: $(VENV)/installed

data: install
	$(BIN)/python launch/prepare_digits.py --out data/digits

demo: data
	deepspeed -q --num_gpus $(RANKS) --master_port $$($(FREE_PORT)) launch/train.py --job $(JOB) $(foreach s,$(SET),--set '$(s)')

test: unit
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --ignore tests/unit --numprocesses 2 --dist loadfile

unit: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/unit --numprocesses 2

emulate: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(OP_TESTS) --backend emulated --numprocesses 2

# With the Python that has torch (2.11 or later), nvcc and ninja, and without the project's other dependencies; pytest knows
# pyproject.toml's `timeout` only with its plugin.
gpu:
	PYTHONPATH=ops:. python3 -m pytest -W ignore::pytest.PytestConfigWarning $(OP_TESTS) --backend cuda
	PYTHONPATH=ops:. python3 benchmarks/op_cuda.py

# One run for each instruction set, and one of the emulated CUDA kernels, built with AddressSanitizer and UBSan. avx512 is left out: its
# tiles are avx2's and its vectors avx512_48k's, which would be avx2 once more on a processor without them (hence the grep). Code that is
# generated at run time is not instrumented; `portable` computes the same without it. -s: pytest's capture would lose the report. Not
# optimised, and without tracking of variables, or the build takes minutes. Two at a time, the longest first.
SANITIZED = env DST_OPS_CACHE=$(CURDIR)/build/sanitize DST_OPS_REQUIRE_FUSED=1 OMP_NUM_THREADS=2 \
  CXX="c++ -g1 -fno-var-tracking -fsanitize=address,undefined -fno-sanitize-recover=all" CXXFLAGS=-O1 \
  LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libubsan.so)"
sanitize: install
	$(MAKE) --jobs 2 --output-sync $(addprefix sanitize-,emulated portable avx2 $(shell grep -qsw avx512f /proc/cpuinfo && echo avx512_48k))
sanitize-emulated:
	$(SANITIZED) ASAN_OPTIONS=detect_leaks=0:detect_stack_use_after_return=0 $(BIN)/python -m pytest -q -s tests/gpu/test_emulated.py --backend emulated --numprocesses 2
sanitize-%:
	$(SANITIZED) DST_OPS_ISA=$* ASAN_OPTIONS=detect_leaks=0 $(BIN)/python -m pytest -q -s tests/unit/ops/test_op.py tests/unit/ops/test_scores.py --numprocesses 2

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) runs build .import_linter_cache dist .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
