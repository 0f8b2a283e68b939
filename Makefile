# Everything runs in .venv, which is made on first use and again when pyproject.toml or constraints.txt change.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A machine with a GPU may have torch for it, and nothing to make .venv from.
GPU_PYTHON ?= $(if $(wildcard $(VENV)/ready),$(BIN)/python,$(PYTHON))

.PHONY: demo test test-compile test-serving test-networks test-all fashion-mnist lint format bench bench-accuracy bench-serving gpu-kit bench-gpu clean

demo: $(VENV)/ready
	$(BIN)/dat-deploy demo

# A worker a core: torch with two threads is hardly quicker than with one in networks as small as the tests'.
PYTEST := $(BIN)/python -m pytest --durations=10
WORKERS := --numprocesses=auto --maxprocesses=4 --dist=worksteal

test: $(VENV)/ready
	$(PYTEST) $(WORKERS) -m "not slow and not gpu and not interpreter and not compiler and not server and not released"
	TRITON_INTERPRET=1 $(PYTEST) $(WORKERS) tests/plugins/test_kernels.py

test-compile: $(VENV)/ready
	$(PYTEST) -m "compiler and not slow and not gpu"

test-serving: $(VENV)/ready
	$(PYTEST) -m "server and not slow and not gpu"

test-networks: $(VENV)/ready
	$(PYTEST) -m "released and not slow and not gpu"

test-all: $(VENV)/ready fashion-mnist
	$(PYTEST) -m "not gpu and not interpreter"
	TRITON_INTERPRET=1 $(PYTEST) $(WORKERS) tests/plugins/test_kernels.py

# 10,000 labelled pictures for variant `demo`, out of a Debian package (31 MB), which is unpacked and not installed.
fashion-mnist: data/fashion-mnist/test

data/fashion-mnist/test: $(VENV)/ready
	mkdir -p data/debian
	cd data/debian && apt-get download dataset-fashion-mnist && dpkg-deb --extract dataset-fashion-mnist_*.deb .
	$(BIN)/python training/fashion_mnist.py --data data/debian/usr/share/datasets/fashion-mnist

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/ready
	$(BIN)/python benchmarks/cpu.py

bench-accuracy: $(VENV)/ready fashion-mnist
	$(BIN)/python benchmarks/accuracy.py

bench-serving: $(VENV)/ready
	$(BIN)/python benchmarks/serving.py

# Machine code for `make bench-gpu` on another machine, and packages that one may lack.
gpu-kit: $(VENV)/ready
	$(BIN)/python benchmarks/gpu_kit.py $(ARGUMENTS)

bench-gpu:
	$(GPU_PYTHON) benchmarks/gpu.py $(ARGUMENTS)

$(VENV)/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "dat-deploy needs Python 3.11 or newer; name one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) .gpu-kit .gpu-kit.* demo data .mypy_cache .ruff_cache .pytest_cache
