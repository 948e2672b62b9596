# Two commands do everything on a bare machine with Python 3.11 or newer: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Two sizes of one environment: `make demo` installs the small one, `make test` adds the rest.
DEMO := $(VENV)/.demo
ALL := $(VENV)/.all

.PHONY: demo test fast clean-demo

demo: $(DEMO)
	$(BIN)/worldloom demo

test: $(ALL)
	PATH="$(abspath $(BIN)):$$PATH" scripts/check

# The checks without the slow tests, for use while working.
fast: $(ALL)
	PATH="$(abspath $(BIN)):$$PATH" scripts/check --fast

clean-demo:
	rm -rf runs/demo

$(DEMO): requirements.lock requirements-torch.lock pyproject.toml
	scripts/setup "$(PYTHON)" "$(VENV)"
	touch $@

$(ALL): requirements.lock requirements-torch.lock pyproject.toml
	scripts/setup "$(PYTHON)" "$(VENV)" --all
	touch $(DEMO) $@
