# Two commands do everything on a bare machine with Python 3.11 or newer: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test check fast clean-demo

demo: $(STAMP)
	$(BIN)/worldloom demo

test: $(STAMP)
	PATH="$(abspath $(BIN)):$$PATH" scripts/check

# The checks without the slow tests, for use while working.
fast: $(STAMP)
	PATH="$(abspath $(BIN)):$$PATH" scripts/check --fast

clean-demo:
	rm -rf runs/demo

# Torch goes in first, pinned, so that nothing pulls in another build of it.
$(STAMP): requirements.lock pyproject.toml
	scripts/setup "$(PYTHON)" "$(VENV)"
	touch $@
