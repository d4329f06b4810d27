package proof

import (
	"context"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// history is every chain that was ever offered, each as the stamps that its filters put on a response. A later chain
// has a later number.
type history struct {
	mu      sync.Mutex
	numbers map[string]int
	seen    []int // responses of each chain
}

// add must come before the chain is offered.
func (h *history) add(stamps []string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.numbers == nil {
		h.numbers = map[string]int{}
	}
	h.numbers[strings.Join(stamps, " ")] = len(h.seen)
	h.seen = append(h.seen, 0)
}

// place finds the one chain that a response went through.
func (h *history) place(header http.Header) (int, error) {
	// Responses meet filters in reverse, and each adds its stamp behind the others.
	stamps := slices.Clone(header.Values("x-stamp"))
	slices.Reverse(stamps)
	h.mu.Lock()
	defer h.mu.Unlock()
	n, ok := h.numbers[strings.Join(stamps, " ")]
	if !ok {
		return 0, fmt.Errorf("a response passed %q, which was never a chain", stamps)
	}
	h.seen[n]++
	return n, nil
}

func (h *history) distinct() (n int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, responses := range h.seen {
		if responses > 0 {
			n++
		}
	}
	return n
}

func TestTheCheckOfStampsNoticesMixedChains(t *testing.T) {
	h := &history{}
	h.add(nil)
	h.add([]string{"v1/a", "v1/b"})
	h.add([]string{"v2/a", "v2/m", "v2/b"})
	for _, c := range []struct {
		why    string
		stamps []string // as they stand on the response
		ok     bool
	}{
		{"no filter", nil, true},
		{"the whole first chain", []string{"v1/b", "v1/a"}, true},
		{"the whole second chain", []string{"v2/b", "v2/m", "v2/a"}, true},
		{"a filter of each", []string{"v1/b", "v2/a"}, false},
		{"the new one inserted into the old chain", []string{"v1/b", "v2/m", "v1/a"}, false},
		{"the first filter only", []string{"v1/a"}, false},
		{"the wrong order", []string{"v1/a", "v1/b"}, false},
		{"a filter twice", []string{"v1/b", "v1/a", "v1/a"}, false},
		{"a chain that never was", []string{"v3/b", "v3/a"}, false},
	} {
		if _, err := h.place(http.Header{"X-Stamp": c.stamps}); (err == nil) != c.ok {
			t.Errorf("%s: %q gives %v", c.why, c.stamps, err)
		}
	}
	if got := h.distinct(); got != 3 {
		t.Errorf("%d chains seen, want 3", got)
	}
}

func TestEveryRequestMeetsOneWholeChain(t *testing.T) {
	onRealParts(t)
	const want, least = 100_000, 20
	a := newAdapter(t)
	const group = "edge"
	proxies := a.startProxies(2, group, upstream(t), 2)

	seen := &history{}
	seen.add(nil)
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	var (
		answered atomic.Int64
		fresh    atomic.Int64
		mixed    atomic.Int64
		clients  sync.WaitGroup
		told     sync.Once
	)
	fail := func(format string, args ...any) {
		mixed.Add(1)
		told.Do(func() { t.Errorf(format, args...) })
	}
	for i := range 16 {
		q := Request{Addr: proxies[i%2].addr, Path: "/", Fresh: i%4 < 2}
		clients.Go(func() {
			// A kept-alive connection belongs to one worker of one Envoy, which exchanges its chain at one moment: the
			// connection must never meet an older chain after a newer one.
			newest := 0
			own := pool{}
			defer own.close()
			var kept *wire
			for ctx.Err() == nil {
				deadline := time.Now().Add(10 * time.Second)
				var status int
				var h http.Header
				var err error
				if q.Fresh {
					status, h, err = own.exchange(q, deadline)
					fresh.Add(1)
				} else {
					if kept == nil {
						if kept, err = connect(q.Addr, deadline); err != nil {
							fail("connect: %v", err)
							return
						}
						defer func() { kept.conn.Close() }()
					}
					status, h, _, err = kept.exchange(q, deadline)
				}
				answered.Add(1)
				if err != nil || status != http.StatusOK {
					fail("a request ended with status %d, %v", status, err)
					return
				}
				n, err := seen.place(h)
				if err != nil {
					fail("%v", err)
					continue
				}
				if !q.Fresh {
					if n < newest {
						fail("a connection met chain %d after chain %d", n, newest)
					}
					newest = n
				}
			}
		})
	}

	// Each change makes a chain whose filters all have a new stamp, in one body: they change at once or not at all.
	version := 0
	put := func(names []string, priorities []int) {
		version++
		var stamps, documents []string
		for i, n := range names {
			s := fmt.Sprintf("v%d/%s", version, n)
			stamps = append(stamps, s)
			documents = append(documents, probe(t, n, group, stamp(s), map[string]any{"priority": priorities[i]}))
		}
		seen.add(stamps)
		a.apply(documents...)
	}
	rounds := 0
	for ; (answered.Load() < int64(want) || seen.distinct() < least) && mixed.Load() == 0; rounds++ {
		if rounds == 200 {
			t.Fatalf("%d answers and %d chains seen after %d rounds", answered.Load(), seen.distinct(), rounds)
		}
		put([]string{"a", "z"}, []int{20, 10})
		put([]string{"a", "m", "z"}, []int{20, 15, 10}) // one more in the middle
		put([]string{"z", "m", "a"}, []int{30, 15, 5})  // another order
		put([]string{"z", "m", "a"}, []int{30, 15, 5})  // all reconfigured
		seen.add([]string{fmt.Sprintf("v%d/z", version), fmt.Sprintf("v%d/a", version)})
		a.remove("m")
		put([]string{"q", "z", "a"}, []int{40, 30, 5}) // one more at the front
		seen.add(nil)
		a.remove("q", "z", "a")
	}
	stop()
	clients.Wait()
	t.Logf("%d responses, %d of them on connections of their own, %d mixed; %d of %d chains seen, in %d changes",
		answered.Load(), fresh.Load(), mixed.Load(), seen.distinct(), len(seen.seen), rounds*6)
	if f := fresh.Load(); f*10 < answered.Load()*3 {
		t.Errorf("only %d of %d requests were on connections of their own", f, answered.Load())
	}
}
