# make demo   move real chunk layouts between two daemons, every byte checked
# make test   every test, Rust and Python
#
# Each does all its set-up: what it needs beyond Rust, a C++ compiler and Python with pip goes into .deps.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
CARGO := scripts/cargo
# Found by the daemons and tests; without it, or without .deps/nixl, NIXL is looked for where the system looks.
NIXL_LIB_DIR ?= $(wildcard $(CURDIR)/.deps/nixl/.nixl_*.mesonpy.libs)
export NIXL_LIB_DIR PYTHON
# How long to fuzz or soak.
SECONDS ?= 60

.PHONY: help
help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

.PHONY: setup
setup: ## fetch what build, tests and demo need into .deps
	@scripts/setup-deps all

.PHONY: build
build: ## the three binaries, optimised, in target/release
	$(CARGO) build --release --bins

.PHONY: demo
demo: ## move Llama-3-8B's and other layouts between two daemons, once per engine
	@scripts/demo

.PHONY: test
test: setup ## every test: Rust, then Python against the real daemons
	$(MAKE) --no-print-directory test-rust test-python

.PHONY: test-rust
test-rust:
	$(CARGO) test --no-fail-fast --lib --bins --tests

.PHONY: test-bench
test-bench: ## one round of the bench of transfers, which needs NIXL: whether it still runs
	PD_BENCH_ROUNDS=1 $(CARGO) test --bench transfer

.PHONY: test-without-lmcache
test-without-lmcache: ## the Rust tests of a build that has no LMCache in it
	$(CARGO) test --no-fail-fast --no-default-features --features nixl --lib --bins --tests

.PHONY: test-python
test-python:
	$(CARGO) build --bins
	PD_BIN_DIR=$(CURDIR)/target/debug PYTHONPATH=$(CURDIR)/.deps/python:$(CURDIR)/python $(PYTHON) -m pytest -q python/tests \
	  --ignore=python/tests/interop --ignore=python/tests/e2e --ignore=python/tests/hosts

.PHONY: hosts
hosts: setup ## daemons on hosts of their own, which this machine plays: links cut, hosts lost (needs root and iproute2)
	$(CARGO) build --bins
	PD_BIN_DIR=$(CURDIR)/target/debug PYTHONPATH=$(CURDIR)/.deps/python:$(CURDIR)/python $(PYTHON) -m pytest -q python/tests/hosts

.PHONY: interop
interop: setup ## against unmodified LMCache, which is fetched (2.2 GB in .deps) and not part of make test
	@scripts/setup-interop
	$(CARGO) build --bins
	PD_BIN_DIR=$(CURDIR)/target/debug PYTHONPATH=$(CURDIR)/.deps/python:$(CURDIR)/python $(PYTHON) -m pytest -q python/tests/interop

E2E_PYTEST = PD_BIN_DIR=$(CURDIR)/target/demo LD_LIBRARY_PATH=$$(cat .deps/e2e/library_path) PYTHONPATH=$(CURDIR)/python \
  .deps/e2e/venv/bin/python -m pytest -q --rootdir python/tests/e2e -c python/tests/e2e/pytest.ini
.PHONY: e2e-built
e2e-built: setup
	@scripts/setup-e2e
	@scripts/setup-routers
	$(CARGO) build --profile demo --bins

# Some minutes: real vLLM servers on the CPU. E2E='-k streams' runs some of it.
E2E ?=
.PHONY: e2e
e2e: e2e-built ## two real vLLM servers with the connector, tokens compared, after fetching vLLM for CPU (5.3 GB in .deps)
	$(E2E_PYTEST) python/tests/e2e --ignore=python/tests/e2e/test_router_failures.py $(E2E)

# Half an hour: a pair of servers for each family of models.
.PHONY: e2e-models
e2e-models: e2e-built ## models that keep KV by groups (windows, chunked attention, states, MLA), each as prefill and decode (E2E='-k gemma3')
	PD_E2E_MODELS=all $(E2E_PYTEST) python/tests/e2e/test_models.py $(E2E)

.PHONY: routers
routers: e2e-built ## routers of other people and ours in front of such servers, and what goes wrong there (E2E='-k toy')
	$(E2E_PYTEST) python/tests/e2e/test_proxy.py python/tests/e2e/test_routers.py python/tests/e2e/test_router_failures.py $(E2E)

SEEDS ?= 20000
.PHONY: simulate
simulate: ## play SEEDS=n worlds of senders and receivers, from PD_FIRST_SEED on
	PD_SEEDS=$(SEEDS) $(CARGO) test --test simulation every_seed -- --nocapture

.PHONY: soak
soak: setup ## kill, stop and restart daemons and connectors under load for SECONDS=60, checking every byte
	$(CARGO) build --bins
	PD_BIN_DIR=$(CURDIR)/target/debug PYTHONPATH=$(CURDIR)/.deps/python:$(CURDIR)/python $(PYTHON) python/tests/soak.py $(SECONDS)

.PHONY: lint
lint: ## formatting and clippy, as CI has them
	cargo fmt --check
	$(CARGO) clippy --all-targets -- -D warnings
	$(CARGO) clippy --all-targets --no-default-features --features nixl -- -D warnings

.PHONY: bench
bench: ## the benches: ratios within one run, for docs/benchmarks.md
	$(CARGO) bench --bench address_manager
	$(CARGO) bench --bench transfer
	@scripts/bench

# python/tests/interop/bench.py has options: make bench-lmcache BENCH='--rounds 50 --json bench.json'.
BENCH ?=
.PHONY: bench-lmcache
bench-lmcache: setup ## the same requests through LMCache and through ours by turns, after fetching LMCache (2.2 GB in .deps)
	@scripts/setup-interop
	$(CARGO) build --release --bins
	PD_BIN_DIR=$(CURDIR)/target/release PYTHONPATH=$(CURDIR)/.deps/python:$(CURDIR)/python $(PYTHON) python/tests/interop/bench.py $(BENCH)

.PHONY: bench-vllm
bench-vllm: setup ## time to first token with this connector, NixlConnector, files and one instance by turns (BENCH='--rounds 20')
	@scripts/setup-e2e
	$(CARGO) build --release --bins
	PD_BIN_DIR=$(CURDIR)/target/release LD_LIBRARY_PATH=$$(cat .deps/e2e/library_path) .deps/e2e/venv/bin/python \
	  python/tests/e2e/bench.py $(BENCH)

.PHONY: bench-turns
bench-turns: setup ## time to the first token of a conversation's fifth turn, with and without what decode has (BENCH='--conversations 20')
	@scripts/setup-e2e
	$(CARGO) build --release --bins
	PD_BIN_DIR=$(CURDIR)/target/release LD_LIBRARY_PATH=$$(cat .deps/e2e/library_path) .deps/e2e/venv/bin/python \
	  python/tests/e2e/bench_turns.py $(BENCH)

# Needs a nightly compiler and cargo-fuzz (cargo install cargo-fuzz).
TARGET ?= address_manager
FUZZ_TARGETS := $(sort $(basename $(notdir $(wildcard fuzz/fuzz_targets/*.rs))))
.PHONY: fuzz
fuzz: ## fuzz one decoder or manager: TARGET=address_manager SECONDS=60
	$(MAKE) --no-print-directory $(if $(filter-out address_manager,$(TARGET)),fuzz-seeds) fuzz-$(TARGET)

.PHONY: fuzz-all
fuzz-all: fuzz-seeds ## fuzz each of them in turn, SECONDS=60 each
	$(MAKE) --no-print-directory $(addprefix fuzz-,$(FUZZ_TARGETS))

# Where the fuzzer looks for them, from the golden files of the tests.
.PHONY: fuzz-seeds
fuzz-seeds:
	$(CARGO) test --lib fuzzing::tests::write_seeds -- --ignored --exact

.PHONY: configs
configs: ## write configs/ and docs/configuration.md from the table of keys
	$(CARGO) test --lib config::shipped::write_the_files_and_the_page -- --ignored --exact

.PHONY: $(addprefix fuzz-,$(FUZZ_TARGETS))
$(addprefix fuzz-,$(FUZZ_TARGETS)): fuzz-%:
	cargo +nightly fuzz run $(if $(filter-out address_manager,$*),--features pd_backend) $* -- -timeout=10 \
	  -max_total_time=$(SECONDS) -max_len=$(if $(filter-out address_manager,$*),8192,1024) -print_final_stats=1

.PHONY: clean
clean: ## what was built and fetched
	rm -rf target .deps
