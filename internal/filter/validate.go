package filter

import (
	"encoding/base64"
	"fmt"
	"net/url"
	"path"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/meshery/meshery-filters/internal/problem"
)

// MaxModule bounds a module in bytes.
const MaxModule = 20 << 20

var (
	dnsLabel  = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$`)
	dnsName   = regexp.MustCompile(`^[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?$`)
	groupName = regexp.MustCompile(`^[A-Za-z0-9]([A-Za-z0-9._-]{0,126}[A-Za-z0-9])?$`)
	labelKey  = regexp.MustCompile(`^([a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?/)?[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?$`)
	labelText = regexp.MustCompile(`^([A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?)?$`)
	hex64     = regexp.MustCompile(`^[0-9a-f]{64}$`)
	envName   = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]{0,127}$`)
	plainText = regexp.MustCompile(`^[[:print:]]{0,253}$`)
)

// IsDNSLabel says whether s can name a filter or a namespace.
func IsDNSLabel(s string) bool { return dnsLabel.MatchString(s) }

// IsGroupName says whether s can name a proxy group.
func IsGroupName(s string) bool { return groupName.MatchString(s) }

// Filter fills the defaults in. namespace is the request's; empty means "default". What depends on the mesh (the
// target's default, the rollout) is filled in by whoever picks the mesh.
func (d Document) Filter(namespace string) Filter {
	f := Filter{
		Key:    Key{Namespace: firstOf(d.Metadata.Namespace, namespace, "default"), Name: d.Metadata.Name},
		Labels: d.Metadata.Labels,
		Spec:   d.Spec,
	}
	s := &f.Spec
	s.Mesh = firstOf(s.Mesh, "auto")
	s.Protocol = firstOf(s.Protocol, HTTP)
	s.FailurePolicy = firstOf(s.FailurePolicy, FailClosed)
	s.Delivery.Mode = firstOf(s.Delivery.Mode, DeliverAuto)
	s.Wait.For = firstOf(s.Wait.For, WaitAll)
	s.Wait.Timeout = firstOf(s.Wait.Timeout, Duration(30*time.Second))
	s.VMID = firstOf(s.VMID, f.Key.String())
	s.Module.SHA256 = strings.ToLower(s.Module.SHA256)
	return f
}

// Document is the filter as a document again, for lists and rendering.
func (f Filter) Document() Document {
	return Document{APIVersion: APIVersion, Kind: Kind,
		Metadata: Metadata{Name: f.Key.Name, Namespace: f.Key.Namespace, Labels: f.Labels}, Spec: f.Spec}
}

// Bytes gives the bytes of an inline module.
func (m Module) Bytes() ([]byte, error) {
	text := strings.ReplaceAll(strings.ReplaceAll(m.Inline, " ", ""), "\t", "") // the decoder skips line breaks itself
	b, err := base64.StdEncoding.DecodeString(text)
	if err != nil {
		return nil, fmt.Errorf("module.inline is not base64: %w", err)
	}
	return b, nil
}

// failures collects mistakes up to maxMistakes.
func failures(mistakes *[]problem.Field) failFunc {
	return func(path, remedy, cause string, args ...any) {
		if len(*mistakes) < maxMistakes {
			*mistakes = append(*mistakes, problem.Field{Path: path, Cause: fmt.Sprintf(cause, args...), Remedy: remedy})
		}
	}
}

// validateKey lists the mistakes in what a removal reads of the document, whose Filter is f.
func (d Document) validateKey(f Filter) (mistakes []problem.Field) {
	fail := failures(&mistakes)
	if d.APIVersion != APIVersion {
		fail("apiVersion", "write "+APIVersion, "%q is not a version of this schema", clip(d.APIVersion))
	}
	switch d.Kind {
	case Kind:
	case KindUndo:
		fail("kind", "send it alone, with the operation custom; on the command line use `meshery-filters undo`", "an Undo is no Filter")
	default:
		fail("kind", "write "+Kind, "%q is not a kind of document that the adapter takes", clip(d.Kind))
	}
	const labelRule = "use at most 63 lower-case letters, digits and dashes, with a letter or digit at both ends"
	if f.Key.Name == "" {
		fail("metadata.name", labelRule, "the filter has no name")
	} else if !IsDNSLabel(f.Key.Name) {
		fail("metadata.name", labelRule, "%q is not a DNS label", clip(f.Key.Name))
	}
	if !IsDNSLabel(f.Key.Namespace) {
		fail("metadata.namespace", labelRule, "%q is not a DNS label", clip(f.Key.Namespace))
	}
	validateLabels("metadata.labels", f.Labels, fail)
	if t := time.Duration(f.Spec.Wait.Timeout); t < 0 || t > time.Hour {
		fail("spec.wait.timeout", "use more than 0s and at most 1h", "%s is out of range", t)
	}
	return mistakes
}

// validate lists the mistakes of the document, whose Filter is f.
func (d Document) validate(f Filter) []problem.Field {
	mistakes := d.validateKey(f)
	fail := failures(&mistakes)
	s := f.Spec
	validateTarget(s.Target, fail)
	seenPorts := map[int]bool{}
	for i, p := range s.Match.Ports {
		if p < 1 || p > 65535 || seenPorts[p] {
			fail(fmt.Sprintf("spec.match.ports[%d]", i), "list each port once, 1 to 65535", "%d is not a port or is there twice", p)
		}
		seenPorts[p] = true
	}
	validateModule(s.Module, fail)
	if local := s.Delivery.Mode == DeliverLocal; local != (s.Delivery.LocalPath != "") {
		fail("spec.delivery.localPath", "set both, or neither", "mode local and localPath go together")
	} else if local && !path.IsAbs(s.Delivery.LocalPath) {
		fail("spec.delivery.localPath", "start it with /", "%q is not an absolute path", clip(s.Delivery.LocalPath))
	}
	if s.Delivery.Service != "" && !IsDNSLabel(s.Delivery.Service) {
		fail("spec.delivery.service", "use the name of a service", "%q is not a DNS label", clip(s.Delivery.Service))
	}
	if port := s.Delivery.UpstreamPort; port < 0 || port > 65535 {
		fail("spec.delivery.upstreamPort", "use 1 to 65535", "%d is not a port", port)
	} else if port != 0 && s.Delivery.Service == "" {
		fail("spec.delivery.upstreamPort", "set spec.delivery.service, or leave the port out", "it is the port of no service")
	}
	for p, text := range map[string]string{"spec.rootID": s.RootID, "spec.vmID": s.VMID, "spec.before": s.Before} {
		if !plainText.MatchString(text) && (p != "spec.vmID" || text != f.Key.String()) { // the name's own mistakes are told
			fail(p, "use at most 253 printable ASCII characters", "it is too long or has other characters")
		}
	}
	spec := (*place)(nil).field("spec")
	config := spec.field("config")
	badSecrets(&config, s.Config.V, func(p, cause string) { fail(p, cause, "$secret is not written right") })
	validateEnvironment(s.Environment, fail)
	if s.Priority < -1<<31 || s.Priority > 1<<31-1 {
		fail("spec.priority", "use a number of 32 bits", "%d is out of range", s.Priority)
	}
	return mistakes
}

type failFunc func(path, remedy, cause string, args ...any)

func validateLabels(path string, labels map[string]string, fail failFunc) {
	for k, v := range labels {
		if !labelKey.MatchString(k) || !labelText.MatchString(v) {
			fail(path+"."+clip(k), "keys and values have at most 63 letters, digits, dots, dashes and underscores", "%q is not a label", clip(k+"="+v))
		}
	}
}

func validateTarget(t Target, fail failFunc) {
	validateLabels("spec.target.labels", t.Labels, fail)
	if t.Namespace != "" && !IsDNSLabel(t.Namespace) {
		fail("spec.target.namespace", "use the namespace's name", "%q is not a DNS label", clip(t.Namespace))
	}
	if t.Partition != "" && !IsDNSLabel(t.Partition) {
		fail("spec.target.partition", "use the partition's name", "%q is not a DNS label", clip(t.Partition))
	}
	needName, wantLabels := false, false
	switch t.Kind {
	case "":
		if t.Name != "" || len(t.Labels) > 0 || t.Namespace != "" || t.Partition != "" {
			fail("spec.target.kind", "write one of Workload, Service, Gateway, Route, Namespace, Mesh, ProxyGroup", "the target has no kind")
		}
		return
	case Workload:
		wantLabels = true
		if t.Name == "" && len(t.Labels) == 0 {
			fail("spec.target.labels", "name the workload, or give the labels of its pods", "a Workload needs labels or a name")
		}
	case Service, Route, ProxyGroup:
		needName = true
	case Gateway:
		wantLabels = true
		if t.Name == "" && len(t.Labels) == 0 {
			fail("spec.target.name", "name the gateway, or give the labels of its pods", "a Gateway needs a name or labels")
		}
	case Namespace, Mesh:
		if t.Name != "" {
			fail("spec.target.name", "leave it out; a Namespace is named by target.namespace", "a target of kind %s has no name", t.Kind)
		}
	}
	if needName && t.Name == "" {
		fail("spec.target.name", "name it", "a %s needs a name", t.Kind)
	}
	if !wantLabels && len(t.Labels) > 0 {
		fail("spec.target.labels", "leave them out", "a %s is not chosen by labels", t.Kind)
	}
	switch {
	case t.Name == "" || t.Kind == Namespace || t.Kind == Mesh:
	case t.Kind == ProxyGroup && !IsGroupName(t.Name):
		fail("spec.target.name", "use at most 128 letters, digits, dots, dashes and underscores", "%q is not the name of a proxy group", clip(t.Name))
	case t.Kind != ProxyGroup && !dnsName.MatchString(t.Name):
		fail("spec.target.name", "use the resource's name", "%q is not a DNS name", clip(t.Name))
	}
}

func validateModule(m Module, fail failFunc) {
	var given []string
	for _, s := range []struct{ field, value string }{{"builtin", m.Builtin}, {"url", m.URL}, {"inline", m.Inline}, {"file", m.File}} {
		if s.value != "" {
			given = append(given, s.field)
		}
	}
	switch len(given) {
	case 0:
		fail("spec.module", "set one of builtin, url, inline or file", "the module has no source")
	case 1:
	default:
		fail("spec.module", "keep one", "%s are set, and a module has one source", strings.Join(given, " and "))
	}
	if m.SHA256 != "" && !hex64.MatchString(m.SHA256) {
		fail("spec.module.sha256", "write the 64 hexadecimal digits that sha256sum prints", "%q is not a SHA-256 digest", clip(m.SHA256))
	}
	if m.URL != "" {
		u, err := url.Parse(m.URL)
		switch {
		case err != nil || !slices.Contains([]string{"https", "oci", "meshery"}, u.Scheme) || u.Host == "":
			fail("spec.module.url", "write https://HOST/PATH, oci://HOST/REPOSITORY:TAG or meshery://ID", "it is not an address that a module can be fetched from")
		case u.User != nil:
			fail("spec.module.url", "take them out; pullSecret names a secret with credentials", "an address must not carry credentials")
		case u.Scheme == "https" && m.SHA256 == "":
			fail("spec.module.sha256", "write the digest that sha256sum prints for the file you mean", "a module from https needs its digest")
		}
	}
	if m.Inline != "" {
		if len(m.Inline) > MaxModule/3*4+MaxModule/10 { // line breaks in the text are allowed
			fail("spec.module.inline", "use a smaller module or another source", "the module has more than %d bytes", MaxModule)
		} else if b, err := m.Bytes(); err != nil {
			fail("spec.module.inline", "encode the file with `base64 FILE.wasm`", "it is not base64")
		} else if len(b) > MaxModule {
			fail("spec.module.inline", "use a smaller module or another source", "the module has %d bytes, more than the %d allowed", len(b), MaxModule)
		}
	}
	if m.PullSecret != "" && !strings.HasPrefix(m.URL, "oci://") {
		fail("spec.module.pullSecret", "leave it out", "a pull secret goes with an oci:// address only")
	}
}

func validateEnvironment(env []EnvVar, fail failFunc) {
	seen := map[string]bool{}
	for i, e := range env {
		at := fmt.Sprintf("spec.environment[%d]", i)
		if !envName.MatchString(e.Name) {
			fail(at+".name", "use letters, digits and underscores", "%q is not a variable's name", clip(e.Name))
		} else if seen[e.Name] {
			fail(at+".name", "keep one of them", "%s is there twice", e.Name)
		}
		seen[e.Name] = true
		if (e.Value == nil) == (e.ValueFrom == "") {
			fail(at, "set value, or valueFrom: host", "a variable has either a value or valueFrom")
			continue
		}
		if e.Value == nil {
			continue
		}
		switch v := e.Value.V.(type) {
		case string:
		case map[string]any:
			if _, ok, _ := asSecret(v); ok {
				continue
			}
			fail(at+".value", "write text, or {$secret: {name: NAME, key: KEY}}", "it is neither text nor a secret's reference")
		default:
			fail(at+".value", "put it in quotes", "it is not text")
		}
	}
}

// clip keeps what a user wrote short enough to read in a message.
func clip(s string) string {
	if len(s) <= 80 {
		return s
	}
	return strings.ToValidUTF8(s[:80], "") + "…" // a character may have been cut
}

func firstOf[T comparable](values ...T) T {
	var zero T
	for _, v := range values {
		if v != zero {
			return v
		}
	}
	return zero
}
