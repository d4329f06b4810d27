package operation_test

import (
	"context"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"testing"

	"github.com/meshery/meshery-filters/filters"
	"github.com/meshery/meshery-filters/internal/consul"
	"github.com/meshery/meshery-filters/internal/module"
	"github.com/meshery/meshery-filters/internal/operation"
	"github.com/meshery/meshery-filters/internal/problem"
)

func TestACallerOfAnotherHostNeedsACertificateToUseTheAdaptersOwnRights(t *testing.T) {
	stranger := operation.Caller{Remote: "192.0.2.7:4242", Foreign: true}
	known := operation.Caller{Remote: "192.0.2.7:4242", Certificate: "CN=operator", Serial: "1"}
	here := operation.Caller{Remote: "127.0.0.1:4242"}
	changes := map[string]operation.Request{
		"apply_filter": apply(doc("hello")), "removal": remove(doc("hello")), "undo": undo("hello", 0),
		"imagehub": {Operation: "imagehub"}, "limiter": {Operation: "imagehub_rate_limit"}, "install": {Operation: "meshery-filters"},
	}
	by := func(c operation.Caller, q operation.Request) operation.Request { q.Caller = c; return q }
	r := newRig(t)
	for name, q := range changes {
		_, err := r.runner.Submit(t.Context(), by(stranger, q))
		if !errors.Is(err, problem.CallerUnknown) || !strings.Contains(err.Error(), "192.0.2.7") {
			t.Errorf("%s from another host: %v", name, err)
		}
	}
	if _, err := r.runner.Plan(t.Context(), by(stranger, apply(doc("hello")))); !errors.Is(err, problem.CallerUnknown) {
		t.Errorf("a plan, which fetches modules: %v", err)
	}
	r.ok(by(stranger, operation.Request{Operation: "filters_status"}))
	if got := r.order("default"); got != "" {
		t.Fatalf("the chain is %q", got)
	}
	r.ok(by(known, apply(doc("hello"))))
	r.ok(by(here, remove(doc("hello"))))

	open := newRig(t, func(o *operation.Options) { o.AllowUnauthenticated = true })
	open.ok(by(stranger, apply(doc("hello"))))
	open.ok(by(stranger, operation.Request{Operation: "imagehub"}))
}

func TestFiltersInMesheryAreFetchedForNoStranger(t *testing.T) {
	const id = "1c9adbd4-c121-4fc0-9690-5bf88f477096"
	r := newRig(t, func(o *operation.Options) {
		o.StoredFilters = true
		o.Modules.(*module.Resolver).Meshery = func(_ context.Context, asked string, _ int64) ([]byte, error) {
			if asked != id {
				t.Errorf("asked for %q", asked)
			}
			data, _ := filters.Builtin("headers")
			return data, nil
		}
	})
	stored := doc("hello", "module: {url: meshery://"+id+"}")
	q := apply(stored)
	q.Caller = operation.Caller{Remote: "192.0.2.7:4242", Foreign: true}
	q.Kubeconfigs = []string{"{}"} // a cluster of its own does not make the adapter's token its own
	if _, err := r.runner.Submit(t.Context(), q); !errors.Is(err, problem.CallerUnknown) {
		t.Errorf("a stranger: %v", err)
	}
	if _, err := r.runner.Submit(t.Context(), apply(doc("hello", "module: {url: 'meshery://../system'}"))); !errors.Is(err, problem.InvalidDocument) || !strings.Contains(err.Error(), "not the id") {
		t.Errorf("an id that is none: %v", err)
	}
	r.ok(apply(stored))
	if got := r.order("default"); got != "default/hello" {
		t.Errorf("the chain is %q", got)
	}
}

func TestNothingIsFetchedOrKeptForWhoMayOnlyLook(t *testing.T) {
	r := newRig(t)
	reader := operation.Caller{Remote: "192.0.2.7:4242", Certificate: "CN=auditor", Serial: "1", Reader: true}
	inline := func(n int) string { return doc("x", "module: {inline: "+variant(t, n)+"}") }
	plan := func(c operation.Caller, body string) error {
		q := apply(body)
		q.Caller = c
		_, err := r.runner.Plan(t.Context(), q)
		return err
	}
	const away = "module: {url: https://127.0.0.1:1/x.wasm, sha256: "
	before := r.dir.Sizes(t.Context())["modules"]
	for why, body := range map[string]string{"bytes that are new": inline(1), "an address": doc("x", away+strings.Repeat("ab", 32)+"}")} {
		if err := plan(reader, body); !errors.Is(err, problem.RoleMissing) || !strings.Contains(err.Error(), "default/x") {
			t.Errorf("%s: %v", why, err)
		}
	}
	if after := r.dir.Sizes(t.Context())["modules"]; after != before {
		t.Errorf("the modules take %d bytes, and took %d before", after, before)
	}
	r.ok(apply(inline(2)))
	wasm, err := base64.StdEncoding.DecodeString(variant(t, 2))
	if err != nil {
		t.Fatal(err)
	}
	for why, body := range map[string]string{"bytes that are there": inline(2), "a module of the program": doc("x"),
		"an address whose module is there": doc("x", fmt.Sprintf("%s%x}", away, sha256.Sum256(wasm)))} {
		if err := plan(reader, body); err != nil {
			t.Errorf("%s: %v", why, err)
		}
	}
	reader.Reader = false
	if err := plan(reader, inline(1)); err != nil {
		t.Errorf("with the role operate: %v", err)
	}
}

func TestAWideTargetIsTakenOnlyWhereTheConfigurationAllowsIt(t *testing.T) {
	target := func(namespace, target string) string {
		return strings.Replace(doc("hello"), "metadata: {name: hello}", "metadata: {name: hello"+namespace+"}", 1) + "  target: " + target + "\n"
	}
	for _, c := range []struct {
		why, namespace, body string
		field                string // that is too wide; empty when none is
	}{
		{"a whole mesh", "shop", target("", "{kind: Mesh}"), "spec.target.kind"},
		{"a service of another namespace", "shop", target("", "{kind: Service, name: web, namespace: other}"), "spec.target.namespace"},
		{"a service of another namespace, without one in the request", "", target("", "{kind: Service, name: web, namespace: other}"), "spec.target.namespace"},
		{"a whole other namespace", "shop", target("", "{kind: Namespace, namespace: other}"), "spec.target.namespace"},
		{"a filter of another namespace for its own service", "shop", target(", namespace: other", "{kind: Service, name: web}"), "metadata.namespace"},
		{"a service of the request's namespace", "shop", target("", "{kind: Service, name: web, namespace: shop}"), ""},
		{"a filter and a service of one namespace, without one in the request", "", target(", namespace: other", "{kind: Service, name: web}"), ""},
		{"a group of proxies, which has no namespace", "shop", target(", namespace: other", "{kind: ProxyGroup, name: edge}"), ""},
		{"no target", "shop", strings.Replace(doc("hello"), "metadata: {name: hello}", "metadata: {name: hello, namespace: other}", 1), ""},
	} {
		for _, allowed := range []bool{false, true} {
			r := newRig(t, func(o *operation.Options) { o.AllowWideTargets = allowed })
			q := apply(c.body)
			q.Namespace = c.namespace
			_, err := r.runner.Plan(t.Context(), q)
			if tooWide := errors.Is(err, problem.TargetTooWide); tooWide != (c.field != "" && !allowed) {
				t.Errorf("%s, allowed %v: %v", c.why, allowed, err)
			} else if p := problem.Of(err); tooWide && (len(p.Fields) != 1 || p.Fields[0].Path != c.field || p.Fields[0].Cause == "" ||
				!strings.Contains(p.Fields[0].Remedy, "allowWideTargets")) {
				t.Errorf("%s: %+v", c.why, p)
			}
		}
	}
}

func TestAKubeconfigThatIsOfNoUseGivesNoRights(t *testing.T) {
	client, err := consul.New(consul.Options{Addr: "http://127.0.0.1:1", Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(client.Close)
	r := newRig(t, func(o *operation.Options) {
		o.Consul = consulCluster{client}
		o.Prepared = map[string]string{"stamp": onAPI("stamp")}
	})
	q := operation.Request{Operation: "stamp", Kubeconfigs: []string{"{}"}, Caller: operation.Caller{Remote: "192.0.2.7:4242", Foreign: true}}
	if _, err := r.runner.Submit(t.Context(), q); !errors.Is(err, problem.CallerUnknown) {
		t.Errorf("a stranger changes the adapter's own Consul: %v", err)
	}

	q = remove(doc("hello", "mesh: auto"))
	q.Body = strings.Replace(q.Body, "{name: hello}", "{name: hello, namespace: other}", 1)
	q.Namespace = "shop"
	if _, err := r.runner.Submit(t.Context(), q); !errors.Is(err, problem.TargetTooWide) {
		t.Errorf("another namespace's filter, on whatever mesh: %v", err)
	}
}
