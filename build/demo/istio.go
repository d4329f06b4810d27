package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strings"

	"go.yaml.in/yaml/v3"

	"github.com/meshery/meshery-filters/build/controlplanes/istiotest"
	"github.com/meshery/meshery-filters/internal/demo"
	"github.com/meshery/meshery-filters/internal/envoy"
	"github.com/meshery/meshery-filters/templates"
)

const (
	namespace = "shop"
	user      = "demo" // of the cluster
)

// istio is the stage: an API server, istiod, and the sidecars of two Pods of app api, whose container is one Image Hub that
// runs here. The Pods are objects, as everywhere in istiotest.
type istio struct {
	mesh       *istiotest.Mesh
	kubeconfig string // file
	hub        string // Image Hub's address
	key        string // of its tokens
	limiter    string // file
}

var _ demo.Stage = (*istio)(nil)

// Opening starts everything by itself: the adapter is given nothing but a kubeconfig, with each operation.
func (s *istio) Opening(d *demo.Demo) []demo.Step {
	return []demo.Step{
		{Name: "A Kubernetes API server and istiod start", Do: func(ctx context.Context) (err error) {
			if s.mesh, err = istiotest.Start(ctx, filepath.Join(d.Dir, "mesh"), istiotest.Options{Users: []string{user}}); err != nil {
				return err
			}
			if err := s.grant(ctx); err != nil {
				return err
			}
			s.kubeconfig = filepath.Join(d.Dir, "kubeconfig")
			if err := os.WriteFile(s.kubeconfig, s.mesh.Kubeconfig(s.mesh.Token(user)), 0o600); err != nil {
				return err
			}
			fmt.Fprintf(d.Out, "    API server %s, kubeconfig %s\n", s.mesh.URL, s.kubeconfig)
			return nil
		}},
		{Name: "The adapter starts, with its embedded NATS", Do: d.StartAdapter},
		{Name: "Image Hub starts", Do: func(ctx context.Context) error { return s.startHub(ctx, d) }},
		{Name: "Two Envoys start in front of it, as sidecars that istiod configures", Do: func(ctx context.Context) error {
			for _, pod := range []string{"api-1", "api-2"} {
				p, err := s.mesh.Proxy(ctx, istiotest.ProxyOptions{Namespace: namespace, Pod: pod, Labels: map[string]string{"app": "api"}, Upstream: s.hub})
				if err != nil {
					return err
				}
				if err := d.AddEnvoy(ctx, p.Envoy, strings.TrimPrefix(p.URL, "http://")); err != nil {
					return err
				}
			}
			return nil
		}},
	}
}

// grant gives the user the rights that templates/rbac has, and no others.
func (s *istio) grant(ctx context.Context) error {
	for _, name := range []string{"base", "proof"} {
		text, _ := templates.RBAC(name)
		text = strings.ReplaceAll(text, "{kind: ServiceAccount, namespace: meshery-filters, name: meshery-filters}",
			"{kind: User, apiGroup: rbac.authorization.k8s.io, name: "+user+"}")
		for d := yaml.NewDecoder(strings.NewReader(text)); ; {
			var o map[string]any
			if err := d.Decode(&o); errors.Is(err, io.EOF) {
				break
			} else if err != nil {
				return fmt.Errorf("read the roles %s: %w", name, err)
			}
			if err := s.mesh.Apply(ctx, o); err != nil {
				return err
			}
		}
	}
	return nil
}

var hubAddress = regexp.MustCompile(`Image Hub answers at http://(\S+)`)

// startHub runs Image Hub with a key that the limiter gets too.
func (s *istio) startHub(ctx context.Context, d *demo.Demo) error {
	s.key = rand.Text() + rand.Text()
	file := filepath.Join(d.Dir, "token-key")
	if err := os.WriteFile(file, []byte(s.key), 0o600); err != nil {
		return err
	}
	pid, err := d.Start(ctx, "Image Hub", func(log []byte) error {
		found := hubAddress.FindSubmatch(log)
		if found == nil {
			return errors.New("it does not say where it answers")
		}
		s.hub = string(found[1])
		return nil
	}, "imagehub", "--addr", "127.0.0.1:0", "--key-file", file)
	if err != nil {
		return err
	}
	fmt.Fprintf(d.Out, "    PID %d: http://%s\n", pid, s.hub)
	_, document := s.Limiter()
	s.limiter = filepath.Join(d.Dir, "limiter.yaml")
	return os.WriteFile(s.limiter, []byte(document), 0o600)
}

// Place is the workload whose Pods have the label app: api.
func (s *istio) Place() demo.Place {
	p := demo.Place{Namespace: namespace, Spec: []string{"mesh: istio", "target: {kind: Workload, labels: {app: api}}"},
		Refusals: `listener_manager\.lds\.update_rejected`}
	if s.mesh != nil {
		p.Kubeconfigs = []string{string(s.mesh.Kubeconfig(s.mesh.Token(user)))}
	}
	return p
}

// Limiter is Image Hub's, with the key itself: secrets of the adapter's do not go into clusters. It has no phase, so it
// stands right before the router, where an EnvoyFilter can put it.
func (s *istio) Limiter() (operation, document string) {
	return "apply_filter", fmt.Sprintf(`apiVersion: filters.meshery.io/v1alpha1
kind: Filter
metadata: {name: %s, namespace: %s}
spec:
  %s
  module: {builtin: ratelimit}
  failurePolicy: reload
  config:
    plans: {Personal: 10, Team: 100, Enterprise: 1000}
    paths: [/pull]
    auth: {mode: jwt, key: %s}
`, demo.LimiterName, namespace, strings.Join(s.Place().Spec, "\n  "), s.key)
}

// ours is what an Envoy calls a filter of an EnvoyFilter for the Pods of app api.
var ours = regexp.MustCompile(`^meshery\.filters/` + namespace + `\.(.+)-api-[0-9a-f]{10}$`)

// Running is what the listener has that istiod made of the Pod's Sidecar.
func (s *istio) Running(ctx context.Context, e *demo.Envoy) (_ string, filters []envoy.SlotFilter, err error) {
	filters, err = e.Admin().ListenerConfig(ctx, e.Addr)
	for i, f := range filters {
		if name := ours.FindStringSubmatch(f.Name); name != nil {
			filters[i].Name = namespace + "/" + name[1]
		}
	}
	return "", filters, err
}

// Invite says how to put the limiter back, and where everything is.
func (s *istio) Invite(d *demo.Demo) string {
	a, b := d.Envoys[0], d.Envoys[1]
	return fmt.Sprintf(`  export MESHERY_FILTERS_SERVER=%s
  %s apply -f %s --kubeconfig %s
  %[2]s list --kubeconfig %[4]s
  curl -i http://%s/pull
  curl -i http://%s/pull
Image Hub's page through the first Envoy is http://%[5]s, the adapter's page http://%[7]s.
Image Hub itself is http://%[8]s, NATS %[9]s, the Envoys' admin http://%[10]s and http://%[11]s.
The API server is %[12]s; its kubeconfig may do what templates/rbac says.`,
		d.Addresses.GRPC, d.Program, s.limiter, s.kubeconfig, a.Addr, b.Addr, d.Addresses.HTTP, s.hub, d.Addresses.NATS,
		a.AdminAddr(), b.AdminAddr(), s.mesh.URL)
}

// Close ends istiod and the API server.
func (s *istio) Close() {
	if s.mesh != nil {
		s.mesh.Stop()
	}
}
