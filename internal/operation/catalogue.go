package operation

import (
	"context"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"
	"sync"

	"github.com/meshery/meshery-filters/internal/filter"
	"github.com/meshery/meshery-filters/internal/mesh"
	"github.com/meshery/meshery-filters/internal/problem"
)

// useCase is a row with what it does. apply and remove validate a request into a job, at once and without effect; a
// nil remove refuses deletion. run makes the job true and returns the last event.
type useCase struct {
	Row
	apply  func(context.Context, *job, Request) error
	remove func(context.Context, *job, Request) error
	run    func(context.Context, *story, job) (summary, details string, err error)
	// clusters says that it works on the clusters that a request brings.
	clusters bool
}

const (
	opCustom   = "custom"
	opApply    = "apply_filter"
	opRemove   = "remove_filter"
	opImageHub = "imagehub"
	opLimiter  = "imagehub_rate_limit"
	opStatus   = "filters_status"

	bodyDocuments = "Filter documents"
	bodyNone      = "none"
)

var keyForm = regexp.MustCompile(`^[a-z0-9]([a-z0-9_-]{0,62}[a-z0-9])?$`)

// useCases is the catalogue, in the order of the README's table.
func (r *Runner) useCases() ([]useCase, error) {
	all := []useCase{
		{Row{opCustom, "Apply Filter documents", Custom, bodyDocuments, "removes them"}, r.readApply, r.readRemove, r.runFilters, true},
		{Row{opApply, "Apply filter", Custom, bodyDocuments, "removes them"}, r.readApply, r.readRemove, r.runFilters, true},
		{Row{opRemove, "Remove filter", Custom, bodyDocuments, "refused"}, r.readRemove, nil, r.runFilters, true},
		{Row{opImageHub, "Image Hub", SampleApplication, bodyNone, "removes the application"}, r.readImageHub, r.readImageHub, r.runImageHub, true},
		r.limiter(),
	}
	for _, key := range slices.Sorted(maps.Keys(r.Prepared)) {
		all = append(all, r.prepared(key, "Filter: "+strings.ReplaceAll(key, "_", " "), "removes that filter", r.Prepared[key]))
	}
	limiter := all[4]
	all = append(all,
		useCase{Row{ComponentName, "Image Hub with its rate limit filter", Install, bodyNone, "removes both"}, limiter.apply, limiter.remove, r.runInstall, true},
		useCase{Row{opStatus, "Status of filters", Validate, bodyNone, "refused"}, nothing, nil, r.runStatus, true},
	)
	seen := map[string]bool{}
	for _, u := range all {
		if !keyForm.MatchString(u.Key) || seen[u.Key] {
			return nil, problem.InvalidConfiguration.New("operations folder: %q cannot be an operation's key: use lower-case letters, digits, dashes and underscores, and no key that is taken", clip(u.Key))
		}
		seen[u.Key] = true
	}
	for key, doc := range r.Prepared {
		if _, err := r.read(doc, "", r.Own != nil, r.Consul != nil, func() (string, error) { return mesh.Envoy{}.Name(), nil }); err != nil {
			return nil, fmt.Errorf("operations folder: %s: %w", key, err)
		}
	}
	return all, nil
}

// prepared is an operation whose documents are known beforehand, so that a body, which a menu may send stale, is ignored.
func (r *Runner) prepared(key, description, deletion, doc string) useCase {
	fixed := func(read func(context.Context, *job, Request) error) func(context.Context, *job, Request) error {
		return func(ctx context.Context, j *job, q Request) error {
			q.Body, q.Kubeconfigs = doc, nil
			return read(ctx, j, q)
		}
	}
	return useCase{Row{key, description, Configure, bodyNone, deletion}, fixed(r.readApply), fixed(r.readRemove), r.runFilters, false}
}

func nothing(context.Context, *job, Request) error { return nil }

// readApply takes Filter documents to apply.
func (r *Runner) readApply(ctx context.Context, j *job, q Request) (err error) {
	if strings.TrimSpace(q.Body) == "" {
		return problem.BodyMissing.New("%s", q.Operation)
	}
	if q.Operation == opCustom {
		u, found, err := filter.ReadUndo([]byte(q.Body), q.Namespace)
		if err != nil {
			return err
		}
		if found {
			j.Undo = &undo{u.Key(q.Namespace), uint64(u.Spec.Revision)}
			return nil
		}
	}
	j.Filters, err = r.read(q.Body, q.Namespace, r.Own != nil || len(q.Kubeconfigs) > 0, r.isConsul(consulMesh, len(q.Kubeconfigs) > 0) && !j.InClusters,
		sync.OnceValues(func() (string, error) {
			if q.Implied {
				return r.shown(ctx, nil)
			}
			return r.shown(ctx, q.Kubeconfigs)
		}))
	return err
}

// readRemove takes Filter documents whose names are to be removed.
func (r *Runner) readRemove(_ context.Context, j *job, q Request) error {
	if strings.TrimSpace(q.Body) == "" {
		return problem.BodyMissing.New("%s", q.Operation)
	}
	filters, err := filter.ReadKeys([]byte(q.Body), q.Namespace)
	if err != nil {
		return err
	}
	for _, f := range filters {
		if f.Spec.Mesh != meshAuto {
			if _, err := mesh.Find(f.Spec.Mesh); err != nil {
				return err
			}
		}
		// With the rights of a request's own kubeconfig whoever sends it could do it without the adapter.
		own := r.Own != nil || r.isConsul(f.Spec.Mesh, len(q.Kubeconfigs) > 0) || r.Consul != nil && f.Spec.Mesh == meshAuto
		if own && !r.AllowWideTargets && f.Spec.Mesh != (mesh.Envoy{}).Name() && q.Namespace != "" && f.Key.Namespace != q.Namespace {
			return problem.TargetTooWide.New("%s is in another namespace than the request, which is in %s", f.Key, q.Namespace)
		}
		j.Remove, j.Meshes = append(j.Remove, f.Key), append(j.Meshes, f.Spec.Mesh)
	}
	if len(filters) == 1 {
		j.Component = filters[0].Labels[filter.ComponentLabel]
	}
	if slices.Contains(j.Meshes, meshAuto) {
		j.Meshes = nil
	}
	pt := of(filters)
	j.Wait, j.Rollout = pt.wait, pt.rollout
	return nil
}

// mesheryScheme begins the address of a filter that is stored in Meshery.
const mesheryScheme = "meshery://"

var storedForm = regexp.MustCompile(`^meshery://[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}$`)

// meshAuto is what spec.mesh says where it is left to the adapter.
const meshAuto = "auto"

// read decodes, validates and completes documents for the meshes they are for. clusters says whether there are any, consul
// whether Consul's filters go to the adapter's own, and auto which mesh is meant where none is named.
func (r *Runner) read(body, namespace string, clusters, consul bool, auto func() (string, error)) ([]filter.Filter, error) {
	filters, err := filter.Read([]byte(body), namespace)
	if err != nil {
		return nil, err
	}
	var mistakes []problem.Field
	onTarget := map[string]int{}
	at := func(i int, field string) string {
		if len(filters) > 1 {
			return fmt.Sprintf("documents[%d].%s", i, field)
		}
		return field
	}
	for i, f := range filters {
		if f.Spec.Mesh == meshAuto {
			if filters[i].Spec.Mesh, err = auto(); err != nil {
				return nil, named(f, err)
			}
		}
	}
	if !r.AllowWideTargets {
		for i, f := range filters {
			if field, cause := wide(f, namespace); cause != "" {
				mistakes = append(mistakes, problem.Field{Path: at(i, field), Cause: cause,
					Remedy: "name a narrower target, or set allowWideTargets in the adapter's configuration"})
			}
		}
		if err := problem.TargetTooWide.WithFields("", mistakes); err != nil {
			return nil, err
		}
	}
	for i, f := range filters {
		m, err := mesh.Find(f.Spec.Mesh)
		if err != nil {
			return nil, err
		}
		if m.OwnRights() && r.Backends[f.Spec.Mesh] == nil {
			return nil, problem.MeshNotSupported.New("%s: spec.mesh is %s, and no adapter is there that drives it", f.Key, f.Spec.Mesh)
		}
		own := m.OwnRights() || consul && f.Spec.Mesh == consulMesh
		if !own && !clusters {
			return nil, problem.ClusterMissing.New("%s: spec.mesh is %s", f.Key, f.Spec.Mesh)
		}
		if f, err = m.Complete(f); err != nil {
			return nil, err
		}
		if !own {
			mistakes = append(mistakes, r.secretsAway(f, func(field string) string { return at(i, field) })...)
		}
		switch mod := f.Spec.Module; {
		case mod.File != "":
			mistakes = append(mistakes, problem.Field{Path: at(i, "spec.module.file"), Cause: "the adapter does not read files of its own machine for others",
				Remedy: "use `meshery-filters apply -f`, which reads the file and sends it, or module.inline"})
		case mod.Builtin != "" && !slices.Contains(r.ModuleNames, mod.Builtin):
			mistakes = append(mistakes, problem.Field{Path: at(i, "spec.module.builtin"), Cause: fmt.Sprintf("there is no builtin %q", clip(mod.Builtin)),
				Remedy: "use one of " + strings.Join(r.ModuleNames, ", ")})
		case strings.HasPrefix(mod.URL, mesheryScheme) && !r.StoredFilters:
			mistakes = append(mistakes, problem.Field{Path: at(i, "spec.module.url"), Cause: "the adapter knows no Meshery Server where the filter is stored",
				Remedy: "set mesheryServer and meshery.tokenFile in the adapter's configuration, or use https:// with sha256, oci://, or module.inline"})
		case strings.HasPrefix(mod.URL, mesheryScheme) && !storedForm.MatchString(mod.URL):
			mistakes = append(mistakes, problem.Field{Path: at(i, "spec.module.url"), Cause: fmt.Sprintf("%q is not the id of a filter in Meshery", clip(mod.URL)),
				Remedy: "write meshery://ID; `meshery-filters meshery filters list` shows the ids"})
		}
		filters[i] = f
		onTarget[f.Spec.Target.String()]++
	}
	for target, n := range onTarget {
		if n > maxChain {
			return nil, tooMany(target, n)
		}
	}
	return filters, problem.InvalidDocument.WithFields("", mistakes)
}
