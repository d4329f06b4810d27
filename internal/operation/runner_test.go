package operation_test

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"go.opentelemetry.io/otel/trace"

	"github.com/meshery/meshery-filters/filters"
	"github.com/meshery/meshery-filters/internal/event"
	"github.com/meshery/meshery-filters/internal/operation"
	"github.com/meshery/meshery-filters/internal/plan"
	"github.com/meshery/meshery-filters/internal/problem"
	"github.com/meshery/meshery-filters/internal/store"
)

func TestAFilterIsAppliedAndRemovedOnEveryProxy(t *testing.T) {
	r := newRig(t)
	// The second of the two waits until it is told that the first has accepted: who is quicker than the Runner looks is
	// told of together.
	progress, answers := r.hub.Subscribe(r.hub.Oldest(), ""), atomic.Int64{}
	decide := func(int) answer {
		for second := answers.Add(1)%2 == 0; second; {
			e, err := progress.Next(t.Context())
			second = err == nil && !strings.Contains(e.Summary, "1 of 2 proxies")
		}
		return accept
	}
	r.proxy("a", "default", decide)
	r.proxy("b", "default", decide)

	events := r.ok(apply(doc("hello")))
	last := events[len(events)-1]
	if !strings.Contains(last.Summary, "default/hello") || !strings.Contains(last.Summary, "2 of 2 proxies") || !strings.Contains(last.Summary, "ProxyGroup default") {
		t.Errorf("the last event names not all of filter, target and proxies: %s", last.Summary)
	}
	if text := strings.Join(texts(events), "\n"); !strings.Contains(text, "1 of 2 proxies run default/hello (sha256 ") {
		t.Errorf("no progress in\n%s", text)
	}
	if got := r.order("default"); got != "default/hello" {
		t.Errorf("the chain is %q", got)
	}
	events = r.ok(apply(doc("hello")))
	if last := events[len(events)-1]; !strings.Contains(last.Summary, "unchanged") {
		t.Errorf("applying it again: %s", last.Summary)
	}
	events = r.ok(remove(doc("hello")))
	// Meshery takes every event without that word for a deployment.
	for _, e := range events {
		if !strings.HasPrefix(e.Summary, "default/hello removed from ") && !strings.HasPrefix(e.Summary, "Waits for ") {
			t.Errorf("an event of the removal: %s", e.Summary)
		}
	}
	if len(events) < 2 || !strings.Contains(events[len(events)-2].Summary, "1 of 2 proxies") {
		t.Errorf("no progress in %v", texts(events))
	}
	if got := r.order("default"); got != "" {
		t.Errorf("the chain is %q after the removal", got)
	}
	last = r.fails(problem.FilterNotFound, remove(doc("hello")))
	if !strings.Contains(last.Details, "default/hello") {
		t.Errorf("removing it once more: %s", last.Details)
	}
}

func TestNoEventButAFailureSaysError(t *testing.T) {
	r := newRig(t)
	r.proxy("a", "default", always(accept))
	var events []event.Event
	for _, q := range []operation.Request{
		apply(doc("x", "match: {ports: [80]}")), apply(doc("y", "wait: {for: none}")), {Operation: "filters_status"},
		{Operation: "imagehub"}, {Operation: "imagehub_rate_limit"}, {Operation: "meshery-filters"}, {Operation: "filters_status"},
		{Operation: "meshery-filters", Delete: true}, {Operation: "imagehub", Delete: true}, remove(doc("x")), apply(doc("error-pages")), apply(doc("z", "target: {kind: ProxyGroup, name: empty}")),
	} {
		events = append(events, r.ok(q)...)
	}
	for _, e := range events {
		if strings.Contains(strings.ToLower(e.Summary+e.Details), "error") || e.Type == event.Error {
			t.Errorf("it is no failure and says: %s | %s", e.Summary, e.Details)
		}
		if e.Component != "5b5e1d3f-9f0c-4a57-9a54-5a2b7f4e1a00" || e.Name != "meshery-filters" || e.Time.IsZero() || e.Summary == "" {
			t.Errorf("an incomplete event: %+v", e)
		}
		if e.Type == event.Warn && (e.Code == "" || e.Cause == "" || e.Remedy == "") {
			t.Errorf("a warning without code, cause or remedy: %+v", e)
		}
	}
}

func TestARejectionPutsTheOldChainBack(t *testing.T) {
	r := newRig(t)
	r.proxy("a", "default", func(nth int) answer {
		if nth == 2 { // the first is the good chain
			return refuse
		}
		return accept
	})
	r.proxy("b", "default", always(accept))
	r.ok(apply(doc("good")))
	last := r.fails(problem.ProxyRejected, apply(doc("bad")))
	for _, want := range []string{"default/bad", "proxy a", refusal, "in place again"} {
		if !strings.Contains(last.Details, want) {
			t.Errorf("%q is not in %s", want, last.Details)
		}
	}
	if got := r.order("default"); got != "default/good" {
		t.Errorf("the chain is %q", got)
	}
	events := r.ok(operation.Request{Operation: "filters_status"})
	if !strings.Contains(events[0].Summary, "2 of 2 proxies") {
		t.Errorf("after the rejection: %v", texts(events))
	}
	r.ok(apply(doc("next")))
	if got := r.order("default"); got != "default/good default/next" {
		t.Errorf("the next good chain is %q", got)
	}
}

func TestProxiesThatDoNotAnswerAreNamed(t *testing.T) {
	r := newRig(t)
	r.proxy("quick", "default", always(accept))
	r.proxy("slow-1", "default", always(ignore))
	last := r.fails(problem.ProxyTimeout, apply(doc("x", "wait: {timeout: 300ms}", "rollout: all")))
	if !strings.Contains(last.Details, "slow-1") || !strings.Contains(last.Details, "1 of 2 proxies") || strings.Contains(last.Details, "quick,") {
		t.Errorf("details: %s", last.Details)
	}
	if got := r.order("default"); got != "default/x" {
		t.Errorf("the chain %q does not stay offered", got)
	}
}

func TestACanaryThatDoesNotAnswerKeepsTheOthersAsTheyWere(t *testing.T) {
	r := newRig(t)
	r.proxy("a-canary", "default", always(ignore))
	r.proxy("b", "default", func(int) answer { t.Error("b was asked"); return accept })
	last := r.fails(problem.CanarySilent, apply(doc("x", "wait: {timeout: 300ms}")))
	if !strings.Contains(last.Details, "a-canary") || !strings.Contains(last.Details, "offered again, and not yet confirmed by a-canary") {
		t.Errorf("details: %s", last.Details)
	}
	if got := r.order("default"); got != "" {
		t.Errorf("the chain is %q", got)
	}
}

func TestAnAnswerThatComesLateIsWaitedFor(t *testing.T) {
	r := newRig(t)
	release := make(chan struct{})
	r.proxy("late", "default", func(int) answer { <-release; return accept })
	id, err := r.runner.Submit(t.Context(), apply(doc("x")))
	if err != nil {
		t.Fatal(err)
	}
	time.AfterFunc(200*time.Millisecond, func() { close(release) })
	events := r.story(id)
	if last := events[len(events)-1]; last.Type != event.Info || !strings.Contains(last.Summary, "1 of 1 proxy") {
		t.Errorf("last: %v", texts(events))
	}
}

func TestAProxyThatLeavesIsNotWaitedFor(t *testing.T) {
	r := newRig(t)
	asked := make(chan struct{})
	r.proxy("a", "default", always(accept))
	leave := r.proxy("b", "default", func(int) answer { close(asked); return ignore })
	id, err := r.runner.Submit(t.Context(), apply(doc("x")))
	if err != nil {
		t.Fatal(err)
	}
	<-asked
	leave()
	events := r.story(id)
	if last := events[len(events)-1]; last.Type != event.Info || !strings.Contains(last.Summary, "1 of 1 proxy") {
		t.Errorf("last: %v", texts(events))
	}
}

func TestWithoutProxiesTheFilterWaitsForTheFirst(t *testing.T) {
	r := newRig(t)
	events := r.ok(apply(doc("x")))
	if w := events[len(events)-2]; w.Type != event.Warn || w.Code != problem.NoProxy.Code || !strings.Contains(w.Details, "default/x") {
		t.Errorf("no warning: %v", texts(events))
	}
	r.proxy("first", "default", always(accept))
	for deadline := time.Now().Add(10 * time.Second); ; { // it is connected, and its answer is on the way
		events = r.ok(operation.Request{Operation: "filters_status"})
		if events[0].Type == event.Info || time.Now().After(deadline) {
			break
		}
	}
	if !strings.Contains(events[0].Summary, "1 of 1 proxy") || !strings.Contains(events[0].Details, "default/x (builtin headers, sha256 ") {
		t.Errorf("status: %v", texts(events))
	}
}

func TestSomeAndNoneDoNotWaitForAll(t *testing.T) {
	r := newRig(t)
	r.proxy("a", "default", always(accept))
	r.proxy("b", "default", always(ignore))
	for _, wait := range []string{"some", "none"} {
		events := r.ok(apply(doc("x"+wait, "wait: {for: "+wait+"}", "rollout: all")))
		if w := events[len(events)-2]; w.Code != problem.WaitNotMet.Code {
			t.Errorf("wait for %s: %v", wait, texts(events))
		}
	}
}

func TestAnotherTargetMovesAFilter(t *testing.T) {
	r := newRig(t)
	r.proxy("a", "one", always(accept))
	r.proxy("b", "two", always(accept))
	r.ok(apply(doc("x", "target: {kind: ProxyGroup, name: one}")))
	events := r.ok(apply(doc("x", "target: {kind: ProxyGroup, name: two}")))
	if text := strings.Join(texts(events), "\n"); !strings.Contains(text, "default/x removed from ProxyGroup one") {
		t.Errorf("the story does not tell of the move:\n%s", text)
	}
	if one, two := r.order("one"), r.order("two"); one != "" || two != "default/x" {
		t.Errorf("one has %q and two has %q", one, two)
	}
}

func TestSeveralDocumentsOnOneTargetAreOneChange(t *testing.T) {
	r := newRig(t)
	changes := 0
	r.proxy("a", "default", func(int) answer { changes++; return accept })
	r.ok(apply(doc("c") + "---\n" + doc("a", "phase: authz") + "---\n" + doc("b", "priority: 7")))
	if got := r.order("default"); got != "default/a default/b default/c" {
		t.Errorf("the chain is %q", got)
	}
	r.ok(remove(doc("a") + "---\n" + doc("b") + "---\n" + doc("c")))
	if changes != 2 {
		t.Errorf("the proxy saw %d changes, want one for each operation", changes)
	}
}

func TestAnOperationOverSeveralTargetsSaysWhatItLeft(t *testing.T) {
	r := newRig(t)
	r.proxy("a", "one", always(accept))
	r.proxy("b", "two", always(refuse))
	r.proxy("c", "three", always(accept))
	var body []string
	for _, g := range []string{"one", "two", "three"} {
		body = append(body, doc("in-"+g, "target: {kind: ProxyGroup, name: "+g+"}"))
	}
	last := r.fails(problem.ProxyRejected, apply(strings.Join(body, "---\n")))
	if !strings.Contains(last.Details, "still in place: default/in-one") || !strings.Contains(last.Details, "Not begun: 1 further") {
		t.Errorf("details: %s", last.Details)
	}
	if one, two, three := r.order("one"), r.order("two"), r.order("three"); one != "default/in-one" || two != "" || three != "" {
		t.Errorf("chains: %q, %q, %q", one, two, three)
	}
}

func TestNothingReachesAProxyThatTheDryRunRefuses(t *testing.T) {
	r := newRig(t)
	r.proxy("a", "default", func(int) answer { t.Error("the proxy was asked"); return accept })
	inline := "module: {inline: " + base64.StdEncoding.EncodeToString(probe(t)) + "}"
	for name, c := range map[string]struct {
		kind *problem.Kind
		want string
		doc  string
	}{
		"a configuration that the filter refuses": {problem.ConfigRefused, "response: is a number", doc("x", "config: {response: 1}")},
		"with the filter's own words":             {problem.ConfigRefused, "not on a Tuesday", doc("x", inline, "config: {refuse: not on a Tuesday}")},
		"a module that never ends":                {problem.ModuleMisbehaved, "default/x", doc("x", inline, "config: {spin: true}")},
		"a module that takes all memory":          {problem.ModuleMisbehaved, "default/x", doc("x", inline, "config: {grow: true}")},
		"what is no module":                       {problem.ModuleInvalid, "default/x", doc("x", "module: {inline: aGVsbG8gd29ybGQ=}")},
		"another digest":                          {problem.DigestMismatch, "default/x", doc("x", "module: {builtin: headers, sha256: "+strings.Repeat("0", 64)+"}")},
		"a secret that is not there":              {problem.SecretMissing, "no/such", doc("x", "config: {response: {a: {$secret: {name: no, key: such}}}}")},
		"one bad document among good ones":        {problem.ConfigRefused, "default/bad", doc("good") + "---\n" + doc("bad", "config: {response: 1}")},
	} {
		if testing.Short() && name == "a module that never ends" { // it takes the whole timeout of a dry run
			continue
		}
		last := r.fails(c.kind, apply(c.doc))
		if !strings.Contains(last.Details, c.want) {
			t.Errorf("%s: %q is not in %s", name, c.want, last.Details)
		}
	}
	if got := r.order("default"); got != "" {
		t.Errorf("the chain is %q", got)
	}
}

func TestAConfigurationThatASharedSandboxDoesNotTakeReachesNoProxy(t *testing.T) {
	r := newRig(t)
	taken := atomic.Int64{}
	r.proxy("a", "default", func(int) answer { taken.Add(1); return accept })
	inline := "module: {inline: " + base64.StdEncoding.EncodeToString(probe(t)) + "}"
	const once, again = "config: {once: sandbox}", "config: {once: sandbox, stamp: {header: x-a, value: again}}"
	last := r.fails(problem.SandboxSpoiled, apply(doc("x", inline, "config: {once: shared}")))
	if !strings.Contains(last.Details, "default/x: in a second sandbox") {
		t.Errorf("details: %s", last.Details)
	}
	r.ok(apply(doc("x", inline, once)))
	before := taken.Load()
	r.ok(apply(doc("x", inline, once, "priority: 1"))) // nothing is configured
	r.fails(problem.SandboxSpoiled, apply(doc("x", inline, again)))
	r.fails(problem.SandboxSpoiled, apply(doc("y", inline, "vmID: default/x", again)))
	if now := taken.Load(); now != before {
		t.Errorf("the proxy was asked %d times more", now-before)
	}
	r.ok(apply(doc("x", inline, again, "vmID: other")))
	r.ok(apply(doc("x", inline, again, "vmID: other", "environment: [{name: A, value: b}]"))) // has another sandbox, too
	r.ok(apply(doc("y", inline, "vmID: other", "config: {once: sandbox, trapPath: /x}")))
}

func TestSecretsReachTheProxyAndNothingElse(t *testing.T) {
	r := newRig(t)
	r.proxy("a", "default", func(nth int) answer {
		if nth == 2 {
			return refuse
		}
		return accept
	})
	body := doc("x", "config: {response: {x-key: {$secret: {name: imagehub, key: token-key}}}}")
	previews, err := r.runner.Plan(t.Context(), apply(body))
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(previews[0].YAML, hubKey) || !strings.Contains(previews[0].YAML, "$secret") {
		t.Errorf("the preview shows: %s", previews[0].YAML)
	}
	events := r.ok(apply(body))
	// A filter that says its secret in its refusal.
	inline := "module: {inline: " + base64.StdEncoding.EncodeToString(probe(t)) + "}"
	events = append(events, r.run(apply(doc("y", inline, "config: {refuse: {$secret: {name: imagehub, key: token-key}}}")))...)
	statuses, _ := r.runner.List(t.Context())
	records, _ := r.dir.Records().All(t.Context())
	for what, text := range map[string]string{"events": strings.Join(texts(events), "\n"), "list": fmt.Sprint(statuses), "state": fmt.Sprint(records)} {
		for _, rec := range records {
			if what == "state" {
				text += string(rec)
			}
		}
		if strings.Contains(text, hubKey) {
			t.Errorf("the %s show the secret:\n%s", what, text)
		}
	}
}

func TestAListHidesTheSecretsThatAProxyQuotes(t *testing.T) {
	r := newRig(t)
	r.proxy("a", "default", always(quote))
	r.ok(apply(doc("x", "config: {response: {x-key: {$secret: {name: imagehub, key: token-key}}}}", "wait: {for: none}")))
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		statuses, err := r.runner.List(t.Context())
		if err != nil || len(statuses) != 1 || len(statuses[0].Loaded.Proxies) != 1 {
			t.Fatalf("%v, %v", statuses, err)
		}
		p := statuses[0].Loaded.Proxies[0]
		if p.State == plan.Rejected {
			if p.Detail != refusal+": [redacted]" {
				t.Errorf("the list says %q", p.Detail)
			}
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("the proxy is %s", p.State)
		}
	}
}

func TestAStatusNeedsNoSecretsAndARestartDoes(t *testing.T) {
	state, key := t.TempDir(), hubKey
	secret := func(o *operation.Options) {
		o.Secret = func(string, string) (string, error) {
			if key == "" {
				return "", problem.SecretMissing.New("imagehub/token-key")
			}
			return key, nil
		}
	}
	r := startRig(t, state, secret)
	r.proxy("a", "default", always(accept))
	r.ok(operation.Request{Operation: "imagehub_rate_limit"})
	for _, key = range []string{strings.Repeat("k", 40), ""} {
		if events := r.ok(operation.Request{Operation: "filters_status"}); events[0].Type != event.Info || !strings.Contains(events[0].Summary, "1 of 1 proxy") {
			t.Errorf("with the key %q: %v", key, texts(events))
		}
	}
	if err := r.stop(); err != nil {
		t.Fatal(err)
	}
	r = startRig(t, state, secret) // without the key
	statuses, err := r.runner.List(t.Context())
	if err != nil || len(statuses) != 1 || !strings.Contains(statuses[0].Problem, "not brought back") {
		t.Errorf("%+v, %v", statuses, err)
	}
	if events := r.ok(operation.Request{Operation: "filters_status"}); events[0].Code != problem.Drift.Code || !strings.Contains(events[0].Details, "not brought back") {
		t.Errorf("%v", texts(events))
	}
}

func TestAProxyThatLeavesWhileItTriesAChainIsNoSuccess(t *testing.T) {
	r := newRig(t)
	var leave func()
	asked := make(chan struct{}, 10)
	join := func(id string) func() {
		return r.proxy(id, "default", func(int) answer { asked <- struct{}{}; return ignore })
	}
	leave = join("a")
	r.proxy("b", "default", func(int) answer { t.Error("b was asked"); return accept })
	for name, body := range map[string]string{"the first of two": doc("x"), "whoever does not wait": doc("x", "wait: {for: none}")} {
		id, err := r.runner.Submit(t.Context(), apply(body))
		if err != nil {
			t.Fatal(err)
		}
		<-asked
		leave()
		events := r.story(id)
		if last := events[len(events)-1]; last.Code != problem.ProxyLeft.Code || !strings.Contains(last.Details, "proxy a") {
			t.Errorf("%s: %v", name, texts(events))
		}
		if got := r.order("default"); got != "" {
			t.Errorf("%s: the chain is %q", name, got)
		}
		leave = join("a")
	}
	leave()

	alone := r.proxy("c", "alone", func(int) answer { asked <- struct{}{}; return ignore })
	id, err := r.runner.Submit(t.Context(), apply(doc("y", "target: {kind: ProxyGroup, name: alone}")))
	if err != nil {
		t.Fatal(err)
	}
	<-asked
	alone()
	if events := r.story(id); events[len(events)-1].Code != problem.ProxyLeft.Code || r.order("alone") != "" {
		t.Errorf("all of them: %v", texts(events))
	}
}

func TestWhoeverDoesNotWaitStillHasOneProxyTryIt(t *testing.T) {
	r := newRig(t)
	r.proxy("a", "default", func(nth int) answer {
		if nth == 1 {
			return refuse
		}
		return accept
	})
	r.proxy("b", "default", func(int) answer { t.Error("b was asked"); return accept })
	r.fails(problem.ProxyRejected, apply(doc("x", "wait: {for: none}", "rollout: canary")))
	if got := r.order("default"); got != "" {
		t.Errorf("the chain is %q", got)
	}
}

func TestTakingBackNeedsNoNewPlan(t *testing.T) {
	key := hubKey
	r := newRig(t, func(o *operation.Options) {
		o.Secret = func(string, string) (string, error) { return key, nil }
	})
	r.proxy("a", "default", func(nth int) answer {
		if nth == 2 {
			return refuse
		}
		return accept
	})
	r.ok(apply(doc("x", "config: {response: {x-key: {$secret: {name: a, key: b}}}}")))
	before, _ := r.runner.List(t.Context())
	key = "another value of the secret"
	last := r.fails(problem.ProxyRejected, apply(doc("y")))
	if !strings.Contains(last.Details, "in place again") {
		t.Errorf("details: %s", last.Details)
	}
	after, _ := r.runner.List(t.Context())
	if after[0].Version != before[0].Version || after[0].Loaded.Count("running") != 1 {
		t.Errorf("before %+v, after %+v", before, after)
	}
}

func TestAChainThatItsProxiesRefuseIsNotSaidToBeInPlace(t *testing.T) {
	r := newRig(t)
	r.proxy("a", "default", always(refuse))
	r.ok(apply(doc("x", "wait: {for: none}")))
	last := r.fails(problem.ProxyRejected, apply(doc("x")))
	if strings.Contains(last.Details+last.Cause, "in place") || !strings.Contains(last.Details, "should run already") {
		t.Errorf("%s | %s", last.Details, last.Cause)
	}
}

func TestAMoveThatTimesOutSaysWhereTheFilterIs(t *testing.T) {
	r := newRig(t)
	r.proxy("a", "one", always(accept))
	r.proxy("b", "two", always(ignore))
	r.ok(apply(doc("x", "target: {kind: ProxyGroup, name: one}")))
	last := r.fails(problem.ProxyTimeout, apply(doc("x", "target: {kind: ProxyGroup, name: two}", "wait: {timeout: 200ms}")))
	if !strings.Contains(last.Details, "is on ProxyGroup two now and is on ProxyGroup one still; applying it again finishes the move") {
		t.Errorf("details: %s", last.Details)
	}
}

func TestManyFiltersAreCountedAndNotListedAndAChainHasALimit(t *testing.T) {
	r := newRig(t)
	var bodies []string
	for i := range 101 {
		bodies = append(bodies, doc(fmt.Sprintf("f%d", i)))
	}
	events := r.ok(apply(strings.Join(bodies[:12], "---\n")))
	if last := events[len(events)-1]; len(last.Summary) > 1000 || !strings.Contains(last.Summary, "and 2 more") {
		t.Errorf("the summary has %d bytes: %s", len(last.Summary), last.Summary)
	}
	if _, err := r.runner.Submit(t.Context(), apply(strings.Join(bodies, "---\n"))); !errors.Is(err, problem.NotSupported) || !strings.Contains(err.Error(), "101 filters, and 100 is the most") {
		t.Errorf("more than a chain may have: %v", err)
	}
}

func TestUnsignedTokensAreWarnedOfAtEveryApply(t *testing.T) {
	r := newRig(t)
	wasm, _ := filters.Builtin("ratelimit")
	for name, module := range map[string]string{"by name": "builtin: ratelimit", "as bytes": "inline: " + base64.StdEncoding.EncodeToString(wasm)} {
		for range 2 {
			events := r.ok(apply(doc("x", "module: {"+module+"}", "config: {auth: {mode: unsigned}}")))
			if !slices.ContainsFunc(events, func(e event.Event) bool { return e.Code == problem.UnsignedTokens.Code && e.Type == event.Warn }) {
				t.Errorf("%s: %v", name, texts(events))
			}
		}
	}
	events := r.ok(operation.Request{Operation: "imagehub_rate_limit"})
	if text := strings.Join(texts(events), "\n"); strings.Contains(text, problem.UnsignedTokens.Code) || !strings.Contains(text, "in each Envoy by itself") {
		t.Errorf("the signed limiter: %s", text)
	}
}

func TestAFieldWithoutEffectIsAWarningOnce(t *testing.T) {
	r := newRig(t)
	count := func(events []event.Event) (n int) {
		for _, e := range events {
			if e.Code == problem.FieldLost.Code {
				n++
			}
		}
		return n
	}
	if n := count(r.ok(apply(doc("x", "match: {ports: [80]}", "force: true")))); n != 2 {
		t.Errorf("%d warnings for two fields", n)
	}
	if n := count(r.ok(apply(doc("y")))); n != 0 {
		t.Errorf("%d warnings about a filter that the operation does not touch", n)
	}
}

func TestARestartBringsEveryChainBack(t *testing.T) {
	state := t.TempDir()
	r := startRig(t, state)
	r.ok(apply(doc("x") + "---\n" + doc("y", "target: {kind: ProxyGroup, name: other}")))
	before, err := r.runner.List(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := r.stop(); err != nil {
		t.Fatal(err)
	}
	r = startRig(t, state)
	r.proxy("a", "default", always(accept))
	after, err := r.runner.List(t.Context())
	if err != nil || len(after) != 2 {
		t.Fatalf("%v, %v", after, err)
	}
	for i := range after {
		if after[i].Version != before[i].Version || after[i].Chain.ID() != before[i].Chain.ID() {
			t.Errorf("%s had version %s and has %s", before[i].Chain.Target, before[i].Version, after[i].Version)
		}
	}
}

func TestALateRejectionIsAnEventOfItsOwn(t *testing.T) {
	r := newRig(t)
	r.ok(apply(doc("x")))
	cursor := r.hub.Cursor()
	// It accepts its first chain, as every simulated proxy does, and refuses what comes next outside of an operation.
	r.proxy("a", "default", always(accept))
	r.proxy("b", "default", func(nth int) answer {
		if nth == 1 {
			return refuse
		}
		return accept
	})
	r.fails(problem.ProxyRejected, apply(doc("y", "rollout: all")))
	r.proxy("c", "late", always(refuse))
	r.ok(apply(doc("z", "target: {kind: ProxyGroup, name: late}", "wait: {for: none}")))
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	for sub := r.hub.Subscribe(cursor, ""); ; {
		e, err := sub.Next(ctx)
		if err != nil {
			t.Fatalf("no event: %v", err)
		}
		if e.Code == problem.LateRejection.Code {
			if !strings.Contains(e.Details, "proxy c (Envoy 1.40.0) of ProxyGroup late") || !strings.Contains(e.Details, refusal) || !e.Last {
				t.Errorf("event: %+v", e)
			}
			return
		}
	}
}

func TestAnOlderProxyStopsTheOperationByName(t *testing.T) {
	r := newRig(t)
	r.versionedProxy("old", "default", 38, always(accept))
	last := r.fails(problem.ProxyTooOld, apply(doc("x")))
	if !strings.Contains(last.Details, "proxy old") || !strings.Contains(last.Details, "1.38.0") {
		t.Errorf("details: %s", last.Details)
	}
}

func TestTheSameIdRunsOnce(t *testing.T) {
	r := newRig(t)
	q := apply(doc("x"))
	q.ID = "the-id"
	for i := range 3 {
		// Each comes from another span.
		ctx := trace.ContextWithRemoteSpanContext(t.Context(), trace.NewSpanContext(trace.SpanContextConfig{TraceID: trace.TraceID{1},
			SpanID: trace.SpanID{byte(i + 1)}, TraceFlags: trace.FlagsSampled}))
		if id, err := r.runner.Submit(ctx, q); err != nil || id != "the-id" {
			t.Fatalf("%q, %v", id, err)
		}
	}
	r.story("the-id")
	q.Body = doc("y")
	if _, err := r.runner.Submit(t.Context(), q); !errors.Is(err, problem.OperationExists) {
		t.Errorf("another body with that id: %v", err)
	}
	if id, err := r.runner.Submit(t.Context(), apply(doc("y"))); err != nil || id == "" {
		t.Errorf("no id is made up: %q, %v", id, err)
	}
}

func TestBadRequestsAreRefusedAtOnce(t *testing.T) {
	r := newRig(t)
	for name, c := range map[string]struct {
		kind *problem.Kind
		want string
		q    operation.Request
	}{
		"an unknown key":                  {problem.UnknownOperation, `"nope"`, operation.Request{Operation: "nope"}},
		"no key":                          {problem.UnknownOperation, `""`, operation.Request{}},
		"no body":                         {problem.BodyMissing, "apply_filter", apply(" \n")},
		"no body to remove":               {problem.BodyMissing, "remove_filter", remove("")},
		"a malformed document":            {problem.InvalidDocument, "not YAML", apply("{")},
		"deleting a removal":              {problem.DeleteRefused, "remove_filter", operation.Request{Operation: "remove_filter", Body: doc("x"), Delete: true}},
		"deleting a validation":           {problem.DeleteRefused, "filters_status", operation.Request{Operation: "filters_status", Delete: true}},
		"an id with a dot":                {problem.InvalidRequest, "operation_id", operation.Request{Operation: "imagehub", ID: "a.b"}},
		"an id that is too long":          {problem.InvalidRequest, "operation_id", operation.Request{Operation: "imagehub", ID: strings.Repeat("a", 129)}},
		"a namespace that is none":        {problem.InvalidRequest, "namespace", operation.Request{Operation: "imagehub", Namespace: "A B"}},
		"a username with a line break":    {problem.InvalidRequest, "username", operation.Request{Operation: "imagehub", Username: "a\nb"}},
		"a file of the adapter's machine": {problem.InvalidDocument, "spec.module.file", apply(doc("x", "module: {file: /etc/passwd}"))},
		"a builtin that is none":          {problem.InvalidDocument, "headers, ratelimit", apply(doc("x", "module: {builtin: nope}"))},
		"meshery":                         {problem.InvalidDocument, "knows no Meshery Server", apply(doc("x", "module: {url: 'meshery://x'}"))},
		"a mesh that is not built":        {problem.MeshNotSupported, "kuma", apply(doc("x", "mesh: kuma"))},
		"Istio without a cluster":         {problem.ClusterMissing, "default/x: spec.mesh is istio", apply(doc("x", "mesh: istio\n  target: {kind: Namespace}"))},
		"bytes with another digest":       {problem.DigestMismatch, "default/x: inline", apply(doc("x", "module: {inline: aGVsbG8gd29ybGQ=, sha256: "+strings.Repeat("0", 64)+"}"))},
		"two mistakes at once":            {problem.InvalidDocument, "documents[1].spec.module.builtin", apply(doc("x", "module: {file: a}") + "---\n" + doc("y", "module: {builtin: nope}"))},
	} {
		_, err := r.runner.Submit(t.Context(), c.q)
		if !errors.Is(err, c.kind) || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v", name, err)
		}
		if err != nil && strings.Contains(err.Error(), "secret") {
			t.Errorf("%s: the kubeconfig is in %v", name, err)
		}
	}
	if r.hub.Cursor() != r.hub.Oldest() {
		t.Error("a refused request left an event")
	}
}

func TestTheInstallOperationIsImageHubAndItsLimiter(t *testing.T) {
	r := newRig(t)
	r.proxy("a", "default", always(accept))
	// The menu sends whatever was typed before: operations without a body ignore it.
	q := operation.Request{Operation: "meshery-filters", Body: "{stale", Kubeconfigs: []string{"x"}}
	events := r.ok(q)
	if last := events[len(events)-1]; !strings.Contains(last.Details, "mesh is now installed") {
		t.Errorf("the last event: %s", last.Details)
	}
	if r.order("default") != "default/imagehub-rate-limit" || !r.app.running {
		t.Error("not both are there")
	}
	q.Delete = true
	events = r.ok(q)
	if last := events[len(events)-1]; !strings.Contains(last.Summary, "removed") {
		t.Errorf("the last event: %s", last.Summary)
	}
	if r.order("default") != "" || r.app.running {
		t.Error("something is left")
	}
	r.app.fail = errors.New("address already in use")
	last := r.fails(problem.ImageHubFailed, operation.Request{Operation: "meshery-filters"})
	if !strings.Contains(last.Details, "address already in use") {
		t.Errorf("details: %s", last.Details)
	}
	if got := r.order("default"); got != "" {
		t.Errorf("the limiter %q is there without the application", got)
	}
}

func TestPreparedDocumentsAreOperations(t *testing.T) {
	r := newRig(t, func(o *operation.Options) { o.Prepared = map[string]string{"stamp": doc("stamp")} })
	r.ok(operation.Request{Operation: "stamp", Body: "stale"})
	if got := r.order("default"); got != "default/stamp" {
		t.Errorf("the chain is %q", got)
	}
	r.ok(operation.Request{Operation: "stamp", Delete: true})
	if got := r.order("default"); got != "" {
		t.Errorf("the chain is %q", got)
	}
	for name, prepared := range map[string]map[string]string{
		"a key that is taken":       {"custom": doc("x")},
		"a key that is no key":      {"A b": doc("x")},
		"a document that is broken": {"x": "{"},
	} {
		o := r.runner.Options
		o.Prepared = prepared
		if _, err := operation.NewRunner(o); err == nil || !strings.Contains(err.Error(), "operations folder") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestStoppingFinishesWhatRunsAndTheRestFollowsAfterTheNextStart(t *testing.T) {
	state := t.TempDir()
	r := startRig(t, state, func(o *operation.Options) { o.Workers = 1 })
	asked, release := make(chan struct{}), make(chan struct{})
	r.proxy("a", "default", func(nth int) answer {
		if nth == 1 {
			close(asked)
			<-release
		}
		return accept
	})
	running, err := r.runner.Submit(t.Context(), apply(doc("x")))
	if err != nil {
		t.Fatal(err)
	}
	<-asked
	waiting, err := r.runner.Submit(t.Context(), apply(doc("y")))
	if err != nil {
		t.Fatal(err)
	}
	stories := make(chan []event.Event, 1)
	go func() { stories <- r.story(running) }()
	stopped := make(chan error, 1)
	go func() { stopped <- r.stop() }()
	for { // until the queue is closed
		if _, err := r.runner.Submit(t.Context(), apply(doc("z"))); errors.Is(err, problem.ShuttingDown) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
	}
	close(release)
	first := <-stories
	if last := first[len(first)-1]; last.Operation != running || last.Type == event.Error {
		t.Errorf("the running operation: %v", texts(first))
	}
	if err := <-stopped; err != nil {
		t.Error(err)
	}
	r = startRig(t, state)
	second := r.story(waiting)
	if first := second[0]; first.Summary != "Waits for operation "+running {
		t.Errorf("it does not say that it waits: %v", texts(second))
	}
	if last := second[len(second)-1]; last.Type == event.Error || !strings.Contains(last.Summary, "default/y") {
		t.Errorf("the operation that waited: %v", texts(second))
	}
	if got := r.order("default"); !strings.HasPrefix(got, "default/x default/y") {
		t.Errorf("the chain is %q", got)
	}
}

func TestWhatWasCutOffGoesOnAfterTheNextStartAndTellsNothingTwice(t *testing.T) {
	state := t.TempDir()
	grace := func(o *operation.Options) { o.Grace = time.Millisecond }
	r := startRig(t, state, grace)
	asked := make(chan struct{})
	r.proxy("a", "default", func(nth int) answer {
		if nth == 1 {
			close(asked)
		}
		return ignore
	})
	id, err := r.runner.Submit(t.Context(), apply(doc("x")))
	if err != nil {
		t.Fatal(err)
	}
	<-asked
	if err := r.stop(); err != nil {
		t.Fatal(err)
	}
	r = startRig(t, state)
	if again, err := r.runner.Submit(t.Context(), operation.Request{Operation: "apply_filter", ID: id, Body: doc("x")}); again != id || err != nil {
		t.Errorf("the same request again: %q, %v", again, err)
	}
	if _, err := r.runner.Submit(t.Context(), operation.Request{Operation: "apply_filter", ID: id, Body: doc("y")}); !errors.Is(err, problem.OperationExists) {
		t.Errorf("another with its id: %v", err)
	}
	events := r.story(id)
	told := map[string]int{}
	for _, e := range events {
		told[e.Summary]++
	}
	if last := events[len(events)-1]; last.Type == event.Error || told["Module of default/x accepted its configuration in a dry run"] != 1 || len(events) != 4 {
		t.Errorf("%v", texts(events))
	}
	if got := r.order("default"); got != "default/x" {
		t.Errorf("the chain is %q", got)
	}
}

// idle is a queue that gives nothing.
type idle struct {
	store.Queue
	closed chan struct{}
}

func (q idle) Next(context.Context) (store.Claim, error) {
	<-q.closed
	return nil, problem.ShuttingDown.New("idle")
}
func (q idle) Close() { close(q.closed) }

func TestAnOperationThatEndsItsProcessThreeTimesIsSetAside(t *testing.T) {
	state := t.TempDir()
	kept := func() *store.Store {
		s, err := store.Open(t.Context(), store.Options{StateDir: state, SyncInterval: time.Hour})
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	r := startRig(t, state, func(o *operation.Options) { o.Queue = idle{o.Queue, make(chan struct{})} })
	id, err := r.runner.Submit(t.Context(), apply(doc("x")))
	if err != nil {
		t.Fatal(err)
	}
	removal, err := r.runner.Submit(t.Context(), remove(doc("x")))
	if err != nil {
		t.Fatal(err)
	}
	if err := r.stop(); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		s := kept()
		if c, err := s.Queue().Next(t.Context()); err != nil || c.Entry().ID != id {
			t.Fatal(c, err)
		}
		s.Close()
	}
	r = startRig(t, state)
	events := r.story(id)
	if last := events[len(events)-1]; last.Code != problem.Poisoned.Code || last.Type != event.Error || len(events) != 1 {
		t.Errorf("%v", texts(events))
	}
	// Those behind it go on.
	events = r.story(removal)
	if last := events[len(events)-1]; last.Code != problem.FilterNotFound.Code {
		t.Errorf("%v", texts(events))
	}
}

func TestAPreviewChangesNothing(t *testing.T) {
	r := newRig(t)
	r.ok(apply(doc("x")))
	previews, err := r.runner.Plan(t.Context(), apply(doc("a", "phase: authn", "force: true")))
	if err != nil {
		t.Fatal(err)
	}
	p := previews[0]
	if strings.Join(p.Order, " ") != "default/a default/x" || len(p.Losses) != 1 || p.Target.Name != "default" || p.Version == "" {
		t.Errorf("preview: %+v", p)
	}
	if !strings.Contains(p.YAML, " bytes, sha256 ") || len(p.YAML) > 10_000 {
		t.Errorf("the module's bytes are not left out: %d characters", len(p.YAML))
	}
	if got := r.order("default"); got != "default/x" {
		t.Errorf("the chain is %q", got)
	}
	previews, err = r.runner.Plan(t.Context(), remove(doc("x")))
	if err != nil || len(previews) != 1 || len(previews[0].Order) != 0 {
		t.Errorf("of a removal: %+v, %v", previews, err)
	}
	if _, err := r.runner.Plan(t.Context(), remove(doc("nope"))); !errors.Is(err, problem.FilterNotFound) {
		t.Errorf("of a removal of nothing: %v", err)
	}
}

func undo(name string, revision uint64) operation.Request {
	return operation.Request{Operation: "custom", Body: fmt.Sprintf("apiVersion: filters.meshery.io/v1alpha1\nkind: Undo\nmetadata: {name: %s}\nspec: {revision: %d}\n", name, revision)}
}

func TestAFilterIsBroughtBackToWhatItWas(t *testing.T) {
	state := t.TempDir()
	r := startRig(t, state)
	story := func() (changes []string, numbers []uint64) {
		t.Helper()
		revisions, err := r.runner.History(t.Context(), "", "a")
		if err != nil {
			t.Fatal(err)
		}
		for _, rev := range revisions {
			changes = append(changes, fmt.Sprintf("%s %s %d", rev.Change, rev.Filter.Spec.Target.Name, rev.Filter.Spec.Priority))
			numbers = append(numbers, rev.Number)
		}
		return changes, numbers
	}
	if _, err := r.runner.History(t.Context(), "", "a"); !errors.Is(err, problem.FilterNotFound) {
		t.Errorf("of a filter that never was: %v", err)
	}
	if _, err := r.runner.History(t.Context(), "", "A b"); !errors.Is(err, problem.InvalidRequest) {
		t.Errorf("of no name: %v", err)
	}
	r.ok(apply(doc("a", "priority: 1")))
	r.ok(apply(doc("other")))
	r.ok(apply(doc("a", "priority: 2")))
	r.ok(apply(doc("a", "priority: 2"))) // nothing changes
	r.ok(apply(doc("a", "priority: 3", "target: {kind: ProxyGroup, name: edge}")))
	r.ok(remove(doc("a")))
	want := []string{"applied default 1", "changed default 2", "moved edge 3", "removed edge 3"}
	changes, numbers := story()
	if !slices.Equal(changes, want) || !slices.IsSorted(numbers) {
		t.Fatalf("history %v (%v), want %v", changes, numbers, want)
	}

	if err := r.stop(); err != nil {
		t.Fatal(err)
	}
	r = startRig(t, state)
	// The last change was the removal.
	back := undo("a", 0)
	back.ID = "back"
	r.ok(back)
	if got := r.order("edge"); got != "default/a" {
		t.Errorf("edge has %q", got)
	}
	// The same request again is the same operation, not the undoing of the undoing.
	if id, err := r.runner.Submit(t.Context(), back); id != "back" || err != nil {
		t.Errorf("%q, %v", id, err)
	}
	r.ok(undo("a", numbers[0]))
	if edge, group := r.order("edge"), r.order("default"); edge != "" || group != "default/a default/other" {
		t.Errorf("edge has %q, default %q", edge, group)
	}
	if changes, _ = story(); !slices.Equal(changes[4:], []string{"applied edge 3", "moved default 1"}) {
		t.Errorf("history %v", changes)
	}
	// Undoing what was applied for the first time takes it away.
	r.ok(undo("other", 0))
	if got := r.order("default"); got != "default/a" {
		t.Errorf("default has %q", got)
	}
	previews, err := r.runner.Plan(t.Context(), undo("other", 0))
	if err != nil || len(previews) != 1 || strings.Join(previews[0].Order, " ") != "default/a default/other" {
		t.Errorf("preview %+v, %v", previews, err)
	}
	for name, c := range map[string]struct {
		kind *problem.Kind
		q    operation.Request
	}{
		"a revision that is none":    {problem.RevisionNotFound, undo("a", 12345)},
		"a filter that never was":    {problem.FilterNotFound, undo("nobody", 0)},
		"by another operation":       {problem.InvalidDocument, operation.Request{Operation: "apply_filter", Body: undo("a", 0).Body}},
		"with another document":      {problem.InvalidDocument, operation.Request{Operation: "custom", Body: undo("a", 0).Body + "---\n" + doc("x")}},
		"behind another document":    {problem.InvalidDocument, operation.Request{Operation: "custom", Body: doc("x") + "---\n" + undo("a", 0).Body}},
		"with a field that is none":  {problem.InvalidDocument, operation.Request{Operation: "custom", Body: undo("a", 0).Body + "more: 1\n"}},
		"to a revision that is text": {problem.InvalidDocument, operation.Request{Operation: "custom", Body: strings.Replace(undo("a", 0).Body, "revision: 0", "revision: one", 1)}},
		"deleting it":                {problem.InvalidDocument, operation.Request{Operation: "custom", Body: undo("a", 0).Body, Delete: true}},
	} {
		if _, err := r.runner.Submit(t.Context(), c.q); !errors.Is(err, c.kind) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestWhatIsOlderThanWhatIsKeptIsNotGuessed(t *testing.T) {
	r := newRig(t)
	r.ok(apply(doc("stays")))
	for i := range 12 {
		r.ok(apply(doc("busy", fmt.Sprintf("priority: %d", i))))
	}
	if _, err := r.runner.Submit(t.Context(), undo("stays", 0)); !errors.Is(err, problem.RevisionNotFound) || !strings.Contains(err.Error(), "nothing older is kept") {
		t.Errorf("%v", err)
	}
	r.ok(undo("busy", 0))
}

func TestKubeconfigsWaitSealedAndAreErasedAtTheEnd(t *testing.T) {
	const secret = "current-context: nobody-may-read-this"
	state := t.TempDir()
	queue := &idle{closed: make(chan struct{})}
	r := startRig(t, state, func(o *operation.Options) { queue.Queue = o.Queue; o.Queue = queue })
	q := apply(doc("x", "mesh: envoy"))
	q.ID, q.Kubeconfigs = "with-secret", []string{secret}
	for range 2 {
		if _, err := r.runner.Submit(t.Context(), q); err != nil {
			t.Fatal(err)
		}
	}
	other := q
	other.Kubeconfigs = []string{"another"}
	if _, err := r.runner.Submit(t.Context(), other); !errors.Is(err, problem.OperationExists) {
		t.Errorf("another kubeconfig with that id: %v", err)
	}
	c, err := queue.Queue.Next(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var j struct{ Sealed []byte }
	if err := json.Unmarshal(c.Entry().Data, &j); err != nil || len(j.Sealed) == 0 || !c.Entry().Secret {
		t.Fatalf("the kubeconfig is not in the entry: %v", err)
	}
	if err := c.Release(t.Context()); err != nil {
		t.Fatal(err)
	}
	encoded := base64.StdEncoding.EncodeToString(j.Sealed)
	found := func(text string) (n int) {
		t.Helper()
		err := filepath.WalkDir(state, func(name string, e fs.DirEntry, err error) error {
			if err == nil && !e.IsDir() {
				data, _ := os.ReadFile(name)
				n += strings.Count(string(data), text)
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	if found(secret) != 0 || found(encoded) == 0 {
		t.Errorf("the kubeconfig is in clear %d times and sealed %d times", found(secret), found(encoded))
	}
	if err := r.stop(); err != nil {
		t.Fatal(err)
	}
	r = startRig(t, state)
	events := r.story("with-secret")
	if last := events[len(events)-1]; last.Type == event.Error {
		t.Errorf("%v", texts(events))
	}
	if err := r.stop(); err != nil {
		t.Fatal(err)
	}
	if found(encoded) != 0 {
		t.Errorf("what was sealed is left %d times", found(encoded))
	}
}

func TestComponentsOfDesignsDoNotTakeEachOthersFilters(t *testing.T) {
	r := newRig(t)
	r.proxy("edge-1", "default", always(accept))
	from := func(component, value string) operation.Request {
		d := doc("hello", "config: {response: {x-hello: "+value+"}}")
		if component != "" {
			d = strings.Replace(d, "name: hello}", "name: hello, labels: {filters.meshery.io/component: "+component+"}}", 1)
		}
		return apply(d)
	}
	r.ok(from("WASMFilter.hello", "one"))
	r.ok(from("WASMFilter.hello", "two"))
	e := r.fails(problem.ComponentTaken, from("WASMFilter.Hello", "three"))
	if !strings.Contains(e.Details, "default/hello is the filter of the component WASMFilter.hello") || !strings.Contains(e.Details, "and not of WASMFilter.Hello") {
		t.Errorf("%s", e.Details)
	}
	r.ok(from("WASMFilter.hello", "two")) // nothing has changed
	other := from("WASMFilter.Hello", "two")
	other.Delete = true
	r.fails(problem.FilterNotFound, other)
	r.ok(from("", "three")) // by hand
	r.ok(from("WASMFilter.Hello", "four"))
	r.ok(remove(doc("hello")))
	r.ok(from("WASMFilter.hello", "five"))
}
