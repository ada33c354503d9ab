# `make demo` and `make test` each do all the set-up they need; the second run of either is quick.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin
DEMO := runs/demo
export MUJOCO_GL ?= egl

.PHONY: demo test lint setup setup-dev graphics clean

demo: setup  ## record, train, evaluate in a MuJoCo scene of ours; prints where the report is
	$(RUN)/python -m robopolicy.cli.main demo --out $(DEMO)

test: setup-dev  ## linters, type checks, all tests
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy
	$(RUN)/lint-imports
	OMP_NUM_THREADS=1 $(RUN)/python -m pytest -n 2 --dist loadfile

setup: $(VENV)/.ready graphics
setup-dev: $(VENV)/.ready-dev graphics

$(VENV)/.ready: pyproject.toml constraints.txt
	scripts/setup.sh $(PYTHON) $(VENV) sim

$(VENV)/.ready-dev: pyproject.toml constraints.txt
	scripts/setup.sh $(PYTHON) $(VENV) dev

graphics:
	@scripts/graphics.sh

clean:
	rm -rf $(VENV) $(DEMO)
