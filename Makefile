# Everything sets itself up: `make demo` and `make test` work on a clean checkout with Python 3.11 and pip.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Set on some build machines: every one of the many processes would compile the sources anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help setup demo test test-fast check bench weights docs clean
help: ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 18

setup: $(STAMP) ## install capfilt and its pinned requirements into .venv

# pip's own checks and bars are off: what is printed is what matters.
$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (about 7 GB, two minutes on a fast line; once)"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP) ## build a small corpus, end to end, and say how true its captions are
	@$(BIN)/capfilt demo --out demo-corpus

# Three processes for two cores, since many tests wait; the files in the order of tests/conftest.py: the longest first.
test: $(STAMP) ## run the whole test suite
	@$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

test-fast: $(STAMP) ## run the tests that need neither Ray nor training
	@$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not ray and not training"

check: $(STAMP) ## check style, types, import contracts and dead code
	@$(BIN)/ruff check -q .
	@$(BIN)/ruff format --check -q .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo
	@$(BIN)/vulture

bench: $(STAMP) ## measure crawl, intake, manifest and selection on this machine
	@for what in crawl intake manifest select; do echo "== capfilt bench $$what"; $(BIN)/capfilt bench $$what || exit; done

weights: $(STAMP) ## train the demo's ViT and filter again, by their recipes
	@$(BIN)/python -m jobs.demo.weights_training.make_weights --folder weights-training

docs: $(STAMP) ## write the generated pages of docs/
	@$(BIN)/python -m jobs.docs

clean: ## remove .venv and the demo corpus
	rm -rf $(VENV) demo-corpus demo-corpus-blip2
