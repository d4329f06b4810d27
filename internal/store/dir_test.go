package store

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"unsafe"

	"github.com/meshery/meshery-filters/internal/problem"
)

func open(t *testing.T, path string) *Dir {
	t.Helper()
	d, err := OpenDir(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	return d
}

// refused checks that an error is StoreFailed and helps: it has every one of the words.
func refused(t *testing.T, err error, words ...string) {
	t.Helper()
	if !errors.Is(err, problem.StoreFailed) {
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
	d := open(t, path)
	if _, err := d.ComponentID(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := d.Records().Put(t.Context(), "k", []byte("v")); err != nil {
		t.Fatal(err)
	}
	if _, err := d.Blobs().Put(t.Context(), []byte("module")); err != nil {
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
	if err != nil || files != 4 {
		t.Errorf("%d files, %v", files, err)
	}
}

func TestOneDirectoryServesOneAdapter(t *testing.T) {
	path := t.TempDir()
	d := open(t, path)
	_, err := OpenDir(path)
	if !errors.Is(err, problem.StateInUse) || !strings.Contains(err.Error(), path) || !strings.Contains(err.Error(), fmt.Sprint(os.Getpid())) {
		t.Errorf("got %v", err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	if err := d.Records().Put(t.Context(), "k", nil); err == nil {
		t.Error("a closed directory took a record")
	}
	open(t, path)
}

func TestADirectoryThatCannotBeWrittenIsRefusedByName(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	taken := t.TempDir()
	if err := os.WriteFile(filepath.Join(taken, "records"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	outside := t.TempDir()
	if err := os.Symlink(filepath.Join(t.TempDir(), "elsewhere"), filepath.Join(outside, "lock")); err != nil {
		t.Fatal(err)
	}
	for story, test := range map[string]struct{ path, word string }{
		"a file":                 {file, "--state-dir"},
		"under a file":           {filepath.Join(file, "state"), "--state-dir"},
		"its records are a file": {taken, filepath.Join(taken, "records")},
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
	d := open(t, path)
	first, err := d.ComponentID(t.Context())
	if err != nil || !uuid.MatchString(first) {
		t.Fatalf("%q, %v", first, err)
	}
	d.Close()
	d = open(t, path)
	if again, err := d.ComponentID(t.Context()); again != first || err != nil {
		t.Errorf("%q became %q, %v", first, again, err)
	}
	if other, err := open(t, t.TempDir()).ComponentID(t.Context()); other == first || err != nil {
		t.Errorf("another directory has the same, %v", err)
	}
	name := filepath.Join(path, "component-id")
	if err := os.WriteFile(name, []byte("not one"), 0o600); err != nil {
		t.Fatal(err)
	}
	_, err = d.ComponentID(t.Context())
	refused(t, err, name, "delete")
}

func TestWhatAWriterLeftWhenItDiedIsCleanedAway(t *testing.T) {
	path := t.TempDir()
	d := open(t, path)
	if err := d.Records().Put(t.Context(), "k", []byte("old")); err != nil {
		t.Fatal(err)
	}
	d.Close()
	for _, folder := range []string{".", "records", "modules"} {
		if err := os.WriteFile(filepath.Join(path, folder, ".tmp-1"), []byte("half"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	d = open(t, path)
	if left, err := filepath.Glob(filepath.Join(path, "*", ".tmp-*")); len(left) != 0 || err != nil {
		t.Errorf("left %v, %v", left, err)
	}
	if value, err := d.Records().Get(t.Context(), "k"); string(value) != "old" || err != nil {
		t.Errorf("got %q, %v", value, err)
	}
	if err := d.Records().Put(t.Context(), "k", []byte("new")); err != nil {
		t.Error(err)
	}
}

func TestRecordsKeepAnyKey(t *testing.T) {
	path := t.TempDir()
	d := open(t, path)
	r := d.Records()
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
	d.Close()
	r = open(t, path).Records()
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
	if err := r.Put(t.Context(), "big", make([]byte, maxRecord+1)); !errors.Is(err, problem.StoreFailed) {
		t.Errorf("too big: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := r.Put(ctx, "k", nil); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}

func TestADamagedRecordIsNamed(t *testing.T) {
	for story, damage := range map[string]func([]byte) []byte{
		"emptied":        func(b []byte) []byte { return nil },
		"cut short":      func(b []byte) []byte { return b[:len(b)-1] },
		"a flipped bit":  func(b []byte) []byte { b[len(b)-1] ^= 1; return b },
		"no header":      func(b []byte) []byte { return []byte("hello\nworld") },
		"another's":      func(b []byte) []byte { return bytes.Replace(b, []byte(`"k"`), []byte(`"j"`), 1) },
		"grown too long": func(b []byte) []byte { return make([]byte, maxRecord+maxHeader+1) },
	} {
		t.Run(story, func(t *testing.T) {
			path := t.TempDir()
			r := open(t, path).Records()
			if err := r.Put(t.Context(), "k", []byte("value")); err != nil {
				t.Fatal(err)
			}
			name := filepath.Join(path, recordName("k"))
			data, err := os.ReadFile(name)
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(name, damage(data), 0o600); err != nil {
				t.Fatal(err)
			}
			_, err = r.Get(t.Context(), "k")
			refused(t, err, name, "delete it")
			_, err = r.All(t.Context())
			refused(t, err, name, "delete it")
			if err := r.Put(t.Context(), "k", []byte("mended")); err != nil {
				t.Error(err)
			}
			if value, err := r.Get(t.Context(), "k"); string(value) != "mended" || err != nil {
				t.Errorf("%q, %v", value, err)
			}
		})
	}
}

func TestConcurrentWritersLeaveOneWholeValue(t *testing.T) {
	path := t.TempDir()
	d := open(t, path)
	var group sync.WaitGroup
	for writer := range 8 {
		group.Go(func() {
			value := bytes.Repeat([]byte{byte('a' + writer)}, 10_000)
			for range 20 {
				if err := d.Records().Put(t.Context(), "k", value); err != nil {
					t.Error(err)
				}
				got, err := d.Records().Get(t.Context(), "k")
				if err != nil || len(got) != len(value) || bytes.Count(got, got[:1]) != len(got) {
					t.Errorf("torn: %v", err)
				}
				if _, err := d.Blobs().Put(t.Context(), []byte("the same module")); err != nil {
					t.Error(err)
				}
			}
		})
	}
	group.Wait()
	for folder, want := range map[string]int{"records": 1, "modules": 1} {
		if entries, err := os.ReadDir(filepath.Join(path, folder)); len(entries) != want || err != nil {
			t.Errorf("%s holds %v, %v", folder, entries, err)
		}
	}
}

func TestBlobsAreVerifiedAndShared(t *testing.T) {
	path := t.TempDir()
	d := open(t, path)
	b := d.Blobs()
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

func TestADamagedBlobIsNamedAndMendedByPut(t *testing.T) {
	path := t.TempDir()
	b := open(t, path).Blobs()
	module := bytes.Repeat([]byte("wasm"), 1000)
	digest, err := b.Put(t.Context(), module)
	if err != nil {
		t.Fatal(err)
	}
	name := filepath.Join(path, "modules", digest+".wasm")
	for story, damaged := range map[string][]byte{"empty": {}, "short": module[1:]} {
		if err := os.WriteFile(name, damaged, 0o600); err != nil {
			t.Fatal(err)
		}
		runtime.GC() // else the bytes may still be shared
		_, err = b.Get(t.Context(), digest)
		refused(t, err, name, "again")
		if _, err := b.Put(t.Context(), module); err != nil {
			t.Fatal(err)
		}
		if data, err := os.ReadFile(name); !bytes.Equal(data, module) || err != nil {
			t.Errorf("%s: not mended, %v", story, err)
		}
	}
}

// The directory of the process that this test starts takes no file above 64 KiB, which ends a write half way just as a
// full disk does.
func TestAWriteThatEndsHalfWayChangesNothing(t *testing.T) {
	const variable = "STORE_TEST_FULL_DISK"
	if path := os.Getenv(variable); path != "" {
		signal.Ignore(syscall.SIGXFSZ)
		if err := syscall.Setrlimit(syscall.RLIMIT_FSIZE, &syscall.Rlimit{Cur: 64 << 10, Max: 64 << 10}); err != nil {
			t.Fatal(err)
		}
		d := open(t, path)
		refused(t, d.Records().Put(t.Context(), "k", make([]byte, 1<<20)), filepath.Join(path, recordName("k")), "file too large")
		if value, err := d.Records().Get(t.Context(), "k"); string(value) != "old" || err != nil {
			t.Errorf("got %q, %v", value, err)
		}
		_, err := d.Blobs().Put(t.Context(), make([]byte, 1<<20))
		refused(t, err, filepath.Join(path, "modules"))
		for folder, want := range map[string]int{"records": 1, "modules": 0} {
			if entries, err := os.ReadDir(filepath.Join(path, folder)); len(entries) != want || err != nil {
				t.Errorf("%s holds %v, %v", folder, entries, err)
			}
		}
		return
	}
	path := t.TempDir()
	d := open(t, path)
	if err := d.Records().Put(t.Context(), "k", []byte("old")); err != nil {
		t.Fatal(err)
	}
	d.Close()
	test := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^"+t.Name()+"$", "-test.v")
	test.Env = append(os.Environ(), variable+"="+path)
	out, err := test.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "--- PASS") {
		t.Errorf("%v\n%s", err, out)
	}
}
