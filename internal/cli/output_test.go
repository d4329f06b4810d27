package cli

import (
	"bytes"
	"encoding/json"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/layer5io/meshery-adapter-library/meshes"
	"go.yaml.in/yaml/v3"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/meshery/meshery-filters/internal/plan"
	"github.com/meshery/meshery-filters/internal/problem"
	"github.com/meshery/meshery-filters/internal/server/filterspb"
	"github.com/meshery/meshery-filters/internal/wasm"
)

var (
	digestA = strings.Repeat("3f2a", 16)
	digestB = strings.Repeat("b01d", 16)
)

func someChains() []*filterspb.Chain {
	return []*filterspb.Chain{
		{Mesh: "envoy", Target: &filterspb.Target{Kind: "ProxyGroup", Name: "edge", Text: "ProxyGroup edge"}, Version: "475a7c75b52d1d1e",
			Filters: []*filterspb.Filter{
				{Namespace: "shop", Name: "rate-limit", Source: "builtin ratelimit", Sha256: digestA, Phase: "authz", Priority: 10, FailurePolicy: "closed"},
				{Namespace: "default", Name: "audit", Labels: map[string]string{"team": "a"}, Source: "inline", Sha256: digestB, FailurePolicy: "reload"},
			},
			Proxies: []*filterspb.Proxy{
				{Id: "edge-1", Version: "1.40.0", State: "running", Expected: true},
				{Id: "edge-2", Version: "1.39.3", State: "rejected", Expected: true, Detail: "Proto constraint\tvalidation failed\nnot yes: no"},
			}},
		{Mesh: "envoy", Target: &filterspb.Target{Kind: "ProxyGroup", Name: "lonely", Text: "ProxyGroup lonely"}, Version: "00000000000000aa",
			Filters: []*filterspb.Filter{{Namespace: "shop", Name: "later", Source: "https://example.com/a.wasm", Sha256: digestB, FailurePolicy: "closed"}}},
		{Mesh: "consul", Target: &filterspb.Target{Kind: "Service", Namespace: "shop", Name: "api", Text: "Service shop/api"}, Version: "00000000000000bb",
			Unverified: "the admin address of api-1 is not in consul.admin",
			Filters:    []*filterspb.Filter{{Namespace: "shop", Name: "hello", Source: "builtin headers", Sha256: digestB, FailurePolicy: "closed"}}},
	}
}

func TestOutputIsGoldenInEveryForm(t *testing.T) {
	when := time.Date(2026, 1, 2, 3, 4, 5, 600_000_000, time.UTC)
	events := []*filterspb.Event{
		{OperationId: "OP1", Sequence: 1, Time: timestamppb.New(when), Summary: "1 of 2 proxies run shop/rate-limit", Details: "on ProxyGroup edge"},
		{OperationId: "OP1", Sequence: 2, Time: timestamppb.New(when), Type: filterspb.Event_WARN, Summary: problem.UnsignedTokens.Summary + ": shop/rate-limit",
			Details: "shop/rate-limit", ErrorCode: problem.UnsignedTokens.Code, ProbableCause: problem.UnsignedTokens.Cause, SuggestedRemediation: problem.UnsignedTokens.Remedy},
		{OperationId: "OP1", Sequence: 3, Time: timestamppb.New(when), Summary: "shop/rate-limit runs on ProxyGroup edge (2 of 2 proxies)",
			Details: "shop/rate-limit runs on ProxyGroup edge (2 of 2 proxies)\nThe limiter counts in each Envoy by itself.", Last: true},
	}
	previews := []*filterspb.Preview{{Mesh: "envoy", Target: "ProxyGroup edge", Version: "475a7c75b52d1d1e", Order: []string{"shop/rate-limit"},
		Yaml:   "name: meshery.filters\ntypedConfig:\n  a: 1\n",
		Losses: []*filterspb.Loss{{Filter: "shop/rate-limit", Field: "spec.match.ports", Reason: "a slot has no port"}}}}
	ops := []*meshes.SupportedOperation{{Key: "apply_filter", Value: "Apply filter", Category: meshes.OpCategory_CUSTOM},
		{Key: "imagehub", Value: "Image Hub", Category: meshes.OpCategory_SAMPLE_APPLICATION}}
	report := wasm.Report{SHA256: digestA, Size: 1234, ABI: "0.2.1", Language: "Rust", Imports: []string{"env.proxy_log", "env.proxy_bogus"},
		Exports: []string{"memory"}, Missing: []string{"env.proxy_bogus"}, MemoryPages: 17, Sections: []string{"type", "code"}}
	found := plan.Survey{Orphans: []plan.Orphan{{Proxy: "api-sidecar-proxy at 127.0.0.1:19000", WasmFilter: plan.WasmFilter{Name: "meshery.filters/shop.hello", SHA256: digestA, Source: "/opt/a.wasm"}}},
		Proxies: 3, Looked: 2, Missed: "nothing answers at 127.0.0.1:19001", Files: []string{"/opt/b.wasm", "/opt/c.wasm"}}
	drift := func(err error) error {
		if f := explain(err, true); err != nil && f.exit == exitDrift {
			return nil
		}
		return err
	}
	cases := map[string]func(*app) error{
		"list":           func(a *app) error { return a.printList(someChains(), nil) },
		"list-shop":      func(a *app) error { a.namespace = "shop"; return a.printList(someChains(), nil) },
		"list-none":      func(a *app) error { return a.printList(nil, nil) },
		"list-other":     func(a *app) error { a.namespace = "other"; return a.printList(someChains(), nil) },
		"list-proxies":   func(a *app) error { return a.printList(someChains()[1:], &found) },
		"status":         func(a *app) error { return drift(a.printStatus(someChains(), nil)) },
		"status-ok":      func(a *app) error { return a.printStatus(someChains()[1:], nil) },
		"status-proxies": func(a *app) error { return drift(a.printStatus(someChains()[1:], &found)) },
		"render":         func(a *app) error { return a.printPreviews(previews) },
		"operations":     func(a *app) error { return a.printOperations(ops) },
		"inspect":        func(a *app) error { return a.printReport(report) },
		"accepted":       func(a *app) error { return a.accepted("OP1") },
		"progress": func(a *app) error {
			for _, e := range events {
				if err := a.progress(toEvent(e)); err != nil {
					return err
				}
			}
			return nil
		},
	}
	want := map[string]string{}
	for name, print := range cases {
		for _, form := range []outputForm{formTable, formJSON, formYAML} {
			var out, errs bytes.Buffer
			if err := print(&app{IO: IO{Out: &out, Err: &errs}, output: form}); err != nil {
				t.Fatalf("%s as %s: %v", name, form, err)
			}
			text := out.String()
			if errs.Len() > 0 {
				text = "on standard error:\n" + errs.String() + "on standard output:\n" + text
			}
			want[name+"."+string(form)] = text
		}
	}
	golden(t, "output", want)
}

func TestErrorsAreGolden(t *testing.T) {
	errs := map[string]error{
		"usage": usage("say what to apply with -f FILE"),
		"fields": problem.InvalidDocument.WithFields("", []problem.Field{
			{Path: "spec.module", Cause: "the module has no source", Remedy: "set one of builtin, url, inline or file"},
			{Path: "metadata.name", Cause: `"A" is not a DNS label`}}),
		"rejected": eventView{Type: typeError, Last: true, Summary: problem.ProxyRejected.Summary + ": edge-1", Code: problem.ProxyRejected.Code,
			Details: "proxy edge-1 says: no\nThe chain that worked before is in place again.", Cause: problem.ProxyRejected.Cause, Remedy: problem.ProxyRejected.Remedy}.outcome(),
		"plain": errors.New("disk full"),
	}
	want := map[string]string{}
	for name, err := range errs {
		var out bytes.Buffer
		explain(err, true).print(&out)
		want[name+".txt"] = out.String()
	}
	golden(t, "errors", want)
}

func TestJSONAndYAMLHoldTheSame(t *testing.T) {
	odd := map[string]any{"a": "line\nbreak\tand \x7f \u0085 \ufeff \u2028 \x01", "b": "yes", "c": "123", "d": []any{}, "e": map[string]any{}, "f": 1.5, "g": "- x: {", "h": nil, "i": "\U0001F600", "j": "<&>"}
	var asJSON, asYAML bytes.Buffer
	if err := (&app{IO: IO{Out: &asJSON}, output: formJSON}).print(odd, nil); err != nil {
		t.Fatal(err)
	}
	if err := (&app{IO: IO{Out: &asYAML}, output: formYAML}).print(odd, nil); err != nil {
		t.Fatal(err)
	}
	var fromJSON, fromYAML any
	if err := json.Unmarshal(asJSON.Bytes(), &fromJSON); err != nil {
		t.Fatal(err)
	}
	if err := yaml.Unmarshal(asYAML.Bytes(), &fromYAML); err != nil {
		t.Fatalf("%v in\n%s", err, asYAML.String())
	}
	one, _ := json.Marshal(fromJSON)
	two, _ := json.Marshal(fromYAML)
	if !bytes.Equal(one, two) {
		t.Errorf("JSON holds %s\nYAML holds %s", one, two)
	}
}
