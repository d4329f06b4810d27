package store

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/meshery/meshery-filters/internal/problem"
)

func openDir(t *testing.T, path string) *Dir {
	t.Helper()
	d, err := OpenDir(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	return d
}

// refused checks that an error is StoreFailed or StateDamaged and helps: it has every one of the words.
func refused(t *testing.T, err error, words ...string) {
	t.Helper()
	if !errors.Is(err, problem.StoreFailed) && !errors.Is(err, problem.StateDamaged) {
		t.Fatalf("got %v", err)
	}
	for _, word := range words {
		if !strings.Contains(err.Error(), word) {
			t.Errorf("%q does not name %q", err, word)
		}
	}
}

func TestAStateDirectoryIsTheOwnersAlone(t *testing.T) {
	path := filepath.Join(t.TempDir(), "new", "state")
	s := openStore(t, path)
	if _, err := s.ComponentID(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := s.Records().Put(t.Context(), "k", []byte("v")); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Blobs().Put(t.Context(), []byte("module")); err != nil {
		t.Fatal(err)
	}
	files := 0
	err := filepath.WalkDir(path, func(name string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := entry.Info()
		if err != nil {
			return err
		}
		want := fs.FileMode(0o600)
		if entry.IsDir() {
			want = 0o700
		} else {
			files++
		}
		if got := info.Mode().Perm(); got != want {
			t.Errorf("%s is %v, want %v", name, got, want)
		}
		return nil
	})
	if err != nil || files < 10 {
		t.Errorf("%d files, %v", files, err)
	}
}

func TestOneDirectoryServesOneAdapter(t *testing.T) {
	path := t.TempDir()
	d := openDir(t, path)
	_, err := OpenDir(path)
	if !errors.Is(err, problem.StateInUse) || !strings.Contains(err.Error(), path) || !strings.Contains(err.Error(), fmt.Sprint(os.Getpid())) {
		t.Errorf("got %v", err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := d.ComponentID(t.Context()); err == nil {
		t.Error("a closed directory is written to")
	}
	openDir(t, path)
}

func TestADirectoryThatCannotBeWrittenIsRefusedByName(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	outside := t.TempDir()
	if err := os.Symlink(filepath.Join(t.TempDir(), "elsewhere"), filepath.Join(outside, "lock")); err != nil {
		t.Fatal(err)
	}
	for story, test := range map[string]struct{ path, word string }{
		"a file":                 {file, "--state-dir"},
		"under a file":           {filepath.Join(file, "state"), "--state-dir"},
		"its lock leads outside": {outside, filepath.Join(outside, "lock")},
	} {
		t.Run(story, func(t *testing.T) {
			_, err := OpenDir(test.path)
			refused(t, err, test.word)
		})
	}
}

func TestTheComponentIDStays(t *testing.T) {
	path := t.TempDir()
	d := openDir(t, path)
	first, err := d.ComponentID(t.Context())
	if err != nil || !uuid.MatchString(first) {
		t.Fatalf("%q, %v", first, err)
	}
	d.Close()
	d = openDir(t, path)
	if again, err := d.ComponentID(t.Context()); again != first || err != nil {
		t.Errorf("%q became %q, %v", first, again, err)
	}
	if other, err := openDir(t, t.TempDir()).ComponentID(t.Context()); other == first || err != nil {
		t.Errorf("another directory has the same, %v", err)
	}
	name := filepath.Join(path, "component-id")
	if err := os.WriteFile(name, []byte("not one"), 0o600); err != nil {
		t.Fatal(err)
	}
	_, err = d.ComponentID(t.Context())
	refused(t, err, name, "delete")
}
