# Developer and operator commands. `make serve` and `make test` need nothing but Python 3.11, make and gcc.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: serve setup test test-slow test-clients gpu check format docs hooks clean

serve: setup  ## a model behind an OpenAI-compatible URL; ARGS="--model-path DIR ..." for your own
	@exec $(BIN)/max-ray serve $(ARGS)

setup: $(STAMP)  ## the virtual environment with pinned versions; does nothing when nothing changed

$(STAMP): requirements.txt pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing pinned versions into $(VENV) (a few minutes the first time) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@$(BIN)/python -m max_ray.kernels.native
	@touch $(STAMP)

test: setup  ## the whole offline suite but the slow ones; those that need Ray share one cluster in one process
	$(BIN)/python -m pytest -n 2 -m "not ray and not slow and not gpu"
	$(BIN)/python -m pytest -m "ray and not slow and not gpu"

test-slow: setup  ## the slow ones: autoscaling, shutdown, long soaks
	$(BIN)/python -m pytest -m slow --timeout 600

test-clients: setup  ## well-known clients, each installed in build/clients, against a real server; writes docs/clients.md
	$(BIN)/python -m tests.clients $(ARGS)

gpu:  ## tests and measurements of a GPU, in less than nine minutes: PYTHON=python3 RESULTS=folder; installs nothing
	$(if $(RESULTS),,$(error make gpu writes results.jsonl and log.txt: say where, as in `make gpu RESULTS=folder`))
	$(PYTHON) -m max_ray.benchmark.gpu --results $(RESULTS) $(ARGS)

check: setup  ## formatting, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: setup  ## the documentation as web pages in build/docs; needs no network once `make setup` has run
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "Open build/docs/index.html"

hooks: setup  ## runs ruff, mypy and clang-format before each commit
	$(BIN)/pre-commit install

clean:
	rm -rf $(VENV) build .mypy_cache .ruff_cache .pytest_cache *.egg-info
