# What there is to do here; `make` lists it.

GO        ?= go
VERSION   := $(or $(VERSION),$(shell git describe --tags --match 'v[0-9]*' --dirty 2>/dev/null),v0.1.0-dev)
COMMIT    := $(or $(COMMIT),$(shell git describe --always --dirty --abbrev=40 --exclude '*' 2>/dev/null),unknown)
FUZZTIME  ?= 10s
KILLS     ?= 1000
FOR       ?=
MESH      ?= envoy
TORTURE   := ^Test(AKilledAdapter|EventsArriveWhatever|NothingAcceptedIsLost|ManyClientsAndListeners|AClockThatIsSet)
BIN       := bin/meshery-filters
# The demo of each mesh. The program runs no control plane, so those of Istio and Consul are another.
DEMO_envoy  := $(BIN) demo
DEMO_istio  := bin/demo-mesh --mesh istio
DEMO_consul := bin/demo-mesh --mesh consul
LDFLAGS   := -s -w -X main.version=$(VERSION) -X main.commit=$(COMMIT)
TOOL      := $(GO) tool -modfile=build/tools/go.mod
GOFILES    = $(shell find . -name '*.go' -not -path './.git/*' -not -path './bin/*')
PROTOS     = $(wildcard internal/server/filterspb/*.proto)
# Modules of their own, so that the program does not depend on what only builds it. Those in build/controlplanes are such
# too, and are only built: to vet them is to compile Kubernetes once more.
NESTED    := build/tools build/image
# These build the program and run it, of which the cache of test results knows nothing.
PROOF     := ./build/proof ./build/browser ./build/bench
# Nothing in these starts a goroutine. The race detector would see nothing there, and takes five times as long.
PURE      := ./internal/problem ./internal/filter ./internal/plan ./internal/mesh ./oam
export CARGO_TARGET_DIR ?= $(HOME)/.cache/meshery-filters/cargo-target

MAKEFLAGS += --no-builtin-rules
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  %-13s %s\n", $$1, $$2}' Makefile

.PHONY: build
build: ## build bin/meshery-filters: static, with version and commit
	@mkdir -p bin
	CGO_ENABLED=0 $(GO) build -trimpath -buildvcs=false -ldflags '$(LDFLAGS)' -o $(BIN) .

.PHONY: envoy
envoy: ## install the pinned Envoy into the cache, unless ENVOY, PATH or the cache has one already
	@build/envoy.sh

.PHONY: chromium
chromium: ## install the Chromium that the pages are tested in, by apt-get, unless PATH has one already
	@build/chromium.sh

.PHONY: controlplanes
controlplanes: ## build the Kubernetes, Istio and Consul that tests run against into the cache, unless they are there: 24 CPU-minutes, once
	@build/controlplanes/build.sh

.PHONY: demo
demo: build envoy $(if $(filter istio consul,$(MESH)),bin/demo-mesh) ## show the whole idea on this machine, with MESH=istio or consul on that mesh; BREAK=digest|nofilter|nack sabotages it, KEEP=1 stays up
	$(or $(DEMO_$(MESH)),$(error MESH is $(MESH); use envoy, istio or consul)) $(if $(BREAK),--break '$(BREAK)') $(if $(filter-out 0,$(KEEP)),--keep)

.PHONY: bin/demo-mesh
bin/demo-mesh: controlplanes
	$(GO) build -o $@ ./build/demo

.PHONY: check
check: fmt vet lint ## format, vet, linters, unit and golden tests, without an Envoy: under a minute once built
	$(GO) test -short ./...
	@for module in $(NESTED); do $(GO) -C $$module test -short ./... || exit 1; done

.PHONY: fmt
fmt:
	@unformatted=$$(gofmt -l $(GOFILES)); [ -z "$$unformatted" ] || { echo "not formatted; run gofmt -w on:" >&2; echo "$$unformatted" >&2; exit 1; }

.PHONY: vet
vet:
	$(GO) vet ./...
	@for module in $(NESTED); do $(GO) -C $$module vet ./... || exit 1; done

.PHONY: lint
lint: ## staticcheck (staticcheck.conf) and the table of the packages (.depguard.yaml)
	$(TOOL) staticcheck ./...
	$(TOOL) depguard ./...

.PHONY: test
test: fmt vet lint test-rust verify test-demo test-packages test-proof ## everything: check, -race with real Envoys, the Rust filters, rebuilt bytes, the demo and its sabotage

# In the order of how long they take. Vet has looked at all of it.
.PHONY: test-packages
test-packages: envoy controlplanes
	@for module in $(NESTED); do $(GO) -C $$module test ./... || exit 1; done
	$(GO) test -vet=off $(PURE)
	@# At full length this would take minutes with -race, where it does a part.
	$(GO) test -vet=off ./internal/operation -run TestWhateverMoment
	@# Three at once, however few cores there are.
	packages=$$($(GO) list ./...) && $(GO) test -race -vet=off -timeout 20m -p 3 ./internal/operation ./internal/cli ./internal/istiod \
		$$(echo "$$packages" | grep -v $(patsubst .%,-e '%$$',$(PURE) $(PROOF)))

.PHONY: test-proof
test-proof: envoy chromium controlplanes
	@# What is proved is another process, which is built without the race detector. To watch who asks it, and hears a
	@# million answers, would take twice as long: only the checks of that are.
	$(GO) test -race -vet=off -short ./build/proof
	$(GO) test -vet=off -timeout 20m -count=1 -parallel 1 ./build/proof
	$(GO) test -race -vet=off -timeout 20m -count=1 -p 1 $(filter-out ./build/proof,$(PROOF))

.PHONY: test-rust
test-rust:
	cd filters && cargo test --quiet --locked --workspace

.PHONY: verify
verify: ## rebuild the Wasm filters from two directories and compare with the committed bytes
	filters/verify.sh

.PHONY: test-demo
test-demo: build envoy bin/demo-mesh
	build/testdemo.sh $(DEMO_envoy)
	@# build/proof sabotages these.
	SABOTAGE= build/testdemo.sh $(DEMO_istio)
	SABOTAGE= build/testdemo.sh $(DEMO_consul)

.PHONY: torture
torture: envoy ## kill, cut off and damage what runs, KILLS (1000) times; FOR=30m goes on for that long in each test
	TORTURE_KILLS='$(KILLS)' TORTURE_TIME='$(FOR)' $(GO) test -count 1 -timeout 0 -v ./build/proof -run '$(TORTURE)'
	$(GO) test -count 1 -timeout 0 -v ./internal/operation -run TestWhateverMomentTheProcessIsKilled

.PHONY: bench
bench: build envoy controlplanes ## measure: start, events, operations, many targets and proxies, loading and unloading, Istio, Consul, CPU per request
	$(GO) run ./build/bench -binary $(BIN) -library

.PHONY: fuzz
fuzz: ## fuzz every target for FUZZTIME (10s) each
	@build/fuzz.sh $(FUZZTIME)

.PHONY: filters
filters: ## build the Wasm filters; NAME.wasm and its digest are committed
	filters/build.sh

.PHONY: generate
generate: proto ## write what is generated: protobuf code, JSON Schemas, docs
	$(GO) run ./build/schema
	$(GO) test ./internal/problem -run Errors -update

.PHONY: proto
proto:
	@command -v protoc >/dev/null || { echo "protoc is missing: install Debian's protobuf-compiler" >&2; exit 1; }
	@mkdir -p bin/tools
	$(GO) -C build/tools build -o ../../bin/tools/ google.golang.org/protobuf/cmd/protoc-gen-go google.golang.org/grpc/cmd/protoc-gen-go-grpc
	PATH="$(CURDIR)/bin/tools:$$PATH" protoc --go_out=. --go_opt=paths=source_relative --go-grpc_out=. --go-grpc_opt=paths=source_relative $(PROTOS)

.PHONY: image
image: build ## write bin/meshery-filters-image.tar, an OCI image, without a container engine
	$(GO) -C build/image run . -binary ../../$(BIN) -out ../../bin/meshery-filters-image.tar -version '$(VERSION)' -commit '$(COMMIT)'

.PHONY: clean
clean: ## delete what was built; the caches below ~/.cache/meshery-filters stay
	rm -rf bin demo.json
