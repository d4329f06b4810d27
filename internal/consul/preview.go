package consul

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/meshery/meshery-filters/internal/plan"
)

// Preview gives the entries that applying a plan would leave, as `consul config write` takes them, and what would become of
// the entries and of our filters in them. What is shown has references for the secrets of the real plan.
func (t *Target) Preview(ctx context.Context, shown, real plan.Plan) (text string, changes []plan.Change, err error) {
	steps, next, err := t.prepare(ctx, real)
	if err != nil {
		return "", nil, err
	}
	names := t.names(next)
	for _, s := range steps {
		raw := s.decide(names)
		if s.action != plan.Unchanged || s.ours != nil {
			changes = append(changes, plan.Change{Subject: s.entry.String(), Action: s.action})
			changes = append(changes, s.filters(raw, names)...)
		}
	}
	if steps, _, err = t.prepare(ctx, shown); err != nil {
		return "", nil, err
	}
	for _, s := range steps {
		raw := s.decide(names)
		if raw == nil {
			continue
		}
		data, err := json.MarshalIndent(printable(raw, names), "", "  ")
		if err != nil {
			return "", nil, fmt.Errorf("show %s: %w", s.entry, err)
		}
		text += string(data) + "\n"
	}
	return text, changes, nil
}

// filters tell what would become of those in an entry.
func (s *step) filters(raw map[string]any, names []string) (changes []plan.Change) {
	was, is := byPlugin(s.entry), byPlugin(entry{raw: raw})
	for _, name := range names {
		before, had := was[name]
		after, has := is[name]
		action := plan.Updated
		switch {
		case !had && !has, had && has && before == after:
			continue
		case !had:
			action = plan.Created
		case !has:
			action = plan.Deleted
		}
		filter := strings.Replace(strings.TrimPrefix(name, plugins), ".", "/", 1)
		changes = append(changes, plan.Change{Subject: fmt.Sprintf("%s: filter %s", s.entry, filter), Action: action})
	}
	if s.action == plan.Updated && changes == nil {
		changes = []plan.Change{{Subject: fmt.Sprintf("%s: order of its filters", s.entry), Action: plan.Updated}}
	}
	return changes
}

// byPlugin are the extensions of an entry by the names of their plugins, in a form that can be compared.
func byPlugin(e entry) map[string]string {
	all := map[string]string{}
	for _, x := range e.extensions() {
		all[pluginOf(x)] = canonical(plain(x))
	}
	return all
}

// printable is an entry without what our filters of other targets are configured with, which may be secrets.
func printable(raw map[string]any, names []string) map[string]any {
	raw = maps.Clone(raw)
	list, _ := raw["EnvoyExtensions"].([]any)
	list = slices.Clone(list)
	for i, v := range list {
		x, _ := v.(map[string]any)
		if name := pluginOf(x); strings.HasPrefix(name, plugins) && !slices.Contains(names, name) {
			list[i] = map[string]any{"Name": field(x, "name"), "Required": field(x, "required") == true,
				"Arguments": map[string]any{"PluginConfig": map[string]any{"Name": name, "Configuration": "<as another target has it>"}}}
		}
	}
	if list != nil {
		raw["EnvoyExtensions"] = list
	}
	return raw
}
