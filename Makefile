# The one list of this repository's commands. `make` lists them. Continuous
# integration (.ci/run) runs `make ci` on a machine with redis-server and Chromium.

MODULES := meshprom bench examples/whoshere/browsertest
STATICCHECK := honnef.co/go/tools/cmd/staticcheck@v0.8.2
GOVULNCHECK := golang.org/x/vuln/cmd/govulncheck@v1.9.0
GOLANGCI := github.com/golangci/golangci-lint/v2/cmd/golangci-lint@v2.14.0
FUZZTIME ?= 10s
SEEDS ?= 10000
FROM ?= 1

# Tests with servers on a real Redis have short leases. Two such packages at once would
# take the processor from each other, so they run one after the other.
E2E := ./internal/e2e/...
REST = $(shell go list ./... | grep -v /internal/e2e/)

export PATH := $(PATH):$(shell go env GOPATH)/bin
SHELL := bash

.DEFAULT_GOAL := help
.PHONY: help
help: ## list the commands
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

STEPS := format lint vuln deps api fresh sim race real modules soak page install fuzz

.PHONY: ci
ci: $(STEPS) ## everything that must hold before a change is taken

.PHONY: steps
steps: ## the steps of ci, in order
	@echo $(STEPS)

.PHONY: tools
tools: ## install the linters
	go install $(STATICCHECK)
	go install $(GOVULNCHECK)
	go install $(GOLANGCI) || echo "golangci-lint cannot be built here: make lint goes without it"

.PHONY: format
format: ## fail if a file is not formatted
	@unformatted=$$(gofmt -l .); [ -z "$$unformatted" ] || { echo "not gofmt-clean: $$unformatted"; exit 1; }

.PHONY: lint
lint: ## vet, staticcheck and go.mod as go mod tidy leaves it, in all modules; golangci-lint (.golangci.yml)
	go vet ./... && staticcheck ./... && go mod tidy -diff
	@if command -v golangci-lint >/dev/null; then golangci-lint run ./...; else echo "golangci-lint is not installed: left out"; fi
	@set -e; for m in $(MODULES); do echo "-- $$m"; (cd $$m && go vet ./... && staticcheck ./... && go mod tidy -diff); done

# The database is fetched over the network. Without it the check says so and passes;
# a finding fails.
.PHONY: vuln
vuln: ## known vulnerabilities
	@status=0; govulncheck ./... || status=$$?; [ "$$status" != 3 ] || { echo "known vulnerabilities are in use"; exit 1; }

.PHONY: deps
deps: ## the dependencies of an importer's binary are the listed ones
	.ci/deps
	@if go list -deps ./meshtest | grep -xE 'testing|.*(testify|goleak).*'; then echo "meshtest can be used outside of tests"; exit 1; fi

.PHONY: api
api: ## the exported API is as listed, and CHANGELOG.md tells of its changes
	go test -count=1 ./internal/api -nested
	.ci/api

.PHONY: short
short: ## the quick tests, on the embedded Redis only
	go test -short ./...

.PHONY: fresh
fresh: ## all tests as on a machine without a redis-server
	MESH_REDIS_SERVER=/none go test ./...

.PHONY: test
test: ## all tests; those on a real Redis are skipped without a redis-server
	go test $(REST)
	go test -p 1 $(E2E)

.PHONY: sim
sim: ## 200 schedules of the simulation
	go test ./internal/e2e/sim -run 'TestSimulation$$' -sim.seeds=200

.PHONY: seeds
seeds: ## SEEDS schedules of the simulation, from FROM on
	go test ./internal/e2e/sim -run 'TestSimulation$$' -timeout 3h -v -sim.seeds=$(SEEDS) -sim.from=$(FROM)

.PHONY: mutations
mutations: ## the simulation must notice each missing mechanism
	go test ./internal/e2e/sim -run TestMutations -timeout 60m -v -sim.mutate=all

.PHONY: race
race: ## all tests with the race detector; a missing redis-server is a failure
	MESH_REQUIRE_REDIS=1 go test -race -timeout 25m $(REST)
	MESH_REQUIRE_REDIS=1 go test -race -timeout 25m -p 1 $(E2E)

.PHONY: real
real: ## tests on a real Redis that the race detector leaves out or makes smaller, because it is slow
	MESH_REQUIRE_REDIS=1 go test -count=1 -run 'TestFaults$$/^churn$$|TestASilentMemberIsAskedAbout$$|TestAttacks$$|TestDeploy$$|TestKilledServer$$|TestCapsOfManyJoins$$' -p 1 $(E2E)

.PHONY: modules
modules: ## the tests of the nested modules, and one round of benchmarks
	cd meshprom && go test -race ./...
	cd bench && go test -run '^$$' -bench 'Manager|Fanout/subscribers=200/servers=1' -benchtime 1x .

.PHONY: soak
soak: ## a small soak: three servers, one replaced after the other, clients that check what they are told
	cd bench && MESH_REQUIRE_REDIS=1 go test -count=1 -run TestSoak -soak.minutes=1 -soak.servers=3 -soak.connections=500 .

.PHONY: page
page: ## the example's page in two browsers on two servers
	cd examples/whoshere/browsertest && MESH_REQUIRE_BROWSER=1 MESH_REQUIRE_REDIS=1 go test -count=1 ./...

.PHONY: install
install: ## the README's first commands, from an empty directory
	.ci/install-check

.PHONY: fuzz
fuzz: ## each fuzz test for FUZZTIME
	.ci/fuzz $(FUZZTIME)

.PHONY: bench
bench: ## the benchmarks of the packages; bench/README.md has those beside peers
	go test -run '^$$' -bench . ./...
