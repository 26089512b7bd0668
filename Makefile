# `make` alone lists the targets.

# Which engine: vllm or sglang. Their pins conflict, so each has an environment of its own.
ENGINE ?= vllm
VENV  ?= $(if $(filter sglang,$(ENGINE)),.venv-sglang,.venv)
MODEL ?= tiny-m3
PORT  ?= 8000
# Test processes at a time; each may run an engine, which takes about 3 GB.
JOBS  ?= 2
# The flags of `vllm serve`, or of `python -m sglang.launch_server`.
SERVE_ARGS ?= $(SERVE_ARGS_$(ENGINE))
SERVE_ARGS_vllm := --attention-backend msa --language-model-only --max-model-len 2048
# SGLang sizes its cache by the memory of the machine, and compiles for a CPU, unless told otherwise.
SERVE_ARGS_sglang := --attention-backend msa --device cpu --context-length 2048 --max-total-tokens 16384 --disable-cuda-graph
# Without a GPU its kernels run under Triton's interpreter, which is chosen for a whole process.
INTERPRET := $(if $(shell command -v nvidia-smi),0,1)

# What an environment other than the first has to run again; each compiles with a Triton of its own.
ENGINE_TESTS := tests/examples tests/engines tests/$(ENGINE) tests/patches tests/test_attend.py tests/kernels/gpu/test_compiles.py

BIN := $(VENV)/bin
# Each run ends with what was slowest in it, so that growth is seen.
PYTEST := $(BIN)/python -m pytest --durations=10
# A Python started here would otherwise import ./kernels where SGLang and transformers mean the
# package of that name.
export PYTHONSAFEPATH := 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help serve serve-sglang test test-sglang environments lint typecheck docs clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

serve: $(VENV)/.serve-ready $(if $(filter tiny-m3,$(MODEL)),tiny-m3/config.json) ## install vLLM, serve a tiny MiniMax-M3 on the CPU and ask it something (PORT=8000; CHECK=1: stop after the answer)
	@$(BIN)/python tools/serve.py --engine $(ENGINE) $(if $(CHECK),--once) --port $(PORT) $(MODEL) -- $(SERVE_ARGS)

serve-sglang: ## the same with SGLang
	@$(MAKE) --no-print-directory serve ENGINE=sglang

test: environments ## install both engines, check style and types and run all tests (ARGS="-k name" passes on to pytest, with vLLM)
	@$(MAKE) --no-print-directory lint typecheck
ifdef ARGS
	$(BIN)/python -m pytest $(ARGS)
else
	$(PYTEST) -n $(JOBS) --dist loadfile --no-loadscope-reorder -m "not alone and not gpu"
	$(PYTEST) -m alone
	TRITON_INTERPRET=$(INTERPRET) $(PYTEST) -n $(JOBS) --dist loadfile --no-loadscope-reorder -m gpu tests/kernels
	@$(MAKE) --no-print-directory test-sglang VENV=$(VENV)-sglang
endif

test-sglang: ## install SGLang and run its tests (ARGS passes on to pytest)
	@$(MAKE) --no-print-directory engine-tests ENGINE=sglang

# Side by side, since an install is work for one core.
environments:
ifndef ARGS
	@$(MAKE) --no-print-directory -j 2 vllm-environment sglang-environment
endif

.PHONY: vllm-environment sglang-environment engine-tests
vllm-environment: $(VENV)/.test-ready
sglang-environment:
	@$(MAKE) --no-print-directory ENGINE=sglang VENV=$(VENV)-sglang $(VENV)-sglang/.test-ready

engine-tests: $(VENV)/.test-ready
ifdef ARGS
	$(BIN)/python -m pytest $(ARGS)
else
	$(PYTEST) -n $(JOBS) --dist loadfile --no-loadscope-reorder -m "not alone and not gpu" $(ENGINE_TESTS)
	$(PYTEST) -m alone $(ENGINE_TESTS)
endif

lint: $(VENV)/.test-ready ## check the style
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

typecheck: $(VENV)/.test-ready ## check the types
	$(BIN)/python tools/typecheck.py

docs: $(VENV)/.test-ready ## build the pages of docs/ as a site in site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

clean: ## remove what make made: the environments, the tiny checkpoint, the site and build outputs
	rm -rf .venv .venv-sglang $(VENV) tiny-m3 build dist site *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis

# The two marks are written last, so an interrupted install is taken up again by the next run.
$(VENV)/.serve-ready: envs/$(ENGINE)-cpu.txt pyproject.toml tools/setup_env.py
	@python=$${PYTHON:-$$(tools/find_python $(ENGINE))} || exit 1; "$$python" tools/setup_env.py --engine $(ENGINE) $(VENV)
	@touch $@

$(VENV)/.test-ready: envs/dev.txt $(VENV)/.serve-ready
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-warn-conflicts -r envs/dev.txt
	@touch $@

# Order-only: a new environment needs no new checkpoint, but changed code that writes it does.
tiny-m3/config.json: $(wildcard msa_backend/tiny/*.py) | $(VENV)/.serve-ready
	@$(BIN)/msa-backend tiny tiny-m3 --overwrite
