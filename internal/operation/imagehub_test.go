package operation_test

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net/http"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/meshery/meshery-filters/build/controlplanes/k8stest"
	"github.com/meshery/meshery-filters/build/controlplanes/stack"
	"github.com/meshery/meshery-filters/internal/operation"
	"github.com/meshery/meshery-filters/internal/problem"
	"github.com/meshery/meshery-filters/templates"
)

// hubUser has the rights of templates/rbac/imagehub.yaml besides.
const hubUser = "hub"

var publicHub = operation.ImageHubIn{ImageHub: templates.ImageHub{APIImage: "layer5/image-hub-api:latest", WebImage: "layer5/image-hub-web:latest", Host: "imagehub.localhost"}}

// hubPaths are where the objects are that Image Hub can be made of, and what comes of them.
var hubPaths = []string{"/api/v1/namespaces/%s/serviceaccounts", "/api/v1/namespaces/%s/services", "/api/v1/namespaces/%s/secrets",
	"/apis/apps/v1/namespaces/%s/deployments", "/apis/apps/v1/namespaces/%s/replicasets", "/api/v1/namespaces/%s/pods",
	"/apis/networking.istio.io/v1/namespaces/%s/gateways", "/apis/networking.istio.io/v1/namespaces/%s/virtualservices",
	"/apis/networking.istio.io/v1alpha3/namespaces/%s/envoyfilters",
	"/apis/gateway.networking.k8s.io/v1/namespaces/%s/gateways", "/apis/gateway.networking.k8s.io/v1/namespaces/%s/httproutes",
	"/api/v1/namespaces/%s/configmaps", "/apis/consul.hashicorp.com/v1alpha1/namespaces/%s/servicedefaults",
	"/apis/consul.hashicorp.com/v1alpha1/namespaces/%s/serviceintentions"}

// hubRig is a clusterRig whose cluster runs Deployments, in a namespace that takes restricted Pods only.
func hubRig(t *testing.T, s *servers, hub operation.ImageHubIn, change ...func(*operation.Options)) *clusterRig {
	t.Helper()
	c := s.rigOf(t, t.TempDir(), "hub", hubUser, append([]func(*operation.Options){func(o *operation.Options) { o.ImageHubIn = hub }}, change...)...)
	c.create("/api/v1/namespaces", fmt.Sprintf(`{"metadata": {"name": %q, "labels": {"pod-security.kubernetes.io/enforce": "restricted"}}}`, c.ns))
	return c
}

func (c *clusterRig) create(path, object string) map[string]any {
	c.t.Helper()
	code, answer, err := c.ask("POST", path, json.RawMessage(object))
	if code != http.StatusCreated {
		c.t.Fatal(path, code, answer["message"], err)
	}
	return answer
}

// there gives the objects of a namespace by their path, and what each is.
func (c *clusterRig) there() map[string]map[string]any {
	c.t.Helper()
	all := map[string]map[string]any{}
	for _, path := range hubPaths {
		path = fmt.Sprintf(path, c.ns)
		code, list, err := c.ask("GET", path, nil)
		if code == http.StatusNotFound {
			continue
		}
		if code != http.StatusOK {
			c.t.Fatal(path, code, list["message"], err)
		}
		for _, o := range list["items"].([]any) {
			o := o.(map[string]any)
			all[strings.TrimPrefix(path, "/api/")+"/"+o["metadata"].(map[string]any)["name"].(string)] = o
		}
	}
	return all
}

// names are those of there, without what controllers make of them.
func (c *clusterRig) names() (all []string) {
	for path := range c.there() {
		kind, name, _ := strings.Cut(path[strings.Index(path, c.ns)+len(c.ns)+1:], "/")
		if kind != "replicasets" && kind != "pods" && name != "default" && name != "kube-root-ca.crt" {
			all = append(all, kind+"/"+name)
		}
	}
	slices.Sort(all)
	return all
}

// unpullable is an image that no registry has.
const unpullable = "registry.example/none:v1"

// kubelet says that every Pod is ready, as one with a node would after it has started the containers, if it can pull them.
func (s *servers) kubelet(ctx context.Context) {
	for ctx.Err() == nil {
		_, list, _ := s.ask("GET", "/api/v1/pods", nil)
		items, _ := list["items"].([]any)
		for _, o := range items {
			pod := o.(map[string]any)
			status := pod["status"].(map[string]any)
			containers := pod["spec"].(map[string]any)["containers"].([]any)
			if status["phase"] == "Running" || containers[0].(map[string]any)["image"] == unpullable {
				continue
			}
			status["phase"], status["conditions"] = "Running", []any{map[string]any{"type": "Ready", "status": "True"}}
			meta := pod["metadata"].(map[string]any)
			_, _, _ = s.ask("PUT", fmt.Sprintf("/api/v1/namespaces/%s/pods/%s/status", meta["namespace"], meta["name"]), pod)
		}
		select {
		case <-ctx.Done():
		case <-time.After(100 * time.Millisecond):
		}
	}
}

func (c *clusterRig) imagehub(change ...func(*operation.Request)) operation.Request {
	q := operation.Request{Operation: "imagehub", Namespace: c.ns, Kubeconfigs: []string{c.kubeconfig}}
	for _, f := range change {
		f(&q)
	}
	return q
}

func deletion(q *operation.Request) { q.Delete = true }
func op(name string) func(*operation.Request) {
	return func(q *operation.Request) { q.Operation = name }
}

// istioKinds gives the server kinds of Istio as it ships them.
func istioKinds(t *testing.T, s *servers, kinds ...string) {
	t.Helper()
	folder, err := stack.Folder(t.Context(), "istio")
	if err != nil {
		t.Fatal(err)
	}
	for _, kind := range kinds {
		if err := s.make(filepath.Join(folder, "crds.yaml"), kind); err != nil {
			t.Fatal(err)
		}
		if err := s.serves("/apis/networking.istio.io/v1/" + strings.ToLower(kind) + "s"); err != nil {
			t.Fatal(err)
		}
	}
}

// gatewayAPIKinds gives the server those of the Gateway API, of the version that Istio is built with.
func gatewayAPIKinds(t *testing.T, s *servers) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "go", "mod", "download", "-json", "sigs.k8s.io/gateway-api")
	cmd.Dir = "../../build/controlplanes/istio"
	out, err := cmd.Output()
	var module struct{ Dir string }
	if err == nil {
		err = json.Unmarshal(out, &module)
	}
	if err != nil {
		t.Fatalf("find the Gateway API's kinds: %v: %s", err, out)
	}
	for _, kind := range []string{"gateways", "httproutes"} {
		if err := s.make(filepath.Join(module.Dir, "config", "crd", "standard", "gateway.networking.k8s.io_"+kind+".yaml"), ""); err != nil {
			t.Fatal(err)
		}
		if err := s.serves("/apis/gateway.networking.k8s.io/v1/" + kind); err != nil {
			t.Fatal(err)
		}
	}
}

func TestImageHubRunsInACluster(t *testing.T) {
	if testing.Short() {
		t.Skip("needs a Kubernetes API server")
	}
	s := &servers{dir: t.TempDir(), client: &http.Client{}, options: k8stest.Options{Users: []string{adapterUser, nobody, hubUser}, ControllerManager: true}}
	t.Cleanup(s.stop)
	if err := s.start(t.Context()); err != nil {
		t.Fatal(err)
	}
	roles, _ := templates.RBAC("imagehub")
	base, _ := templates.RBAC("base")
	if err := s.post(bound(roles, hubUser), ""); err != nil {
		t.Fatal(err)
	}
	for _, binding := range []string{"meshery-filters-base", "meshery-filters-inventory"} {
		text := bound(base, hubUser)
		i := strings.Index(text, "Binding\nmetadata:\n  name: "+binding)
		text = text[strings.LastIndex(text[:i], "apiVersion:"):]
		text, _, _ = strings.Cut(text, "---\n")
		if err := s.post(strings.Replace(text, "name: "+binding, "name: "+binding+"-"+hubUser, 1), ""); err != nil {
			t.Fatal(err)
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); s.kubelet(ctx) }()
	t.Cleanup(func() { cancel(); <-done })
	host := strings.TrimPrefix(s.URL, "https://")

	const parts = "deployments/imagehub-api deployments/imagehub-web %s serviceaccounts/imagehub-api serviceaccounts/imagehub-web services/imagehub-api services/imagehub-web%s"
	apart := func(c *clusterRig, gateway, route string) {
		c.t.Helper()
		want := strings.Fields(fmt.Sprintf(parts, gateway, route))
		slices.Sort(want)
		if got := c.names(); !reflect.DeepEqual(got, want) {
			c.t.Fatalf("there are\n%v, and should be\n%v", got, want)
		}
	}

	// These come first, while nothing serves a gateway.
	c := hubRig(t, s, publicHub)
	if e := c.fails(problem.HubGateway, c.imagehub()); !strings.Contains(e.Details, "VirtualService.networking.istio.io") || !strings.Contains(e.Details, "HTTPRoute.gateway.networking.k8s.io") {
		t.Errorf("%s", e.Details)
	}
	if names := c.names(); len(names) > 0 {
		t.Fatalf("without a gateway there are %v", names)
	}
	gatewayAPIKinds(t, s)
	c = hubRig(t, s, publicHub)
	says(t, c.ok(c.imagehub()), "HTTPRoute/"+c.ns+"/imagehub created", "http://imagehub.localhost/ from the namespace "+c.ns+" in cluster "+host+" | through Gateway "+c.ns+"/imagehub;")
	apart(c, "gateways/imagehub", " httproutes/imagehub")
	istioKinds(t, s, "Gateway", "VirtualService")

	t.Run("Istio's gateways come first, and a configuration may ask for others", func(t *testing.T) {
		c := hubRig(t, s, publicHub)
		says(t, c.ok(c.imagehub()), "VirtualService/"+c.ns+"/imagehub created", "istio=ingressgateway")
		apart(c, "gateways/imagehub", " virtualservices/imagehub")
		other := publicHub
		other.Gateway = operation.HubGatewayAPI
		again := hubRig(t, s, other)
		again.ns = c.ns
		says(t, again.ok(again.imagehub()), "HTTPRoute/"+c.ns+"/imagehub created", "VirtualService/"+c.ns+"/imagehub removed", "runs at")
		apart(c, "gateways/imagehub", " httproutes/imagehub")
	})

	t.Run("deploying twice changes nothing, and deleting takes away what was made", func(t *testing.T) {
		c := hubRig(t, s, publicHub)
		// A Pod that is not restricted does not come in.
		if code, answer, _ := c.ask("POST", "/api/v1/namespaces/"+c.ns+"/pods", json.RawMessage(`{"metadata": {"name": "x"}, "spec": {"containers": [{"name": "x", "image": "x"}]}}`)); code != http.StatusForbidden {
			t.Fatal(code, answer)
		}
		// What others have there: one with a name of ours, too.
		c.create("/api/v1/namespaces/"+c.ns+"/serviceaccounts", `{"metadata": {"name": "imagehub-web"}}`)
		c.create("/api/v1/namespaces/"+c.ns+"/services", `{"metadata": {"name": "shop"}, "spec": {"ports": [{"port": 80}]}}`)
		c.create("/apis/networking.istio.io/v1/namespaces/"+c.ns+"/virtualservices", `{"apiVersion": "networking.istio.io/v1", "kind": "VirtualService", "metadata": {"name": "shop"}, "spec": {"hosts": ["shop"], "http": [{"route": [{"destination": {"host": "shop"}}]}]}}`)
		others := c.names()

		events := c.ok(c.imagehub())
		says(t, events, "Deployment/"+c.ns+"/imagehub-api created", "Image Hub runs at http://imagehub.localhost/ from the namespace "+c.ns+" in cluster "+host)
		if c.app.running {
			t.Error("it runs in the adapter, too")
		}
		was := c.there()
		pods := 0
		for path := range was {
			if strings.Contains(path, "/pods/") {
				pods++
			}
		}
		if pods != 2 || len(c.inventories()) != 1 {
			t.Errorf("%d pods and %d inventories", pods, len(c.inventories()))
		}
		inventory := version(c.inventories()[0])
		says(t, c.ok(c.imagehub()), "Image Hub is unchanged at http://imagehub.localhost/")
		for path, o := range c.there() {
			// The controllers go on writing for a while what comes of a Deployment.
			if was[path] != nil && !strings.Contains(path, "/pods/") && !strings.Contains(path, "/replicasets/") && version(o) != version(was[path]) {
				t.Errorf("%s was written again", path)
			}
		}
		if now := version(c.inventories()[0]); now != inventory {
			t.Errorf("the inventory was written again")
		}

		says(t, c.ok(c.imagehub(deletion)), "VirtualService/"+c.ns+"/imagehub removed", "Image Hub removed from the namespace "+c.ns)
		if left := c.names(); !reflect.DeepEqual(left, others) {
			t.Errorf("there are %v, and were %v before", left, others)
		}
		if n := len(c.inventories()); n != 0 {
			t.Errorf("%d inventories are left", n)
		}
		for deadline := time.Now().Add(time.Minute); ; time.Sleep(50 * time.Millisecond) {
			left := slices.DeleteFunc(keys(c.there()), func(path string) bool {
				return !strings.Contains(path, "/pods/") && !strings.Contains(path, "/replicasets/")
			})
			if len(left) == 0 {
				break
			}
			if time.Now().After(deadline) {
				t.Fatalf("%v are left", left)
			}
		}
		says(t, c.ok(c.imagehub(deletion)), "Image Hub was removed before")
	})

	t.Run("the limiter comes to the API's workload", func(t *testing.T) {
		c := hubRig(t, s, publicHub)
		c.ok(c.imagehub())
		for range 2 {
			says(t, c.ok(c.imagehub(op("imagehub_rate_limit"))), problem.UnsignedTokens.Code, "Workload "+c.ns+" {app=imagehub-api}")
		}
		o := c.holds("EnvoyFilter", "imagehub-rate-limit")["imagehub-rate-limit"]
		if labels := o["spec"].(map[string]any)["workloadSelector"].(map[string]any)["labels"]; !reflect.DeepEqual(labels, map[string]any{"app": "imagehub-api"}) {
			t.Errorf("it is for %v", labels)
		}
		if c.order("default") != "" {
			t.Error("plain Envoys have it, too")
		}
		c.ok(c.imagehub(op("imagehub_rate_limit"), deletion))
		c.holds("EnvoyFilter")
		apart(c, "gateways/imagehub", " virtualservices/imagehub")
	})

	t.Run("this project's image signs tokens with a key of its own", func(t *testing.T) {
		own := operation.ImageHubIn{ImageHub: templates.ImageHub{Image: "registry.example/meshery-filters:v1", Host: "hub.example.com"}}
		keyOf := func(c *clusterRig) string {
			o := c.there()[strings.TrimPrefix(fmt.Sprintf("/api/v1/namespaces/%s/secrets/imagehub", c.ns), "/api/")]
			if o == nil {
				t.Fatalf("there are %v", c.names())
			}
			key, err := base64.StdEncoding.DecodeString(o["data"].(map[string]any)["token-key"].(string))
			if err != nil || len(key) < 32 || strings.Contains(string(key), hubKey) {
				t.Fatalf("the key is %q: %v", key, err)
			}
			return string(key)
		}
		c := hubRig(t, s, own)
		events := c.ok(c.imagehub(op("meshery-filters")))
		says(t, events, "Image Hub runs at http://hub.example.com/", "Image Hub and its rate limit are deployed | Image Hub runs at http://hub.example.com/")
		key := keyOf(c)
		text, err := json.Marshal(c.holds("EnvoyFilter", "imagehub-rate-limit"))
		if err != nil || !strings.Contains(string(text), key) || strings.Contains(string(text), hubKey) {
			t.Errorf("the limiter does not have the key: %v %s", err, text)
		}
		for _, line := range texts(events) {
			if strings.Contains(line, key) || strings.Contains(line, hubKey) || strings.Contains(line, problem.UnsignedTokens.Code) {
				t.Errorf("told: %s", line)
			}
		}
		inventory, err := json.Marshal(c.inventories())
		if err != nil || strings.Contains(string(inventory), key) {
			t.Errorf("an inventory has the key: %v %s", err, inventory)
		}
		other := hubRig(t, s, own)
		other.ok(other.imagehub())
		if keyOf(other) == key {
			t.Error("another namespace has the same key")
		}
		// Without Image Hub there is no such Secret, and what the adapter calls so is its own.
		e := c.fails(problem.ClusterSecret, c.imagehub(op("imagehub_rate_limit"), func(q *operation.Request) { q.Namespace = "default" }))
		if !strings.Contains(e.Details, "there is no Secret/default/imagehub") {
			t.Errorf("%s", e.Details)
		}
		c.ok(c.imagehub(op("meshery-filters"), deletion))
		if names := c.names(); len(names) > 0 || len(c.inventories()) > 0 {
			t.Errorf("%v and %d inventories are left", names, len(c.inventories()))
		}
	})

	t.Run("a missing right is named, and nothing is made", func(t *testing.T) {
		c := hubRig(t, s, publicHub)
		e := c.fails(problem.RightMissing, c.imagehub(func(q *operation.Request) { q.Kubeconfigs = []string{c.as(adapterUser, "")} }))
		if !strings.Contains(e.Details, "verb patch, resource ") || !strings.Contains(e.Details, "namespace "+c.ns) {
			t.Errorf("%s", e.Details)
		}
		if names := c.names(); len(names) > 0 {
			t.Errorf("there are %v", names)
		}
	})

	t.Run("a namespace is labelled on request, with the right for that, and gets back what it had", func(t *testing.T) {
		labelled := publicHub
		labelled.LabelNamespace = true
		c := hubRig(t, s, labelled)
		if e := c.fails(problem.RightMissing, c.imagehub()); !strings.Contains(e.Details, "verb patch, resource namespaces") {
			t.Errorf("%s", e.Details)
		}
		if err := s.post(`{apiVersion: rbac.authorization.k8s.io/v1, kind: ClusterRoleBinding, metadata: {name: hub-namespace},
			roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: meshery-filters-imagehub-namespace},
			subjects: [{kind: User, apiGroup: rbac.authorization.k8s.io, name: `+hubUser+`}]}`, ""); err != nil {
			t.Fatal(err)
		}
		labels := func() map[string]any {
			_, o, _ := c.ask("GET", "/api/v1/namespaces/"+c.ns, nil)
			labels, _ := o["metadata"].(map[string]any)["labels"].(map[string]any)
			return labels
		}
		before := labels()
		c.ok(c.imagehub())
		if labels()["istio-injection"] != "enabled" {
			t.Errorf("the labels are %v", labels())
		}
		c.ok(c.imagehub(deletion))
		if after := labels(); !reflect.DeepEqual(after, before) {
			t.Errorf("the labels are %v, and were %v", after, before)
		}
		// One that is not there is made, and stays: others may have put something into it.
		c.ns += "-new"
		c.ok(c.imagehub())
		says(t, c.ok(c.imagehub(deletion)), "its users and tokens are gone with it; Namespace/"+c.ns+" stays")
	})

	t.Run("one that does not get ready stays, until it is finished or taken away", func(t *testing.T) {
		broken := publicHub
		broken.APIImage, broken.Patience = unpullable, time.Second
		c := hubRig(t, s, broken)
		e := c.fails(problem.NotReady, c.imagehub())
		for _, want := range []string{"Deployment/" + c.ns + "/imagehub-api", "0 of 1 replicas are available", "What was written stays", "deleting takes it away"} {
			if !strings.Contains(e.Details, want) {
				t.Errorf("no %q in: %s", want, e.Details)
			}
		}
		apart(c, "gateways/imagehub", " virtualservices/imagehub")
		again := hubRig(t, s, publicHub)
		again.ns = c.ns
		says(t, again.ok(again.imagehub()), "Deployment/"+c.ns+"/imagehub-api updated", "Image Hub runs at")
		c.fails(problem.NotReady, c.imagehub())
		says(t, c.ok(c.imagehub(deletion)), "Image Hub removed from the namespace "+c.ns)
		if names := c.names(); len(names) > 0 || len(c.inventories()) > 0 {
			t.Errorf("%v and %d inventories are left", names, len(c.inventories()))
		}
	})

	t.Run("one that is cut off is finished after the restart", func(t *testing.T) {
		for _, fuse := range []int64{26, 34, 40} {
			c := hubRig(t, s, publicHub)
			k := killed{Server: s.URL, CA: s.CA, Token: s.Token(hubUser), Address: freeAddress(t), Namespace: c.ns, State: t.TempDir(), Hub: true}
			if !k.in(t, fuse) {
				t.Fatalf("it was not killed at moment %d", fuse)
			}
			before := c.names()
			k.in(t, 1<<40)
			t.Logf("killed at moment %d there were %v", fuse, before)
			apart(c, "gateways/imagehub", " virtualservices/imagehub")
			if n := len(c.inventories()); n != 1 || version(c.inventories()[0]) == "" {
				t.Errorf("killed at moment %d: %d inventories", fuse, n)
			}
			says(t, c.ok(c.imagehub()), "Image Hub is unchanged")
			if err := c.rig.stop(); err != nil {
				t.Fatal(err)
			}
		}
	})

	t.Run("a stranger may use the rights of a kubeconfig", func(t *testing.T) {
		c := hubRig(t, s, publicHub)
		c.ok(c.imagehub(func(q *operation.Request) { q.Caller = operation.Caller{Remote: "192.0.2.7:4242", Foreign: true} }))
		apart(c, "gateways/imagehub", " virtualservices/imagehub")
	})

	// From here on the cluster has Consul, and Istio is gone.
	const crds = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
	_, kinds, err := s.ask("GET", crds, nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, o := range kinds["items"].([]any) {
		name := o.(map[string]any)["metadata"].(map[string]any)["name"].(string)
		if !strings.HasSuffix(name, ".istio.io") {
			continue
		}
		if code, answer, err := s.ask("DELETE", crds+"/"+name, nil); code != http.StatusOK {
			t.Fatal(code, answer["message"], err)
		}
	}
	if err := s.make("../../build/controlplanes/consultest/crds.yaml", ""); err != nil {
		t.Fatal(err)
	}
	for _, kind := range []string{"servicedefaults", "serviceintentions"} {
		if err := s.serves("/apis/consul.hashicorp.com/v1alpha1/" + kind); err != nil {
			t.Fatal(err)
		}
	}
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(50 * time.Millisecond) {
		extensions, _, _ := s.ask("GET", "/apis/extensions.istio.io", nil)
		networking, _, _ := s.ask("GET", "/apis/networking.istio.io", nil)
		if extensions == http.StatusNotFound && networking == http.StatusNotFound {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("Istio's kinds are still served")
		}
	}
	consulApart := func(c *clusterRig, more ...string) {
		c.t.Helper()
		want := append(strings.Fields("configmaps/imagehub-filters deployments/imagehub-api gateways/imagehub httproutes/imagehub serviceaccounts/imagehub-api "+
			"servicedefaults/imagehub-api serviceintentions/imagehub-api services/imagehub-api"), more...)
		slices.Sort(want)
		if got := c.names(); !reflect.DeepEqual(got, want) {
			c.t.Fatalf("there are\n%v, and should be\n%v", got, want)
		}
	}
	web := strings.Fields("deployments/imagehub-web serviceaccounts/imagehub-web servicedefaults/imagehub-web serviceintentions/imagehub-web services/imagehub-web")

	t.Run("on Consul it has entries of its own, and its module beside the sidecar", func(t *testing.T) {
		c := hubRig(t, s, publicHub)
		events := c.ok(c.imagehub())
		says(t, events, "ServiceDefaults/"+c.ns+"/imagehub-api created", "ServiceIntentions/"+c.ns+"/imagehub-web created",
			"Image Hub runs at http://imagehub.localhost:8080/ from the namespace "+c.ns+" in cluster "+host+" | through Gateway "+c.ns+"/imagehub of Consul;")
		consulApart(c, web...)
		was := c.there()
		inventory := version(c.inventories()[0])
		says(t, c.ok(c.imagehub()), "Image Hub is unchanged at http://imagehub.localhost:8080/")
		for path, o := range c.there() {
			if was[path] != nil && !strings.Contains(path, "/pods/") && !strings.Contains(path, "/replicasets/") && version(o) != version(was[path]) {
				t.Errorf("%s was written again", path)
			}
		}
		if version(c.inventories()[0]) != inventory {
			t.Error("the inventory was written again")
		}

		// The limiter joins the entry, which stays Image Hub's.
		entry := func() map[string]any {
			return c.there()[fmt.Sprintf("/apis/consul.hashicorp.com/v1alpha1/namespaces/%s/servicedefaults/imagehub-api", c.ns)]["spec"].(map[string]any)
		}
		bare := entry()
		says(t, c.ok(c.imagehub(op("imagehub_rate_limit"))), problem.UnsignedTokens.Code, "ServiceDefaults/"+c.ns+"/imagehub-api updated", "Service "+c.ns+"/imagehub-api")
		module := c.there()["v1/namespaces/"+c.ns+"/configmaps/imagehub-filters"]["binaryData"].(map[string]any)
		limited, err := json.Marshal(entry())
		if err != nil || len(module) != 1 || !strings.Contains(string(limited), `"filename":"/meshery-filters/`+keys(module)[0]+`"`) || entry()["protocol"] != "http" {
			t.Errorf("%v: %s", err, limited)
		}
		says(t, c.ok(c.imagehub()), "Image Hub is unchanged at")
		if now, err := json.Marshal(entry()); err != nil || string(now) != string(limited) {
			t.Errorf("deploying again made of the entry %s", now)
		}
		c.ok(c.imagehub(op("imagehub_rate_limit"), deletion))
		if !reflect.DeepEqual(entry(), bare) {
			t.Errorf("the entry is %v, and was %v", entry(), bare)
		}
		says(t, c.ok(c.imagehub(deletion)), "HTTPRoute/"+c.ns+"/imagehub removed", "Image Hub removed from the namespace "+c.ns)
		if names := c.names(); len(names) > 0 || len(c.inventories()) > 0 {
			t.Errorf("%v and %d inventories are left", names, len(c.inventories()))
		}
		says(t, c.ok(c.imagehub(deletion)), "Image Hub was removed before")
	})

	t.Run("on Consul this project's image is one service, and its limiter has the key", func(t *testing.T) {
		own := operation.ImageHubIn{ImageHub: templates.ImageHub{Image: "registry.example/meshery-filters:v1", Host: "hub.example.com"}}
		c := hubRig(t, s, own)
		says(t, c.ok(c.imagehub(op("meshery-filters"))), "Image Hub runs at http://hub.example.com:8080/", "Image Hub and its rate limit are deployed")
		consulApart(c, "secrets/imagehub")
		c.ok(c.imagehub(op("meshery-filters"), deletion))
		if names := c.names(); len(names) > 0 || len(c.inventories()) > 0 {
			t.Errorf("%v and %d inventories are left", names, len(c.inventories()))
		}
	})

	t.Run("in the adapter's own cluster it has its limiter there too, whatever other Consul the adapter knows", func(t *testing.T) {
		other := newConsulRig(t)
		c := hubRig(t, s, publicHub, func(o *operation.Options) {
			o.Consul = other.client
			if o.Own, err = o.Clusters(s.Kubeconfig(s.Token(hubUser))); err != nil {
				t.Fatal(err)
			}
		})
		limited := func(want bool) {
			t.Helper()
			entry, err := json.Marshal(c.there()[fmt.Sprintf("/apis/consul.hashicorp.com/v1alpha1/namespaces/%s/servicedefaults/imagehub-api", c.ns)]["spec"])
			if err != nil || strings.Contains(string(entry), "meshery.filters/"+c.ns+".imagehub-rate-limit") != want {
				t.Errorf("the cluster's entry, which should have the limiter: %v, is %s, %v", want, entry, err)
			}
			if entry := other.entry("service-defaults", "imagehub-api"); entry != "" {
				t.Errorf("the other Consul has %s", entry)
			}
		}
		says(t, c.ok(c.imagehub(op("meshery-filters"))), "Image Hub runs at", "ServiceDefaults/"+c.ns+"/imagehub-api updated", "Image Hub and its rate limit are deployed")
		consulApart(c, web...)
		limited(true)
		says(t, c.ok(c.undoing("imagehub-rate-limit", 0)), "removed from Service "+c.ns+"/imagehub-api")
		limited(false)
		says(t, c.ok(c.imagehub(op("imagehub_rate_limit"))), "ServiceDefaults/"+c.ns+"/imagehub-api updated")
		limited(true)
		if all, err := c.runner.List(t.Context()); err != nil || len(all) != 1 || all[0].Chain.Target.Name != "imagehub-api" {
			t.Errorf("the list has %v, %v", all, err)
		}

		// Other filters for Consul are for that other one.
		other.speaks()
		says(t, c.ok(operation.Request{Operation: "apply_filter", Namespace: c.ns, Body: onAPI("routed")}), "service-defaults/api")
		if got := c.there()[fmt.Sprintf("/apis/consul.hashicorp.com/v1alpha1/namespaces/%s/servicedefaults/api", c.ns)]; got != nil {
			t.Errorf("the cluster has %v", got)
		}
		c.ok(operation.Request{Operation: "remove_filter", Namespace: c.ns, Body: onAPI("routed")})

		// What is here from before the cluster was the adapter's own is named, and goes along.
		limiter, _ := templates.ImageHubLimiter("agent")
		before := newConsulRigOf(t, func(o *operation.Options) { o.HubSidecar, o.Limiter = "127.0.0.1:2", limiter })
		before.ok(operation.Request{Operation: "meshery-filters", Namespace: c.ns})
		c.ok(operation.Request{Operation: "apply_filter", Namespace: c.ns, Body: doc("imagehub-rate-limit", "mesh: envoy")})
		if _, _, err := c.app.Start(t.Context()); err != nil {
			t.Fatal(err)
		}
		said := strings.Join(texts(c.ok(c.imagehub(op("meshery-filters")))), "\n")
		if strings.Count(said, problem.HubLeft.Code) != 2 || strings.Count(said, problem.LimiterLeft.Code) != 2 {
			t.Errorf("%s", said)
		}
		says(t, c.ok(c.imagehub(op("meshery-filters"), deletion)), "ServiceDefaults/"+c.ns+"/imagehub-api updated", "service imagehub-api removed",
			"Image Hub inside the adapter is stopped", "Image Hub and its rate limit removed")
		if entry, chain := other.entry("service-defaults", "imagehub-api"), c.order("default"); entry != "" || chain != "" || c.app.Addr() != "" {
			t.Errorf("there are still %s and %s", entry, chain)
		}
		if names := c.names(); len(names) > 0 || len(c.inventories()) > 0 {
			t.Errorf("%v and %d inventories are left", names, len(c.inventories()))
		}
	})

	t.Run("on Consul there is no gateway of Istio's", func(t *testing.T) {
		istio := publicHub
		istio.Gateway = operation.HubIstio
		c := hubRig(t, s, istio)
		if e := c.fails(problem.HubGateway, c.imagehub()); !strings.Contains(e.Details, "cannot be istio") {
			t.Errorf("%s", e.Details)
		}
	})
}
