# Thin over dev.py, which runs on every system: `python dev.py demo` is `make demo`.
PYTHON ?= python3

.PHONY: demo test check
demo test check:
	@$(PYTHON) dev.py $@
