package module_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/meshery/meshery-filters/internal/module"
	"github.com/meshery/meshery-filters/internal/store"
)

// served is a module server of which something uses the modules that live gives.
func served(t *testing.T, kept store.Blobs, live func() (map[string]bool, error), heard func(int, int64)) string {
	t.Helper()
	s := httptest.NewServer(module.NewServer(module.ServerOptions{Blobs: kept, OnServed: heard,
		Live: func(context.Context) (map[string]bool, error) { return live() }}))
	t.Cleanup(s.Close)
	return s.URL
}

// ask sends a request and returns the answer with its body.
func ask(t *testing.T, method, url string, header ...string) (*http.Response, []byte) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true, DisableCompression: true}}
	resp, err := client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp, body
}

// put stores bytes and returns their digest.
func put(t *testing.T, kept store.Blobs, data []byte) string {
	t.Helper()
	d, err := kept.Put(t.Context(), data)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func TestAModuleIsServedWholeInPartsAndAsAHead(t *testing.T) {
	kept := blobs(t)
	d := put(t, kept, wasm)
	var count atomic.Int64
	u := served(t, kept, func() (map[string]bool, error) { return map[string]bool{d: true}, nil }, func(_ int, n int64) { count.Add(n) }) +
		"/modules/" + d + ".wasm"
	for name, c := range map[string]struct {
		method string
		header []string
		status int
		body   string
		length int
	}{
		"whole":             {"GET", nil, 200, string(wasm), len(wasm)},
		"head":              {"HEAD", nil, 200, "", len(wasm)},
		"range":             {"GET", []string{"Range", "bytes=1-3"}, 206, "asm", 3},
		"range of the end":  {"GET", []string{"Range", "bytes=-6"}, 206, "module", 6},
		"range beyond it":   {"GET", []string{"Range", "bytes=1000-"}, 416, "", -1},
		"range that holds":  {"GET", []string{"Range", "bytes=1-3", "If-Range", `"` + d + `"`}, 206, "asm", 3},
		"range of another":  {"GET", []string{"Range", "bytes=1-3", "If-Range", `"other"`}, 200, string(wasm), len(wasm)},
		"one that is had":   {"GET", []string{"If-None-Match", `"` + d + `"`}, 304, "", -1},
		"one that is other": {"GET", []string{"If-None-Match", `"other"`}, 200, string(wasm), len(wasm)},
	} {
		t.Run(name, func(t *testing.T) {
			resp, body := ask(t, c.method, u, c.header...)
			if resp.StatusCode != c.status || c.status < 300 && string(body) != c.body {
				t.Fatalf("%s, %q", resp.Status, body)
			}
			if c.status < 300 && (resp.Header.Get("Content-Length") != strconv.Itoa(c.length) || resp.Header.Get("Content-Type") != "application/wasm") {
				t.Errorf("%v", resp.Header)
			}
			if c.status < 400 && (resp.Header.Get("ETag") != `"`+d+`"` || resp.Header.Get("Cache-Control") != "public, max-age=31536000, immutable") {
				t.Errorf("%v", resp.Header)
			}
		})
	}
	// Handlers count after the answer is read.
	want := int64(3*len(wasm) + 3 + 6 + 3)
	for deadline := time.Now().Add(10 * time.Second); count.Load() < want; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%d bytes were counted, want at least %d", count.Load(), want)
		}
	}
}

func TestWhatNothingUsesIsNotServed(t *testing.T) {
	kept := blobs(t)
	used, unused := put(t, kept, wasm), put(t, kept, []byte("another module"))
	u := served(t, kept, func() (map[string]bool, error) {
		return map[string]bool{used: true, strings.Repeat("0", 64): true, "": true}, nil
	}, nil)
	for path, status := range map[string]int{
		"/modules/" + used + ".wasm":                    200,
		"/modules/" + unused + ".wasm":                  404,
		"/modules/" + strings.Repeat("0", 64) + ".wasm": 404, // used, and not there
		"/modules/" + strings.ToUpper(used) + ".wasm":   404,
		"/modules/" + used:                              404,
		"/modules/.wasm":                                404,
		"/modules/" + used + ".wasm/":                   404,
		"/modules/" + used[:63] + ".wasm":               404,
		"/modules/":                                     404,
		"/modules":                                      404,
		"/modules/..%2f" + used + ".wasm":               404,
		"/":                                             404,
		"/metrics":                                      404,
		"/healthz":                                      404,
	} {
		resp, body := ask(t, "GET", u+path)
		if resp.StatusCode != status || status == 404 && strings.Contains(string(body), used) {
			t.Errorf("%s is answered with %s: %q", path, resp.Status, body)
		}
		if status == 404 && strings.HasSuffix(path, ".wasm") && resp.Header.Get("Cache-Control") != "no-store" {
			t.Errorf("%s: it may be there later: %v", path, resp.Header)
		}
	}
	for _, method := range []string{"POST", "PUT", "DELETE", "PATCH", "OPTIONS"} {
		if resp, _ := ask(t, method, u+"/modules/"+used+".wasm"); resp.StatusCode != 405 {
			t.Errorf("%s is answered with %s", method, resp.Status)
		}
	}
}

func TestAModuleIsServedAsSoonAsSomethingUsesItAndNotLongAfter(t *testing.T) {
	kept := blobs(t)
	d := put(t, kept, wasm)
	var use atomic.Bool
	u := served(t, kept, func() (map[string]bool, error) { return map[string]bool{d: use.Load()}, nil }, nil) + "/modules/" + d + ".wasm"
	if resp, _ := ask(t, "GET", u); resp.StatusCode != 404 {
		t.Fatalf("%s before anything uses it", resp.Status)
	}
	use.Store(true)
	if resp, _ := ask(t, "GET", u); resp.StatusCode != 200 {
		t.Fatalf("%s once something uses it", resp.Status)
	}
	use.Store(false)
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		if resp, _ := ask(t, "GET", u); resp.StatusCode == 404 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("it is served for ever")
		}
	}
}

func TestManyWhoAskForWhatIsNotThereCostLittle(t *testing.T) {
	kept := blobs(t)
	d := put(t, kept, wasm)
	var asked atomic.Int64
	s := module.NewServer(module.ServerOptions{Blobs: kept, Live: func(context.Context) (map[string]bool, error) {
		asked.Add(1)
		return map[string]bool{d: true}, nil
	}})
	begun := time.Now()
	var all sync.WaitGroup
	for range 50 {
		all.Go(func() {
			for range 20 {
				for file, status := range map[string]int{d: 200, digest([]byte("other")): 404} {
					w := httptest.NewRecorder()
					s.ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), "GET", "/modules/"+file+".wasm", nil))
					if w.Code != status || status == 200 && !bytes.Equal(w.Body.Bytes(), wasm) {
						t.Errorf("%s is answered with %d", file, w.Code)
					}
				}
			}
		})
	}
	all.Wait()
	if most := 2 + int64(time.Since(begun)/(50*time.Millisecond)); asked.Load() > most {
		t.Errorf("2000 requests asked %d times in %s", asked.Load(), time.Since(begun))
	}
}

func TestWhenTheStoreIsAwayProxiesAreToldToTryAgain(t *testing.T) {
	kept := blobs(t)
	d := put(t, kept, wasm)
	u := served(t, kept, func() (map[string]bool, error) { return nil, errors.New("a text of the store") }, nil)
	resp, body := ask(t, "GET", u+"/modules/"+d+".wasm")
	if resp.StatusCode != 503 || resp.Header.Get("Retry-After") == "" || strings.Contains(string(body), "store") {
		t.Errorf("%s, %v, %q", resp.Status, resp.Header, body)
	}
}

func TestWhoDoesNotWaitLeavesNothingBehind(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	arrived := make(chan struct{})
	arrive := sync.OnceFunc(func() { close(arrived) })
	s := module.NewServer(module.ServerOptions{Blobs: blobs(t), Live: func(ctx context.Context) (map[string]bool, error) {
		arrive()
		<-ctx.Done()
		return nil, ctx.Err()
	}})
	var all sync.WaitGroup
	for range 5 {
		all.Go(func() {
			w := httptest.NewRecorder()
			s.ServeHTTP(w, httptest.NewRequestWithContext(ctx, "GET", "/modules/"+digest(wasm)+".wasm", nil))
			if w.Code != 503 {
				t.Errorf("%d", w.Code)
			}
		})
	}
	<-arrived
	cancel()
	all.Wait()
}
