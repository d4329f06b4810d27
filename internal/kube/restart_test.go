package kube

import (
	"context"
	"strings"
	"testing"
	"time"

	"k8s.io/apimachinery/pkg/runtime/schema"

	"github.com/meshery/meshery-filters/internal/plan"
	"github.com/meshery/meshery-filters/internal/problem"
	"github.com/meshery/meshery-filters/templates"
)

const upstreams = "consul.hashicorp.com/connect-service-upstreams"

// restarting is a cluster of the adapter's account with the role for upstreams in a namespace, and no other rights there than
// base and proof.
func restarting(t *testing.T, ns string) *Cluster {
	t.Helper()
	text, _ := templates.RBAC("upstreams")
	for _, o := range documents(text) {
		if code, answer, err := ask("POST", collection(o), o); err != nil || code != 201 && code != 409 {
			t.Fatalf("%d %v %v", code, answer, err)
		}
	}
	must(t, "POST", "/apis/rbac.authorization.k8s.io/v1/namespaces/"+ns+"/rolebindings", map[string]any{"metadata": map[string]any{"name": "upstreams"},
		"roleRef":  map[string]any{"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "meshery-filters-upstreams"},
		"subjects": []any{map[string]any{"kind": "ServiceAccount", "namespace": "meshery-filters", "name": "meshery-filters"}}})
	return base(t)
}

// shop makes a Service of the user's with a Deployment and the entry of Consul's.
func shop(t *testing.T, ns string, annotations map[string]any) {
	t.Helper()
	userDefaults(t, ns, map[string]any{"protocol": "http"})
	must(t, "POST", "/api/v1/namespaces/"+ns+"/services", map[string]any{"metadata": map[string]any{"name": "api"},
		"spec": map[string]any{"selector": map[string]any{"app": "api"}, "ports": []any{map[string]any{"port": 80}}}})
	for _, name := range []string{"api", "other"} {
		o := deployment(ns, name).Content
		if annotations != nil && name == "api" {
			descend(o, []string{"spec", "template", "metadata"})["annotations"] = annotations
		}
		must(t, "POST", "/apis/apps/v1/namespaces/"+ns+"/deployments", o)
	}
	ready(t, ns)
}

// ready says as a controller does that the Deployment api is as it should be.
func ready(t *testing.T, ns string) {
	t.Helper()
	report(t, ns, "api", 2)
}

// maker is the Deployment api without how far it is.
func maker(t *testing.T, ns string) map[string]any {
	t.Helper()
	o := essence(there(t, deploymentPath(ns, "api")))
	delete(o, "status")
	return o
}

// asked is a plan that gives what makes the Service's Pods the entries, and the user's entry an extension.
func asked(t *testing.T, c *Cluster, ns string, entries ...string) plan.Plan {
	t.Helper()
	at := plan.Ref{GroupKind: schema.GroupKind{Kind: "Service"}, Namespace: ns, Name: "api"}
	defaults := plan.Ref{GroupKind: serviceDefaults.GroupKind(), Namespace: ns, Name: "api"}
	found, err := c.Read(t.Context(), plan.Reads{Objects: []plan.Ref{defaults}, Selected: []plan.Ref{at}})
	if err != nil {
		t.Fatal(err)
	}
	if len(found.Objects) != 2 {
		t.Fatalf("%d objects were read", len(found.Objects))
	}
	p := plan.Plan{Chain: chainOf(ns, "a"), Version: strings.Join(entries, " ")}
	for _, o := range found.Objects {
		next := clone(o.Content)
		if template := descend(next, []string{"spec", "template", "metadata"}); template != nil {
			annotations, _ := template["annotations"].(map[string]any)
			if annotations == nil {
				annotations = map[string]any{}
				template["annotations"] = annotations
			}
			had, _ := annotations[upstreams].(string)
			all := strings.Split(had, ",")
			if had == "" {
				all = nil
			}
			for _, e := range entries {
				if !strings.Contains(had, e) {
					all = append(all, e)
				}
			}
			annotations[upstreams] = strings.Join(all, ",")
		} else if list, _ := descend(next, []string{"spec"})["envoyExtensions"].([]any); len(list) == 0 {
			descend(next, []string{"spec"})["envoyExtensions"] = []any{extensionOf("a")}
		}
		p.Objects = append(p.Objects, plan.Object{Content: next, Shared: true, Read: o.Content})
	}
	return p
}

func upstreamsOf(t *testing.T, ns string) any {
	t.Helper()
	return descend(there(t, deploymentPath(ns, "api")), []string{"spec", "template", "metadata", "annotations"})[upstreams]
}

// applying applies a plan beside the test, which says meanwhile how far the Pods are.
func applying(t *testing.T, c *Cluster, p plan.Plan) (done chan error, changes *[]plan.Change) {
	done, changes = make(chan error, 1), new([]plan.Change)
	go func() {
		got, err := applies(context.WithoutCancel(t.Context()), c, p)
		*changes = got
		done <- err
	}()
	return done, changes
}

func TestPodsRestartBeforeWhatNeedsThatIsWrittenAndTheirMakerGetsBackWhatItHad(t *testing.T) {
	for name, annotations := range map[string]map[string]any{
		"none":      nil,
		"others":    {"team": "shop"},
		"empty":     {upstreams: ""},
		"upstreams": {upstreams: "db:5432, cache:6379", "team": "shop"},
	} {
		t.Run(name, func(t *testing.T) {
			ns := namespace(t)
			c := restarting(t, ns)
			shop(t, ns, annotations)
			before := maker(t, ns)
			p := asked(t, c, ns, "modules:21900")
			want := append(changed("Deployment/"+ns+"/api", plan.Restarted), changed("ServiceDefaults/"+ns+"/api", plan.Updated)...)
			same(t, "what would be done", diff(t, c, p), want)
			same(t, "nothing is", maker(t, ns), before)

			done, changes := applying(t, c, p)
			had, _ := annotations[upstreams].(string)
			eventually(t, func() bool {
				return upstreamsOf(t, ns) == strings.TrimPrefix(had+",modules:21900", ",")
			})
			select {
			case err := <-done:
				t.Fatalf("the Pods were not waited for: %v", err)
			default:
			}
			if got := extensions(t, ns); got != "" {
				t.Errorf("before the Pods are back there is %q", got)
			}
			ready(t, ns)
			if err := <-done; err != nil {
				t.Fatal(err)
			}
			same(t, "what was done", *changes, want)
			if got := extensions(t, ns); got != "a" {
				t.Errorf("extensions %q", got)
			}
			again := apply(t, c, asked(t, c, ns, "modules:21900"))
			same(t, "again", again, append(changed("Deployment/"+ns+"/api", plan.Unchanged), changed("ServiceDefaults/"+ns+"/api", plan.Unchanged)...))

			done, changes = applying(t, c, plan.Plan{Chain: chainOf(ns)})
			eventually(t, func() bool { return upstreamsOf(t, ns) == annotations[upstreams] })
			if got := extensions(t, ns); got != "" {
				t.Errorf("what needs the upstream outlives it: %q", got)
			}
			ready(t, ns)
			if err := <-done; err != nil {
				t.Fatal(err)
			}
			same(t, "removal", *changes, append(changed("ServiceDefaults/"+ns+"/api", plan.Updated), changed("Deployment/"+ns+"/api", plan.Restarted)...))
			same(t, "the user's object", maker(t, ns), before)
		})
	}
}

func TestAnUpstreamThatTheUserAddsMeanwhileStays(t *testing.T) {
	ns := namespace(t)
	c := restarting(t, ns)
	shop(t, ns, map[string]any{upstreams: "db:5432"})
	write := func(text string) {
		t.Helper()
		must(t, "PATCH", deploymentPath(ns, "api"), map[string]any{"spec": map[string]any{"template": map[string]any{"metadata": map[string]any{
			"annotations": map[string]any{upstreams: text}}}}})
	}
	// Between what the plan was made of and its coming true, and later.
	p := asked(t, c, ns, "modules:21900")
	write("db:5432,cache:6379")
	must(t, "PATCH", defaultsPath(ns, "api"), map[string]any{"spec": map[string]any{"protocol": "grpc"}})
	done, _ := applying(t, c, p)
	eventually(t, func() bool { return strings.Contains(upstreamsOf(t, ns).(string), "modules") })
	same(t, "upstreams", upstreamsOf(t, ns), "db:5432,modules:21900,cache:6379")
	ready(t, ns)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	same(t, "protocol", descend(there(t, defaultsPath(ns, "api")), []string{"spec"})["protocol"], "grpc")
	write("late:1, modules:21900 ,db:5432")
	done, _ = applying(t, c, plan.Plan{Chain: chainOf(ns)})
	eventually(t, func() bool { return !strings.Contains(upstreamsOf(t, ns).(string), "modules") })
	same(t, "upstreams", upstreamsOf(t, ns), "late:1,db:5432")
	ready(t, ns)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}

func TestPodsThatDoNotComeBackKeepFromGoingOutWhatNeedsThem(t *testing.T) {
	ns := namespace(t)
	c := restarting(t, ns)
	shop(t, ns, nil)
	before := maker(t, ns)
	done, _ := applying(t, c, asked(t, c, ns, "modules:21900"))
	eventually(t, func() bool { return upstreamsOf(t, ns) != nil })
	report(t, ns, "api", 1) // and its controller has given up
	fails(t, <-done, problem.RolloutFailed, "Deployment/"+ns+"/api", "1 of 2 replicas are available", "waiting for   nodes")
	if got := extensions(t, ns); got != "" {
		t.Errorf("extensions %q", got)
	}
	done, changes := applying(t, c, plan.Plan{Chain: chainOf(ns)})
	eventually(t, func() bool { return upstreamsOf(t, ns) == nil })
	report(t, ns, "api", 1)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if n := len(*changes); n != 1 || !strings.HasPrefix(string((*changes)[0].Action), string(plan.Restarted)+"; they were not seen to be back: Deployment/") {
		t.Errorf("%v", *changes)
	}
	same(t, "the user's object", maker(t, ns), before)
}

func TestWhatIsPutBackDoesNotWaitForPodsThatItMayMend(t *testing.T) {
	ns := namespace(t)
	c := restarting(t, ns)
	shop(t, ns, nil)
	held := asked(t, c, ns, "modules:21900")
	carry := func(p plan.Plan) []plan.Change {
		t.Helper()
		done, changes := applying(t, c, p)
		eventually(t, func() bool { return !seen(there(t, deploymentPath(ns, "api"))) })
		ready(t, ns)
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		return *changes
	}
	carry(held)
	next := asked(t, c, ns, "modules:21900", "more:21901")
	for _, o := range next.Objects {
		if spec := descend(o.Content, []string{"spec"}); spec["envoyExtensions"] != nil {
			spec["envoyExtensions"] = []any{extensionOf("a"), extensionOf("b")}
		}
	}
	carry(next)
	same(t, "with the next plan", extensions(t, ns), "a b")

	held.Back = true
	done, changes := applying(t, c, held)
	eventually(t, func() bool { return upstreamsOf(t, ns) == "modules:21900" })
	report(t, ns, "api", 1) // as Pods are behind sidecars that refuse every request
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	same(t, "put back", extensions(t, ns), "a")
	if first := (*changes)[0]; !strings.HasPrefix(string(first.Action), string(plan.Restarted)+"; they were not seen to be back: Deployment/") {
		t.Errorf("%v", *changes)
	}
}

func TestPodsThatNobodyMayWaitForDoNotRestart(t *testing.T) {
	ns := namespace(t)
	shop(t, ns, nil)
	before := maker(t, ns)
	const group = "/apis/rbac.authorization.k8s.io/v1/namespaces/"
	must(t, "POST", group+ns+"/roles", map[string]any{"metadata": map[string]any{"name": "blind"}, "rules": []any{
		map[string]any{"apiGroups": []any{"apps"}, "resources": []any{"deployments", "statefulsets", "daemonsets"}, "verbs": []any{"get", "list", "update"}},
		map[string]any{"apiGroups": []any{""}, "resources": []any{"pods"}, "verbs": []any{"list"}}}})
	must(t, "POST", group+ns+"/rolebindings", map[string]any{"metadata": map[string]any{"name": "blind"},
		"roleRef":  map[string]any{"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "blind"},
		"subjects": []any{map[string]any{"kind": "ServiceAccount", "namespace": "meshery-filters", "name": "meshery-filters"}}})
	c := base(t)
	_, err := applies(t.Context(), c, asked(t, c, ns, "modules:21900"))
	fails(t, err, problem.RightMissing, "verb watch", "resource deployments", ns)
	same(t, "the user's object", maker(t, ns), before)
}

func TestOfSeveralMakersOfPodsTheOneThatGaveUpIsNamed(t *testing.T) {
	slow := func(name, progressing string) *step {
		return &step{kind: makers[0], item: Item{Kind: "Deployment", Name: name, Shared: true}, live: map[string]any{
			"metadata": map[string]any{"generation": int64(1)}, "status": map[string]any{"observedGeneration": int64(1),
				"conditions": []any{map[string]any{"type": "Progressing", "status": progressing}}}}}
	}
	if s := stuck([]*step{slow("slow", "True"), slow("failed", "False")}); s == nil || s.item.Name != "failed" {
		t.Errorf("%v", s)
	}
	if s := stuck([]*step{slow("slow", "True")}); s != nil {
		t.Errorf("%v", s.item)
	}
}

func TestAChangeThatLeavesSomethingForTheChainBeforeIsFoundWhenItIsCutOff(t *testing.T) {
	ns := namespace(t)
	c := restarting(t, ns)
	shop(t, ns, map[string]any{upstreams: "db:5432"})
	for again, begun := range map[string]bool{"": false, "Deployment/" + ns + "/api": true} {
		p := asked(t, c, ns)
		if p.Version = "one"; begun {
			p.Again = []string{again}
		}
		apply(t, c, p)
		targets, err := c.Targets(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		found := false
		for _, b := range targets.Begun() {
			found = found || b.Target.Namespace == ns && len(b.Filters) == 1
		}
		if found != begun {
			t.Errorf("with %q left it is found: %v", again, found)
		}
		at, err := c.Target(t.Context(), p.Chain.Mesh, p.Chain.Target)
		if err != nil {
			t.Fatal(err)
		}
		read, err := c.Read(t.Context(), plan.Reads{Objects: []plan.Ref{{GroupKind: serviceDefaults.GroupKind(), Namespace: ns, Name: "api"}}})
		if err != nil {
			t.Fatal(err)
		}
		bare, ok := at.Bare(read.Objects[0])
		if spec := descend(bare, []string{"spec"}); !ok || spec["envoyExtensions"] != nil || spec["protocol"] != "http" {
			t.Errorf("without what is ours it is %v", spec)
		}
	}
}

func TestAStatefulSetsPodThatNeverGotReadyIsToBeDeletedByHand(t *testing.T) {
	for policy, said := range map[string]bool{"OrderedReady": true, "Parallel": false} {
		o := map[string]any{"spec": map[string]any{"podManagementPolicy": policy}}
		if text := byHand(makers[1].GroupKind(), o); strings.Contains(text, "delete that Pod") != said {
			t.Errorf("%s: %q", policy, text)
		}
		if text := byHand(makers[0].GroupKind(), o); text != "" {
			t.Errorf("of a Deployment: %q", text)
		}
	}
}

func TestWithoutTheRoleForUpstreamsTheMissingRightIsNamed(t *testing.T) {
	ns := namespace(t)
	shop(t, ns, nil)
	_, err := base(t).Read(t.Context(), plan.Reads{Selected: []plan.Ref{{GroupKind: schema.GroupKind{Kind: "Service"}, Namespace: ns, Name: "api"}}})
	fails(t, err, problem.RightMissing, "verb list", "resource deployments", ns)
}

func TestARunThatIsCutOffWhilePodsRestartIsTakenUpOrTakenBack(t *testing.T) {
	for name, goesOn := range map[string]bool{"taken up": true, "taken back": false} {
		t.Run(name, func(t *testing.T) {
			ns := namespace(t)
			c := restarting(t, ns)
			shop(t, ns, map[string]any{upstreams: "db:5432"})
			before := maker(t, ns)
			ctx, cut := context.WithCancel(t.Context())
			p := asked(t, c, ns, "modules:21900")
			done := make(chan error, 1)
			go func() {
				_, err := applies(ctx, c, p)
				done <- err
			}()
			eventually(t, func() bool { return upstreamsOf(t, ns) == "db:5432,modules:21900" })
			cut()
			if err := <-done; err == nil {
				t.Fatal("it was not cut off")
			}
			next := plan.Plan{Chain: chainOf(ns)}
			if goesOn {
				next = asked(t, c, ns, "modules:21900")
			}
			taken, _ := applying(t, c, next)
			if !goesOn {
				eventually(t, func() bool { return upstreamsOf(t, ns) == "db:5432" })
			}
			select {
			case err := <-taken:
				t.Fatalf("the Pods were not waited for: %v", err)
			case <-time.After(300 * time.Millisecond): // by when it would long have ended
			}
			if got := extensions(t, ns); got != "" {
				t.Errorf("before the Pods are back there is %q", got)
			}
			ready(t, ns)
			if err := <-taken; err != nil {
				t.Fatal(err)
			}
			if goesOn {
				if got := extensions(t, ns); got != "a" {
					t.Errorf("extensions %q", got)
				}
				taken, _ = applying(t, c, plan.Plan{Chain: chainOf(ns)})
				eventually(t, func() bool { return upstreamsOf(t, ns) == "db:5432" })
				ready(t, ns)
				if err := <-taken; err != nil {
					t.Fatal(err)
				}
			}
			same(t, "the user's object", maker(t, ns), before)
		})
	}
}
