package operation

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"
	"google.golang.org/protobuf/encoding/protojson"

	"github.com/meshery/meshery-filters/internal/filter"
	"github.com/meshery/meshery-filters/internal/plan"
	"github.com/meshery/meshery-filters/internal/problem"
)

// Plan says what an operation would make hold, target by target, without doing it. Modules from https are fetched and
// kept, so that applying afterwards needs no fetch; a Reader's have to be there already.
func (r *Runner) Plan(ctx context.Context, q Request) ([]Preview, error) {
	if q.ID == "" {
		q.ID = "preview"
	}
	var j job
	if _, err := r.decode(ctx, &j, q); errors.Is(err, problem.ClusterMissing) {
		return nil, problem.RenderOnly.New("%s", problem.Of(err).Details)
	} else if err != nil {
		return nil, err
	}
	if err := r.permit(j, q); err != nil {
		return nil, err
	}
	if j.Undo != nil {
		var elsewhere []place
		if r.isConsul(consulMesh, false) {
			elsewhere = append(elsewhere, r.inConsul())
		}
		if err := r.readUndo(ctx, &j, elsewhere, false); err != nil {
			return nil, err
		}
	}
	places, _ := r.own(j)
	keys := slices.Clone(j.Remove)
	for i, f := range j.Filters {
		find := func(ctx context.Context, f filter.Filter) (filter.Module, []byte, error) {
			return r.resolve(ctx, f, nil)
		}
		if q.Caller.Reader {
			find = r.known
		}
		module, _, err := find(ctx, f)
		if err != nil {
			return nil, named(f, err)
		}
		j.Filters[i].Spec.Module = module
		keys = append(keys, f.Key)
	}
	var previews []Preview
	found := false
	for _, pl := range places {
		next, err := r.next(ctx, pl, keys, pl.of(j.Filters))
		if err != nil {
			return nil, err
		}
		found = found || len(next) > 0
		for _, c := range next {
			p, err := r.preview(ctx, pl, c)
			if err != nil {
				return nil, err
			}
			previews = append(previews, p)
		}
	}
	for _, f := range j.Filters {
		if !slices.ContainsFunc(places, func(pl place) bool { return pl.backends[f.Spec.Mesh] != nil }) {
			_, err := r.here().backend(f.Spec.Mesh)
			return nil, err
		}
	}
	if !found && len(j.Remove) > 0 {
		return nil, problem.FilterNotFound.New("%s", keys[0])
	}
	return previews, nil
}

// next are the chains that taking the keys away and then applying the filters would leave in a place, of those that it
// touches.
func (r *Runner) next(ctx context.Context, pl place, keys []filter.Key, filters []filter.Filter) (chains []filter.Chain, err error) {
	held, err := pl.holding(ctx, keys...)
	if err != nil {
		return nil, err
	}
	at := map[string]int{}
	put := func(c filter.Chain) {
		i, ok := at[c.ID()]
		if !ok {
			i, chains = len(chains), append(chains, c)
			at[c.ID()] = i
		}
		chains[i] = c
	}
	for _, c := range held {
		for _, k := range keys {
			c = c.Without(k)
		}
		put(c)
	}
	for _, f := range filters {
		c := filter.Chain{Mesh: f.Spec.Mesh, Target: f.Spec.Target}
		if i, ok := at[c.ID()]; ok {
			c = chains[i]
		} else {
			b, err := pl.backend(f.Spec.Mesh)
			if err != nil {
				return nil, err
			}
			held, err := b.Committed(ctx, f.Spec.Target)
			if err != nil {
				return nil, fmt.Errorf("read the chain of %s: %w", f.Spec.Target, err)
			}
			c = held.Chain
		}
		put(c.With(f))
	}
	return chains, nil
}

// known finds a module whose bytes are kept already, or ship with the program.
func (r *Runner) known(ctx context.Context, f filter.Filter) (filter.Module, []byte, error) {
	m := f.Spec.Module
	if m.Inline != "" {
		data, err := m.Bytes()
		sum := sha256.Sum256(data)
		if digest := hex.EncodeToString(sum[:]); err == nil && m.SHA256 == "" {
			m.SHA256 = digest
		} else if err != nil || !strings.EqualFold(m.SHA256, digest) {
			return r.resolve(ctx, f, nil) // which says what is wrong with it
		}
	}
	if m.Inline == "" && m.URL == "" || m.SHA256 == "" {
		return r.resolve(ctx, f, nil)
	}
	f.Spec.Module = filter.Module{SHA256: m.SHA256}
	found, data, err := r.resolve(ctx, f, nil)
	if errors.Is(err, problem.ModuleUnavailable) {
		return found, nil, problem.RoleMissing.New("the adapter does not have the module yet, and neither fetches nor keeps one for the role read")
	}
	found.URL = m.URL
	return found, data, err
}

func (r *Runner) preview(ctx context.Context, pl place, c filter.Chain) (Preview, error) {
	b, err := pl.backend(c.Mesh)
	if err != nil {
		return Preview{}, err
	}
	// Secrets stay references in what is shown; the version is that of the real plan where it can be made.
	p, err := r.planResolved(ctx, b, c, c)
	if err != nil {
		return Preview{}, err
	}
	real := p
	if len(c.Secrets()) > 0 {
		if real, err = r.plan(ctx, b, c); err != nil {
			return Preview{}, err
		}
	}
	out := Preview{Target: c.Target, Mesh: c.Mesh, Version: real.Version, Order: c.Names(), Losses: p.Losses}
	if in, ok := b.(*clusterBackend); ok {
		out.YAML, out.Changes, err = in.preview(ctx, p, real)
	} else {
		out.YAML, err = render(p)
	}
	return out, err
}

// render writes a plan's resources as YAML, with module bytes replaced by their length and digest: nobody reads base64.
func render(p plan.Plan) (string, error) {
	var out bytes.Buffer
	enc := yaml.NewEncoder(&out)
	enc.SetIndent(2)
	for _, res := range p.Resources {
		data, err := protojson.Marshal(res)
		if err != nil {
			return "", fmt.Errorf("render %s: %w", res.TypeUrl, err)
		}
		var tree map[string]any
		if err := json.Unmarshal(data, &tree); err != nil {
			return "", fmt.Errorf("render %s: %w", res.TypeUrl, err)
		}
		elide(tree)
		if err := enc.Encode(tree); err != nil {
			return "", fmt.Errorf("render %s: %w", res.TypeUrl, err)
		}
	}
	return out.String(), nil
}

func elide(v any) {
	switch t := v.(type) {
	case []any:
		for _, e := range t {
			elide(e)
		}
	case map[string]any:
		for k, e := range t {
			if s, ok := e.(string); ok && k == "inlineBytes" {
				module, err := base64.StdEncoding.DecodeString(s)
				if err != nil { // protojson wrote it
					panic(err)
				}
				t[k] = fmt.Sprintf("<%d bytes, sha256 %x>", len(module), sha256.Sum256(module))
				continue
			}
			elide(e)
		}
	}
}
