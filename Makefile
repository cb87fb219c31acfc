# `make help` lists what can be made; `make reproduce` and `make test` need nothing before them.

PROFILE   ?= laptop
SET       ?=
NOTEBOOKS ?=
PYTHON    ?= $(firstword $(shell command -v python3.11) python3)
CMAKE     ?= cmake
# CMake finds the compiler by itself; make's own default for CXX is not a wish.
COMPILER  := $(if $(filter default,$(origin CXX)),c++,$(CXX))
JOBS      ?= $(shell nproc 2>/dev/null || sysctl -n hw.ncpu)

# An activated conda environment (not its base) is used as it is; otherwise build/venv is made.
ifneq ($(and $(CONDA_PREFIX),$(filter-out base,$(or $(CONDA_DEFAULT_ENV),named))),)
ENV := $(CONDA_PREFIX)
else
ENV := $(CURDIR)/build/venv
endif
PY := $(ENV)/bin/python
export PATH := $(ENV)/bin:$(PATH)
export MPLBACKEND := agg
# Threads that spin while they wait starve whatever else runs on a machine of few cores.
export OMP_WAIT_POLICY ?= passive

ENV_STAMP    := build/.environment$(subst /,-,$(ENV))
NATIVE_STAMP := build/native/.built
BINDING      := $(shell sed -n 's/^ *"\(llama-cpp-python==[^"]*\)".*/\1/p' pyproject.toml)
SDIST        := build/source/$(subst -,_,$(firstword $(subst ==, ,$(BINDING))))-$(lastword $(subst ==, ,$(BINDING))).tar.gz
RUN          := $(PY) -m lablog.runner run
ARGUMENTS    := --profile $(PROFILE) $(if $(SET),--set $(SET)) -- $(NOTEBOOKS)
EXCLUSIVE    := python3 lib/tools/exclusive.py
PIP          := $(PY) -m pip --disable-pip-version-check --quiet

.PHONY: help setup lab reproduce test book bench verify why publish clean distclean \
        test-native test-native-sanitize _setup _results
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-21s %s\n", $$1, $$2}' Makefile
	@echo; printf '  %-33s %s\n' \
	  'PROFILE=smoke|laptop|study|full' 'which settings (default laptop); or path/to/own.yaml' \
	  'SET="model=my.gguf"' 'override single values; results get a folder of their own' \
	  'NOTEBOOKS="01 02"' 'only these'

# --- Setting up -------------------------------------------------------------------------------

setup: ## environment and native library; the other targets do it when needed
	@$(EXCLUSIVE) --wait build/.setup.lock $(MAKE) --no-print-directory _setup

_setup: $(ENV_STAMP) $(NATIVE_STAMP)
	@:

# The sdist carries both the bindings and the llama.cpp tree that native/ patches, so that they
# are one version by construction. CMake checks its hash.
$(SDIST): | $(PY)
	@echo "fetching $(BINDING)"
	@$(PIP) download --no-deps --no-binary :all: --dest $(@D) $(BINDING)
	@touch $@

$(PY):
	@$(PYTHON) -c 'import sys, venv; sys.exit(sys.version_info[:2] != (3, 11))' || { echo \
	  'error: $(PYTHON) is not Python 3.11 with venv: install it (Debian: apt-get install' \
	  'python3.11-venv) or say PYTHON=/path/to/python3.11' >&2; exit 1; }
	$(PYTHON) -m venv $(ENV)

$(ENV_STAMP): pyproject.toml $(SDIST)
	@$(PY) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || { echo \
	  'error: $(PY) is not Python 3.11: activate an environment made from environment.yml,' \
	  'or deactivate conda' >&2; exit 1; }
	@echo "installing the pinned packages into $(ENV) (a few minutes the first time)"
	@$(PIP) install --config-settings 'cmake.args=-DLLAMA_BUILD=OFF;-DLLAVA_BUILD=OFF' $(SDIST)
	@$(PIP) install --editable '.[test]'
	@touch $@

$(NATIVE_STAMP): native/CMakeLists.txt $(wildcard native/cmake/* native/patches/* native/src/*) $(SDIST)
	@for tool in '$(CMAKE)' '$(COMPILER)'; do command -v $$tool >/dev/null || { echo \
	  "error: $$tool is not installed; the native library needs CMake and a C++17 compiler" \
	  "(Debian: apt-get install cmake g++; macOS: xcode-select --install and cmake;" \
	  "conda: environment.yml brings both)" >&2; exit 1; }; done
	@echo "building the patched llama.cpp (about two minutes)"
	@mkdir -p $(@D); test -e $(@D)/CMakeCache.txt || date +%s > $(@D)/.started
	@$(CMAKE) -S native -B $(@D) -DLLAMA_SDIST=$(CURDIR)/$(SDIST) -DCMAKE_BUILD_TYPE=Release \
	  $(CMAKE_ARGS) > $(@D)/configure.log 2>&1 \
	  || { cat $(@D)/configure.log >&2; exit 1; }
	@$(CMAKE) --build $(@D) -j $(JOBS) > $(@D)/build.log 2>&1 || { tail -40 $(@D)/build.log >&2; exit 1; }
	@test ! -e $(@D)/.started || { echo $$(( $$(date +%s) - $$(cat $(@D)/.started) )) \
	  > $(@D)/build_seconds && rm $(@D)/.started; }
	@touch $@

# --- Results ----------------------------------------------------------------------------------

reproduce: setup ## run every stale notebook, then the book and a summary (make -n shows what)
	+@test -x $(PY) || { echo "# then every notebook of profile $(PROFILE): none has run yet"; exit 0; }; \
	  $(PY) -m lablog.runner plan $(ARGUMENTS) > build/.plan.$$PPID.mk && \
	  $(EXCLUSIVE) build/$$($(PY) -m lablog.runner name $(ARGUMENTS))/.lock \
	  $(MAKE) --no-print-directory PLAN=build/.plan.$$PPID.mk _results; \
	  status=$$?; rm -f build/.plan.$$PPID.mk; exit $$status

# The plan holds one rule for each notebook: its record depends on its source, its parameters,
# the modules that it imports, their data files and the native library.
ifdef PLAN
include $(PLAN)
endif
_results: $(RECORDS)
	@$(PY) -m lablog.runner book $(ARGUMENTS)
	@$(PY) -m lablog.runner summary $(ARGUMENTS)

why: ## say for each notebook whether it would run, and because of what
	@$(PY) -m lablog.runner why $(ARGUMENTS)

verify: setup ## run the notebooks twice and compare the records
	@$(PY) -m lablog.runner verify $(ARGUMENTS)

book: setup ## build the book from the results at hand
	@$(PY) -m lablog.runner book $(ARGUMENTS)

lab: setup ## JupyterLab with the notebooks as paired .ipynb
	@$(ENV)/bin/jupytext --quiet --sync notebooks/*.py
	@$(ENV)/bin/jupyter lab --notebook-dir=. --LabApp.default_url=/lab/tree/notebooks

# --- Checks -----------------------------------------------------------------------------------

test: setup test-native ## everything that can be checked: style, types, native, library, notebooks, book
	@$(ENV)/bin/ruff check .
	@$(ENV)/bin/mypy
	@$(PY) -m pytest

test-native: setup ## the C++ tests against the unpatched library
	@$(CMAKE) -S native -B build/native -DLABLOG_TESTS=ON > build/native/configure.log 2>&1 \
	  || { cat build/native/configure.log >&2; exit 1; }
	@$(CMAKE) --build build/native -j $(JOBS) > build/native/build-tests.log 2>&1 \
	  || { tail -40 build/native/build-tests.log >&2; exit 1; }
	@ctest --test-dir build/native --output-on-failure

test-native-sanitize: $(SDIST) ## the C++ tests under the address and undefined-behaviour sanitizers
	@$(CMAKE) -S native -B build/native-sanitize -DLLAMA_SDIST=$(CURDIR)/$(SDIST) \
	  -DLABLOG_TESTS=ON -DLABLOG_SANITIZE=ON -DCMAKE_BUILD_TYPE=RelWithDebInfo
	@$(CMAKE) --build build/native-sanitize -j $(JOBS)
	@ctest --test-dir build/native-sanitize --output-on-failure

bench: test-native ## speed, as ratios within one process: build/bench.json
	@PYTHONPATH=lib $(PY) -m tools.bench

SHOWN := 02_lambda_calibration/heat.svg \
         $(addprefix 03_qlora_commitment/,arms.svg kinds.svg persistence.svg ablations.svg capacity.svg)
publish: ## copy this profile's records and the README's figures into book/records/
	@mkdir -p book/records/$(PROFILE)
	@cp build/$(PROFILE)/records/*.json book/records/$(PROFILE)/
	@for figure in $(SHOWN); do test ! -e build/$(PROFILE)/figures/$$figure \
	  || cp build/$(PROFILE)/figures/$$figure book/records/$(PROFILE)/; done
	@test ! -e build/bench.json || cp build/bench.json book/records/

clean: ## remove results and book, keep environment and native library
	rm -rf $(filter-out build/venv build/native build/native-sanitize build/source,$(wildcard build/*))

distclean: ## remove everything that was generated
	rm -rf build lib/*.egg-info
