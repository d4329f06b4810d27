package consul

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"reflect"
	"slices"
	"strconv"
	"strings"

	"github.com/meshery/meshery-filters/internal/plan"
	"github.com/meshery/meshery-filters/internal/problem"
)

// Image Hub is two services of the agent: its API, and the one whose sidecar users come in by.
const (
	hubAPI     = "imagehub-api"
	hubWeb     = "imagehub-web"
	madeFor    = "meshery-filters-made-for" // in the Meta of what is Image Hub's
	hub        = "imagehub"
	hubVersion = "meshery-filters-version" // in the Meta of its services: of what they were registered with
)

// AddHub registers Image Hub, which answers at api, with the agent, so that the sidecar of imagehub-web takes requests for it
// at web. Both are HOST:PORT of the agent's machine, on which the sidecars have to run too. The API's protocol is http then,
// and web may call it, unless entries of the user's say otherwise. Services that are somebody else's are
// problem.ServiceTaken.
func (c *Client) AddHub(ctx context.Context, api, web string) ([]plan.Change, error) {
	at, port, err := hostPort(api)
	if err != nil {
		return nil, err
	}
	listen, opened, err := hostPort(web)
	if err != nil {
		return nil, err
	}
	service := func(name string, upstreams ...any) func(context.Context) (plan.Change, error) {
		return func(ctx context.Context) (plan.Change, error) {
			// With the default check of the sidecar's port every change of its listeners takes the service out of rotation.
			return c.register(ctx, name, map[string]any{"Name": name, "ID": name, "Address": at, "Port": port,
				"Connect": map[string]any{"SidecarService": map[string]any{"Address": "127.0.0.1", "Checks": []any{map[string]any{"AliasService": name}},
					"Proxy": map[string]any{"LocalServiceAddress": at, "LocalServicePort": port, "Upstreams": upstreams, "Config": map[string]any{"bind_address": "127.0.0.1"}}}}})
		}
	}
	// Entries come first: Consul may miss one that is written a moment after something was registered.
	return each(ctx, c.edit("service-defaults", hubAPI, withHub), c.edit("service-intentions", hubAPI, func(e entry) map[string]any {
		if e.raw != nil {
			return e.raw
		}
		return map[string]any{"Sources": []any{map[string]any{"Name": hubWeb, "Action": "allow"}}, "Meta": map[string]any{madeFor: hub}}
	}), service(hubAPI), service(hubWeb, map[string]any{"DestinationName": hubAPI, "LocalBindAddress": listen, "LocalBindPort": opened}))
}

// RemoveHub takes away what AddHub has made. Filters on the API stay, and their entry goes with the last of them.
func (c *Client) RemoveHub(ctx context.Context) ([]plan.Change, error) {
	service := func(name string) func(context.Context) (plan.Change, error) {
		return func(ctx context.Context) (plan.Change, error) { return c.deregister(ctx, name) }
	}
	return each(ctx, service(hubWeb), service(hubAPI), c.edit("service-intentions", hubAPI, func(e entry) map[string]any {
		if e.meta()[madeFor] != hub {
			return e.raw
		}
		sources, _ := e.raw["Sources"].([]any)
		sources = slices.DeleteFunc(slices.Clone(sources), func(s any) bool {
			m, _ := s.(map[string]any)
			return m["Name"] == hubWeb
		})
		if len(sources) == 0 {
			return nil
		}
		raw := e.marked(madeFor, "")
		raw["Sources"] = sources
		return raw
	}), c.edit("service-defaults", hubAPI, withoutHub))
}

// HasHub says whether one of Image Hub's services is registered.
func (c *Client) HasHub(ctx context.Context) (bool, error) {
	for _, name := range []string{hubWeb, hubAPI} {
		_, found, err := c.registered(ctx, name)
		if found && err == nil || err != nil && !errors.Is(err, problem.ServiceTaken) {
			return found, err
		}
	}
	return false, nil
}

// each does one step after the other, and gives what they changed.
func each(ctx context.Context, steps ...func(context.Context) (plan.Change, error)) (changes []plan.Change, err error) {
	for _, s := range steps {
		change, err := s(ctx)
		if err != nil {
			return changes, err
		}
		changes = append(changes, change)
	}
	return changes, nil
}

// hostPort is an address as sidecars on the same machine can use it.
func hostPort(addr string) (host string, port int, err error) {
	host, text, err := net.SplitHostPort(addr)
	if err != nil {
		return "", 0, problem.Internal.New("%w", err)
	}
	if ip, err := netip.ParseAddr(host); host == "" || err == nil && ip.IsUnspecified() {
		host = "127.0.0.1"
	}
	if port, err = strconv.Atoi(text); err != nil {
		return "", 0, problem.Internal.New("%w", err)
	}
	return host, port, nil
}

// withHub is the API's ServiceDefaults while Image Hub is there.
func withHub(e entry) map[string]any {
	if e.raw != nil && e.meta()[madeFor] != hub && e.meta()[managedBy] != manager {
		return e.raw
	}
	raw := e.marked(madeFor, hub)
	delete(raw["Meta"].(map[string]any), managedBy)
	raw["Protocol"] = "http"
	return raw
}

// withoutHub is what it was, with the filters that came meanwhile.
func withoutHub(e entry) map[string]any {
	if e.meta()[madeFor] != hub {
		return e.raw
	}
	raw := e.marked(madeFor, "")
	if raw["Protocol"] == "http" {
		delete(raw, "Protocol")
	}
	if slices.ContainsFunc(e.extensions(), func(x map[string]any) bool { return strings.HasPrefix(pluginOf(x), plugins) }) {
		raw = entry{raw: raw}.marked(managedBy, manager)
	}
	if raw["Meta"] == nil && isBare(raw) {
		return nil
	}
	return raw
}

// marked is the entry's content with a word in its Meta, or without it.
func (e entry) marked(key, value string) map[string]any {
	raw, meta := map[string]any{}, map[string]any{}
	maps.Copy(raw, e.raw)
	maps.Copy(meta, e.meta())
	delete(raw, "Meta")
	delete(meta, key)
	if value != "" {
		meta[key] = value
	}
	if len(meta) > 0 {
		raw["Meta"] = meta
	}
	return raw
}

// edit brings an entry to what change makes of it, over whatever others write to it meanwhile.
func (c *Client) edit(kind, name string, change func(entry) map[string]any) func(context.Context) (plan.Change, error) {
	return func(ctx context.Context) (made plan.Change, err error) {
		for range rewrites {
			e, err := c.entry(ctx, kind, name)
			if err != nil {
				return made, err
			}
			raw := change(e)
			made = plan.Change{Subject: e.String(), Action: plan.Updated}
			switch {
			case reflect.DeepEqual(e.raw, raw):
				made.Action = plan.Unchanged
				return made, nil
			case e.raw == nil:
				made.Action = plan.Created
			case raw == nil:
				made.Action = plan.Deleted
			}
			if raw != nil {
				raw["Kind"], raw["Name"] = kind, name
				for _, k := range []string{"CreateIndex", "ModifyIndex", "Hash"} {
					delete(raw, k)
				}
			}
			if done, err := c.put(ctx, e, raw); done || err != nil {
				return made, err
			}
		}
		return made, problem.ChainChanged.New("%s: %s/%s, %d times", c, kind, name, rewrites)
	}
}

// registered is what a service of the agent was registered with, if it is Image Hub's.
func (c *Client) registered(ctx context.Context, id string) (version string, found bool, err error) {
	var is struct{ Meta map[string]string }
	found, err = c.get(ctx, call{path: "/v1/agent/service/" + url.PathEscape(id)}, &is)
	if err == nil && found && is.Meta[madeFor] != hub {
		err = problem.ServiceTaken.New("%s: %s", c, id)
	}
	return is.Meta[hubVersion], found, err
}

func (c *Client) register(ctx context.Context, name string, service map[string]any) (plan.Change, error) {
	sum := sha256.Sum256([]byte(canonical(service)))
	version := hex.EncodeToString(sum[:8])
	change := plan.Change{Subject: "service " + name, Action: plan.Created}
	had, found, err := c.registered(ctx, name)
	if err != nil {
		return change, err
	}
	proxy, _, err := c.registered(ctx, name+"-sidecar-proxy") // which has its service's Meta
	if err != nil {
		return change, err
	}
	if had == version && proxy == version {
		change.Action = plan.Unchanged
		return change, nil
	}
	if found {
		change.Action = plan.Updated
	}
	service["Meta"] = map[string]any{madeFor: hub, hubVersion: version}
	_, err = c.do(ctx, call{method: http.MethodPut, path: "/v1/agent/service/register", query: url.Values{"replace-existing-checks": {"true"}}, body: service})
	return change, err
}

// deregister takes a service away with its sidecar, unless it is somebody else's.
func (c *Client) deregister(ctx context.Context, name string) (plan.Change, error) {
	change := plan.Change{Subject: "service " + name, Action: plan.Unchanged}
	var is struct{ Meta map[string]string }
	found, err := c.get(ctx, call{path: "/v1/agent/service/" + url.PathEscape(name)}, &is)
	if err != nil || !found || is.Meta[madeFor] != hub {
		return change, err
	}
	change.Action = plan.Deleted
	_, err = c.do(ctx, call{method: http.MethodPut, path: "/v1/agent/service/deregister/" + url.PathEscape(name)})
	return change, err
}
