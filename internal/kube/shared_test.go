package kube

import (
	"fmt"
	"net/http"
	"strings"
	"testing"

	"k8s.io/apimachinery/pkg/runtime/schema"

	"github.com/meshery/meshery-filters/internal/plan"
	"github.com/meshery/meshery-filters/internal/problem"
)

var serviceDefaults = schema.GroupVersionKind{Group: "consul.hashicorp.com", Version: "v1alpha1", Kind: "ServiceDefaults"}

func defaultsPath(ns, name string) string {
	return "/apis/consul.hashicorp.com/v1alpha1/namespaces/" + ns + "/servicedefaults/" + name
}

// userDefaults makes a ServiceDefaults of the user's.
func userDefaults(t *testing.T, ns string, spec map[string]any) map[string]any {
	t.Helper()
	return must(t, "POST", defaultsPath(ns, ""), map[string]any{"apiVersion": "consul.hashicorp.com/v1alpha1", "kind": "ServiceDefaults",
		"metadata": map[string]any{"namespace": ns, "name": "api", "annotations": map[string]any{"team": "shop"}}, "spec": spec})
}

// sharing is a cluster of somebody who may change ServiceDefaults, and neither make nor delete them.
func sharing(t *testing.T, ns string) *Cluster {
	t.Helper()
	return cluster(t, server.Kubeconfig(account(t, ns, true, rule("consul.hashicorp.com", "servicedefaults", "get", "update"))), Options{})
}

func extensionOf(name string) map[string]any {
	return map[string]any{"name": "builtin/wasm", "required": true, "arguments": map[string]any{
		"protocol": "http", "pluginConfig": map[string]any{"name": name, "limit": int64(3), "ratio": 0.5}}}
}

// sharedPlan is what a mesh makes of the user's object: its extensions, and after them ours.
func sharedPlan(t *testing.T, tg *Target, ns string, names ...string) plan.Plan {
	t.Helper()
	o, err := tg.Shared(t.Context(), serviceDefaults, ns, "api")
	if err != nil || o == nil {
		t.Fatalf("read the user's object: %v %v", o, err)
	}
	if o["spec"] == nil {
		o["spec"] = map[string]any{}
	}
	spec := descend(o, []string{"spec"})
	list, _ := spec["envoyExtensions"].([]any)
	list = append([]any{}, list...)
	for _, name := range names {
		list = append(list, extensionOf(name))
	}
	spec["envoyExtensions"] = list
	spec["protocol"] = "http"
	return plan.Plan{Chain: chainOf(ns, names...), Version: strings.Join(names, " "), Objects: []plan.Object{{Content: o, Shared: true}}}
}

// share reads a target and the user's object, and applies what a mesh makes of that.
func share(t *testing.T, c *Cluster, ns string, names ...string) []plan.Change {
	t.Helper()
	tg := open(t, c, target(ns))
	changes, err := tg.applies(t.Context(), sharedPlan(t, tg, ns, names...))
	if err != nil {
		t.Fatal(err)
	}
	return changes
}

func extensions(t *testing.T, ns string) string {
	t.Helper()
	list, _ := descend(there(t, defaultsPath(ns, "api")), []string{"spec"})["envoyExtensions"].([]any)
	var names []string
	for _, e := range list {
		names = append(names, fmt.Sprint(descend(e.(map[string]any), []string{"arguments", "pluginConfig"})["name"]))
	}
	return strings.Join(names, " ")
}

func TestASharedObjectGetsOursAndGetsBackExactlyWhatItHad(t *testing.T) {
	for name, spec := range map[string]map[string]any{
		"no spec":                nil,
		"nothing there":          {"mutualTLSMode": "strict"},
		"another protocol":       {"protocol": "tcp"},
		"the same protocol":      {"protocol": "http", "envoyExtensions": []any{}},
		"extensions of its own":  {"envoyExtensions": []any{extensionOf("theirs"), extensionOf("twice"), extensionOf("twice")}},
		"an extension like ours": {"envoyExtensions": []any{extensionOf("b")}},
	} {
		t.Run(name, func(t *testing.T) {
			ns := namespace(t)
			before := userDefaults(t, ns, spec)
			theirs := extensions(t, ns)
			c := sharing(t, ns)

			subject := "ServiceDefaults/" + ns + "/api"
			same(t, "first", share(t, c, ns, "a", "b"), changed(subject, plan.Updated))
			if got, want := extensions(t, ns), strings.TrimSpace(theirs+" a b"); got != want {
				t.Errorf("extensions %q, want %q", got, want)
			}
			if data := fmt.Sprint(holding(t, ns)); strings.Contains(data, "builtin/wasm") {
				t.Errorf("the inventory has the configuration: %s", data)
			}
			v := version(there(t, defaultsPath(ns, "api")))
			same(t, "again", share(t, c, ns, "a", "b"), changed(subject, plan.Unchanged))
			if version(there(t, defaultsPath(ns, "api"))) != v {
				t.Error("what did not change was written")
			}
			share(t, c, ns, "b", "c")
			if got, want := extensions(t, ns), strings.TrimSpace(theirs+" b c"); got != want {
				t.Errorf("extensions %q, want %q", got, want)
			}
			same(t, "removal", apply(t, c, planOf(ns)), changed(subject, plan.Updated))
			same(t, "the user's object", essence(there(t, defaultsPath(ns, "api"))), essence(before))
			if holding(t, ns) != nil {
				t.Error("the inventory is still there")
			}
		})
	}
}

func TestRequestsForASharedObjectAreAtMostThreeAndFour(t *testing.T) {
	ns := namespace(t)
	userDefaults(t, ns, map[string]any{"envoyExtensions": []any{extensionOf("theirs")}})
	for _, names := range [][]string{{"a"}, {"a", "b"}, {"a", "b"}} {
		c := sharing(t, ns)
		r := record(c)
		share(t, c, ns, names...)
		if n := len(r.requests()); n > 3+4 {
			t.Errorf("%d requests: %q", n, r.requests())
		}
	}
	c := sharing(t, ns)
	r := record(c)
	apply(t, c, planOf(ns))
	if n := len(r.requests()); n > 3+4 {
		t.Errorf("%d requests: %q", n, r.requests())
	}
}

func TestWhatTheUserChangesInASharedObjectMeanwhileStays(t *testing.T) {
	ns := namespace(t)
	userDefaults(t, ns, map[string]any{"envoyExtensions": []any{extensionOf("theirs")}})
	c := sharing(t, ns)
	share(t, c, ns, "a")
	// The user adds an extension before ours and after it, changes what we had set, and takes a field away.
	must(t, "PATCH", defaultsPath(ns, "api"), map[string]any{
		"metadata": map[string]any{"annotations": map[string]any{"team": nil, "owner": "bob"}},
		"spec":     map[string]any{"protocol": "grpc", "envoyExtensions": []any{extensionOf("new"), extensionOf("theirs"), extensionOf("a"), extensionOf("last")}}})
	apply(t, c, planOf(ns))
	if got := extensions(t, ns); got != "new theirs last" {
		t.Errorf("extensions %q", got)
	}
	o := there(t, defaultsPath(ns, "api"))
	same(t, "annotations", metadataOf(o)["annotations"], map[string]any{"owner": "bob"})
	same(t, "protocol", descend(o, []string{"spec"})["protocol"], "grpc")
}

func TestAUserWhoWritesASharedObjectAtTheSameMomentIsNotOverwritten(t *testing.T) {
	ns := namespace(t)
	userDefaults(t, ns, map[string]any{"envoyExtensions": []any{extensionOf("theirs")}})
	c := sharing(t, ns)
	tg := open(t, c, target(ns))
	p := sharedPlan(t, tg, ns, "a")
	r := record(c)
	puts := 0
	r.before = func(_ int, req *http.Request) error { // just before each of our first three writes, the dry run among them
		if req.Method == http.MethodPut && strings.Contains(req.URL.Path, "servicedefaults") && puts < 3 {
			puts++
			var list []any
			for _, name := range strings.Fields(extensions(t, ns)) {
				list = append(list, extensionOf(name))
			}
			must(t, "PATCH", defaultsPath(ns, "api"), map[string]any{"spec": map[string]any{"envoyExtensions": append(list, extensionOf(fmt.Sprint("late", puts)))}})
		}
		return nil
	}
	if _, err := tg.applies(t.Context(), p); err != nil {
		t.Fatal(err)
	}
	if got := extensions(t, ns); puts != 3 || got != "theirs a late1 late2 late3" {
		t.Errorf("extensions %q after %d writes", got, puts)
	}
	apply(t, c, planOf(ns))
	if got := extensions(t, ns); got != "theirs late1 late2 late3" {
		t.Errorf("extensions %q", got)
	}

	// Somebody who never stops is given up on, and what there is stays theirs.
	r.before = func(n int, req *http.Request) error {
		if req.Method == http.MethodPut && strings.Contains(req.URL.Path, "servicedefaults") {
			must(t, "PATCH", defaultsPath(ns, "api"), map[string]any{"spec": map[string]any{"mutualTLSMode": fmt.Sprint(n)}})
		}
		return nil
	}
	tg = open(t, c, target(ns))
	_, err := tg.applies(t.Context(), sharedPlan(t, tg, ns, "a"))
	fails(t, err, problem.ChainChanged, "ServiceDefaults/"+ns+"/api")
}

func TestASharedObjectThatIsGoneIsNeitherMadeNorMissed(t *testing.T) {
	ns := namespace(t)
	c := sharing(t, ns)
	tg := open(t, c, target(ns))
	if o, err := tg.Shared(t.Context(), serviceDefaults, ns, "api"); o != nil || err != nil {
		t.Errorf("%v %v", o, err)
	}
	userDefaults(t, ns, map[string]any{})
	p := sharedPlan(t, tg, ns, "a")
	must(t, "DELETE", defaultsPath(ns, "api"), nil)
	_, err := tg.applies(t.Context(), p)
	fails(t, err, problem.ChainChanged, "not there any more")

	userDefaults(t, ns, map[string]any{})
	share(t, c, ns, "a")
	must(t, "DELETE", defaultsPath(ns, "api"), nil)
	if changes := apply(t, c, planOf(ns)); len(changes) > 0 || holding(t, ns) != nil {
		t.Errorf("removal: %v", changes)
	}
}

func TestAPlanMayNotTakeAwayOrChangeWhatIsTheUsers(t *testing.T) {
	ns := namespace(t)
	c := sharing(t, ns)
	before := userDefaults(t, ns, map[string]any{"protocol": "tcp", "envoyExtensions": []any{extensionOf("x"), extensionOf("y")}})
	for name, change := range map[string]func(spec map[string]any){
		"leaves a field out":    func(spec map[string]any) { delete(spec, "protocol") },
		"leaves an entry out":   func(spec map[string]any) { spec["envoyExtensions"] = []any{extensionOf("y")} },
		"changes an entry":      func(spec map[string]any) { spec["envoyExtensions"] = []any{extensionOf("x"), extensionOf("z")} },
		"moves an entry":        func(spec map[string]any) { spec["envoyExtensions"] = []any{extensionOf("y"), extensionOf("x")} },
		"makes a map of a text": func(spec map[string]any) { spec["protocol"] = map[string]any{"a": "b"} },
	} {
		tg := open(t, c, target(ns))
		p := sharedPlan(t, tg, ns)
		spec := descend(p.Objects[0].Content, []string{"spec"})
		spec["protocol"] = "tcp"
		change(spec)
		_, err := tg.applies(t.Context(), p)
		if err == nil {
			t.Errorf("%s: it was applied", name)
		}
		same(t, name, there(t, defaultsPath(ns, "api")), before)
	}
}

func TestARunOverASharedObjectThatIsCutOffIsTakenUpOrTakenBack(t *testing.T) {
	for when := 1; ; when++ {
		for _, reached := range []bool{false, true} {
			ns := namespace(t)
			before := userDefaults(t, ns, map[string]any{"envoyExtensions": []any{extensionOf("theirs")}})
			c := sharing(t, ns)
			share(t, c, ns, "a", "b")
			tg := open(t, c, target(ns))
			p := sharedPlan(t, tg, ns, "b", "c")
			r := record(c)
			ctx, cut := cutOff(t, r, when, reached)
			if _, err := tg.applies(ctx, p); err == nil {
				if when != 4 { // the inventory, the object, the inventory
					t.Fatalf("there were only %d writes", when-1)
				}
				return
			}
			cut()
			next := sharing(t, ns)
			share(t, next, ns, "b", "c")
			if got := extensions(t, ns); got != "theirs b c" {
				t.Errorf("extensions %q", got)
			}
			apply(t, next, planOf(ns))
			same(t, "the user's object", essence(there(t, defaultsPath(ns, "api"))), essence(before))
			if t.Failed() {
				t.Fatalf("cut off at write %d, which reached the server: %v", when, reached)
			}
		}
	}
}

func TestAnObjectThatTheUserDeletedAndMadeAgainCountsAsTheOneThatIsThere(t *testing.T) {
	ns := namespace(t)
	c := base(t)
	spec := map[string]any{"protocol": "http"}
	userDefaults(t, ns, spec)
	share(t, c, ns, "a")
	must(t, "DELETE", defaultsPath(ns, "api"), nil)
	own := plan.Plan{Chain: chainOf(ns, "a"), Version: "own", Objects: []plan.Object{{Content: map[string]any{
		"apiVersion": "consul.hashicorp.com/v1alpha1", "kind": "ServiceDefaults", "metadata": map[string]any{"namespace": ns, "name": "api"},
		"spec": map[string]any{"envoyExtensions": []any{extensionOf("a")}}}}}}
	same(t, "ours instead of the user's", apply(t, c, own), changed("ServiceDefaults/"+ns+"/api", plan.Created))

	must(t, "DELETE", defaultsPath(ns, "api"), nil)
	userDefaults(t, ns, spec)
	same(t, "the user's instead of ours", share(t, c, ns, "a"), changed("ServiceDefaults/"+ns+"/api", plan.Updated))
	apply(t, c, plan.Plan{Chain: chainOf(ns)})
	same(t, "what is left", there(t, defaultsPath(ns, "api"))["spec"], map[string]any{"protocol": "http"})
}
