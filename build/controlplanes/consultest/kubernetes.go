package consultest

import (
	"context"
	_ "embed"
	"fmt"
	"net/http"
	"path/filepath"
	"reflect"
	"sync"
	"time"

	"github.com/meshery/meshery-filters/build/controlplanes/k8stest"
)

// crds are the kinds of Consul on Kubernetes.
//
//go:embed crds.yaml
var crds []byte

const (
	adminPort = 19000 // by which a sidecar's admin interface is known in its Pod
	node      = "node-1"
	finalizer = "finalizers.consul.hashicorp.com"
	injected  = "consul.hashicorp.com/connect-inject-status"
)

// Cluster is a real API server with the kinds of Consul on Kubernetes, beside a real Consul, and a stand-in for the
// controller between them: it writes entries to Consul as they are accepted, says in their conditions how that went, and
// takes them away before their objects go. Pods that Deployments make, where the server has its controller manager, it brings
// to life. Whoever started it calls Stop.
type Cluster struct {
	*k8stest.Server
	Consul *Consul

	kubelet *k8stest.Kubelet
	stop    context.CancelFunc
	done    chan struct{}

	mu     sync.Mutex
	admins map[string]string // of Pods: namespace/name to where their sidecars' admin interfaces are
	held   string
}

// StartCluster runs everything. Files are kept in dir, which is made and not removed.
func StartCluster(ctx context.Context, dir string, o k8stest.Options) (_ *Cluster, err error) {
	server, err := k8stest.Start(ctx, filepath.Join(dir, "kubernetes"), o)
	if err != nil {
		return nil, err
	}
	c := &Cluster{Server: server, admins: map[string]string{}, done: make(chan struct{})}
	defer func() {
		if err != nil {
			c.Stop()
		}
	}()
	if c.Consul, err = Start(ctx, filepath.Join(dir, "consul"), Options{}); err != nil {
		return nil, err
	}
	if c.kubelet, err = server.StartKubelet(ctx, node, c.forward); err != nil {
		return nil, err
	}
	if err := c.Install(ctx, crds); err != nil {
		return nil, err
	}
	running, stop := context.WithCancel(context.WithoutCancel(ctx))
	c.stop = stop
	go func() {
		defer close(c.done)
		c.control(running)
	}()
	return c, nil
}

// Stop ends every part and waits until it is gone.
func (c *Cluster) Stop() {
	if c.stop != nil {
		c.stop()
		<-c.done
	}
	if c.kubelet != nil {
		c.kubelet.Stop()
	}
	if c.Consul != nil {
		c.Consul.Stop()
	}
	c.Server.Stop()
}

// Hold keeps Pods with an upstream from coming up, until another is held; empty: none.
func (c *Cluster) Hold(upstream string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.held = upstream
}

// Pod makes one that runs, as far as the API server knows, as the Pod that a service's sidecar is in.
func (c *Cluster) Pod(ctx context.Context, namespace, name string, labels map[string]string, s *Service) error {
	c.mu.Lock()
	c.admins[namespace+"/"+name] = s.Envoy.AdminAddr()
	c.mu.Unlock()
	all := map[string]any{injected: "injected"}
	for k, v := range labels {
		all[k] = v
	}
	o := map[string]any{"apiVersion": "v1", "kind": "Pod",
		"metadata": map[string]any{"namespace": namespace, "name": name, "labels": all},
		"spec":     map[string]any{"nodeName": node, "containers": []any{map[string]any{"name": "main", "image": "none"}}}}
	home := map[string]any{"apiVersion": "v1", "kind": "Namespace", "metadata": map[string]any{"name": namespace}}
	if err := c.Apply(ctx, home, o); err != nil {
		return err
	}
	return c.Send(ctx, http.MethodPatch, k8stest.Path(o)+"/status", map[string]any{"status": map[string]any{"phase": "Running",
		"conditions": []any{map[string]any{"type": "Ready", "status": "True"}}}})
}

func (c *Cluster) forward(namespace, pod string, port int) (string, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	at, ok := c.admins[namespace+"/"+pod]
	if !ok || port != adminPort {
		return "", fmt.Errorf("nothing listens on port %d of %s/%s", port, namespace, pod)
	}
	return at, nil
}

// entryKinds are the kinds that the controller writes, by what Kubernetes and Consul call them.
var entryKinds = map[string]string{"servicedefaults": "service-defaults", "proxydefaults": "proxy-defaults", "serviceintentions": "service-intentions"}

// control brings objects to Consul until ctx ends.
func (c *Cluster) control(ctx context.Context) {
	synced := map[string]any{} // the specs that Consul has, by UID
	n := &podNode{c: c, seen: map[string]bool{}, running: map[string]*Service{}}
	defer n.pods.Wait()
	for tick := time.Tick(pollInterval); ; {
		select {
		case <-ctx.Done():
			return
		case <-tick:
		}
		n.look(ctx)
		for plural, kind := range entryKinds {
			var list struct{ Items []map[string]any }
			if err := c.Get(ctx, "/apis/consul.hashicorp.com/v1alpha1/"+plural, &list); err != nil {
				continue // it is asked again
			}
			for _, o := range list.Items {
				c.reconcile(ctx, plural, kind, o, synced)
			}
		}
	}
}

// reconcile brings one object to Consul. What fails is tried again.
func (c *Cluster) reconcile(ctx context.Context, plural, kind string, o map[string]any, synced map[string]any) {
	meta := o["metadata"].(map[string]any)
	uid, name := meta["uid"].(string), meta["name"].(string)
	at := fmt.Sprintf("/apis/consul.hashicorp.com/v1alpha1/namespaces/%s/%s/%s", meta["namespace"], plural, name)
	finalizers, _ := meta["finalizers"].([]any)
	switch {
	case meta["deletionTimestamp"] != nil:
		if len(finalizers) == 0 || c.Consul.Delete(ctx, kind, name) != nil {
			return
		}
		_ = c.Send(ctx, http.MethodPatch, at, map[string]any{"metadata": map[string]any{"finalizers": nil}})
		return
	case len(finalizers) == 0:
		_ = c.Send(ctx, http.MethodPatch, at, map[string]any{"metadata": map[string]any{"finalizers": []any{finalizer}}})
		return
	case reflect.DeepEqual(synced[uid], o["spec"]):
		return
	}
	entry := map[string]any{"Kind": kind, "Name": name}
	spec, _ := o["spec"].(map[string]any)
	for k, v := range spec {
		entry[k] = v
	}
	now := time.Now().UTC().Format(time.RFC3339)
	condition := map[string]any{"type": "Synced", "status": "True", "lastTransitionTime": now}
	status := map[string]any{"conditions": []any{condition}, "lastSyncedTime": now}
	if err := c.Consul.Write(ctx, entry); err != nil {
		condition["status"], condition["reason"], condition["message"] = "False", "ConsulAgentError", err.Error()
		delete(status, "lastSyncedTime")
	}
	if c.Send(ctx, http.MethodPatch, at+"/status", map[string]any{"status": status}) == nil && condition["status"] == "True" {
		synced[uid] = o["spec"]
	}
}
