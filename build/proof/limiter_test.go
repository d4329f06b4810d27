package proof

import (
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// hub is Image Hub's API behind an Envoy, as the imagehub operation starts it.
type hub struct {
	*proxy
	t *testing.T
}

// signUp makes a user and returns a token.
func (h hub) signUp(user, plan string) map[string]string {
	h.t.Helper()
	client := &http.Client{Timeout: 20 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	post := func(path, body string) string {
		h.t.Helper()
		resp, err := client.Post("http://"+h.addr+path, "application/json", strings.NewReader(body))
		if err != nil {
			h.t.Fatal(err)
		}
		defer resp.Body.Close()
		var answer struct{ Token string }
		if resp.StatusCode != http.StatusOK {
			h.t.Fatalf("%s answers %s", path, resp.Status)
		}
		decodeJSON(h.t, resp.Body, &answer)
		return answer.Token
	}
	post("/signup", fmt.Sprintf(`{"username": %q, "password": "a long password", "plan": %q}`, user, plan))
	return map[string]string{"authorization": "Bearer " + post("/auth", fmt.Sprintf(`{"username": %q, "password": "a long password"}`, user))}
}

// workers are the workers of Envoy that have open connections.
func (p *proxy) workers() (busy int) {
	p.t.Helper()
	stats, err := p.Admin().Stats(p.t.Context(), `^listener\..*worker_[0-9]+\.downstream_cx_active$`)
	if err != nil {
		p.t.Fatal(err)
	}
	for name, n := range stats {
		if n > 0 && !strings.HasPrefix(name, "listener.admin") {
			busy++
		}
	}
	return busy
}

func TestALimiterCountsExactlyAndAReconfigurationKeepsItsCounts(t *testing.T) {
	onRealParts(t)
	t.Parallel()
	a := newAdapter(t)
	_, at, ok := strings.Cut(a.operate("imagehub", "").GetSummary(), "http://")
	if !ok {
		t.Fatal("the imagehub operation does not say where Image Hub is")
	}
	p := startProxy(t, proxyOptions{id: "default-1", group: "default", upstream: at, xds: a.addresses.XDS, workers: 2})
	ada := hub{p, t}.signUp("ada", "Personal")
	a.operate("imagehub_rate_limit", "")

	// Eight connections that both workers share; the kernel deals them out, so it may take more than one try.
	var wires []*wire
	hangUp := func() {
		for _, w := range wires {
			w.conn.Close()
		}
		wires = nil
	}
	defer hangUp()
	eventually(t, "both workers have connections", func() error {
		hangUp()
		for range 8 {
			w, err := connect(p.addr, time.Now().Add(patience))
			if err != nil {
				t.Fatal(err)
			}
			wires = append(wires, w)
			if status, _, _, err := w.exchange(Request{Addr: p.addr, Path: "/healthz"}, time.Now().Add(patience)); err != nil || status != http.StatusOK {
				t.Fatalf("before the pulls: %d, %v", status, err)
			}
		}
		if n := p.workers(); n != 2 {
			return fmt.Errorf("%d have", n)
		}
		return nil
	})

	// 200 requests, 25 over each connection at the same time. A token comes back each 6 s, which is longer.
	var (
		mu      sync.Mutex
		passed  int
		limited int
		clients sync.WaitGroup
	)
	begun := time.Now()
	for _, w := range wires {
		clients.Go(func() {
			for range 25 {
				status, h, _, err := w.exchange(Request{Addr: p.addr, Path: "/pull", Header: ada}, time.Now().Add(patience))
				mu.Lock()
				switch {
				case err != nil:
					t.Error(err)
				case status == http.StatusOK:
					passed++
				case status == http.StatusTooManyRequests && h.Get("retry-after") != "" && h.Get("x-ratelimit-limit") == strconv.Itoa(10):
					limited++
				default:
					t.Errorf("a pull is answered with %d and %v", status, h)
				}
				mu.Unlock()
			}
		})
	}
	clients.Wait()
	took := time.Since(begun)
	t.Logf("%d of 200 pulls passed and %d were limited, in %s", passed, limited, took.Round(time.Millisecond))
	if passed+limited != 200 {
		t.Errorf("%d of 200 pulls were answered as they should be", passed+limited)
	}
	if most := 10 + int(took/(6*time.Second)); passed < 10 || passed > most {
		t.Errorf("%d pulls of a Personal user passed in %s, want exactly %d", passed, took, most)
	}

	// A change of the configuration gives nobody a new bucket.
	used := func(after string, status int) {
		t.Helper()
		n := 0
		for range 20 {
			if got, _ := p.answer("/pull", ada); got == http.StatusOK {
				n++
			} else if got != status {
				t.Errorf("after %s a pull is answered with %d", after, got)
			}
		}
		mu.Lock()
		defer mu.Unlock()
		passed += n
		if most := 10 + int(time.Since(begun)/(6*time.Second)); passed > most {
			t.Errorf("after %s %d pulls have passed, want at most %d in %s", after, passed, most, time.Since(begun))
		}
		t.Logf("after %s %d of 20 pulls passed", after, n)
	}
	reconfigured := func(team int) string {
		return document("imagehub-rate-limit", map[string]any{
			"module": map[string]any{"builtin": "ratelimit"}, "phase": "authz", "failurePolicy": "reload",
			"config": map[string]any{
				"plans": map[string]any{"Personal": 10, "Team": team},
				"auth":  map[string]any{"mode": "jwt", "key": map[string]any{"$secret": map[string]any{"name": "imagehub", "key": "token-key"}}},
			}})
	}
	used("the burst", http.StatusTooManyRequests)
	a.apply(reconfigured(50))
	used("reconfiguring", http.StatusTooManyRequests)
	a.remove("imagehub-rate-limit")
	for range 20 {
		if status, _ := p.answer("/pull", ada); status != http.StatusOK {
			t.Errorf("without the limiter a pull is answered with %d", status)
		}
	}
	// With the last filter of its VM id Envoy drops the counts, so that a limiter that is applied anew may begin anew. It
	// is a limiter, all the same.
	begun, passed = time.Now(), 0
	a.operate("imagehub_rate_limit", "")
	used("removing and applying anew", http.StatusTooManyRequests)
	if status, _ := p.answer("/pull", hub{p, t}.signUp("bob", "Personal")); status != http.StatusOK {
		t.Errorf("another user's pull is answered with %d", status)
	}
}
