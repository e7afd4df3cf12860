# `make setup` once, then `make tiny` for a first training run, `make test`, `make check`. Nothing is installed outside the .venv folders.

PYTHON ?=
PYENV_ROOT ?= $(HOME)/.pyenv
TEST_ARGS ?=
# Two processes, each with whole files, so that programs compiled for a file are shared.
PYTEST = -m pytest -n 2 --dist loadfile $(TEST_ARGS)
LATEST := 3.14 3.13 3.12

# pip stays quiet about everything but errors and its own progress.
PIP_INSTALL = -m pip install --quiet --disable-pip-version-check -e '.[test]' -c constraints.txt
# Succeeds for an interpreter that runs, can make a virtual environment and is new enough: a name on PATH may be a stub.
USABLE = -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null

comma := ,

STAMP := .venv/.stamp-setup
STAMP_LATEST := .venv-latest/.stamp-setup

.PHONY: help setup tiny test check test-latest aot clean

help:
	@echo 'make setup        virtual environment .venv with the package and its test tools'
	@echo 'make tiny         train configs/tiny.yaml on this machine'
	@echo "make test         the whole test suite (TEST_ARGS='-k moe' for a part)"
	@echo 'make check        ruff and pyright'
	@echo 'make test-latest  the test suite on the newest Python and JAX, in .venv-latest'
	@echo 'make aot          compile the shipped recipes for TPUs and GPUs that are not here and compare with golden figures (hours on two cores;'
	@echo "                  AOT='tpu' or AOT='gpu' for one of them; 7 GB of compilers are installed in .venv-aot-tpu and .venv-aot-gpu)"
	@echo 'make clean        removes the virtual environments and all caches'

setup: $(STAMP)
	@echo '.venv is ready'

# A .venv that works is kept and brought up to date; one that does not run (moved folder, removed Python) is made anew.
$(STAMP): pyproject.toml constraints.txt
	@found=; if ! .venv/bin/python $(USABLE); then \
	  for python in $(PYTHON) python3 python3.14 python3.13 python3.12 python3.11; do \
	    if $$python $(USABLE); then found=$$python; break; fi; \
	  done; \
	  if [ -z "$$found" ]; then \
	    echo 'v4train needs Python 3.11 or newer with its venv module (on Debian and Ubuntu: the package python3-venv).' >&2; \
	    echo "The python3 on PATH: $$(python3 --version 2>&1 || echo none). Name another one with: make setup PYTHON=/path/to/python3.12" >&2; exit 1; \
	  fi; \
	  echo "making .venv with $$($$found --version)"; \
	  rm -rf .venv && $$found -m venv .venv; \
	fi
	@echo 'installing v4train and its dependencies into .venv (about a minute)'
	@.venv/bin/python $(PIP_INSTALL)
	@touch $@

tiny: $(STAMP)
	.venv/bin/python -m v4train.train --config configs/tiny.yaml

test: $(STAMP)
	.venv/bin/python $(PYTEST)

check: $(STAMP)
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/pyright --pythonpath .venv/bin/python

# The newest Python on which everything installs, among those on PATH and those that pyenv keeps.
$(STAMP_LATEST): pyproject.toml constraints.txt
	@found=; for python in $(foreach v,$(LATEST),python$(v) $(wildcard $(PYENV_ROOT)/versions/$(v).*/bin/python$(v))); do \
	  $$python $(USABLE) || continue; \
	  echo "making .venv-latest with $$($$python --version) (about a minute)"; \
	  rm -rf .venv-latest && $$python -m venv .venv-latest && .venv-latest/bin/python $(PIP_INSTALL) && found=$$python && break; \
	  echo "the dependencies do not install on $$python"; \
	done; \
	if [ -z "$$found" ]; then echo 'no Python 3.12 or newer on which the dependencies install (looked on PATH and in pyenv)' >&2; exit 1; fi
	@.venv-latest/bin/python -c 'import sys, jax; print(f"Python {sys.version.split()[0]}, JAX {jax.__version__}"); assert jax.__version_info__ >= (0, 12)'
	@touch $@

test-latest: $(STAMP_LATEST)
	.venv-latest/bin/python $(PYTEST)

# The vendors' compilers, without their devices. Each has an environment of its own, since JAX looks for the chip of every plugin it finds.
AOT ?= tpu gpu
AOT_TEST = -m pytest -p no:cacheprovider tests/plan/test_golden_aot.py tests/plan/test_fp8.py -v

.venv-aot-%/.stamp-setup: pyproject.toml constraints.txt
	@found=; for python in $(foreach v,$(LATEST),python$(v) $(wildcard $(PYENV_ROOT)/versions/$(v).*/bin/python$(v))); do \
	  $$python $(USABLE) || continue; \
	  echo "making .venv-aot-$* with $$($$python --version) (minutes)"; \
	  rm -rf .venv-aot-$* && $$python -m venv .venv-aot-$* && .venv-aot-$*/bin/python $(subst [test],[test$(comma)aot-$*],$(PIP_INSTALL)) && found=$$python && break; \
	done; \
	if [ -z "$$found" ]; then echo 'no Python 3.12 or newer on which the dependencies install (looked on PATH and in pyenv)' >&2; exit 1; fi
	@touch $@

aot: $(foreach platform,$(AOT),.venv-aot-$(platform)/.stamp-setup)
	$(foreach platform,$(AOT),.venv-aot-$(platform)/bin/python $(AOT_TEST) -k $(platform) &&) true

clean:
	rm -rf .venv .venv-latest .venv-aot-* .jax_cache .pytest_cache .ruff_cache build dist src/*.egg-info
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
