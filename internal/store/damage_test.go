package store

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/meshery/meshery-filters/internal/problem"
)

// kept is all that a test's store holds, as text.
func kept(t *testing.T, s *Store) (all string, err error) {
	t.Helper()
	var b strings.Builder
	revisions, err := s.Records().History(t.Context(), "")
	if err != nil {
		return "", err
	}
	for _, r := range revisions {
		fmt.Fprintln(&b, r.Key, r.Number, len(r.Value))
	}
	for i := range 6 {
		id := fmt.Sprintf("op-%d", i)
		records, err := s.Log().Of(t.Context(), id)
		if err != nil {
			return "", err
		}
		for _, r := range records {
			fmt.Fprintln(&b, r.Subject, r.Position, string(r.Data))
		}
		known, err := s.Queue().Known(t.Context(), id, "digest")
		if err != nil {
			return "", err
		}
		fmt.Fprintln(&b, id, known)
	}
	s.queue.mu.Lock()
	for _, h := range s.queue.held {
		fmt.Fprintln(&b, h.ID, h.Keys, string(h.Data))
	}
	s.queue.mu.Unlock()
	data, err := s.Blobs().Get(t.Context(), blobDigest)
	if err != nil {
		return "", err
	}
	fmt.Fprintln(&b, len(data))
	position, found, err := s.Position("reader").Load(t.Context())
	if err != nil {
		return "", err
	}
	fmt.Fprintln(&b, position, found)
	id, err := s.ComponentID(t.Context())
	if err != nil {
		return "", err
	}
	key, err := s.SealKey()
	fmt.Fprintln(&b, id, key)
	return b.String(), err
}

var (
	blob       = bytes.Repeat([]byte("a module "), 50_000)
	blobDigest = digestOf(blob)
)

func fill(t *testing.T, s *Store) {
	t.Helper()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	for i := range 6 {
		id := fmt.Sprintf("op-%d", i)
		must(s.Records().Put(t.Context(), fmt.Sprintf("chains/%d", i%3), bytes.Repeat([]byte("chain"), 10+i)))
		_, err := s.Log().Append(t.Context(), id, []byte("what "+id+" tells"), 0)
		must(err)
		_, _, err = s.Queue().Put(t.Context(), Entry{ID: id, Keys: []string{"all"}, Data: []byte("what " + id + " does"), Digest: "digest"})
		must(err)
	}
	c, err := s.Queue().Next(t.Context())
	must(err)
	must(c.Done(t.Context()))
	_, err = s.Blobs().Put(t.Context(), blob)
	must(err)
	must(s.Position("reader").Save(t.Context(), 4))
}

// Each file of a state directory in turn is cut in half, has a few bytes changed, or is emptied. Whatever it was, either
// nothing is missing, or a problem says where.
func TestADamagedFileIsNamedOrCostsNothing(t *testing.T) {
	whole := filepath.Join(t.TempDir(), "state")
	s := openStore(t, whole)
	fill(t, s)
	want, err := kept(t, s)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	var files []string
	if err := filepath.WalkDir(whole, func(name string, entry fs.DirEntry, err error) error {
		if err == nil && !entry.IsDir() {
			name, err = filepath.Rel(whole, name)
			files = append(files, name)
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	ways := map[string]func([]byte) []byte{
		"cut in half": func(b []byte) []byte { return b[:len(b)/2] },
		"emptied":     func([]byte) []byte { return nil },
		"changed": func(b []byte) []byte {
			for i := range min(3, len(b)) {
				b[len(b)/2+i-min(3, len(b))/2] ^= 0xff
			}
			return b
		},
		"changed near its end": func(b []byte) []byte {
			if len(b) > 12 {
				b[len(b)-12] ^= 0x55
			}
			return b
		},
	}
	named := 0
	for _, file := range files {
		for way, damage := range ways {
			if filepath.Ext(file) != ".blk" && strings.Contains(file, "/") && way == "changed near its end" {
				continue // the whole of it has one checksum
			}
			state := filepath.Join(t.TempDir(), "state")
			if err := os.CopyFS(state, os.DirFS(whole)); err != nil {
				t.Fatal(err)
			}
			path := filepath.Join(state, file)
			data, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(path, damage(data), 0o600); err != nil {
				t.Fatal(err)
			}
			got := ""
			s, err := Open(t.Context(), Options{StateDir: state})
			if err == nil {
				got, err = kept(t, s)
				if cerr := s.Close(); cerr != nil {
					t.Error(cerr)
				}
			}
			switch {
			case err == nil && got != want:
				t.Errorf("%s, %s: without a word it holds\n%s\nand held\n%s", file, way, got, want)
			case err != nil:
				named++
				if !errors.Is(err, problem.StateDamaged) || !strings.Contains(err.Error(), state) {
					t.Errorf("%s, %s: %v", file, way, err)
				}
			}
			os.RemoveAll(state)
		}
	}
	if named < 10 {
		t.Errorf("%d damages were named of those to %v", named, files)
	}
}

func digestOf(data []byte) string {
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:])
}
