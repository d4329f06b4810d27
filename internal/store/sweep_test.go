package store

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/meshery/meshery-filters/internal/problem"
)

// sweepUntil sweeps until done, naming what is referred to.
func sweepUntil(t *testing.T, s *Store, done func() bool, referred ...string) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !done(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("not within 20s")
		}
		if _, err := s.Sweep(t.Context(), func(context.Context) (map[string]bool, error) {
			all := map[string]bool{}
			for _, digest := range referred {
				all[digest] = true
			}
			return all, nil
		}); err != nil {
			t.Fatal(err)
		}
	}
}

func gone(t *testing.T, s *Store, digest string) bool {
	t.Helper()
	_, err := s.Blobs().Get(t.Context(), digest)
	if err != nil && !errors.Is(err, problem.ModuleUnavailable) {
		t.Fatal(err)
	}
	return err != nil
}

func TestBlobsThatNothingRefersToAreDeletedAndCanBePutAgain(t *testing.T) {
	s, err := Open(t.Context(), Options{StateDir: t.TempDir(), SyncInterval: time.Hour, KeepBlobs: 50 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	var digests []string
	for i := range 3 {
		digest, err := s.Blobs().Put(t.Context(), bytes.Repeat(fmt.Appendf(nil, "module %d ", i), 50_000))
		if err != nil {
			t.Fatal(err)
		}
		digests = append(digests, digest)
	}
	before := s.Sizes(t.Context())["modules"]
	// Whoever holds the bytes must not hide that they are not kept any more.
	held, err := s.Blobs().Get(t.Context(), digests[0])
	if err != nil {
		t.Fatal(err)
	}
	sweepUntil(t, s, func() bool { return gone(t, s, digests[0]) && gone(t, s, digests[1]) }, digests[2])
	if gone(t, s, digests[2]) {
		t.Error("the one that is referred to is gone")
	}
	if after := s.Sizes(t.Context())["modules"]; after > before/2 {
		t.Errorf("%d of %d bytes are left", after, before)
	}
	if there, err := s.Blobs().Touch(t.Context(), digests[0]); there || err != nil {
		t.Errorf("what is gone is there: %v", err)
	}
	if _, err := s.Blobs().Put(t.Context(), held); err != nil {
		t.Fatal(err)
	}
	if got, err := s.Blobs().Get(t.Context(), digests[0]); err != nil || !bytes.Equal(got, held) {
		t.Errorf("what was put again: %d bytes, %v", len(got), err)
	}
}

func TestBytesThatNoBlobHasAreDeleted(t *testing.T) {
	s, err := Open(t.Context(), Options{StateDir: t.TempDir(), SyncInterval: time.Hour, KeepBlobs: 50 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	kept, err := s.Blobs().Put(t.Context(), bytes.Repeat([]byte("kept"), 100_000))
	if err != nil {
		t.Fatal(err)
	}
	whole := s.Sizes(t.Context())["modules"]
	for range 3 { // as a Put leaves them whose process ends
		if _, err := s.js.Publish(t.Context(), chunkSubject+"cut-off", make([]byte, 128<<10)); err != nil {
			t.Fatal(err)
		}
	}
	if with := s.Sizes(t.Context())["modules"]; with < whole+3*128<<10 {
		t.Fatalf("the bytes are not there: %d of %d", with, whole)
	}
	since := time.Now()
	less := func() bool { return s.Sizes(t.Context())["modules"] <= whole }
	s.blobs.(*blobsInObjects).longestPut = 500 * time.Millisecond
	sweepUntil(t, s, less, kept)
	if took := time.Since(since); took < 500*time.Millisecond {
		t.Errorf("they are gone after %s, when a Put may still have been at work", took)
	}
	if gone(t, s, kept) {
		t.Error("a blob's bytes are gone")
	}
}

// One adapter has found a blob unused for long enough, and another touches it before it is deleted.
func TestABlobThatIsTouchedBetweenLookingAndDeletingStays(t *testing.T) {
	s, err := Open(t.Context(), Options{StateDir: t.TempDir(), SyncInterval: time.Hour})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	data := bytes.Repeat([]byte("module"), 1000)
	digest, err := s.Blobs().Put(t.Context(), data)
	if err != nil {
		t.Fatal(err)
	}
	b := s.blobs.(*blobsInObjects)
	info, sequence, err := b.info(t.Context(), digest)
	if err != nil {
		t.Fatal(err)
	}
	clear(b.touched) // as of another process
	if there, err := s.Blobs().Touch(t.Context(), digest); !there || err != nil {
		t.Fatal(there, err)
	}
	if deleted, err := b.delete(t.Context(), digest, info, sequence); deleted || err != nil {
		t.Fatalf("it was deleted: %v", err)
	}
	if got, err := s.Blobs().Get(t.Context(), digest); err != nil || !bytes.Equal(got, data) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
}

// Whatever moment a blob is put again at, the entry that was accepted after that finds it.
func TestABlobThatIsPutWhileASweepLooksStays(t *testing.T) {
	s, err := Open(t.Context(), Options{StateDir: t.TempDir(), SyncInterval: time.Hour, KeepBlobs: time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	data := []byte("a module")
	digest, err := s.Blobs().Put(t.Context(), data)
	if err != nil {
		t.Fatal(err)
	}
	sweep := func(meanwhile func()) Swept {
		t.Helper()
		swept, err := s.Sweep(t.Context(), func(context.Context) (map[string]bool, error) { meanwhile(); return nil, nil })
		if err != nil {
			t.Fatal(err)
		}
		return swept
	}
	for range 10 {
		sweep(func() {})
		time.Sleep(2 * time.Millisecond) // it is unused for long enough
		if swept := sweep(func() {
			if _, err := s.Blobs().Put(t.Context(), data); err != nil {
				t.Fatal(err)
			}
		}); len(swept.Deleted) > 0 || gone(t, s, digest) {
			t.Fatal("it is gone")
		}
	}
}

// Two adapters accept and run what needs blobs that come and go, while both delete what nothing refers to.
func TestWhatAnAcceptedEntryNeedsIsNeverDeleted(t *testing.T) {
	url := external(t)
	var (
		adapters []*Store
		deleted  atomic.Int64
		all      sync.WaitGroup
		asking   sync.WaitGroup
	)
	for range 2 {
		s, err := Open(t.Context(), Options{StateDir: t.TempDir(), URL: url, KeepBlobs: time.Second})
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		adapters = append(adapters, s)
	}
	ctx, stop := context.WithCancel(t.Context())
	defer all.Wait()
	defer stop()
	for n, s := range adapters {
		all.Go(func() { // the worker
			for {
				c, err := s.Queue().Next(ctx)
				if err != nil {
					return
				}
				digest := string(c.Entry().Data)
				if _, err := s.Blobs().Get(ctx, digest); err != nil && ctx.Err() == nil {
					t.Errorf("%s: %v", c.Entry().ID, err)
				}
				key := "chains/" + c.Entry().Keys[0]
				_, err = s.Records().Get(ctx, key)
				if err == nil {
					err = s.Records().Put(ctx, key, []byte(digest))
				}
				if err != nil && ctx.Err() == nil {
					t.Error(err)
				}
				if err := c.Done(ctx); err != nil && ctx.Err() == nil {
					t.Error(err)
				}
			}
		})
		all.Go(func() { // the sweep, as an operation's Runner does it
			for ctx.Err() == nil {
				swept, err := s.Sweep(ctx, func(ctx context.Context) (map[string]bool, error) {
					needed := map[string]bool{}
					entries, err := s.Queue().Held(ctx)
					for _, e := range entries {
						needed[string(e.Data)] = true
					}
					revisions, herr := s.Records().History(ctx, "chains/")
					for _, r := range revisions {
						needed[string(r.Value)] = true
					}
					return needed, errors.Join(err, herr)
				})
				if err != nil && ctx.Err() == nil {
					t.Error(err)
				}
				deleted.Add(int64(len(swept.Deleted)))
				time.Sleep(10 * time.Millisecond)
			}
		})
		asking.Go(func() {
			for i := 0; deleted.Load() < 40 && !t.Failed() && i < 20_000; i++ {
				digest, err := s.Blobs().Put(ctx, fmt.Appendf(nil, "module %d", rand.IntN(300)))
				if err != nil {
					t.Error(err)
					return
				}
				if _, _, err := s.Queue().Put(ctx, Entry{ID: fmt.Sprintf("op-%d-%d", n, i), Keys: []string{fmt.Sprint(n)}, Data: []byte(digest), Digest: digest}); err != nil {
					t.Error(err)
					return
				}
				time.Sleep(5 * time.Millisecond)
			}
		})
	}
	asking.Wait()
	if deleted.Load() < 40 {
		t.Errorf("%d were deleted", deleted.Load())
	}
}
