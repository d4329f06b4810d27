package consul

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"net"
	"net/http"
	"slices"
	"time"

	"golang.org/x/sync/errgroup"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"

	"github.com/meshery/meshery-filters/internal/plan"
	"github.com/meshery/meshery-filters/internal/problem"
)

const (
	podAdminPort  = 19000 // of a sidecar's Envoy in its Pod
	podFirstPause = 100 * time.Millisecond
	podLastPause  = 2 * time.Second
	podTimeout    = 15 * time.Second // of one look at one proxy
	podParallel   = 4                // proxies that are asked at once
	podPatience   = 3                // looks at the cluster in a row that may fail
	relist        = 5 * time.Second  // after which the Pods are listed again
	podSettling   = 5 * time.Second  // after which Consul has told all proxies what it told one
)

// Cluster is how Consul on Kubernetes is reached; kube.Cluster is one.
type Cluster interface {
	// Pods lists those that run in a namespace, or with none in all, and that have all of the labels.
	Pods(ctx context.Context, namespace string, labels map[string]string) ([]plan.Pod, error)
	// Dial connects to a port of a Pod, as `kubectl port-forward` does.
	Dial(ctx context.Context, namespace, pod string, port int) (net.Conn, error)
	// Read gives the objects that are asked for.
	Read(context.Context, plan.Reads) (plan.Cluster, error)
}

// InPods yields how far the sidecars of a plan's Pods are, by their own word over port-forward, at once and whenever that
// changes. It ends with ctx, when the consumer stops, or after an error. What cannot be looked at, since a right is missing
// or no Service tells the Pods, is problem.NotVerified, with how far Consul is; that Consul's controller cannot write the
// entry is problem.EntryRefused; and that the plan's object is gone is problem.ChainChanged.
//
// The texts of proxies may quote their configuration, resolved secrets included.
func InPods(ctx context.Context, c Cluster, p plan.Plan) iter.Seq2[plan.Loaded, error] {
	return func(yield func(plan.Loaded, error) bool) {
		w := newPodWatch(c, p)
		defer w.close()
		var last *plan.Loaded
		failures := 0
		for pause := podFirstPause; ; pause = min(pause*3/2, podLastPause) {
			begun := time.Now()
			err := w.look(ctx)
			switch {
			case err == nil:
				failures = 0
				if now := w.loaded(); last == nil || !slices.Equal(last.Proxies, now.Proxies) {
					if last = &now; !yield(now, nil) {
						return
					}
					pause = podFirstPause
				}
			case ctx.Err() != nil:
				yield(plan.Loaded{}, ctx.Err())
				return
			case errors.Is(err, problem.EntryRefused), errors.Is(err, problem.ChainChanged):
				yield(plan.Loaded{}, err)
				return
			default:
				if failures++; failures >= podPatience || errors.Is(err, problem.RightMissing) || errors.Is(err, errUntold) {
					yield(plan.Loaded{}, problem.NotVerified.New("%s: %w%s", p.Chain.Target, err, w.synced))
					return
				}
			}
			if last != nil && fetching(p, *last) {
				pause = podFirstPause
			}
			// Half of the time at least is left to others.
			select {
			case <-ctx.Done():
				yield(plan.Loaded{}, ctx.Err())
				return
			case <-time.After(max(pause, time.Since(begun))):
			}
		}
	}
}

var errUntold = errors.New("no Service with a selector has the target's name, so nothing tells which Pods its proxies are in")

// podWatch is one look after another at a plan's proxies.
type podWatch struct {
	cluster  Cluster
	plan     plan.Plan
	begun    time.Time
	listed   time.Time // when the Pods were last
	sidecars map[plan.Pod]*sidecar
	synced   string // what Consul's controller says of the entry, for people
}

// sidecar is what is known of one.
type sidecar struct {
	pod      plan.Pod
	expected bool
	there    bool // in the list
	proof    *Proof
	client   *http.Client
	state    plan.ProxyState
	detail   string
}

func newPodWatch(c Cluster, p plan.Plan) *podWatch {
	return &podWatch{cluster: c, plan: p, begun: time.Now(), sidecars: map[plan.Pod]*sidecar{}}
}

func (w *podWatch) close() {
	for _, s := range w.sidecars {
		s.client.CloseIdleConnections()
	}
}

// look asks the controller, and every proxy.
func (w *podWatch) look(ctx context.Context) error {
	if err := w.entry(ctx); err != nil {
		return err
	}
	if w.plan.Proxies == nil {
		return errUntold
	}
	if time.Since(w.listed) > relist {
		if err := w.list(ctx); err != nil {
			return err
		}
	}
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(podParallel)
	for _, s := range w.sidecars {
		if s.there {
			g.Go(func() error { return w.ask(gctx, s) })
		}
	}
	return g.Wait()
}

// entry reads what the controller says of having written the plan's object to Consul.
func (w *podWatch) entry(ctx context.Context) error {
	for _, o := range w.plan.Objects {
		u := &unstructured.Unstructured{Object: o.Content}
		if u.GroupVersionKind().Group != "consul.hashicorp.com" { // what makes the Pods is none of its business
			continue
		}
		ref := plan.Ref{GroupKind: u.GroupVersionKind().GroupKind(), Namespace: u.GetNamespace(), Name: u.GetName()}
		found, err := w.cluster.Read(ctx, plan.Reads{Objects: []plan.Ref{ref}})
		if err != nil {
			return fmt.Errorf("read %s: %w", o, err)
		}
		now, ok := found.Object(ref)
		if !ok {
			return problem.ChainChanged.New("%s is not there any more", o)
		}
		status, reason, message, at := condition(now)
		switch status {
		case "True":
			w.synced = fmt.Sprintf("; Consul's controller says that %s is written to Consul", o)
		case "":
			w.synced = fmt.Sprintf("; Consul's controller has not said yet that %s is written to Consul", o)
		default:
			w.synced = fmt.Sprintf("; Consul's controller has not written %s to Consul: %s: %s", o, reason, message)
			// What it says may be of the object as it was before.
			if at.After(written(now)) || time.Since(w.begun) > podSettling {
				return problem.EntryRefused.New("%s: %s: %s", o, reason, message)
			}
		}
	}
	return nil
}

// condition is what the controller says of an object.
func condition(o plan.Object) (status, reason, message string, at time.Time) {
	list, _, _ := unstructured.NestedSlice(o.Content, "status", "conditions")
	for _, v := range list {
		c, _ := v.(map[string]any)
		if c["type"] != "Synced" {
			continue
		}
		text := func(key string) string {
			s, _ := c[key].(string)
			return clean(s)
		}
		at, _ = time.Parse(time.RFC3339, text("lastTransitionTime"))
		return text("status"), text("reason"), text("message"), at
	}
	return "", "", "", time.Time{}
}

// written is when the object was last changed by somebody who does not say how it is.
func written(o plan.Object) (last time.Time) {
	for _, m := range (&unstructured.Unstructured{Object: o.Content}).GetManagedFields() {
		if m.Subresource == "" && m.Time != nil && m.Time.After(last) {
			last = m.Time.Time
		}
	}
	return last
}

// list finds the Pods. Those of the first list are expected to run the plan.
func (w *podWatch) list(ctx context.Context) error {
	pods, err := w.cluster.Pods(ctx, w.plan.Proxies.Namespace, w.plan.Proxies.Labels)
	if err != nil {
		return fmt.Errorf("find the target's Pods: %w", err)
	}
	first := w.listed.IsZero()
	w.listed = time.Now()
	for _, s := range w.sidecars {
		s.there = false
	}
	for _, pod := range pods {
		s := w.sidecars[pod]
		if s == nil {
			s = &sidecar{pod: pod, expected: first, proof: NewProof(w.plan, pod.String()), client: sidecarClient(w.cluster.Dial, pod), state: plan.Waiting}
			w.sidecars[pod] = s
		}
		s.there = true
	}
	for _, s := range w.sidecars {
		if !s.there {
			s.state, s.detail = plan.Gone, "its Pod does not run any more"
		}
	}
	return nil
}

// ask finds out how far one proxy is. Only what ends the whole look is an error.
func (w *podWatch) ask(ctx context.Context, s *sidecar) error {
	asking, cancel := context.WithTimeout(ctx, podTimeout)
	defer cancel()
	state, detail, err := s.proof.Look(asking, s.get)
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case errors.Is(err, problem.RightMissing):
		return err
	case err != nil:
		s.state, s.detail = plan.Waiting, "its sidecar could not be asked: "+err.Error()
		return nil
	}
	s.state, s.detail = state, detail
	return nil
}

func (s *sidecar) get(ctx context.Context, path string, most int64) (int, []byte, error) {
	return get(ctx, s.client, path, most)
}

func get(ctx context.Context, client *http.Client, path string, most int64) (int, []byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://localhost"+path, nil)
	if err != nil {
		return 0, nil, err
	}
	resp, err := client.Do(req)
	if err != nil {
		return 0, nil, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, most+1))
	if err == nil && int64(len(body)) > most {
		err = fmt.Errorf("its answer to %s has more than %d MiB", path, most>>20)
	}
	return resp.StatusCode, body, err
}

// loaded tells how far the proxies are.
func (w *podWatch) loaded() (l plan.Loaded) {
	for _, s := range w.sidecars {
		status := plan.ProxyStatus{Proxy: plan.Proxy{ID: s.pod.String()}, State: s.state, Expected: s.expected && s.state != plan.Apart, Detail: s.detail}
		status.Proof = proofOf(s.state, s.detail)
		l.Proxies = append(l.Proxies, status)
	}
	l.Sort()
	return l
}
