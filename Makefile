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

site = $$($(1)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")
tests = HF_HUB_OFFLINE=1 $(1)/bin/python -m pytest -n 2 --dist worksteal -q $(PYTEST_FLAGS)

# Versions of CI's own over everything else in $(VENV), each with a constraints file that names them:
# the oldest diffusers that is supported, with the tests that face it,
OLDEST := .venv-oldest
FACING := tests/parity tests/test_pipelines.py tests/integrations/test_diffusers_backend.py
# and two more pairs of torch and triton, in the CUDA builds that users of a GPU have (4.5 GB each, no GPU needed).
TORCH := .venv-torch
NEWEST := .venv-newest
GRAPHS := tests/ops/test_ops.py tests/runtime/test_contract.py $(addprefix tests/graphs/test_,compile.py on_device.py export.py generated_code.py static_addresses.py)

# what travels to a machine with a GPU and no network; its Python and the versions it has
CUDA_PYTHON ?= python3.12
CUDA := .venv-cuda
KIT := .gpu-kit

# what the documentation is built with
DOCS := .venv-docs

# other Pythons that the wheel must install on, where they are to be had, and the oldest torch that it runs on
PYTHONS ?= python3.10 python3.12 python3.13 python3.14
OLDEST_TORCH := 2.10.0

.PHONY: demo test test-fast test-gates test-bench test-oldest test-torch test-newest lint wheel wheel-test release-notes site report bench gpu-kit venv clean

demo: venv
	$(RUN)fastcache demo

test: venv
	$(call tests,$(VENV)) -m "not gate and not bench"

# what shows without a GPU what the kernels and the programs with them would do on one
test-gates: venv
	$(call tests,$(VENV)) -m gate

# the benchmarks, the trainings of their models, and which of two is nearer on them
test-bench: venv
	$(call tests,$(VENV)) -m bench

# what answers while one works: nothing that compiles, interprets kernels or runs whole models
test-fast: venv
	$(call tests,$(VENV)) -m "not slow"

test-oldest: $(OLDEST)/.installed
	$(call tests,$(OLDEST)) $(FACING)

test-torch: $(TORCH)/.installed
	$(call tests,$(TORCH)) $(GRAPHS)

test-newest: $(NEWEST)/.installed
	$(call tests,$(NEWEST)) $(GRAPHS)

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python tests/house.py
	$(BIN)/python tests/words.py

# dist/: one wheel for this platform, for every Python and every torch from 2.10 on, and the sdist
wheel: venv
	rm -rf dist build/lib build/bdist*
	FASTCACHE_BUILD_CPU=1 $(BIN)/python -m pip --disable-pip-version-check wheel -q --no-build-isolation --no-deps -w dist .
	$(BIN)/python -c "from setuptools import build_meta; build_meta.build_sdist('dist')" > /dev/null

# in clean environments without a compiler: beside the versions of torch that CI has, on other Pythons, and with the
# oldest torch, installed there (several GB, removed again)
wheel-test: wheel $(TORCH)/.installed $(NEWEST)/.installed
	$(BIN)/python tests/clean_environments.py dist/*.whl --beside $(VENV) $(TORCH) $(NEWEST) --python $(PYTHONS)
	$(BIN)/python tests/clean_environments.py dist/*.whl --torch $(OLDEST_TORCH)

# the documentation as pages in site/; it needs neither torch nor, once set up, a network
site: $(DOCS)/.installed
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build -q
	$(DOCS)/bin/python docs/_site/check.py site

$(DOCS)/.installed: constraints-docs.txt
	@echo "setting up $(DOCS)"
	test -x $(DOCS)/bin/python || $(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --disable-pip-version-check -q -r $< $(PIP_FLAGS)
	touch $@

# what the release of a tag says, after a look that the tag and the tree agree
release-notes:
	@$(PYTHON) tests/release.py "$(TAG)"

# every setting that was measured, on one page
report: venv
	$(BIN)/python -m bench report --html out/benchmarks.html

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

$(OLDEST)/.installed: INSTALLS := diffusers
$(TORCH)/.installed $(NEWEST)/.installed: INSTALLS := torch triton

# what $(VENV) holds is seen through a .pth file, so that only what differs is installed
.venv-%/.installed: constraints-%.txt $(STAMP)
	$(BIN)/python -m venv --clear --without-pip $(@D)
	echo "import site; site.addsitedir('$(call site,$(VENV))')" > $(call site,$(@D))/base.pth
	$(@D)/bin/python -m pip install --disable-pip-version-check -q -c $< $(PIP_FLAGS) $(INSTALLS)
	touch $@

clean:
	rm -rf $(VENV) $(OLDEST) $(TORCH) $(NEWEST) $(DOCS) $(CUDA) $(KIT) build site dist *.egg-info fastcache/*.so
