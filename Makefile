# Every target makes the environment it needs; only a python3 (>= 3.11) has to be on the machine.
# An environment is rebuilt when pyproject.toml has changed since: that is what the stamp files record.

PYTHON ?= python3
JOBS ?= 2
DEMO_FLAGS ?=
BENCH_FLAGS ?=
PYTEST_FLAGS ?=
SEED ?= 0:1000

PIP_INSTALL := -m pip install --quiet --disable-pip-version-check
# One file per worker at a time, so that what a module trains is trained once.
PYTEST := -m pytest $(if $(filter-out 0,$(JOBS)),-n $(JOBS) --dist loadfile) $(PYTEST_FLAGS)
# Compilation is most of the tests' time; tests/conftest.py says what this leaves out.
FAST_COMPILE := JEDIT_TEST_FAST_COMPILE=1

# The floors of pyproject.toml as exact versions.
FLOORS = $(shell $(PYTHON) -c "import tomllib; \
  print(*(d.replace('>=', '==') for d in \
  tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies']))")

# The newest JAX needs a newer Python than jedit does.
NEWEST_PYTHON ?= $(shell for p in python3.12 python3.13 python3.14 $(PYTHON) \
  "$$HOME"/.pyenv/versions/3.1[2-9]*/bin/python; do \
  "$$p" -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null && echo "$$p" && break; \
  done)

# A comma that may stand in an argument of $(call).
, := ,

.DEFAULT_GOAL := help
.PHONY: help environments demo test test-more test-llm test-parity test-oldest test-newest test-all fuzz docs
.PHONY: newest-python more-newest demo-newest lint format bench gpu gpu-wheels notebooks clean distclean
.DELETE_ON_ERROR:

help:
	@echo "make demo         the two scenes: train, forget, compare, report (DEMO_FLAGS='--scene digits')"
	@echo "make test         the tests, in float64"
	@echo "make test-more    in float32 what a number's width changes, with JAX's check for reused keys"
	@echo "                  (HALF=0 or 1: every second file of them; make test HALF=... : all the rest)"
	@echo "make test-llm     the tests that need the extra llm"
	@echo "make test-parity  language models against PyTorch (installs it: some 250 MB, gigabytes with CUDA)"
	@echo "make test-oldest  tracing on the oldest supported versions"
	@echo "make test-newest  make test on the newest JAX (needs a Python >= 3.12);  more-newest, demo-newest"
	@echo "make test-all     all tests, with what is exhaustive (hours)"
	@echo "make fuzz         random programs against jax.grad, by seed: SEED=0:1000"
	@echo "make environments what all of these need, beforehand"
	@echo "make lint         ruff and pyright;  make format  lets ruff mend what it can"
	@echo "make bench        the benchmarks, peers in torch too;  make notebooks  executes the notebooks"
	@echo "make gpu          all that waits for an accelerator, in eight minutes (TOY=1: tiny, on the CPU;"
	@echo "                  WHEELS=folder: installs from it alone, as make gpu-wheels filled it)"
	@echo "make docs         the API reference, from the docstrings, into out/docs"
	@echo "make clean        removes what was made, but the environments;  make distclean  those too"

define make_venv
@$(1) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "jedit needs Python >= 3.11; \
$(1) is " + sys.version.split()[0] + ". Set PYTHON=/path/to/a/newer/python3.")'
@test -x $(2)/bin/python || { echo "making $(2)"; $(1) -m venv $(2); }
@echo "installing into $(2): $(3)"
endef

.venv/.demo: pyproject.toml
	$(call make_venv,$(PYTHON),.venv,core and demo)
	@.venv/bin/python $(PIP_INSTALL) -e '.[demo]'
	@touch $@

.venv/.dev: pyproject.toml
	$(call make_venv,$(PYTHON),.venv,core$(,) demo and dev)
	@.venv/bin/python $(PIP_INSTALL) -e '.[demo,dev]'
	@touch .venv/.demo $@

.venv/.bench: pyproject.toml
	$(call make_venv,$(PYTHON),.venv,core$(,) demo$(,) dev and bench)
	@.venv/bin/python $(PIP_INSTALL) -e '.[demo,dev,bench]'
	@touch .venv/.demo .venv/.dev $@

.venv-llm/.done: pyproject.toml
	$(call make_venv,$(PYTHON),.venv-llm,core$(,) demo$(,) test$(,) llm and notebooks)
	@.venv-llm/bin/python $(PIP_INSTALL) -e '.[demo,test,llm,notebooks]'
	@touch $@

.venv-parity/.done: pyproject.toml
	$(call make_venv,$(PYTHON),.venv-parity,core$(,) test$(,) llm and PyTorch)
	@.venv-parity/bin/python $(PIP_INSTALL) -e '.[parity]'
	@touch $@

.venv-oldest/.done: pyproject.toml
	$(call make_venv,$(PYTHON),.venv-oldest,the oldest supported versions)
	@.venv-oldest/bin/python $(PIP_INSTALL) -e '.[test]' $(FLOORS)
	@touch $@

.venv-newest/.done: pyproject.toml
	$(call make_venv,$(NEWEST_PYTHON),.venv-newest,the newest versions)
	@.venv-newest/bin/python $(PIP_INSTALL) --upgrade --upgrade-strategy eager -e '.[demo,test]'
	@touch $@

# The benchmark's contenders in torch, without jedit: the bench speaks to them by JSON.
PEERS := torch==2.13.0 kronfluence==1.0.1 curvlinops-for-pytorch==3.0.1

.venv-peers/.done: Makefile
	$(call make_venv,$(PYTHON),.venv-peers,$(PEERS))
	@.venv-peers/bin/python $(PIP_INSTALL) $(PEERS)
	@touch $@

environments: .venv/.dev .venv-llm/.done .venv-parity/.done .venv-oldest/.done $(if $(NEWEST_PYTHON),.venv-newest/.done)

# $(call pytest_on,environment,paths): those of the paths that hold tests; a sentence when none does.
define pytest_on
@paths="$(sort $(dir $(wildcard $(addsuffix /test_*.py,$(2)))))"; \
if [ -z "$$paths" ]; then echo "skipped: $(2) holds no tests yet"; exit 0; fi; \
$(1)/bin/python -c 'import jax, flax, sys; \
print("Python", sys.version.split()[0], "jax", jax.__version__, "flax", flax.__version__)'; \
set -x; $(FAST_COMPILE) $(1)/bin/python $(PYTEST) $$paths
endef

demo: .venv/.demo
	.venv/bin/jedit demo $(DEMO_FLAGS)

test: .venv/.dev
	$(REST) $(FAST_COMPILE) .venv/bin/python $(PYTEST)

# Where the width of a number makes no difference, once is enough; recipes run in float32 in the demo.
ANY_WIDTH := bench checkpoint cli many_devices recipes report \
  test_defaults.py test_imports.py test_readme.py
WIDTH_FLAGS = $(patsubst %,--ignore=tests/%,$(ANY_WIDTH) $(if $(JEDIT_TEST_ALL),,tracing))
# Annotations are checked in float64.
MORE := $(FAST_COMPILE) JEDIT_TEST_X64=0 JEDIT_TEST_KEY_REUSE=1 JEDIT_TEST_TYPECHECK=0
# All of their files; every second one, from the first or from the second on, with HALF=0 or 1.
HALF ?=
MORE_FILES = $(if $(HALF),$(shell find $(filter-out $(addprefix tests/,parity llm $(ANY_WIDTH)), \
  $(wildcard tests/*)) -name 'test_*.py' $(if $(JEDIT_TEST_ALL),,-not -path '*/tracing/*') \
  | LC_ALL=C sort | awk 'NR % 2 == $(HALF)'))
# What that leaves to `make test`: the other files, and of these what needs float64.
REST = $(if $(HALF),JEDIT_TEST_ELSEWHERE="$(strip $(MORE_FILES))")

test-more: .venv/.dev
	$(MORE) .venv/bin/python $(PYTEST) $(WIDTH_FLAGS) $(MORE_FILES)

test-all: export JEDIT_TEST_ALL = 1
test-all: SEED = 0:10000
test-all: test test-more test-llm test-parity test-oldest test-newest more-newest fuzz notebooks

# Every program is another: there is nothing to keep of what is compiled.
fuzz: .venv/.dev
	$(FAST_COMPILE) JAX_ENABLE_COMPILATION_CACHE=0 .venv/bin/python -m tests.tracing.fuzz $(SEED)

test-llm: .venv-llm/.done
	$(call pytest_on,.venv-llm,tests/llm)

test-parity: .venv-parity/.done
	$(call pytest_on,.venv-parity,tests/parity)

test-oldest: export JEDIT_TEST_TYPECHECK = all
test-oldest: .venv-oldest/.done
	$(call pytest_on,.venv-oldest,tests/tracing)

# $(call on_newest,command): in the environment of the newest JAX; a sentence where there is none.
define on_newest
@if [ -z "$(NEWEST_PYTHON)" ]; then \
  echo "skipped: the newest JAX needs Python >= 3.12 and none was found; set NEWEST_PYTHON"; \
else $(MAKE) --no-print-directory .venv-newest/.done NEWEST_PYTHON="$(NEWEST_PYTHON)" && $(1); fi
endef

newest-python:
	@echo "$(NEWEST_PYTHON)"

test-newest:
	$(call on_newest,$(REST) $(FAST_COMPILE) .venv-newest/bin/python $(PYTEST))

more-newest:
	$(call on_newest,$(MORE) .venv-newest/bin/python $(PYTEST) $(WIDTH_FLAGS) $(MORE_FILES))

demo-newest:
	$(call on_newest,.venv-newest/bin/jedit demo $(DEMO_FLAGS))

lint: .venv/.dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/pyright

format: .venv/.dev
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

bench: .venv/.bench .venv-peers/.done
	.venv/bin/python -m tests.bench $(BENCH_FLAGS)
	.venv/bin/python -m tests.bench.kernels $(filter --toy,$(BENCH_FLAGS))

# On a machine with a GPU: by a network, or without one from the folder WHEELS alone; of a Python that
# has what is needed already, GPU_PYTHON=python3, nothing is asked but to run.
TOY ?=
WHEELS ?=
GPU_FLAGS ?=
GPU_PYTHON ?=
CUDA ?= cuda12
GPU_NEEDS := '.[demo,llm]' 'jax[$(CUDA)]' kfac-jax
GPU_ENV := $(if $(TOY),.venv-llm/.done,$(if $(GPU_PYTHON),,.venv-gpu/.done))
GPU_RUN := $(or $(GPU_PYTHON),$(if $(TOY),.venv-llm,.venv-gpu)/bin/python)

.venv-gpu/.done: pyproject.toml
	$(call make_venv,$(or $(NEWEST_PYTHON),$(PYTHON)),.venv-gpu,what a GPU run needs)
	@.venv-gpu/bin/python $(PIP_INSTALL) $(if $(WHEELS),--no-index --find-links $(WHEELS)) $(GPU_NEEDS)
	@touch $@

gpu: $(GPU_ENV)
	$(GPU_RUN) -m tests.bench.gpu $(if $(TOY),--toy) $(GPU_FLAGS)

# What `make gpu WHEELS=...` needs, for a machine like this one: the same Python and processor.
gpu-wheels:
	$(or $(NEWEST_PYTHON),$(PYTHON)) -m pip download --quiet --dest $(or $(WHEELS),wheels) \
	  $(GPU_NEEDS) hatchling

# Executed, and written as pages where the API reference links to them; two at a time, since much of
# their time is the compiler's, on one core.
notebooks: .venv/.dev .venv-llm/.done
	@$(MAKE) --no-print-directory -j $(patsubst 0,1,$(JOBS)) $(wildcard notebooks/*.ipynb)

.PHONY: $(wildcard notebooks/*.ipynb)
$(wildcard notebooks/*.ipynb):
	.venv$(if $(findstring /00_,$@)$(findstring /07_,$@),-llm)/bin/jupyter nbconvert --execute --to html \
	  --output-dir out/docs/notebooks --ExecutePreprocessor.timeout=600 $@

# The files of methods besides: a file's header is its method's derivation.
METHODS = $(subst /,.,$(basename $(filter-out $(wildcard jedit/methods/*/_*.py), \
  $(wildcard jedit/methods/*/*.py))))

docs: .venv/.dev
	@.venv/bin/python -W error -m pdoc jedit jedit_kernels $(METHODS) --docformat google --math -o out/docs
	@echo "the API reference: out/docs/jedit.html"

clean:
	rm -rf out build dist .pytest_cache .ruff_cache .hypothesis notebooks/.ipynb_checkpoints
	find jedit kernels tests -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf .jax_cache .venv .venv-llm .venv-parity .venv-oldest .venv-newest .venv-gpu .venv-peers
