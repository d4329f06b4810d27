package consul

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"

	"golang.org/x/sync/errgroup"

	"github.com/meshery/meshery-filters/internal/plan"
	"github.com/meshery/meshery-filters/internal/problem"
)

// hold keeps an inventory.
func (c *Client) hold(ctx context.Context, t *testing.T, v inventory) inventory {
	t.Helper()
	kept, err := c.keep(ctx, v)
	if err != nil {
		t.Fatal(err)
	}
	return kept
}

func TestADamagedKeyConcernsItsTargetOnly(t *testing.T) {
	c := newClient(t)
	ctx := t.Context()
	api, web := on("api", 1), on("web", 1)
	c.hold(ctx, t, api)
	c.hold(ctx, t, web)
	damaged := inventoryKey(api.Chain.Mesh, api.Chain.Target)
	for what, value := range map[string]any{"no JSON": "nonsense", "another target's": web} {
		if err := shared.consul.Send(ctx, "PUT", "/v1/kv/"+damaged, value, nil); err != nil {
			t.Fatal(err)
		}
		all, err := c.Targets(ctx)
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		if chains := all.Chains(); len(chains) != 1 || chains[0].ID() != web.Chain.ID() {
			t.Errorf("%s: %v", what, chains)
		}
		if d := all.Damaged(); len(d) != 1 || !errors.Is(d[0], problem.ConsulDamaged) || !strings.Contains(d[0].Error(), damaged) {
			t.Errorf("%s: %v", what, d)
		}
		if err := all.Target(api.Chain.Mesh, api.Chain.Target).Damaged(); !errors.Is(err, problem.ConsulDamaged) {
			t.Errorf("%s: %v", what, err)
		}
		if err := all.Target(web.Chain.Mesh, web.Chain.Target).Damaged(); err != nil {
			t.Errorf("%s: %v", what, err)
		}
		if _, err := c.Target(ctx, api.Chain.Mesh, api.Chain.Target); !errors.Is(err, problem.ConsulDamaged) {
			t.Errorf("%s: %v", what, err)
		}
		// A filter that is new on a target has the others looked through.
		fresh := on("third", 1)
		third, err := c.Target(ctx, fresh.Chain.Mesh, fresh.Chain.Target)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := third.Diff(ctx, plan.Plan{Chain: fresh.Chain}); err != nil {
			t.Errorf("%s: %v", what, err)
		}
	}
}

func TestInventoriesThatAreTooMuchForOneAnswerAreReadOneByOne(t *testing.T) {
	c := newClient(t)
	var g errgroup.Group
	g.SetLimit(4)
	const n = 30
	for i := range n {
		g.Go(func() error {
			_, err := c.keep(t.Context(), on(fmt.Sprintf("service-%02d", i), 490<<10))
			return err
		})
	}
	if err := g.Wait(); err != nil {
		t.Fatal(err)
	}
	if _, err := c.get(t.Context(), call{path: "/v1/kv/" + prefix, query: map[string][]string{"recurse": {"true"}}}, new([]pair)); !errors.Is(err, errTooLarge) {
		t.Fatalf("one answer has it all: %v", err)
	}
	all, err := c.Targets(t.Context())
	if err != nil || len(all.Chains()) != n || len(all.Damaged()) > 0 {
		t.Fatalf("%d %v", len(all.Chains()), err)
	}
	for i, chain := range all.Chains() {
		if want := fmt.Sprintf("service-%02d", i); chain.Target.Name != want {
			t.Errorf("%s stands where %s should", chain.Target.Name, want)
		}
	}
}
