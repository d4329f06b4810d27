package consultest

import (
	"context"
	"fmt"
	"maps"
	"net/http"
	"strings"
	"sync"
)

// What Pods of a Deployment are brought to life by, as Consul's injector reads it.
const (
	inject    = "consul.hashicorp.com/connect-inject"
	upstreams = "consul.hashicorp.com/connect-service-upstreams"
)

// podNode is the stand-in for what a cluster does with Pods that have the annotation connect-inject "true": for the scheduler, the
// injector and the machine. Each is an instance, with a sidecar, of the service that its label app names, and calls the
// services of its annotation connect-service-upstreams. The ports there are not heeded: all Pods are on one machine.
type podNode struct {
	c    *Cluster
	pods sync.WaitGroup
	seen map[string]bool // by UID: is being brought up, and with "-" before it taken down

	mu      sync.Mutex
	running map[string]*Service // by UID
}

// look takes the Pods that have come or are to go.
func (n *podNode) look(ctx context.Context) {
	var list struct{ Items []map[string]any }
	if err := n.c.Get(ctx, "/api/v1/pods", &list); err != nil {
		return // it is asked again
	}
	for _, o := range list.Items {
		meta := o["metadata"].(map[string]any)
		annotations, _ := meta["annotations"].(map[string]any)
		if annotations[inject] != "true" {
			continue
		}
		uid, does := meta["uid"].(string), n.start
		if meta["deletionTimestamp"] != nil {
			uid, does = "-"+uid, n.end
		}
		if n.seen[uid] {
			continue
		}
		n.c.mu.Lock()
		held := n.c.held
		n.c.mu.Unlock()
		if text, _ := annotations[upstreams].(string); held != "" && strings.Contains(text, held+":") && meta["deletionTimestamp"] == nil {
			continue
		}
		n.seen[uid] = true
		n.pods.Go(func() {
			if err := does(ctx, meta); err != nil && ctx.Err() == nil {
				fmt.Printf("Pod %v/%v: %v\n", meta["namespace"], meta["name"], err)
			}
		})
	}
}

func (n *podNode) start(ctx context.Context, meta map[string]any) error {
	namespace, name := meta["namespace"].(string), meta["name"].(string)
	labels := meta["labels"].(map[string]any)
	annotations := meta["annotations"].(map[string]any)
	o := ServiceOptions{Name: labels["app"].(string), ID: name, Late: true}
	text, _ := annotations[upstreams].(string)
	for entry := range strings.SplitSeq(text, ",") {
		if service, _, ok := strings.Cut(strings.TrimSpace(entry), ":"); ok {
			o.Upstreams = append(o.Upstreams, service)
		}
	}
	s, err := n.c.Consul.Service(ctx, o)
	if err != nil {
		return err
	}
	n.mu.Lock()
	n.running[meta["uid"].(string)] = s
	n.mu.Unlock()
	n.c.mu.Lock()
	n.c.admins[namespace+"/"+name] = s.Envoy.AdminAddr()
	n.c.mu.Unlock()
	at := "/api/v1/namespaces/" + namespace + "/pods/" + name
	labels = maps.Clone(labels)
	labels[injected] = "injected"
	for _, step := range []struct {
		method, path string
		body         map[string]any
	}{
		{http.MethodPatch, at, map[string]any{"metadata": map[string]any{"labels": labels}}},
		{http.MethodPost, at + "/binding", map[string]any{"apiVersion": "v1", "kind": "Binding", "metadata": map[string]any{"name": name},
			"target": map[string]any{"apiVersion": "v1", "kind": "Node", "name": node}}},
		{http.MethodPatch, at + "/status", map[string]any{"status": map[string]any{"phase": "Running",
			"conditions": []any{map[string]any{"type": "Ready", "status": "True"}}}}},
	} {
		if err := n.c.Send(ctx, step.method, step.path, step.body); err != nil {
			return err
		}
	}
	return nil
}

func (n *podNode) end(ctx context.Context, meta map[string]any) error {
	n.mu.Lock()
	s := n.running[meta["uid"].(string)]
	n.mu.Unlock()
	if s != nil {
		if err := n.c.Consul.Withdraw(ctx, s); err != nil {
			return err
		}
	}
	// One that was on no node is gone already.
	_ = n.c.Send(ctx, http.MethodDelete, fmt.Sprintf("/api/v1/namespaces/%s/pods/%s", meta["namespace"], meta["name"]),
		map[string]any{"apiVersion": "v1", "kind": "DeleteOptions", "gracePeriodSeconds": 0})
	return nil
}
