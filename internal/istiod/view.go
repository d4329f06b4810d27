package istiod

import (
	"bufio"
	"bytes"
	"cmp"
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	wasm "github.com/envoyproxy/go-control-plane/envoy/extensions/wasm/v3"
)

// view is what a proxy has of filters that are ours, by its own word or by istiod's.
type view struct {
	all     bool              // also of others, whose subjects are their names
	lists   [][]listed        // the lists of filters of the listeners that take requests
	warming [][]listed        // of listeners that wait for something
	configs map[string]*entry // by subject: what came by extension configuration discovery
	failed  []failure         // listeners that the proxy refused
	stats   stats
}

// listed is one filter in a list.
type listed struct {
	subject string
	entry   *entry // nil when it comes by discovery
}

// entry is one filter's configuration.
type entry struct {
	name    string             // what the proxy calls the filter
	kind    string             // Wasm, or RBAC where Istio's agent has put one in its place
	plugin  *wasm.PluginConfig // nil when it is none of Wasm's or cannot be read
	updated time.Time          // when the proxy got it; zero when that is not told
}

type failure struct {
	lists   [][]listed
	details string // the proxy's own text
}

// stats are a proxy's. It may be told to leave some out.
type stats struct {
	vms           *uint64 // running sandboxes
	workers       uint64  // threads; 0 when that is not told
	fetchFailures uint64  // of modules that the proxy fetches itself
	fetched       uint64
	accepted      map[string]time.Time // by a filter's name, when its configuration was last accepted
}

// missing says what of the filters is not there, or which of the dropped ones is; empty means that all is as it should be.
func (v *view) missing(wants []want, dropped []string) string {
	for _, x := range wants {
		found := false
		for _, list := range v.lists {
			for _, l := range list {
				if l.subject != x.subject {
					continue
				}
				found = true
				if why := v.differs(x, l); why != "" {
					return x.subject + ": " + why
				}
			}
		}
		if !found {
			return x.subject + " is in none of its listeners"
		}
	}
	for _, list := range v.lists {
		last := -1
		for _, l := range list {
			at := slices.IndexFunc(wants, func(x want) bool { return x.subject == l.subject })
			if at >= 0 && at < last {
				return "the filters stand in another order"
			}
			last = max(last, at)
		}
	}
	for _, list := range slices.Concat(v.lists, v.warming) {
		for _, l := range list {
			if slices.Contains(dropped, objectOf(l.subject)) {
				return l.subject + " is still there"
			}
		}
	}
	for _, list := range v.warming {
		for _, l := range list {
			if slices.ContainsFunc(wants, func(x want) bool { return x.subject == l.subject }) {
				return "a listener with " + l.subject + " does not take requests yet"
			}
		}
	}
	return ""
}

// differs says how a listed filter is not the one that is wanted.
func (v *view) differs(x want, l listed) string {
	e := l.entry
	if e == nil {
		e = v.configs[l.subject]
	}
	switch {
	case e == nil:
		return "it has no configuration yet"
	case e.kind == "RBAC":
		return replacement
	case e.plugin == nil:
		return "it is a filter of another kind"
	}
	if accepted, ok := v.stats.accepted[e.name]; ok && e.updated.After(accepted) {
		return "its configuration is not accepted" // the proxy shows what it refused in place of what it runs
	}
	return x.differs(e.plugin)
}

const replacement = "Istio's agent could not fetch its module, and has put a filter into its place that denies every request or, with failurePolicy open, none"

// replaced says which of the filters has another in its place, and why.
func (v *view) replaced(wants []want) string {
	for _, x := range wants {
		if e := v.configs[x.subject]; e != nil && e.kind == "RBAC" {
			return x.subject + ": " + replacement
		}
	}
	return ""
}

// refused says why the proxy cannot run the filters, which it has; before is how often it had failed to fetch modules
// when it did not have them. Empty: nothing speaks against it.
func (v *view) refused(wants []want, before uint64) string {
	for _, x := range wants {
		for _, f := range v.failed {
			for _, list := range f.lists {
				for _, l := range list {
					if l.subject == x.subject && l.entry != nil && l.entry.plugin != nil && x.differs(l.entry.plugin) == "" {
						return f.details
					}
				}
			}
		}
		e := v.configs[x.subject]
		if e != nil && e.plugin.GetVmConfig().GetCode().GetRemote() != nil && v.differs(x, listed{subject: x.subject}) == "" && v.stats.fetchFailures > before {
			return fmt.Sprintf("%s: it acknowledged, and could not fetch the module or got another than was meant (wasm.remote_load_fetch_failures rose from %d to %d)", x.subject, before, v.stats.fetchFailures)
		}
	}
	return ""
}

// failing says whether the proxy has refused a listener that has one of the filters.
func (v *view) failing(wants []want) bool {
	return slices.ContainsFunc(v.failed, func(f failure) bool {
		return slices.ContainsFunc(slices.Concat(f.lists...), func(l listed) bool {
			return slices.ContainsFunc(wants, func(x want) bool { return x.subject == l.subject })
		})
	})
}

// untold says whether the proxy does not tell of one of the filters which configuration it accepted. It may then show one
// that it refused.
func (v *view) untold(wants []want) bool {
	return slices.ContainsFunc(wants, func(x want) bool {
		e := v.configs[x.subject]
		if e == nil {
			return false
		}
		_, told := v.stats.accepted[e.name]
		return !told
	})
}

// unloaded says why the filters, which the proxy has, cannot be running, or not yet.
func (v *view) unloaded(wants []want) string {
	// Each worker has a sandbox of its own. One that could not configure it lets requests pass the filter by, and has none.
	if least := v.sandboxes(wants) * (v.stats.workers + 1); v.stats.vms != nil && *v.stats.vms < least {
		return fmt.Sprintf("it acknowledged, and has %d of the %d sandboxes that the filters need: its workers are loading the module, or could not, which only the proxy's log tells", *v.stats.vms, least)
	}
	for _, x := range wants {
		if v.configs[x.subject] != nil && v.configs[x.subject].plugin.GetVmConfig().GetCode().GetRemote() != nil && v.stats.fetched == 0 {
			return x.subject + ": it acknowledged, and is fetching the module"
		}
	}
	return ""
}

// sandboxes is how many the filters need at least in one thread: those with the same name and module share one.
func (v *view) sandboxes(wants []want) uint64 {
	all := map[string]bool{}
	for _, x := range wants {
		for _, list := range v.lists {
			for _, l := range list {
				e := cmp.Or(l.entry, v.configs[l.subject])
				if l.subject == x.subject && e != nil {
					all[e.plugin.GetVmConfig().GetVmId()+"|"+x.digest] = true
				}
			}
		}
	}
	return uint64(len(all))
}

// field finds a field by protobuf's own name, in either of the forms that JSON has for it: http_filters, httpFilters.
func field(m map[string]any, name string) any {
	if v, ok := m[name]; ok {
		return v
	}
	words := strings.Split(name, "_")
	for i, w := range words[1:] {
		words[i+1] = strings.ToUpper(w[:1]) + w[1:]
	}
	return m[strings.Join(words, "")]
}

func object(v any) map[string]any { m, _ := v.(map[string]any); return m }

func text(v any) string { s, _ := v.(string); return s }

func list(v any) []any { l, _ := v.([]any); return l }

// kindOf is a type's name without its package.
func kindOf(m map[string]any) string {
	t := text(m["@type"])
	return t[strings.LastIndexAny(t, "./")+1:]
}

// subject is what a filter's name stands for; ok says whether the view has it.
func (v *view) subject(name string) (subject string, ok bool) {
	if v.all {
		return name, true
	}
	return subjectOf(name)
}

// listsOf finds the lists of filters of a listener that have some of the view's.
func (v *view) listsOf(part any) (lists [][]listed) {
	switch part := part.(type) {
	case []any:
		for _, e := range part {
			lists = append(lists, v.listsOf(e)...)
		}
	case map[string]any:
		for name, e := range part {
			if name == "filters" || name == "http_filters" || name == "httpFilters" {
				var ours []listed
				for _, f := range list(e) {
					if subject, ok := v.subject(text(object(f)["name"])); ok {
						l := listed{subject: subject}
						if typed := object(field(object(f), "typed_config")); typed != nil {
							l.entry = entryOf(text(object(f)["name"]), typed)
						}
						ours = append(ours, l)
					}
				}
				if ours != nil {
					lists = append(lists, ours)
				}
			}
			lists = append(lists, v.listsOf(e)...)
		}
	}
	return lists
}

// entryOf reads a filter's typed configuration.
func entryOf(name string, typed map[string]any) *entry {
	e := &entry{name: name, kind: kindOf(typed)}
	if e.kind == "Wasm" {
		e.plugin, _ = pluginOf(object(typed["config"])) // one that cannot be read is not the one that is wanted
	}
	return e
}

// readListeners reads a proxy's /config_dump?resource=dynamic_listeners.
func (v *view) readListeners(body []byte) error {
	dump, err := configs(body)
	for _, c := range dump {
		v.lists = append(v.lists, v.listsOf(object(field(c, "active_state"))["listener"])...)
		v.warming = append(v.warming, v.listsOf(object(field(c, "warming_state"))["listener"])...)
		if failed := object(field(c, "error_state")); failed != nil {
			if lists := v.listsOf(field(failed, "failed_configuration")); lists != nil {
				v.failed = append(v.failed, failure{lists, text(failed["details"])})
			}
		}
	}
	return err
}

// readExtensions reads a proxy's /config_dump?resource=ecds_filters.
func (v *view) readExtensions(body []byte) error {
	dump, err := configs(body)
	v.configs = map[string]*entry{}
	for _, c := range dump {
		f := object(field(c, "ecds_filter"))
		name := text(f["name"])
		if subject, ok := v.subject(name); ok {
			e := entryOf(name, object(field(f, "typed_config")))
			e.updated, _ = time.Parse(time.RFC3339Nano, text(field(c, "last_updated"))) // zero when it cannot be read
			v.configs[subject] = e
		}
	}
	return err
}

// readStats reads a proxy's /stats.
func (v *view) readStats(body []byte) error {
	v.stats.accepted = map[string]time.Time{}
	lines := bufio.NewScanner(bytes.NewReader(body))
	for lines.Scan() {
		name, value, _ := strings.Cut(lines.Text(), ": ")
		n, err := strconv.ParseUint(value, 10, 64)
		if err != nil {
			continue // of text or a histogram
		}
		switch name {
		case "wasm.wasm_vm_count":
			v.stats.vms = &n
		case "server.concurrency":
			v.stats.workers = n
		case "wasm.remote_load_fetch_failures":
			v.stats.fetchFailures = n
		case "wasm.remote_load_fetch_successes", "wasm.remote_load_cache_hits":
			v.stats.fetched += n
		}
		rest, ok := strings.CutPrefix(name, "extension_config_discovery.")
		_, filter, _ := strings.Cut(rest, ".")
		if filter, is := strings.CutSuffix(filter, ".update_time"); ok && is {
			v.stats.accepted[filter] = time.UnixMilli(int64(n))
		}
	}
	return lines.Err()
}

// readPlanned reads istiod's /debug/config_dump with types=lds,ecds, which are the resources themselves.
func (v *view) readPlanned(body []byte) error {
	dump, err := configs(body)
	v.configs = map[string]*entry{}
	for _, c := range dump {
		switch kindOf(c) {
		case "Listener":
			v.lists = append(v.lists, v.listsOf(c)...)
		case "Wasm":
			// It has the plugin's name: NAMESPACE.NAME, and that of an EnvoyFilter is the filter's.
			name := text(object(c["config"])["name"])
			names := []string{name}
			if !strings.HasPrefix(name, patches) {
				names = []string{plugins + "trafficextension/" + name, plugins + "wasmplugin/" + name}
			}
			for _, n := range names {
				if subject, ok := subjectOf(n); ok && v.configs[subject] == nil {
					v.configs[subject] = entryOf(n, c)
				}
			}
		}
	}
	return err
}

// configs are the parts of a dump.
func configs(body []byte) ([]map[string]any, error) {
	var dump struct {
		Configs []map[string]any `json:"configs"`
	}
	if err := json.Unmarshal(body, &dump); err != nil {
		return nil, fmt.Errorf("read a configuration dump: %w", err)
	}
	return dump.Configs, nil
}
