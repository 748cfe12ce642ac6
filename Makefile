# Everything runs in the virtual environment .venv; see docs/installing.md.
#   make demo PYTHON=/path/to/python3.12    makes it with that interpreter
#   make test ARGS="-k activation"          hands ARGS to the command

VENV := .venv
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
VERSIONS := 3.13 3.12 3.11 3.10
CANDIDATES := python3 $(VERSIONS:%=python%) python
# The oldest that setup.py allows. It compiles the kernels too, for tests/test_ahead_of_time.py.
OLDEST_TRITON := 3.6
VERSION := import platform; print(platform.python_version())

.PHONY: help demo test benchmark planted-bugs lint clean

help:
	@echo "make demo          train a DCGAN on handwritten digits and name the picture it made"
	@echo "make test          run the tests (no GPU needed)"
	@echo "make benchmark     time training steps beside everything PyTorch offers, and plot them"
	@echo "make planted-bugs  show that the tests notice bugs planted in the code"
	@echo "make lint          check style, formatting and types"
	@echo "make clean         remove .venv and caches (trained models stay)"

demo: $(VENV)/.installed-train
	$(VENV)/bin/python -m genfast demo $(ARGS)

# One thread a worker: the tests are many and small, and the workers fill the cores.
test: $(VENV)/.installed-test $(VENV)/.installed-triton
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n auto --maxprocesses 8 --dist worksteal -p no:benchmark $(ARGS)

benchmark: $(VENV)/.installed-benchmark
	$(VENV)/bin/python -m benchmarks.throughput --model dcgan --seconds 60 $(ARGS)
	$(VENV)/bin/python -m benchmarks.throughput --model vae --seconds 30 $(ARGS)
	$(VENV)/bin/python -m benchmarks.plot

planted-bugs: $(VENV)/.installed-test
	$(VENV)/bin/python tests/planted_bugs.py $(ARGS)

lint: $(VENV)/.installed-test
	$(VENV)/bin/python -m ruff check
	$(VENV)/bin/python -m ruff format --check
	$(VENV)/bin/python -m mypy

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Beside the newest, which is what `import triton` finds; without the rest of an older PyTorch.
$(VENV)/.installed-triton: $(VENV)/.made Makefile
	@rm -rf $(VENV)/triton-$(OLDEST_TRITON)
	@$(PIP) install --no-deps --target $(VENV)/triton-$(OLDEST_TRITON) \
	    'triton==$(OLDEST_TRITON).0; sys_platform == "linux"' || { \
	    echo "genfast: pip could not install Triton $(OLDEST_TRITON); its last lines above say why." \
	        "Is the network reachable? Then run the same command again." >&2; \
	    exit 1; \
	}
	@touch $@

$(VENV)/.installed-%: $(VENV)/.made setup.py constraints.txt
	@$(PIP) install --constraint constraints.txt --editable ".[$*]" || { \
	    echo "genfast: pip could not install the dependencies; its last lines above say why." \
	        "Is the network reachable? Then run the same command again." >&2; \
	    exit 1; \
	}
	@touch $@

# A name on the PATH may be a shim that runs nothing, so each candidate is tried, not looked up.
$(VENV)/.made:
	@for python in $(or $(PYTHON),$(CANDIDATES)); do \
	    version=$$($$python -c '$(VERSION)' 2>/dev/null) || version="does not run"; \
	    case " $(VERSIONS) " in \
	        *" $${version%.*} "*) ;; \
	        *) tried="$$tried $$python ($$version)"; continue;; \
	    esac; \
	    $$python -c 'import ensurepip, venv' 2>/dev/null || { bare=$$python; continue; }; \
	    echo "genfast: making $(VENV) with $$python ($$version)"; \
	    $$python -m venv $(VENV) && touch $@; exit; \
	done; \
	if [ -n "$$bare" ]; then \
	    echo "genfast: $$bare lacks the modules venv and ensurepip, which make $(VENV)." \
	        "On Debian and Ubuntu: apt install python3-venv" >&2; \
	else \
	    echo "genfast needs one of Python $(VERSIONS). Tried:$$tried." \
	        "Install one, or name yours: make demo PYTHON=/path/to/python3.12" >&2; \
	fi; \
	exit 1

# An interpreter that is named and then not used would be a surprise.
ifneq ($(and $(PYTHON),$(wildcard $(VENV)/.made),$(filter-out clean help,$(MAKECMDGOALS))),)
ifneq ($(shell $(PYTHON) -c '$(VERSION)'),$(shell $(VENV)/bin/python -c '$(VERSION)'))
$(error genfast: $(VENV) was made with another Python than $(PYTHON); run `make clean` first)
endif
endif
