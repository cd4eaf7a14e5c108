# Every target makes the environment that it needs: two commands on a fresh machine are enough.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
SOURCES = $(shell find csrc -type f)
CHECKED = fastdistill kernels tests bench setup.py

.PHONY: demo test bench lint certificates clean

demo: $(VENV)/.ready
	$(BIN)/fastdistill train digits

test: $(VENV)/.ready
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

bench: $(VENV)/.ready
	$(BIN)/python -m bench

lint: $(VENV)/.ready
	$(BIN)/ruff check $(CHECKED)
	$(BIN)/ruff format --check $(CHECKED)
	$(BIN)/mypy

certificates: $(VENV)/.ready
	$(BIN)/python tests/kernels/certificate.py

clean:
	rm -rf $(VENV) build fastdistill/*.so *.egg-info

$(VENV)/.ready: requirements.lock pyproject.toml setup.py $(SOURCES)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	touch $@
