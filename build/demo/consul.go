package main

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"

	"github.com/meshery/meshery-filters/build/controlplanes/consultest"
	"github.com/meshery/meshery-filters/internal/demo"
	"github.com/meshery/meshery-filters/internal/envoy"
	"github.com/meshery/meshery-filters/templates"
)

// consul is the stage: a Consul with ACLs, Image Hub behind a sidecar, and the sidecars of two instances of a service that
// calls it. Filters are on what these send. The adapter has a token with the rights that docs/consul.md shows.
type consul struct {
	server *consultest.Consul
	hub    string // address of the API
	web    []*consultest.Service
}

var _ demo.Stage = (*consul)(nil)

const (
	api    = "imagehub-api" // the service that is called
	caller = "web"
	rights = `service_prefix "" { policy = "write" }
node_prefix "" { policy = "read" }
key_prefix "meshery-filters/" { policy = "write" }`
)

// Opening starts everything by itself, the adapter last: it is told where the sidecars' admin interfaces are.
func (s *consul) Opening(d *demo.Demo) []demo.Step {
	key := filepath.Join(d.Dir, "token-key")
	return []demo.Step{
		{Name: "Consul starts", Do: func(ctx context.Context) (err error) {
			if s.server, err = consultest.Start(ctx, filepath.Join(d.Dir, "consul"), consultest.Options{ACL: true}); err != nil {
				return err
			}
			fmt.Fprintf(d.Out, "    Consul %s\n", s.server.Addr)
			return errors.Join(
				s.server.Write(ctx, map[string]any{"Kind": "proxy-defaults", "Name": "global", "Config": map[string]any{"protocol": "http"}}),
				s.server.Write(ctx, map[string]any{"Kind": "service-intentions", "Name": api, "Sources": []any{map[string]any{"Name": caller, "Action": "allow"}}}))
		}},
		{Name: "Image Hub starts, behind a sidecar", Do: func(ctx context.Context) error {
			if err := os.WriteFile(key, []byte(rand.Text()+rand.Text()), 0o600); err != nil {
				return err
			}
			pid, err := d.Start(ctx, "Image Hub", func(log []byte) error {
				found := hubAddress.FindSubmatch(log)
				if found == nil {
					return errors.New("it does not say where it answers")
				}
				s.hub = string(found[1])
				return nil
			}, "imagehub", "--addr", "127.0.0.1:0", "--key-file", key)
			if err != nil {
				return err
			}
			fmt.Fprintf(d.Out, "    Image Hub: PID %d, http://%s\n", pid, s.hub)
			_, err = s.server.Service(ctx, consultest.ServiceOptions{Name: api, At: s.hub})
			return err
		}},
		{Name: "Two Envoys start in front of it, as sidecars of two instances of its caller", Do: func(ctx context.Context) error {
			for _, id := range []string{caller + "-1", caller + "-2"} {
				w, err := s.server.Service(ctx, consultest.ServiceOptions{Name: caller, ID: id, Upstreams: []string{api}})
				if err != nil {
					return err
				}
				s.web = append(s.web, w)
				if err := w.Reaches(ctx, api, "/healthz"); err != nil {
					return err
				}
				if err := d.AddEnvoy(ctx, w.Envoy, strings.TrimPrefix(w.Upstreams[api], "http://")); err != nil {
					return err
				}
			}
			return nil
		}},
		{Name: "The adapter starts, with its embedded NATS", Do: func(ctx context.Context) error {
			token, err := s.server.Token(ctx, "meshery-filters", rights)
			if err != nil {
				return err
			}
			file, config, folder := filepath.Join(d.Dir, "consul-token"), filepath.Join(d.Dir, "adapter.yaml"), filepath.Join(d.Dir, "modules")
			if err := errors.Join(os.Mkdir(folder, 0o755), os.WriteFile(file, []byte(token), 0o600), os.WriteFile(config, fmt.Appendf(nil,
				"consul: {addr: %q, token: {name: consul, key: token}, admin: '%s,%s', localPath: %q}\nsecrets: {consul: {token: {file: %q}}, imagehub: {token-key: {file: %q}}}\n",
				s.server.Addr, s.web[0].Envoy.AdminAddr(), s.web[1].Envoy.AdminAddr(), folder, file, key), 0o600)); err != nil {
				return err
			}
			return d.StartAdapter(ctx, "--config", config)
		}},
	}
}

// Place is what the caller's sidecars send.
func (s *consul) Place() demo.Place {
	return demo.Place{Namespace: namespace, Spec: []string{"mesh: consul", "target: {kind: Service, name: " + caller + "}", "match: {direction: outbound}"},
		Refusals: `listener_manager\.lds\.update_rejected`}
}

// Limiter is that of plain Envoys, elsewhere.
func (s *consul) Limiter() (operation, document string) {
	document, _ = templates.ImageHubLimiter("envoy")
	for _, change := range [][2]string{{"mesh: envoy", "mesh: consul"}, {"{kind: ProxyGroup, name: default}", "{kind: Service, name: " + caller + "}"},
		{"  phase: authz\n  failurePolicy: reload\n", "  match: {direction: outbound}\n"}} {
		document = strings.Replace(document, change[0], change[1], 1)
	}
	return "apply_filter", document
}

// Running is what the listener for Image Hub has. The modules are files, whose digest is that of what they hold.
func (s *consul) Running(ctx context.Context, e *demo.Envoy) (_ string, filters []envoy.SlotFilter, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+e.AdminAddr()+"/config_dump?resource=dynamic_listeners", nil)
	if err != nil {
		return "", nil, err
	}
	resp, err := (&http.Transport{DisableKeepAlives: true}).RoundTrip(req)
	if err != nil {
		return "", nil, err
	}
	defer resp.Body.Close()
	dump, err := io.ReadAll(io.LimitReader(resp.Body, 64<<20))
	if err != nil {
		return "", nil, err
	}
	listeners, err := envoy.ParseListeners(dump)
	if err != nil {
		return "", nil, err
	}
	for _, l := range listeners {
		if !strings.HasPrefix(l.Name, api+":") {
			continue
		}
		for _, chain := range l.Active {
			for _, p := range chain {
				file := p.GetVmConfig().GetCode().GetLocal().GetFilename()
				module, err := os.ReadFile(file)
				if err != nil {
					return "", nil, err
				}
				sum := sha256.Sum256(module)
				name := strings.Replace(strings.TrimPrefix(p.GetName(), "meshery.filters/"), ".", "/", 1)
				filters = append(filters, envoy.SlotFilter{Name: name, Type: "Wasm", Path: file, SHA256: hex.EncodeToString(sum[:])})
			}
		}
	}
	return "", filters, nil
}

// Invite says where everything is.
func (s *consul) Invite(d *demo.Demo) string {
	a, b := d.Envoys[0], d.Envoys[1]
	return fmt.Sprintf(`  export MESHERY_FILTERS_SERVER=%s
  %s run filters_status
  curl -i http://%s/pull
  curl -i http://%s/pull
Image Hub's page through the first Envoy is http://%[3]s, the adapter's page http://%[5]s.
Image Hub itself is http://%[6]s, NATS %[7]s, the Envoys' admin http://%[8]s and http://%[9]s.
Consul is %[10]s, and the token that may do everything there is %[11]s.`,
		d.Addresses.GRPC, d.Program, a.Addr, b.Addr, d.Addresses.HTTP, s.hub, d.Addresses.NATS, a.AdminAddr(), b.AdminAddr(), s.server.Addr, consultest.Management)
}

// Close ends Consul and the sidecars.
func (s *consul) Close() {
	if s.server != nil {
		s.server.Stop()
	}
}
