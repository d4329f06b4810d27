package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sync/errgroup"

	"github.com/meshery/meshery-filters/build/controlplanes/istiotest"
	"github.com/meshery/meshery-filters/build/controlplanes/k8stest"
	"github.com/meshery/meshery-filters/filters"
	"github.com/meshery/meshery-filters/internal/filter"
	"github.com/meshery/meshery-filters/internal/mesh"
	"github.com/meshery/meshery-filters/internal/plan"
)

// Bars of operations in a cluster, in ms and requests.
const (
	shareBar    = 150
	requestsBar = 3 + 4 // for one object
)

const (
	clusterUser = "adapter" // with the rights of templates/rbac, and nothing else
	shop        = "shop"    // the namespace of the targets
)

// audited has the API server write down what the adapter asks for, and nothing else, before it answers.
const audited = `
apiVersion: audit.k8s.io/v1
kind: Policy
omitStages: [ResponseStarted, ResponseComplete, Panic]
rules: [{level: Metadata, users: [` + clusterUser + `]}, {level: None}]
`

// carrier is a kind of object that carries a filter.
type carrier struct{ kind, delivery string }

// cluster is a real API server with istiod and a sidecar.
type cluster struct {
	*istiotest.Mesh
	sidecar *istiotest.Proxy
	client  *http.Client
	audit   string // file
}

func (b *bench) startCluster(ctx context.Context) (_ *cluster, err error) {
	policy := filepath.Join(b.dir, "audit-policy.yaml")
	c := &cluster{audit: filepath.Join(b.dir, "audit.log")}
	if err := os.WriteFile(policy, []byte(audited), 0o600); err != nil {
		return nil, err
	}
	c.Mesh, err = istiotest.Start(ctx, filepath.Join(b.dir, "istio"), istiotest.Options{Users: []string{clusterUser},
		APIServerArgs: []string{"--audit-policy-file=" + policy, "--audit-log-path=" + c.audit}})
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			c.Stop()
		}
	}()
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(c.CA)
	c.client = &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}, ForceAttemptHTTP2: true}}
	for _, role := range []string{"base", "proof"} {
		if err := c.Grant(ctx, role, clusterUser); err != nil {
			return nil, err
		}
	}
	c.sidecar, err = c.Proxy(ctx, istiotest.ProxyOptions{Namespace: shop, Pod: "api-1", Labels: map[string]string{"app": "api"}})
	return c, err
}

// kubeconfig is the adapter's; another number makes it one that it has not seen.
func (c *cluster) kubeconfig(n int) string {
	return fmt.Sprintf("%s# %d\n", c.Kubeconfig(c.Token(clusterUser)), n)
}

// asked are the paths that the adapter has asked the API server for so far.
func (c *cluster) asked() (paths []string, err error) {
	text, err := os.ReadFile(c.audit)
	if err != nil {
		return nil, err
	}
	for d := json.NewDecoder(bytes.NewReader(text)); ; {
		var e struct {
			RequestURI string `json:"requestURI"`
		}
		if err := d.Decode(&e); errors.Is(err, io.EOF) {
			return paths, nil
		} else if err != nil {
			return nil, err
		}
		paths = append(paths, e.RequestURI)
	}
}

// proofs says whether a path is of what proves that proxies run a filter.
func proofs(path string) bool {
	return strings.Contains(path, "/portforward") || strings.HasPrefix(path, "/api/v1/namespaces/") && strings.Contains(path, "/pods?")
}

// throughAdapter changes what the sidecars of an app run as Meshery does.
type throughAdapter struct {
	*adapter
	carrier
	kubeconfig string
}

func (t throughAdapter) put(ctx context.Context, app string, _ int, config string) error {
	operation := "apply_filter"
	if config == "" {
		operation = "remove_filter"
	}
	_, err := t.story(ctx, operation, t.document(app, config), t.kubeconfig)
	return err
}

// document is the limiter for the sidecars of an app; without a configuration it names what to remove.
func (c carrier) document(app, config string) string {
	doc := fmt.Sprintf("apiVersion: %s\nkind: %s\nmetadata: {name: bench-%s, namespace: %s}\n", filter.APIVersion, filter.Kind, app, shop)
	if config == "" {
		return doc
	}
	return doc + fmt.Sprintf("spec:\n  mesh: istio\n  target: {kind: Workload, labels: {app: %s}}\n  module: {builtin: ratelimit}\n"+
		"  delivery: %s\n  config: %s\n", app, c.delivery, config)
}

// byApply changes the same by what `kubectl apply --server-side` and `kubectl delete` come to: one request for an object,
// on a connection that is there already. Starting kubectl and its looking up of kinds are not counted.
type byApply struct {
	*cluster
	carrier
}

func (byApply) addr() string                          { return "" }
func (byApply) prepare(context.Context, string) error { return nil }
func (a byApply) put(ctx context.Context, app string, _ int, config string) error {
	object, err := a.object(app, config)
	if err != nil {
		return err
	}
	meta := object["metadata"].(map[string]any)
	path := fmt.Sprintf("%s/apis/%s/namespaces/%s/%ss/%s", a.URL, object["apiVersion"], shop, strings.ToLower(a.kind), meta["name"])
	method := http.MethodDelete
	var body []byte
	if config != "" {
		method, path = http.MethodPatch, path+"?fieldManager=kubectl&fieldValidation=Strict"
		if body, err = json.Marshal(object); err != nil {
			return err
		}
	}
	req, err := http.NewRequestWithContext(ctx, method, path, bytes.NewReader(body))
	if err != nil {
		return err
	}
	req.Header.Set("Authorization", "Bearer "+a.Token(k8stest.Admin))
	req.Header.Set("Content-Type", "application/apply-patch+yaml")
	resp, err := a.client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode >= 300 {
		err = fmt.Errorf("%s %s: %s: %s", method, path, resp.Status, text)
	}
	return err
}

// object is what the adapter applies for the document.
func (c carrier) object(app, config string) (map[string]any, error) {
	module, ok := filters.Builtin("ratelimit")
	if !ok {
		return nil, errors.New("there is no built-in ratelimit")
	}
	if config == "" { // its name does not depend on it
		config = changes[0].config
	}
	read, err := filter.Read([]byte(c.document(app, config)), shop)
	if err != nil {
		return nil, err
	}
	f, err := mesh.Istio{}.Complete(read[0])
	if err != nil {
		return nil, err
	}
	sum := sha256.Sum256(module)
	f.Spec.Module.SHA256 = hex.EncodeToString(sum[:])
	world := plan.World{Modules: map[string]plan.Code{f.Spec.Module.SHA256: {Inline: module}}, Cluster: plan.Cluster{Kinds: mesh.Istio131()}}
	p, err := mesh.Istio{}.Plan(filter.Chain{Mesh: "istio", Target: f.Spec.Target}.With(f), world)
	if err != nil {
		return nil, err
	}
	if len(p.Objects) != 1 || p.Objects[0].Content["kind"] != c.kind {
		return nil, fmt.Errorf("the plan is not one %s", c.kind)
	}
	return p.Objects[0].Content, nil
}

// measureIstio changes filters of a sidecar through the adapter and by applying the same objects, counts what the
// adapter asks the API server for, and gives many targets a filter each.
func (b *bench) measureIstio(ctx context.Context) (err error) {
	b.say("starting an API server, istiod and a sidecar")
	c, err := b.startCluster(ctx)
	if err != nil {
		return err
	}
	defer c.Stop()
	defer c.client.CloseIdleConnections()
	a, _, err := startAdapter(ctx, b.program, b.state())
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, a.stop()) }()
	modules := filepath.Join(b.dir, "modules")
	if err := os.Mkdir(modules, 0o700); err != nil {
		return err
	}
	module, _ := filters.Builtin("ratelimit")
	if err := os.WriteFile(filepath.Join(modules, fmt.Sprintf("%x.wasm", sha256.Sum256(module))), module, 0o600); err != nil {
		return err
	}
	carriers := []carrier{{"EnvoyFilter", "{mode: inline}"}, {"TrafficExtension", "{mode: local, localPath: " + modules + "}"}}
	if err := b.measureShare(ctx, c, a, carriers); err != nil {
		return err
	}
	if err := b.measureAsked(ctx, c, a, carriers[0]); err != nil {
		return fmt.Errorf("count requests: %w", err)
	}
	return b.measureClusterTargets(ctx, c, a)
}

func (b *bench) measureShare(ctx context.Context, c *cluster, a *adapter, carriers []carrier) error {
	s := section{Title: "Change a filter in a sidecar of a real istiod: until it answers new connections accordingly, and until its end is known",
		Columns: []string{"", "adapter", "server-side apply", "difference", "adapter, last event", "applied"}}
	sidecar := []*proxy{{listener: strings.TrimPrefix(c.sidecar.URL, "http://")}}
	most := figure{}
	for _, k := range carriers {
		through, apply := throughAdapter{a, k, c.kubeconfig(0)}, byApply{c, k}
		times := map[plane][]series{through: make([]series, len(changes)), apply: make([]series, len(changes))}
		for pair := range b.pairs + 1 {
			order := []plane{through, apply}
			if pair%2 == 1 {
				slices.Reverse(order)
			}
			b.say("changes on Istio by %s, pair %d of %d (0 warms up)", k.kind, pair, b.pairs)
			for _, p := range order {
				for i, step := range changes {
					effect, end, err := measureChange(ctx, p, "api", sidecar, step)
					if err != nil {
						return fmt.Errorf("%s by %s: %w", step.name, k.kind, err)
					}
					if t := &times[p][i]; pair > 0 {
						t.effect, t.end = append(t.effect, ms(effect)), append(t.end, ms(end))
					}
				}
			}
		}
		for i, step := range changes {
			x, y := times[through][i], times[apply][i]
			share := figureOf("ms", combine(x.effect, y.effect, minus))
			if share.Median > most.Median {
				most = share
			}
			s.add(step.name+", "+k.kind, figureOf("ms", x.effect), figureOf("ms", y.effect), share, figureOf("ms", x.end), figureOf("ms", y.end))
		}
	}
	b.report.Sections = append(b.report.Sections, s)
	b.verdict("the adapter's own share of a change on Istio, dry runs included,", most, shareBar)
	b.note("beside the adapter on Istio stands the one request that `kubectl apply --server-side` (or `kubectl delete`) makes for the same object, on a " +
		"connection that is open; kubectl's start and its looking up of kinds are left out")
	return nil
}

// measureAsked counts what operations on one object ask the API server for.
func (b *bench) measureAsked(ctx context.Context, c *cluster, a *adapter, k carrier) error {
	s := section{Title: "Requests to the API server for an operation on one object, one istiod and one proxy", Columns: []string{"", "operation", "proof"}}
	most := figure{}
	for _, way := range []string{"a kubeconfig that is known", "a new kubeconfig"} {
		for i, step := range changes {
			kubeconfig := c.kubeconfig(0)
			if way == "a new kubeconfig" {
				kubeconfig = c.kubeconfig(i + 1)
			}
			before, err := c.asked()
			if err == nil {
				err = throughAdapter{a, k, kubeconfig}.put(ctx, "api", 1, step.config)
			}
			if err != nil {
				return err
			}
			after, err := c.asked()
			if err != nil {
				return err
			}
			var operation, proof float64
			for _, path := range after[len(before):] {
				if proofs(path) {
					proof++
				} else {
					operation++
				}
			}
			n := figureOf("requests", []float64{operation})
			if n.Median > most.Median {
				most = n
			}
			s.add(step.name+", "+way, n, figureOf("requests", []float64{proof}))
		}
	}
	b.report.Sections = append(b.report.Sections, s)
	b.verdict("an operation on one object", most, requestsBar)
	return nil
}

// measureClusterTargets gives many targets, which have no proxies, a filter each: one after the other, and all at once.
func (b *bench) measureClusterTargets(ctx context.Context, c *cluster, a *adapter) error {
	s := section{Title: fmt.Sprintf("%d filters on %d targets of a cluster, without proxies: until every operation has ended", b.clusterTargets, b.clusterTargets),
		Columns: []string{"", "time", "CPU of the adapter"}}
	k := carrier{"EnvoyFilter", "{mode: inline}"}
	through := throughAdapter{a, k, c.kubeconfig(0)}
	for _, way := range []struct {
		name   string
		atOnce int
	}{{"one by one", 1}, {"at once", b.clusterTargets}} {
		for _, step := range changes {
			b.say("%d targets on Istio %s: %s", b.clusterTargets, way.name, step.name)
			took, err := costOf(a, func() error {
				g, ctx := errgroup.WithContext(ctx)
				g.SetLimit(way.atOnce)
				for i := range b.clusterTargets {
					g.Go(func() error { return through.put(ctx, fmt.Sprintf("target-%d", i), 1, step.config) })
				}
				return g.Wait()
			})
			if err != nil {
				return fmt.Errorf("%s, %s: %w", step.name, way.name, err)
			}
			s.add(step.name+", "+way.name, figureOf("s", []float64{took.seconds}), figureOf("s", []float64{took.cpu}))
		}
	}
	b.report.Sections = append(b.report.Sections, s)
	return nil
}
