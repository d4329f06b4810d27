package operation_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/meshery/meshery-filters/internal/audit"
	"github.com/meshery/meshery-filters/internal/operation"
	"github.com/meshery/meshery-filters/internal/problem"
)

func TestTheAuditLogSaysWhoAskedForWhatAndWhatCameOfIt(t *testing.T) {
	file := filepath.Join(t.TempDir(), "audit.jsonl")
	log, err := audit.Open(audit.Options{File: file})
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	r := newRig(t, func(o *operation.Options) { o.Audit = log })
	r.proxy("a", "edge", always(accept))
	r.proxy("b", "other", always(refuse))
	lines := func() (all []audit.Entry, text string) {
		t.Helper()
		data, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(data)) {
			var e audit.Entry
			if err := json.Unmarshal([]byte(line), &e); err != nil {
				t.Fatalf("%v: %q", err, line)
			}
			all = append(all, e)
		}
		return all, string(data)
	}
	const secret = "kubeconfig-that-nobody-may-read-0b6b8a52"
	caller := operation.Caller{Certificate: "CN=operator", Serial: "1f", Remote: "192.0.2.7:4242"}
	edge, other := "target: {kind: ProxyGroup, name: edge}", "target: {kind: ProxyGroup, name: other}"
	by := func(id string, q operation.Request) operation.Request {
		q.ID, q.Username, q.Caller = id, "me", caller
		return q
	}

	q := by("applied", apply(doc("a", edge, "mesh: envoy", "config: {response: {x-a: "+secret+"}}")+"---\n"+doc("b", edge, "mesh: envoy")))
	q.Kubeconfigs = []string{secret}
	if _, err := r.runner.Submit(t.Context(), q); err != nil {
		t.Fatal(err)
	}
	if all, _ := lines(); len(all) < 1 || all[0].Operation != "applied" || all[0].Result != audit.Accepted {
		t.Fatalf("Submit returned before it was written down: %+v", all)
	}
	if events := r.story("applied"); events[len(events)-1].Code != "" {
		t.Fatal(texts(events))
	}
	r.run(by("refused-by-a-proxy", apply(doc("c", other))))
	r.ok(by("removed", remove(doc("a"))))
	r.ok(by("undone", undo("a", 0)))
	r.ok(operation.Request{ID: "own", Operation: "filters_status"})
	if _, err := r.runner.Submit(t.Context(), by("removed", remove(doc("a")))); err != nil {
		t.Fatal(err)
	}
	if _, err := r.runner.Submit(t.Context(), by("wrong", apply("kind: "+secret))); !errors.Is(err, problem.InvalidDocument) {
		t.Fatal(err)
	}
	foreign := by("foreign", apply(doc("a", edge)))
	foreign.Caller = operation.Caller{Remote: "192.0.2.9:1", Foreign: true}
	if _, err := r.runner.Submit(t.Context(), foreign); !errors.Is(err, problem.CallerUnknown) {
		t.Fatal(err)
	}
	if err := r.stop(); err != nil { // so that every end is written
		t.Fatal(err)
	}
	if err := log.Close(); err != nil { // and what was refused
		t.Fatal(err)
	}

	all, text := lines()
	if strings.Contains(text, secret) || strings.Contains(text, "CN=operator") != true {
		t.Errorf("a secret is in the audit log, or the certificate is not:\n%s", text)
	}
	got := map[string][]string{}
	for _, e := range all {
		if known := e.Operation == "own" || e.Operation == "foreign"; !known && e.Who != caller.Who("me") {
			t.Errorf("%s is said to be of %+v", e.Operation, e.Who)
		}
		got[e.Operation] = append(got[e.Operation], fmt.Sprintf("%s %s%s %v %v %v", e.Result, e.Code, e.Key, e.Delete, e.Documents, e.Targets))
	}
	const a, ab = " false [default/a] [ProxyGroup edge]", " false [default/a default/b] [ProxyGroup edge]"
	for id, want := range map[string][]string{
		"applied":            {"accepted apply_filter" + ab, "succeeded apply_filter" + ab},
		"refused-by-a-proxy": {"accepted apply_filter false [default/c] [ProxyGroup other]", "failed " + problem.ProxyRejected.Code + "apply_filter false [default/c] [ProxyGroup other]"},
		"removed":            {"accepted remove_filter" + a, "succeeded remove_filter" + a, "repeated remove_filter false [] []"},
		"undone":             {"accepted custom" + a, "succeeded custom" + a},
		"own":                {"accepted filters_status false [] []", "succeeded filters_status false [] []"},
		"wrong":              {"refused " + problem.InvalidDocument.Code + "apply_filter false [] []"},
		"foreign":            {"refused " + problem.CallerUnknown.Code + "apply_filter false [] []"},
	} {
		if strings.Join(got[id], "\n") != strings.Join(want, "\n") {
			t.Errorf("%s:\n%s\nwant\n%s", id, strings.Join(got[id], "\n"), strings.Join(want, "\n"))
		}
	}
	if len(got) != 7 {
		t.Errorf("%d operations are in the audit log", len(got))
	}
}

// unwritable is an audit log on a full disk, until it is mended.
type unwritable struct {
	operation.Audit
	mu     sync.Mutex
	mended bool
}

func (u *unwritable) Accepted(e audit.Entry) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.mended {
		return u.Audit.Accepted(e)
	}
	return problem.StoreFailed.New("writing the audit log: no space left on device")
}

func TestAnOperationThatCannotBeWrittenDownWaitsUntilItCan(t *testing.T) {
	file := filepath.Join(t.TempDir(), "audit.jsonl")
	log, err := audit.Open(audit.Options{File: file})
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	full := &unwritable{Audit: log}
	r := newRig(t, func(o *operation.Options) { o.Audit = full })
	q := apply(doc("a"))
	q.ID = "op"
	if _, err := r.runner.Submit(t.Context(), q); !errors.Is(err, problem.StoreFailed) || !strings.Contains(err.Error(), "op is accepted, and waits") {
		t.Errorf("Submit: %v", err)
	}
	if got := r.order("default"); got != "" {
		t.Errorf("it ran without being written down: %q", got)
	}
	full.mu.Lock()
	full.mended = true
	full.mu.Unlock()
	if _, err := r.runner.Submit(t.Context(), q); err != nil {
		t.Error(err)
	}
	r.story("op")
	if got := r.order("default"); got != "default/a" {
		t.Errorf("the chain is %q", got)
	}
}
