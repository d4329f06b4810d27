package operation

import (
	"context"
	"fmt"

	"github.com/meshery/meshery-filters/internal/filter"
	"github.com/meshery/meshery-filters/internal/problem"
)

// secretsOf gives secrets by name and key, and remembers their values so that they can be hidden wherever a proxy or a filter
// quotes one. Those of a filter in a cluster are Secrets of its own namespace there, read with the rights of the request;
// without a cluster they are the adapter's.
func (r *Runner) secretsOf(ctx context.Context, c Cluster, f filter.Filter) func(name, key string) (string, error) {
	return func(name, key string) (v string, err error) {
		if c == nil {
			v, err = r.Secret(name, key)
		} else {
			v, err = c.Secret(ctx, f.Key.Namespace, name, key)
		}
		if err == nil && len(v) >= leastHidden {
			r.hide(v)
		}
		return v, err
	}
}

// lookup resolves the references of a filter.
func (r *Runner) lookup(ctx context.Context, c Cluster, f filter.Filter) func(filter.SecretRef) (string, error) {
	secrets := r.secretsOf(ctx, c, f)
	return func(ref filter.SecretRef) (string, error) { return secrets(ref.Name, ref.Key) }
}

// pullSecret gives what a filter's image is pulled with, from the first of the places that has it.
func (r *Runner) pullSecret(ctx context.Context, f filter.Filter, places []place) func(name, key string) (string, error) {
	return func(name, key string) (string, error) {
		var asked []place
		var errs []error
		for _, pl := range places {
			if pl.cluster == nil || pl.backends[f.Spec.Mesh] == nil {
				continue
			}
			v, err := r.secretsOf(ctx, pl.cluster, f)(name, key)
			if err == nil {
				return v, nil
			}
			asked, errs = append(asked, pl), append(errs, err)
		}
		if len(errs) == 0 {
			return "", problem.ClusterMissing.New("%s is pulled with the Secret %s", f.Key, name)
		}
		return "", together(asked, errs)
	}
}

// secretThere says whether a filter has references that are resolved in each cluster by itself.
func (r *Runner) secretThere(f filter.Filter) bool {
	return r.Backends[f.Spec.Mesh] == nil && len(f.Secrets()) > 0
}

// clusterOf is the cluster of a backend, if it has one.
func clusterOf(b Backend) Cluster {
	if in, ok := b.(*clusterBackend); ok {
		return in.cluster
	}
	return nil
}

// secretsAway says what is wrong with secrets that would leave their namespace, which is the filter's, for that of its target.
// In a Mesh's or another one they would be shown to those who may look there. Istio reads a pull secret only beside the object
// that names it.
func (r *Runner) secretsAway(f filter.Filter, at func(field string) string) (mistakes []problem.Field) {
	if f.Spec.Target.Namespace == f.Key.Namespace {
		return nil
	}
	cause := fmt.Sprintf("Secrets are read from the filter's namespace %s, and its target is in %s", f.Key.Namespace, f.Spec.Target.Namespace)
	if refs := f.Secrets(); len(refs) > 0 && !r.AllowWideTargets {
		mistakes = append(mistakes, problem.Field{Path: at("spec.config"), Cause: cause + ": " + refs[0].String(),
			Remedy: "put the filter into the target's namespace, or set allowWideTargets in the adapter's configuration"})
	}
	if f.Spec.Module.PullSecret != "" {
		mistakes = append(mistakes, problem.Field{Path: at("spec.module.pullSecret"), Cause: cause, Remedy: "put the filter into the target's namespace"})
	}
	return mistakes
}
