package cli

import (
	"context"
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
	"unicode"

	"github.com/meshery/meshery-filters/internal/envoy"
)

const patience = 30 * time.Second

// probe is a filter for tests; its README says what its configuration does.
const probe = "../../build/testfilters/probe.wasm"

// adapter is a `serve` in this process with a state directory of its own.
type adapter struct {
	*background
	t   *testing.T
	at  addresses
	env []string
}

func newAdapter(t *testing.T, flags ...string) *adapter {
	t.Helper()
	return newAdapterIn(t, t.TempDir(), flags...)
}

// newAdapterIn is an adapter on a state directory that may be an earlier one's.
func newAdapterIn(t *testing.T, state string, flags ...string) *adapter {
	t.Helper()
	a := &adapter{t: t}
	a.background = start(t, nil, append([]string{"serve", "--state-dir", state, "--grpc-addr", "127.0.0.1:0", "--xds-addr", "127.0.0.1:0",
		"--http-addr", "127.0.0.1:0", "--imagehub-addr", "127.0.0.1:0"}, flags...)...)
	for deadline := time.Now().Add(patience); ; time.Sleep(10 * time.Millisecond) {
		data, err := os.ReadFile(filepath.Join(state, addressesFile))
		if err == nil {
			if err := json.Unmarshal(data, &a.at); err != nil {
				t.Fatal(err)
			}
			a.env = []string{envServer + "=" + a.at.GRPC}
			return a
		}
		select {
		case <-a.done:
			t.Fatalf("the adapter ended:\n%s", a.err.String())
		default:
		}
		if time.Now().After(deadline) {
			t.Fatalf("the adapter is not ready:\n%s", a.err.String())
		}
	}
}

// cli runs a command against the adapter.
func (a *adapter) cli(args ...string) result {
	a.t.Helper()
	return runWith(a.t, "", a.env, args...)
}

// proxy starts an Envoy with the bootstrap that the command line writes, and returns it and where it listens.
func (a *adapter) proxy(id, upstream string) (p *envoy.Process, url string) {
	a.t.Helper()
	return a.proxyOf("edge", id, upstream)
}

func (a *adapter) proxyOf(group, id, upstream string) (p *envoy.Process, url string) {
	t := a.t
	t.Helper()
	binary := realEnvoy(t)
	bootstrap := run(t, "envoy", "bootstrap", "--group", group, "--node-id", id, "--xds-addr", a.at.XDS, "--listen", "127.0.0.1:0",
		"--admin", "127.0.0.1:0", "--upstream", upstream).want(t, exitOK).out
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	t.Cleanup(cancel)
	p, err := envoy.Start(ctx, binary, envoy.ProcessOptions{Bootstrap: []byte(bootstrap), Dir: t.TempDir(), Concurrency: 1})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := p.Stop(context.Background()); err != nil {
			t.Error(err)
		}
	})
	if err := p.Ready(ctx); err != nil {
		t.Fatal(err)
	}
	addr, err := p.ListenerAddr(ctx, envoy.ListenerName)
	if err != nil {
		t.Fatal(err)
	}
	return p, "http://" + addr
}

func realEnvoy(t *testing.T) envoy.Binary {
	t.Helper()
	if testing.Short() {
		t.Skip("runs a real Envoy")
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	b, err := envoy.Find(ctx, "")
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func anUpstream(t *testing.T) string {
	t.Helper()
	s := httptest.NewServer(http.HandlerFunc(echo))
	t.Cleanup(s.Close)
	return s.Listener.Addr().String()
}

func fetch(t *testing.T, url string) *http.Response {
	t.Helper()
	transport := &http.Transport{DisableKeepAlives: true}
	req, err := http.NewRequest(http.MethodGet, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := transport.RoundTrip(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if _, err := io.Copy(io.Discard, io.LimitReader(resp.Body, 1<<20)); err != nil {
		t.Fatal(err)
	}
	return resp
}

// stamping is a document of the probe, which stamps responses with its name.
func stamping(t *testing.T, dir, name, spec string) string {
	t.Helper()
	module, err := filepath.Abs(probe)
	if err != nil {
		t.Fatal(err)
	}
	return put(t, dir, name+".yaml", "apiVersion: filters.meshery.io/v1alpha1\nkind: Filter\nmetadata: {name: "+name+", namespace: shop}\n"+
		"spec:\n  target: {kind: ProxyGroup, name: edge}\n  module: {file: "+module+"}\n  config: {stamp: {header: x-stamp, value: "+name+"}}\n"+spec)
}

func TestFiltersGoToRealProxiesAndBackFromTheCommandLine(t *testing.T) {
	a := newAdapter(t)
	upstream := anUpstream(t)
	first, one := a.proxy("edge-1", upstream)
	second, two := a.proxy("edge-2", upstream)
	pids := [2]int{first.PID(), second.PID()}
	dir := t.TempDir()
	audit := stamping(t, dir, "audit", "  match: {direction: inbound}\n")

	a.cli("list").want(t, exitOK, "No filter is applied.")
	a.cli("render", "-f", audit).want(t, exitOK, "# ProxyGroup edge on mesh envoy", "# Requests meet: shop/audit", "# No effect: spec.match.direction")
	if got := fetch(t, one).Header.Get("x-stamp"); got != "" {
		t.Fatalf("rendering changed what proxies do: %q", got)
	}

	r := a.cli("apply", "-f", audit).want(t, exitOK)
	if !strings.Contains(r.out, "runs on ProxyGroup edge (2 of 2 proxies)") || strings.Contains(r.out, "dry run") {
		t.Errorf("the result does not stand alone on standard output:\n%s", r.out)
	}
	if !strings.Contains(r.err, "accepted its configuration in a dry run") || !strings.Contains(r.err, "Warning: a field has no effect") {
		t.Errorf("no progress on standard error:\n%s", r.err)
	}
	for _, url := range []string{one, two} {
		if got := fetch(t, url).Header.Get("x-stamp"); got != "audit" {
			t.Errorf("%s answers with stamp %q", url, got)
		}
	}
	a.cli("list").want(t, exitOK, "shop/audit", "2 of 2 proxies", "inline")
	a.cli("list", "-n", "other").want(t, exitOK, "No filter of namespace other is applied.")
	a.cli("status").want(t, exitOK, "as applied", "2 of 2 proxies")

	// Another filter, from standard input, as lines of JSON.
	later := stamping(t, dir, "later", "  priority: -1\n")
	text, err := os.ReadFile(later)
	if err != nil {
		t.Fatal(err)
	}
	r = runWith(t, string(text), a.env, "apply", "-f", "-", "-o", "json").want(t, exitOK)
	var last eventView
	for line := range strings.Lines(r.out) {
		last = eventView{}
		if err := json.Unmarshal([]byte(line), &last); err != nil {
			t.Fatalf("%v: %s", err, line)
		}
	}
	if !last.Last || last.Type != typeInfo || last.Operation == "" {
		t.Errorf("the last line is not the last event: %+v", last)
	}
	a.cli("events", "--operation", last.Operation).want(t, exitOK, last.Operation, "shop/later")
	var list struct{ Filters []listed }
	if err := json.Unmarshal([]byte(a.cli("list", "-o", "json").want(t, exitOK).out), &list); err != nil || len(list.Filters) != 2 ||
		list.Filters[1].Name != "later" || list.Filters[1].Position != 2 || *list.Filters[1].Running != 2 {
		t.Errorf("%v: %+v", err, list)
	}
	a.cli("events", "--operation", "NOSUCH").want(t, exitOK, "No event of operation NOSUCH is held.")
	misspelled := start(t, a.env, "events", "--operation", "NOSUCH", "--follow")
	misspelled.err.waitFor(t, 20*time.Second, "No event of operation NOSUCH is held; it is waited for.")
	misspelled.interrupt()
	a.cli("events", "--operation", last.Operation, "--follow", "-o", "yaml").want(t, exitOK, "last: true")
	a.cli("events").want(t, exitOK, "shop/audit", "shop/later")

	// A configuration that the filter refuses reaches no proxy.
	refused := put(t, dir, "refused.yaml", strings.Replace(string(text), "config: {", "config: {refuse: not on my watch, ", 1))
	a.cli("apply", "-f", refused).want(t, exitFailed, "the filter refused its configuration", "not on my watch", "Remedy:", "meshery-filters-1014")

	a.cli("remove", "-n", "shop", "audit", "-o", "yaml").want(t, exitOK, "shop/audit removed")
	a.cli("remove", "-f", later).want(t, exitOK, "shop/later removed from ProxyGroup edge (2 of 2 proxies)")
	if got := fetch(t, two).Header.Get("x-stamp"); got != "" {
		t.Errorf("after the removal responses are stamped %q", got)
	}
	a.cli("remove", "shop/audit").want(t, exitFailed, "no such filter", "meshery-filters-1010")
	if got := [2]int{first.PID(), second.PID()}; got != pids || first.Err() != nil || second.Err() != nil {
		t.Errorf("the proxies are not the ones of the beginning: %v and %v", pids, got)
	}
}

func TestWhatTheAdapterRefusesIsToldWithEveryMistake(t *testing.T) {
	a := newAdapter(t)
	doc := put(t, t.TempDir(), "d.yaml", header("a")+"spec: {module: {builtin: nothing}}\n---\n"+header("b")+"spec: {module: {url: 'meshery://a'}}\n")
	a.cli("apply", "-f", doc).want(t, exitUsage, "documents[0].spec.module.builtin", "documents[1].spec.module.url", "Code:   meshery-filters-1001")
	a.cli("render", "-f", doc).want(t, exitUsage, "documents[1].spec.module.url")
	a.cli("run", "nothing").want(t, exitUsage, "no such operation", "meshery-filters-1002")
	a.cli("run", "filters_status", "--delete").want(t, exitUsage, "meshery-filters-1004")
	a.cli("apply", "-f", doc, "-n", "Not_A_Name").want(t, exitUsage, "Not_A_Name")
	istio := put(t, t.TempDir(), "i.yaml", header("a")+"spec: {mesh: istio, target: {kind: Namespace}, module: {builtin: headers}}\n")
	a.cli("apply", "-f", istio).want(t, exitFailed, "spec.mesh is istio", "Code:   meshery-filters-1080", "kubeconfig")
}

func TestOperationsOfTheCatalogueRunFromTheCommandLine(t *testing.T) {
	a := newAdapter(t)
	a.cli("operations").want(t, exitOK, "imagehub_rate_limit", "sample_application")
	a.cli("run", "imagehub").want(t, exitOK, "Image Hub runs at http://127.0.0.1:")
	a.cli("run", "imagehub", "--delete").want(t, exitOK, "Image Hub removed")
	a.cli("run", "imagehub_rate_limit").want(t, exitOK, "Warning: no proxy is connected yet")
	a.cli("status").want(t, exitOK, "waits for a proxy")
	a.cli("run", "imagehub_rate_limit", "--delete").want(t, exitOK, "removed")
	a.cli("run", "filters_status").want(t, exitOK, "No filter is applied")
}

func TestANewAdapterHoldsNoEvents(t *testing.T) {
	a := newAdapter(t)
	begun := time.Now()
	a.cli("events").want(t, exitOK, "No events are held.")
	if took := time.Since(begun); took > 5*time.Second {
		t.Errorf("finding out took %s", took)
	}
}

func TestAWaitEndsWithTheOperationIDAndNotWithTheOperation(t *testing.T) {
	a := newAdapter(t)
	_, url := a.proxy("edge-1", anUpstream(t))
	// An Envoy that stands still acknowledges nothing.
	p, _ := a.proxy("edge-2", anUpstream(t))
	pause(t, p.PID())
	doc := stamping(t, t.TempDir(), "audit", "  rollout: all\n  wait: {timeout: 2s}\n")

	id := strings.TrimSpace(a.cli("apply", "-f", doc, "--no-wait").want(t, exitOK).out)
	a.cli("events", "--operation", id, "--follow").want(t, exitOK, "not every proxy answered in time")
	a.cli("status").want(t, exitDrift, "drifted", "edge-2", "waiting", "1 of 2 proxies")

	doc = stamping(t, t.TempDir(), "audit", "  rollout: all\n  priority: 1\n  wait: {timeout: 5s}\n  vmID: other\n")
	r := a.cli("apply", "-f", doc, "--timeout", "1s").want(t, exitTimeout, "no end after 1s", "goes on", "events --operation")

	waiting := start(t, a.env, "apply", "-f", stamping(t, t.TempDir(), "other", "  rollout: all\n  wait: {timeout: 2s}\n"))
	waiting.err.waitFor(t, patience, "accepted its configuration")
	waiting.interrupt()
	if code := waiting.wait(t, patience); code != exitInterrupted {
		t.Errorf("exit code %d after an interrupt, want %d", code, exitInterrupted)
	}
	waiting.err.waitFor(t, time.Second, "stopped waiting", "goes on", "events --operation")

	// Both went on.
	followed := func(text string) string { // the id in the command that is named
		_, after, _ := strings.Cut(text, "events --operation ")
		return after[:strings.IndexFunc(after, func(r rune) bool { return !unicode.IsLetter(r) && !unicode.IsDigit(r) })]
	}
	id = followed(r.err)
	a.cli("events", "--operation", id, "--follow").want(t, exitOK, "error", "not every proxy answered in time")
	id = followed(waiting.err.String())
	a.cli("events", "--operation", id, "--follow").want(t, exitOK, "not every proxy answered in time")
	if got := fetch(t, url).Header.Values("x-stamp"); len(got) == 0 {
		t.Error("the proxy that answers does not run the filters")
	}
	a.cli("remove", "shop/audit", "shop/other", "--timeout", "10ms").want(t, exitTimeout, "no end after 10ms")
}

func TestAFilterIsBroughtBackFromTheCommandLine(t *testing.T) {
	a := newAdapter(t)
	a.cli("history", "shop/audit").want(t, exitFailed, "no such filter")
	a.cli("apply", "-f", stamping(t, t.TempDir(), "audit", "  priority: 1\n")).want(t, exitOK)
	a.cli("apply", "-f", stamping(t, t.TempDir(), "audit", "  priority: 2\n")).want(t, exitOK)
	a.cli("undo", "audit", "-n", "shop").want(t, exitOK, "shop/audit")
	a.cli("remove", "shop/audit").want(t, exitOK)
	var h struct{ Revisions []revision }
	if err := json.Unmarshal([]byte(a.cli("history", "shop/audit", "-o", "json").want(t, exitOK).out), &h); err != nil || len(h.Revisions) != 4 {
		t.Fatalf("%v: %+v", err, h)
	}
	a.cli("history", "shop/audit").want(t, exitOK, "REVISION", "applied", "changed", "removed", "ProxyGroup edge")
	a.cli("undo", "shop/audit", "--to", strconv.FormatUint(h.Revisions[1].Revision, 10)).want(t, exitOK)
	a.cli("list", "-o", "json").want(t, exitOK, `"priority": 2`)
	a.cli("undo", "shop/audit", "--to", "0").want(t, exitUsage, "history")
	a.cli("undo", "shop/audit", "--to", "99999").want(t, exitFailed, "no such revision")
}

func TestFollowingEventsEndsWellWhenItIsInterrupted(t *testing.T) {
	a := newAdapter(t)
	follow := start(t, a.env, "events", "--follow", "-o", "json")
	a.cli("run", "filters_status").want(t, exitOK)
	follow.out.waitFor(t, patience, `"summary":"No filter is applied"`)
	follow.interrupt()
	if code := follow.wait(t, patience); code != exitOK {
		t.Errorf("exit code %d: %s", code, follow.err.String())
	}
}

func TestWhoCannotWatchAnOperationIsToldThatItGoesOn(t *testing.T) {
	a := newAdapter(t, "--limits-streams-per-client", "1")
	follow := start(t, a.env, "events", "--follow")
	follow.out.waitFor(t, patience, "SUMMARY")
	a.cli("run", "filters_status").want(t, exitFailed, "was accepted and goes on; what became of it:", "events --operation", "streams as one client may have at once: 1")
	follow.out.waitFor(t, patience, "No filter is applied")
}

func TestFollowingEventsEndsWithTheAdapter(t *testing.T) {
	a := newAdapter(t)
	follow := start(t, a.env, "events", "--follow")
	follow.out.waitFor(t, patience, "SUMMARY")
	a.cli("run", "filters_status").want(t, exitOK)
	follow.out.waitFor(t, patience, "No filter is applied")
	a.interrupt()
	if code := follow.wait(t, patience); code != exitUnreachable {
		t.Errorf("exit code %d: %s", code, follow.err.String())
	}
	follow.err.waitFor(t, time.Second, "shutting down")
	if code := a.wait(t, patience); code != exitOK {
		t.Errorf("the adapter ended with exit code %d: %s", code, a.err.String())
	}
}

func TestImageHubRunsFromTheCommandLine(t *testing.T) {
	key := put(t, t.TempDir(), "key", strings.Repeat("k", 32)+"\n")
	hub := start(t, nil, "imagehub", "--addr", "127.0.0.1:0", "--key-file", key)
	hub.out.waitFor(t, patience, "Image Hub answers at http://", "\n")
	_, url, _ := strings.Cut(strings.TrimSpace(hub.out.String()), "at ")
	if resp := fetch(t, url+"/healthz"); resp.StatusCode != http.StatusOK {
		t.Errorf("/healthz answers %s", resp.Status)
	}
	hub.interrupt()
	if code := hub.wait(t, patience); code != exitOK {
		t.Errorf("exit code %d: %s", code, hub.err.String())
	}
	run(t, "imagehub", "--addr", "127.0.0.1:0", "--key-file", put(t, t.TempDir(), "key", "short")).want(t, exitUsage, "at least 32")
}

func TestInspectTellsOfARealModule(t *testing.T) {
	run(t, "inspect", probe).want(t, exitOK, "Rust", "0.2.1")
	var report struct{ SHA256, ABI string }
	if err := json.Unmarshal([]byte(run(t, "inspect", probe, "-o", "json").want(t, exitOK).out), &report); err != nil || len(report.SHA256) != 64 {
		t.Errorf("%v: %+v", err, report)
	}
}

func TestExplainAndVersionAnswerWithoutAnAdapter(t *testing.T) {
	run(t, "explain").want(t, exitOK, "spec", "metadata")
	run(t, "explain", "spec.failurePolicy").want(t, exitOK, "closed", "reload")
	run(t, "version").want(t, exitOK, "v0.0.0-test", "envoy", "1.39.0 or later", "ratelimit")
	run(t, "version", "-o", "yaml").want(t, exitOK, "minEnvoy: 1.39.0")
	run(t, "envoy", "slot", "--group", "edge").want(t, exitOK, "meshery.filters")
}
