package audit

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/meshery/meshery-filters/internal/problem"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func open(t *testing.T, o Options) *Log {
	t.Helper()
	o.Log = slog.New(slog.DiscardHandler)
	l, err := Open(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	return l
}

// entries reads all that is kept, oldest first.
func entries(t *testing.T, file string) (all []Entry) {
	t.Helper()
	names, err := filepath.Glob(file + "*")
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(names)
	slices.Reverse(names) // .2, .1, the newest
	for _, name := range names {
		data, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		for line := range bytes.Lines(data) {
			var e Entry
			if err := json.Unmarshal(line, &e); err != nil {
				t.Fatalf("%s: %v: %q", name, err, line)
			}
			all = append(all, e)
		}
	}
	return all
}

func told(all []Entry) string {
	var b strings.Builder
	for _, e := range all {
		fmt.Fprintf(&b, "%s %s;", e.Operation, e.Result)
	}
	return b.String()
}

var at = time.Date(2026, 1, 2, 3, 4, 5, 678900000, time.UTC)

func of(id string) Entry {
	return Entry{Operation: id, Accepted: at, Time: at, Key: "apply_filter", Documents: []string{"shop/a"}, Targets: []string{"ProxyGroup edge"},
		Who: Who{Verified: true, Certificate: "CN=operator", Serial: "1f", ClaimedUsername: "me", Remote: "192.0.2.7:4242"}}
}

func succeeded(id string) Entry { e := of(id); e.Result = Succeeded; return e }

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestALineSaysWhoAskedForWhatAndWhatCameOfIt(t *testing.T) {
	file := filepath.Join(t.TempDir(), "audit.jsonl")
	l := open(t, Options{File: file})
	must(t, l.Accepted(of("op-1")))
	failed := of("op-1")
	failed.Result, failed.Code, failed.Problem, failed.Delete = Failed, "meshery-filters-1016", "a proxy rejected the configuration", true
	must(t, l.Ended(failed))
	data, err := os.ReadFile(file)
	must(t, err)
	const who = `"who":{"verified":true,"certificate":"CN=operator","serial":"1f","claimedUsername":"me","remote":"192.0.2.7:4242"}`
	const what = `"key":"apply_filter",`
	const names = `"documents":["shop/a"],"targets":["ProxyGroup edge"],`
	const when = `"accepted":"2026-01-02T03:04:05.6789Z","time":"2026-01-02T03:04:05.6789Z",`
	want := `{"result":"accepted","operation":"op-1",` + when + what + names + who + "}\n" +
		`{"result":"failed","operation":"op-1",` + when + `"code":"meshery-filters-1016","problem":"a proxy rejected the configuration",` +
		what + `"delete":true,` + names + who + "}\n"
	if string(data) != want {
		t.Errorf("got\n%s\nwant\n%s", data, want)
	}
	if info, err := os.Stat(file); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", info.Mode(), err)
	}
}

func TestEachOperationIsWrittenOnceWhateverEndsTheProcess(t *testing.T) {
	file := filepath.Join(t.TempDir(), "audit.jsonl")
	l := open(t, Options{File: file})
	must(t, l.Accepted(of("a")))
	must(t, l.Accepted(of("a"))) // by the one who took it and the one who runs it
	must(t, l.Ended(succeeded("a")))
	must(t, l.Accepted(of("a"))) // the one who took it comes late
	must(t, l.Accepted(of("b")))
	l.file.Close() // as the end of the process does

	l = open(t, Options{File: file})
	must(t, l.Ended(succeeded("a")))
	must(t, l.Accepted(of("b")))
	must(t, l.Ended(succeeded("b")))
	again := of("a") // the same id, on another day
	again.Accepted = at.Add(48 * time.Hour)
	must(t, l.Accepted(again))
	if got, want := told(entries(t, file)), "a accepted;a succeeded;b accepted;b succeeded;a accepted;"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

func TestALineThatWasCutOffIsCutAway(t *testing.T) {
	file := filepath.Join(t.TempDir(), "audit.jsonl")
	l := open(t, Options{File: file})
	must(t, l.Accepted(of("a")))
	must(t, l.Close())
	whole, err := os.ReadFile(file)
	must(t, err)
	for cut := 1; cut < len(whole); cut += 7 {
		must(t, os.WriteFile(file, append(whole[:len(whole):len(whole)], whole[:cut]...), 0o600))
		l := open(t, Options{File: file})
		must(t, l.Accepted(of("b")))
		must(t, l.Close())
		if got := told(entries(t, file)); got != "a accepted;b accepted;" {
			t.Fatalf("after %d bytes of another line: %s", cut, got)
		}
	}
}

func TestManyAtOnceAreWrittenTogetherAndEachOnce(t *testing.T) {
	file := filepath.Join(t.TempDir(), "audit.jsonl")
	l := open(t, Options{File: file, MaxBytes: 32 << 10, Keep: 9})
	var wg sync.WaitGroup
	for i := range 300 {
		for range 2 { // the one who takes it and the one who runs it
			wg.Go(func() {
				id := fmt.Sprintf("op-%d", i)
				if err := errors.Join(l.Accepted(of(id)), l.Ended(succeeded(id))); err != nil {
					t.Error(err)
				}
			})
		}
	}
	wg.Wait()
	lines := map[string]string{}
	for _, e := range entries(t, file) {
		lines[e.Operation] += string(e.Result) + ";"
	}
	for i := range 300 {
		if got := lines[fmt.Sprintf("op-%d", i)]; got != "accepted;succeeded;" {
			t.Errorf("operation %d: %s", i, got)
		}
	}
}

func TestWhatIsKeptIsBoundedAndTheNewestIsInTheFile(t *testing.T) {
	file := filepath.Join(t.TempDir(), "audit.jsonl")
	const most, keep = 8 << 10, 3
	l := open(t, Options{File: file, MaxBytes: most, Keep: keep})
	for i := range 300 {
		must(t, l.Accepted(of(fmt.Sprintf("op-%d", i))))
	}
	names, err := filepath.Glob(file + "*")
	must(t, err)
	if len(names) != keep+1 {
		t.Errorf("%v", names)
	}
	for _, name := range names {
		if info, err := os.Stat(name); err != nil || info.Size() > most || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v", name, info, err)
		}
	}
	all := entries(t, file)
	for i, e := range all {
		if want := fmt.Sprintf("op-%d", 300-len(all)+i); e.Operation != want {
			t.Fatalf("line %d is of %s, want %s", i, e.Operation, want)
		}
	}
	// What an older file tells is known, too.
	must(t, l.Close())
	l = open(t, Options{File: file, MaxBytes: most, Keep: keep})
	must(t, l.Accepted(of(all[0].Operation)))
	if again := entries(t, file); len(again) != len(all) {
		t.Errorf("%d lines after the oldest operation was written again, and %d before", len(again), len(all))
	}
}

func TestAFloodOfRefusalsIsAFewLines(t *testing.T) {
	file := filepath.Join(t.TempDir(), "audit.jsonl")
	l := open(t, Options{File: file})
	refuse := func(host, port int) {
		l.Count(Entry{Result: Refused, Code: "meshery-filters-1044", Call: "/meshes.MeshService/MeshName",
			Who: Who{Remote: fmt.Sprintf("10.0.%d.%d:%d", host/250, host%250, port)}})
	}
	for i := range 5000 {
		refuse(1, i)
	}
	for i := range 5000 {
		refuse(i, 1)
	}
	must(t, l.flush())
	first := entries(t, file)
	if len(first) != maxLikes+1 {
		t.Errorf("%d lines tell of 10000 refusals of 5000 clients", len(first))
	}
	must(t, l.Close()) // which tells how many there were
	sum := 0
	all := entries(t, file)
	for i, e := range all {
		if e.Result != Refused || e.Code == "" || e.Time.IsZero() || (e.Count == 0) != (i < len(first)) {
			t.Fatalf("line %d: %+v", i, e)
		}
		sum += max(e.Count, 0)
	}
	if sum+len(first) != 10_000 {
		t.Errorf("the lines tell of %d refusals", sum+len(first))
	}
	if len(all) > 2*maxLikes+2 {
		t.Errorf("%d lines", len(all))
	}
}

func TestNobodyIsBlamedForWhatOthersWereRefused(t *testing.T) {
	file := filepath.Join(t.TempDir(), "audit.jsonl")
	l := open(t, Options{File: file})
	for i := range 5000 {
		l.Count(Entry{Result: Refused, Code: "meshery-filters-1002", Operation: "x", Key: fmt.Sprint("made-up-", i), Who: Who{Certificate: "CN=mallory"}})
	}
	for range 2 {
		l.Count(Entry{Result: Refused, Code: "meshery-filters-1002", Operation: "y", Key: "apply_filter", Who: Who{Certificate: "CN=alice"}})
	}
	l.Count(Entry{Result: Refused, Code: "meshery-filters-1044", Who: Who{Certificate: "CN=alice"}})
	must(t, l.Close())
	sum := map[string]int{}
	for _, e := range entries(t, file) {
		sum[e.Code] += max(e.Count, 1)
		if e.Who.Certificate == "CN=alice" && e.Count > 2 || e.Count > 0 && e.Key != "" {
			t.Errorf("%+v", e)
		}
	}
	if sum["meshery-filters-1002"] != 5002 || sum["meshery-filters-1044"] != 1 {
		t.Errorf("the lines tell of %v", sum)
	}
}

// Adapters that share a store accept operations that others run.
func TestWhatIsRememberedOfOperationsThatOthersEndIsBounded(t *testing.T) {
	l := open(t, Options{Stream: io.Discard})
	const many = 3 * rememberedAccepts
	for i := range many {
		must(t, l.Accepted(of(fmt.Sprint("op-", i))))
	}
	if n := len(l.accepted) + len(l.before); n > 2*rememberedAccepts {
		t.Errorf("%d operations are remembered", n)
	}
	var b bytes.Buffer
	l.opts.Stream = &b
	for i := range rememberedAccepts {
		must(t, l.Accepted(of(fmt.Sprint("op-", many-1-i))))
	}
	if b.Len() > 0 {
		t.Error("the latest are written twice")
	}
}

func TestRefusalsAreWrittenSoonWithoutBeingAskedFor(t *testing.T) {
	file := filepath.Join(t.TempDir(), "audit.jsonl")
	l := open(t, Options{File: file})
	ctx, cancel := context.WithCancel(t.Context())
	ran := make(chan error, 1)
	go func() { ran <- l.Run(ctx) }()
	l.Count(Entry{Result: Refused, Code: "x"})
	for end := time.Now().Add(time.Minute); len(entries(t, file)) == 0; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("it is not written")
		}
	}
	cancel()
	must(t, <-ran)
}

func TestWhatCannotBeWrittenIsSaidAndWrittenOnceLater(t *testing.T) {
	file := filepath.Join(t.TempDir(), "audit.jsonl")
	l := open(t, Options{File: file})
	must(t, l.Accepted(of("a")))
	good := l.file
	bad, err := os.Open(file) // which cannot be written to
	must(t, err)
	defer bad.Close()
	l.file = bad
	for _, f := range []func() error{func() error { return l.Ended(succeeded("a")) }, func() error { return l.Accepted(of("b")) }} {
		if err := f(); !errors.Is(err, problem.StoreFailed) || !strings.Contains(err.Error(), file) {
			t.Errorf("the line is said to be written: %v", err)
		}
	}
	l.file = good
	must(t, l.Accepted(of("a")))
	must(t, l.Ended(succeeded("a")))
	must(t, l.Accepted(of("b")))
	if got, want := told(entries(t, file)), "a accepted;a succeeded;b accepted;"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

func TestAFileThatIsNotThisProcessesAloneIsRefused(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "audit.jsonl")
	open(t, Options{File: file})
	for _, name := range []string{file, dir, filepath.Join(dir, "missing", "audit.jsonl")} {
		if l, err := Open(Options{File: name}); !errors.Is(err, problem.StoreFailed) || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: %v, %v", name, l, err)
		}
	}
}

func TestAStreamGetsTheSameLines(t *testing.T) {
	var b bytes.Buffer
	l := open(t, Options{Stream: io.MultiWriter(&b)})
	must(t, l.Accepted(of("a")))
	must(t, l.Accepted(of("a")))
	l.Count(Entry{Result: Refused})
	must(t, l.Ended(succeeded("a")))
	if n := bytes.Count(b.Bytes(), []byte("\n")); n != 3 {
		t.Errorf("%d lines:\n%s", n, b.String())
	}
}

func TestTextsFromOutsideAreBounded(t *testing.T) {
	e := of("a")
	e.Who.ClaimedUsername = strings.Repeat("é\x01\"", 100_000)
	for i := range 10_000 {
		e.Documents = append(e.Documents, fmt.Sprint("shop/", i))
	}
	line, err := e.line()
	must(t, err)
	if len(line) > maxLine/4 || bytes.Count(line, []byte("\n")) != 1 || !json.Valid(line) {
		t.Errorf("a line of %d bytes", len(line))
	}
}
