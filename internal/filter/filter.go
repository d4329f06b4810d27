// Package filter holds the words of the project: a Filter is a Wasm module with its configuration for one target, and
// a Chain is what stands on a target, in the order requests meet it.
package filter

import (
	"fmt"
	"net/url"
	"strings"
	"time"
)

// APIVersion and Kind head every Filter document. v1alpha1 grows by optional fields only.
const (
	APIVersion = "filters.meshery.io/v1alpha1"
	Kind       = "Filter"
)

// Document is a Filter as a user writes it, after defaults.
type Document struct {
	// Version of the schema: filters.meshery.io/v1alpha1.
	APIVersion string `json:"apiVersion" schema:"required"`
	// Kind of the document: Filter.
	Kind string `json:"kind" schema:"required"`
	// Name and labels of the filter.
	Metadata Metadata `json:"metadata" schema:"required"`
	// What the filter is, where it goes and how it gets there.
	Spec Spec `json:"spec" schema:"required"`
}

// ComponentLabel is the label that says which component of a design a filter is.
const ComponentLabel = "filters.meshery.io/component"

// Metadata names a filter.
type Metadata struct {
	// Name of the filter, unique in its namespace: a DNS label.
	Name string `json:"name" schema:"required"`
	// Namespace of the filter: a DNS label. Default: the request's namespace, or "default".
	Namespace string `json:"namespace,omitempty"`
	// Labels are kept with the filter and shown in lists.
	Labels map[string]string `json:"labels,omitempty"`
}

// Spec says what a filter is, where it goes and how it gets there.
type Spec struct {
	// Mesh that carries the filter. auto: the one mesh that the cluster shows, or plain Envoy without a cluster.
	Mesh string `json:"mesh,omitempty" schema:"enum=auto|envoy|istio|consul|envoy-gateway|kuma,default=auto"`
	// Target is the set of proxies that run the filter. Default on plain Envoy: the proxy group "default". Others have none.
	Target Target `json:"target,omitzero"`
	// Match narrows the traffic that meets the filter.
	Match Match `json:"match,omitzero"`
	// Protocol of the traffic: http filters see requests, tcp filters see bytes.
	Protocol Protocol `json:"protocol,omitempty" schema:"enum=http|tcp,default=http"`
	// Module is the Wasm module: exactly one of builtin, url, inline or file.
	Module Module `json:"module" schema:"required"`
	// Delivery is how proxies get the module's bytes. Default mode: auto.
	Delivery Delivery `json:"delivery,omitzero"`
	// RootID selects one of several filters in a module.
	RootID string `json:"rootID,omitempty"`
	// VMID names the sandbox. Filters with the same module and vmID share one, and its shared data (counters) outlives
	// reconfiguration as long as the vmID stays, and ends with the last filter of that vmID on a proxy. Default: namespace/name of the filter.
	VMID string `json:"vmID,omitempty"`
	// Config is handed to the filter: any YAML value, as JSON; a string is handed on verbatim. {$secret: {name, key}}
	// stands for a value that is resolved when the filter is applied.
	Config Value `json:"config,omitzero" schema:"any"`
	// Environment variables of the sandbox.
	Environment []EnvVar `json:"environment,omitempty"`
	// Phase places the filter: authn before authz before stats before filters without a phase.
	Phase Phase `json:"phase,omitempty" schema:"enum=authn|authz|stats"`
	// Priority within the phase: higher runs first; equal ones run in the order of namespace/name. Default: 0.
	Priority int `json:"priority,omitempty"`
	// Before names the proxy's own filter that this one stands right before, such as envoy.filters.http.cors; where a
	// proxy has none of that name, it does not get the filter. Default: the place of the phase. Istio only.
	Before string `json:"before,omitempty"`
	// FailurePolicy says what happens to requests after the module crashed in a proxy, until the filter is changed or
	// removed and applied again. closed: 503. open: they pass unfiltered. reload: the next request gets a fresh sandbox;
	// only a sandbox that crashes within a second after it was made is not replaced before that second is over.
	FailurePolicy FailurePolicy `json:"failurePolicy,omitempty" schema:"enum=closed|open|reload,default=closed"`
	// Wait says when the operation ends.
	Wait Wait `json:"wait,omitzero"`
	// Rollout all offers the chain to every proxy at once; canary to one first, and to the others after it accepted.
	// Default: canary for more than one proxy.
	Rollout Rollout `json:"rollout,omitempty" schema:"enum=all|canary"`
	// Force takes fields over that another field manager owns (Kubernetes only).
	Force bool `json:"force,omitempty"`
}

// Target is the set of proxies that run a filter: by kind, and by name or labels.
type Target struct {
	// Kind of the target. Workload: pods by labels, or by the name of what makes them. Service, Route: by name. Gateway:
	// by name, or its pods by labels. Namespace, Mesh: all in it. ProxyGroup: plain Envoys by their node's cluster.
	Kind TargetKind `json:"kind,omitempty" schema:"enum=Workload|Service|Gateway|Route|Namespace|Mesh|ProxyGroup"`
	// Namespace of the target. Default: the filter's; of a Mesh on Istio, istio-system, its root namespace, and on Consul, consul.
	Namespace string `json:"namespace,omitempty"`
	// Name of the target.
	Name string `json:"name,omitempty"`
	// Labels that select a Workload's or Gateway's pods.
	Labels map[string]string `json:"labels,omitempty"`
	// Partition of the target (Consul Enterprise).
	Partition string `json:"partition,omitempty"`
}

// Match narrows the traffic that meets a filter.
type Match struct {
	// Direction of the traffic as a sidecar sees it; gateways have one direction. Default: inbound.
	Direction Direction `json:"direction,omitempty" schema:"enum=inbound|outbound"`
	// Ports of the listener, 1 to 65535. Default: all.
	Ports []int `json:"ports,omitempty"`
}

// Module is where a Wasm module comes from.
type Module struct {
	// Builtin is the name of a module that the adapter ships: ratelimit, headers.
	Builtin string `json:"builtin,omitempty"`
	// URL of the module: https://…, oci://… or meshery://…. https needs sha256.
	URL string `json:"url,omitempty"`
	// Inline is the module itself in base64, at most 20 MiB before encoding.
	Inline string `json:"inline,omitempty"`
	// File is a path on the machine of the command line, which reads it and sends it inline.
	File string `json:"file,omitempty"`
	// SHA256 is the digest of the module's bytes in 64 hexadecimal digits.
	SHA256 string `json:"sha256,omitempty"`
	// PullSecret names the secret with the registry's credentials, with the key .dockerconfigjson: one of the adapter's
	// configuration or, for a filter in a cluster, a Secret of its namespace there.
	PullSecret string `json:"pullSecret,omitempty"`
}

// Delivery is how proxies get a module's bytes.
type Delivery struct {
	// Mode auto picks the first that holds: inline (with the configuration; on Istio at most 512 KiB, on Consul never),
	// direct (from url), served (by the adapter), local (a file on the proxies' machines; on Consul before all others).
	Mode DeliveryMode `json:"mode,omitempty" schema:"enum=auto|inline|direct|served|local,default=auto"`
	// LocalPath is the folder on the proxies' machines for mode local.
	LocalPath string `json:"localPath,omitempty"`
	// Service is the upstream of the proxies that leads to the module's address, for the modes direct and served. Consul
	// only, which has no other way to fetch: proxies speak plain HTTP to it, of https addresses too.
	Service string `json:"service,omitempty"`
	// UpstreamPort asks for that upstream where the target's Pods have none, and so for their restart: the Deployments,
	// StatefulSets and DaemonSets that make them get SERVICE:PORT into their annotation. Nothing in the Pods may listen on that
	// port, 1 to 65535. Default: nothing is restarted. Consul on Kubernetes only.
	UpstreamPort int `json:"upstreamPort,omitempty"`
}

// EnvVar is one environment variable of a sandbox: a value, or the proxy host's own.
type EnvVar struct {
	// Name of the variable.
	Name string `json:"name" schema:"required"`
	// Value of the variable: a string or {$secret: {name, key}}.
	Value *Value `json:"value,omitempty" schema:"any"`
	// ValueFrom host takes the variable of this name from the proxy's own environment.
	ValueFrom string `json:"valueFrom,omitempty" schema:"enum=host"`
}

// Wait says when an operation ends.
type Wait struct {
	// For: all connected proxies have accepted, some (at least one) have, or none (do not wait).
	For WaitFor `json:"for,omitempty" schema:"enum=all|some|none,default=all"`
	// Timeout of the wait: a duration such as 30s or 2m, at most 1h.
	Timeout Duration `json:"timeout,omitzero" schema:"duration,default=30s"`
}

// The enumerations of a Spec; their values are what users write.
type (
	TargetKind    string
	Protocol      string
	DeliveryMode  string
	Direction     string
	Phase         string
	FailurePolicy string
	WaitFor       string
	Rollout       string
)

const (
	Workload   TargetKind = "Workload"
	Service    TargetKind = "Service"
	Gateway    TargetKind = "Gateway"
	Route      TargetKind = "Route"
	Namespace  TargetKind = "Namespace"
	Mesh       TargetKind = "Mesh"
	ProxyGroup TargetKind = "ProxyGroup"

	HTTP Protocol = "http"
	TCP  Protocol = "tcp"

	DeliverAuto   DeliveryMode = "auto"
	DeliverInline DeliveryMode = "inline"
	DeliverDirect DeliveryMode = "direct"
	DeliverServed DeliveryMode = "served"
	DeliverLocal  DeliveryMode = "local"

	Inbound  Direction = "inbound"
	Outbound Direction = "outbound"

	Authn Phase = "authn"
	Authz Phase = "authz"
	Stats Phase = "stats"

	FailClosed FailurePolicy = "closed"
	FailOpen   FailurePolicy = "open"
	FailReload FailurePolicy = "reload"

	WaitAll  WaitFor = "all"
	WaitSome WaitFor = "some"
	WaitNone WaitFor = "none"

	RolloutAll    Rollout = "all"
	RolloutCanary Rollout = "canary"
)

// Duration is a time.Duration that is written as 30s or 2m.
type Duration time.Duration

func (d Duration) String() string { return time.Duration(d).String() }

// MarshalText writes 30s.
func (d Duration) MarshalText() ([]byte, error) { return []byte(d.String()), nil }

// UnmarshalText reads 30s.
func (d *Duration) UnmarshalText(text []byte) error {
	v, err := time.ParseDuration(string(text))
	*d = Duration(v)
	return err
}

// Key names a filter: it is unique over all targets of an adapter.
type Key struct {
	Namespace string `json:"namespace"`
	Name      string `json:"name"`
}

func (k Key) String() string { return k.Namespace + "/" + k.Name }

// ParseKey reads namespace/name, or a name alone in the namespace that is given.
func ParseKey(s, namespace string) (Key, error) {
	ns, name, ok := strings.Cut(s, "/")
	if !ok {
		ns, name = namespace, s
	}
	if !ok && IsDNSLabel(name) && !IsDNSLabel(ns) {
		return Key{}, fmt.Errorf("%q is not a namespace's name: write one in lower-case letters, digits and dashes", ns)
	}
	if !IsDNSLabel(ns) || !IsDNSLabel(name) {
		return Key{}, fmt.Errorf("%q is not a filter's name: write NAME or NAMESPACE/NAME in lower-case letters, digits and dashes", s)
	}
	return Key{ns, name}, nil
}

// Filter is a valid document: what one target runs.
type Filter struct {
	Key    Key               `json:"key"`
	Labels map[string]string `json:"labels,omitempty"`
	Spec   Spec              `json:"spec"`
}

// Source tells a person where the module came from: "builtin ratelimit", "https://…", "inline". Of an address it leaves
// out credentials, query and fragment: a pre-signed one carries its secret there, and events, lists and logs show this.
func (m Module) Source() string {
	switch {
	case m.Builtin != "":
		return "builtin " + m.Builtin
	case m.URL != "":
		return publicURL(m.URL)
	case m.File != "":
		return m.File
	default:
		return "inline"
	}
}

func publicURL(address string) string {
	u, err := url.Parse(address)
	if err != nil || u.Opaque != "" {
		return "an address that cannot be read"
	}
	return (&url.URL{Scheme: u.Scheme, Host: u.Host, Path: u.Path, RawPath: u.RawPath}).String()
}

// ShortDigest is a digest's beginning, as events and tables show it.
func ShortDigest(sha256 string) string {
	if len(sha256) > 12 {
		return sha256[:12]
	}
	return sha256
}

// String names a target: "ProxyGroup edge", "Workload shop {app=web}".
func (t Target) String() string {
	s := string(t.Kind)
	name := t.Name
	if t.Namespace != "" && t.Kind != ProxyGroup {
		name = t.Namespace + "/" + name
	}
	if name != "" {
		s += " " + strings.TrimSuffix(name, "/")
	}
	if len(t.Labels) > 0 {
		s += " {" + joinLabels(t.Labels) + "}"
	}
	return s
}

// ID is a target's unique and stable text form, for keys of maps and stores.
func (t Target) ID() string {
	return strings.Join([]string{string(t.Kind), t.Partition, t.Namespace, t.Name, joinLabels(t.Labels)}, "|")
}
