// Package envoy prepares a plain Envoy for filters and runs one: it finds the program, writes bootstraps, starts and
// stops processes, and reads their admin interface.
//
// An Envoy that takes part holds one slot: an HTTP filter named SlotName, empty of itself, that the adapter fills over
// xDS. What is put in there is not this package's business.
package envoy

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/meshery/meshery-filters/internal/problem"
)

const (
	// SlotName is the name of the HTTP filter that an operator puts into an Envoy, and of the ECDS resource that fills it.
	SlotName = "meshery.filters"
	// MinVersion is the first Envoy with the filter_chain extension, which lets one resource hold a whole chain.
	MinVersion = "1.39.0"
	// cached is where `make envoy` puts the Envoy that the project is tested with, below the user's home.
	cached = ".cache/meshery-filters/envoy/1.40.0/envoy/_bin/envoy"
)

// Binary is an Envoy that can run filters.
type Binary struct {
	Path    string // absolute
	Version string // 1.40.0
}

// Find returns the first of these that is there: explicit (a flag's value), $ENVOY, envoy on PATH, the one that
// `make envoy` installs. An Envoy that somebody named is used or refused, and never passed over for another; one that
// merely lies on PATH is passed over when it cannot run filters. The error is a problem.EnvoyUnavailable that says what
// was found where.
func Find(ctx context.Context, explicit string) (Binary, error) {
	named := []struct{ origin, path string }{{"--envoy", explicit}, {"$ENVOY", os.Getenv("ENVOY")}}
	for _, n := range named {
		if n.path == "" {
			continue
		}
		b, err := check(ctx, n.path)
		if err != nil {
			return Binary{}, problem.EnvoyUnavailable.New("%s: %w", n.origin, err)
		}
		return b, nil
	}
	var found []string
	if path, err := exec.LookPath("envoy"); err != nil {
		found = append(found, "PATH: no envoy")
	} else if b, err := check(ctx, path); err == nil {
		return b, nil
	} else {
		found = append(found, "PATH: "+err.Error())
	}
	home, err := os.UserHomeDir()
	if err != nil {
		return Binary{}, problem.EnvoyUnavailable.New("%s; cache: %w", strings.Join(found, "; "), err)
	}
	b, err := check(ctx, filepath.Join(home, cached))
	if err != nil {
		return Binary{}, problem.EnvoyUnavailable.New("%s; cache: %w", strings.Join(found, "; "), err)
	}
	return b, nil
}

// check runs the Envoy at path, which may also be a name on PATH, to learn whether it can run filters.
func check(ctx context.Context, path string) (Binary, error) {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	path, err := exec.LookPath(path)
	if err != nil {
		return Binary{}, err
	}
	if path, err = filepath.Abs(path); err != nil {
		return Binary{}, err
	}
	cmd := exec.CommandContext(ctx, path, "--version")
	cmd.WaitDelay = time.Second
	out, err := cmd.CombinedOutput()
	if err != nil {
		return Binary{}, fmt.Errorf("run %s --version: %w", path, err)
	}
	version, ok := parseVersion(string(out))
	if !ok {
		return Binary{}, fmt.Errorf("%s does not say a version that Envoy would: %q", path, clip(string(out), 200))
	}
	if older(version, MinVersion) {
		return Binary{}, fmt.Errorf("%s is Envoy %s, and chains of filters need %s or later", path, version, MinVersion)
	}
	b := Binary{Path: path, Version: version}
	if err := runsWasm(ctx, b); err != nil {
		return Binary{}, fmt.Errorf("%s is Envoy %s, and cannot run WebAssembly on v8: %w", path, version, err)
	}
	return b, nil
}

// versionLine is "envoy  version: <sha>/1.40.0/Clean/RELEASE/BoringSSL"; a development build is 1.41.0-dev.
var versionLine = regexp.MustCompile(`version: [0-9a-f]+/(\d+\.\d+\.\d+)[^/]*/`)

func parseVersion(text string) (string, bool) {
	m := versionLine.FindStringSubmatch(text)
	if m == nil {
		return "", false
	}
	return m[1], true
}

// older compares two versions of three numbers each.
func older(a, b string) bool {
	as, bs := strings.Split(a, "."), strings.Split(b, ".")
	for i := range min(len(as), len(bs)) {
		x, _ := strconv.Atoi(as[i])
		y, _ := strconv.Atoi(bs[i])
		if x != y {
			return x < y
		}
	}
	return false
}

// probeBootstrap has Envoy run the smallest module there is as it starts: a memory, a malloc, and a function that is
// named for the ABI's version. Only a run tells: an Envoy without v8 still carries its name, and accepts the configuration in
// --mode validate.
const probeBootstrap = `
admin: {address: {socket_address: {address: 127.0.0.1, port_value: 0}}}
bootstrap_extensions:
- name: envoy.bootstrap.wasm
  typed_config:
    "@type": type.googleapis.com/envoy.extensions.wasm.v3.WasmService
    singleton: true
    config:
      name: probe
      vm_config:
        runtime: envoy.wasm.runtime.v8
        code: {local: {inline_bytes: "AGFzbQEAAAABCQJgAABgAX8BfwMDAgABBQMBAAEHLQMXcHJveHlfYWJpX3ZlcnNpb25fMF8yXzEAAAZtYWxsb2MAAQZtZW1vcnkCAAoJAgIACwQAQQAL"}}
`

func runsWasm(ctx context.Context, b Binary) (err error) {
	dir, err := os.MkdirTemp("", "meshery-filters-probe-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	p, err := Start(ctx, b, ProcessOptions{Bootstrap: []byte(probeBootstrap), Dir: dir, Concurrency: 1, LogLevel: "error"})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, p.Stop(ctx)) }()
	return p.Ready(ctx)
}

// clip shortens text that may be anything.
func clip(s string, n int) string {
	s = strings.TrimSpace(s)
	if len(s) > n {
		s = s[:n] + "…"
	}
	return s
}
