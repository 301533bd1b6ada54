# Strata. `make demo` shows the mesh at work on real traffic, `make test` runs every test.
# Both set up what is missing themselves; they need root and Linux >= 5.15.
.PHONY: help setup bpf build demo test lint bench clean cluster cluster-demo conformance cluster-images cluster-down test-offline test-cluster
.DEFAULT_GOAL := help
SHELL := /bin/bash
export PATH := $(PATH):$(HOME)/.cargo/bin
DEMO ?=

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

setup: ## install what is missing (Debian packages, bpf-linker); quick the second time
	@integration/scripts/setup.sh

bpf: setup ## build the kernel programs
	@integration/scripts/build-bpf.sh

build: bpf ## build every binary
	cargo build --workspace --bins

demo: build ## play the ten scenes on real traffic (DEMO="--scene 5" for one)
	target/debug/strata demo $(DEMO)

test: build ## run every test; needs root
	@integration/scripts/test.sh

lint: bpf ## formatting, clippy, layers
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- -D warnings

bench: bpf ## measure beside Envoy, nginx, HAProxy and plain veth; prints ratios
	@integration/scripts/setup.sh bench
	cargo build --profile bench-lto --workspace --bins
	integration/benches/run.sh

cluster: build ## a real Kubernetes cluster on this machine, with Istio and Strata on it
	@integration/scripts/setup.sh cluster
	@integration/cluster/cluster.sh

cluster-demo: cluster ## play the scenes on the cluster (DEMO="--scene 5" for one)
	@. integration/cluster/env.sh && target/debug/strata demo --cluster $(DEMO)

test-offline: build ## the chart and what else needs the cluster's programs but no cluster; needs root
	@integration/scripts/setup.sh cluster
	@integration/cluster/offline.sh

test-cluster: test-offline ## the same, and the scenes as tests on a real cluster, brought up and taken away; needs root
	@integration/cluster/test.sh

conformance: ## Kubernetes' own network tests on the running cluster (FOCUS="Netpol" for some)
	@integration/scripts/setup.sh conformance
	@integration/cluster/conformance.sh $(if $(FOCUS),"$(FOCUS)")

cluster-images: build ## bring what was just built to the running cluster's nodes
	@integration/cluster/images.sh

cluster-down: ## take the cluster away (what was built for it stays in ~/.cache/strata-cluster)
	@integration/cluster/down.sh --wipe

clean: ## remove build results
	cargo clean
	rm -rf bpf/programs/target integration/.cache
