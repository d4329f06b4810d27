package store

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/meshery/meshery-filters/internal/problem"
)

// tryNext takes what may run now.
func tryNext(t *testing.T, q Queue) (Entry, func(), bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	e, done, err := q.Next(ctx)
	if err != nil && !errors.Is(err, context.DeadlineExceeded) {
		t.Fatal(err)
	}
	return e, done, err == nil
}

func mustPut(t *testing.T, q Queue, id, keys string) string {
	t.Helper()
	behind, err := q.Put(t.Context(), Entry{ID: id, Keys: strings.Fields(keys), Data: []byte(id)})
	if err != nil {
		t.Fatal(err)
	}
	return behind
}

func TestEntriesRunInOrderOfConflict(t *testing.T) {
	for _, test := range []struct {
		story string
		put   string // id:key,key …
		wait  string // whom each waits behind
		steps string // what may run at once; -id is done
	}{
		{"no keys never wait", "a: b: c:", "- - -", "a b c"},
		{"other keys run side by side", "a:x b:y c:z", "- - -", "a b c"},
		{"one key is a line", "a:x b:x c:x", "- a b", "a -a b -b c"},
		{"an entry waits for all of its keys", "a:x b:y c:x,y d:y", "- - b c", "a b -b -a c -c d"},
		{"what waits keeps its place before those who come later", "a:x b:x,y c:y d:z", "- a b -", "a d -a b -b c"},
		{"a key named twice is one key", "a:x,x b:x", "- a", "a -a b"},
		{"two lines do not mix", "a:x b:y c:x d:y", "- - a b", "a b -b d -a c"},
	} {
		t.Run(test.story, func(t *testing.T) {
			q := NewQueue(10)
			waits := strings.Fields(test.wait)
			for i, field := range strings.Fields(test.put) {
				id, keys, _ := strings.Cut(field, ":")
				if behind := mustPut(t, q, id, strings.ReplaceAll(keys, ",", " ")); behind != strings.Trim(waits[i], "-") {
					t.Errorf("%s waits behind %q, want %s", id, behind, waits[i])
				}
			}
			done := map[string]func(){}
			for _, step := range strings.Fields(test.steps) {
				if id, ended := strings.CutPrefix(step, "-"); ended {
					if e, _, ok := tryNext(t, q); ok {
						t.Fatalf("%s ran before %s was done", e.ID, id)
					}
					done[id]()
					done[id]() // twice is as good as once
					continue
				}
				e, end, ok := tryNext(t, q)
				if !ok || e.ID != step || string(e.Data) != step {
					t.Fatalf("got %q (%v), want %s", e.ID, ok, step)
				}
				done[step] = end
			}
			if e, _, ok := tryNext(t, q); ok {
				t.Errorf("%s ran as well", e.ID)
			}
		})
	}
}

func TestAQueueIsBoundedByWhatIsNotDone(t *testing.T) {
	q := NewQueue(2)
	mustPut(t, q, "a", "x")
	mustPut(t, q, "b", "x")
	_, err := q.Put(t.Context(), Entry{ID: "c"})
	if !errors.Is(err, problem.QueueFull) {
		t.Fatalf("got %v", err)
	}
	_, done, err := q.Next(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := q.Put(t.Context(), Entry{ID: "c"}); !errors.Is(err, problem.QueueFull) {
		t.Fatalf("a running entry made room: %v", err)
	}
	done()
	mustPut(t, q, "c", "y")
}

func TestAClosedQueueGivesWhatItHasAndThenEnds(t *testing.T) {
	q := NewQueue(0)
	mustPut(t, q, "a", "x")
	mustPut(t, q, "b", "x")
	q.Close()
	q.Close()
	if _, err := q.Put(t.Context(), Entry{ID: "c"}); !errors.Is(err, problem.ShuttingDown) {
		t.Fatalf("put after close: %v", err)
	}
	_, done, err := q.Next(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, _, ok := tryNext(t, q); ok {
		t.Fatal("b ran beside a")
	}
	done()
	if e, _, err := q.Next(t.Context()); err != nil || e.ID != "b" {
		t.Fatalf("got %q, %v", e.ID, err)
	}
	if _, _, err := q.Next(t.Context()); !errors.Is(err, problem.ShuttingDown) {
		t.Fatalf("nothing is left to begin: %v", err)
	}
}

func TestDrainTakesOutWhatHasNotBegun(t *testing.T) {
	q := NewQueue(0)
	for _, id := range []string{"a", "b", "c"} {
		mustPut(t, q, id, "x")
	}
	_, done, err := q.Next(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() {
		_, _, err := q.Next(t.Context())
		ended <- err
	}()
	q.Close()
	var ids []string
	for _, e := range q.Drain() {
		ids = append(ids, e.ID)
	}
	if !slices.Equal(ids, []string{"b", "c"}) {
		t.Errorf("drained %v", ids)
	}
	if err := <-ended; !errors.Is(err, problem.ShuttingDown) {
		t.Errorf("a waiting worker got %v", err)
	}
	done()
	if rest := q.Drain(); len(rest) != 0 {
		t.Errorf("drained again: %v", rest)
	}
}

func TestManyWorkersNeverShareAKeyAndKeepItsOrder(t *testing.T) {
	const entries, keys, workers = 2000, 7, 8
	q := NewQueue(entries)
	var (
		running [keys]atomic.Int32
		mu      sync.Mutex
		order   [keys][]int
		group   sync.WaitGroup
	)
	for range workers {
		group.Go(func() {
			for {
				e, done, err := q.Next(t.Context())
				if err != nil {
					if !errors.Is(err, problem.ShuttingDown) {
						t.Error(err)
					}
					return
				}
				var number int
				fmt.Sscan(e.ID, &number)
				for _, key := range e.Keys {
					k := key[0] - 'a'
					if running[k].Add(1) != 1 {
						t.Errorf("two at once hold %s", key)
					}
					mu.Lock()
					order[k] = append(order[k], number)
					mu.Unlock()
				}
				for _, key := range e.Keys {
					running[key[0]-'a'].Add(-1)
				}
				done()
			}
		})
	}
	for i := range entries {
		var mine []string
		for range rand.IntN(3) {
			if key := string(rune('a' + rand.IntN(keys))); !slices.Contains(mine, key) {
				mine = append(mine, key)
			}
		}
		if _, err := q.Put(t.Context(), Entry{ID: fmt.Sprint(i), Keys: mine}); err != nil {
			t.Fatal(err)
		}
	}
	q.Close()
	group.Wait()
	for k := range order {
		if len(order[k]) == 0 || !slices.IsSorted(order[k]) {
			t.Errorf("key %c ran out of order", 'a'+k)
		}
	}
}
