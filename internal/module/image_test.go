package module_test

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/meshery/meshery-filters/internal/filter"
	"github.com/meshery/meshery-filters/internal/module"
	"github.com/meshery/meshery-filters/internal/problem"
)

const wasmLayer types.MediaType = "application/vnd.module.wasm.content.layer.v1+wasm"

// images is a registry over TLS, of which a test may come first at each request.
type images struct {
	t     *testing.T
	host  string
	pool  *x509.CertPool
	first atomic.Pointer[func(http.ResponseWriter, *http.Request) bool] // says whether it has answered
	asked atomic.Int64
}

func newImages(t *testing.T) *images {
	t.Helper()
	i := &images{t: t, pool: x509.NewCertPool()}
	r := registry.New(registry.Logger(log.New(io.Discard, "", 0)))
	s := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		i.asked.Add(1)
		if f := i.first.Load(); f != nil && (*f)(w, q) {
			return
		}
		r.ServeHTTP(w, q)
	}))
	s.Config.ErrorLog = log.New(io.Discard, "", 0)
	s.StartTLS()
	t.Cleanup(s.Close)
	i.pool.AddCert(s.Certificate())
	i.host = strings.TrimPrefix(s.URL, "https://")
	return i
}

func (i *images) before(f func(http.ResponseWriter, *http.Request) bool) { i.first.Store(&f) }

// push puts an image of layers and returns its digest.
func (i *images) push(ref string, kind types.MediaType, layers ...v1.Layer) string {
	i.t.Helper()
	img := mutate.MediaType(empty.Image, kind)
	for _, l := range layers {
		mt, err := l.MediaType()
		if err != nil {
			i.t.Fatal(err)
		}
		if img, err = mutate.Append(img, mutate.Addendum{Layer: l, MediaType: mt}); err != nil {
			i.t.Fatal(err)
		}
	}
	to, err := name.ParseReference(i.host + "/" + ref)
	if err != nil {
		i.t.Fatal(err)
	}
	transport := http.DefaultTransport.(*http.Transport).Clone()
	transport.TLSClientConfig.RootCAs, transport.DisableKeepAlives = i.pool, true
	if err := remote.Write(to, img, remote.WithTransport(secured{transport}), remote.WithContext(i.t.Context())); err != nil {
		i.t.Fatal(err)
	}
	d, err := img.Digest()
	if err != nil {
		i.t.Fatal(err)
	}
	return d.String()
}

// secured asks a registry on this machine over TLS, which the library does not.
type secured struct{ inner http.RoundTripper }

func (s secured) RoundTrip(r *http.Request) (*http.Response, error) {
	r = r.Clone(r.Context())
	r.URL.Scheme = "https"
	return s.inner.RoundTrip(r)
}

// packed is a layer with files, as name and content.
func packed(t *testing.T, kind types.MediaType, files ...string) v1.Layer {
	t.Helper()
	var b bytes.Buffer
	z := gzip.NewWriter(&b)
	w := tar.NewWriter(z)
	for i := 0; i < len(files); i += 2 {
		if err := w.WriteHeader(&tar.Header{Name: files[i], Typeflag: tar.TypeReg, Mode: 0o644, Size: int64(len(files[i+1]))}); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, files[i+1]); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(w.Close(), z.Close()); err != nil {
		t.Fatal(err)
	}
	return static.NewLayer(b.Bytes(), kind)
}

func (i *images) resolver(o module.Options) *module.Resolver {
	i.t.Helper()
	o.AllowLoopback, o.RootCAs = true, i.pool
	return resolver(i.t, o)
}

func TestAnImageIsReadInEveryFormThatIstioReads(t *testing.T) {
	i := newImages(t)
	raw := static.NewLayer(wasm, wasmLayer)
	runtime := static.NewLayer([]byte("{}"), "application/vnd.module.wasm.config.v1+json")
	compat := packed(t, types.OCILayer, "./other.wasm", "no", "./plugin.wasm", string(wasm), "later", "x")
	for ref, d := range map[string]string{
		"oci/two-layers:1":   i.push("oci/two-layers:1", types.OCIManifestSchema1, runtime, raw),
		"oci/module-first:1": i.push("oci/module-first:1", types.OCIManifestSchema1, raw, runtime),
		"compat/oci:1":       i.push("compat/oci:1", types.OCIManifestSchema1, packed(t, types.OCILayer, "plugin.wasm", "of a layer below"), compat),
		"compat/docker:1":    i.push("compat/docker:1", types.DockerManifestSchema2, packed(t, types.DockerLayer, "plugin.wasm", string(wasm))),
		"latest":             i.push("latest", types.OCIManifestSchema1, compat),
	} {
		repository, _, _ := strings.Cut(ref, ":")
		for _, address := range []string{"oci://" + i.host + "/" + ref, "oci://" + i.host + "/" + repository + "@" + d, "oci://" + i.host + "/" + ref + "@" + d} {
			got, data, err := i.resolver(module.Options{}).Resolve(t.Context(), filter.Module{URL: address})
			if err != nil || !bytes.Equal(data, wasm) || got != (filter.Module{URL: address, SHA256: digest(wasm)}) {
				t.Errorf("%s: %+v, %q, %v", address, got, data, err)
			}
			if err := i.resolver(module.Options{}).Check(t.Context(), of(address, digest(wasm)), nil); err != nil {
				t.Errorf("%s as proxies get it: %v", address, err)
			}
		}
	}
}

func TestATagIsLookedUpEachTimeAndADigestOfTheModuleOnce(t *testing.T) {
	i := newImages(t)
	i.push("a:1", types.OCIManifestSchema1, packed(t, types.OCILayer, "plugin.wasm", string(wasm)))
	r := i.resolver(module.Options{})
	m := filter.Module{URL: "oci://" + i.host + "/a:1", SHA256: digest(wasm)}
	if _, _, err := r.Resolve(t.Context(), m); err != nil {
		t.Fatal(err)
	}
	i.push("a:1", types.OCIManifestSchema1, packed(t, types.OCILayer, "plugin.wasm", "moved"))
	before := i.asked.Load()
	if _, data, err := r.Resolve(t.Context(), m); err != nil || !bytes.Equal(data, wasm) || i.asked.Load() != before {
		t.Errorf("what is stored: %q, %v, asked %d times", data, err, i.asked.Load()-before)
	}
	m.SHA256 = ""
	if got, data, err := r.Resolve(t.Context(), m); err != nil || string(data) != "moved" || got.SHA256 != digest([]byte("moved")) {
		t.Errorf("the tag: %+v, %q, %v", got, data, err)
	}
	fresh := i.resolver(module.Options{})
	_, _, err := fresh.Resolve(t.Context(), filter.Module{URL: m.URL, SHA256: digest(wasm)})
	wants(t, err, problem.DigestMismatch, digest(wasm), digest([]byte("moved")))
	wants(t, fresh.Check(t.Context(), of(m.URL, digest(wasm)), nil), problem.SourceUnproved, digest(wasm), digest([]byte("moved")))
}

func TestAnImageThatCannotBeIsRefused(t *testing.T) {
	i := newImages(t)
	raw := static.NewLayer(wasm, wasmLayer)
	large := strings.Repeat("x", 2000)
	bomb := strings.Repeat("\x00", 64<<20)
	i.push("none:1", types.OCIManifestSchema1)
	i.push("alone:1", types.OCIManifestSchema1, raw)
	i.push("other:1", types.OCIManifestSchema1, raw, static.NewLayer(wasm, "application/octet-stream"), raw)
	i.push("file:1", types.OCIManifestSchema1, packed(t, types.OCILayer, "a.wasm", string(wasm)))
	i.push("gzip:1", types.OCIManifestSchema1, static.NewLayer([]byte("no archive"), types.OCILayer))
	i.push("large:1", types.OCIManifestSchema1, packed(t, types.OCILayer, "plugin.wasm", large))
	i.push("raw:1", types.OCIManifestSchema1, static.NewLayer([]byte(large), wasmLayer), raw)
	i.push("bomb:1", types.OCIManifestSchema1, packed(t, types.OCILayer, "zeros", bomb, "plugin.wasm", string(wasm)))
	for ref, words := range map[string][]string{
		"none:1":   {"no layer"},
		"alone:1":  {"none of the forms"},
		"other:1":  {"none of the forms"},
		"file:1":   {"no plugin.wasm"},
		"gzip:1":   {"not compressed with gzip"},
		"large:1":  {"2000 bytes", "1000"},
		"raw:1":    {"more than the 1000 bytes"},
		"bomb:1":   {"too large"},
		"absent:1": {"status 404"},
		"large@sha256:" + strings.Repeat("0", 64): {"status 404"},
	} {
		t.Run(ref, func(t *testing.T) {
			_, _, err := i.resolver(module.Options{MaxBytes: 1000}).Resolve(t.Context(), filter.Module{URL: "oci://" + i.host + "/" + ref})
			wants(t, err, problem.ModuleUnavailable, append(words, "oci://"+i.host)...)
		})
	}
	_, _, err := i.resolver(module.Options{}).Resolve(t.Context(), filter.Module{URL: "oci://" + i.host + "/UPPER:1"})
	wants(t, err, problem.InvalidDocument, "spec.module.url", "oci://HOST/REPOSITORY")
}

func TestARegistryCannotGetPastTheLimits(t *testing.T) {
	const secret = "text of the registry"
	i := newImages(t)
	i.push("a:1", types.OCIManifestSchema1, packed(t, types.OCILayer, "plugin.wasm", string(wasm)))
	blob := func(r *http.Request) bool { return strings.Contains(r.URL.Path, "/blobs/") }
	manifest := func(r *http.Request) bool { return strings.Contains(r.URL.Path, "/manifests/") }
	clear := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.Write(wasm) }))
	t.Cleanup(clear.Close)
	for name, c := range map[string]struct {
		first func(http.ResponseWriter, *http.Request) bool
		words []string
	}{
		"its text": {func(w http.ResponseWriter, r *http.Request) bool {
			http.Error(w, secret, http.StatusTeapot)
			return true
		}, []string{"status 418"}},
		"a manifest without end": {func(w http.ResponseWriter, r *http.Request) bool {
			for manifest(r) && r.Context().Err() == nil {
				if _, err := w.Write(make([]byte, 32<<10)); err != nil {
					return true
				}
			}
			return false
		}, nil},
		"a manifest that drips": {func(w http.ResponseWriter, r *http.Request) bool {
			for manifest(r) && r.Context().Err() == nil {
				w.Write([]byte(" "))
				w.(http.Flusher).Flush()
				time.Sleep(time.Millisecond)
			}
			return false
		}, []string{"within 1s"}},
		"no manifest": {func(w http.ResponseWriter, r *http.Request) bool {
			if manifest(r) {
				w.Header().Set("Content-Type", string(types.OCIManifestSchema1))
				io.WriteString(w, secret)
			}
			return manifest(r)
		}, nil},
		"another layer": {func(w http.ResponseWriter, r *http.Request) bool {
			if blob(r) {
				io.WriteString(w, secret)
			}
			return blob(r)
		}, nil},
		"a layer at a metadata server": {func(w http.ResponseWriter, r *http.Request) bool {
			if blob(r) {
				http.Redirect(w, r, "https://169.254.169.254/latest/meta-data/", http.StatusTemporaryRedirect)
			}
			return blob(r)
		}, nil},
		"a layer at another metadata server": {func(w http.ResponseWriter, r *http.Request) bool {
			if blob(r) {
				http.Redirect(w, r, "https://100.100.100.200/latest/meta-data/", http.StatusTemporaryRedirect)
			}
			return blob(r)
		}, []string{"metadata address"}},
		"a layer in clear": {func(w http.ResponseWriter, r *http.Request) bool {
			if blob(r) {
				http.Redirect(w, r, clear.URL, http.StatusTemporaryRedirect)
			}
			return blob(r)
		}, []string{"not https"}},
		"tokens of a metadata server": {func(w http.ResponseWriter, r *http.Request) bool {
			w.Header().Set("WWW-Authenticate", `Bearer realm="https://169.254.169.254/token",service="x"`)
			w.WriteHeader(http.StatusUnauthorized)
			return true
		}, nil},
		"tokens in clear": {func(w http.ResponseWriter, r *http.Request) bool {
			w.Header().Set("WWW-Authenticate", `Bearer realm="`+clear.URL+`/token",service="x"`)
			w.WriteHeader(http.StatusUnauthorized)
			return true
		}, nil},
	} {
		t.Run(name, func(t *testing.T) {
			i.before(c.first)
			_, _, err := i.resolver(module.Options{MaxBytes: 1000, Timeout: time.Second}).Resolve(t.Context(), filter.Module{URL: "oci://" + i.host + "/a:1"})
			wants(t, err, problem.ModuleUnavailable, append(c.words, "oci://"+i.host+"/a:1")...)
			if text := err.Error(); strings.Contains(text, secret) || strings.Contains(text, "meta-data") || strings.Contains(text, "token") {
				t.Errorf("%q shows what it must not", text)
			}
		})
	}
	i.before(func(http.ResponseWriter, *http.Request) bool { return false })
	_, _, err := resolver(t, module.Options{RootCAs: i.pool, Timeout: 5 * time.Second}).Resolve(t.Context(), filter.Module{URL: "oci://" + i.host + "/a:1"})
	wants(t, err, problem.ModuleUnavailable, "loopback")
}

func TestCredentialsOfARegistryComeFromASecretAndGoNowhereElse(t *testing.T) {
	const user, password = "robot", "hunter2-of-the-registry"
	i := newImages(t)
	i.push("private/a:1", types.OCIManifestSchema1, packed(t, types.OCILayer, "plugin.wasm", string(wasm)))
	i.before(func(w http.ResponseWriter, r *http.Request) bool {
		if u, p, ok := r.BasicAuth(); ok && u == user && p == password {
			return false
		}
		w.Header().Set("WWW-Authenticate", `Basic realm="x"`)
		http.Error(w, "no", http.StatusUnauthorized)
		return true
	})
	auth := base64.StdEncoding.EncodeToString([]byte(user + ":" + password))
	secrets := map[string]string{
		"pull":      fmt.Sprintf(`{"auths": {"other.example": {"auth": "not base64"}, %q: {"auth": %q}}}`, i.host, auth),
		"https":     fmt.Sprintf(`{"auths": {"https://%s/": {"username": %q, "password": %q}}}`, i.host, user, password),
		"elsewhere": fmt.Sprintf(`{"auths": {"other.example": {"auth": %q}}}`, auth),
		"wrong":     fmt.Sprintf(`{"auths": {%q: {"auth": %q}}}`, i.host, base64.StdEncoding.EncodeToString([]byte(user+":"+password+"?"))),
		"garbled":   password,
	}
	r := i.resolver(module.Options{Secret: func(name, key string) (string, error) {
		v, ok := secrets[name]
		if !ok || key != ".dockerconfigjson" {
			return "", problem.SecretMissing.New("%s/%s", name, key)
		}
		return v, nil
	}})
	m := filter.Module{URL: "oci://" + i.host + "/private/a:1"}
	for name, c := range map[string]struct {
		kind  *problem.Kind
		words []string
	}{
		"":          {problem.ModuleUnavailable, []string{"status 401", "pullSecret"}},
		"wrong":     {problem.ModuleUnavailable, []string{"status 401"}},
		"elsewhere": {problem.SecretMissing, []string{"elsewhere/.dockerconfigjson", i.host}},
		"garbled":   {problem.SecretMissing, []string{"garbled/.dockerconfigjson"}},
		"absent":    {problem.SecretMissing, []string{"absent/.dockerconfigjson"}},
		"pull":      {nil, nil},
		"https":     {nil, nil},
	} {
		m.PullSecret = name
		got, data, err := r.Resolve(t.Context(), m)
		if c.kind == nil {
			if err != nil || !bytes.Equal(data, wasm) || got.PullSecret != name {
				t.Errorf("%s: %+v, %q, %v", name, got, data, err)
			}
			continue
		}
		wants(t, err, c.kind, c.words...)
		if strings.Contains(err.Error(), password) || strings.Contains(err.Error(), auth) || strings.Contains(err.Error(), url.QueryEscape(password)) {
			t.Errorf("%q shows the password", err)
		}
	}
}
