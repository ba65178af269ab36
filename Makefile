# `make help` lists the targets. After `make setup`, plain cargo does everything that is done here.
# A LIBTORCH or LIBTORCH_USE_PYTORCH of your own, and CARGO_TARGET_DIR, DDIL_CACHE and DDIL_DATA, are respected.

CARGO ?= cargo
PYTHON ?= python3
# What `make demo` runs.
DEMO ?= run --release --bin ddil -- demo

.DEFAULT_GOAL := help
.PHONY: help tools setup demo test report-test gpu-tests soak fuzz sanitize bench bench-load bench-peers bench-check parity lint doc doc-only dependents package clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# $(call need,program,where to get it): says what is missing before a build script does so at length.
need = command -v $(1) >/dev/null || { echo "error: '$(1)' was not found. $(2)" >&2; exit 1; }

tools:
	@$(call need,$(firstword $(CARGO)),Install Rust 1.88 or newer: https://rustup.rs)
	@$(call need,$(firstword $(PYTHON)),Install Python 3.8 or newer with pip (Debian and Ubuntu: apt-get install python3 python3-pip).)
	@$(call need,$(firstword $(or $(CXX_OF_USER),c++)),Install a C++17 compiler (Debian and Ubuntu: apt-get install g++).)

# Make gives CXX a value of its own; only one that was set outside counts.
CXX_OF_USER := $(if $(filter environment% command%,$(origin CXX)),$(CXX))

setup: tools ## fetch libtorch and Fashion-MNIST into the user's cache, once
	@$(PYTHON) tools/setup/get_libtorch.py
	@$(PYTHON) tools/setup/get_fashion_mnist.py

demo: setup ## distil a teacher on Fashion-MNIST with and without DDIL, and compare
	$(CARGO) $(DEMO)

test: setup ## every test, doc tests and the tools' own too
	@if $(CARGO) nextest --version >/dev/null 2>&1; \
	then echo "$(CARGO) nextest run --workspace"; $(CARGO) nextest run --workspace; \
	else echo "$(CARGO) test --workspace --lib --bins --tests"; $(CARGO) test --workspace --lib --bins --tests; fi
	$(CARGO) test --workspace --doc
	$(PYTHON) tools/tests.py

gpu-tests: setup ## what needs a GPU (set LIBTORCH or LIBTORCH_USE_PYTORCH to a libtorch with CUDA)
	$(CARGO) test --workspace --tests -- --ignored a_gpu --test-threads 1

# Faults are brought about in a debug build, where the points for them are; what runs long is what is shipped.
SOAK := --workspace --test program -- --ignored --nocapture --test-threads 1
soak: setup ## long: kills, failing disks and long runs (DDIL_SOAK_UPDATES, _KILLS, _METHODS; DDIL_SEED)
	$(CARGO) test $(SOAK) soak_every_fault soak_kills soak_the_protocol
	$(CARGO) test --release $(SOAK) soak_long_runs

bench: setup ## the benchmarks
	$(CARGO) bench --workspace --benches

# Gigabytes, once: PyTorch's wheel and what it is linked to.
PEERS := $(or $(DDIL_CACHE),$(or $(XDG_CACHE_HOME),$(HOME)/.cache)/ddil)/peers
PEERS_PYTHON ?= $(PEERS)/bin/python
PEERS_PACKAGES := torch==2.13.0 diffusers==0.42.1 transformers==5.24.0 peft==0.21.2 accelerate safetensors numpy pillow \
	torchvision==0.28.0 pytorch-fid==0.3.0 clean-fid==0.1.35 torch-fidelity==0.4.0 prdc==0.2 torchmetrics==1.9.0

# Named after the packages: a change of the list installs them.
PEERS_STAMP := $(PEERS)/installed-$(firstword $(shell printf '%s' '$(PEERS_PACKAGES)' | cksum))

$(PEERS)/bin/python: $(PEERS_STAMP) ;

$(PEERS_STAMP):
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/pip install --quiet $(PEERS_PACKAGES) && touch $@ || { rm -rf $(PEERS); exit 1; }

report-test: setup ## open reports in Chromium (in PATH, or CHROMIUM); without one, says so and passes
	$(CARGO) test --workspace --test program pages_work_in_a_browser -- --show-output

parity: setup $(PEERS_PYTHON) ## compare with diffusers and pytorch-fid; installs them into the cache, or set PEERS_PYTHON
	$(CARGO) build --release --workspace --example parity --bin ddil
	$(PEERS_PYTHON) tools/check/parity.py --ddil $(or $(CARGO_TARGET_DIR),target)/release/examples/parity $(PARITY)
	$(PEERS_PYTHON) tools/check/parity_metrics.py --ddil $(or $(CARGO_TARGET_DIR),target)/release/ddil $(PARITY_METRICS)

bench-load: setup ## beside other work on the same processors: benches/load.py; LOAD="--rounds 5"
	$(CARGO) build --release --workspace --bin ddil
	$(PYTHON) benches/load.py $(LOAD)

bench-peers: setup $(PEERS_PYTHON) ## compare speed with PyTorch; BENCH_PEERS="--quick" for two minutes of it
	$(PEERS_PYTHON) benches/peers/bench_peers.py $(BENCH_PEERS)

bench-check: setup ## benchmarks against benches/baseline.json, by ratios of one run; BENCH_CHECK=--save writes it
	$(PYTHON) tools/check/bench_regression.py --cargo "$(CARGO)" $(BENCH_CHECK)

lint: setup ## formatting, licences, circles of imports and clippy, warnings are errors
	$(CARGO) fmt --all --check
	$(PYTHON) tools/check/check_licences.py
	$(PYTHON) tools/setup/write_readmes.py --check
	$(PYTHON) tools/check/yardsticks.py
	$(CARGO) clippy --workspace --all-targets -- -D warnings

doc: setup ## the documentation, warnings are errors
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --workspace --no-deps

# The runtime has to come before every other library. Of leaks, those that begin in the shim are ours. Only the tests run
# under it, not cargo; libtorch's own threads and caches stay out of its way. What is asked of glibc's allocator has no
# answer there: the sanitizer brings its own.
SANITIZE := env LD_PRELOAD=$(shell $(or $(CXX_OF_USER),c++) -print-file-name=libasan.so) \
	ASAN_OPTIONS=detect_leaks=1:detect_odr_violation=0:abort_on_error=0 \
	LSAN_OPTIONS=suppressions=$(CURDIR)/tools/check/leaks.supp:print_suppressions=0

sanitize: setup ## the shim's tests under the address and leak sanitizers; rebuilds the shim, and again for the next build
	DDIL_SANITIZE=address CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER="$(SANITIZE)" \
		$(CARGO) test --workspace --test libtorch -- --skip kept_with_glibc --skip kept_pages $(TESTS)

# Seconds of each target.
FUZZ_SECONDS ?= 60

fuzz: setup ## spoilt files for every reader, FUZZ_SECONDS a target; DDIL_FUZZ_SEED chooses other ones
	DDIL_FUZZ_SECONDS=$(FUZZ_SECONDS) $(CARGO) test --workspace --test hostile inputs:: -- --show-output

# Each crate by itself, as docs.rs builds it. A LIBTORCH that is not there shows that none is used.
doc-only: tools ## the documentation of each crate, without libtorch
	@set -e; for crate in $(CRATES); do echo "$$crate"; done | while read crate; do \
		LIBTORCH=/nonexistent $(CARGO) doc --quiet --no-deps -p $$crate $$(grep -q '^doc-only' crates/$$crate/Cargo.toml && echo "--features $$crate/doc-only"); \
		echo "documented $$crate"; done
CRATES = $(notdir $(patsubst %/Cargo.toml,%,$(wildcard crates/*/Cargo.toml)))

# They share the workspace's lock file and target folder, so that libtorch's bindings are not built again.
DEPENDENTS := --manifest-path tests/dependents/Cargo.toml
dependents: setup ## build and run the packages outside of the workspace, tests/dependents
	cp Cargo.lock tests/dependents/Cargo.lock
	$(CARGO) fmt --check $(DEPENDENTS) --all
	@set -e; for package in uses-schedulers uses-core-and-losses uses-pipelines; do \
		CARGO_TARGET_DIR=$(abspath $(or $(CARGO_TARGET_DIR),target)) $(CARGO) run $(DEPENDENTS) -p $$package; done

# What each crate's package contains. VERIFY= also builds each from its package, which takes minutes.
VERIFY ?= --no-verify
package: setup ## the packages of all crates; VERIFY= to build them too
	$(CARGO) package --workspace --allow-dirty --quiet $(VERIFY) --exclude ddil-examples --exclude ddil-benches --exclude ddil-tests
	$(PYTHON) tools/check/packages.py --folder $(or $(CARGO_TARGET_DIR),target)/package

clean: ## remove what cargo built; runs/ and the cache stay
	$(CARGO) clean
