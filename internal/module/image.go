package module

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"path"
	"strings"
	"sync/atomic"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/meshery/meshery-filters/internal/problem"
)

const (
	// wasmLayer holds the module as it is, in the image specification of solo-io/wasm (spec.md).
	wasmLayer types.MediaType = "application/vnd.module.wasm.content.layer.v1+wasm"
	// pluginFile is the module in the last layer of what the same specification calls a compat image (spec-compat.md).
	pluginFile = "plugin.wasm"
	// aroundModule is what a registry may send besides the module: manifests, tokens, and what a layer has around it.
	aroundModule = 8 << 20 // bytes
	// pullSecretKey is where Kubernetes keeps credentials of registries in a Secret.
	pullSecretKey = ".dockerconfigjson"
)

// fetchImage gets the module in an image as Istio's agent reads it: in a compat image, plugin.wasm of the last layer; else
// the one layer of two that is a module. Nothing that the registry sent is part of an error.
func (r *Resolver) fetchImage(ctx context.Context, u *url.URL, pullSecret string, secret Secrets) ([]byte, error) {
	caller := ctx
	ctx, cancel := context.WithTimeout(ctx, r.Timeout)
	defer cancel()
	began := time.Now()
	ref, err := name.ParseReference(u.Host + u.Path)
	if err != nil {
		return nil, mistake("url", "it is not the address of an image", "write oci://HOST/REPOSITORY:TAG or oci://HOST/REPOSITORY@sha256:DIGEST")
	}
	auth, err := credentials(pullSecret, ref.Context().RegistryStr(), secret)
	if err != nil {
		return nil, err
	}
	bounded := &budget{inner: r.client.Transport, registry: ref.Context().RegistryStr()}
	bounded.left.Store(r.MaxBytes + aroundModule)
	desc, err := remote.Get(ref, remote.WithContext(ctx), remote.WithTransport(bounded), remote.WithAuth(auth), remote.WithUserAgent("meshery-filters"))
	if err != nil {
		return nil, r.explainImage(caller, u, err)
	}
	image, err := desc.Image()
	if err != nil {
		return nil, r.explainImage(caller, u, err)
	}
	manifest, err := image.Manifest()
	if err != nil {
		return nil, r.explainImage(caller, u, err)
	}
	layer, packed, err := moduleLayer(manifest)
	if err != nil {
		return nil, problem.ModuleUnavailable.New("%s: %w", bare(u), err)
	}
	if layer.Size > r.MaxBytes+aroundModule/2 {
		return nil, problem.ModuleUnavailable.New("%s: its layer has %d bytes, and a module may have %d", bare(u), layer.Size, r.MaxBytes)
	}
	blob, err := image.LayerByDigest(layer.Digest)
	if err != nil {
		return nil, r.explainImage(caller, u, err)
	}
	content, err := blob.Compressed() // as it is: no layer of a module is compressed by its media type
	if err != nil {
		return nil, r.explainImage(caller, u, err)
	}
	defer content.Close()
	data, err := io.ReadAll(content) // to its end, where its digest is compared
	if err != nil {
		return nil, r.explainImage(caller, u, err)
	}
	if packed {
		if data, err = unpack(data, r.MaxBytes); err != nil {
			return nil, problem.ModuleUnavailable.New("%s: %w", bare(u), err)
		}
	}
	if int64(len(data)) > r.MaxBytes {
		return nil, problem.ModuleUnavailable.New("%s has more than the %d bytes allowed", bare(u), r.MaxBytes)
	}
	r.Log.DebugContext(ctx, "module fetched", "url", bare(u), "bytes", len(data), "took", time.Since(began))
	return data, nil
}

// moduleLayer finds the layer with the module, and says whether it is an archive.
func moduleLayer(m *v1.Manifest) (layer v1.Descriptor, packed bool, err error) {
	if len(m.Layers) == 0 {
		return layer, false, errors.New("the image has no layer")
	}
	last := m.Layers[len(m.Layers)-1]
	if m.MediaType == types.DockerManifestSchema2 {
		if last.MediaType == types.DockerLayer {
			return last, true, nil
		}
	} else if last.MediaType == types.OCILayer {
		return last, true, nil
	} else if len(m.Layers) == 2 {
		for _, l := range m.Layers {
			if l.MediaType == wasmLayer {
				return l, false, nil
			}
		}
	}
	return layer, false, errors.New("the image is in none of the forms that Istio reads: its last layer is no archive with " + pluginFile +
		", nor is one of two layers a module")
}

// unpack finds the module in a layer.
func unpack(layer []byte, most int64) ([]byte, error) {
	z, err := gzip.NewReader(bytes.NewReader(layer))
	if err != nil {
		return nil, errors.New("the image's layer is not compressed with gzip")
	}
	for archive := tar.NewReader(io.LimitReader(z, most+aroundModule)); ; {
		h, err := archive.Next()
		switch {
		case errors.Is(err, io.EOF):
			return nil, fmt.Errorf("there is no %s in the image's layer", pluginFile)
		case err != nil:
			return nil, errors.New("the image's layer is not an archive, or is too large")
		case path.Base(h.Name) != pluginFile || h.Typeflag != tar.TypeReg:
			continue
		case h.Size > most:
			return nil, fmt.Errorf("%s has %d bytes, more than the %d allowed", pluginFile, h.Size, most)
		}
		data, err := io.ReadAll(archive)
		if err != nil {
			return nil, fmt.Errorf("%s ends early in the image's layer", pluginFile)
		}
		return data, nil
	}
}

// credentials are what the secret of that name has for a registry.
func credentials(secret, registry string, lookup Secrets) (authn.Authenticator, error) {
	if secret == "" {
		return authn.Anonymous, nil
	}
	if lookup == nil {
		return nil, problem.SecretMissing.New("%s/%s: nobody resolves secrets here", secret, pullSecretKey)
	}
	text, err := lookup(secret, pullSecretKey)
	if err != nil {
		return nil, err
	}
	var config struct {
		Auths map[string]json.RawMessage `json:"auths"`
	}
	unreadable := problem.SecretMissing.New("%s/%s is not the configuration of Docker's registries", secret, pullSecretKey)
	if json.Unmarshal([]byte(text), &config) != nil { // whose text could quote the secret
		return nil, unreadable
	}
	if registry == name.DefaultRegistry {
		registry = authn.DefaultAuthKey
	}
	for host, entry := range config.Auths {
		if host != registry && strings.TrimPrefix(strings.TrimSuffix(host, "/"), "https://") != registry {
			continue
		}
		var a authn.AuthConfig
		if json.Unmarshal(entry, &a) != nil {
			return nil, unreadable
		}
		return authn.FromConfig(a), nil
	}
	return nil, problem.SecretMissing.New("%s/%s has nothing for %s", secret, pullSecretKey, registry)
}

// explainImage says why a registry did not give an image, without a word of the registry's.
func (r *Resolver) explainImage(caller context.Context, u *url.URL, err error) error {
	var answer *transport.Error
	switch {
	case errors.Is(err, errOverBudget):
		return problem.ModuleUnavailable.New("%s: the registry sends more than a module of %d bytes needs", bare(u), r.MaxBytes)
	case caller.Err() == nil && errors.As(err, &answer):
		if answer.StatusCode == http.StatusUnauthorized || answer.StatusCode == http.StatusForbidden {
			return problem.ModuleUnavailable.New("%s: the registry answers with status %d; module.pullSecret names credentials", bare(u), answer.StatusCode)
		}
		return problem.ModuleUnavailable.New("%s: the registry answers with status %d %s", bare(u), answer.StatusCode, http.StatusText(answer.StatusCode))
	}
	return r.explain(caller, u, err)
}

// budget bounds what all answers to one fetch bring together, and keeps requests where module addresses may lead: the
// registry names the server that gives tokens, and sends elsewhere for layers.
type budget struct {
	inner    http.RoundTripper
	registry string
	left     atomic.Int64
}

var errOverBudget = errors.New("more than is allowed")

func (b *budget) RoundTrip(req *http.Request) (*http.Response, error) {
	if req.URL.Scheme == "http" && req.URL.Host == b.registry {
		// Where the registry's name is a private address, the library would ask in clear.
		req = req.Clone(req.Context())
		req.URL.Scheme = "https"
	}
	switch {
	case req.URL.Scheme != "https":
		return nil, refusal("an address that is not https")
	case req.URL.User != nil:
		return nil, refusal("an address with credentials")
	}
	resp, err := b.inner.RoundTrip(req)
	if err == nil {
		resp.Body = &spending{resp.Body, b}
	}
	return resp, err
}

type spending struct {
	io.ReadCloser
	budget *budget
}

func (s *spending) Read(p []byte) (int, error) {
	n, err := s.ReadCloser.Read(p)
	if s.budget.left.Add(-int64(n)) < 0 {
		return 0, errOverBudget
	}
	return n, err
}
