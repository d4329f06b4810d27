package module_test

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/meshery/meshery-filters/internal/filter"
	"github.com/meshery/meshery-filters/internal/module"
	"github.com/meshery/meshery-filters/internal/problem"
)

func TestAnAddressIsGoodWhenItGivesTheVeryBytes(t *testing.T) {
	var asked atomic.Int32
	own := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked.Add(1)
		if r.URL.Path != "/below/modules/"+digest(wasm)+".wasm" {
			t.Errorf("%s was asked for", r.URL.Path)
		}
		w.Write(wasm)
	}))
	t.Cleanup(own.Close)
	var heard []module.Fetch
	kept := blobs(t)
	r := resolver(t, module.Options{Blobs: kept, ServedAt: own.URL + "/below/", OnFetch: func(f module.Fetch) { heard = append(heard, f) }})
	put(t, kept, wasm)
	for range 2 { // what is stored says nothing of the address
		if err := r.Check(t.Context(), of(r.Address(digest(wasm)), digest(wasm)), nil); err != nil {
			t.Fatal(err)
		}
	}
	if asked.Load() != 2 || len(heard) != 2 || heard[0].Source != module.Address || heard[0].Bytes != len(wasm) {
		t.Errorf("asked %d times, heard %+v", asked.Load(), heard)
	}
	if a := resolver(t, module.Options{}).Address(digest(wasm)); a != "" {
		t.Errorf("without an address it is %s", a)
	}
}

func TestACheckGoesNowhereThatAFetchMayNotGo(t *testing.T) {
	u, pool := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/metadata":
			http.Redirect(w, r, "https://169.254.169.254/latest/meta-data/", http.StatusFound)
		case "/other":
			io.WriteString(w, "text from the server")
		default:
			w.Write(wasm)
		}
	}))
	clear := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.Write(wasm) }))
	t.Cleanup(clear.Close)
	d := digest(wasm)
	r := resolver(t, module.Options{AllowLoopback: true, RootCAs: pool, ServedAt: "http://filters.invalid", Timeout: 2 * time.Second})
	if err := r.Check(t.Context(), of(u+"/a.wasm", d), nil); err != nil {
		t.Errorf("an author's own address: %v", err)
	}
	for address, words := range map[string][]string{
		u + "/metadata":                                 {"link-local"},
		u + "/other":                                    {"wanted sha256 " + d},
		clear.URL + "/modules/" + d + ".wasm":           {"only https"},
		"oci://a:hunter2@host.example/a@sha256:" + d:    {"only https"},
		"https://a:hunter2@host.example/a.wasm":         {"only https", "https://host.example/a.wasm"},
		"http://filters.invalid/modules/" + d:           {"only https"}, // not the very address
		"https://100.100.100.200/a.wasm":                {"metadata"},
		"http://filters.invalid/modules/" + d + ".wasm": {"filters.invalid"},
	} {
		err := r.Check(t.Context(), of(address, d), nil)
		wants(t, err, problem.SourceUnproved, words...)
		if text := err.Error(); strings.Contains(text, "hunter2") || strings.Contains(text, "text from") || strings.Contains(text, "meta-data") {
			t.Errorf("%q shows what it must not", text)
		}
	}
	// Loopback is for the adapter's own address alone, and not even that may be where clouds keep credentials.
	strict := resolver(t, module.Options{RootCAs: pool, ServedAt: clear.URL})
	wants(t, strict.Check(t.Context(), of(u+"/a.wasm", d), nil), problem.SourceUnproved, "loopback")
	if err := strict.Check(t.Context(), of(strict.Address(d), d), nil); err != nil {
		t.Errorf("the adapter's own address on this machine: %v", err)
	}
	for _, at := range []string{"http://169.254.169.254", "https://[fd00:ec2::254]"} {
		own := resolver(t, module.Options{ServedAt: at, Timeout: 10 * time.Second})
		wants(t, own.Check(t.Context(), of(own.Address(d), d), nil), problem.SourceUnproved, "where modules are not fetched from")
	}
}

func TestACheckIsBoundedInTime(t *testing.T) {
	own := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }))
	t.Cleanup(own.Close)
	r := resolver(t, module.Options{ServedAt: own.URL, Timeout: 200 * time.Millisecond})
	wants(t, r.Check(t.Context(), of(r.Address(digest(wasm)), digest(wasm)), nil), problem.SourceUnproved, "within 200ms")
	wants(t, r.Check(t.Context(), of("://", digest(wasm)), nil), problem.SourceUnproved, "not an address")
}

func TestTheAdaptersOwnAddressMayTakeAWhileToLeadThere(t *testing.T) {
	var there atomic.Bool
	var turned atomic.Int32
	own := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		if there.Load() {
			w.Write(wasm)
			return
		}
		turned.Add(1)
		c, _, err := w.(http.Hijacker).Hijack()
		if err != nil {
			panic(err)
		}
		_ = c.(*net.TCPConn).SetLinger(0) // the connection is reset
		c.Close()
	}))
	t.Cleanup(own.Close)
	r := resolver(t, module.Options{ServedAt: own.URL})
	checked := make(chan error, 1)
	go func() { checked <- r.Check(t.Context(), of(r.Address(digest(wasm)), digest(wasm)), nil) }()
	for deadline := time.Now().Add(30 * time.Second); turned.Load() < 3; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("it has asked %d times", turned.Load())
		}
	}
	there.Store(true)
	if err := <-checked; err != nil {
		t.Error(err)
	}
	there.Store(false)

	// It does not wait for one who does not come, nor longer than whoever asks.
	hasty := resolver(t, module.Options{ServedAt: own.URL, Timeout: 300 * time.Millisecond})
	wants(t, hasty.Check(t.Context(), of(hasty.Address(digest(wasm)), digest(wasm)), nil), problem.SourceUnproved, "reset")
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if err := r.Check(ctx, of(r.Address(digest(wasm)), digest(wasm)), nil); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("%v", err)
	}
}

func of(address, digest string) filter.Module { return filter.Module{URL: address, SHA256: digest} }
