# make demo | test | native-test | bench | gpu | gpu-experiments | lint | clean
#
# Each target does all its own set-up. If PYTHON has torch >= 2.11 it is used as it is; otherwise, or
# when TORCH=version is given, a virtual environment with that torch is made.
PYTHON ?= python3
DEFAULT_TORCH := 2.13.0

HAS_TORCH := $(shell $(PYTHON) -c "import torch; \
  print(int(tuple(int(x) for x in torch.__version__.split('.')[:2]) >= (2, 11)))" 2>/dev/null)

ifneq ($(TORCH),)
  VENV := .venv-torch-$(TORCH)
else ifeq ($(HAS_TORCH),1)
  VENV :=
else
  TORCH := $(DEFAULT_TORCH)
  VENV := .venv
endif

ifeq ($(VENV),)
  PY := $(PYTHON)
  READY := build/.ready
else
  PY := $(CURDIR)/$(VENV)/bin/python
  READY := $(VENV)/.ready
endif

TOOLS := "setuptools>=77" "pybind11>=2.12" ninja wheel
.PHONY: demo test native-test cuda-check bench bench-peers gpu gpu-experiments lint install which-python clean

demo: install
	cd build && $(PY) -m fastif_ext demo --output ../demo

# From another folder, so that the installed package is tested and not the sources.
test: install
	cd build && $(PY) -m pytest ../python_tests $(ARGS)

install: $(READY)
	rm -rf build/lib* build/bdist*
	$(PY) -m pip install -q --no-build-isolation --no-deps --force-reinstall .

$(READY): pyproject.toml
ifneq ($(VENV),)
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q "torch==$(TORCH)" numpy
endif
	$(PY) -m pip install -q $(TOOLS)
	$(PY) -m pip install -q --no-build-isolation ".[test]"
	mkdir -p $(@D) && touch $@

native-test:
	cmake -S . -B build/native
	cmake --build build/native --parallel $$(nproc)
	ctest --test-dir build/native --output-on-failure --parallel $$(nproc)

# Compiles and links every CUDA kernel for three generations, without a GPU or a CUDA torch; fails
# where registers spill.
cuda-check:
	cmake -S . -B build/cuda -DFASTIF_CUDA=ON
	cmake --build build/cuda --parallel $$(nproc) --target fastif_cuda
	.ci/cuda_report build/cuda/sm_*

# Benchmarks, their table and their page, in build/bench; OUTPUT=bench/results renews the committed
# ones. `make bench-peers` first installs what solvers and k-means are compared with.
OUTPUT ?= build/bench/results
bench: install
	mkdir -p build/bench $(OUTPUT)
	cd build && $(PY) -m pytest ../bench -o python_files='bench_*.py' --benchmark-columns=median,iqr \
	  --benchmark-sort=name --benchmark-json=bench/cpu.json $(ARGS)
	$(PY) bench/report.py build/bench/cpu.json $(OUTPUT)/cpu-1-thread.json
	cd build && $(PY) ../bench/scaling.py --output $(abspath $(OUTPUT))
	$(PY) bench/performance.py $(OUTPUT)

# Pinned: through torchvision a peer would replace torch by the newest one.
bench-peers: $(READY)
	$(PY) -m pip install -q --no-build-isolation ".[peers]" \
	  "torch==$$($(PY) -c 'import torch; print(torch.__version__)')"

# On a machine with a GPU, nvcc and a CUDA torch; PYTHON is used as it is.
RESULTS ?= bench/results
gpu:
	.ci/gpu $(PYTHON) $(RESULTS)

# The paper's settings on a GPU, after `make gpu`: DATA is a folder with mnist/ (IDX files), cifar10/
# (its binary version) and, if it need not be trained, vgg11_cifar10.pt. Goes on where it was stopped.
gpu-experiments:
	.ci/gpu_experiments $(PYTHON) $(DATA) $(RESULTS)/experiments

lint: install
	$(PY) -m pip install -q "ruff==0.17.6" "mypy==2.4.1" "clang-format==23.1.5"
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -c "from clang_format import clang_format; clang_format()" --dry-run -Werror \
	  $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu')
	$(PY) -m mypy

which-python:
	@echo $(PY)

clean:
	rm -rf build .venv .venv-torch-* .venv-other-* *.egg-info
