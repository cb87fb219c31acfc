# `make help` lists what can be made; `make reproduce` and `make test` need nothing before them.

## PROFILE=smoke|laptop|study|pretrained|full   which settings (default laptop); or own.yaml
PROFILE   ?= laptop
## SET="model=my.gguf"   override single values; results get a folder of their own
SET       ?=
## NOTEBOOKS="01 02"   only these
NOTEBOOKS ?=
## CLUSTER=tcp://127.0.0.1:8786   where tasks run (or tls://HOST:PORT, jobs.yaml); none: here
CLUSTER   ?=
## DASHBOARD=8787   watch them in a browser, at this port of this machine
DASHBOARD ?=
PYTHON    ?= $(firstword $(foreach minor,11 12 13,$(shell command -v python3.$(minor))) python3)
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
NATIVE_ARGUMENTS := build/native/.arguments
LIVE_STAMP   := build/native-live/.built
BINDING      := $(shell sed -n 's/^ *"\(llama-cpp-python==[^"]*\)".*/\1/p' pyproject.toml)
SDIST        := build/source/$(subst -,_,$(firstword $(subst ==, ,$(BINDING))))-$(lastword $(subst ==, ,$(BINDING))).tar.gz
RUN          := $(strip $(PY) -m lablog.runner run $(if $(CLUSTER),--cluster '$(CLUSTER)') \
                $(if $(DASHBOARD),--dashboard $(DASHBOARD)))
ARGUMENTS    := --profile $(PROFILE) $(if $(SET),--set $(SET)) -- $(NOTEBOOKS)
# What helps Make is written in Python as well, and where there is no environment yet, for any.
TOOL         := python3 lib/tools
NATIVE       := $(TOOL)/native.py build/native '$(CMAKE)' $(JOBS)
# Debian keeps the JavaScript libraries of Emscripten where only its own Node looks.
LIVE         := NODE_PATH=/usr/share/nodejs $(TOOL)/native.py build/native-live 'emcmake $(CMAKE)' $(JOBS)

.PHONY: help setup lock lab reproduce test book live pdf bench torture long verify why claims compare notes publish clean distclean \
        cluster worker certificates test-native test-native-sanitize test-native-races fuzz _setup _test _results
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

help: ## this list
	@$(TOOL)/help.py Makefile

# --- Setting up -------------------------------------------------------------------------------

setup: ## environment and native library; the other targets do it when needed
	@$(TOOL)/exclusive.py --wait build/.setup.lock $(MAKE) --no-print-directory _setup

_setup: $(ENV_STAMP) $(NATIVE_STAMP)
	@:

$(PY):
	@$(TOOL)/check.py python $(PYTHON) --venv
	$(PYTHON) -m venv $(ENV)

$(ENV_STAMP): requirements.lock pyproject.toml | $(PY)
	@$(TOOL)/check.py python $(PY)
	@$(TOOL)/check.py programs '$(CMAKE)' '$(COMPILER)'
	@echo "installing the locked packages into $(ENV) (a few minutes the first time)"
	@mkdir -p build/source
	@$(PY) lib/tools/install.py $(SDIST)
	@touch $@

# The sdist carries both the bindings and the llama.cpp tree that native/ patches, so that they
# are one version by construction. It came with the environment.
$(SDIST): | $(ENV_STAMP)
	@test -e $@ || $(PY) lib/tools/install.py $@

$(NATIVE_STAMP): native/CMakeLists.txt $(wildcard native/cmake/* native/patches/* native/src/*) $(SDIST)
	@$(TOOL)/check.py programs '$(CMAKE)' '$(COMPILER)'
	@echo "building the patched llama.cpp (about two minutes)"
	@rm -f $@
	@$(NATIVE) build.log -DLLAMA_SDIST=$(CURDIR)/$(SDIST) -DCMAKE_BUILD_TYPE=Release $(CMAKE_ARGS)
	@$(if $(CMAKE_ARGS),printf '%s\n' '$(CMAKE_ARGS)' > $(NATIVE_ARGUMENTS))
	@touch $@

# CMake keeps the arguments that it was once given; others build the library anew.
ifneq ($(CMAKE_ARGS),)
ifneq ($(CMAKE_ARGS),$(shell cat $(NATIVE_ARGUMENTS) 2>/dev/null))
.PHONY: $(NATIVE_STAMP)
endif
endif

lock: | $(PY) ## lock what pyproject.toml pins, with hashes (LOCK=--upgrade: and renew the rest)
	@$(PY) lib/tools/lock.py $(LOCK)

# --- Results ----------------------------------------------------------------------------------

reproduce: setup ## run every stale notebook, then the book and a summary (make -n shows what)
	+@$(TOOL)/reproduce.py $(PY) '$(MAKE)' $(ARGUMENTS)

# The plan holds one rule for each notebook: its record depends on its source, its parameters,
# the modules that it imports, their data files and the native library.
ifdef PLAN
include $(PLAN)
endif
_results: $(RECORDS)
	@$(PY) -m lablog.runner results $(ARGUMENTS)

why: ## say for each notebook whether it would run, and because of what
	@$(PY) -m lablog.runner why $(ARGUMENTS)

compare: ## say what changed between two runs: A=published B=laptop, or folders, COMMIT:PROFILE
	@PYTHONPATH=lib $(PY) -m tools.compare '$(A)' '$(B)'

claims: setup ## every claim of the logs beside its measured value (OF=own: of this clone's runs)
	@$(PY) -m lablog.claims --of $(or $(OF),published)

notes: setup ## notes for a release, from the ledger and the published records (SINCE=commit or tag)
	@PYTHONPATH=lib $(PY) -m tools.release_notes $(SINCE)

verify: setup ## run the notebooks twice and compare the records
	@$(PY) -m lablog.runner verify $(ARGUMENTS)

book: setup $(if $(shell command -v emcmake),live) ## build the book from the results at hand
	@$(if $(shell command -v emcmake),,echo "the book's live page stays a picture: Emscripten is not installed")
	@$(PY) -m lablog.runner book $(ARGUMENTS)

live: setup $(LIVE_STAMP) ## what the book's live page loads: the engine, by Emscripten, and models
	@PYTHONPATH=lib $(PY) -m tools.live $(ARGUMENTS)

$(LIVE_STAMP): $(wildcard native/CMakeLists.txt native/live/* native/cmake/* native/patches/* native/src/commitment*) | $(SDIST)
	@$(TOOL)/check.py programs emcmake
	@echo "building llama.cpp for the browser (about five minutes)"
	@$(LIVE) build.log -DLLAMA_SDIST=$(CURDIR)/$(SDIST) -DCMAKE_BUILD_TYPE=Release
	@touch $@

pdf: book ## the book as one PDF, printed by Chromium, where there is one
	@PYTHONPATH=lib $(PY) -m tools.pdf

cluster: setup ## a scheduler for workers to join (HOST=0.0.0.0 PORT=8786: demands certificates)
	@$(PY) -m lablog.cluster scheduler $(if $(HOST),--host $(HOST)) $(if $(PORT),--port $(PORT)) \
	  $(if $(DASHBOARD),--dashboard $(DASHBOARD))

worker: setup ## a worker for the scheduler SCHEDULER=tcp://127.0.0.1:8786 (THREADS=: all cores)
	@$(PY) -m lablog.cluster worker '$(SCHEDULER)' $(if $(THREADS),--threads $(THREADS))

certificates: setup ## certificates for a cluster of several machines: build/certificates
	@$(PY) -m lablog.cluster certificates

lab: setup ## JupyterLab with the notebooks as paired .ipynb
	@$(ENV)/bin/jupytext --quiet --sync notebooks/*.py
	@$(ENV)/bin/jupyter lab --notebook-dir=. --LabApp.default_url=/lab/tree/notebooks

# --- Checks -----------------------------------------------------------------------------------

test: setup ## everything that can be checked: style, types, native, library, notebooks, book
	@$(TOOL)/exclusive.py --wait build/.test.lock $(MAKE) --no-print-directory _test

_test: test-native
	@$(ENV)/bin/ruff check .
	@$(ENV)/bin/mypy
	@$(PY) -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test-native: setup ## the C++ tests against the unpatched library
	@$(NATIVE) build-tests.log -DLABLOG_TESTS=ON
	@ctest --test-dir build/native --output-on-failure

test-native-sanitize: $(SDIST) ## the C++ tests under the address and undefined-behaviour sanitizers
	@$(CMAKE) -S native -B build/native-sanitize -DLLAMA_SDIST=$(CURDIR)/$(SDIST) \
	  -DLABLOG_TESTS=ON -DLABLOG_SANITIZE=ON -DCMAKE_BUILD_TYPE=RelWithDebInfo
	@$(CMAKE) --build build/native-sanitize -j $(JOBS)
	@ctest --test-dir build/native-sanitize --output-on-failure

test-native-races: $(SDIST) ## the C++ tests of several threads under the thread sanitizer
	@$(CMAKE) -S native -B build/native-races -DLLAMA_SDIST=$(CURDIR)/$(SDIST) \
	  -DLABLOG_TESTS=ON -DLABLOG_SANITIZE_THREADS=ON -DCMAKE_BUILD_TYPE=RelWithDebInfo
	@$(CMAKE) --build build/native-races -j $(JOBS)
	@ctest --test-dir build/native-races --output-on-failure -R 'model|thread|beside|sampler'

fuzz: $(SDIST) ## damaged control vectors under libFuzzer, by Clang (RUNS=1000000)
	@CC=clang$(CLANG) CXX=clang++$(CLANG) $(CMAKE) -S native -B build/native-fuzz \
	  -DLLAMA_SDIST=$(CURDIR)/$(SDIST) -DLABLOG_FUZZ=ON -DCMAKE_BUILD_TYPE=RelWithDebInfo
	@$(CMAKE) --build build/native-fuzz -j $(JOBS) --target fuzz-control-vector
	@mkdir -p build/native-fuzz/corpus
	@cd build/native-fuzz && bin/fuzz-control-vector corpus $(CURDIR)/native/fuzz/corpus \
	  -runs=$(or $(RUNS),1000000) -max_len=2048 -timeout=10 -rss_limit_mb=2048

bench: test-native ## speed, as ratios within one process: build/bench.json
	@PYTHONPATH=lib $(PY) -m tools.bench

torture: setup ## damaged files, failing calls, killed runs, races, small disks (HOURS=0.1 SEED=0 PROCESSES=2): build/torture.json
	@PYTHONPATH=lib:tests $(PY) -m torture $(if $(HOURS),--hours $(HOURS)) \
	  $(if $(SEED),--seed $(SEED)) $(if $(PROCESSES),--processes $(PROCESSES))

long: setup ## one kernel runs chapters again and again; what it holds (HOURS=1 CHAPTERS="04 05"): build/long.json
	@PYTHONPATH=lib:tests $(PY) -m torture.long $(if $(HOURS),--hours $(HOURS)) $(CHAPTERS)

publish: ## copy this profile's records and the README's figures into book/records/
	@PYTHONPATH=lib $(PY) -m tools.publish $(ARGUMENTS)

clean: ## remove results and book, keep environment and native library
	rm -rf $(filter-out build/venv build/native% build/source,$(wildcard build/*))

distclean: ## remove everything that was generated
	rm -rf build lib/*.egg-info
