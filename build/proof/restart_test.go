package proof

import (
	"fmt"
	"net/http"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

func TestAnAdapterThatEndsAndComesBackChangesNothingInItsProxies(t *testing.T) {
	onRealParts(t)
	const group = "edge"
	a := newAdapter(t, append(withKey(t), fixedPorts(t)...)...)
	backend := upstream(t)
	proxies := a.startProxies(2, group, backend, 2)
	a.apply(limiter(group, "/pull"), probe(t, "mark", group, stamp("kept"), map[string]any{"phase": "authn"}))
	chain, err := a.chain(group)
	if err != nil {
		t.Fatal(err)
	}

	// A Personal user has 10 pulls and one more each 6 s, at each Envoy. If anything forgot what was used, they would
	// get 10 more.
	user := token(t, "ada", "Personal")
	var passed [2]atomic.Int64
	begun := time.Now()
	machine := WatchMachine(t.Context(), a.cmd.Process.Pid, proxies[0].PID(), proxies[1].PID())
	defer machine.Stop()
	load := Load{Rate: 300, Requests: each(proxies, []Request{{Path: "/free"}, {Path: "/pull"}, {Path: "/pull", Header: user}}),
		Judge: func(a Answer) error {
			want := map[string]int{"/free": 200, "/pull": 401, "/pull token": 429}[key(a.Request)]
			if a.Status == http.StatusOK && key(a.Request) == "/pull token" {
				for i, p := range proxies {
					if a.Request.Addr == p.addr {
						passed[i].Add(1)
					}
				}
				want = http.StatusOK
			}
			if a.Status != want || a.Header.Get("x-stamp") != "kept" {
				return fmt.Errorf("answered with %d and stamp %q, want %d and kept", a.Status, a.Header.Get("x-stamp"), want)
			}
			return nil
		}}.Start(t.Context())
	defer load.Stop()
	more := func(n int) {
		t.Helper()
		want := load.Sent() + n
		eventually(t, "requests are sent", func() error {
			if got := load.Sent(); got < want {
				return fmt.Errorf("%d of %d", got, want)
			}
			return nil
		})
	}
	more(300) // so that the user's pulls are used up

	type before struct {
		version, at string
		reloads     uint64
	}
	var was []before
	for _, p := range proxies {
		version, at := p.updated()
		if version != chain.GetVersion() {
			t.Fatalf("%s has version %s, and the adapter says %s", p.id, version, chain.GetVersion())
		}
		was = append(was, before{version, at, p.stat("config_reload")})
	}
	same := func(when string) {
		t.Helper()
		for i, p := range proxies {
			version, at := p.updated()
			if now := (before{version, at, p.stat("config_reload")}); now != was[i] {
				t.Errorf("%s: %s has %+v, and had %+v", when, p.id, now, was[i])
			}
		}
	}
	for i, signal := range []syscall.Signal{syscall.SIGTERM, syscall.SIGKILL} {
		a.stopWith(signal)
		more(300)
		same("while the adapter is away after " + signal.String())
		// One that starts while nobody can give it a chain keeps its listener closed.
		early := startProxy(t, proxyOptions{id: fmt.Sprintf("early-%d", i), group: group, upstream: backend, xds: a.addresses.XDS, closed: true})
		if _, _, err := get(early.addr, "/pull", nil); err == nil {
			t.Errorf("%s answers before it has a chain", early.id)
		}
		a.start()
		machine.Own(a.cmd.Process.Pid)
		late := startProxy(t, proxyOptions{id: fmt.Sprintf("late-%d", i), group: group, upstream: backend, xds: a.addresses.XDS, closed: true})
		for _, p := range []*proxy{early, late} {
			machine.Own(p.PID())
			eventually(t, p.id+" answers", func() error {
				status, h, err := get(p.addr, "/pull", nil)
				if err == nil && (status != http.StatusUnauthorized || h.Get("x-stamp") != "kept") {
					t.Fatalf("the first answer of %s is %d with stamp %q: it has not passed the chain", p.id, status, h.Get("x-stamp"))
				}
				return err
			})
		}
		a.allRun(group, 4+2*i)
		more(300)
		same("after " + signal.String())
		if now, err := a.chain(group); err != nil || now.GetVersion() != chain.GetVersion() {
			t.Errorf("after %s the adapter has version %s (%v), and had %s", signal, now.GetVersion(), err, chain.GetVersion())
		}
	}
	most := 10 + int64(time.Since(begun)/(6*time.Second)) + 1
	r := load.Stop()
	machine.Stop()
	t.Log(r)
	if r.Failed > 0 {
		t.Errorf("%d of %d requests failed:\n%s", r.Failed, r.Sent, strings.Join(r.Failures, "\n"))
	}
	mustNotBeSlow(t, r, machine)
	for i := range passed {
		if n := passed[i].Load(); n < 10 || n > most {
			t.Errorf("%d pulls of one Personal user passed %s, want 10 to %d", n, proxies[i].id, most)
		}
	}
	// It works on as before.
	a.apply(probe(t, "mark", group, stamp("new"), map[string]any{"phase": "authn"}))
	if _, h := proxies[0].answer("/free", nil); h.Get("x-stamp") != "new" {
		t.Errorf("after the restarts a change has no effect: stamp %q", h.Get("x-stamp"))
	}
}
