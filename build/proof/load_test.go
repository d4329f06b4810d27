package proof

import (
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/golang-jwt/jwt/v5"

	"github.com/meshery/meshery-filters/internal/server/filterspb"
)

const hubKey = "a key for proofs that is longer than 32 bytes"

// token is one as Image Hub signs it, for ten minutes.
func token(t *testing.T, user, plan string) map[string]string {
	t.Helper()
	text, err := jwt.NewWithClaims(jwt.SigningMethodHS256, jwt.MapClaims{"sub": user, "plan": plan, "exp": time.Now().Add(10 * time.Minute).Unix()}).
		SignedString([]byte(hubKey))
	if err != nil {
		t.Fatal(err)
	}
	return map[string]string{"authorization": "Bearer " + text}
}

// withKey is a configuration file with the key that the limiter's documents refer to.
func withKey(t *testing.T) (flags []string) {
	t.Helper()
	dir := t.TempDir()
	key, file := filepath.Join(dir, "key"), filepath.Join(dir, "adapter.yaml")
	for path, text := range map[string]string{key: hubKey, file: fmt.Sprintf("secrets: {hub: {key: {file: %q}}}\n", key)} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return []string{"--config", file}
}

// limiter is a document of Image Hub's limiter. more is merged into its configuration.
func limiter(group string, paths ...string) string {
	return document("limiter", map[string]any{
		"target": target(group), "module": map[string]any{"builtin": "ratelimit"}, "phase": "authz", "failurePolicy": "reload",
		"config": map[string]any{
			"auth":  map[string]any{"mode": "jwt", "key": map[string]any{"$secret": map[string]any{"name": "hub", "key": "key"}}},
			"plans": map[string]any{"Personal": 10, "Load": 1_000_000},
			"paths": paths,
		},
	})
}

// state is how a chain answers: the status of each path, and the stamp on all of them.
type state struct {
	name   string
	status map[string]int
	stamp  string
}

// states is which of them may answer, over time.
type states struct {
	mu    sync.Mutex
	since []period
}

type period struct {
	from    time.Time
	allowed []state
}

// allow says which states may answer from a moment on.
func (s *states) allow(from time.Time, allowed ...state) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.since = append(s.since, period{from, allowed})
}

// judge wants an answer that a state gives which stood at some time between sending and answer.
func (s *states) judge(a Answer) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	var names []string
	for i, p := range s.since {
		if p.from.After(a.Done) || i+1 < len(s.since) && !s.since[i+1].from.After(a.Sent) {
			continue
		}
		for _, st := range p.allowed {
			if st.status[key(a.Request)] == a.Status && st.stamp == strings.Join(a.Header.Values("x-stamp"), ",") {
				return nil
			}
			names = append(names, st.name)
		}
	}
	return fmt.Errorf("answered with %d and stamp %q, as neither of %q does", a.Status, a.Header.Values("x-stamp"), names)
}

// key tells requests with a token from others.
func key(q Request) string {
	if q.Header != nil {
		return q.Path + " token"
	}
	return q.Path
}

// each combines addresses, paths and both kinds of connections.
func each(proxies []*proxy, paths []Request) (all []Request) {
	for _, q := range paths {
		for _, p := range proxies {
			for _, fresh := range []bool{true, false} {
				q.Addr, q.Fresh = p.addr, fresh
				all = append(all, q)
			}
		}
	}
	return all
}

// TestNoRequestFailsWhileChainsChangeUnderLoad takes about 75 seconds.
func TestNoRequestFailsWhileChainsChangeUnderLoad(t *testing.T) {
	onRealParts(t)
	const (
		group = "edge"
		rate  = 1100 // a second; the generator must reach 1,000
		side  = 10 * time.Second
		// Envoy says that it accepted a chain a moment before all of its workers have it; on a busy machine that
		// moment is long.
		linger = 5 * time.Second
	)
	a := newAdapter(t, withKey(t)...)
	proxies := a.startProxies(2, group, upstream(t), 2)
	answers := func(free, pull, gate, pulled int) map[string]int {
		return map[string]int{"/free": free, "/pull": pull, "/gate": gate, "/pull token": pulled}
	}
	none := state{"no filter", answers(200, 200, 200, 200), ""}
	limited := state{"the limiter", answers(200, 401, 200, 200), ""}
	gated := state{"the limiter with another path", answers(200, 401, 401, 200), ""}
	stamped := state{"the limiter and a second filter", answers(418, 401, 401, 200), "second"}
	// Before the limiter, so that the limiter's own answers pass it on their way back.
	second := func(more map[string]any) string {
		config := stamp("second")
		config["localReply"] = map[string]any{"path": "/free", "status": 418}
		spec := map[string]any{"phase": "authn"}
		maps.Copy(spec, more)
		return probe(t, "second", group, config, spec)
	}

	allowed := &states{}
	allowed.allow(time.Time{}, none)
	machine := WatchMachine(t.Context(), a.cmd.Process.Pid, proxies[0].PID(), proxies[1].PID())
	defer machine.Stop()
	load := Load{Rate: rate, Judge: allowed.judge, Requests: each(proxies, []Request{
		{Path: "/free"}, {Path: "/pull"}, {Path: "/gate"}, {Path: "/pull", Header: token(t, "load", "Load")}})}.Start(t.Context())
	defer load.Stop()
	wait := func() {
		select {
		case <-time.After(side):
		case <-t.Context().Done():
		}
	}
	type window struct {
		name     string
		from, to time.Duration
	}
	var windows []window
	now := none
	change := func(name string, next state, do func()) {
		from := load.Since()
		allowed.allow(time.Now(), now, next)
		do()
		allowed.allow(time.Now().Add(linger), next)
		windows = append(windows, window{name, from, load.Since()})
		now = next
		wait()
	}
	wait()
	change("first load", limited, func() { a.apply(limiter(group, "/pull")) })
	change("reconfigure", gated, func() { a.apply(limiter(group, "/pull", "/gate")) })
	change("second filter", stamped, func() { a.apply(second(nil)) })
	change("refused update", stamped, func() {
		last := a.outcome("custom", second(map[string]any{"delivery": map[string]any{"mode": "local", "localPath": t.TempDir()}}), false)
		if last.GetType() != filterspb.Event_ERROR || last.GetErrorCode() != "meshery-filters-1016" {
			t.Errorf("the refused update ended with %v", last)
		}
	})
	change("remove", none, func() { a.remove("limiter", "second") })
	r := load.Stop()
	machine.Stop()

	t.Logf("%s; other programs had %.0f%% of the machine", r, 100*machine.Others(r.Start, time.Now()))
	took := func(s Sample) time.Duration { return s.Done - s.Sent }
	for _, w := range windows {
		during := r.Between(w.from, w.to+time.Second)
		t.Logf("%-15s took %s; %d requests from its start to a second after its end: p50 %s p99 %s max %s", w.name, (w.to - w.from).Round(time.Millisecond),
			len(during), Percentile(during, 50, took), Percentile(during, 99, took), Percentile(during, 100, took))
	}
	fresh := 0
	for _, s := range r.Samples {
		if s.Fresh {
			fresh++
		}
	}
	if r.Failed > 0 {
		t.Errorf("%d of %d requests failed:\n%s", r.Failed, r.Sent, strings.Join(r.Failures, "\n"))
	}
	mustNotBeSlow(t, r, machine)
	if r.Rate() < 1000 {
		t.Errorf("the generator reached %.0f requests a second, want 1000", r.Rate())
	}
	if fresh*2 < r.Sent-1 {
		t.Errorf("%d of %d requests were on connections of their own, want half", fresh, r.Sent)
	}
	if sum := proxies[0].stat("config_fail") + proxies[1].stat("config_fail"); sum != 1 {
		t.Errorf("the Envoys refused %d chains, want 1", sum)
	}
}

// mustNotBeSlow fails the test for each slow request that this machine had time for. While other programs have half of
// it or more, a second does not tell anything about Envoy.
func mustNotBeSlow(t *testing.T, r Report, machine *Machine) {
	t.Helper()
	slow := 0
	for _, s := range r.Slow {
		if others := machine.Others(r.Start.Add(s.Sent), r.Start.Add(s.Done)); others < 0.5 {
			slow++
			if slow <= 10 {
				t.Errorf("a request %s after the start (fresh connection: %t) took %s, while other programs had %.0f%% of the machine",
					s.Sent.Round(time.Millisecond), s.Fresh, s.Done-s.Sent, 100*others)
			}
		}
	}
	if n := len(r.Slow) - slow; n > 0 {
		t.Logf("%d requests were slower than a second while other programs had half of the machine or more, and do not count", n)
	}
	if slow > 10 {
		t.Errorf("%d requests were slow", slow)
	}
}

func TestTheCheckOfAnswersNoticesAStatusThatNeitherChainGives(t *testing.T) {
	start := time.Now()
	at := func(seconds int) time.Time { return start.Add(time.Duration(seconds) * time.Second) }
	old, next := state{"old", map[string]int{"/": 200}, ""}, state{"new", map[string]int{"/": 401}, "new"}
	s := &states{}
	s.allow(time.Time{}, old)
	s.allow(at(10), old, next)
	s.allow(at(20), next)
	for _, c := range []struct {
		why        string
		sent, done int
		status     int
		stamp      string
		ok         bool
	}{
		{"the old one before the change", 1, 2, 200, "", true},
		{"the new one before the change", 1, 2, 401, "new", false},
		{"the new one for a request that the change overtook", 9, 11, 401, "new", true},
		{"the old one during the change", 12, 13, 200, "", true},
		{"the old one for a request from the change", 19, 21, 200, "", true},
		{"the old one after the change", 21, 22, 200, "", false},
		{"a status of neither", 12, 13, 503, "", false},
		{"the status of one with the stamp of the other", 12, 13, 200, "new", false},
	} {
		h := map[string][]string{}
		if c.stamp != "" {
			h["X-Stamp"] = []string{c.stamp}
		}
		err := s.judge(Answer{Request: Request{Path: "/"}, Sent: at(c.sent), Done: at(c.done), Status: c.status, Header: h})
		if (err == nil) != c.ok {
			t.Errorf("%s: %v", c.why, err)
		}
	}
}

func TestALoadCountsResetsSlowAndWrongAnswersAndItsOwnDelays(t *testing.T) {
	addr := upstream(t)
	l := Load{Rate: 200, Requests: []Request{{Addr: addr, Path: "/"}, {Addr: addr, Path: "/", Fresh: true}}}
	until := func(r *Run, n int) Report {
		eventually(t, "requests are sent", func() error {
			if r.Sent() < n {
				return fmt.Errorf("%d of %d", r.Sent(), n)
			}
			return nil
		})
		return r.Stop()
	}
	if r := until(l.Start(t.Context()), 50); r.Failed != 0 || r.Sent < 50 || len(r.Samples) != r.Sent {
		t.Errorf("against a good server: %s", r)
	}
	l.Slow = time.Nanosecond
	if r := until(l.Start(t.Context()), 10); len(r.Slow) != r.Sent || r.Failed != 0 {
		t.Errorf("answers slower than a nanosecond: %s", r)
	}
	l.Slow, l.Judge = 0, func(a Answer) error {
		if a.Request.Fresh {
			return fmt.Errorf("not this one")
		}
		return nil
	}
	if r := until(l.Start(t.Context()), 10); r.Failed < r.Sent/2-1 || r.Failed > r.Sent/2+1 {
		t.Errorf("every other answer is wrong: %s", r)
	}
	l.Judge, l.Requests = nil, []Request{{Addr: "127.0.0.1:1", Path: "/"}}
	if r := until(l.Start(t.Context()), 10); r.Failed != r.Sent || !strings.Contains(r.Failures[0], syscall.ECONNREFUSED.Error()) {
		t.Errorf("nobody listens: %s, %q", r, r.Failures)
	}
}
