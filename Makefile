# make study [PRESET=smoke|tiny] · make test · make lab · make lint · make bench · make reliability · make mutants · make backbones
#   · make notebooks · make book
PRESET ?= tiny
PYTHON ?= python3
# such as LAB_ARGS="--no-browser --allow-root" in a container
LAB_ARGS ?=
# Notebook kernels run in notebooks/, so a relative result folder is made absolute here.
ifdef LATENTLAB_REPORTS
export LATENTLAB_REPORTS := $(abspath $(LATENTLAB_REPORTS))
endif
BIN := .venv/bin
READY := .venv/.ready

.PHONY: study test lab lint bench reliability mutants backbones notebooks book

study: $(READY)
	@$(BIN)/latentlab study --preset $(PRESET)

# nbval executes the committed notebooks; their results go to a temporary folder, apart from the user's own.
test: $(READY)
	@$(BIN)/python -m pytest
	@reports=$$(mktemp -d) && trap 'rm -rf "$$reports"' EXIT && \
	LATENTLAB_REPORTS="$$reports" TQDM_DISABLE=1 PYDEVD_DISABLE_FILE_VALIDATION=1 $(BIN)/python -m pytest \
	--nbval-lax --nbval-current-env --nbval-sanitize-with tests/nbval_sanitize.cfg notebooks

lab: $(READY)
	@$(BIN)/jupyter lab $(LAB_ARGS) notebooks/00_tour.ipynb

# What CI checks before the tests: format, style, types, and which package may import which.
lint: $(READY)
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

# For maintainers: executes the committed notebooks in place, publishes all results, regenerates README and docs.
notebooks: $(READY)
	@TQDM_DISABLE=1 PYDEVD_DISABLE_FILE_VALIDATION=1 $(BIN)/jupyter nbconvert --to notebook --execute --inplace \
	--log-level=ERROR --ExecutePreprocessor.record_timing=False --ExecutePreprocessor.timeout=1200 notebooks/*.ipynb notebooks/solutions/*.ipynb
	@$(BIN)/python -c "import sys, pathlib, latentlab.study.notebooks as n; [n.strip_widgets(pathlib.Path(p)) for p in sys.argv[1:]]" notebooks/*.ipynb notebooks/solutions/*.ipynb
	@$(BIN)/latentlab report --publish

# The published notebooks, docs and results as a site for any static host: reports/book.
book: $(READY)
	@$(BIN)/python -m latentlab.study.book.build

bench: $(READY)
	@$(BIN)/latentlab bench --threads 1

# Kills, poisons, soaks and splits small runs (ten minutes): reports/reliability.json.
reliability: $(READY)
	@OMP_NUM_THREADS=1 TQDM_DISABLE=1 $(BIN)/python -m tests.reliability.kills
	@$(BIN)/python -m tests.reliability.processes
	@$(BIN)/python -m tests.reliability.misuse
	@$(BIN)/latentlab report

# Do the tests notice a changed line? Forty minutes; out/mutants keeps what is done: reports/published/mutants.json.
mutants: $(READY)
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.mutants

# For maintainers: which families of backbones the engine computes (a minute), and docs/backbones.md.
backbones: $(READY)
	@TQDM_DISABLE=1 $(BIN)/python scripts/measure_backbones.py
	@$(BIN)/latentlab report --publish

# The stamp is written last: an interrupted installation starts again.
$(READY): pyproject.toml constraints.txt
	@echo "making .venv: PyTorch is large, this takes some minutes the first time"
	@$(PYTHON) -m venv --clear .venv
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@
