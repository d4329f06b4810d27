package module_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/meshery/meshery-filters/internal/filter"
	"github.com/meshery/meshery-filters/internal/module"
	"github.com/meshery/meshery-filters/internal/problem"
	"github.com/meshery/meshery-filters/internal/store"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var wasm = []byte("\x00asm\x01\x00\x00\x00a module")

// blobs is the store of a fresh state directory.
func blobs(t *testing.T) store.Blobs {
	t.Helper()
	dir, err := store.Open(t.Context(), store.Options{StateDir: t.TempDir(), SyncInterval: time.Hour})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { dir.Close() })
	return dir.Blobs()
}

// files lists what is in a folder.
func files(t *testing.T, folder string) (names []string) {
	t.Helper()
	if err := filepath.WalkDir(folder, func(path string, _ fs.DirEntry, err error) error {
		names = append(names, path)
		return err
	}); err != nil {
		t.Fatal(err)
	}
	return names
}

func digest(data []byte) string {
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:])
}

// serve starts a TLS server on loopback and returns its address and the authorities that trust it.
func serve(t *testing.T, h http.Handler) (string, *x509.CertPool) {
	t.Helper()
	s := httptest.NewUnstartedServer(h)
	s.Config.ErrorLog = log.New(io.Discard, "", 0)
	s.StartTLS()
	t.Cleanup(s.Close)
	pool := x509.NewCertPool()
	pool.AddCert(s.Certificate())
	return s.URL, pool
}

func resolver(t *testing.T, o module.Options) *module.Resolver {
	t.Helper()
	if o.Blobs == nil {
		o.Blobs = blobs(t)
	}
	o.Builtin = func(name string) ([]byte, bool) { return wasm, name == "headers" }
	o.BuiltinNames = []string{"headers"}
	return module.New(o)
}

// wants fails unless err is of the kind and its text holds every word.
func wants(t *testing.T, err error, kind *problem.Kind, words ...string) {
	t.Helper()
	if !errors.Is(err, kind) {
		t.Fatalf("got %v, want %v", err, kind)
	}
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("%q does not say %q", err, w)
		}
	}
}

func TestEverySourceEndsAsADigestWithTheBytesStored(t *testing.T) {
	u, pool := serve(t, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.Write(wasm) }))
	for name, m := range map[string]filter.Module{
		"builtin":                 {Builtin: "headers"},
		"builtin with its digest": {Builtin: "headers", SHA256: digest(wasm)},
		"inline":                  {Inline: base64.StdEncoding.EncodeToString(wasm)},
		"inline with line breaks": {Inline: "AGFzbQEAAABh\nIG1vZHVsZQ==\n"},
		"digest in capitals":      {Inline: base64.StdEncoding.EncodeToString(wasm), SHA256: strings.ToUpper(digest(wasm))},
		"https":                   {URL: u + "/a.wasm", SHA256: digest(wasm)},
	} {
		t.Run(name, func(t *testing.T) {
			kept := blobs(t)
			got, data, err := resolver(t, module.Options{Blobs: kept, AllowLoopback: true, RootCAs: pool}).Resolve(t.Context(), m)
			if err != nil {
				t.Fatal(err)
			}
			if want := (filter.Module{Builtin: m.Builtin, URL: m.URL, SHA256: digest(wasm)}); got != want {
				t.Errorf("module is %+v, want %+v", got, want)
			}
			stored, err := kept.Get(t.Context(), digest(wasm))
			if err != nil || !bytes.Equal(data, wasm) || !bytes.Equal(stored, wasm) {
				t.Errorf("bytes are %q, stored %q, %v", data, stored, err)
			}
		})
	}
}

func TestAModuleWithoutASourceIsFoundByItsDigest(t *testing.T) {
	r := resolver(t, module.Options{})
	stored, _, err := r.Resolve(t.Context(), filter.Module{Inline: base64.StdEncoding.EncodeToString(wasm)})
	if err != nil {
		t.Fatal(err)
	}
	again, data, err := r.Resolve(t.Context(), stored)
	if err != nil || again != stored || !bytes.Equal(data, wasm) {
		t.Errorf("got %+v, %q, %v", again, data, err)
	}
	_, _, err = r.Resolve(t.Context(), filter.Module{SHA256: digest([]byte("other"))})
	wants(t, err, problem.ModuleUnavailable, digest([]byte("other")))
}

func TestModulesThatCannotBeAreRefusedWithTheField(t *testing.T) {
	ok := digest(wasm)
	for name, c := range map[string]struct {
		m     filter.Module
		kind  *problem.Kind
		words []string
	}{
		"unknown builtin":     {filter.Module{Builtin: "nope"}, problem.InvalidDocument, []string{"spec.module.builtin", `"nope"`, "headers"}},
		"builtin, other sum":  {filter.Module{Builtin: "headers", SHA256: digest(nil)}, problem.DigestMismatch, []string{"builtin headers", digest(nil), ok}},
		"inline, other sum":   {filter.Module{Inline: "AGFzbQ==", SHA256: ok}, problem.DigestMismatch, []string{"inline", ok, digest([]byte("\x00asm"))}},
		"inline, not base64":  {filter.Module{Inline: "%%%"}, problem.InvalidDocument, []string{"spec.module.inline"}},
		"inline, too large":   {filter.Module{Inline: base64.StdEncoding.EncodeToString(make([]byte, 101))}, problem.ModuleUnavailable, []string{"101", "100"}},
		"file":                {filter.Module{File: "/etc/passwd"}, problem.InvalidDocument, []string{"spec.module.file", "apply -f"}},
		"meshery":             {filter.Module{URL: "meshery://1234"}, problem.MesheryUnset, []string{"meshery://1234"}},
		"http":                {filter.Module{URL: "http://host.example/a.wasm", SHA256: ok}, problem.InvalidDocument, []string{"https"}},
		"https without sum":   {filter.Module{URL: "https://host.example/a.wasm"}, problem.InvalidDocument, []string{"spec.module.sha256"}},
		"https with password": {filter.Module{URL: "https://a:hunter2@host.example/a.wasm", SHA256: ok}, problem.InvalidDocument, []string{"credentials"}},
		"oci without host":    {filter.Module{URL: "oci:///filter:1"}, problem.InvalidDocument, []string{"spec.module.url"}},
		"https without host":  {filter.Module{URL: "https:///a.wasm", SHA256: ok}, problem.InvalidDocument, []string{"spec.module.url"}},
		"nothing":             {filter.Module{}, problem.InvalidDocument, []string{"no source"}},
	} {
		t.Run(name, func(t *testing.T) {
			state := t.TempDir()
			dir, err := store.Open(t.Context(), store.Options{StateDir: state, SyncInterval: time.Hour})
			if err != nil {
				t.Fatal(err)
			}
			defer dir.Close()
			before := files(t, state)
			_, data, err := resolver(t, module.Options{Blobs: dir.Blobs(), MaxBytes: 100}).Resolve(t.Context(), c.m)
			wants(t, err, c.kind, c.words...)
			if data != nil || !slices.Equal(files(t, state), before) {
				t.Errorf("a refused module gave bytes or was stored")
			}
			if strings.Contains(err.Error(), "hunter2") {
				t.Errorf("%q shows a password", err)
			}
		})
	}
}

func TestStoredBytesAreNotFetchedAgain(t *testing.T) {
	var asked atomic.Int32
	u, pool := serve(t, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { asked.Add(1); w.Write(wasm) }))
	r := resolver(t, module.Options{AllowLoopback: true, RootCAs: pool})
	for range 3 {
		if _, _, err := r.Resolve(t.Context(), filter.Module{URL: u, SHA256: digest(wasm)}); err != nil {
			t.Fatal(err)
		}
	}
	if n := asked.Load(); n != 1 {
		t.Errorf("asked %d times", n)
	}
}

func TestAFilterInMesheryIsAModuleLikeOthers(t *testing.T) {
	var asked []string
	answer := wasm
	o := module.Options{MaxBytes: 100, Timeout: time.Minute, Meshery: func(_ context.Context, id string, limit int64) ([]byte, error) {
		asked = append(asked, fmt.Sprintf("%s %d", id, limit))
		return answer, nil
	}}
	r := resolver(t, o)
	m, data, err := r.Resolve(t.Context(), filter.Module{URL: "meshery://1c9adbd4"})
	if err != nil || m.SHA256 != digest(wasm) || m.URL != "meshery://1c9adbd4" || !bytes.Equal(data, wasm) {
		t.Fatalf("%+v, %d bytes, %v", m, len(data), err)
	}
	// Its user may have replaced it; with a digest that cannot matter.
	answer = append(slices.Clone(wasm), '2')
	if m, _, err = r.Resolve(t.Context(), filter.Module{URL: "meshery://1c9adbd4"}); err != nil || m.SHA256 != digest(answer) {
		t.Errorf("%+v, %v", m, err)
	}
	if _, data, err = r.Resolve(t.Context(), filter.Module{URL: "meshery://1c9adbd4", SHA256: digest(wasm)}); err != nil || !bytes.Equal(data, wasm) {
		t.Errorf("what is stored under its digest: %v", err)
	}
	if want := []string{"1c9adbd4 100", "1c9adbd4 100"}; !slices.Equal(asked, want) {
		t.Errorf("asked for %q, want %q", asked, want)
	}
	_, _, err = r.Resolve(t.Context(), filter.Module{URL: "meshery://1c9adbd4", SHA256: digest([]byte("else"))})
	wants(t, err, problem.DigestMismatch, digest(answer))
	answer = make([]byte, 101)
	_, _, err = r.Resolve(t.Context(), filter.Module{URL: "meshery://1c9adbd4"})
	wants(t, err, problem.ModuleUnavailable, "101", "100")

	o.Timeout = time.Millisecond
	o.Meshery = func(ctx context.Context, _ string, _ int64) ([]byte, error) { <-ctx.Done(); return nil, ctx.Err() }
	_, _, err = resolver(t, o).Resolve(t.Context(), filter.Module{URL: "meshery://1c9adbd4"})
	wants(t, err, problem.ModuleUnavailable, "1ms")
}

func TestManyFetchesAtOnceEachGetTheirBytes(t *testing.T) {
	u, pool := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, r.URL.Path) }))
	r := resolver(t, module.Options{AllowLoopback: true, RootCAs: pool})
	var wg sync.WaitGroup
	for i := range 20 {
		wg.Go(func() {
			path := fmt.Sprintf("/%d", i%5)
			_, data, err := r.Resolve(t.Context(), filter.Module{URL: u + path, SHA256: digest([]byte(path))})
			if err != nil || string(data) != path {
				t.Errorf("%s gave %q, %v", path, data, err)
			}
		})
	}
	wg.Wait()
}

func TestAServerCannotGetPastTheLimits(t *testing.T) {
	const secret = "text from the server"
	forever := func(w http.ResponseWriter, r *http.Request) {
		for r.Context().Err() == nil {
			time.Sleep(time.Millisecond)
			w.Write([]byte{0})
			w.(http.Flusher).Flush()
		}
	}
	hijacked := func(answer string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			c, _, err := w.(http.Hijacker).Hijack()
			if err != nil {
				panic(err)
			}
			defer c.Close()
			io.WriteString(c, answer)
		}
	}
	for name, c := range map[string]struct {
		handler http.HandlerFunc
		kind    *problem.Kind
		words   []string
	}{
		"other bytes": {func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, secret) },
			problem.DigestMismatch, []string{digest(wasm), digest([]byte(secret))}},
		"not found": {func(w http.ResponseWriter, _ *http.Request) { http.Error(w, secret, 404) },
			problem.ModuleUnavailable, []string{"404 Not Found"}},
		"no content": {func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(204) },
			problem.ModuleUnavailable, []string{"204"}},
		"announces too much": {func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", "5000")
			w.Write(make([]byte, 5000))
		},
			problem.ModuleUnavailable, []string{"5000", "1000"}},
		"sends without end": {func(w http.ResponseWriter, r *http.Request) {
			for r.Context().Err() == nil {
				w.Write(make([]byte, 32<<10))
			}
		}, problem.ModuleUnavailable, []string{"more than the 1000 bytes"}},
		"drips": {forever, problem.ModuleUnavailable, []string{"within 500ms"}},
		"never answers": {func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() },
			problem.ModuleUnavailable, []string{"within 500ms"}},
		"ends early":            {hijacked("HTTP/1.1 200 OK\r\nContent-Length: 20\r\n\r\nabc"), problem.ModuleUnavailable, []string{"early"}},
		"speaks something else": {hijacked(secret + "\r\n\r\n"), problem.ModuleUnavailable, []string{"as an https server"}},
		"huge header": {func(w http.ResponseWriter, _ *http.Request) { w.Header().Set("X", strings.Repeat("x", 100<<10)) },
			problem.ModuleUnavailable, nil},
		"compressed on its own account": {func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Encoding", "gzip")
			w.Write([]byte("gz"))
		},
			problem.DigestMismatch, []string{digest([]byte("gz"))}},
	} {
		t.Run(name, func(t *testing.T) {
			u, pool := serve(t, c.handler)
			r := resolver(t, module.Options{AllowLoopback: true, RootCAs: pool, MaxBytes: 1000, Timeout: 500 * time.Millisecond})
			_, _, err := r.Resolve(t.Context(), filter.Module{URL: u + "/a.wasm?signature=s3cret", SHA256: digest(wasm)})
			wants(t, err, c.kind, append(c.words, u+"/a.wasm")...)
			if strings.Contains(err.Error(), secret) || strings.Contains(err.Error(), "s3cret") {
				t.Errorf("%q shows what it must not", err)
			}
		})
	}
}

func TestACallerThatGivesUpGetsItsOwnReason(t *testing.T) {
	arrived := make(chan struct{})
	u, pool := serve(t, http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { close(arrived); <-r.Context().Done() }))
	ctx, cancel := context.WithCancel(t.Context())
	go func() { <-arrived; cancel() }()
	_, _, err := resolver(t, module.Options{AllowLoopback: true, RootCAs: pool}).Resolve(ctx, filter.Module{URL: u, SHA256: digest(wasm)})
	if !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
}

func TestAServerThatIsNotWhoItSaysIsRefused(t *testing.T) {
	u, _ := serve(t, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.Write(wasm) }))
	_, _, err := resolver(t, module.Options{AllowLoopback: true}).Resolve(t.Context(), filter.Module{URL: u, SHA256: digest(wasm)})
	wants(t, err, problem.ModuleUnavailable, "certificate")
}

// hops redirects /5 to /4 to … to /0, which is the module.
func hops(w http.ResponseWriter, r *http.Request) {
	var n int
	fmt.Sscanf(r.URL.Path, "/%d", &n)
	if n == 0 {
		w.Write(wasm)
		return
	}
	if r.Header.Get("Referer")+r.Header.Get("Authorization")+r.Header.Get("Cookie") != "" {
		http.Error(w, "told too much", http.StatusTeapot)
		return
	}
	http.SetCookie(w, &http.Cookie{Name: "a", Value: "b"})
	http.Redirect(w, r, fmt.Sprintf("/%d?token=t%d", n-1, n), http.StatusFound)
}

func TestFiveRedirectsAreFollowedAndNoSix(t *testing.T) {
	u, pool := serve(t, http.HandlerFunc(hops))
	r := func() *module.Resolver { return resolver(t, module.Options{AllowLoopback: true, RootCAs: pool}) }
	if _, _, err := r().Resolve(t.Context(), filter.Module{URL: u + "/5", SHA256: digest(wasm)}); err != nil {
		t.Error(err)
	}
	_, _, err := r().Resolve(t.Context(), filter.Module{URL: u + "/6", SHA256: digest(wasm)})
	wants(t, err, problem.ModuleUnavailable, "more than 5 redirects")
}

func TestARedirectLeadsNowhereThatTheAddressCouldNot(t *testing.T) {
	for to, word := range map[string]string{
		"http://127.0.0.1:1/a.wasm":                 "not https",
		"file:///etc/passwd":                        "not https",
		"https://user:hunter2@127.0.0.1:1/":         "credentials",
		"https://169.254.169.254/latest/meta-data/": "link-local",
		"https://[::ffff:169.254.169.254]/":         "link-local",
		"https://0.0.0.0:1/":                        "unspecified",
		"https://224.0.0.1/":                        "multicast",
		"https://100.100.100.200/latest/meta-data/": "metadata",
	} {
		t.Run(to, func(t *testing.T) {
			u, pool := serve(t, http.RedirectHandler(to, http.StatusTemporaryRedirect))
			_, _, err := resolver(t, module.Options{AllowLoopback: true, RootCAs: pool}).Resolve(t.Context(),
				filter.Module{URL: u + "/a.wasm", SHA256: digest(wasm)})
			wants(t, err, problem.ModuleUnavailable, word, u)
			if strings.Contains(err.Error(), "hunter2") || strings.Contains(err.Error(), "meta-data") {
				t.Errorf("%q shows the redirect", err)
			}
		})
	}
}

func TestLoopbackIsNeverConnectedToUnlessAllowed(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var connections atomic.Int32
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			connections.Add(1)
			c.Close()
		}
	}()
	t.Cleanup(func() { l.Close(); <-done })
	port := l.Addr().(*net.TCPAddr).Port
	r := resolver(t, module.Options{Timeout: 5 * time.Second})
	for _, host := range []string{"127.0.0.1", "localhost", "[::ffff:127.0.0.1]", "127.1.2.3"} {
		_, _, err := r.Resolve(t.Context(), filter.Module{URL: fmt.Sprintf("https://%s:%d/a.wasm", host, port), SHA256: digest(wasm)})
		wants(t, err, problem.ModuleUnavailable, "loopback", "allowLoopbackModules")
	}
	if n := connections.Load(); n != 0 {
		t.Errorf("%d connections were made", n)
	}
}

func TestAProxyOfTheEnvironmentIsNotUsed(t *testing.T) {
	// net/http reads the environment once, so a process of its own has to look.
	if os.Getenv("HTTPS_PROXY") != "https://127.0.0.1:1" {
		cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestAProxyOfTheEnvironmentIsNotUsed$")
		cmd.Env = append(os.Environ(), "HTTPS_PROXY=https://127.0.0.1:1", "https_proxy=https://127.0.0.1:1", "NO_PROXY=", "no_proxy=")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		return
	}
	_, _, err := resolver(t, module.Options{Timeout: 5 * time.Second}).Resolve(t.Context(),
		filter.Module{URL: "https://169.254.169.254/a.wasm", SHA256: digest(wasm)})
	wants(t, err, problem.ModuleUnavailable, "link-local") // the proxy would be loopback
}
