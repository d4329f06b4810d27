package kube

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"

	"github.com/meshery/meshery-filters/internal/plan"
	"github.com/meshery/meshery-filters/internal/problem"
)

// Annotate gives an object of ours an annotation, beside what plans say of it. That it is not there is
// problem.ChainChanged.
func (c *Cluster) Annotate(ctx context.Context, ref plan.Ref, name, value string) error {
	s, err := c.kinds(ctx, root(ref.Group))
	if err != nil {
		return err
	}
	if len(s[ref.GroupKind]) == 0 {
		return problem.KindNotServed.New("%s: %s", c.Host, ref.GroupKind)
	}
	kind := s[ref.GroupKind][0]
	version, _ := kind.ToAPIVersionAndKind()
	item := Item{APIVersion: version, Kind: ref.Kind, Namespace: ref.Namespace, Name: ref.Name}
	if !item.fit() {
		return problem.Internal.New("%s is no name of an object", clean(item.String(), maxText))
	}
	k := (&step{kind: kind, item: item}).call(http.MethodPatch, "patch")
	k.media, k.query = "application/merge-patch+json", writing(false)
	if k.body, err = json.Marshal(map[string]any{"metadata": map[string]any{"annotations": map[string]any{name: value}}}); err != nil {
		return fmt.Errorf("encode an annotation: %w", err)
	}
	_, _, err = c.do(ctx, k)
	if _, ok := refusedWith(err, http.StatusNotFound); ok {
		return problem.ChainChanged.New("%s is not there any more", item)
	}
	return c.problemOf(err)
}
