package envoy

import (
	"bytes"
	_ "embed"
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"regexp"
	"strconv"
	"strings"
	"text/template"

	"github.com/meshery/meshery-filters/internal/problem"
)

const (
	// ListenerName is the name of the listener in a Bootstrap.
	ListenerName = "ingress"
	// DefaultXDSAddr is where the adapter answers proxies unless it is configured otherwise.
	DefaultXDSAddr = "127.0.0.1:10015"
)

// Bootstrap says what a complete Envoy in front of one upstream looks like.
type Bootstrap struct {
	// Group of proxies that get the same chains: the node's cluster. Letters, digits, dots, dashes and underscores.
	Group string
	// NodeID tells this proxy from others of its group.
	NodeID string
	// XDSAddr is the adapter's xDS address, host:port.
	XDSAddr string
	// XDSTLS is how the proxy proves itself to the adapter. Default: in clear, which an adapter accepts on loopback.
	XDSTLS *TLS
	// Listen is where requests come in, IP:port. Port 0 takes a free one, which Process.ListenerAddr tells.
	Listen string
	// Upstream is where requests go, host:port.
	Upstream string
	// Admin is Envoy's admin interface, IP:port; port 0 takes a free one, which Process.AdminAddr tells. Whoever can
	// reach it can stop the proxy.
	Admin string
	// StatPrefix begins the listener's statistics: http.<StatPrefix>.downstream_rq_2xx. Default: ingress.
	StatPrefix string
	// Concurrency is the number of worker threads in the command that the bootstrap's first lines show.
	// Default: 0, which leaves it to Envoy: one per CPU.
	Concurrency int
}

// TLS names files on the proxy's machine.
type TLS struct {
	CA        string // certificates that the adapter's is signed by, PEM
	Cert, Key string // the proxy's own, PEM
}

var (
	groupName  = regexp.MustCompile(`^[A-Za-z0-9]([A-Za-z0-9._-]{0,126}[A-Za-z0-9])?$`)
	nodeID     = regexp.MustCompile(`^[[:print:]]{1,253}$`)
	statPrefix = regexp.MustCompile(`^[A-Za-z0-9_.-]{1,64}$`)
	hostName   = regexp.MustCompile(`^[A-Za-z0-9]([A-Za-z0-9._-]{0,251}[A-Za-z0-9])?$`)

	//go:embed bootstrap.yaml.tmpl
	bootstrapText string
	//go:embed slot.yaml.tmpl
	slotText string

	templates = template.Must(template.Must(template.New("bootstrap").Funcs(template.FuncMap{"quote": quote}).
			Parse(bootstrapText)).New("slot").Parse(slotText))
)

// YAML returns the bootstrap, with comments that say what each part is for. The error is a problem.InvalidRequest that
// names every field that is wrong.
func (b Bootstrap) YAML() ([]byte, error) {
	if b.StatPrefix == "" {
		b.StatPrefix = ListenerName
	}
	if err := b.validate(); err != nil {
		return nil, err
	}
	values := struct {
		Bootstrap
		Slot                        string
		ListenAt, AdminAt           endpoint
		UpstreamAt, XDSAt           endpoint
		UpstreamType, XDSType, Flag string
	}{Bootstrap: b, Slot: SlotName,
		ListenAt: split(b.Listen), AdminAt: split(b.Admin), UpstreamAt: split(b.Upstream), XDSAt: split(b.XDSAddr)}
	values.UpstreamType, values.XDSType = values.UpstreamAt.discovery(), values.XDSAt.discovery()
	if b.Concurrency > 0 {
		values.Flag = " --concurrency " + strconv.Itoa(b.Concurrency)
	}
	var out bytes.Buffer
	if err := templates.ExecuteTemplate(&out, "bootstrap", values); err != nil {
		return nil, fmt.Errorf("write the bootstrap: %w", err)
	}
	return out.Bytes(), nil
}

// GroupRule is what the name of a group may be.
const GroupRule = "up to 128 letters, digits, dots, dashes and underscores, with a letter or digit at both ends"

// ValidGroup says whether that can be the name of a group.
func ValidGroup(name string) bool { return groupName.MatchString(name) }

func (b Bootstrap) validate() error {
	var mistakes []problem.Field
	field := func(path string, ok bool, value, rule string) {
		switch {
		case ok:
		case value == "":
			mistakes = append(mistakes, problem.Field{Path: path, Cause: "is missing", Remedy: "use " + rule})
		default:
			mistakes = append(mistakes, problem.Field{Path: path, Cause: fmt.Sprintf("%q will not do", clip(value, 100)), Remedy: "use " + rule})
		}
	}
	const bindRule = "an IP address and a port, such as 127.0.0.1:8080; port 0 takes a free one"
	const dialRule = "a host or IP address and a port, such as 127.0.0.1:10015"
	field("group", groupName.MatchString(b.Group), b.Group, GroupRule)
	field("nodeID", nodeID.MatchString(b.NodeID), b.NodeID, "up to 253 printable characters that no other proxy of the group has")
	field("xdsAddr", canDial(b.XDSAddr), b.XDSAddr, dialRule)
	field("listen", canBind(b.Listen), b.Listen, bindRule)
	field("upstream", canDial(b.Upstream), b.Upstream, dialRule)
	field("admin", canBind(b.Admin), b.Admin, bindRule)
	field("statPrefix", statPrefix.MatchString(b.StatPrefix), b.StatPrefix, "up to 64 letters, digits, dots, dashes and underscores")
	field("concurrency", b.Concurrency >= 0 && b.Concurrency <= 1024, strconv.Itoa(b.Concurrency), "0 to 1024; 0 is one worker per CPU")
	if t := b.XDSTLS; t != nil {
		field("xdsTLS.ca", t.CA != "", t.CA, "the path of a PEM file on the proxy's machine")
		field("xdsTLS.cert", t.Cert != "", t.Cert, "the path of a PEM file on the proxy's machine")
		field("xdsTLS.key", t.Key != "", t.Key, "the path of a PEM file on the proxy's machine")
	}
	return problem.InvalidRequest.WithFields("bootstrap", mistakes)
}

// canBind says whether addr is one that Envoy can listen on: it takes no names there.
func canBind(addr string) bool {
	a, err := netip.ParseAddrPort(addr)
	return err == nil && a.Addr().Zone() == ""
}

func canDial(addr string) bool {
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		return false
	}
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil || n == 0 {
		return false
	}
	ip, err := netip.ParseAddr(host)
	return err == nil && ip.Zone() == "" || hostName.MatchString(host)
}

type endpoint struct{ Host, Port string }

// split takes apart what validate has let through.
func split(addr string) endpoint {
	host, port, _ := net.SplitHostPort(addr)
	return endpoint{host, port}
}

// discovery is the cluster type that fits the host: Envoy looks names up for one type only.
func (e endpoint) discovery() string {
	if _, err := netip.ParseAddr(e.Host); err == nil {
		return "STATIC"
	}
	return "STRICT_DNS"
}

// quote writes a YAML string. Every JSON string is one.
func quote(s string) (string, error) {
	data, err := json.Marshal(s)
	return string(data), err
}

// Slot returns what an operator adds to an Envoy of their own so that it takes part in the group, with comments that
// say where each part goes. A group that is no valid name is written as a placeholder.
func Slot(group string) string {
	if !groupName.MatchString(group) {
		group = "GROUP"
	}
	var out strings.Builder
	// It writes three checked strings into memory, so it cannot fail.
	_ = templates.ExecuteTemplate(&out, "slot", struct {
		Group, Slot string
		XDSAt       endpoint
	}{group, SlotName, split(DefaultXDSAddr)})
	return out.String()
}
