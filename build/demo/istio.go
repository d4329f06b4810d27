package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/meshery/meshery-filters/build/controlplanes/istiotest"
	"github.com/meshery/meshery-filters/internal/demo"
	"github.com/meshery/meshery-filters/internal/envoy"
	"github.com/meshery/meshery-filters/templates"
)

const (
	namespace = "shop"
	user      = "demo"                 // of the cluster
	image     = "meshery-filters:demo" // of Image Hub
)

// istio is the stage: an API server, istiod, and the sidecars of two Pods of Image Hub's API. No node runs them. Where the
// adapter deploys Image Hub, the stage does what a node would: it runs the API, here and once for both Pods, with the key
// from the Secret, and says that the Pods run.
type istio struct {
	mesh       *istiotest.Mesh
	kubeconfig string // file
	hub        string // address of the API
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
		{Name: "The adapter starts, with its embedded NATS", Do: func(ctx context.Context) error {
			return d.StartAdapter(ctx, "--imagehub-image", image)
		}},
		{Name: "Image Hub is deployed", Do: func(ctx context.Context) error {
			g, ctx := errgroup.WithContext(ctx)
			g.Go(func() error { return s.runHub(ctx, d) })
			g.Go(func() error {
				_, err := d.Operate(ctx, "imagehub", "")
				return err
			})
			return g.Wait()
		}},
		{Name: "Two Envoys start in front of it, as sidecars that istiod configures", Do: func(ctx context.Context) error {
			for _, pod := range []string{"imagehub-api-1", "imagehub-api-2"} {
				p, err := s.mesh.Proxy(ctx, istiotest.ProxyOptions{Namespace: namespace, Pod: pod, Labels: map[string]string{"app": "imagehub-api"}, Upstream: s.hub})
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

// grant makes the namespace, and gives the user the rights that templates/rbac has, and no others.
func (s *istio) grant(ctx context.Context) error {
	if err := s.mesh.Apply(ctx, map[string]any{"apiVersion": "v1", "kind": "Namespace", "metadata": map[string]any{"name": namespace}}); err != nil {
		return err
	}
	for _, role := range []string{"base", "proof", "imagehub"} {
		if err := s.mesh.Grant(ctx, role, user); err != nil {
			return err
		}
	}
	return nil
}

var hubAddress = regexp.MustCompile(`Image Hub answers at http://(\S+)`)

// runHub waits for Image Hub's Deployment, runs it, and says that its Pods are there.
func (s *istio) runHub(ctx context.Context, d *demo.Demo) error {
	const deployment = "/apis/apps/v1/namespaces/" + namespace + "/deployments/imagehub-api"
	for s.mesh.Send(ctx, http.MethodGet, deployment, nil) != nil {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(50 * time.Millisecond):
		}
	}
	var secret struct{ Data map[string][]byte }
	if err := s.mesh.Get(ctx, "/api/v1/namespaces/"+namespace+"/secrets/imagehub", &secret); err != nil {
		return err
	}
	file := filepath.Join(d.Dir, "token-key")
	if err := os.WriteFile(file, secret.Data["token-key"], 0o600); err != nil {
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
	fmt.Fprintf(d.Out, "    Image Hub: PID %d, http://%s\n", pid, s.hub)
	if err := s.mesh.Send(ctx, http.MethodPatch, deployment, map[string]any{"spec": map[string]any{"replicas": 2}}); err != nil {
		return err
	}
	return s.mesh.Send(ctx, http.MethodPatch, deployment+"/status", map[string]any{"status": map[string]any{
		"observedGeneration": 2, "replicas": 2, "updatedReplicas": 2, "readyReplicas": 2, "availableReplicas": 2}})
}

// Place is the workload of the API.
func (s *istio) Place() demo.Place {
	p := demo.Place{Namespace: namespace, Spec: []string{"mesh: istio", "target: {kind: Workload, labels: {app: imagehub-api}}"},
		Refusals: `listener_manager\.lds\.update_rejected`}
	if s.mesh != nil {
		p.Kubeconfigs = []string{string(s.mesh.Kubeconfig(s.mesh.Token(user)))}
	}
	return p
}

// Limiter is Image Hub's, by the operation that has no body of its own.
func (s *istio) Limiter() (operation, document string) {
	document, _ = templates.ImageHub{Image: image}.Limiter("istio")
	return "imagehub_rate_limit", document
}

// ours is what an Envoy calls a filter of an EnvoyFilter for the Pods of the API.
var ours = regexp.MustCompile(`^meshery\.filters/` + namespace + `\.(.+)-imagehub-api-[0-9a-f]{10}$`)

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
  %s run imagehub_rate_limit --namespace %s --kubeconfig %s
  %[2]s list --kubeconfig %[4]s
  curl -i http://%s/pull
  curl -i http://%s/pull
Image Hub's page through the first Envoy is http://%[5]s, the adapter's page http://%[7]s.
Image Hub itself is http://%[8]s, NATS %[9]s, the Envoys' admin http://%[10]s and http://%[11]s.
The API server is %[12]s; its kubeconfig may do what templates/rbac says.`,
		d.Addresses.GRPC, d.Program, namespace, s.kubeconfig, a.Addr, b.Addr, d.Addresses.HTTP, s.hub, d.Addresses.NATS,
		a.AdminAddr(), b.AdminAddr(), s.mesh.URL)
}

// Close ends istiod and the API server.
func (s *istio) Close() {
	if s.mesh != nil {
		s.mesh.Stop()
	}
}
