# Everything that can be done in a checkout.  A virtual environment in .venv holds what is needed:
# MXNet, the NumPy it works with, CMake and Ninja.  Choose another Python with
# `make PYTHON=python3.9 ...`, another MXNet with `make MXNET=mxnet-cu112 ...`.
PYTHON ?= python3
MXNET ?= mxnet
COMPATIBILITY := python/gluon_syncbn/compatibility.py
MXNET_VERSION := $(shell sed -n 's/^MXNET = "\(.*\)"/\1/p' $(COMPATIBILITY))
VENV ?= .venv$(if $(filter-out mxnet,$(MXNET)),-$(MXNET))
BIN := $(VENV)/bin
CU112 := .venv-cu112
UPSTREAM := .venv-upstream
HOROVOD := .venv-horovod
MPI ?= mpich
MPI_ENV = .venv-mpi-$(MPI)
LIBRARY := python/gluon_syncbn/libgluon_syncbn.so
SOURCES := CMakeLists.txt $(shell find src/operator -type f)
CXX_FILES := $(shell find src/operator tests benchmarks -name "*.h" -o -name "*.inc" -o -name "*.c" -o -name "*.cc" -o -name "*.cu*")
MXNET_DIR = $(shell $(BIN)/python -c 'import importlib.util as u, os; print(os.path.dirname(u.find_spec("mxnet").origin))')
DIST ?= dist
BENCH_ARGS ?=
EXAMPLE_ARGS ?=
TEST_ARGS ?=
UPSTREAM_ARGS ?=

.DEFAULT_GOAL := help

help:  ## list what can be done
	@grep -hE '^[a-z0-9_]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

train: build  ## train the example on two CPU contexts: digits, a minute (EXAMPLE_ARGS="--help")
	$(BIN)/python examples/mnist.py $(EXAMPLE_ARGS)

finetune: build  ## convert, train and export a model-zoo network, a minute (EXAMPLE_ARGS="--help")
	$(BIN)/python examples/finetune.py $(EXAMPLE_ARGS)

segmentation: build  ## train segmentation with and without synchronization, minutes (EXAMPLE_ARGS="--help")
	$(BIN)/python examples/segmentation.py $(EXAMPLE_ARGS)

notebook: build .venv-notebook/ready  ## run examples/mnist.ipynb in Jupyter and keep its outputs, a minute
	PYTHONPATH="$(abspath python)" .venv-notebook/bin/python tests/helpers/execute_notebook.py examples/mnist.ipynb

small_batch: build  ## compare normalization over batch sizes, 20 minutes (EXAMPLE_ARGS="--help")
	$(BIN)/python examples/small_batch.py $(EXAMPLE_ARGS)

# In two processes, because many tests wait for processes that they start, or for a deadline.
test: lint build  ## lint, then run the tests (TEST_ARGS="-k exchange", "-m slow", "-n 0 --pdb")
	$(BIN)/python -m pytest -n 2 --dist loadfile $(TEST_ARGS)

build: $(LIBRARY)  ## compile the operators

bench: build  ## time it beside MXNet and PyTorch, some minutes (BENCH_ARGS="--quick")
	PATH="$(abspath $(BIN)):$$PATH" cmake --build build --target kernels_bench ranks_bench
	$(BIN)/python benchmarks/run.py --library build/libkernels_bench.so $(BENCH_ARGS)
	$(BIN)/python benchmarks/processes.py
	$(BIN)/python benchmarks/networks.py
	$(BIN)/python benchmarks/waiting.py
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python benchmarks/ranks.py --program build/ranks_bench

gluoncv: build  ## put GluonCV into .venv-gluoncv and test it with our layers, some minutes
	$(PYTHON) -m venv .venv-gluoncv
	.venv-gluoncv/bin/python -m pip install --quiet --no-deps -r tests/data_parallel/requirements-gluoncv.txt
	PYTHONPATH=python .venv-gluoncv/bin/python -m pytest tests/data_parallel/test_gluoncv.py $(TEST_ARGS)

horovod: build $(HOROVOD)/ready  ## build Horovod in .venv-horovod and test it with our layers, 3 minutes
	PYTHONPATH="$(abspath python)" $(HOROVOD)/bin/python -m pytest tests/distributed/test_horovod.py $(TEST_ARGS)

# The main library is the same for every MPI.
mpi: build $(MPI_ENV)/ready  ## test across processes with MPI=mpich, debian-mpich or debian-openmpi
	rm -rf $(MPI_ENV)/python
	mkdir $(MPI_ENV)/python
	cp -r python/gluon_syncbn $(MPI_ENV)/python
	rm -f $(MPI_ENV)/python/gluon_syncbn/libgluon_syncbn_mpi.so
	PATH="$(abspath $(BIN)):$$PATH" MPICXX="$(abspath $(MPI_ENV)/bin/mpicxx)" \
	  cmake -S . -B $(MPI_ENV)/build -G Ninja \
	  -DGLUON_SYNCBN_WERROR=ON -DGLUON_SYNCBN_CUDA=OFF -DGLUON_SYNCBN_MPI=ON -DMXNET_DIR="$(MXNET_DIR)" \
	  -DGLUON_SYNCBN_LIBRARY_DIR="$(abspath $(MPI_ENV))/python/gluon_syncbn"
	PATH="$(abspath $(BIN)):$$PATH" cmake --build $(MPI_ENV)/build --target gluon_syncbn_mpi
	PYTHONPATH="$(abspath $(MPI_ENV)/python)" $(MPI_ENV)/bin/python -m pytest tests/distributed $(TEST_ARGS)

cu112: build $(CU112)/ready  ## test our CPU side in mxnet-cu112, with or without a GPU; downloads 500 MB
	PYTHONPATH="$(abspath python)" GLUON_SYNCBN_TEST_CU112=1 \
	  LD_LIBRARY_PATH="$${LD_LIBRARY_PATH:+$$LD_LIBRARY_PATH:}$(abspath $(CU112)/standins)" \
	  $(CU112)/bin/python -m pytest $(TEST_ARGS)

emulated: build $(CU112)/ready  ## test our GPU side in mxnet-cu112, on emulated GPUs; the same 500 MB
	$(CU112)/bin/python tests/helpers/emulated_cuda.py $(CU112)/emulated
	PYTHONPATH="$(abspath $(CU112)/emulated/python)" EMULATED_GPUS=4 \
	  LD_LIBRARY_PATH="$(abspath $(CU112)/emulated/lib):$(abspath $(CU112)/standins)" \
	  $(CU112)/bin/python -m pytest --confcutdir=tests/gpu tests/gpu $(TEST_ARGS)

# The checkout is looked at first, since the rest takes minutes.
upstream: upstream_source build $(UPSTREAM)/ready  ## run MXNet's own tests on our operators, half an hour (MXNET_SOURCE=a checkout of v1.9.1)
	$(UPSTREAM)/bin/python tests/upstream/run.py "$(MXNET_SOURCE)" $(UPSTREAM_ARGS)

upstream_source:
	@$(PYTHON) tests/upstream/checkout.py "$(MXNET_SOURCE)"

torch_cases: build $(if $(wildcard .venv-torch/bin/python),,torch)  ## run the cases of PyTorch's and Apex's tests against torch, seconds
	TORCH_CASES_TABLE=out/torch_cases.md $(BIN)/python -m pytest tests/torch_cases $(TEST_ARGS)
	@cat out/torch_cases.md

torch:  ## put PyTorch (CPU) into .venv-torch, where `make bench` finds it
	$(PYTHON) -m venv .venv-torch
	.venv-torch/bin/python -m pip install --quiet torch==2.13.0 "numpy<2.3"

docs: build $(VENV)/docs-ready  ## build the guide and the API reference into docs/_build, seconds
	$(BIN)/python -W "error:Unknown section" -m sphinx -EqW --keep-going docs docs/_build
	@echo "docs/_build/index.html"

# Without the MPI side, which has to be built for the MPI that it will run with.  libmxnet.so comes with
# MXNet.  libgomp.so.1 is the system's, because MXNet's library takes it from
# there: a copy in the wheel would be a second OpenMP runtime, with as many threads again.
# *.egg-info has the last build's list of files, which would be added to the new one.
wheel: $(VENV)/ready  ## build the source distribution and one wheel for all Pythons, two minutes
	rm -rf "$(DIST)" python/*.egg-info
	PATH="$(abspath $(BIN)):$$PATH" GLUON_SYNCBN_ANY_MXNET=1 GLUON_SYNCBN_MPI=OFF \
	  $(BIN)/python -m build --outdir "$(DIST)"
	PATH="$(abspath $(BIN)):$$PATH" && cd "$(DIST)" && \
	  auditwheel repair --wheel-dir . --exclude libmxnet.so --exclude libgomp.so.1 --plat \
	    "$$(auditwheel show *-linux_*.whl | grep -o 'manylinux_[0-9_]*x86_64')" *-linux_*.whl && \
	  rm *-linux_*.whl

sanitize: $(VENV)/ready  ## build and stress everything under sanitizers, some minutes (SEED=1)
	PATH="$(abspath $(BIN)):$$PATH" tests/sanitize/run.sh "$(abspath $(BIN))/python" "$(MXNET_DIR)" $(SEED)

properties: build  ## test thousands of random batches, some minutes (SEED=1)
	seed=$(or $(SEED),$$(date +%s)) && echo "SEED=$$seed" && HYPOTHESIS_PROFILE=many \
	  $(BIN)/python -m pytest tests/numerics --hypothesis-seed=$$seed $(TEST_ARGS)

faults: build  ## inject faults into training, five minutes (COUNT=1000 SEED=1)
	PYTHONPATH="$(abspath python):$(abspath tests/helpers)" $(BIN)/python tests/faults/run.py \
	  $(if $(COUNT),--count $(COUNT)) $(if $(SEED),--seed $(SEED))

soak: build  ## train 20,000 steps: memory, statistics, loss; some minutes (STEPS=20000)
	PYTHONPATH="$(abspath python)" $(BIN)/python tests/faults/soak.py $(if $(STEPS),--steps $(STEPS))

lint: $(VENV)/ready  ## check formatting, types and common mistakes
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

format: $(VENV)/ready  ## format Python and C++
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

clean:  ## remove what was built; the environment stays
	rm -rf build dist out docs/_build .mypy_cache python/gluon_syncbn/*.so python/*.egg-info

.PHONY: help train finetune segmentation small_batch notebook test build bench gluoncv horovod mpi cu112 emulated upstream upstream_source torch_cases torch docs wheel sanitize properties faults soak lint format clean

$(CU112)/ready: requirements.txt tests/helpers/cuda_standins.py
	$(PYTHON) -m venv $(CU112)
	$(CU112)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt \
	  mxnet-cu112==$(MXNET_VERSION) nvidia-cuda-runtime-cu11==11.8.89
	$(CU112)/bin/python tests/helpers/cuda_standins.py $(CU112)/standins
	touch $@

$(UPSTREAM)/ready: tests/upstream/requirements.txt Makefile
	$(PYTHON) -m venv $(UPSTREAM)
	$(UPSTREAM)/bin/python -m pip install --quiet --disable-pip-version-check -r $< mxnet==$(MXNET_VERSION)
	touch $@

.venv-notebook/ready: requirements.txt Makefile
	$(PYTHON) -m venv .venv-notebook
	.venv-notebook/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt \
	  mxnet==$(MXNET_VERSION) nbclient==0.10.1 ipykernel==6.29.5
	touch $@

$(LIBRARY): $(VENV)/ready $(SOURCES)
	PATH="$(abspath $(BIN)):$$PATH" cmake -S . -B build -G Ninja -DGLUON_SYNCBN_WERROR=ON \
	  -DMXNET_DIR="$(MXNET_DIR)"
	PATH="$(abspath $(BIN)):$$PATH" cmake --build build
	@touch $@

$(VENV)/docs-ready: $(VENV)/ready docs/requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r docs/requirements.txt
	touch $@

# Horovod finds MXNet by importing it, so it is built in this environment, without isolation.  pip's
# cache is left out because it would not notice other options, nor another MXNet or MPI.
$(HOROVOD)/ready: tests/distributed/requirements-horovod.txt
	$(PYTHON) -m venv $(HOROVOD)
	$(HOROVOD)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r $<
	PATH="$(abspath $(HOROVOD)/bin):$$PATH" MAKEFLAGS="-j$$(nproc)" \
	  HOROVOD_WITH_MXNET=1 HOROVOD_WITHOUT_TENSORFLOW=1 HOROVOD_WITHOUT_PYTORCH=1 \
	  HOROVOD_WITH_MPI=1 HOROVOD_WITHOUT_GLOO=1 \
	  $(HOROVOD)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
	  --no-cache-dir --no-build-isolation --no-binary horovod horovod==0.28.1
	touch $@

# An MPI from PyPI, or Debian's; mpi4py's wheel does not find Debian's MPICH.
.venv-mpi-debian-%/ready: Makefile
	$(PYTHON) -m venv $(@D)
	for tool in mpicc mpicxx mpirun; do \
	  command -v $$tool.$* || { echo "No $$tool.$*: install lib$*-dev" >&2; exit 1; }; \
	  printf '#!/bin/sh\nexec %s "$$@"\n' "$$(command -v $$tool.$*)" > $(@D)/bin/$$tool; \
	  chmod +x $(@D)/bin/$$tool; \
	done
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check mxnet==$(MXNET_VERSION) "numpy<1.24" pytest
	MPICC="$(abspath $(@D))/bin/mpicc" $(@D)/bin/python -m pip install --quiet --disable-pip-version-check \
	  --no-cache-dir --no-binary mpi4py mpi4py==4.1.2
	touch $@

.venv-mpi-%/ready: Makefile
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check mxnet==$(MXNET_VERSION) "numpy<1.24" \
	  pytest $* mpi4py==4.1.2
	touch $@

# The package itself is put on the path, not copied, so that a change needs no installation.
$(VENV)/ready: requirements.txt Makefile
	$(PYTHON) -c 'import runpy, sys; \
	  runpy.run_path("$(COMPATIBILITY)")["check_python"](sys.version_info)' || \
	  { echo "Choose one: make PYTHON=python3.11 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt \
	  $(MXNET)==$(MXNET_VERSION)
	echo "$(abspath python)" > "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')/gluon_syncbn.pth"
	touch $@
