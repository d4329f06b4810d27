package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"

	"github.com/meshery/meshery-filters/filters"
	"github.com/meshery/meshery-filters/internal/filter"
	"github.com/meshery/meshery-filters/internal/mesh"
	"github.com/meshery/meshery-filters/internal/plan"
)

// plane changes what a group of Envoys runs.
type plane interface {
	addr() string // for the Envoys' xDS
	// prepare lets the Envoys of a new group get an empty chain, without which they do not serve.
	prepare(ctx context.Context, group string) error
	// put makes the limiter with this configuration, or nothing when it is empty, all that the group of n Envoys runs.
	// It returns once the plane knows that they do.
	put(ctx context.Context, group string, n int, config string) error
}

// document is the limiter as a user applies it; without a configuration it names what to remove.
func document(group, config string) string {
	doc := fmt.Sprintf("apiVersion: %s\nkind: %s\nmetadata: {name: bench-%s}\n", filter.APIVersion, filter.Kind, group)
	if config == "" {
		return doc
	}
	return doc + fmt.Sprintf("spec:\n  target: {kind: ProxyGroup, name: %s}\n  module: {builtin: ratelimit}\n  phase: authz\n"+
		"  failurePolicy: reload\n  config: %s\n", group, config)
}

// planOf is what the adapter gives proxies for that document.
func planOf(group, config string) (plan.Plan, error) {
	wasm, ok := filters.Builtin("ratelimit")
	if !ok {
		return plan.Plan{}, errors.New("there is no built-in ratelimit")
	}
	digest := sha256.Sum256(wasm)
	chain := filter.Chain{Mesh: "envoy", Target: filter.Target{Kind: filter.ProxyGroup, Name: group}}
	if config != "" {
		read, err := filter.Read([]byte(document(group, config)), "default")
		if err != nil {
			return plan.Plan{}, err
		}
		f, err := mesh.Envoy{}.Complete(read[0])
		if err != nil {
			return plan.Plan{}, err
		}
		f.Spec.Module.SHA256 = hex.EncodeToString(digest[:])
		chain = chain.With(f)
	}
	return mesh.Envoy{}.Plan(chain, plan.World{Modules: map[string]plan.Code{hex.EncodeToString(digest[:]): {Inline: wasm}}})
}
