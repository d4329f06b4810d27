package kube

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"testing"

	"github.com/meshery/meshery-filters/build/controlplanes/k8stest"
	"github.com/meshery/meshery-filters/internal/plan"
	"github.com/meshery/meshery-filters/internal/problem"
)

func TestObjectsAreMadeLeftAloneWhenNothingDiffersAndTakenAway(t *testing.T) {
	ns := namespace(t)
	c := base(t)
	p := planOf(ns, "headers", "rate-limit")
	both := fmt.Sprintf("WasmPlugin/%s/headers WasmPlugin/%s/rate-limit", ns, ns)
	same(t, "diff", diff(t, c, p), changed(both, plan.Created))
	if there(t, pluginPath(ns, "headers")) != nil || holding(t, ns) != nil {
		t.Fatal("a diff has written something")
	}
	same(t, "first", apply(t, c, p), changed(both, plan.Created))

	made := there(t, pluginPath(ns, "rate-limit"))
	same(t, "priority", descend(made, []string{"spec"})["priority"], int64(90))
	inventory := holding(t, ns)
	if label := descend(inventory, []string{"metadata", "labels"})[inventoryLabel]; label != "istio" {
		t.Errorf("the inventory's label is %v", label)
	}
	if data := fmt.Sprint(inventory["data"]); !strings.Contains(data, someDigest) || !strings.Contains(data, uid(made)) {
		t.Errorf("the inventory knows neither digest nor object: %s", data)
	}

	before := []string{version(made), version(inventory)}
	same(t, "again", apply(t, base(t), p), changed(both, plan.Unchanged))
	same(t, "resource versions", []string{version(there(t, pluginPath(ns, "rate-limit"))), version(holding(t, ns))}, before)

	p.Objects[0].Content["spec"].(map[string]any)["priority"] = 7
	p.Version = "v2"
	same(t, "another priority", apply(t, c, p), []plan.Change{
		{Subject: "WasmPlugin/" + ns + "/headers", Action: plan.Updated}, {Subject: "WasmPlugin/" + ns + "/rate-limit", Action: plan.Unchanged}})
	if v := version(there(t, pluginPath(ns, "rate-limit"))); v != before[0] {
		t.Error("the object that did not change was written")
	}
	committed := open(t, c, target(ns)).Committed()
	same(t, "the version", committed.Version, "v2")
	same(t, "the chain", committed.Chain, p.Chain)

	same(t, "removal", apply(t, c, planOf(ns)), changed(both, plan.Deleted))
	for _, path := range []string{pluginPath(ns, "rate-limit"), pluginPath(ns, "headers")} {
		if o := there(t, path); o != nil {
			t.Errorf("%s is still there", path)
		}
	}
	if holding(t, ns) != nil {
		t.Error("the inventory still has something")
	}
	if changes := apply(t, c, planOf(ns)); len(changes) > 0 {
		t.Errorf("nothing was there, and %v", changes)
	}
}

func TestModuleBytesNeverReachTheCluster(t *testing.T) {
	ns := namespace(t)
	c := base(t)
	p := planOf(ns, "inline")
	p.Chain.Filters[0].Spec.Module.Inline = "AGFzbQEAAAA="
	apply(t, c, p)
	if data, _ := json.Marshal(holding(t, ns)); strings.Contains(string(data), "AGFzbQ") {
		t.Errorf("the inventory has the module: %s", data)
	}
	if v := version(holding(t, ns)); len(apply(t, c, p)) != 1 || version(holding(t, ns)) != v {
		t.Error("the same plan wrote the inventory again")
	}
}

func TestDriftIsPutRight(t *testing.T) {
	ns := namespace(t)
	c := base(t)
	p := planOf(ns, "a", "b", "c")
	apply(t, c, p)
	must(t, "DELETE", pluginPath(ns, "a"), nil)
	// Whoever takes a field away owns nothing, so this is no conflict.
	must(t, "PATCH", pluginPath(ns, "b"), map[string]any{"spec": map[string]any{"sha256": nil}})
	want := []plan.Change{{Subject: "WasmPlugin/" + ns + "/a", Action: plan.Created},
		{Subject: "WasmPlugin/" + ns + "/b", Action: plan.Updated}, {Subject: "WasmPlugin/" + ns + "/c", Action: plan.Unchanged}}
	same(t, "diff", diff(t, c, p), want)
	same(t, "apply", apply(t, c, p), want)
	if got := descend(there(t, pluginPath(ns, "b")), []string{"spec"})["sha256"]; got != someDigest {
		t.Errorf("sha256 is %v", got)
	}
	apply(t, c, planOf(ns))
	if there(t, pluginPath(ns, "a")) != nil {
		t.Error("what was made once more is not taken away")
	}
}

func TestAConflictStopsBeforeAnythingIsWrittenAndNamesManagerAndField(t *testing.T) {
	ns := namespace(t)
	c := base(t)
	theirs := wasmPlugin(ns, "b", 5).Content
	must(t, "PATCH", pluginPath(ns, "b")+query("fieldManager", "the-neighbours"), theirs)
	before := there(t, pluginPath(ns, "b"))

	p := planOf(ns, "a", "b")
	_, err := applies(t.Context(), c, p)
	fails(t, err, problem.FieldConflict, "WasmPlugin/"+ns+"/b", `"the-neighbours"`, ".spec.priority")
	if strings.Contains(problem.Of(err).Details, ".spec.url") {
		t.Errorf("it names a field that both want alike: %v", err)
	}
	if there(t, pluginPath(ns, "a")) != nil || holding(t, ns) != nil {
		t.Error("something was written")
	}
	same(t, "their object", there(t, pluginPath(ns, "b")), before)

	p.Chain.Filters[0].Spec.Force = true
	same(t, "by force", apply(t, c, p), []plan.Change{
		{Subject: "WasmPlugin/" + ns + "/a", Action: plan.Created}, {Subject: "WasmPlugin/" + ns + "/b", Action: plan.Updated}})
	same(t, "priority", descend(there(t, pluginPath(ns, "b")), []string{"spec"})["priority"], int64(90))
	same(t, "again by force", apply(t, c, p), changed(fmt.Sprintf("WasmPlugin/%s/a WasmPlugin/%s/b", ns, ns), plan.Unchanged))
}

func TestWhatWeDidNotMakeIsNeverDeleted(t *testing.T) {
	ns := namespace(t)
	c := base(t)
	theirs := map[string]any{"apiVersion": "extensions.istio.io/v1alpha1", "kind": "WasmPlugin",
		"metadata": map[string]any{"namespace": ns, "name": "theirs"}, "spec": map[string]any{"url": "https://modules.example/theirs.wasm"}}
	must(t, "PATCH", pluginPath(ns, "theirs")+query("fieldManager", "the-neighbours"), theirs)
	before := there(t, pluginPath(ns, "theirs"))
	apply(t, c, planOf(ns, "theirs", "ours"))
	if descend(there(t, pluginPath(ns, "theirs")), []string{"spec"})["priority"] == nil {
		t.Fatal("our fields are not there")
	}
	same(t, "removal", apply(t, c, planOf(ns)), []plan.Change{
		{Subject: "WasmPlugin/" + ns + "/ours", Action: plan.Deleted}, {Subject: "WasmPlugin/" + ns + "/theirs", Action: plan.Updated}})
	after := there(t, pluginPath(ns, "theirs"))
	delete(metadataOf(before), "generation")
	same(t, "their object", essence(after), essence(before))
	for _, m := range managers(after) {
		if m["manager"] == Manager {
			t.Errorf("we still have fields: %v", m)
		}
	}

	// One of the same name that somebody else made since is not ours either.
	apply(t, c, planOf(ns, "ours"))
	must(t, "DELETE", pluginPath(ns, "ours"), nil)
	theirs["metadata"].(map[string]any)["name"] = "ours"
	again := must(t, "PATCH", pluginPath(ns, "ours")+query("fieldManager", "the-neighbours"), theirs)
	if changes := apply(t, c, planOf(ns)); len(changes) > 0 {
		t.Errorf("removal: %v", changes)
	}
	same(t, "their new object", there(t, pluginPath(ns, "ours")), again)
	if holding(t, ns) != nil {
		t.Error("the inventory is still there")
	}
}

func TestWhatOthersMadeAMomentBeforeUsStaysWhenWeFailAndGoBack(t *testing.T) {
	ns := namespace(t)
	c := base(t)
	r := record(c)
	r.before = func(_ int, req *http.Request) error {
		switch {
		case dry(req):
		case req.URL.Path == pluginPath(ns, "theirs"):
			code, answer, err := ask("PATCH", pluginPath(ns, "theirs")+query("fieldManager", "the-neighbours"), map[string]any{
				"apiVersion": "extensions.istio.io/v1alpha1", "kind": "WasmPlugin", "metadata": map[string]any{"namespace": ns, "name": "theirs"},
				"spec": map[string]any{"url": "https://modules.example/theirs.wasm"}})
			if code != http.StatusCreated {
				t.Errorf("%d %v %v", code, answer, err)
			}
		case req.URL.Path == pluginPath(ns, "ours"):
			return errors.New("the line is cut")
		}
		return nil
	}
	tgt := open(t, c, target(ns))
	_, err := tgt.applies(t.Context(), planOf(ns, "theirs", "ours"))
	fails(t, err, problem.ClusterUnreachable)
	r.before = nil
	if _, err := tgt.applies(t.Context(), planOf(ns)); err != nil {
		t.Fatal(err)
	}
	if o := there(t, pluginPath(ns, "theirs")); o == nil || managed(o) {
		t.Errorf("theirs is %v", o)
	}
}

func TestForceDoesNotThrowAwayTheEntriesThatOthersHaveInAList(t *testing.T) {
	ns := namespace(t)
	c := cluster(t, server.Kubeconfig(server.Token(k8stest.Admin)), Options{})
	theirs := map[string]any{"apiVersion": "consul.hashicorp.com/v1alpha1", "kind": "ServiceDefaults", "metadata": map[string]any{"namespace": ns, "name": "api"},
		"spec": map[string]any{"protocol": "tcp", "envoyExtensions": []any{extensionOf("theirs")}}}
	before := must(t, "PATCH", defaultsPath(ns, "api")+query("fieldManager", "the-neighbours"), theirs)
	p := plan.Plan{Chain: chainOf(ns, "a"), Objects: []plan.Object{{Content: map[string]any{"apiVersion": theirs["apiVersion"], "kind": theirs["kind"],
		"metadata": theirs["metadata"], "spec": map[string]any{"protocol": "http", "envoyExtensions": []any{extensionOf("a")}}}}}}
	p.Chain.Filters[0].Spec.Force = true
	_, err := applies(t.Context(), c, p)
	fails(t, err, problem.FieldConflict, ".spec.envoyExtensions", "would be lost")
	same(t, "their object", there(t, defaultsPath(ns, "api")), before)
	// A field alone, or a list with all that was in it, is taken over.
	p.Objects[0].Content["spec"].(map[string]any)["envoyExtensions"] = []any{extensionOf("theirs"), extensionOf("a")}
	apply(t, c, p)
	if got := extensions(t, ns); got != "theirs a" {
		t.Errorf("extensions %q", got)
	}
}

func TestWhatThePlanHasNoMoreIsPruned(t *testing.T) {
	ns := namespace(t)
	c := base(t)
	apply(t, c, planOf(ns, "a", "b"))
	r := record(c)
	same(t, "another plan", apply(t, c, planOf(ns, "b", "d")), []plan.Change{
		{Subject: "WasmPlugin/" + ns + "/b", Action: plan.Updated}, {Subject: "WasmPlugin/" + ns + "/d", Action: plan.Created},
		{Subject: "WasmPlugin/" + ns + "/a", Action: plan.Deleted}})
	if there(t, pluginPath(ns, "a")) != nil || there(t, pluginPath(ns, "d")) == nil {
		t.Error("the cluster does not hold the plan")
	}
	// What comes is written before what goes, with nothing in between.
	w := r.writes()
	if last := w[len(w)-2]; !strings.HasPrefix(last, "DELETE") || !strings.HasSuffix(w[len(w)-1], inventoryName("istio", target(ns))) {
		t.Errorf("the writes are %q", w)
	}
	v, err := c.Inventories(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, i := range v {
		for _, o := range i.Objects {
			if o.Namespace == ns {
				names = append(names, o.Name)
			}
		}
	}
	same(t, "inventory", names, []string{"b", "d"})
}

func TestAKindThatIsNotServedOrAnObjectThatIsNotValidStopsBeforeAnythingIsWritten(t *testing.T) {
	ns := namespace(t)
	c := base(t)
	for name, c2 := range map[string]struct {
		change func(*plan.Plan)
		kind   *problem.Kind
		says   string
	}{
		"a kind that is not installed":  {func(p *plan.Plan) { p.Objects[1].Content["kind"] = "TrafficExtension" }, problem.KindNotServed, "extensions.istio.io/v1alpha1 TrafficExtension"},
		"a group that is not installed": {func(p *plan.Plan) { p.Objects[1].Content["apiVersion"] = "nobody.example/v1" }, problem.KindNotServed, "nobody.example/v1"},
		"a value against the schema":    {func(p *plan.Plan) { p.Objects[1].Content["spec"].(map[string]any)["phase"] = "LATER" }, problem.ObjectRefused, "spec.phase"},
		"a field that is not known":     {func(p *plan.Plan) { p.Objects[1].Content["spec"].(map[string]any)["uri"] = "x" }, problem.ObjectRefused, "uri"},
		"the same object twice":         {func(p *plan.Plan) { p.Objects[1] = p.Objects[0] }, problem.Internal, "twice"},
		"a name that is a path":         {func(p *plan.Plan) { metadataOf(p.Objects[1].Content)["name"] = "../../secrets" }, problem.Internal, "fit name"},
	} {
		p := planOf(ns, "a", "b")
		c2.change(&p)
		_, err := applies(t.Context(), c, p)
		if !errors.Is(err, c2.kind) || !strings.Contains(err.Error(), c2.says) {
			t.Errorf("%s: %v", name, err)
		}
		if there(t, pluginPath(ns, "a")) != nil || holding(t, ns) != nil {
			t.Errorf("%s: something was written", name)
		}
	}
}

// An adapter that ends at any moment leaves a state that the next one brings to what was asked for, or takes away whole.
func TestARunThatIsCutOffAtAnyRequestIsTakenUpOrTakenBackByTheNext(t *testing.T) {
	type act struct {
		name       string
		from, to   []string
		wantWrites int
	}
	for _, a := range []act{
		{"the first chain", nil, []string{"a", "b"}, 4},
		{"another chain", []string{"a", "b"}, []string{"b", "d"}, 5},
		{"no chain", []string{"a", "b"}, nil, 4},
	} {
		t.Run(a.name, func(t *testing.T) {
			for when := 1; ; when++ {
				for _, done := range []bool{false, true} { // the request that is cut off reached the server, or did not
					ns := namespace(t)
					if a.from != nil {
						apply(t, base(t), planOf(ns, a.from...))
					}
					c := base(t)
					r := record(c)
					ctx, cancel := cutOff(t, r, when, done)
					_, err := applies(ctx, c, planOf(ns, a.to...))
					cancel()
					if err == nil {
						if when-1 < a.wantWrites {
							t.Fatalf("it was to be cut off at write %d", when)
						}
						return // it has no more writes than that
					}
					// Taken up by the next.
					apply(t, base(t), planOf(ns, a.to...))
					holds(t, ns, a.to...)
					// And nothing is left behind.
					apply(t, base(t), planOf(ns))
					holds(t, ns)

					if t.Failed() {
						t.Fatalf("cut off at write %d, which reached the server: %v", when, done)
					}
				}
			}
		})
	}
}

// holds checks that the cluster has exactly these of the objects a, b and d, and an inventory that says so.
func holds(t *testing.T, ns string, names ...string) {
	t.Helper()
	want := map[string]bool{}
	for _, n := range names {
		want[n] = true
	}
	for _, n := range []string{"a", "b", "d"} {
		if got := there(t, pluginPath(ns, n)) != nil; got != want[n] {
			t.Errorf("%s is there: %v", n, got)
		}
	}
	o := holding(t, ns)
	if (o != nil) != (len(names) > 0) {
		t.Errorf("there is an inventory: %v", o != nil)
	}
	if o == nil {
		return
	}
	var items []Item
	if err := json.Unmarshal([]byte(descend(o, []string{"data"})["objects"].(string)), &items); err != nil {
		t.Fatal(err)
	}
	if len(items) != len(names) {
		t.Errorf("the inventory has %v", items)
	}
	for _, i := range items {
		if !i.Created || i.UID != uid(there(t, pluginPath(ns, i.Name))) {
			t.Errorf("the inventory does not know that we made %s: %+v", i, i)
		}
	}
}

func TestOfTwoAdaptersAtOneTargetTheOneThatReadBeforeTheOthersChangeWritesNothing(t *testing.T) {
	ns := namespace(t)
	apply(t, base(t), planOf(ns, "a"))
	one, two := open(t, base(t), target(ns)), open(t, base(t), target(ns))
	if _, err := one.applies(t.Context(), planOf(ns, "a", "b")); err != nil {
		t.Fatal(err)
	}
	before := there(t, pluginPath(ns, "a"))
	p := planOf(ns, "a")
	p.Objects[0].Content["spec"].(map[string]any)["priority"] = 1
	if _, err := two.Diff(t.Context(), p); err != nil {
		t.Fatal(err)
	}
	_, err := two.applies(t.Context(), p)
	fails(t, err, problem.ChainChanged, "Workload "+ns)
	same(t, "the object", there(t, pluginPath(ns, "a")), before)

	// It reads again and goes on; and the one that was faster builds on what it did itself.
	two = open(t, base(t), target(ns))
	if names := two.Committed().Chain.Names(); len(names) != 2 {
		t.Errorf("it reads %q", names)
	}
	for _, names := range [][]string{{"a", "b", "d"}, {"d"}, {"a", "d"}} {
		if _, err := two.applies(t.Context(), planOf(ns, names...)); err != nil {
			t.Fatal(err)
		}
		same(t, "what it knows", two.Committed().Chain, chainOf(ns, names...))
	}
	holds(t, ns, "a", "d")
	_, err = one.applies(t.Context(), planOf(ns))
	fails(t, err, problem.ChainChanged)
	holds(t, ns, "a", "d")
	if _, err := two.applies(t.Context(), planOf(namespace(t), "a")); !errors.Is(err, problem.Internal) {
		t.Errorf("the plan of another target: %v", err)
	}
}

func TestRequestsPerOperationAreAtMostThreePerObjectAndFour(t *testing.T) {
	for _, n := range []int{1, 3, 10} {
		ns := namespace(t)
		var names []string
		for i := range n {
			names = append(names, fmt.Sprintf("f%d", i))
		}
		p := planOf(ns, names...)
		update := planOf(ns, names...)
		for _, o := range update.Objects {
			o.Content["spec"].(map[string]any)["pluginConfig"] = map[string]any{"mode": "block"}
		}
		for _, op := range []struct {
			name string
			plan plan.Plan
		}{{"create", p}, {"unchanged", p}, {"update", update}, {"remove", planOf(ns)}} {
			c := base(t) // knows nothing of the cluster, as when a kubeconfig comes with each operation
			r := record(c)
			apply(t, c, op.plan)
			count := len(r.requests())
			t.Logf("%s %d objects: %d requests", op.name, n, count)
			if count > 3*n+4 {
				t.Errorf("%s %d objects: %d requests: %q", op.name, n, count, r.requests())
			}
			if op.name == "unchanged" && len(r.writes()) > 0 {
				t.Errorf("unchanged: %q", r.writes())
			}
		}
	}
}

func TestListTellsEveryChainOfTheClusterPageByPage(t *testing.T) {
	ns := namespace(t)
	c := base(t)
	want := map[string]bool{}
	for i := range 3 {
		p := planOf(ns, fmt.Sprintf("f%d", i))
		p.Chain.Target.Labels = map[string]string{"app": fmt.Sprint(i)}
		apply(t, c, p)
		want[p.Chain.ID()] = true
	}
	r := record(c)
	r.before = func(_ int, req *http.Request) error { // smaller pages than usual
		q := req.URL.Query()
		if q.Has("limit") {
			q.Set("limit", "1")
			req.URL.RawQuery = q.Encode()
		}
		return nil
	}
	read, err := c.Targets(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, chain := range read.Chains() {
		delete(want, chain.ID())
	}
	if len(want) > 0 || len(r.requests()) < 3 {
		t.Errorf("not listed: %v; by %d requests", want, len(r.requests()))
	}
}

func TestAnInventoryThatSomebodyHasChangedIsNotGuessedAt(t *testing.T) {
	ns := namespace(t)
	c := base(t)
	apply(t, c, planOf(ns, "a"))
	for name, data := range map[string]any{
		"no chain":         map[string]any{"chain": "gone"},
		"no objects":       map[string]any{"objects": "[{]"},
		"another's target": map[string]any{"chain": `{"mesh":"istio","target":{"kind":"Mesh"}}`},
	} {
		good := holding(t, ns)
		must(t, "PATCH", inventoryPath(ns), map[string]any{"data": data})
		_, err := applies(t.Context(), c, planOf(ns))
		if !errors.Is(err, problem.InventoryDamaged) || there(t, pluginPath(ns, "a")) == nil {
			t.Errorf("%s: %v", name, err)
		}
		must(t, "PATCH", inventoryPath(ns), map[string]any{"data": good["data"]})
	}

	// A second one of the same target would have another past.
	second := holding(t, ns)
	second["metadata"] = map[string]any{"name": "second", "labels": second["metadata"].(map[string]any)["labels"]}
	must(t, "POST", "/api/v1/namespaces/"+defaultNamespace+"/configmaps", second)
	_, err := c.Targets(t.Context())
	must(t, "DELETE", "/api/v1/namespaces/"+defaultNamespace+"/configmaps/second", nil)
	fails(t, err, problem.InventoryDamaged, "ConfigMap/"+defaultNamespace+"/second", "another name")
	apply(t, c, planOf(ns))
}
