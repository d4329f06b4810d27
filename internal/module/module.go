// Package module turns a document's module into bytes that are verified and kept by their digest. Everything after it
// refers to digests.
package module

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"time"

	"github.com/meshery/meshery-filters/internal/filter"
	"github.com/meshery/meshery-filters/internal/problem"
	"github.com/meshery/meshery-filters/internal/store"
)

// Options of a Resolver. Blobs is required.
type Options struct {
	// Blobs keeps every module by its digest.
	Blobs store.Blobs
	// Builtin returns a module that ships with the program. Default: there are none.
	Builtin func(name string) ([]byte, bool)
	// BuiltinNames are the names that Builtin knows, for messages.
	BuiltinNames []string
	// MaxBytes bounds a module in bytes. Default: filter.MaxModule.
	MaxBytes int64
	// Timeout bounds a fetch from its first look-up to its last byte. Default: 60s.
	Timeout time.Duration
	// AllowLoopback lets https addresses lead to this machine. It is for tests and demonstrations: with it, whoever may
	// apply a filter can reach every TLS port that listens on loopback only.
	AllowLoopback bool
	// ServedAt is the address of the adapter's module server as proxies reach it, such as http://filters.meshery:10018.
	// Default: proxies do not reach it.
	ServedAt string
	// RootCAs are the authorities that https servers are checked against. Default: the system's.
	RootCAs *x509.CertPool
	// Secret is for credentials of registries. Default: there are none.
	Secret Secrets
	// Meshery returns the bytes of a filter that is stored in Meshery, at most limit. Default: no server is known.
	Meshery func(ctx context.Context, id string, limit int64) ([]byte, error)
	// Log gets a Debug line per fetch. Default: none.
	Log *slog.Logger
	// OnFetch hears how each look-up of a module went, and must not wait. Default: nobody hears.
	OnFetch func(Fetch)
}

// Secrets gives the value of a secret.
type Secrets = func(name, key string) (string, error)

// Fetch is one look-up of a module.
type Fetch struct {
	// Source is where the bytes came from, or should have: one of the constants below.
	Source string
	Bytes  int // 0 when Err is set
	Took   time.Duration
	Err    error
}

// Sources of modules.
const (
	Builtin = "builtin" // the program
	Inline  = "inline"  // the document
	HTTPS   = "https"   // the network
	OCI     = "oci"     // a registry of images
	Meshery = "meshery" // Meshery Server
	Stored  = "store"   // what is kept of an earlier fetch
	None    = "none"    // nowhere: the document names no source that is allowed
	Address = "address" // where proxies will fetch it, to see that they can
)

// Resolver finds modules. It is safe for concurrent use.
type Resolver struct {
	Options
	client  *http.Client
	own     *http.Client // for ServedAt, which whoever configures the adapter has chosen
	shipped func() map[string]string
}

// New makes a Resolver and fills the defaults of its options in.
func New(o Options) *Resolver {
	if o.Builtin == nil {
		o.Builtin = func(string) ([]byte, bool) { return nil, false }
	}
	if o.MaxBytes <= 0 {
		o.MaxBytes = filter.MaxModule
	}
	if o.Timeout <= 0 {
		o.Timeout = 60 * time.Second
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	return &Resolver{Options: o, client: newClient(o), own: newOwnClient(o), shipped: sync.OnceValue(func() map[string]string { return shipped(o) })}
}

// Resolve finds the module's bytes, checks them against its sha256 and stores them. The module it returns refers to
// them by digest: SHA256 is set, Inline and File are empty, Builtin and URL still tell where it came from.
//
// A module without a source is looked up by its digest. An address is not asked for bytes that are stored; an image whose
// document does not say what its module's digest is, is asked for each time, since its tag may have moved; so is a filter
// that is stored in Meshery.
// Errors are problem.InvalidDocument for what only the author can mend, problem.ModuleUnavailable, DigestMismatch,
// StoreFailed, or ctx's own.
func (r *Resolver) Resolve(ctx context.Context, m filter.Module) (filter.Module, []byte, error) {
	return r.ResolveWith(ctx, m, r.Secret)
}

// ResolveWith is Resolve with the credentials of registries from elsewhere than Options.Secret.
func (r *Resolver) ResolveWith(ctx context.Context, m filter.Module, secret Secrets) (filter.Module, []byte, error) {
	begun := time.Now()
	m.SHA256 = strings.ToLower(m.SHA256)
	data, source, err := r.find(ctx, m, secret)
	if err == nil {
		m, data, err = r.keep(ctx, m, data, source == Stored)
	}
	if r.OnFetch != nil {
		r.OnFetch(Fetch{Source: source, Bytes: len(data), Took: time.Since(begun), Err: err})
	}
	if err != nil {
		return filter.Module{}, nil, err
	}
	return m, data, nil
}

// keep checks and stores bytes that did not come from the store, which has verified its own.
func (r *Resolver) keep(ctx context.Context, m filter.Module, data []byte, stored bool) (_ filter.Module, _ []byte, err error) {
	if int64(len(data)) > r.MaxBytes {
		return filter.Module{}, nil, problem.ModuleUnavailable.New("%s has %d bytes, more than the %d allowed", shown(m), len(data), r.MaxBytes)
	}
	if !stored {
		sum := sha256.Sum256(data)
		got := hex.EncodeToString(sum[:])
		if m.SHA256 != "" && m.SHA256 != got {
			return filter.Module{}, nil, problem.DigestMismatch.New("%s: wanted sha256 %s, got %s", shown(m), m.SHA256, got)
		}
		if m.SHA256, err = r.Blobs.Put(ctx, data); err != nil {
			return filter.Module{}, nil, fmt.Errorf("store module: %w", err)
		}
	}
	m.Inline, m.File = "", ""
	return m, data, nil
}

// Hold has a module that is stored stay so for a while, before something refers to it. One that is not stored is no
// error: it has still to be looked up.
func (r *Resolver) Hold(ctx context.Context, m filter.Module) error {
	if m.SHA256 == "" {
		return nil
	}
	_, err := r.Blobs.Touch(ctx, strings.ToLower(m.SHA256))
	return err
}

// Shipped returns the digests of the modules that ship with the program, by their names.
func (r *Resolver) Shipped() map[string]string { return r.shipped() }

func shipped(o Options) map[string]string {
	digests := map[string]string{}
	for _, name := range o.BuiltinNames {
		if data, ok := o.Builtin(name); ok {
			sum := sha256.Sum256(data)
			digests[name] = hex.EncodeToString(sum[:])
		}
	}
	return digests
}

// find returns the bytes and the source that they came from.
func (r *Resolver) find(ctx context.Context, m filter.Module, secret Secrets) (data []byte, source string, err error) {
	switch {
	case m.Builtin != "":
		data, ok := r.Builtin(m.Builtin)
		if !ok {
			return nil, Builtin, mistake("builtin", fmt.Sprintf("there is no module %q", m.Builtin),
				"write one of "+strings.Join(r.BuiltinNames, ", "))
		}
		return data, Builtin, nil
	case m.Inline != "":
		data, err := m.Bytes()
		if err != nil {
			return nil, Inline, mistake("inline", "it is not base64", "encode the file with `base64 FILE.wasm`")
		}
		return data, Inline, nil
	case m.File != "":
		return nil, None, mistake("file", "the adapter does not read files of its own machine",
			"apply the document with `meshery-filters apply -f`, which reads the file and sends it along, or use module.inline")
	case m.URL != "":
		return r.fromURL(ctx, m, secret)
	case m.SHA256 != "":
		data, err := r.Blobs.Get(ctx, m.SHA256)
		if err != nil {
			return nil, Stored, fmt.Errorf("look module up: %w", err)
		}
		return data, Stored, nil
	}
	return nil, None, problem.InvalidDocument.WithFields("", []problem.Field{{Path: "spec.module",
		Cause: "the module has no source", Remedy: "set one of builtin, url, inline or file"}})
}

func (r *Resolver) fromURL(ctx context.Context, m filter.Module, secret Secrets) (data []byte, source string, err error) {
	u, err := url.Parse(m.URL)
	switch {
	case err != nil || u.Host == "":
		return nil, None, mistake("url", "it is not an address", "write https://HOST/PATH or oci://HOST/REPOSITORY:TAG")
	case u.Scheme != "https" && u.Scheme != "oci" && u.Scheme != "meshery":
		return nil, None, mistake("url", fmt.Sprintf("modules are not fetched over %q", u.Scheme), "write https://HOST/PATH, oci://HOST/REPOSITORY:TAG or meshery://ID")
	case u.User != nil:
		return nil, None, mistake("url", "an address must not carry credentials", "take them out")
	case u.Scheme == "https" && m.SHA256 == "":
		return nil, None, mistake("sha256", "a module from https needs its digest", "write the digest that sha256sum prints for the file you mean")
	}
	if m.SHA256 != "" {
		data, err = r.Blobs.Get(ctx, m.SHA256)
		if err == nil {
			return data, Stored, nil
		}
		if !errors.Is(err, problem.ModuleUnavailable) {
			return nil, Stored, fmt.Errorf("look module up: %w", err)
		}
	}
	if u.Scheme == "meshery" {
		data, err = r.fromMeshery(ctx, u)
		return data, Meshery, err
	}
	if u.Scheme == "oci" {
		data, err = r.fetchImage(ctx, u, m.PullSecret, secret)
		return data, OCI, err
	}
	data, err = r.fetch(ctx, r.client, u)
	return data, HTTPS, err
}

// fromMeshery gets a filter that is stored in Meshery.
func (r *Resolver) fromMeshery(ctx context.Context, u *url.URL) ([]byte, error) {
	if r.Meshery == nil {
		return nil, problem.MesheryUnset.New("%s", bare(u))
	}
	caller := ctx
	ctx, cancel := context.WithTimeout(ctx, r.Timeout)
	defer cancel()
	data, err := r.Meshery(ctx, u.Host+u.Path, r.MaxBytes)
	if ctx.Err() != nil && caller.Err() == nil {
		return nil, problem.ModuleUnavailable.New("%s did not give the module within %s", bare(u), r.Timeout)
	}
	return data, err
}

func mistake(field, cause, remedy string) error {
	return problem.InvalidDocument.WithFields("", []problem.Field{{Path: "spec.module." + field, Cause: cause, Remedy: remedy}})
}

// shown names a module's source in messages, without a query: pre-signed addresses carry their secret there.
func shown(m filter.Module) string {
	if u, err := url.Parse(m.URL); m.URL != "" && err == nil {
		return bare(u)
	}
	return m.Source()
}

func bare(u *url.URL) string {
	return (&url.URL{Scheme: u.Scheme, Host: u.Host, Path: u.Path}).String()
}
