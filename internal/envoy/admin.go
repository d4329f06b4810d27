package envoy

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"regexp"
	"strconv"
	"strings"
	"time"
)

const (
	adminTimeout = 10 * time.Second // for one request
	maxSmall     = 8 << 20          // bytes of /listeners, /server_info and /stats
	maxDump      = 512 << 20        // bytes of /config_dump, which holds the modules' bytes in base64
)

// Admin reads the admin interface of an Envoy.
type Admin struct {
	Addr string // host:port
}

// ServerInfo is what an Envoy says of itself.
type ServerInfo struct {
	Version       string // 1.40.0
	State         string // LIVE, DRAINING, PRE_INITIALIZING or INITIALIZING
	NodeID, Group string
	Concurrency   int // worker threads
	Uptime        time.Duration
}

// SlotState is what an Envoy's slot holds.
type SlotState struct {
	// Version of the resource that Envoy accepted last. Empty: none has arrived yet, and the listener is closed.
	Version string
	// Filters of Version in the order that requests meet them. Unknown, and nil, while RejectedVersion is set: Envoy
	// shows what it has rejected in place of what it runs.
	Filters []SlotFilter
	// RejectedVersion is set when a newer resource was rejected. What was accepted before serves on.
	RejectedVersion string
}

// SlotFilter is one filter of a chain.
type SlotFilter struct {
	Name string
	// Type is the filter's, without package: Wasm. The fields below are for that one.
	Type string
	// RootID and VMID tell the filter's root context and the VM that it shares.
	RootID, VMID string
	// SHA256 of the module's bytes, when they came inline; else Path names the file.
	SHA256, Path string
	// Configuration as the filter reads it. Secrets are in there in clear.
	Configuration string
	FailurePolicy string // FAIL_CLOSED; empty is Envoy's default
}

// Ready waits until Envoy serves (LIVE) or ctx ends; the error then says the last state.
func (a Admin) Ready(ctx context.Context) error {
	last := "no answer yet"
	err := poll(ctx, func() bool {
		body, status, err := a.get(ctx, "/ready", maxSmall)
		switch {
		case err == nil && status == http.StatusOK:
			return true
		case err == nil:
			last = "it is " + strings.TrimSpace(string(body))
		case ctx.Err() == nil:
			last = err.Error()
		}
		return false
	})
	if err != nil {
		return fmt.Errorf("wait for envoy to be ready: %w: %s", err, last)
	}
	return nil
}

// ListenerAddr waits until the listener of that name is bound, and returns its address, IP:port.
func (a Admin) ListenerAddr(ctx context.Context, name string) (string, error) {
	var addr string
	err := poll(ctx, func() bool {
		var got struct {
			Statuses []struct {
				Name  string `json:"name"`
				Local struct {
					Socket struct {
						Address string `json:"address"`
						Port    int    `json:"port_value"`
					} `json:"socket_address"`
				} `json:"local_address"`
			} `json:"listener_statuses"`
		}
		if err := a.getJSON(ctx, "/listeners?format=json", maxSmall, &got); err != nil {
			return false // it may not answer yet; poll's end tells
		}
		for _, s := range got.Statuses {
			if s.Name == name && s.Local.Socket.Port != 0 {
				addr = net.JoinHostPort(s.Local.Socket.Address, strconv.Itoa(s.Local.Socket.Port))
				return true
			}
		}
		return false
	})
	if err != nil {
		return "", fmt.Errorf("wait for envoy's listener %s: %w", name, err)
	}
	return addr, nil
}

// Stats returns the counters and gauges whose names match a regular expression (RE2; "" is all). Histograms are left out.
func (a Admin) Stats(ctx context.Context, filter string) (map[string]uint64, error) {
	body, err := a.getOK(ctx, "/stats?filter="+url.QueryEscape(filter), maxSmall)
	if err != nil {
		return nil, err
	}
	stats := map[string]uint64{}
	lines := bufio.NewScanner(bytes.NewReader(body))
	for lines.Scan() {
		name, value, _ := strings.Cut(lines.Text(), ": ")
		if n, err := strconv.ParseUint(value, 10, 64); err == nil {
			stats[name] = n
		}
	}
	if err := lines.Err(); err != nil {
		return nil, fmt.Errorf("read envoy's statistics: %w", err)
	}
	return stats, nil
}

// Version of the Envoy: 1.40.0.
func (a Admin) Version(ctx context.Context) (string, error) {
	info, err := a.ServerInfo(ctx)
	return info.Version, err
}

// ServerInfo asks Envoy about itself.
func (a Admin) ServerInfo(ctx context.Context) (ServerInfo, error) {
	var got struct {
		Version string `json:"version"`
		State   string `json:"state"`
		Uptime  string `json:"uptime_current_epoch"`
		Options struct {
			Concurrency int `json:"concurrency"`
		} `json:"command_line_options"`
		Node struct {
			ID      string `json:"id"`
			Cluster string `json:"cluster"`
		} `json:"node"`
	}
	if err := a.getJSON(ctx, "/server_info", maxSmall, &got); err != nil {
		return ServerInfo{}, err
	}
	version, ok := parseVersion("version: " + got.Version)
	if !ok {
		return ServerInfo{}, fmt.Errorf("read /server_info: the version is %q", clip(got.Version, 100))
	}
	uptime, err := time.ParseDuration(got.Uptime)
	if err != nil {
		return ServerInfo{}, fmt.Errorf("read /server_info: %w", err)
	}
	return ServerInfo{Version: version, State: got.State, NodeID: got.Node.ID, Group: got.Node.Cluster,
		Concurrency: got.Options.Concurrency, Uptime: uptime}, nil
}

// SlotConfig reads what the slot really holds, whatever anybody meant to put there. It knows one limit: an Envoy that is
// sent the very bytes that it has just rejected says that it accepts them, and goes on with what it ran before. Only
// another resource in between gets a true answer out of it.
func (a Admin) SlotConfig(ctx context.Context) (SlotState, error) {
	// The dump alone does not tell accepted from rejected, and the statistics alone do not tell the filters. Both belong
	// together when nothing was accepted between two looks at the statistics.
	accepted, err := a.acceptedVersion(ctx)
	if err != nil {
		return SlotState{}, err
	}
	for {
		shown, filters, err := a.dumpSlot(ctx)
		if err != nil {
			return SlotState{}, err
		}
		now, err := a.acceptedVersion(ctx)
		switch {
		case err != nil:
			return SlotState{}, err
		case now != accepted:
			accepted = now
		case shown == accepted:
			return SlotState{Version: unsalted(accepted), Filters: filters}, nil
		default:
			return SlotState{Version: unsalted(accepted), RejectedVersion: unsalted(shown)}, nil
		}
	}
}

// unsalted is a version without what the adapter tells its own bytes of it apart by.
func unsalted(version string) string {
	version, _, _ = strings.Cut(version, "~")
	return version
}

// acceptedVersion is empty when there is none yet.
func (a Admin) acceptedVersion(ctx context.Context) (string, error) {
	const name = "extension_config_discovery.http_filter." + SlotName + ".version_text"
	body, err := a.getOK(ctx, "/stats?filter="+url.QueryEscape("^"+regexp.QuoteMeta(name)+"$"), maxSmall)
	if err != nil {
		return "", err
	}
	value, ok := strings.CutPrefix(strings.TrimSpace(string(body)), name+": ")
	if !ok {
		return "", nil
	}
	return strings.TrimSuffix(strings.TrimPrefix(value, `"`), `"`), nil
}

// dumpSlot reads the resource that Envoy was sent last.
func (a Admin) dumpSlot(ctx context.Context) (version string, filters []SlotFilter, err error) {
	var got struct {
		Configs []struct {
			Version string `json:"version_info"`
			Filter  struct {
				Name   string `json:"name"`
				Config struct {
					Default struct {
						Filters []namedFilter `json:"filters"`
					} `json:"default_filter_chain"`
				} `json:"typed_config"`
			} `json:"ecds_filter"`
		} `json:"configs"`
	}
	if err := a.getJSON(ctx, "/config_dump?resource=ecds_filters", maxDump, &got); err != nil {
		return "", nil, err
	}
	for _, c := range got.Configs {
		if c.Filter.Name != SlotName {
			continue
		}
		for _, f := range c.Filter.Config.Default.Filters {
			sf, err := f.read()
			if err != nil {
				return "", nil, fmt.Errorf("read filter %s of /config_dump: %w", f.Name, err)
			}
			filters = append(filters, sf)
		}
		return c.Version, filters, nil
	}
	return "", nil, nil
}

// ListenerConfig reads the Wasm filters that the listener at an address, host:port, has in its own configuration, in the
// order that requests meet them. Of filters that come by discovery it has the names only. It is for Envoys without a slot,
// such as Istio's.
func (a Admin) ListenerConfig(ctx context.Context, addr string) (filters []SlotFilter, err error) {
	var got struct {
		Configs []struct {
			Active struct {
				Listener struct {
					Address struct {
						Socket struct {
							Address string `json:"address"`
							Port    int    `json:"port_value"`
						} `json:"socket_address"`
					} `json:"address"`
					Chains []struct {
						Filters []struct {
							Manager struct {
								Filters []struct {
									namedFilter
									Discovery json.RawMessage `json:"config_discovery"`
								} `json:"http_filters"`
							} `json:"typed_config"`
						} `json:"filters"`
					} `json:"filter_chains"`
				} `json:"listener"`
			} `json:"active_state"`
		} `json:"configs"`
	}
	if err := a.getJSON(ctx, "/config_dump?resource=dynamic_listeners", maxDump, &got); err != nil {
		return nil, err
	}
	for _, c := range got.Configs {
		at := c.Active.Listener.Address.Socket
		if net.JoinHostPort(at.Address, strconv.Itoa(at.Port)) != addr {
			continue
		}
		for _, chain := range c.Active.Listener.Chains {
			for _, network := range chain.Filters {
				for _, f := range network.Manager.Filters {
					sf, err := f.read()
					if err != nil {
						return nil, fmt.Errorf("read filter %s of /config_dump: %w", f.Name, err)
					}
					if sf.Type == "Wasm" || f.Discovery != nil {
						filters = append(filters, sf)
					}
				}
			}
		}
		return filters, nil
	}
	return nil, fmt.Errorf("envoy has no listener at %s", addr)
}

// namedFilter is a TypedExtensionConfig as /config_dump writes it; other filters than Wasm leave Config empty.
type namedFilter struct {
	Name  string `json:"name"`
	Typed struct {
		Type   string `json:"@type"`
		Config struct {
			RootID        string          `json:"root_id"`
			FailurePolicy string          `json:"failure_policy"`
			Configuration json.RawMessage `json:"configuration"`
			VM            struct {
				ID   string `json:"vm_id"`
				Code struct {
					Local struct {
						Inline   string `json:"inline_bytes"`
						Filename string `json:"filename"`
					} `json:"local"`
				} `json:"code"`
			} `json:"vm_config"`
		} `json:"config"`
	} `json:"typed_config"`
}

func (f namedFilter) read() (SlotFilter, error) {
	c := f.Typed.Config
	s := SlotFilter{Name: f.Name, Type: f.Typed.Type[strings.LastIndexAny(f.Typed.Type, "./")+1:],
		RootID: c.RootID, VMID: c.VM.ID, Path: c.VM.Code.Local.Filename, FailurePolicy: c.FailurePolicy}
	if c.VM.Code.Local.Inline != "" {
		h := sha256.New()
		if _, err := io.Copy(h, base64.NewDecoder(base64.StdEncoding, strings.NewReader(c.VM.Code.Local.Inline))); err != nil {
			return SlotFilter{}, fmt.Errorf("decode the module: %w", err)
		}
		s.SHA256 = hex.EncodeToString(h.Sum(nil))
	}
	var err error
	s.Configuration, err = readConfiguration(c.Configuration)
	return s, err
}

// readConfiguration turns the Any that a Wasm plugin is configured with into what the filter reads: a StringValue or
// BytesValue becomes its bytes, and anything else its JSON without the type.
func readConfiguration(raw json.RawMessage) (string, error) {
	if len(raw) == 0 {
		return "", nil
	}
	var any map[string]json.RawMessage
	if err := json.Unmarshal(raw, &any); err != nil {
		return "", fmt.Errorf("decode the configuration: %w", err)
	}
	var typ string
	if err := json.Unmarshal(any["@type"], &typ); err != nil {
		return "", fmt.Errorf("decode the configuration's type: %w", err)
	}
	delete(any, "@type")
	value := any["value"]
	switch _, name, _ := strings.Cut(typ, "/"); {
	case name == "google.protobuf.StringValue":
		var text string
		err := json.Unmarshal(value, &text)
		return text, err
	case name == "google.protobuf.BytesValue":
		var data []byte
		err := json.Unmarshal(value, &data)
		return string(data), err
	case value != nil && len(any) == 1: // a well-known type, such as Struct
		return string(value), nil
	}
	data, err := json.Marshal(any)
	return string(data), err
}

func (a Admin) getJSON(ctx context.Context, path string, limit int64, v any) error {
	body, err := a.getOK(ctx, path, limit)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(body, v); err != nil {
		return fmt.Errorf("decode envoy's %s: %w", path, err)
	}
	return nil
}

func (a Admin) getOK(ctx context.Context, path string, limit int64) ([]byte, error) {
	body, status, err := a.get(ctx, path, limit)
	if err != nil {
		return nil, err
	}
	if status != http.StatusOK {
		return nil, fmt.Errorf("get envoy's %s: status %d: %s", path, status, clip(string(body), 200))
	}
	return body, nil
}

func (a Admin) get(ctx context.Context, path string, limit int64) (body []byte, status int, err error) {
	ctx, cancel := context.WithTimeout(ctx, adminTimeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+a.Addr+path, nil)
	if err != nil {
		return nil, 0, fmt.Errorf("get envoy's %s: %w", path, err)
	}
	// A connection of its own for each request: kept ones would outlive the Envoy, and a proxy of the environment has no
	// business here.
	transport := &http.Transport{DisableKeepAlives: true}
	resp, err := transport.RoundTrip(req)
	if err != nil {
		return nil, 0, fmt.Errorf("get envoy's %s: %w", path, err)
	}
	defer resp.Body.Close()
	body, err = io.ReadAll(io.LimitReader(resp.Body, limit+1))
	if err != nil {
		return nil, 0, fmt.Errorf("read envoy's %s: %w", path, err)
	}
	if int64(len(body)) > limit {
		return nil, 0, fmt.Errorf("read envoy's %s: more than %d bytes", path, limit)
	}
	return body, resp.StatusCode, nil
}

// poll asks until the answer is yes, or ctx ends and gives its cause.
func poll(ctx context.Context, done func() bool) error {
	for !done() {
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(pollInterval):
		}
	}
	return nil
}
