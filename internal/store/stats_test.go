package store

import (
	"context"
	"crypto/rand"
	"testing"
)

func TestSizesAreThoseOfWhatIsKept(t *testing.T) {
	for where, options := range map[string]func(*Options){
		"inside":  func(*Options) {},
		"outside": func(o *Options) { o.URL = external(t) },
	} {
		t.Run(where, func(t *testing.T) {
			s := openStore(t, t.TempDir(), options)
			before := s.Sizes(t.Context())
			if len(before) != 5 {
				t.Errorf("the sizes are %v", before)
			}
			module := make([]byte, 300<<10)
			rand.Read(module)
			if _, err := s.Blobs().Put(t.Context(), module); err != nil {
				t.Fatal(err)
			}
			after := s.Sizes(t.Context())
			if grown := after["modules"] - before["modules"]; grown < 300<<10 || grown > 310<<10 || after["events"] != before["events"] {
				t.Errorf("the sizes were %v and are %v", before, after)
			}
			// As when the server does not answer in time.
			gone, cancel := context.WithCancel(t.Context())
			cancel()
			if sizes := s.Sizes(gone); len(sizes) > 0 {
				t.Errorf("without an answer the sizes are %v", sizes)
			}
		})
	}
}

func TestTheDepthOfTheQueueIsWhatWaitsAndWhatRuns(t *testing.T) {
	s := openStore(t, t.TempDir())
	q := s.Queue()
	want := func(waiting, running int) {
		t.Helper()
		if w, r := q.Depth(); w != waiting || r != running {
			t.Errorf("%d wait and %d run, want %d and %d", w, r, waiting, running)
		}
	}
	want(0, 0)
	mustPut(t, q, "a", "x")
	mustPut(t, q, "b", "x")
	want(2, 0)
	c := mustNext(t, q)
	want(1, 1)
	if err := c.Release(t.Context()); err != nil {
		t.Fatal(err)
	}
	want(2, 0)
	mustDone(t, mustNext(t, q))
	want(1, 0)
}
