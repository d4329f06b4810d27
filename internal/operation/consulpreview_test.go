package operation_test

import (
	"encoding/json"
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/meshery/meshery-filters/internal/operation"
	"github.com/meshery/meshery-filters/internal/plan"
	"github.com/meshery/meshery-filters/internal/problem"
)

// plan is the one preview of a request.
func (r *consulRig) plan(q operation.Request) operation.Preview {
	r.t.Helper()
	all, err := r.runner.Plan(r.t.Context(), q)
	if err != nil || len(all) != 1 {
		r.t.Fatalf("%v %v", all, err)
	}
	return all[0]
}

// lines are what would change.
func lines(changes []plan.Change) (all []string) {
	for _, c := range changes {
		all = append(all, c.String())
	}
	return all
}

func TestAPreviewIsWhatConsulThenHolds(t *testing.T) {
	r := newConsulRig(t)
	r.user(map[string]any{"Kind": "service-defaults", "Name": "api", "Protocol": "http", "Meta": map[string]any{"owner": "them"},
		"UpstreamConfig": map[string]any{"Defaults": map[string]any{"ConnectTimeoutMs": 1500}}, "EnvoyExtensions": []any{lua("before")}})
	was := r.entry("service-defaults", "api")
	// holds writes what is shown, as a user would, and compares the entry with what an operation makes of it.
	holds := func(q operation.Request, changes ...string) {
		t.Helper()
		shown := r.plan(q)
		if got := lines(shown.Changes); !slices.Equal(got, changes) {
			t.Errorf("%s: the changes are %q", shown.Target, got)
		}
		r.ok(q)
		is := r.entry("service-defaults", "api")
		var entry map[string]any
		if err := json.Unmarshal([]byte(shown.YAML), &entry); err != nil {
			t.Fatalf("%v: %s", err, shown.YAML)
		}
		if err := r.Write(t.Context(), entry); err != nil {
			t.Fatal(err)
		}
		if now := r.entry("service-defaults", "api"); now != is {
			t.Errorf("what is shown makes\n%s\nand the operation\n%s", now, is)
		}
		if q.Operation == "remove_filter" {
			return
		}
		if again := r.plan(q); !slices.Equal(lines(again.Changes), []string{"service-defaults/api unchanged"}) {
			t.Errorf("%v", again.Changes)
		}
	}
	const updated = "service-defaults/api updated"
	holds(apply(onAPI("hello")), updated, "service-defaults/api: filter default/hello created")
	holds(apply(onAPI("hello", "config: {response: {x-hello: again}}")), updated, "service-defaults/api: filter default/hello updated")
	holds(apply(onAPI("other", "phase: authn")), updated, "service-defaults/api: filter default/other created")
	if p := r.plan(apply(onAPI("other", "phase: authn"))); len(p.Losses) != 1 || !slices.Equal(p.Order, []string{"default/other", "default/hello"}) {
		t.Errorf("%+v", p)
	}
	if got := lines(r.plan(undo("hello", 0)).Changes); !slices.Equal(got, []string{updated, "service-defaults/api: filter default/hello updated"}) {
		t.Errorf("an undo's changes are %q", got)
	}
	// Who only removes names no mesh.
	holds(remove(doc("other")), updated, "service-defaults/api: filter default/other removed")
	holds(remove(doc("hello", "mesh: consul")), updated, "service-defaults/api: filter default/hello removed")
	if now := r.entry("service-defaults", "api"); now != was {
		t.Errorf("it was\n%s\nand is\n%s", was, now)
	}
	if _, err := r.runner.Plan(t.Context(), remove(doc("hello"))); !errors.Is(err, problem.FilterNotFound) {
		t.Error(err)
	}
}

func TestAPreviewOfAnEntryThatIsMadeAndGoesAgain(t *testing.T) {
	r := newConsulRig(t)
	p := r.plan(apply(onAPI("hello")))
	if got := lines(p.Changes); !slices.Equal(got, []string{"service-defaults/api created", "service-defaults/api: filter default/hello created"}) ||
		!strings.Contains(p.YAML, `"managed-by": "meshery-filters"`) {
		t.Errorf("%q %s", got, p.YAML)
	}
	if e := r.entry("service-defaults", "api"); e != "" {
		t.Errorf("a preview wrote %s", e)
	}
	r.ok(apply(onAPI("hello")))
	p = r.plan(remove(doc("hello", "mesh: consul")))
	if got := lines(p.Changes); !slices.Equal(got, []string{"service-defaults/api removed", "service-defaults/api: filter default/hello removed"}) || p.YAML != "" {
		t.Errorf("%q %s", got, p.YAML)
	}
	r.ok(remove(doc("hello", "mesh: consul")))
}

func TestAPreviewShowsNoSecretThatIsInConsul(t *testing.T) {
	r := newConsulRigOf(t, func(o *operation.Options) { o.AllowWideTargets = true })
	r.speaks()
	secret := func(name string) string {
		return onAPI(name, "config: {response: {x-key: {$secret: {name: imagehub, key: token-key}}}}")
	}
	r.ok(apply(secret("hello")))
	// Another target's filter in the same entry.
	other := strings.Replace(onAPI("other", "config: {response: {x-other: there}}"), "name: api", "name: api, namespace: shop", 1)
	if e := r.entry("service-defaults", "api"); !strings.Contains(e, hubKey) {
		t.Fatalf("the secret is not there: %s", e)
	}
	for _, q := range []operation.Request{apply(other), apply(secret("hello")), apply(onAPI("third"))} {
		if p := r.plan(q); strings.Contains(p.YAML, hubKey) || !strings.Contains(p.YAML, "meshery.filters/default.hello") {
			t.Errorf("%s", p.YAML)
		}
	}
	if got := lines(r.plan(apply(secret("hello"))).Changes); !slices.Equal(got, []string{"service-defaults/api unchanged"}) {
		t.Errorf("%q", got)
	}
	r.ok(remove(doc("hello", "mesh: consul")))
}
