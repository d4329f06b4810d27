package operation_test

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/meshery/meshery-filters/internal/filter"
	"github.com/meshery/meshery-filters/internal/kube"
	"github.com/meshery/meshery-filters/internal/operation"
	"github.com/meshery/meshery-filters/internal/problem"
)

// undoing asks to bring a filter of the test's namespace back; revision 0 is the one before the last.
func (c *clusterRig) undoing(name string, revision uint64) operation.Request {
	q := undo(name, revision)
	q.Namespace, q.Kubeconfigs = c.ns, []string{c.kubeconfig}
	return q
}

// past is what the cluster's inventories tell of a filter.
func (c *clusterRig) past(name string) []operation.Revision {
	c.t.Helper()
	cluster, err := kube.Open([]byte(c.kubeconfig), kube.Options{Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		c.t.Fatal(err)
	}
	defer cluster.Close()
	all, err := cluster.Targets(c.t.Context())
	if err != nil {
		c.t.Fatal(err)
	}
	return operation.HistoryOf(all.Revisions(), filter.Key{Namespace: c.ns, Name: name})
}

func changesOf(history []operation.Revision) (all []string) {
	for _, rev := range history {
		all = append(all, rev.Change)
	}
	return all
}

func TestAFilterInAClusterIsBroughtBackByWhateverAdapter(t *testing.T) {
	c := newClusterRig(t)
	priority := func(want int) {
		t.Helper()
		history := c.past("a")
		if last := history[len(history)-1]; last.Filter.Spec.Priority != want {
			t.Errorf("its priority is %d, and should be %d", last.Filter.Spec.Priority, want)
		}
	}
	if _, err := c.runner.Submit(t.Context(), c.undoing("a", 0)); !errors.Is(err, problem.FilterNotFound) {
		t.Errorf("one that never was: %v", err)
	}
	inline := "module: {inline: " + base64.StdEncoding.EncodeToString(probe(t)) + "}"
	c.ok(c.apply(on("web", "a", inline, "config: {}", "priority: 1")))
	c.ok(c.apply(on("web", "other")))
	c.ok(c.apply(on("web", "a", inline, "config: {}", "priority: 2")))
	first := c.past("a")[0].Number

	// Another adapter, with nothing in its store, finds the module where the filter is.
	fresh := newClusterRig(t)
	fresh.ns = c.ns
	says(t, fresh.ok(fresh.undoing("a", 0)), "updated")
	priority(1)
	says(t, c.ok(c.undoing("a", 0)), "updated") // an undo of an undo
	priority(2)
	c.ok(c.apply(on("api", "a", inline, "config: {}", "priority: 3")))
	says(t, c.ok(c.undoing("a", 0)), "it moved to Workload "+c.ns+" {app=web}")
	c.ok(c.request("remove_filter", doc("a")))
	if want := []string{"applied", "changed", "changed", "changed", "moved", "moved", "removed"}; !reflect.DeepEqual(changesOf(c.past("a")), want) {
		t.Errorf("the history is %v", changesOf(c.past("a")))
	}
	c.holds("EnvoyFilter", "other")
	says(t, c.ok(c.undoing("a", 0)), "created", "requests meet ")
	c.ok(c.undoing("a", first))
	priority(1)
	c.holds("EnvoyFilter", "a", "other")
	if _, err := c.runner.Submit(t.Context(), c.undoing("a", first+1_000_000)); !errors.Is(err, problem.RevisionNotFound) || !strings.Contains(err.Error(), fmt.Sprint(first)) {
		t.Errorf("no such revision: %v", err)
	}

	// What was applied once goes, and what a target had stays known when nothing is there any more.
	c.ok(c.apply(on("db", "b")))
	says(t, c.ok(c.undoing("b", 0)), c.ns+"/b removed from", "no filter is left there")
	c.ok(c.request("remove_filter", doc("a")))
	c.ok(c.request("remove_filter", doc("other")))
	c.holds("EnvoyFilter")
	if n := len(c.inventories()); n != 0 {
		t.Errorf("%d inventories have something", n)
	}
	fresh.ok(fresh.undoing("other", 0))
	c.holds("EnvoyFilter", "other")
}

func TestTheHistoryInAClusterIsBoundedAndHasNeitherModulesNorSecrets(t *testing.T) {
	c := newClusterRig(t)
	c.readsSecrets()
	c.secret("greeting", map[string]string{"token": "what nobody may find"})
	for n := range 12 {
		c.ok(c.apply(on("web", "a", fmt.Sprintf("priority: %d", n), "config: {response: {x-a: {$secret: {name: greeting, key: token}}}}")))
	}
	history := c.past("a")
	if len(history) != 10 || !history[0].First || history[9].First || history[0].Filter.Spec.Priority != 2 {
		t.Errorf("%d revisions, from %+v", len(history), history[0])
	}
	numbers := slices.IsSortedFunc(history, func(a, b operation.Revision) int { return int(a.Number) - int(b.Number) })
	if !numbers || history[0].Time.IsZero() {
		t.Errorf("%+v", history)
	}
	text := c.inventories()[0]["data"].(map[string]any)["revisions"].(string)
	if !strings.Contains(text, "$secret") || strings.Contains(text, "what nobody may find") || strings.Contains(text, "AGFzbQ") {
		t.Errorf("%s", text)
	}
	// Large ones are fewer.
	var large strings.Builder
	for n := range 5 {
		fmt.Fprintf(&large, "x-%d: %s, ", n, strings.Repeat("x", 4<<10))
	}
	for n := range 4 {
		c.ok(c.apply(on("web", "a", fmt.Sprintf("config: {response: {%sx-a: '%d'}}", large.String(), n))))
	}
	text = c.inventories()[0]["data"].(map[string]any)["revisions"].(string)
	if history := c.past("a"); len(history) != 3 || !history[0].First || len(text) > 64<<10 {
		t.Errorf("%d revisions in %d bytes", len(history), len(text))
	}
	c.ok(c.undoing("a", 0))
}

func TestAnUndoIsForWhereTheFilterHasAHistory(t *testing.T) {
	c := newClusterRig(t)
	elsewhere := c.as(adapterUser, "localhost") // the same cluster, by another name
	both := func(q operation.Request) operation.Request {
		q.Kubeconfigs = []string{c.kubeconfig, elsewhere}
		return q
	}
	// On plain Envoys, although the request brings a cluster.
	c.ok(operation.Request{Operation: "apply_filter", Namespace: c.ns, Body: doc("plain", "mesh: envoy")})
	c.ok(operation.Request{Operation: "apply_filter", Namespace: c.ns, Body: doc("plain", "mesh: envoy", "priority: 4")})
	says(t, c.ok(c.undoing("plain", 0)), "kept for ProxyGroup default")
	c.holds("EnvoyFilter")

	// In both clusters, where it was the same.
	c.ok(c.apply(on("web", "a")))
	c.ok(c.apply(on("web", "a", "priority: 4")))
	says(t, c.ok(both(c.undoing("a", 0))), "2 targets")

	// One that does not answer may have another history, and in two kinds of places it is not the same.
	q := c.undoing("a", 0)
	q.Kubeconfigs = append(q.Kubeconfigs, c.as(nobody, ""))
	if _, err := c.runner.Submit(t.Context(), q); !errors.Is(err, problem.RightMissing) {
		t.Errorf("a cluster that does not tell: %v", err)
	}
	c.ok(operation.Request{Operation: "apply_filter", Namespace: c.ns, Body: doc("a", "mesh: envoy")})
	if _, err := c.runner.Submit(t.Context(), c.undoing("a", 0)); !errors.Is(err, problem.UndoAmbiguous) {
		t.Errorf("here and in a cluster: %v", err)
	}
	q = c.undoing("a", 0)
	q.Implied = true
	says(t, c.ok(q), "removed from ProxyGroup default")
	c.holds("EnvoyFilter", "a")
}

func TestTheHistoryOfTheAdaptersOwnClusterIsToldAndUndone(t *testing.T) {
	c := newClusterRig(t, func(o *operation.Options) {
		s, err := startServer()
		if err != nil {
			t.Fatal(err)
		}
		if o.Own, err = o.Clusters(s.Kubeconfig(s.Token(adapterUser))); err != nil {
			t.Fatal(err)
		}
	})
	c.ok(c.apply(on("web", "a")))
	c.ok(c.apply(on("web", "a", "priority: 4")))
	history, err := c.runner.History(t.Context(), c.ns, "a")
	if err != nil || !reflect.DeepEqual(changesOf(history), []string{"applied", "changed"}) {
		t.Fatalf("%v %v", changesOf(history), err)
	}
	q := c.undoing("a", history[0].Number)
	q.Namespace, q.Body = "elsewhere", strings.Replace(q.Body, "{name: a}", "{name: a, namespace: "+c.ns+"}", 1)
	if _, err := c.runner.Submit(t.Context(), q); !errors.Is(err, problem.TargetTooWide) {
		t.Errorf("from another namespace: %v", err)
	}
	says(t, c.ok(c.undoing("a", history[0].Number)), "updated")
}

func TestAnUndoRefusesWhatSomebodyElseHasPutIntoAnInventory(t *testing.T) {
	c := newClusterRig(t)
	c.ok(c.apply(on("web", "a")))
	c.ok(c.apply(on("web", "a", "priority: 4")))
	first := c.past("a")[0].Number
	inventory := c.inventories()[0]
	data := inventory["data"].(map[string]any)
	good := data["revisions"].(string)
	for why, forge := range map[string]func(string) string{
		"another mesh":   func(s string) string { return strings.Replace(s, `"mesh":"istio"`, `"mesh":"envoy"`, 1) },
		"another target": func(s string) string { return strings.Replace(s, `"app":"web"`, `"app":"bank"`, 1) },
		"another target's namespace": func(s string) string {
			return strings.Replace(s, `"kind":"Workload","namespace":"`+c.ns+`"`, `"kind":"Workload","namespace":"bank"`, 1)
		},
	} {
		if data["revisions"] = forge(good); data["revisions"] == good {
			t.Fatalf("%s: there is nothing to change in %s", why, good)
		}
		c.put(inventory)
		for _, revision := range []uint64{0, first} {
			if _, err := c.runner.Submit(t.Context(), c.undoing("a", revision)); !errors.Is(err, problem.RevisionAstray) || !strings.Contains(err.Error(), fmt.Sprintf("%s/a in its revision %d is for ", c.ns, first)) {
				t.Errorf("%s: %v", why, err)
			}
		}
	}
	data["revisions"] = good
	c.put(inventory)
	says(t, c.ok(c.undoing("a", 0)), "updated")
}

// put writes a ConfigMap as somebody who may do everything.
func (c *clusterRig) put(o map[string]any) {
	c.t.Helper()
	meta := o["metadata"].(map[string]any)
	delete(meta, "resourceVersion")
	body, err := json.Marshal(o)
	if err != nil {
		c.t.Fatal(err)
	}
	if code, answer, err := c.ask("PUT", fmt.Sprintf("/api/v1/namespaces/%s/configmaps/%s", meta["namespace"], meta["name"]), json.RawMessage(body)); code != http.StatusOK {
		c.t.Fatal(code, answer["message"], err)
	}
}
