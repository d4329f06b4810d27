package store

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/meshery/meshery-filters/internal/problem"
)

// tryNext takes what may run now.
func tryNext(t *testing.T, q Queue) (Claim, bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	c, err := q.Next(ctx)
	if err != nil && !errors.Is(err, context.DeadlineExceeded) {
		t.Fatal(err)
	}
	return c, err == nil
}

func mustNext(t *testing.T, q Queue) Claim {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	c, err := q.Next(ctx)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func mustDone(t *testing.T, c Claim) {
	t.Helper()
	if err := c.Done(t.Context()); err != nil {
		t.Fatalf("%s: %v", c.Entry().ID, err)
	}
}

func mustPut(t *testing.T, q Queue, id, keys string) string {
	t.Helper()
	behind, again, err := q.Put(t.Context(), Entry{ID: id, Keys: strings.Fields(keys), Data: []byte(id), Digest: id})
	if err != nil || again {
		t.Fatalf("%s: %v, %v", id, again, err)
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
			t.Parallel()
			q := openStore(t, t.TempDir()).Queue()
			waits := strings.Fields(test.wait)
			for i, field := range strings.Fields(test.put) {
				id, keys, _ := strings.Cut(field, ":")
				if behind := mustPut(t, q, id, strings.ReplaceAll(keys, ",", " ")); behind != strings.Trim(waits[i], "-") {
					t.Errorf("%s waits behind %q, want %s", id, behind, waits[i])
				}
			}
			claims := map[string]Claim{}
			for _, step := range strings.Fields(test.steps) {
				if id, ended := strings.CutPrefix(step, "-"); ended {
					if c, ok := tryNext(t, q); ok {
						t.Fatalf("%s ran before %s was done", c.Entry().ID, id)
					}
					mustDone(t, claims[id])
					continue
				}
				c := mustNext(t, q)
				if e := c.Entry(); e.ID != step || string(e.Data) != step || c.Attempt() != 1 {
					t.Fatalf("got %+v, want %s", e, step)
				}
				claims[step] = c
			}
			if c, ok := tryNext(t, q); ok {
				t.Errorf("%s ran as well", c.Entry().ID)
			}
		})
	}
}

func TestAQueueIsBoundedByWhatIsNotDone(t *testing.T) {
	q := openStore(t, t.TempDir(), func(o *Options) { o.Queue = 2 }).Queue()
	mustPut(t, q, "a", "x")
	mustPut(t, q, "b", "x")
	if _, _, err := q.Put(t.Context(), Entry{ID: "c"}); !errors.Is(err, problem.QueueFull) {
		t.Fatalf("got %v", err)
	}
	c := mustNext(t, q)
	if _, _, err := q.Put(t.Context(), Entry{ID: "c"}); !errors.Is(err, problem.QueueFull) {
		t.Fatalf("a running entry made room: %v", err)
	}
	mustDone(t, c)
	mustPut(t, q, "c", "y")
}

func TestAClosedQueueGivesAndTakesNothingAndKeepsWhatItHas(t *testing.T) {
	path := t.TempDir()
	s := openStore(t, path)
	q := s.Queue()
	for _, id := range []string{"a", "b", "c"} {
		mustPut(t, q, id, "x")
	}
	c := mustNext(t, q)
	ended := make(chan error, 1)
	go func() {
		_, err := q.Next(t.Context())
		ended <- err
	}()
	q.Close()
	q.Close()
	if err := <-ended; !errors.Is(err, problem.ShuttingDown) {
		t.Errorf("a waiting worker got %v", err)
	}
	if _, _, err := q.Put(t.Context(), Entry{ID: "d"}); !errors.Is(err, problem.ShuttingDown) {
		t.Fatalf("put after close: %v", err)
	}
	mustDone(t, c)
	s.Close()
	q = openStore(t, path).Queue()
	if c := mustNext(t, q); c.Entry().ID != "b" {
		t.Errorf("%s comes next", c.Entry().ID)
	}
}

func TestWhatAProcessHadClaimedItsSuccessorHasAtOnceAndCounted(t *testing.T) {
	path := t.TempDir()
	for attempt := 1; attempt <= 4; attempt++ {
		s := openStore(t, path)
		if attempt == 1 {
			mustPut(t, s.Queue(), "a", "x")
			mustPut(t, s.Queue(), "b", "x")
		}
		began := time.Now()
		c := mustNext(t, s.Queue())
		if c.Entry().ID != "a" || c.Attempt() != attempt || time.Since(began) > time.Second {
			t.Fatalf("%s in attempt %d, after %s", c.Entry().ID, c.Attempt(), time.Since(began))
		}
		if attempt == 4 {
			mustDone(t, c)
			if c := mustNext(t, s.Queue()); c.Entry().ID != "b" || c.Attempt() != 1 {
				t.Errorf("%s in attempt %d", c.Entry().ID, c.Attempt())
			}
		}
		s.Close() // as a kill would, without a word about the claim
	}
	s := openStore(t, path)
	c := mustNext(t, s.Queue())
	if c.Attempt() != 2 {
		t.Fatalf("attempt %d", c.Attempt())
	}
	if err := c.Release(t.Context()); err != nil {
		t.Fatal(err)
	}
	if c := mustNext(t, s.Queue()); c.Attempt() != 2 {
		t.Errorf("what was given back is attempt %d", c.Attempt())
	}
}

func TestAnIdIsTakenOverRestartsAndAfterItsEnd(t *testing.T) {
	path := t.TempDir()
	s := openStore(t, path)
	put := func(digest string) (again bool, err error) {
		_, again, err = s.Queue().Put(t.Context(), Entry{ID: "a", Digest: digest, Data: []byte("data"), Secret: true})
		return again, err
	}
	check := func(when string) {
		t.Helper()
		if again, err := put("same"); !again || err != nil {
			t.Errorf("%s: %v, %v", when, again, err)
		}
		if _, err := put("other"); !errors.Is(err, problem.OperationExists) {
			t.Errorf("%s: %v", when, err)
		}
	}
	if again, err := put("same"); again || err != nil {
		t.Fatal(again, err)
	}
	check("waiting")
	s.Close()
	s = openStore(t, path)
	check("waiting after a restart")
	c := mustNext(t, s.Queue())
	check("running")
	mustDone(t, c)
	check("done")
	s.Close()
	s = openStore(t, path)
	check("done after a restart")
	if c, ok := tryNext(t, s.Queue()); ok {
		t.Errorf("%s runs again", c.Entry().ID)
	}
}

func TestWhatIsSecretIsOverwrittenAtTheEnd(t *testing.T) {
	path := t.TempDir()
	s := openStore(t, path)
	secret := []byte("what nobody may find afterwards")
	found := func() (n int) {
		err := filepath.WalkDir(path, func(name string, entry fs.DirEntry, err error) error {
			if err != nil || entry.IsDir() {
				return nil // JetStream removes files while this runs
			}
			data, _ := os.ReadFile(name)
			n += bytes.Count(data, secret)
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	if _, _, err := s.Queue().Put(t.Context(), Entry{ID: "a", Data: secret, Digest: "d", Secret: true}); err != nil {
		t.Fatal(err)
	}
	if found() == 0 {
		t.Fatal("the test does not see what is stored")
	}
	mustDone(t, mustNext(t, s.Queue()))
	if n := found(); n != 0 {
		t.Errorf("it is there %d times", n)
	}
}

// Claims expire, as when the adapter was down for long or the clock has stepped forward; their operations do not.
func TestAnEntryWhoseClaimHasExpiredIsClaimedAgain(t *testing.T) {
	path := t.TempDir()
	s := openStore(t, path)
	mustPut(t, s.Queue(), "a", "x")
	mustNext(t, s.Queue())
	s.Close()
	s = openStore(t, path)
	if err := s.queue.stream.DeleteMsg(t.Context(), s.queue.claims["a"].sequence); err != nil {
		t.Fatal(err)
	}
	c := mustNext(t, s.Queue())
	if c.Attempt() != 2 {
		t.Errorf("it is attempt %d", c.Attempt())
	}
	mustDone(t, c)
}

// JetStream finds the entry again when its mark has expired and the process is killed soon after.
func TestWhatWasDoneDoesNotComeBackWhenItsMarkHasExpired(t *testing.T) {
	path := t.TempDir()
	s := openStore(t, path)
	mustPut(t, s.Queue(), "a", "x")
	mustDone(t, mustNext(t, s.Queue()))
	mustPut(t, s.Queue(), "b", "x")
	if err := s.mark(t.Context()); err != nil {
		t.Fatal(err)
	}
	mark, err := s.last(t.Context(), s.queue.stream, entrySubject+"a")
	if err != nil {
		t.Fatal(err)
	}
	if err := s.queue.stream.DeleteMsg(t.Context(), mark.Sequence); err != nil {
		t.Fatal(err)
	}
	killed := filepath.Join(t.TempDir(), "state")
	if err := os.CopyFS(killed, os.DirFS(path)); err != nil {
		t.Fatal(err)
	}
	s = openStore(t, killed)
	c := mustNext(t, s.Queue())
	if c.Entry().ID != "b" {
		t.Errorf("%s is there again", c.Entry().ID)
	}
	if m, err := s.last(t.Context(), s.queue.stream, entrySubject+"a"); m != nil || err != nil {
		t.Errorf("it is kept: %v, %v", m, err)
	}
	mustDone(t, c)
}

func TestAClaimWhoseHolderIsNotHeardOfGoesToAnother(t *testing.T) {
	url := external(t)
	const lease = 2 * time.Second // long enough that a busy machine comes to renewing it
	on := func(o *Options) { o.URL, o.Lease = url, lease }
	a, b := openStore(t, t.TempDir(), on), openStore(t, t.TempDir(), on)
	mustPut(t, a.Queue(), "a", "x")
	mustPut(t, b.Queue(), "b", "x")
	held := mustNext(t, a.Queue())
	// While it is renewed nobody else has it.
	ctx, cancel := context.WithTimeout(t.Context(), lease*3/2)
	if c, err := b.Queue().Next(ctx); err == nil {
		t.Fatalf("%s has two claims", c.Entry().ID)
	}
	cancel()
	// The holder sleeps: it renews nothing any more.
	asleep := held.(*claim)
	close(asleep.quit)
	asleep.beats.Wait()
	taken := mustNext(t, b.Queue())
	if taken.Entry().ID != "a" || taken.Attempt() != 2 {
		t.Fatalf("%s in attempt %d", taken.Entry().ID, taken.Attempt())
	}
	asleep.end.Do(func() {}) // quit is closed already
	if err := held.Hold(t.Context()); !errors.Is(err, ErrLost) {
		t.Errorf("it may go on: %v", err)
	}
	if err := held.Done(t.Context()); !errors.Is(err, ErrLost) {
		t.Errorf("it may acknowledge: %v", err)
	}
	select {
	case <-held.Lost():
	default:
		t.Error("it is not told")
	}
	if err := taken.Hold(t.Context()); err != nil {
		t.Error(err)
	}
	mustDone(t, taken)
	if c := mustNext(t, a.Queue()); c.Entry().ID != "b" {
		t.Errorf("%s comes next", c.Entry().ID)
	} else {
		mustDone(t, c)
	}
}

func TestManyWorkersOfSeveralAdaptersNeverShareAKeyAndKeepItsOrder(t *testing.T) {
	const entries, keys, workers = 300, 7, 4
	url := external(t)
	var stores []*Store
	for range 3 {
		stores = append(stores, openStore(t, t.TempDir(), func(o *Options) { o.URL, o.Lease = url, 30*time.Second }))
	}
	var (
		running [keys]atomic.Int32
		ended   atomic.Int32
		mu      sync.Mutex
		order   [keys][]int
		group   sync.WaitGroup
	)
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	for _, s := range stores {
		for range workers {
			group.Go(func() {
				for {
					c, err := s.Queue().Next(ctx)
					if err != nil {
						return
					}
					var number int
					fmt.Sscan(c.Entry().ID, &number)
					for _, key := range c.Entry().Keys {
						k := key[0] - 'a'
						if running[k].Add(1) != 1 {
							t.Errorf("two at once hold %s", key)
						}
						mu.Lock()
						order[k] = append(order[k], number)
						mu.Unlock()
					}
					for _, key := range c.Entry().Keys {
						running[key[0]-'a'].Add(-1)
					}
					if err := c.Done(ctx); err != nil {
						t.Error(err)
					}
					if ended.Add(1) == entries {
						stop()
					}
				}
			})
		}
	}
	for i := range entries {
		var mine []string
		for range rand.IntN(3) {
			if key := string(rune('a' + rand.IntN(keys))); !slices.Contains(mine, key) {
				mine = append(mine, key)
			}
		}
		if _, _, err := stores[i%3].Queue().Put(t.Context(), Entry{ID: fmt.Sprint(i), Keys: mine}); err != nil {
			t.Fatal(err)
		}
	}
	group.Wait()
	if ended.Load() != entries {
		t.Errorf("%d of %d have ended", ended.Load(), entries)
	}
	for k := range order {
		if len(order[k]) == 0 || !slices.IsSorted(order[k]) {
			t.Errorf("key %c ran out of order: %v", 'a'+k, order[k])
		}
	}
}
