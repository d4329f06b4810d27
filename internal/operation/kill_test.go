package operation_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/meshery/meshery-filters/internal/audit"
	"github.com/meshery/meshery-filters/internal/event"
	"github.com/meshery/meshery-filters/internal/operation"
	"github.com/meshery/meshery-filters/internal/plan"
	"github.com/meshery/meshery-filters/internal/store"
)

// fuse ends the process, as kill -9 does, just before or just after the nth thing that has an effect.
type fuse struct {
	left atomic.Int64
}

func (f *fuse) burn() {
	if f.left.Add(-1) == 0 {
		_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
		select {}
	}
}

type burningQueue struct {
	store.Queue
	*fuse
}

func (q burningQueue) Put(ctx context.Context, e store.Entry) (string, bool, error) {
	q.burn()
	behind, again, err := q.Queue.Put(ctx, e)
	q.burn()
	return behind, again, err
}

func (q burningQueue) Next(ctx context.Context) (store.Claim, error) {
	c, err := q.Queue.Next(ctx)
	if err != nil {
		return nil, err
	}
	q.burn()
	return burningClaim{c, q.fuse}, nil
}

type burningClaim struct {
	store.Claim
	*fuse
}

func (c burningClaim) Done(ctx context.Context) error {
	c.burn()
	err := c.Claim.Done(ctx)
	c.burn()
	return err
}

type burningEvents struct {
	operation.Events
	*fuse
}

func (l burningEvents) Append(ctx context.Context, e event.Event, after uint64) (uint64, error) {
	l.burn()
	position, err := l.Events.Append(ctx, e, after)
	l.burn()
	return position, err
}

type burningBackend struct {
	operation.Backend
	*fuse
}

func (b burningBackend) Apply(ctx context.Context, p plan.Plan) ([]plan.Change, error) {
	b.burn()
	changes, err := b.Backend.Apply(ctx, p)
	b.burn()
	return changes, err
}

func (b burningBackend) Commit(ctx context.Context, p plan.Plan) error {
	b.burn()
	err := b.Backend.Commit(ctx, p)
	b.burn()
	return err
}

type burningAudit struct {
	operation.Audit
	*fuse
}

// What comes after each has a moment of its own before it.
func (a burningAudit) Accepted(e audit.Entry) error { a.burn(); return a.Audit.Accepted(e) }
func (a burningAudit) Ended(e audit.Entry) error    { a.burn(); return a.Audit.Ended(e) }

// script is what the killed process was asked to do: filters come, change, move, wait for each other and go.
func script() []operation.Request {
	all := []operation.Request{
		apply(doc("a", "wait: {for: none}") + "---\n" + doc("b", "target: {kind: ProxyGroup, name: other}")),
		apply(doc("a", "priority: 7")),
		remove(doc("b")),
		apply(doc("c") + "---\n" + doc("d", "target: {kind: ProxyGroup, name: other}")),
		apply(doc("c", "target: {kind: ProxyGroup, name: other}")),
		remove(doc("nobody")),
	}
	for i := range all {
		all[i].ID = fmt.Sprintf("op-%d", i)
		all[i].Username = "me"
	}
	return all
}

type outcome struct {
	Stories map[string][]event.Event
	Chains  map[string]string
	Audit   []audit.Entry
	Took    int64 // milliseconds from the start to the last end
}

// TestWhateverMomentTheProcessIsKilledEveryOperationEndsOnce kills a process at each of the moments around what has an
// effect, and looks at what its successor makes of what it finds.
func TestWhateverMomentTheProcessIsKilledEveryOperationEndsOnce(t *testing.T) {
	const variable = "OPERATION_TEST_FUSE"
	if text := os.Getenv(variable); text != "" {
		length, state, _ := strings.Cut(text, " ")
		n, err := strconv.ParseInt(length, 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		burned(t, n, state)
		return
	}
	run := func(fuse int64, state string) (outcome, bool) {
		t.Helper()
		child := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^"+t.Name()+"$", "-test.timeout=60s")
		child.Env = append(os.Environ(), fmt.Sprintf("%s=%d %s", variable, fuse, state))
		out, err := child.Output()
		if status, ok := child.ProcessState.Sys().(syscall.WaitStatus); ok && status.Signal() == syscall.SIGKILL {
			return outcome{}, true
		}
		_, out, found := bytes.Cut(out, []byte("outcome: "))
		out, _, _ = bytes.Cut(out, []byte("\n"))
		var o outcome
		if jerr := json.Unmarshal(out, &o); err != nil || !found || jerr != nil {
			t.Fatalf("the process ended with %v, %v:\n%s", err, jerr, out)
		}
		return o, false
	}
	step := int64(1)
	switch {
	case testing.Short():
		step = 25
	case underRace: // each process then takes five times as long
		step = 19
	}
	kills, slowest := 0, int64(0)
	for fuse := int64(1); ; fuse += step {
		state := t.TempDir()
		_, killed := run(fuse, state)
		if killed {
			kills++
		}
		o, again := run(1<<40, state)
		if again {
			t.Fatal("the successor was killed")
		}
		slowest = max(slowest, o.Took)
		check(t, fmt.Sprintf("killed at moment %d", fuse), o)
		os.RemoveAll(state)
		if !killed || t.Failed() {
			break
		}
	}
	t.Logf("%d kills; the slowest successor took %d ms for all that was left", kills, slowest)
	if kills < 5 {
		t.Errorf("%d kills", kills)
	}
}

func check(t *testing.T, when string, o outcome) {
	t.Helper()
	for i, q := range script() {
		story := o.Stories[q.ID]
		if len(story) == 0 {
			t.Errorf("%s: %s has no story", when, q.ID)
			continue
		}
		told := map[string]int{}
		for n, e := range story {
			if e.Sequence != uint64(n+1) || e.Last != (n == len(story)-1) {
				t.Errorf("%s: event %d of %s has number %d of %d, last %v: %s", when, n+1, q.ID, e.Sequence, len(story), e.Last, e.Summary)
			}
			if told[e.Summary+e.Details]++; told[e.Summary+e.Details] > 1 {
				t.Errorf("%s: %s tells twice: %s", when, q.ID, e.Summary)
			}
		}
		if last := story[len(story)-1]; i < 5 && last.Type == event.Error {
			t.Errorf("%s: %s failed: %s", when, q.ID, last.Details)
		}
	}
	lines := map[string]string{}
	for _, e := range o.Audit {
		if e.Result != audit.Repeated {
			lines[e.Operation] += string(e.Result) + e.Code + " " + e.Key + " " + e.Who.ClaimedUsername + "; "
		}
	}
	for _, q := range script() {
		end := "succeeded"
		if story := o.Stories[q.ID]; len(story) > 0 && story[len(story)-1].Type == event.Error {
			end = "failed" + story[len(story)-1].Code
		}
		tail := " " + q.Operation + " me; "
		if got, want := lines[q.ID], "accepted"+tail+end+tail; got != want {
			t.Errorf("%s: the audit log tells of %s: %q, want %q", when, q.ID, got, want)
		}
	}
	if got, want := o.Chains["default"], "default/a"; got != want {
		t.Errorf("%s: default has %q, want %q", when, got, want)
	}
	if got, want := o.Chains["other"], "default/c default/d"; got != want {
		t.Errorf("%s: other has %q, want %q", when, got, want)
	}
}

// burned is the process: it sends the script, as a client does that does not know what came through before, waits for
// the ends and prints what it sees.
func burned(t *testing.T, length int64, state string) {
	began := time.Now()
	f := &fuse{}
	f.left.Store(length)
	written, err := audit.Open(audit.Options{File: filepath.Join(state, "audit.jsonl")})
	if err != nil {
		t.Fatal(err)
	}
	r := startRig(t, state, func(o *operation.Options) {
		o.Audit = burningAudit{written, f}
		o.Queue, o.Events, o.Backends = burningQueue{o.Queue, f}, burningEvents{o.Events, f}, map[string]operation.Backend{"envoy": burningBackend{o.Backends["envoy"], f}}
	})
	for _, q := range script() {
		if _, err := r.runner.Submit(t.Context(), q); err != nil {
			t.Fatal(err)
		}
	}
	o := outcome{Stories: map[string][]event.Event{}, Chains: map[string]string{}}
	for _, q := range script() {
		r.story(q.ID)
	}
	o.Took = time.Since(began).Milliseconds()
	for _, q := range script() {
		events, _, err := r.events.Of(t.Context(), q.ID)
		if err != nil {
			t.Fatal(err)
		}
		o.Stories[q.ID] = events
	}
	for _, group := range []string{"default", "other"} {
		o.Chains[group] = r.order(group)
	}
	if err := r.stop(); err != nil { // also waits until what has ended is out of the queue
		t.Fatal(err)
	}
	if err := written.Close(); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(filepath.Join(state, "audit.jsonl"))
	if err != nil {
		t.Fatal(err)
	}
	for line := range bytes.Lines(text) {
		var e audit.Entry
		if err := json.Unmarshal(line, &e); err != nil {
			t.Fatalf("%v: %q", err, line)
		}
		o.Audit = append(o.Audit, e)
	}
	data, err := json.Marshal(o)
	if err != nil {
		t.Fatal(err)
	}
	fmt.Printf("outcome: %s\n", data)
}
