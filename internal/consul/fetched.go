package consul

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net/url"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"

	wasm "github.com/envoyproxy/go-control-plane/envoy/extensions/wasm/v3"

	"github.com/meshery/meshery-filters/internal/envoy"
	"github.com/meshery/meshery-filters/internal/plan"
)

// settling is the time in which a proxy has made the sandboxes of listeners that take traffic already.
const settling = 5 * time.Second

// loaded says whether the plugins, which are all there, have their modules. Those that the proxy reads from files have, and those
// that it had fetched before: else it had refused them. After one that it cannot fetch, or start when it has it, it takes traffic
// all the same, and answers 503 or, of filters that fail open, as if there were no filter. No counter tells that of one plugin,
// and all go with the listener that they were first needed for. What is known of them: a module that begins to run makes one
// sandbox for each worker, two for the main thread, and one more to try it; one that fails, two at most. Until old listeners
// are gone, theirs count, too.
func (x *Proof) loaded(listeners []envoy.Listener, s wasmStats, settled bool) (plan.ProxyState, string) {
	const (
		made     = 3 // beside those of the workers
		standing = 2
	)
	every, ours, fresh, anew := set{}, set{}, set{}, set{} // anew: of the filter chains that have something fresh
	fetches, remote, others := uint64(0), false, false     // of these chains; of ours one is fetched; of somebody else's one is
	for _, w := range x.wants {
		ours.add(sandbox(w.plugin))
	}
	for _, l := range listeners {
		for _, chain := range l.Active {
			first, fetched := false, uint64(0)
			for _, p := range chain {
				name := sandbox(p)
				every.add(name)
				switch mine := x.find(p) >= 0; {
				case p.GetVmConfig().GetCode().GetRemote() == nil:
					continue
				case !mine:
					others = true
				default:
					remote = true
					if !slices.Contains(x.before.Sandboxes, name) {
						first = true
						fresh.add(name)
					}
				}
				fetched++
			}
			if !first {
				continue
			}
			fetches += fetched
			for _, p := range chain {
				anew.add(sandbox(p))
			}
		}
	}
	workers, created, failed := s.workers, s.Created-x.before.Created, s.Failed-x.before.Failed
	counted := workers > 0 && (s.sandboxes != nil || x.before.Created > 0)
	sandboxes, least, whole := uint64(0), uint64(len(ours))*(workers+standing-1), uint64(len(every))*(workers+standing)
	if s.sandboxes != nil {
		sandboxes = *s.sandboxes
	}
	alone := counted && s.draining != nil && *s.draining == 0
	const why = "it could not fetch a module or start it, or got another than was meant"
	switch {
	case alone && sandboxes == whole:
		return plan.Running, ""
	case remote && failed > 0 && (!others || created < uint64(len(fresh))*(workers+made)):
		return plan.Rejected, fmt.Sprintf("%s (wasm.remote_load_fetch_failures rose from %d to %d)", why, x.before.Failed, s.Failed)
	case counted && sandboxes < least && remote && settled:
		return plan.Rejected, fmt.Sprintf("%s: its listeners take traffic, and it has %d sandboxes where the filters need %d", why, sandboxes, uint64(len(ours))*(workers+standing))
	case counted && sandboxes < least:
		return plan.Waiting, fmt.Sprintf("it has %d sandboxes, and the filters need %d; if it stays so, its log says why", sandboxes, uint64(len(ours))*(workers+standing))
	case !remote, len(fresh) == 0 && s.Failed == 0 && (!alone || sandboxes > whole):
		return plan.Running, ""
	case len(fresh) == 0: // and something was not fetched at some time, whosever it was
	case workers > 0 && created >= uint64(len(anew))*(workers+made),
		failed == 0 && s.Hits-x.before.Hits >= fetches,
		failed == 0 && workers > 0 && created >= uint64(len(fresh))*(workers+made) && created%(workers+made) == 0 && s.Hits-x.before.Hits+s.Fetched-x.before.Fetched >= fetches:
		return plan.Running, ""
	}
	if settled {
		return plan.Running, "whether it could fetch its modules and start them does not show in its counters, which are hidden, began anew, or count those of others; " +
			"a request that meets the filters shows it"
	}
	return plan.Waiting, "its modules are not seen to be loaded yet"
}

// set holds names.
type set map[string]bool

func (s set) add(name string) { s[name] = true }

// sandbox names what a plugin runs in: Envoy shares it among plugins with the same name, configuration and bytes.
func sandbox(p *wasm.PluginConfig) string {
	vm := p.GetVmConfig()
	return fmt.Sprintf("%q %x %s%s", vm.GetVmId(), vm.GetConfiguration().GetValue(), vm.GetCode().GetRemote().GetSha256(), path.Base(vm.GetCode().GetLocal().GetFilename()))
}

// look asks a proxy what it has. What it says of fetching is not newer than its listeners.
func look(ctx context.Context, get Get) (f plan.Fetching, listeners []envoy.Listener, err error) {
	s, err := statsOf(ctx, get)
	if err != nil {
		return f, nil, err
	}
	dump, err := page(ctx, get, "/config_dump?resource=dynamic_listeners", maxDump)
	if err != nil {
		return f, nil, err
	}
	if listeners, err = envoy.ParseListeners(dump); err != nil {
		return f, nil, err
	}
	f = s.Fetching
	for _, l := range listeners {
		for _, p := range slices.Concat(l.Active...) {
			f.Sandboxes = append(f.Sandboxes, sandbox(p))
		}
	}
	return f, listeners, nil
}

// startedAt is when a proxy was started, by its uptime in whole seconds: up to one too late.
func startedAt(ctx context.Context, get Get) (time.Time, error) {
	body, err := page(ctx, get, "/server_info", maxInfo)
	if err != nil {
		return time.Time{}, err
	}
	var info struct {
		Uptime string `json:"uptime_current_epoch"`
	}
	if err := json.Unmarshal(body, &info); err != nil {
		return time.Time{}, fmt.Errorf("read /server_info: %w", err)
	}
	uptime, err := time.ParseDuration(info.Uptime)
	if err != nil {
		return time.Time{}, fmt.Errorf("read /server_info: %w", err)
	}
	return time.Now().Add(-uptime), nil
}

// another is the time by which a process is younger than one that it is not.
const another = 3 * time.Second / 2

func statsOf(ctx context.Context, get Get) (wasmStats, error) {
	text, err := page(ctx, get, "/stats?filter="+url.QueryEscape(`^(wasm\.(wasm_vm_count|remote_load_|envoy\.wasm\.runtime\.v8\.)|server\.concurrency|listener_manager\.total_(listeners|filter_chains)_draining)`), maxStats)
	return readStats(text), err
}

// wasmStats are a proxy's. It may be told to leave some out.
type wasmStats struct {
	plan.Fetching         // without the names
	workers       uint64  // threads; 0: it does not say
	sandboxes     *uint64 // that there are
	draining      *uint64 // listeners and filter chains that are about to go
}

func readStats(text []byte) (s wasmStats) {
	lines := bufio.NewScanner(bytes.NewReader(text))
	for lines.Scan() {
		name, value, _ := strings.Cut(lines.Text(), ": ")
		n, err := strconv.ParseUint(value, 10, 64)
		if err != nil {
			continue
		}
		switch name {
		case "server.concurrency":
			s.workers = n
		case "listener_manager.total_listeners_draining", "listener_manager.total_filter_chains_draining":
			if s.draining != nil {
				n += *s.draining
			}
			s.draining = &n
		case "wasm.wasm_vm_count", "wasm.envoy.wasm.runtime.v8.active": // older proxies have the second only
			if s.sandboxes == nil || *s.sandboxes < n {
				s.sandboxes = &n
			}
		case "wasm.envoy.wasm.runtime.v8.created":
			s.Created = n
		case "wasm.remote_load_fetch_failures":
			s.Failed = n
		case "wasm.remote_load_fetch_successes":
			s.Fetched = n
		case "wasm.remote_load_cache_hits":
			s.Hits = n
		}
	}
	return s
}
