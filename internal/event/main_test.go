package event

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// story is event i of an operation, from 1.
func story(operation string, i int) Event {
	return Event{Operation: operation, Sequence: uint64(i), Time: time.Now(), Summary: fmt.Sprintf("step %d", i)}
}

// taker is what the tests put events into.
type taker interface{ take(*testing.T, Event) }

func (h *Hub) take(_ *testing.T, e Event) { h.Put(h.Cursor(), e) }

func emit(t *testing.T, to taker, e Event) {
	t.Helper()
	to.take(t, e)
}

// eventually polls until the condition holds.
func eventually(t *testing.T, what string, holds func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !holds(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within 20s: %s", what)
		}
	}
}

func TestTextsAreCutAndMadeValid(t *testing.T) {
	e := Event{Summary: "bad \xff byte", Details: strings.Repeat("日", 100_000), Cause: strings.Repeat("c", maxText)}.Bounded()
	if e.Summary != "bad ? byte" {
		t.Errorf("summary: %q", e.Summary)
	}
	if len(e.Details) > maxDetails || !strings.HasPrefix(e.Details, "日日") || strings.Contains(e.Details, "?") {
		t.Errorf("details: %d bytes, ends %q", len(e.Details), e.Details[len(e.Details)-50:])
	}
	if kept := strings.Count(e.Details, "日"); !strings.HasSuffix(e.Details, fmt.Sprintf("日… (%d bytes more)", 300_000-3*kept)) {
		t.Errorf("ends %q", e.Details[len(e.Details)-50:])
	}
	if len(e.Cause) != maxText {
		t.Errorf("a text at the limit was changed to %d bytes", len(e.Cause))
	}
}
