# `make train` and `make test` create .venv and install everything on first use.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: train test test-slow test-nightly clean
.SILENT:

train: .venv/train.ok
	$(BIN)/python train.py fit --config configs/quickstart.yaml

test: .venv/test.ok
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -m "not slow and not nightly"

test-slow: .venv/test.ok
	$(BIN)/python -m pytest -m "slow and not nightly"

test-nightly: .venv/nightly.ok
	$(BIN)/python -m pytest -m nightly

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info

# A shell function for setup steps that can fail: prints the error with its remedy and exits.
STOP = stop() { echo "error: $$*" >&2; exit 1; }

.venv/python.ok:
	$(STOP); \
	command -v $(PYTHON) >/dev/null || stop "$(PYTHON) is not installed: install Python 3.11 or newer, or name one: make PYTHON=python3.12"; \
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| stop "$$($(PYTHON) --version) is too old: gptlit needs 3.11 or newer; name one: make PYTHON=python3.12"; \
	$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null \
		|| stop "$(PYTHON) has no venv module: install it (Debian and Ubuntu: apt install python3-venv)"; \
	$(PYTHON) -m venv --clear .venv || stop "cannot create a virtual environment in .venv"
	touch $@

.venv/train.ok: .venv/python.ok pyproject.toml constraints.txt
	$(STOP); echo "installing gptlit and its dependencies into .venv (once; takes a few minutes)"; \
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch \
		&& $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[offline,plot]' \
		|| stop "the installation failed (see above): check the network and the free disk space, then run make again"
	touch $@

# The book's package is the reference implementation in the tests; its other dependencies are not needed (--no-deps).
.venv/test.ok: .venv/train.ok
	$(STOP); echo "installing the test tools into .venv"; \
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]' \
		&& $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps llms-from-scratch \
		|| stop "the installation failed (see above): check the network and the free disk space, then run make again"
	touch $@

.venv/nightly.ok: .venv/test.ok
	$(STOP); echo "installing what the recipes need into .venv"; \
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,recipes]' \
		|| stop "the installation failed (see above): check the network and the free disk space, then run make again"
	touch $@
