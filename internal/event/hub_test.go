package event

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/meshery/meshery-filters/internal/problem"
)

// next expects an event.
func next(t *testing.T, s *Subscription) Event {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	e, err := s.Next(ctx)
	if err != nil {
		t.Fatal(err)
	}
	return e
}

func TestASubscriberStartsWhereItAsks(t *testing.T) {
	h := NewHub(0, 0)
	emit(t, h, story("a", 1))
	emit(t, h, story("b", 1))
	cursor := h.Cursor()
	emit(t, h, story("a", 2))

	all := h.Subscribe(h.Oldest(), "")
	if one, two, three := next(t, all), next(t, all), next(t, all); one.Operation+two.Operation+three.Operation != "aba" {
		t.Errorf("all: %v %v %v", one, two, three)
	}
	if all.Cursor() != h.Cursor() {
		t.Errorf("stands at %d of %d", all.Cursor(), h.Cursor())
	}
	if e := next(t, h.Subscribe(cursor, "")); e.Sequence != 2 {
		t.Errorf("from the cursor: %v", e)
	}
	only := h.Subscribe(0, "a")
	if one, two := next(t, only), next(t, only); one.Sequence != 1 || two.Sequence != 2 || two.Operation != "a" {
		t.Errorf("of one operation: %v %v", one, two)
	}
	late := h.Subscribe(1000, "")
	emit(t, h, story("c", 1))
	if e := next(t, late); e.Operation != "c" {
		t.Errorf("from a position to come: %v", e)
	}
}

func TestNextEndsWithItsContextAndWithTheHub(t *testing.T) {
	h := NewHub(0, 0)
	emit(t, h, story("a", 1))
	ctx, cancel := context.WithCancel(t.Context())
	waiting, left := h.Subscribe(0, ""), h.Subscribe(h.Cursor(), "")
	ended := make(chan error)
	go func() {
		_, err := left.Next(ctx)
		ended <- err
	}()
	cancel()
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Errorf("a reader that left got %v", err)
	}
	go func() {
		_, err := h.Subscribe(h.Cursor(), "").Next(t.Context())
		ended <- err
	}()
	h.Close()
	h.Close()
	if err := <-ended; !errors.Is(err, problem.ShuttingDown) {
		t.Errorf("a waiting reader got %v", err)
	}
	if e := next(t, waiting); e.Operation != "a" {
		t.Errorf("what was held is gone: %v", e)
	}
	if _, err := waiting.Next(t.Context()); !errors.Is(err, problem.ShuttingDown) {
		t.Errorf("after all was read: %v", err)
	}
	h.Put(h.Cursor(), story("a", 2))
	if h.Cursor() != 1 {
		t.Error("an event was taken after the end")
	}
}

func TestASlowSubscriberIsToldHowManyItMissedAndGoesOn(t *testing.T) {
	for story, test := range map[string]struct {
		maxEvents, maxBytes, details int
		oldest                       int // of 10
	}{
		"bounded by events": {maxEvents: 3, oldest: 8},
		"bounded by bytes":  {maxBytes: 4 * 3000, details: 2600, oldest: 7},
		"one that is larger than the bound is held alone": {maxBytes: 100, details: 1000, oldest: 10},
	} {
		t.Run(story, func(t *testing.T) {
			h := NewHub(test.maxEvents, test.maxBytes)
			s, other := h.Subscribe(0, ""), h.Subscribe(0, "other")
			for i := range 10 {
				emit(t, h, Event{Operation: "op", Sequence: uint64(i + 1), Details: strings.Repeat("d", test.details)})
			}
			emitted := test.oldest - 1
			_, err := s.Next(t.Context())
			if !errors.Is(err, problem.EventsMissed) || !strings.Contains(err.Error(), fmt.Sprintf("the %d events", emitted)) {
				t.Fatalf("got %v, want %d missed", err, emitted)
			}
			for i := test.oldest; i <= 10; i++ {
				if e := next(t, s); e.Sequence != uint64(i) {
					t.Errorf("got %d, want %d", e.Sequence, i)
				}
			}
			if _, err := other.Next(t.Context()); !errors.Is(err, problem.EventsMissed) {
				t.Errorf("a reader of one operation got %v", err)
			}
			if missed, times := h.Missed(); missed != uint64(2*emitted) || times != 2 {
				t.Errorf("%d events are counted as missed in %d times, want %d in 2", missed, times, 2*emitted)
			}
		})
	}
}

func TestManySubscribersGetEveryEventInOrder(t *testing.T) {
	const subscribers, operations, events = 60, 10, 300
	h := NewHub(operations*events, 0)
	var readers, writers sync.WaitGroup
	var left atomic.Int32
	for i := range subscribers {
		operation := ""
		want := operations * events
		if i%2 == 1 {
			operation, want = fmt.Sprint("op", i%operations), events
		}
		s := h.Subscribe(0, operation)
		readers.Go(func() {
			seen := map[string]uint64{}
			for n := 0; n < want; n++ {
				if i%10 == 9 && n == want/2 {
					left.Add(1)
					return
				}
				e, err := s.Next(t.Context())
				if err != nil {
					t.Error(err)
					return
				}
				if seen[e.Operation]++; e.Sequence != seen[e.Operation] {
					t.Errorf("subscriber %d: event %d of %s came as number %d", i, e.Sequence, e.Operation, seen[e.Operation])
					return
				}
				if operation != "" && e.Operation != operation {
					t.Errorf("subscriber %d asked for %s and got %s", i, operation, e.Operation)
				}
				if i%10 == 5 && n%50 == 0 {
					time.Sleep(time.Millisecond) // a slow one
				}
			}
		})
	}
	var turn sync.Mutex // there is one log, so one writer at a time
	for o := range operations {
		writers.Go(func() {
			for i := range events {
				turn.Lock()
				emit(t, h, story(fmt.Sprint("op", o), i+1))
				turn.Unlock()
			}
		})
	}
	writers.Wait()
	readers.Wait()
	if left.Load() != subscribers/10 {
		t.Errorf("%d left", left.Load())
	}
}

func TestReadersThatFallBehindMissExactlyWhatTheyAreTold(t *testing.T) {
	const events = 20_000
	h := NewHub(64, 0)
	var group sync.WaitGroup
	for range 20 {
		s := h.Subscribe(0, "")
		group.Go(func() {
			missed, read, last := 0, 0, uint64(0)
			for last < events {
				e, err := s.Next(t.Context())
				if errors.Is(err, problem.EventsMissed) {
					var n int
					if _, err := fmt.Sscanf(problem.Of(err).Details, "the %d events", &n); err != nil {
						t.Error(err)
					}
					missed += n
					continue
				}
				if err != nil {
					t.Error(err)
					return
				}
				read++
				last = e.Sequence
				if uint64(missed+read) != last {
					t.Errorf("read %d and missed %d up to event %d", read, missed, last)
					return
				}
				if rand.IntN(500) == 0 {
					time.Sleep(time.Millisecond)
				}
			}
		})
	}
	for i := range events {
		emit(t, h, story("op", i+1))
	}
	group.Wait()
}

func TestMemoryStaysBoundedWhateverReadersDo(t *testing.T) {
	const bound = 4 << 20
	heap := func() int {
		var m runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&m)
		return int(m.HeapAlloc)
	}
	h := NewHub(0, bound)
	before := heap()
	var never []*Subscription
	for i := range 100_000 { // 200 MB in all
		if i%1000 == 0 {
			never = append(never, h.Subscribe(h.Cursor(), ""))
			h.Subscribe(h.Cursor(), "").read() // begins to wait, and leaves
		}
		emit(t, h, Event{Operation: "op", Sequence: uint64(i + 1), Details: strings.Repeat("d", 2000)})
	}
	if grown := heap() - before; grown > 2*bound {
		t.Errorf("the heap grew by %d bytes with a bound of %d", grown, bound)
	}
	runtime.KeepAlive(never)
	runtime.KeepAlive(h)
}

// The latency is from Emit to the return of Next in each subscriber.
func BenchmarkHub(b *testing.B) {
	for _, subscribers := range []int{1, 100, 1000} {
		b.Run(fmt.Sprint("subscribers=", subscribers), func(b *testing.B) {
			h := NewHub(0, 0)
			latencies := make([][]time.Duration, subscribers)
			var group, got sync.WaitGroup
			for i := range subscribers {
				s := h.Subscribe(0, "")
				latencies[i] = make([]time.Duration, 0, b.N)
				group.Go(func() {
					for range b.N {
						e, err := s.Next(b.Context())
						if err != nil {
							b.Error(err)
							return
						}
						latencies[i] = append(latencies[i], time.Since(e.Time))
						got.Done()
					}
				})
			}
			b.ResetTimer()
			for i := range b.N {
				got.Add(subscribers)
				h.Put(h.Cursor(), story("op", i+1))
				got.Wait()
			}
			b.StopTimer()
			group.Wait()
			all := slices.Concat(latencies...)
			slices.Sort(all)
			b.ReportMetric(float64(all[len(all)/2].Microseconds()), "µs-p50")
			b.ReportMetric(float64(all[len(all)*99/100].Microseconds()), "µs-p99")
		})
	}
}
