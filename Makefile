# `make train` and `make test` set everything up in .venv; the second time they only run.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: train test test-slow clean
.SILENT:

train: .venv/train.ok
	$(BIN)/python train.py fit --config configs/quickstart.yaml

test: .venv/test.ok
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -m "not slow"

test-slow: .venv/test.ok
	$(BIN)/python -m pytest -m slow

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info

# One shell function for every step of the set-up that can fail: what went wrong, and what to do.
STOP = stop() { echo "error: $$*" >&2; exit 1; }

.venv/python.ok:
	$(STOP); \
	command -v $(PYTHON) >/dev/null || stop "$(PYTHON) is not installed: install Python 3.11 or newer, or name one: make PYTHON=python3.12"; \
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| stop "$$($(PYTHON) --version) is too old: gptlit needs 3.11 or newer; name one: make PYTHON=python3.12"; \
	$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null \
		|| stop "$(PYTHON) has no venv module: install it (Debian and Ubuntu: apt install python3-venv)"; \
	$(PYTHON) -m venv --clear .venv || stop "no virtual environment could be made in .venv"
	touch $@

.venv/train.ok: .venv/python.ok pyproject.toml constraints.txt
	$(STOP); echo "installing gptlit and what it needs into .venv (once; this takes a few minutes)"; \
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch \
		&& $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[offline]' \
		|| stop "the installation failed (see above): check the network and the free disk space, then type make again"
	touch $@

# The book's own package is a reference in the tests. Its other requirements are not wanted here.
.venv/test.ok: .venv/train.ok
	$(STOP); echo "installing the test tools into .venv"; \
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]' \
		&& $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps llms-from-scratch \
		|| stop "the installation failed (see above): check the network and the free disk space, then type make again"
	touch $@
