package event

import (
	"context"
	"fmt"
	"testing"
	"time"
)

func TestAfterARestartTheHubHoldsTheSameEventsAtTheSamePositions(t *testing.T) {
	state := t.TempDir()
	s := openStore(t, state)
	hub := NewHub(10, 0)
	l, err := NewLog(t.Context(), s.Log(), hub)
	if err != nil {
		t.Fatal(err)
	}
	var last uint64
	for i := range 25 {
		e := story("op", i+1)
		e.Time = e.Time.Round(0)
		if last, err = l.Append(t.Context(), e, last); err != nil {
			t.Fatal(err)
		}
	}
	sub := hub.Subscribe(hub.Oldest(), "")
	var before []Event
	for range 10 {
		before = append(before, next(t, sub))
	}
	if hub.Oldest() != 16 || hub.Cursor() != 26 || before[0].Sequence != 16 {
		t.Fatalf("it holds %d to %d, from event %d", hub.Oldest(), hub.Cursor(), before[0].Sequence)
	}
	s.Close()
	s = openStore(t, state)
	hub = NewHub(10, 0)
	if l, err = NewLog(t.Context(), s.Log(), hub); err != nil {
		t.Fatal(err)
	}
	if hub.Oldest() != 16 || hub.Cursor() != 26 {
		t.Fatalf("it holds %d to %d", hub.Oldest(), hub.Cursor())
	}
	sub = hub.Subscribe(hub.Oldest(), "")
	for i := range 10 {
		if e := next(t, sub); fmt.Sprint(e) != fmt.Sprint(before[i]) && !e.Time.Equal(before[i].Time) {
			t.Errorf("%+v became %+v", before[i], e)
		}
	}
	events, at, err := l.Of(t.Context(), "op")
	if err != nil || at != last || len(events) != 25 || events[24].Sequence != 25 {
		t.Errorf("%d events up to %d, %v", len(events), at, err)
	}
}

func TestAnotherAdaptersEventsReachTheHubInOrder(t *testing.T) {
	s := openStore(t, t.TempDir())
	hub := NewHub(0, 0)
	mine, err := NewLog(t.Context(), s.Log(), hub)
	if err != nil {
		t.Fatal(err)
	}
	other, err := NewLog(t.Context(), s.Log(), NewHub(0, 0))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- mine.Run(ctx) }()
	sub := hub.Subscribe(hub.Cursor(), "")
	var last [2]uint64
	for i := range 100 {
		for w, l := range []*Log{mine, other} {
			if last[w], err = l.Append(t.Context(), Event{Operation: fmt.Sprint("op", w), Sequence: uint64(i + 1), Time: time.Now()}, last[w]); err != nil {
				t.Fatal(err)
			}
		}
	}
	var seen [2]uint64
	for range 200 {
		e := next(t, sub)
		w := e.Operation[2] - '0'
		if seen[w]++; e.Sequence != seen[w] {
			t.Fatalf("event %d of %s came as number %d", e.Sequence, e.Operation, seen[w])
		}
	}
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}
