package store

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
	"unsafe"

	"github.com/nats-io/nats-server/v2/server"

	"github.com/meshery/meshery-filters/internal/problem"
)

// openStore opens the embedded store of a state directory.
func openStore(t *testing.T, path string, change ...func(*Options)) *Store {
	t.Helper()
	o := Options{StateDir: path}
	for _, c := range change {
		c(&o)
	}
	s, err := Open(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func TestRecordsKeepAnyKey(t *testing.T) {
	path := t.TempDir()
	s := openStore(t, path)
	r := s.Records()
	want := map[string]string{
		"envoy/shop/web":            "a chain",
		"envoy/shop/Web":            "another case",
		"envoy_shop_web":            "what escaping might make the same",
		"..":                        "a parent",
		"../../etc/passwd":          "a path",
		"a\x00b\nc":                 "control characters",
		"Größe/日本語":                 "other scripts",
		strings.Repeat("k", 512):    "the longest",
		strings.Repeat("日", 170):    "the longest of another script",
		strings.Repeat("\x01", 512): "the longest in JSON",
		".tmp-1":                    "like a temporary file",
		"empty":                     "",
		"with a line break":         "{}\n{}\n",
	}
	for key, value := range want {
		if err := r.Put(t.Context(), key, []byte("before")); err != nil {
			t.Fatal(err)
		}
		if err := r.Put(t.Context(), key, []byte(value)); err != nil {
			t.Fatal(err)
		}
	}
	s.Close()
	r = openStore(t, path).Records()
	for key, value := range want {
		if got, err := r.Get(t.Context(), key); err != nil || got == nil || string(got) != value {
			t.Errorf("%.20q: got %q, %v", key, got, err)
		}
	}
	all, err := r.All(t.Context())
	if err != nil || len(all) != len(want) {
		t.Fatalf("%d of %d, %v", len(all), len(want), err)
	}
	for key, value := range want {
		if string(all[key]) != value {
			t.Errorf("%.20q: got %q", key, all[key])
		}
		for range 2 {
			if err := r.Delete(t.Context(), key); err != nil {
				t.Error(err)
			}
		}
		if got, err := r.Get(t.Context(), key); got != nil || err != nil {
			t.Errorf("deleted %.20q gives %q, %v", key, got, err)
		}
	}
	for _, key := range []string{"", strings.Repeat("k", 513), "\xff"} {
		if err := r.Put(t.Context(), key, nil); !errors.Is(err, problem.StoreFailed) {
			t.Errorf("%.20q: %v", key, err)
		}
	}
	if err := r.Put(t.Context(), "big", make([]byte, maxValue+1)); !errors.Is(err, problem.StoreFailed) {
		t.Errorf("too big: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := r.Put(ctx, "k", nil); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}

func TestARecordsLastTenValuesAreItsHistory(t *testing.T) {
	s := openStore(t, t.TempDir())
	r := s.Records()
	for i := range 12 {
		if err := r.Put(t.Context(), "chains/a", []byte(fmt.Sprint(i))); err != nil {
			t.Fatal(err)
		}
	}
	if err := r.Put(t.Context(), "other", []byte("x")); err != nil {
		t.Fatal(err)
	}
	if err := r.Delete(t.Context(), "chains/a"); err != nil {
		t.Fatal(err)
	}
	all, err := r.History(t.Context(), "chains/")
	if err != nil || len(all) != history {
		t.Fatalf("%d revisions, %v", len(all), err)
	}
	for i, rev := range all {
		want := fmt.Sprint(i + 3)
		if i == history-1 {
			want = ""
		}
		if rev.Key != "chains/a" || string(rev.Value) != want || (rev.Value == nil) != (want == "") || rev.Time.IsZero() || i > 0 && rev.Number <= all[i-1].Number {
			t.Errorf("revision %d is %+v, want %q", i, rev, want)
		}
	}
	// A key that was deleted begins again.
	if err := r.Put(t.Context(), "chains/a", []byte("again")); err != nil {
		t.Fatal(err)
	}
}

func TestWhatTheFirstVersionKeptIsTakenOver(t *testing.T) {
	path := t.TempDir()
	module := []byte("\x00asm")
	digest := sha256.Sum256(module)
	file := func(name string, data string) string {
		t.Helper()
		name = filepath.Join(path, name)
		if err := os.MkdirAll(filepath.Dir(name), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, []byte(data), 0o600); err != nil {
			t.Fatal(err)
		}
		return name
	}
	sum := func(s string) string { d := sha256.Sum256([]byte(s)); return hex.EncodeToString(d[:]) }
	record := func(key, value string) string {
		return fmt.Sprintf("{\"key\":%q,\"sha256\":%q}\n%s", key, sum(value), value)
	}
	file("component-id", "5b5e1d3f-9f0c-4a57-9a54-5a2b7f4e1a00\n")
	blob := file("modules/"+hex.EncodeToString(digest[:])+".wasm", string(module))
	file("records/a.1.record", record("chains/a", "one\nline"))
	broken := file("records/b.2.record", record("chains/b", "two")+"!")
	file("records/.tmp-1", "half")

	_, err := Open(t.Context(), Options{StateDir: path})
	refused(t, err, broken, "delete it")
	if _, err := os.Stat(blob); err != nil {
		t.Fatalf("something was deleted although not all was taken over: %v", err)
	}
	file("records/b.2.record", record("chains/b", "two"))
	odd := file("modules/readme", "mine")
	_, err = Open(t.Context(), Options{StateDir: path})
	refused(t, err, odd, "move it out")
	if err := os.Remove(odd); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		s := openStore(t, path)
		all, err := s.Records().All(t.Context())
		if err != nil || len(all) != 2 || string(all["chains/a"]) != "one\nline" || string(all["chains/b"]) != "two" {
			t.Errorf("records: %q, %v", all, err)
		}
		if data, err := s.Blobs().Get(t.Context(), hex.EncodeToString(digest[:])); !bytes.Equal(data, module) || err != nil {
			t.Errorf("module: %q, %v", data, err)
		}
		if id, err := s.ComponentID(t.Context()); id != "5b5e1d3f-9f0c-4a57-9a54-5a2b7f4e1a00" || err != nil {
			t.Errorf("%s, %v", id, err)
		}
		s.Close()
	}
	if left, err := filepath.Glob(filepath.Join(path, "[rm][eo]*")); len(left) > 0 || err != nil {
		t.Errorf("left: %v, %v", left, err)
	}
}

func TestAStreamThatIsGoneIsNotMadeAnew(t *testing.T) {
	path := t.TempDir()
	openStore(t, path).Close()
	gone, err := filepath.Glob(filepath.Join(path, "jetstream", "jetstream", "*", "streams", "KV_"+recordsBucket))
	if err != nil || len(gone) != 1 {
		t.Fatalf("%v, %v", gone, err)
	}
	if err := os.RemoveAll(gone[0]); err != nil {
		t.Fatal(err)
	}
	_, err = Open(t.Context(), Options{StateDir: path})
	refused(t, err, recordsBucket, "restore the folder")
}

func TestTheLogKeepsItsPositionsAndRefusesAStaleWriter(t *testing.T) {
	path := t.TempDir()
	s := openStore(t, path)
	l := s.Log()
	var last uint64
	for i := range 5 {
		position, err := l.Append(t.Context(), "op", []byte(fmt.Sprint(i)), last)
		if err != nil || position != uint64(i+1) {
			t.Fatalf("position %d, %v", position, err)
		}
		last = position
	}
	for _, after := range []uint64{0, 4, 9} {
		if _, err := l.Append(t.Context(), "op", []byte("late"), after); !errors.Is(err, ErrStale) {
			t.Errorf("after %d: %v", after, err)
		}
	}
	if _, err := l.Append(t.Context(), "other", []byte("x"), 0); err != nil {
		t.Fatal(err)
	}
	id := s.ID()
	s.Close()
	s = openStore(t, path)
	l = s.Log()
	if s.ID() != id {
		t.Errorf("the log is another one: %s and %s", id, s.ID())
	}
	if first, next, err := l.Bounds(t.Context()); first != 1 || next != 7 || err != nil {
		t.Errorf("from %d to %d, %v", first, next, err)
	}
	story, err := l.Of(t.Context(), "op")
	if err != nil || len(story) != 5 || string(story[4].Data) != "4" || story[4].Position != 5 {
		t.Errorf("%+v, %v", story, err)
	}
	if none, err := l.Of(t.Context(), "none"); len(none) != 0 || err != nil {
		t.Errorf("%v, %v", none, err)
	}
	want := uint64(3)
	for r, err := range l.From(t.Context(), 3) {
		if err != nil || r.Position != want || r.Last != (want == 6) && want < 7 {
			t.Fatalf("%+v, %v", r, err)
		}
		if want == 6 {
			if _, err := l.Append(t.Context(), "third", nil, 0); err != nil {
				t.Fatal(err)
			}
		}
		if want++; want == 8 {
			break
		}
	}
}

func TestACursorStays(t *testing.T) {
	path := t.TempDir()
	s := openStore(t, path)
	c := s.Cursor("nats://a b")
	if _, found, err := c.Take(t.Context()); found || err != nil {
		t.Fatal(found, err)
	}
	for i := range 3 {
		if err := c.Save(t.Context(), uint64(i)); err != nil {
			t.Fatal(err)
		}
	}
	s.Close()
	c = openStore(t, path).Cursor("nats://a b")
	if position, found, err := c.Take(t.Context()); position != 2 || !found || err != nil {
		t.Errorf("%d, %v, %v", position, found, err)
	}
}

// external starts a JetStream that several adapters share.
func external(t *testing.T) (url string) {
	t.Helper()
	s, err := server.NewServer(&server.Options{Host: "127.0.0.1", Port: server.RANDOM_PORT, JetStream: true, StoreDir: t.TempDir(), NoSigs: true, NoLog: true})
	if err != nil {
		t.Fatal(err)
	}
	s.Start()
	t.Cleanup(func() { s.Shutdown(); s.WaitForShutdown() })
	if !s.ReadyForConnections(patience) {
		t.Fatal("the external JetStream does not start")
	}
	return s.ClientURL()
}

func TestAnAdapterThatWasOvertakenWritesNoRecordAndMovesNoCursor(t *testing.T) {
	url := external(t)
	on := func(o *Options) { o.URL, o.Lease = url, 200*time.Millisecond }
	a, b := openStore(t, t.TempDir(), on), openStore(t, t.TempDir(), on)
	if err := a.Records().Put(t.Context(), "k", []byte("a")); err != nil {
		t.Fatal(err)
	}
	if got, err := b.Records().Get(t.Context(), "k"); string(got) != "a" || err != nil {
		t.Fatalf("%q, %v", got, err)
	}
	if err := b.Records().Put(t.Context(), "k", []byte("b")); err != nil {
		t.Fatal(err)
	}
	refused(t, a.Records().Put(t.Context(), "k", []byte("late")), "another adapter")
	refused(t, a.Records().Delete(t.Context(), "k"), "another adapter")
	if got, err := a.Records().Get(t.Context(), "k"); string(got) != "b" || err != nil {
		t.Fatalf("%q, %v", got, err)
	}
	if err := a.Records().Put(t.Context(), "k", []byte("knowing")); err != nil {
		t.Fatal(err)
	}
	first, second := a.Cursor("c"), b.Cursor("c")
	if _, _, err := first.Take(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := first.Save(t.Context(), 7); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	if position, _, err := second.Take(t.Context()); position != 7 || err != nil || time.Since(began) < 100*time.Millisecond {
		t.Errorf("%d, %v after %s", position, err, time.Since(began))
	}
	if err := first.Save(t.Context(), 8); !errors.Is(err, ErrLost) {
		t.Errorf("the cursor was moved: %v", err)
	}
}
func TestConcurrentWritersLeaveOneWholeValue(t *testing.T) {
	path := t.TempDir()
	s := openStore(t, path)
	var group sync.WaitGroup
	for writer := range 8 {
		group.Go(func() {
			value := bytes.Repeat([]byte{byte('a' + writer)}, 10_000)
			for range 20 {
				if err := s.Records().Put(t.Context(), "k", value); err != nil {
					t.Error(err)
				}
				got, err := s.Records().Get(t.Context(), "k")
				if err != nil || len(got) != len(value) || bytes.Count(got, got[:1]) != len(got) {
					t.Errorf("torn: %v", err)
				}
				if _, err := s.Blobs().Put(t.Context(), []byte("the same module")); err != nil {
					t.Error(err)
				}
			}
		})
	}
	group.Wait()
	if all, err := s.Records().All(t.Context()); len(all) != 1 || err != nil {
		t.Errorf("%d records, %v", len(all), err)
	}
}

func TestBlobsAreVerifiedAndShared(t *testing.T) {
	path := t.TempDir()
	s := openStore(t, path)
	b := s.Blobs()
	module := bytes.Repeat([]byte("wasm"), 1000)
	digest, err := b.Put(t.Context(), module)
	if err != nil {
		t.Fatal(err)
	}
	if again, err := b.Put(t.Context(), module); again != digest || err != nil {
		t.Errorf("%s became %s, %v", digest, again, err)
	}
	first, err := b.Get(t.Context(), digest)
	if err != nil || !bytes.Equal(first, module) {
		t.Fatal(err)
	}
	tail := first[10:] // any part keeps the whole alive
	where := unsafe.SliceData(first)
	first = nil
	runtime.GC()
	second, err := b.Get(t.Context(), digest)
	if err != nil || unsafe.SliceData(second) != where || !bytes.Equal(second, module) {
		t.Errorf("not the same bytes in memory, %v", err)
	}
	runtime.KeepAlive(tail)

	for _, absent := range []string{strings.Repeat("0", 64), "", "../component-id", strings.ToUpper(digest)} {
		if _, err := b.Get(t.Context(), absent); !errors.Is(err, problem.ModuleUnavailable) {
			t.Errorf("%q: %v", absent, err)
		}
	}
	if _, err := b.Put(t.Context(), nil); !errors.Is(err, problem.StoreFailed) {
		t.Errorf("nothing: %v", err)
	}
}

// Whatever else an adapter reads of a record, those who follow the others' changes hear of it.
func TestChangesAreThoseOfOthers(t *testing.T) {
	url := external(t)
	on := func(o *Options) { o.URL = url }
	other := openStore(t, t.TempDir(), on)
	put := func(s *Store, key string) {
		t.Helper()
		if err := s.Records().Put(t.Context(), key, []byte("value")); err != nil {
			t.Fatal(err)
		}
	}
	put(other, "before")
	s := openStore(t, t.TempDir(), on)
	put(other, "one")
	put(s, "own")
	put(other, "two")
	if all, err := s.Records().All(t.Context()); err != nil || len(all) != 4 {
		t.Fatalf("%v, %v", all, err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	var keys []string
	for key, err := range s.Records().Changes(ctx) {
		if err != nil {
			t.Fatal(err)
		}
		if keys = append(keys, key); key == "two" {
			break
		}
	}
	if !slices.Equal(keys, []string{"one", "two"}) {
		t.Errorf("%q", keys)
	}
}

// In a cluster the replica that is read may lag behind.
func TestRecordsAreReadUpToTheLastChangeThatIsKnown(t *testing.T) {
	url := external(t)
	on := func(o *Options) { o.URL = url }
	s, other := openStore(t, t.TempDir(), on), openStore(t, t.TempDir(), on)
	put := func(s *Store, key string) {
		t.Helper()
		if err := s.Records().Put(t.Context(), key, []byte("value")); err != nil {
			t.Fatal(err)
		}
	}
	put(s, "own")
	r := s.records.(*recordsInKV)
	r.newest++ // as Changes tells of the next
	read := make(chan map[string][]byte)
	go func() {
		all, err := r.All(t.Context())
		if err != nil {
			t.Error(err)
		}
		read <- all
	}()
	select {
	case all := <-read:
		t.Fatalf("%v is not all", all)
	case <-time.After(200 * time.Millisecond):
	}
	put(other, "next")
	if all := <-read; len(all) != 2 {
		t.Errorf("%v", all)
	}
}

// A part would look as if others had removed the rest.
func TestAReadingThatIsBrokenOffIsNoReading(t *testing.T) {
	url := external(t)
	on := func(o *Options) { o.URL = url }
	other := openStore(t, t.TempDir(), on)
	const many = 1000 // more than are on their way at once
	for i := range many {
		if err := other.Records().Put(t.Context(), fmt.Sprint(i), []byte("value")); err != nil {
			t.Fatal(err)
		}
	}
	s := openStore(t, t.TempDir(), on)
	seen := 0
	err := s.records.(*recordsInKV).each(t.Context(), func(Revision) {
		if seen++; seen == 1 {
			s.nc.Close()
		}
	})
	if err == nil || seen == many {
		t.Errorf("%d records, %v", seen, err)
	}
}

// The clock of the adapter that held the cursor was ahead, or has stepped back since.
func TestACursorIsTakenOverWhateverClocksSay(t *testing.T) {
	url := external(t)
	ahead := openStore(t, t.TempDir(), func(o *Options) { o.URL, o.Lease = url, time.Hour })
	held := ahead.Cursor("c")
	if _, _, err := held.Take(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := held.Save(t.Context(), 7); err != nil {
		t.Fatal(err)
	}
	b := openStore(t, t.TempDir(), func(o *Options) { o.URL, o.Lease = url, 200*time.Millisecond })
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if position, _, err := b.Cursor("c").Take(ctx); position != 7 || err != nil {
		t.Errorf("%d, %v", position, err)
	}
}
