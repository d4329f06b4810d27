package consul

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"slices"
	"strings"
	"time"

	"k8s.io/apimachinery/pkg/runtime/schema"

	"github.com/meshery/meshery-filters/internal/envoy"
	"github.com/meshery/meshery-filters/internal/plan"
	"github.com/meshery/meshery-filters/internal/survey"
)

// injected is a label of the Pods that consul-k8s has given a sidecar.
const injected = "consul.hashicorp.com/connect-inject-status"

// Surveyed is how Consul on Kubernetes is surveyed; kube.Cluster is one.
type Surveyed interface {
	// Labelled lists the Pods that run in a namespace, or with none in all, and that have the label.
	Labelled(ctx context.Context, namespace, label string) ([]plan.Pod, error)
	// Dial connects to a port of a Pod, as `kubectl port-forward` does.
	Dial(ctx context.Context, namespace, pod string, port int) (net.Conn, error)
	// All gives the objects of a kind; none where it is not served.
	All(context.Context, schema.GroupKind) ([]plan.Object, error)
}

// Sidecars are those of Consul in a cluster, for a survey of the filters that are ours: what other extensions are called in
// proxies is in entries that Kubernetes need not have.
type Sidecars struct{ Cluster Surveyed }

var _ survey.Mesh = Sidecars{}

// Proxies lists the Pods that have one.
func (s Sidecars) Proxies(ctx context.Context, namespace string) ([]plan.Pod, error) {
	return s.Cluster.Labelled(ctx, namespace, injected)
}

// Running reads a sidecar's listeners.
func (s Sidecars) Running(ctx context.Context, pod plan.Pod) ([]plan.WasmFilter, error) {
	client := sidecarClient(s.Cluster.Dial, pod)
	defer client.CloseIdleConnections()
	return running(ctx, func(ctx context.Context, path string, most int64) (int, []byte, error) {
		return get(ctx, client, path, most)
	})
}

// running are the filters of ours in a proxy's listeners.
func running(ctx context.Context, get Get) (running []plan.WasmFilter, err error) {
	dump, err := page(ctx, get, "/config_dump?resource=dynamic_listeners", maxDump)
	if err != nil {
		return nil, err
	}
	listeners, err := envoy.ParseListeners(dump)
	if err != nil {
		return nil, err
	}
	for _, l := range listeners {
		for _, p := range slices.Concat(l.Active...) {
			if f := survey.FilterOf(p.GetName(), p); strings.HasPrefix(f.Name, plugins) && !slices.Contains(running, f) {
				running = append(running, f)
			}
		}
	}
	return running, nil
}

// Explained looks for the extensions in all ServiceDefaults and ProxyDefaults.
func (s Sidecars) Explained(ctx context.Context, _ []string) (map[string]bool, error) {
	explained := map[string]bool{}
	for _, kind := range []string{"ServiceDefaults", "ProxyDefaults"} {
		objects, err := s.Cluster.All(ctx, schema.GroupKind{Group: "consul.hashicorp.com", Kind: kind})
		if err != nil {
			return nil, err
		}
		for _, o := range objects {
			for _, e := range extensionsOf(o.Content) {
				explained[pluginOf(e)] = true
			}
		}
	}
	return explained, nil
}

// Settling is how long Consul may take to tell a proxy.
func (s Sidecars) Settling() time.Duration { return podSettling }

// sidecarClient speaks to a sidecar's admin interface and keeps its connection from one question to the next.
func sidecarClient(dial func(ctx context.Context, namespace, pod string, port int) (net.Conn, error), pod plan.Pod) *http.Client {
	return &http.Client{
		Transport: &http.Transport{
			DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
				return dial(ctx, pod.Namespace, pod.Name, podAdminPort)
			},
			DisableCompression:     true,
			MaxResponseHeaderBytes: 64 << 10,
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
}

// Survey looks at the proxies that answer at the addresses of consul.admin for filters of ours that no entry explains, and in
// the folder for modules that nothing needs.
func (c *Client) Survey(ctx context.Context) (plan.Survey, error) {
	_, silent, err := c.sidecars(ctx)
	if err != nil {
		return plan.Survey{}, err
	}
	s, err := survey.Look(ctx, agents{c}, "")
	for i := range s.Orphans {
		s.Orphans[i].Proxy = strings.TrimPrefix(s.Orphans[i].Proxy, "/")
	}
	if err != nil {
		return s, err
	}
	files := plan.Survey{}
	if files.Files, err = c.leftFiles(ctx); err != nil {
		files.Missed = fmt.Sprintf("what lies in %s is not known: %v", c.Folder, err)
	}
	return s.And(plan.Survey{Missed: silent}).And(files), ctx.Err()
}

// agents are the sidecars that the Client may ask. Their Pods are none: the name says who answers where, and the namespace
// is empty.
type agents struct{ *Client }

var _ survey.Mesh = agents{}

const answersAt = " at "

func (a agents) Proxies(ctx context.Context, _ string) (pods []plan.Pod, err error) {
	proxies, _, err := a.sidecars(ctx)
	for _, p := range proxies {
		pods = append(pods, plan.Pod{Name: p.id + answersAt + p.addr})
	}
	return pods, err
}

func (a agents) Running(ctx context.Context, pod plan.Pod) ([]plan.WasmFilter, error) {
	return running(ctx, a.ask(pod.Name[strings.LastIndex(pod.Name, answersAt)+len(answersAt):]))
}

func (a agents) Explained(ctx context.Context, _ []string) (map[string]bool, error) {
	explained := map[string]bool{}
	for kind, global := range map[string]bool{"service-defaults": false, "proxy-defaults": true} {
		var entries []map[string]any
		if _, err := a.get(ctx, call{path: "/v1/config/" + kind, global: global, whole: true}, &entries); err != nil {
			return nil, err
		}
		for _, raw := range entries {
			for _, x := range (entry{raw: raw}).extensions() {
				explained[pluginOf(x)] = true
			}
		}
	}
	return explained, nil
}

func (a agents) Settling() time.Duration { return podSettling }
