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
		if err := r.readUndo(ctx, &j, nil, false); err != nil {
			return nil, err
		}
	}
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
	held, err := r.here().holding(ctx, keys...)
	if err != nil {
		return nil, err
	}
	if len(held) == 0 && len(j.Remove) > 0 {
		return nil, problem.FilterNotFound.New("%s", keys[0])
	}
	next := map[string]filter.Chain{}
	var order []string
	put := func(c filter.Chain) {
		if _, ok := next[c.ID()]; !ok {
			order = append(order, c.ID())
		}
		next[c.ID()] = c
	}
	for _, c := range held {
		for _, k := range keys {
			c = c.Without(k)
		}
		put(c)
	}
	for _, f := range j.Filters {
		id := filter.Chain{Mesh: f.Spec.Mesh, Target: f.Spec.Target}.ID()
		c, ok := next[id]
		if !ok {
			b, err := r.here().backend(f.Spec.Mesh)
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
	var previews []Preview
	for _, id := range order {
		p, err := r.preview(ctx, next[id])
		if err != nil {
			return nil, err
		}
		previews = append(previews, p)
	}
	return previews, nil
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

func (r *Runner) preview(ctx context.Context, c filter.Chain) (Preview, error) {
	b, err := r.here().backend(c.Mesh)
	if err != nil {
		return Preview{}, err
	}
	// Secrets stay references in what is shown; the version is that of the real plan where it can be made.
	p, err := r.planResolved(ctx, b, c, c)
	if err != nil {
		return Preview{}, err
	}
	text, err := render(p)
	if err != nil {
		return Preview{}, err
	}
	if len(c.Secrets()) > 0 {
		real, err := r.plan(ctx, b, c)
		if err != nil {
			return Preview{}, err
		}
		p.Version = real.Version
	}
	return Preview{Target: c.Target, Mesh: c.Mesh, Version: p.Version, Order: c.Names(), YAML: text, Losses: p.Losses}, nil
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
