# Every target sets itself up: the first run makes .venv and installs, later ones skip what is done.
# PYTHON picks the interpreter, PIP_FLAGS is passed to pip (an index with the torch build you want).
PYTHON ?= python3
PIP_FLAGS ?=
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt $(PIP_FLAGS)
STAMP := $(VENV)/.installed
INPUTS := constraints.txt pyproject.toml setup.py $(shell find csrc -type f)
RUN := HF_HUB_OFFLINE=1 $(BIN)/

# the oldest diffusers that is supported, over everything else in $(VENV)
OLDEST := .venv-oldest
site = $$($(1)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")
FACING := $(addprefix tests/test_,diffusers_backend.py diffusers_presets.py pipelines.py parity.py matrix.py)

# what travels to a machine with a GPU and no network; its Python and the versions it has
CUDA_PYTHON ?= python3.12
CUDA := .venv-cuda
KIT := .gpu-kit

.PHONY: demo test test-oldest lint bench gpu-kit venv clean

demo: venv
	$(RUN)fastcache demo

test: venv
	$(RUN)python -m pytest -n 2 --dist worksteal -q $(PYTEST_FLAGS)

test-oldest: $(OLDEST)/.installed
	HF_HUB_OFFLINE=1 $(OLDEST)/bin/python -m pytest -n 2 --dist worksteal -q $(PYTEST_FLAGS) $(FACING)

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: venv
	$(RUN)fastcache bench ops --quick
	$(RUN)fastcache bench overhead --quick

# needs nvcc and a Python of the minor version there; see bench/gpu.sh for how the kit is used
gpu-kit: $(CUDA)/.installed
	$(CUDA)/bin/python -m bench.gpu.kit make $(KIT)

$(CUDA)/.installed: constraints-cuda.txt
	@echo "setting up $(CUDA): a CUDA build of torch, several GB"
	test -x $(CUDA)/bin/python || $(CUDA_PYTHON) -m venv $(CUDA)
	$(CUDA)/bin/python -m pip install --disable-pip-version-check -q -c constraints-cuda.txt $(PIP_FLAGS) \
		torch triton numpy safetensors setuptools wheel ninja pybind11 pytest hypothesis
	touch $@

venv: $(STAMP)

# torch first: the extension is built against the torch that will load it, hence no build isolation
$(STAMP): $(INPUTS)
	@echo "setting up $(VENV) (a few minutes the first time)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) pip setuptools wheel ninja pybind11
	$(PIP) torch numpy
	$(PIP) --no-build-isolation -e .[test,dev]
	touch $@

# what $(VENV) holds is seen through a .pth file, so that only what differs is installed
$(OLDEST)/.installed: $(STAMP) constraints-oldest.txt
	$(BIN)/python -m venv --clear --without-pip $(OLDEST)
	echo "import site; site.addsitedir('$(call site,$(VENV))')" > $(call site,$(OLDEST))/base.pth
	$(OLDEST)/bin/python -m pip install --disable-pip-version-check -q -c constraints-oldest.txt $(PIP_FLAGS) diffusers
	touch $@

clean:
	rm -rf $(VENV) $(OLDEST) $(CUDA) $(KIT) build dist *.egg-info fastcache/*.so
