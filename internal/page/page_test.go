package page

import (
	"bufio"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"net/http/httptest"
	"path"
	"regexp"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/meshery/meshery-filters/internal/event"
	"github.com/meshery/meshery-filters/internal/filter"
	"github.com/meshery/meshery-filters/internal/operation"
	"github.com/meshery/meshery-filters/internal/plan"
)

const patience = 20 * time.Second

// world is what a page shows; tests change it between requests.
type world struct {
	groups   []Group
	statuses []operation.Status
	err      error
	asked    atomic.Int64
}

func newPage(t *testing.T, w *world, edit func(*Options)) (*Page, *event.Hub) {
	t.Helper()
	hub := event.NewHub(0, 0)
	o := Options{Groups: func() []Group { return w.groups }, Events: hub, Version: "v1.2.3", Component: "an id", Loopback: true,
		Chains: func(context.Context) ([]operation.Status, error) { w.asked.Add(1); return w.statuses, w.err }}
	if edit != nil {
		edit(&o)
	}
	p, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	return p, hub
}

func chainOf(name string, filters ...string) filter.Chain {
	c := filter.Chain{Mesh: "envoy", Target: filter.Target{Kind: filter.ProxyGroup, Name: name}}
	for _, f := range filters {
		c.Filters = append(c.Filters, filter.Filter{Key: filter.Key{Namespace: "default", Name: f}, Spec: filter.Spec{Phase: filter.Authz, FailurePolicy: filter.FailOpen,
			Module: filter.Module{Builtin: "headers", SHA256: strings.Repeat("ab", 32)}}})
	}
	return c
}

func status(id string, state plan.ProxyState) plan.ProxyStatus {
	return plan.ProxyStatus{Proxy: plan.Proxy{ID: id, Version: "1.40.0"}, State: state, Expected: true, Detail: "as the backend has it"}
}

// ask sends one request as a browser on this machine does. Headers are name, value pairs; Host is one too.
func ask(h http.Handler, method, path string, headers ...string) *httptest.ResponseRecorder {
	r := httptest.NewRequest(method, path, nil)
	r.Host = "127.0.0.1:10016"
	for i := 0; i < len(headers); i += 2 {
		if headers[i] == "Host" {
			r.Host = headers[i+1]
			continue
		}
		r.Header.Set(headers[i], headers[i+1])
	}
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	return w
}

func stateOf(t *testing.T, p *Page) (s State) {
	t.Helper()
	w := ask(p, "GET", "/api/state")
	if w.Code != http.StatusOK || w.Header().Get("Content-Type") != "application/json" {
		t.Fatalf("%d %s", w.Code, w.Body)
	}
	if err := json.Unmarshal(w.Body.Bytes(), &s); err != nil {
		t.Fatal(err)
	}
	return s
}

func TestTheStateTellsOfEveryTargetHowItIs(t *testing.T) {
	running, rejected, waiting := status("a", plan.Running), status("b", plan.Rejected), status("c", plan.Waiting)
	rejected.Detail = "quotes a secret"
	redacted := rejected
	redacted.Detail = "quotes a [redacted]"
	for _, c := range []struct {
		why    string
		group  Group
		status operation.Status
		want   Condition
	}{
		{"every proxy runs it", Group{Chain: chainOf("g", "x"), Version: "1", Proxies: []plan.ProxyStatus{running}}, operation.Status{}, AsApplied},
		{"one refused it", Group{Chain: chainOf("g", "x"), Version: "1", Proxies: []plan.ProxyStatus{running, rejected}},
			operation.Status{Loaded: plan.Loaded{Proxies: []plan.ProxyStatus{running, redacted}}}, Drifted},
		{"one has not answered", Group{Chain: chainOf("g", "x"), Version: "1", Proxies: []plan.ProxyStatus{waiting}}, operation.Status{}, Drifted},
		{"a change is offered", Group{Chain: chainOf("g", "x"), Version: "1", Proxies: []plan.ProxyStatus{waiting}, Offered: "2",
			OfferedProxies: []plan.ProxyStatus{running, rejected}}, operation.Status{}, RollingOut},
		{"nobody is there", Group{Chain: chainOf("g", "x"), Version: "1"}, operation.Status{}, Waiting},
		{"nothing is applied", Group{Chain: chainOf("g"), Version: "0", Proxies: []plan.ProxyStatus{running}}, operation.Status{}, Empty},
		{"it is held since the start", Group{Chain: chainOf("g", "x"), Held: true, Proxies: []plan.ProxyStatus{status("a", plan.Held)}},
			operation.Status{Problem: "the secret is missing"}, Held},
		{"its secret is gone", Group{Chain: chainOf("g", "x"), Version: "1", Proxies: []plan.ProxyStatus{running}},
			operation.Status{Problem: "the secret is missing"}, Unplanned},
		{"it is in a cluster, where nobody may look", Group{Chain: chainOf("g", "x"), Version: "1"},
			operation.Status{Loaded: plan.Loaded{Unverified: "verb list, resource pods"}}, Unverified},
	} {
		t.Run(c.why, func(t *testing.T) {
			w := &world{groups: []Group{c.group}}
			if c.status.Problem != "" || c.status.Loaded.Proxies != nil || c.status.Loaded.Unverified != "" {
				c.status.Chain = c.group.Chain
				w.statuses = []operation.Status{c.status}
			}
			p, _ := newPage(t, w, nil)
			s := stateOf(t, p)
			if len(s.Targets) != 1 || s.Targets[0].Condition != c.want || s.Targets[0].Problem != cmp.Or(c.status.Problem, c.status.Loaded.Unverified) {
				t.Fatalf("%+v, want %s", s.Targets, c.want)
			}
			bad := c.want == Drifted || c.want == Held || c.want == Unplanned
			if (s.Drifted == 1) != bad {
				t.Errorf("%d are drifted", s.Drifted)
			}
			got := s.Targets[0]
			if got.Target != "ProxyGroup g" || got.Version != c.group.Version || got.Offered != c.group.Offered {
				t.Errorf("%+v", got)
			}
			for _, proxy := range got.Proxies {
				want := ""
				if c.want == Drifted && proxy.State == plan.Rejected {
					want = redacted.Detail
				}
				if proxy.Detail != want {
					t.Errorf("%s says %q, want %q: the backend's own text may hold secrets", proxy.ID, proxy.Detail, want)
				}
			}
			if len(got.Proxies) == 2 && got.Proxies[0].State == plan.Running {
				t.Error("the proxy that does not run it is not the first")
			}
		})
	}
}

func TestTheStateHasTheChainInOrderAndChainsOfOtherBackends(t *testing.T) {
	other := chainOf("elsewhere", "z")
	other.Mesh = "istio"
	w := &world{groups: []Group{{Chain: chainOf("edge", "first", "second"), Version: "1"}, {Chain: chainOf("back"), Version: "0"}},
		statuses: []operation.Status{{Chain: chainOf("edge", "first", "second"), Version: "1"}, {Chain: other, Version: "7",
			Loaded: plan.Loaded{Proxies: []plan.ProxyStatus{status("a", plan.Running)}}}}}
	p, _ := newPage(t, w, nil)
	s := stateOf(t, p)
	var names []string
	for _, target := range s.Targets {
		names = append(names, target.Mesh+" "+target.Target)
	}
	if want := []string{"envoy ProxyGroup back", "envoy ProxyGroup edge", "istio ProxyGroup elsewhere"}; !slices.Equal(names, want) {
		t.Fatalf("%v, want %v", names, want)
	}
	if want := []Filter{{"default/first", "builtin headers", strings.Repeat("ab", 32), "authz", 0, "open"},
		{"default/second", "builtin headers", strings.Repeat("ab", 32), "authz", 0, "open"}}; !slices.Equal(s.Targets[1].Filters, want) {
		t.Errorf("%+v", s.Targets[1].Filters)
	}
	if s.Version != "v1.2.3" || s.Component != "an id" || s.Proxies != 1 {
		t.Errorf("%+v", s)
	}
}

func TestTheStateIsBoundedAndCountsTheRest(t *testing.T) {
	big := Group{Chain: chainOf("a", "x"), Version: "1"}
	for i := range 10_000 {
		big.Proxies = append(big.Proxies, status(fmt.Sprintf("p%05d", i), plan.Running))
	}
	big.Proxies[9_999].State = plan.Rejected
	w := &world{groups: []Group{big}}
	for i := range maxTargets + 5 {
		w.groups = append(w.groups, Group{Chain: chainOf(fmt.Sprintf("b%05d", i), "x"), Version: "1"})
	}
	p, _ := newPage(t, w, nil)
	s := stateOf(t, p)
	if len(s.Targets) != maxTargets || s.MoreTargets != 6 || s.Proxies != 10_000 {
		t.Errorf("%d targets and %d more with %d proxies", len(s.Targets), s.MoreTargets, s.Proxies)
	}
	a := s.Targets[0]
	if len(a.Proxies) != maxProxies || a.More != 10_000-maxProxies || a.Proxies[0].ID != "p09999" || a.Counts[plan.Running] != 9_999 {
		t.Errorf("%d proxies, %d more, first %+v, %v", len(a.Proxies), a.More, a.Proxies[0], a.Counts)
	}
}

func TestAChainThatCannotBeToldLeavesTheGroupsShown(t *testing.T) {
	w := &world{groups: []Group{{Chain: chainOf("edge", "x"), Version: "1"}}, err: errors.New("the store is away")}
	p, _ := newPage(t, w, nil)
	if s := stateOf(t, p); !strings.Contains(s.Problem, "the store is away") || len(s.Targets) != 1 {
		t.Errorf("%+v", s)
	}
}

func TestManyPagesCostOneLookAndAnUnchangedStateCostsNoBody(t *testing.T) {
	w := &world{groups: []Group{{Chain: chainOf("edge", "x"), Version: "1"}}}
	p, _ := newPage(t, w, nil)
	first := ask(p, "GET", "/api/state")
	tag := first.Header().Get("ETag")
	for range 100 {
		if again := ask(p, "GET", "/api/state", "If-None-Match", tag); again.Code != http.StatusNotModified || again.Body.Len() != 0 {
			t.Fatalf("%d with %d bytes", again.Code, again.Body.Len())
		}
	}
	if n := w.asked.Load(); n > 5 {
		t.Errorf("the chains were read %d times for 101 requests", n)
	}
	w.groups = []Group{{Chain: chainOf("edge", "x"), Version: "2"}}
	for deadline := time.Now().Add(patience); ; time.Sleep(10 * time.Millisecond) {
		if s := ask(p, "GET", "/api/state", "If-None-Match", tag); s.Code == http.StatusOK && s.Header().Get("ETag") != tag {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("a change is not told")
		}
	}
}

func TestADearStateIsKeptForLonger(t *testing.T) {
	reads := 0
	c := newCache(func(context.Context) ([]byte, error) {
		reads++
		time.Sleep(60 * time.Millisecond) // the work
		return nil, nil
	})
	for begun := time.Now(); time.Since(begun) < 900*time.Millisecond; {
		if _, err := c.get(t.Context()); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Millisecond)
	}
	if reads != 1 {
		t.Errorf("read %d times", reads)
	}
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	<-c.turn
	if _, err := c.get(ended); !errors.Is(err, context.Canceled) {
		t.Errorf("a request that was given up waits on: %v", err)
	}
}

func TestThePageLoadsNothingFromElsewhereAndCannotBeMadeTo(t *testing.T) {
	p, _ := newPage(t, &world{}, nil)
	html := ask(p, "GET", "/").Body.String()
	for _, inline := range []string{`<style`, ` style=`, ` onclick=`, `<script>`, `javascript:`} {
		if strings.Contains(html, inline) {
			t.Errorf("the page has %s, which its policy forbids", inline)
		}
	}
	embedded, err := fs.Glob(files, "files/*")
	if err != nil || len(embedded) == 0 {
		t.Fatal(err)
	}
	for _, f := range append(embedded, "api/state") {
		route := "/" + strings.TrimPrefix(f, "files/")
		if path.Base(f) == "index.html" {
			route = "/"
		}
		w := ask(p, "GET", route)
		if w.Code != http.StatusOK {
			t.Errorf("%s: %d", route, w.Code)
		}
		for name, want := range map[string]string{"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff", "X-Frame-Options": "DENY",
			"Referrer-Policy": "no-referrer", "Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Resource-Policy": "same-origin", "Cache-Control": "no-store"} {
			if got := w.Header().Get(name); got != want {
				t.Errorf("%s: %s is %q", route, name, got)
			}
		}
		if w.Header().Get("Access-Control-Allow-Origin") != "" {
			t.Errorf("%s may be read by other pages", route)
		}
		if found := regexp.MustCompile(`https?://[^"' ]*`).FindString(strings.ReplaceAll(w.Body.String(), "http://www.w3.org/2000/svg", "")); found != "" {
			t.Errorf("%s names %s", route, found)
		}
		for _, method := range []string{"POST", "PUT", "DELETE"} {
			if w := ask(p, method, route); w.Code != http.StatusMethodNotAllowed {
				t.Errorf("%s %s: %d", method, route, w.Code)
			}
		}
	}
	if w := ask(p, "GET", "/files/page.go"); w.Code != http.StatusNotFound {
		t.Errorf("a file that is not there: %d", w.Code)
	}
}

func TestAForeignPageGetsNothing(t *testing.T) {
	p, _ := newPage(t, &world{}, nil)
	open, _ := newPage(t, &world{}, func(o *Options) { o.Loopback = false })
	for _, c := range []struct {
		why     string
		page    *Page
		path    string
		headers []string
		want    int
	}{
		{"the listener's address", p, "/api/state", []string{"Host", "127.0.0.1:10016"}, http.StatusOK},
		{"another loopback address", p, "/", []string{"Host", "127.8.9.1"}, http.StatusOK},
		{"IPv6", p, "/", []string{"Host", "[::1]:80"}, http.StatusOK},
		{"IPv6 without a port", p, "/", []string{"Host", "[::1]"}, http.StatusOK},
		{"localhost through a port forward", p, "/", []string{"Host", "LOCALHOST:9000"}, http.StatusOK},
		{"a name that was made to point here", p, "/", []string{"Host", "evil.example:10016"}, http.StatusMisdirectedRequest},
		{"the API by it", p, "/api/state", []string{"Host", "evil.example"}, http.StatusMisdirectedRequest},
		{"the events by it", p, "/api/events", []string{"Host", "evil.example"}, http.StatusMisdirectedRequest},
		{"a name that begins like one of ours", p, "/", []string{"Host", "127.0.0.1.evil.example"}, http.StatusMisdirectedRequest},
		{"a name that ends like one of ours", p, "/", []string{"Host", "evil.localhost"}, http.StatusMisdirectedRequest},
		{"another machine's address", p, "/", []string{"Host", "192.0.2.1"}, http.StatusMisdirectedRequest},
		{"no name", p, "/", []string{"Host", ""}, http.StatusMisdirectedRequest},
		{"a listener for others, by its name", open, "/", []string{"Host", "adapter.example"}, http.StatusOK},
		{"another site's script", p, "/api/state", []string{"Sec-Fetch-Site", "cross-site"}, http.StatusForbidden},
		{"the script of another port of this machine", p, "/api/events", []string{"Sec-Fetch-Site", "same-site"}, http.StatusForbidden},
		{"its own script", p, "/api/state", []string{"Sec-Fetch-Site", "same-origin"}, http.StatusOK},
		{"the address typed in", p, "/api/state", []string{"Sec-Fetch-Site", "none"}, http.StatusOK},
		{"a link to the page", p, "/", []string{"Sec-Fetch-Site", "cross-site"}, http.StatusOK},
	} {
		if w := ask(c.page, "GET", c.path, c.headers...); w.Code != c.want {
			t.Errorf("%s: %d, want %d", c.why, w.Code, c.want)
		}
	}
}

// listener reads a stream of server-sent events.
type listener struct {
	t      *testing.T
	status int
	lines  *bufio.Scanner
	close  func()
}

// message is one of them.
type message struct{ id, name, data string }

func listen(t *testing.T, url string, headers ...string) *listener {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	r, err := http.NewRequestWithContext(ctx, "GET", url+"/api/events", nil)
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i < len(headers); i += 2 {
		r.Header.Set(headers[i], headers[i+1])
	}
	resp, err := (&http.Client{Transport: &http.Transport{DisableKeepAlives: true}}).Do(r)
	if err != nil {
		t.Fatal(err)
	}
	l := &listener{t: t, status: resp.StatusCode, lines: bufio.NewScanner(resp.Body), close: func() { cancel(); resp.Body.Close() }}
	t.Cleanup(l.close)
	return l
}

// next is the next message; a heartbeat has the name "alive".
func (l *listener) next() (m message) {
	l.t.Helper()
	for l.lines.Scan() {
		field, value, _ := strings.Cut(l.lines.Text(), ": ")
		switch field {
		case "id":
			m.id = value
		case "event":
			m.name = value
		case "data":
			m.data = value
		case "":
			if value != "" {
				m.name = value
				continue
			}
			return m
		}
	}
	l.t.Fatalf("the stream ended: %v", l.lines.Err())
	return m
}

func (l *listener) event() (id string, e event.Event) {
	l.t.Helper()
	m := l.next()
	if m.name != "" {
		l.t.Fatalf("%+v, want an event", m)
	}
	if err := json.Unmarshal([]byte(m.data), &e); err != nil {
		l.t.Fatal(err)
	}
	return m.id, e
}

func (l *listener) named(name string) {
	l.t.Helper()
	if m := l.next(); m.name != name {
		l.t.Fatalf("%+v, want %s", m, name)
	}
}

func emit(_ *testing.T, hub *event.Hub, from, to int) {
	for i := from; i <= to; i++ {
		hub.Put(hub.Cursor(), event.Event{Operation: "one", Sequence: uint64(i), Summary: "line\nbreak", Time: time.Now()})
	}
}

// serve serves a page as the adapter does, with its timeouts, which streams must outlive.
func serve(t *testing.T, p *Page) string {
	t.Helper()
	s := httptest.NewUnstartedServer(p)
	s.Config.ReadTimeout, s.Config.WriteTimeout = 300*time.Millisecond, 300*time.Millisecond
	s.Start()
	t.Cleanup(func() {
		s.CloseClientConnections()
		s.Close()
	})
	return s.URL
}

func TestAStreamBeginsWithTheLatestEventsAndGoesOnWhereItWas(t *testing.T) {
	p, hub := newPage(t, &world{}, nil)
	url := serve(t, p)
	emit(t, hub, 1, 150)
	l := listen(t, url)
	for i := 51; i <= 150; i++ {
		if _, e := l.event(); e.Sequence != uint64(i) || e.Summary != "line\nbreak" {
			t.Fatalf("event %d instead of %d", e.Sequence, i)
		}
	}
	l.named("now")
	emit(t, hub, 151, 151)
	id, e := l.event()
	if e.Sequence != 151 {
		t.Fatalf("event %d came live", e.Sequence)
	}
	l.close()
	emit(t, hub, 152, 155)
	again := listen(t, url, "Last-Event-ID", id)
	for i := 152; i <= 155; i++ {
		if _, e := again.event(); e.Sequence != uint64(i) {
			t.Fatalf("event %d instead of %d after coming back", e.Sequence, i)
		}
	}
	again.named("now")
	// A position of an earlier process says nothing, and neither does one that nobody gave.
	for _, wrong := range []string{"EARLIER-3", p.boot + "-x", p.boot, p.boot + "-99999999999999999999999"} {
		if _, e := listen(t, url, "Last-Event-ID", wrong).event(); e.Sequence != 56 {
			t.Errorf("after %q the first event is %d", wrong, e.Sequence)
		}
	}
}

func TestAQuietStreamOutlivesTheServersTimeoutsAndSaysThatItLives(t *testing.T) {
	p, hub := newPage(t, &world{}, func(o *Options) { o.Heartbeat = 100 * time.Millisecond })
	l := listen(t, serve(t, p))
	l.named("now")
	for begun := time.Now(); time.Since(begun) < 900*time.Millisecond; {
		l.named("alive")
	}
	emit(t, hub, 1, 1)
	for {
		if m := l.next(); m.name == "" {
			break
		}
	}
	hub.Close()
	for l.lines.Scan() { // it ends
	}
	if err := l.lines.Err(); err != nil {
		t.Errorf("the stream of a hub that closed: %v", err)
	}
}

func TestOneListenerTooManyIsRefusedUntilAnotherLeaves(t *testing.T) {
	p, _ := newPage(t, &world{}, func(o *Options) { o.MaxStreams = 2; o.Heartbeat = 20 * time.Millisecond })
	url := serve(t, p)
	first := listen(t, url)
	first.named("now")
	listen(t, url).named("now")
	if l := listen(t, url); l.status != http.StatusServiceUnavailable {
		t.Fatalf("the third is answered with %d", l.status)
	}
	first.close()
	for deadline := time.Now().Add(patience); listen(t, url).status != http.StatusOK; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the place of one who left is not free")
		}
	}
}

func TestAListenerThatWasTooSlowIsToldThatEventsAreMissing(t *testing.T) {
	p, _ := newPage(t, &world{}, func(o *Options) { o.Events = event.NewHub(5, 0) })
	hub := p.Events
	url := serve(t, p)
	emit(t, hub, 1, 20)
	l := listen(t, url, "Last-Event-ID", p.boot+"-2")
	l.named("missed")
	if _, e := l.event(); e.Sequence != 16 {
		t.Errorf("event %d comes after that", e.Sequence)
	}
}
