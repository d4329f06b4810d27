package cli

import (
	"bytes"
	"context"
	"encoding/pem"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"maps"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
)

var update = flag.Bool("update", false, "rewrite the golden files")

// authorities is a file with what this program trusts beside the system's authorities: the certificate of net/http/httptest.
var authorities string

func TestMain(m *testing.M) {
	dir, err := os.MkdirTemp("", "authorities")
	if err != nil {
		panic(err)
	}
	server := httptest.NewTLSServer(nil)
	server.Close()
	authorities = filepath.Join(dir, "httptest.pem")
	certificate := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw})
	if err := errors.Join(os.WriteFile(authorities, certificate, 0o600), os.Setenv("SSL_CERT_FILE", authorities)); err != nil {
		panic(err)
	}
	code := m.Run()
	stopShared()
	if err := goleak.Find(); err != nil && code == 0 {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	_ = os.RemoveAll(dir)
	os.Exit(code)
}

// result is what one command line did.
type result struct {
	code     int
	out, err string
}

// text is a buffer that a command may write while a test reads.
type text struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (t *text) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.b.Write(p)
}

func (t *text) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.b.String()
}

// waitFor returns once the text holds all of the words, in their order.
func (t *text) waitFor(tb testing.TB, d time.Duration, words ...string) {
	tb.Helper()
	for deadline := time.Now().Add(d); ; time.Sleep(10 * time.Millisecond) {
		rest, missing := t.String(), ""
		for _, w := range words {
			var ok bool
			if _, rest, ok = strings.Cut(rest, w); !ok {
				missing = w
				break
			}
		}
		if missing == "" {
			return
		}
		if time.Now().After(deadline) {
			tb.Fatalf("no %q after %s in:\n%s", missing, d, t.String())
		}
	}
}

// background is a command that runs while a test goes on.
type background struct {
	out, err  text
	interrupt context.CancelFunc
	done      chan struct{}
	code      int // once done is closed
}

// start runs a command until the test ends or it does.
func start(t *testing.T, env []string, args ...string) *background {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	b := &background{interrupt: cancel, done: make(chan struct{})}
	go func() {
		defer close(b.done)
		b.code = Run(ctx, args, IO{In: strings.NewReader(""), Out: &b.out, Err: &b.err, Env: env}, Build{Version: "v0.0.0-test"})
	}()
	t.Cleanup(func() {
		cancel()
		b.wait(t, 60*time.Second)
	})
	return b
}

func (b *background) wait(t *testing.T, d time.Duration) int {
	t.Helper()
	select {
	case <-b.done:
		return b.code
	case <-time.After(d):
		t.Fatalf("the command did not end within %s; it said:\n%s%s", d, b.out.String(), b.err.String())
		return -1
	}
}

// run runs one command to its end.
func run(t *testing.T, args ...string) result { return runWith(t, "", nil, args...) }

func runWith(t *testing.T, stdin string, env []string, args ...string) result {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 90*time.Second)
	defer cancel()
	var out, errs bytes.Buffer
	code := Run(ctx, args, IO{In: strings.NewReader(stdin), Out: &out, Err: &errs, Env: env}, Build{Version: "v0.0.0-test"})
	return result{code, out.String(), errs.String()}
}

func (r result) want(t *testing.T, code int, words ...string) result {
	t.Helper()
	if r.code != code {
		t.Fatalf("exit code %d, want %d\n%s%s", r.code, code, r.out, r.err)
	}
	for _, w := range words {
		if !strings.Contains(r.out+r.err, w) {
			t.Errorf("no %q in:\n%s%s", w, r.out, r.err)
		}
	}
	return r
}

// golden compares a folder of testdata with what the files in it should hold.
func golden(t *testing.T, folder string, want map[string]string) {
	t.Helper()
	folder = filepath.Join("testdata", folder)
	const command = "go test ./internal/cli -run 'Golden' -update"
	if *update {
		if err := os.RemoveAll(folder); err != nil {
			t.Fatal(err)
		}
		if err := os.MkdirAll(folder, 0o755); err != nil {
			t.Fatal(err)
		}
		for name, text := range want {
			if err := os.WriteFile(filepath.Join(folder, name), []byte(text), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		return
	}
	for _, name := range slices.Sorted(maps.Keys(want)) {
		got, err := os.ReadFile(filepath.Join(folder, name))
		if err != nil {
			t.Errorf("%v; write it with: %s", err, command)
			continue
		}
		if string(got) != want[name] {
			t.Errorf("%s differs; look at the change with: %s && git diff\nis now:\n%s", filepath.Join(folder, name), command, want[name])
		}
	}
	err := filepath.WalkDir(folder, func(path string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			if _, ok := want[d.Name()]; !ok {
				t.Errorf("%s belongs to nothing; remove it with: %s", path, command)
			}
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
}
