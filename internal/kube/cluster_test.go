package kube

import (
	"context"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/golang-jwt/jwt/v5"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"github.com/meshery/meshery-filters/build/controlplanes/k8stest"
	"github.com/meshery/meshery-filters/internal/plan"
	"github.com/meshery/meshery-filters/internal/problem"
)

func pemOf(der []byte) []byte { return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}) }

func TestAMissingRightIsNamedBeforeAnythingIsWritten(t *testing.T) {
	ns := namespace(t)
	plugins := func(verbs ...string) map[string]any { return rule("extensions.istio.io", "wasmplugins", verbs...) }
	apply(t, base(t), planOf(ns, "a"))
	// What somebody has changed since has to be read.
	must(t, "PATCH", pluginPath(ns, "a"), map[string]any{"metadata": map[string]any{"annotations": map[string]any{"somebody": "was here"}}})
	was := there(t, pluginPath(ns, "a"))
	for _, c := range []struct {
		name      string
		inventory bool
		rules     []map[string]any
		plan      plan.Plan
		says      []string
	}{
		{"no right at all", false, nil, planOf(ns, "a"), []string{"verb get", "resource configmaps", "namespace " + defaultNamespace}},
		{"no patch", true, []map[string]any{plugins("get")}, planOf(ns, "a"), []string{"verb patch", "resource wasmplugins.extensions.istio.io", "namespace " + ns}},
		{"no create", true, []map[string]any{plugins("get", "patch", "delete")}, planOf(ns, "a", "b"), []string{"verb create", "resource wasmplugins.extensions.istio.io", "namespace " + ns}},
		{"no get", true, []map[string]any{plugins("patch", "create", "delete")}, planOf(ns, "a"), []string{"verb get", "resource wasmplugins.extensions.istio.io", "namespace " + ns}},
		{"no delete", true, []map[string]any{plugins("get", "patch", "create")}, planOf(ns, "b"), []string{"verb delete", "resource wasmplugins.extensions.istio.io", "namespace " + ns}},
	} {
		t.Run(c.name, func(t *testing.T) {
			cl := cluster(t, server.Kubeconfig(account(t, ns, c.inventory, c.rules...)), Options{})
			_, err := applies(t.Context(), cl, c.plan)
			fails(t, err, problem.RightMissing, c.says...)
			same(t, "the object", there(t, pluginPath(ns, "a")), was)
			if there(t, pluginPath(ns, "b")) != nil {
				t.Error("something was written")
			}
		})
	}
}

func TestCredentialsThatAreNoMoreAreTold(t *testing.T) {
	ns := namespace(t)
	must(t, "POST", "/api/v1/namespaces/"+ns+"/serviceaccounts", map[string]any{"metadata": map[string]any{"name": "old"}})
	account := must(t, "GET", "/api/v1/namespaces/"+ns+"/serviceaccounts/old", nil)
	sign := func(expires time.Time) string {
		t.Helper()
		text, err := jwt.NewWithClaims(jwt.SigningMethodES256, jwt.MapClaims{
			"iss": k8stest.Issuer, "aud": []string{k8stest.Issuer}, "sub": "system:serviceaccount:" + ns + ":old",
			"exp": expires.Unix(), "iat": time.Now().Add(-2 * time.Hour).Unix(), "nbf": time.Now().Add(-2 * time.Hour).Unix(),
			"kubernetes.io": map[string]any{"namespace": ns, "serviceaccount": map[string]any{"name": "old", "uid": uid(account)}},
		}).SignedString(server.ServiceAccountKey)
		if err != nil {
			t.Fatal(err)
		}
		return text
	}
	lifetime := time.Hour
	valid, expired := sign(time.Now().Add(lifetime)), sign(time.Now().Add(-time.Hour))
	// The same token with a later expiry is known, so it is the expiry that is refused.
	fails(t, ping(t.Context(), cluster(t, server.Kubeconfig(valid), Options{})), problem.RightMissing)
	for name, token := range map[string]string{"expired": expired, "made up": "nobody-has-this-one"} {
		err := ping(t.Context(), cluster(t, server.Kubeconfig(token), Options{}))
		if !errors.Is(err, problem.ClusterUnauthenticated) || strings.Contains(err.Error(), token) {
			t.Errorf("%s: %v", name, err)
		}
	}
	must(t, "DELETE", "/api/v1/namespaces/"+ns+"/serviceaccounts/old", nil)
	eventually(t, func() bool { // with another token each time, since the server remembers for a while which were good
		lifetime += time.Second
		return errors.Is(ping(t.Context(), cluster(t, server.Kubeconfig(sign(time.Now().Add(lifetime))), Options{})), problem.ClusterUnauthenticated)
	})
}

func TestANamespaceThatIsMissingOrBeingDeletedTakesNothingNewAndLetsGoOfWhatItHas(t *testing.T) {
	ns := namespace(t)
	c := base(t)
	_, err := applies(t.Context(), c, planOf("nowhere", "a"))
	fails(t, err, problem.NamespaceUnavailable, "there is no namespace nowhere")

	apply(t, c, planOf(ns, "a", "b"))
	must(t, "DELETE", "/api/v1/namespaces/"+ns, nil) // it stays on its way out: nothing here finishes it
	_, err = applies(t.Context(), c, planOf(ns, "a", "b", "d"))
	fails(t, err, problem.NamespaceUnavailable, "namespace "+ns+" is being deleted")
	if there(t, pluginPath(ns, "d")) != nil {
		t.Error("something was written")
	}
	same(t, "removal of one", apply(t, c, planOf(ns, "b"))[1], plan.Change{Subject: "WasmPlugin/" + ns + "/a", Action: plan.Deleted})
	holds(t, ns, "b")

	// And when it is gone, with all that was in it.
	must(t, "DELETE", pluginPath(ns, "b"), nil)
	o := must(t, "GET", "/api/v1/namespaces/"+ns, nil)
	o["spec"] = map[string]any{"finalizers": []any{}}
	must(t, "PUT", "/api/v1/namespaces/"+ns+"/finalize", o)
	if there(t, "/api/v1/namespaces/"+ns) != nil {
		t.Fatal("the namespace is still there")
	}
	if changes := apply(t, c, planOf(ns)); len(changes) > 0 || holding(t, ns) != nil {
		t.Errorf("removal: %v", changes)
	}
}

func TestTheNamespaceOfTheInventoriesIsMadeWhenItIsNotThere(t *testing.T) {
	ns := namespace(t)
	name := unique("inventories")
	c := cluster(t, server.Kubeconfig(server.Token(k8stest.Admin)), Options{Namespace: name})
	apply(t, c, planOf(ns, "a"))
	if there(t, "/api/v1/namespaces/"+name+"/configmaps/"+inventoryName("istio", target(ns))) == nil {
		t.Error("there is no inventory")
	}
	// Who may not make one is told what is missing, before anything else is written.
	ns = namespace(t)
	config := rule("", "configmaps", "get", "create", "update")
	c = cluster(t, server.Kubeconfig(account(t, ns, false, config, rule("extensions.istio.io", "wasmplugins", "get", "patch", "create"))), Options{Namespace: unique("inventories")})
	_, err := applies(t.Context(), c, planOf(ns, "a"))
	fails(t, err, problem.RightMissing, "verb create", "resource namespaces", "the whole cluster")
	if there(t, pluginPath(ns, "a")) != nil {
		t.Error("something was written")
	}
}

// application may do what a sample application needs.
func application(t *testing.T, ns string) *Cluster {
	t.Helper()
	return cluster(t, server.Kubeconfig(account(t, ns, true, rule("", "namespaces", "get", "create", "patch"),
		rule("apps", "deployments", "get", "create", "patch", "delete", "watch"), rule("", "serviceaccounts", "get", "create", "patch", "delete"))), Options{})
}

func deployment(ns, name string) plan.Object {
	labels := map[string]any{"app": name}
	return plan.Object{Content: map[string]any{"apiVersion": "apps/v1", "kind": "Deployment", "metadata": map[string]any{"namespace": ns, "name": name},
		"spec": map[string]any{"replicas": 2, "selector": map[string]any{"matchLabels": labels}, "template": map[string]any{
			"metadata": map[string]any{"labels": labels}, "spec": map[string]any{"containers": []any{map[string]any{"name": "c", "image": "example/c:1"}}}}}}}
}

func simple(kind, ns, name string) plan.Object {
	meta := map[string]any{"name": name}
	if ns != "" {
		meta["namespace"] = ns
	}
	return plan.Object{Content: map[string]any{"apiVersion": "v1", "kind": kind, "metadata": meta}}
}

func deploymentPath(ns, name string) string {
	return "/apis/apps/v1/namespaces/" + ns + "/deployments/" + name
}

// report says as a controller does how far a Deployment is.
func report(t *testing.T, ns, name string, available int) {
	t.Helper()
	o := there(t, deploymentPath(ns, name))
	must(t, "PATCH", deploymentPath(ns, name)+"/status", map[string]any{"status": map[string]any{
		"observedGeneration": metadataOf(o)["generation"], "replicas": 2, "updatedReplicas": 2, "availableReplicas": available, "readyReplicas": available,
		"conditions": []any{map[string]any{"type": "Progressing", "status": "False", "reason": "Slow", "message": "waiting for \x1b nodes"}}}})
}

func TestKindsComeInTheirOrderWhatTakesTimeIsWaitedForAndANamespaceStays(t *testing.T) {
	home, made := namespace(t), unique("made")
	c := application(t, home)
	r := record(c)
	p := plan.Plan{Chain: chainOf(home), Version: "1", Objects: []plan.Object{
		deployment(made, "one"), deployment(made, "two"), simple("ServiceAccount", made, "one"), simple("Namespace", "", made)}}

	type result struct {
		changes []plan.Change
		err     error
	}
	done := make(chan result, 1)
	go func() {
		changes, err := applies(t.Context(), c, p)
		done <- result{changes, err}
	}()
	eventually(t, func() bool {
		return there(t, deploymentPath(made, "two")) != nil && there(t, deploymentPath(made, "one")) != nil
	})
	report(t, made, "one", 2)
	report(t, made, "two", 1)
	report(t, made, "two", 2)
	got := <-done
	if got.err != nil {
		t.Fatal(got.err)
	}
	same(t, "changes", got.changes, changed(strings.NewReplacer("NS", made).Replace("Namespace/NS ServiceAccount/NS/one Deployment/NS/one Deployment/NS/two"), plan.Created))
	var kinds []string
	for _, line := range r.writes() {
		if parts := strings.Split(line, "/"); !strings.Contains(line, "configmaps") {
			kinds = append(kinds, parts[len(parts)-2])
		}
	}
	same(t, "order", kinds, []string{"namespaces", "serviceaccounts", "deployments", "deployments"})
	if n := len(r.requests()); n > 3*4+4 {
		t.Errorf("%d requests: %q", n, r.requests())
	}

	r = record(c)
	same(t, "again", apply(t, c, p), changed(strings.NewReplacer("NS", made).Replace("Namespace/NS ServiceAccount/NS/one Deployment/NS/one Deployment/NS/two"), plan.Unchanged))
	if len(r.writes()) > 0 {
		t.Errorf("unchanged: %q", r.writes())
	}

	// One that is not ready in time is told with what it waits for, and is known to the inventory.
	report(t, made, "two", 1)
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
	defer cancel()
	_, err := applies(ctx, c, p)
	fails(t, err, problem.NotReady, "Deployment/"+made+"/two", "1 of 2 replicas are available", "waiting for   nodes")

	// Somebody may have put something into the namespace, so it stays.
	changes := apply(t, c, plan.Plan{Chain: chainOf(home)})
	same(t, "removal", changes[len(changes)-1], plan.Change{Subject: "Namespace/" + made, Action: plan.Kept})
	if there(t, "/api/v1/namespaces/"+made) == nil || there(t, deploymentPath(made, "one")) != nil || there(t, inventoryPath(home)) != nil {
		t.Error("the namespace went, or something else stayed")
	}
}

func TestAnObjectThatIsDeletedWhileItIsWaitedForIsTold(t *testing.T) {
	ns := namespace(t)
	c := application(t, ns)
	failed := make(chan error, 1)
	go func() {
		_, err := applies(t.Context(), c, plan.Plan{Chain: chainOf(ns), Objects: []plan.Object{deployment(ns, "one")}})
		failed <- err
	}()
	eventually(t, func() bool { return there(t, deploymentPath(ns, "one")) != nil })
	must(t, "DELETE", deploymentPath(ns, "one")+query("propagationPolicy", "Background"), nil)
	fails(t, <-failed, problem.NotReady, "was deleted")
}

func eventually(t *testing.T, f func() bool) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); !f(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("it does not happen")
		}
	}
}

// occupy has the API server put off everything that the ServiceAccount of a token asks, and gives what ends that: the
// account has no more than one request at a time, and one of its requests waits for a webhook.
func occupy(t *testing.T, ns, token string) (end func()) {
	t.Helper()
	claims := jwt.MapClaims{}
	if _, _, err := jwt.NewParser().ParseUnverified(token, claims); err != nil {
		t.Fatal(err)
	}
	subject, _ := claims.GetSubject() // system:serviceaccount:NAMESPACE:NAME
	account := subject[strings.LastIndex(subject, ":")+1:]

	arrived, released := make(chan struct{}, 256), make(chan struct{})
	webhook := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var review struct {
			Request struct {
				UID string `json:"uid"`
			} `json:"request"`
		}
		if err := json.NewDecoder(r.Body).Decode(&review); err != nil {
			t.Error(err)
		}
		arrived <- struct{}{}
		<-released
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(map[string]any{"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview",
			"response": map[string]any{"uid": review.Request.UID, "allowed": true}})
	}))
	name := ns + "-" + account
	const hooks = "/apis/admissionregistration.k8s.io/v1/validatingwebhookconfigurations"
	must(t, "POST", hooks, map[string]any{"metadata": map[string]any{"name": name}, "webhooks": []any{map[string]any{
		"name": "slow.example.com", "sideEffects": "None", "admissionReviewVersions": []any{"v1"}, "failurePolicy": "Ignore", "timeoutSeconds": 30,
		"clientConfig":      map[string]any{"url": webhook.URL, "caBundle": pemOf(webhook.Certificate().Raw)},
		"namespaceSelector": map[string]any{"matchLabels": map[string]any{"kubernetes.io/metadata.name": ns}},
		"rules":             []any{map[string]any{"apiGroups": []any{""}, "apiVersions": []any{"v1"}, "operations": []any{"CREATE"}, "resources": []any{"configmaps"}}}}}})
	const group = "/apis/flowcontrol.apiserver.k8s.io/v1"
	must(t, "POST", group+"/prioritylevelconfigurations", map[string]any{"metadata": map[string]any{"name": name},
		"spec": map[string]any{"type": "Limited", "limited": map[string]any{"nominalConcurrencyShares": 0, "lendablePercent": 0,
			"borrowingLimitPercent": 0, "limitResponse": map[string]any{"type": "Reject"}}}})
	must(t, "POST", group+"/flowschemas", map[string]any{"metadata": map[string]any{"name": name}, "spec": map[string]any{
		"matchingPrecedence": 3, "priorityLevelConfiguration": map[string]any{"name": name}, "rules": []any{map[string]any{
			"subjects":      []any{map[string]any{"kind": "ServiceAccount", "serviceAccount": map[string]any{"namespace": ns, "name": account}}},
			"resourceRules": []any{map[string]any{"verbs": []any{"*"}, "apiGroups": []any{"*"}, "resources": []any{"*"}, "clusterScope": true, "namespaces": []any{"*"}}}}}}})

	// Both take effect a moment after they were made, so requests are made until one waits and others are put off.
	var waiting sync.WaitGroup
	eventually(t, func() bool {
		waiting.Go(func() {
			_, _, _ = askAs(token, "POST", "/api/v1/namespaces/"+ns+"/configmaps", map[string]any{"metadata": map[string]any{"generateName": "slow-"}})
		})
		select {
		case <-arrived:
		case <-time.After(300 * time.Millisecond):
			return false
		}
		code, _, _ := askAs(token, "GET", "/api/v1/namespaces/"+defaultNamespace+"/configmaps/none", nil)
		return code == 429
	})
	var once sync.Once
	end = func() {
		once.Do(func() {
			close(released)
			waiting.Wait()
			must(t, "DELETE", hooks+"/"+name, nil)
			must(t, "DELETE", group+"/flowschemas/"+name, nil)
			must(t, "DELETE", group+"/prioritylevelconfigurations/"+name, nil)
			webhook.Close()
		})
	}
	t.Cleanup(end)
	return end
}

func TestAServerThatAsksForPatienceGetsItWithinBounds(t *testing.T) {
	ns := namespace(t)
	rules := []map[string]any{rule("extensions.istio.io", "wasmplugins", "get", "patch", "create", "delete"), rule("", "configmaps", "create")}
	busy := account(t, ns, true, rules...)
	end := occupy(t, ns, busy)
	c := cluster(t, server.Kubeconfig(busy), Options{})
	r := record(c)
	_, err := applies(t.Context(), c, planOf(ns, "a"))
	fails(t, err, problem.ClusterBusy, fmt.Sprintf("for the %d. time", maxAttempts))
	if n := len(r.requests()); n != maxAttempts {
		t.Errorf("%d requests: %q", n, r.requests())
	}

	c = cluster(t, server.Kubeconfig(busy), Options{})
	r = record(c)
	r.before = func(n int, _ *http.Request) error {
		if n == 3 { // the third try meets a server that has time again
			end()
		}
		return nil
	}
	start := time.Now()
	apply(t, c, planOf(ns, "a"))
	holds(t, ns, "a")
	if waited := time.Since(start); waited < 2*time.Second {
		t.Errorf("it was asked to wait a second twice, and waited %s", waited)
	}
}

func TestTwentyClustersAtOnceDoNotStopOrHideOneAnother(t *testing.T) {
	const n = 20
	namespace(t) // skips with -short
	type one struct {
		ns      string
		cluster *Cluster
		changes []plan.Change
		err     error
	}
	all := make([]one, n)
	for i := range all {
		ns := namespace(t)
		rules := []map[string]any{rule("extensions.istio.io", "wasmplugins", "get", "patch", "create", "delete")}
		kubeconfig := server.Kubeconfig(account(t, ns, true, rules...))
		switch i {
		case 3:
			kubeconfig = server.Kubeconfig("nobody-has-this-one")
		case 7:
			kubeconfig = server.Kubeconfig(account(t, ns, true))
		case 11:
			kubeconfig = []byte(strings.Replace(string(kubeconfig), server.URL, "https://127.0.0.1:1", 1))
		}
		all[i] = one{ns: ns, cluster: cluster(t, kubeconfig, Options{})}
	}
	var wait sync.WaitGroup
	for i := range all {
		wait.Go(func() { all[i].changes, all[i].err = applies(t.Context(), all[i].cluster, planOf(all[i].ns, "a", "b")) })
	}
	wait.Wait()
	bad := map[int]*problem.Kind{3: problem.ClusterUnauthenticated, 7: problem.RightMissing, 11: problem.ClusterUnreachable}
	for i, o := range all {
		if kind := bad[i]; kind != nil {
			if !errors.Is(o.err, kind) {
				t.Errorf("cluster %d: %v", i, o.err)
			}
			continue
		}
		if o.err != nil || len(o.changes) != 2 {
			t.Errorf("cluster %d: %v %v", i, o.changes, o.err)
			continue
		}
		holds(t, o.ns, "a", "b")
	}
}

func TestInsideOfAClusterThePodsServiceAccountIsUsed(t *testing.T) {
	ns := namespace(t)
	dir := t.TempDir()
	address, err := url.Parse(server.URL)
	if err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{"token": token(t, "meshery-filters", "meshery-filters"), "namespace": "meshery-filters\n", "ca.crt": string(server.CA)} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	c, err := own(dir, address.Hostname(), address.Port(), Options{Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	apply(t, c, planOf(ns, "a"))
	holds(t, ns, "a")
	if _, err := own(t.TempDir(), address.Hostname(), address.Port(), Options{}); !errors.Is(err, problem.KubeconfigRefused) {
		t.Errorf("without a token: %v", err)
	}
	if _, err := own(dir, "", "", Options{}); !errors.Is(err, problem.KubeconfigRefused) {
		t.Errorf("outside of a cluster: %v", err)
	}
}

func TestTheRolesGiveWhatIsNeededAndNoMore(t *testing.T) {
	ns := namespace(t)
	text := token(t, "meshery-filters", "meshery-filters")
	may := func(verb, group, resource, namespace string) bool {
		t.Helper()
		resource, sub, _ := strings.Cut(resource, "/")
		code, o, err := askAs(text, "POST", "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews", map[string]any{"spec": map[string]any{
			"resourceAttributes": map[string]any{"verb": verb, "group": group, "resource": resource, "subresource": sub, "namespace": namespace}}})
		if err != nil || code != 201 {
			t.Fatalf("%d %v %v", code, o, err)
		}
		return descend(o, []string{"status"})["allowed"] == true
	}
	verbs := []string{"get", "list", "watch", "create", "update", "patch", "delete", "deletecollection"}
	for _, c := range []struct{ group, resource, namespace, verbs string }{
		{"extensions.istio.io", "wasmplugins", ns, "get list create patch delete"},
		{"extensions.istio.io", "trafficextensions", ns, "get list create patch delete"},
		{"networking.istio.io", "envoyfilters", ns, "get list create patch delete"},
		{"networking.istio.io", "gateways", ns, "get"},
		{"networking.istio.io", "virtualservices", ns, ""},
		{"gateway.networking.k8s.io", "gateways", ns, "get"},
		{"", "services", ns, "get"},
		{"", "configmaps", defaultNamespace, "get list create update delete"},
		{"", "configmaps", ns, ""},
		{"", "pods", ns, "get list"},
		{"", "pods/portforward", ns, "get create"},
		{"", "pods/exec", ns, ""},
		{"", "secrets", ns, ""},
		{"", "secrets", defaultNamespace, ""},
		{"", "namespaces", "", "get"},
		{"apps", "deployments", ns, "get"},
		{"apps", "statefulsets", ns, "get"},
		{"apps", "daemonsets", ns, "get"},
		{"apps", "replicasets", ns, ""},
		{"rbac.authorization.k8s.io", "clusterroles", "", ""},
	} {
		for _, verb := range verbs {
			if got, want := may(verb, c.group, c.resource, c.namespace), strings.Contains(" "+c.verbs+" ", " "+verb+" "); got != want {
				t.Errorf("%s %s.%s in %q: allowed %v", verb, c.resource, c.group, c.namespace, got)
			}
		}
	}
}

func TestAMeshReadsWhatTheClusterServesAndHolds(t *testing.T) {
	ns := namespace(t)
	c := base(t)
	must(t, "POST", "/api/v1/namespaces/"+ns+"/services", map[string]any{"metadata": map[string]any{"name": "web"},
		"spec": map[string]any{"selector": map[string]any{"app": "web"}, "ports": []any{map[string]any{"port": 80}}}})
	service := plan.Ref{GroupKind: schema.GroupKind{Kind: "Service"}, Namespace: ns, Name: "web"}
	home := plan.Ref{GroupKind: schema.GroupKind{Kind: "Namespace"}, Name: ns}
	plugin := schema.GroupKind{Group: "extensions.istio.io", Kind: "WasmPlugin"}
	reads := plan.Reads{
		Kinds: []schema.GroupKind{{Group: "extensions.istio.io", Kind: "TrafficExtension"}, plugin, {Group: "nobody.example", Kind: "Thing"}},
		Objects: []plan.Ref{service, home, {GroupKind: schema.GroupKind{Group: "apps", Kind: "Deployment"}, Namespace: ns, Name: "absent"},
			{GroupKind: schema.GroupKind{Group: "gateway.networking.k8s.io", Kind: "Gateway"}, Namespace: ns, Name: "web"},
			{GroupKind: schema.GroupKind{Kind: "Service"}, Namespace: ns, Name: "../../secrets"}}}
	got, err := c.Read(t.Context(), reads)
	if err != nil {
		t.Fatal(err)
	}
	if len(got.Kinds) != 1 || len(got.Objects) != 2 {
		t.Errorf("%d kinds and %d objects", len(got.Kinds), len(got.Objects))
	}
	k, ok := got.Kind(plugin)
	if !ok || k.Version != "v1alpha1" || !k.Has("spec.selector.matchLabels") || k.Has("spec.match") || !k.Takes("spec.phase", "AUTHZ") {
		t.Errorf("%v %v", k.GroupVersionKind, k.Fields)
	}
	o, ok := got.Object(service)
	if !ok {
		t.Fatal("the Service is not there")
	}
	same(t, "selector", descend(o.Content, []string{"spec"})["selector"], map[string]any{"app": "web"})
	if _, ok := got.Object(home); !ok {
		t.Error("the Namespace is not there")
	}
	// One that there is only one of is found wherever it is.
	must(t, "POST", defaultsPath(ns, ""), map[string]any{"apiVersion": "consul.hashicorp.com/v1alpha1", "kind": "ServiceDefaults",
		"metadata": map[string]any{"namespace": ns, "name": "only-in-" + ns}, "spec": map[string]any{"protocol": "grpc"}})
	anywhere := plan.Ref{GroupKind: serviceDefaults.GroupKind(), Name: "only-in-" + ns}
	got, err = c.Read(t.Context(), plan.Reads{Objects: []plan.Ref{anywhere, {GroupKind: anywhere.GroupKind, Name: "absent"}}})
	if err != nil || len(got.Objects) != 1 {
		t.Fatalf("%v, %v", got.Objects, err)
	}
	o, ok = got.Object(anywhere)
	if !ok || descend(o.Content, []string{"spec"})["protocol"] != "grpc" || o.String() != "ServiceDefaults/"+ns+"/only-in-"+ns {
		t.Errorf("%v", o.Content)
	}
	// What is served is asked for once.
	r := record(c)
	if _, err := c.Read(t.Context(), plan.Reads{Kinds: []schema.GroupKind{plugin}, Objects: []plan.Ref{service}}); err != nil || len(r.requests()) != 1 {
		t.Errorf("%v: %q", err, r.requests())
	}
	_, err = c.Read(t.Context(), plan.Reads{Objects: []plan.Ref{{GroupKind: schema.GroupKind{Kind: "Secret"}, Namespace: ns, Name: "x"}}})
	fails(t, err, problem.RightMissing, "verb get", "resource secrets", "namespace "+ns)

	// A kind that comes later is seen after a while.
	c.memory = 10 * time.Millisecond
	definition := documents(strings.NewReplacer("wasmplugin", "latecomer", "WasmPlugin", "LateComer").Replace(read(t, "testdata/crds.yaml")))[0]
	must(t, "POST", collection(definition), definition)
	late := schema.GroupKind{Group: "extensions.istio.io", Kind: "LateComer"}
	eventually(t, func() bool {
		got, err := c.Read(t.Context(), plan.Reads{Kinds: []schema.GroupKind{late}})
		if err != nil { // its schema may be published later still, which is waited for
			t.Fatal(err)
		}
		k, ok := got.Kind(late)
		return ok && k.Has("spec.url")
	})
}

func read(t *testing.T, name string) string {
	t.Helper()
	text, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

func TestWhatIsAllowedIsUsed(t *testing.T) {
	namespace(t) // skips with -short
	dir := t.TempDir()
	file := func(name, text string, mode os.FileMode) string {
		t.Helper()
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), mode); err != nil {
			t.Fatal(err)
		}
		return path
	}
	admin := server.Token(k8stest.Admin)
	authority := file("ca.crt", string(server.CA), 0o600)
	program := file("credentials", "#!/bin/sh\nprintf '{\"apiVersion\":\"client.authentication.k8s.io/v1\",\"kind\":\"ExecCredential\",\"status\":{\"token\":\"%s\"}}' "+admin, 0o700)
	at := fmt.Sprintf("server: %q, certificate-authority: %q", server.URL, authority)
	for name, text := range map[string][]byte{
		"files":           kubeconfig(at, "tokenFile: "+file("token", admin, 0o600)),
		"a program":       kubeconfig(at, "exec: {apiVersion: client.authentication.k8s.io/v1, interactiveMode: IfAvailable, command: "+program+"}"),
		"no verification": kubeconfig(fmt.Sprintf("server: %q, insecure-skip-tls-verify: true", server.URL), "token: "+admin),
	} {
		if err := ping(t.Context(), cluster(t, text, Options{Allow: Allow{Exec: true, Files: true, Insecure: true}})); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}
