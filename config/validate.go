package config

import (
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/meshery/meshery-filters/internal/problem"
)

const maxModule = 20 << 20 // bytes, as the Filter document allows

var (
	variable = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]*$`)
	// cookieForm is what a cookie's value may be without quotes, and a blank.
	cookieForm = regexp.MustCompile(`^[A-Za-z0-9._ -]{0,100}$`)
	imageForm  = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._/:@-]{0,500}$`)
	hostForm   = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?(\.[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?)*$`)
)

// Validate lists every mistake as one problem.InvalidConfiguration. It reads no files.
func (c Config) Validate() error { return problem.InvalidConfiguration.WithFields("", c.mistakes()) }

// kubeconfigWords are what KubeconfigAllow takes.
var kubeconfigWords = []string{"exec", "files", "proxy", "insecure", "link-local"}

// listener is one address that others connect to.
type listener struct {
	key, addr  string
	tls        TLS
	insecureAt string // the key that allows it to be insecure
	secured    secured
}

// secured is what a listener needs to be open to other machines.
type secured int

const (
	byClients     secured = iota // TLS, and clients that prove who they are
	byCertificate                // TLS: what it gives harms nobody, and clients have nothing to prove themselves with
	byNothing                    // it has no TLS
)

func (c Config) listeners() []listener {
	return []listener{
		{"grpcAddr", c.GRPCAddr, c.GRPCTLS, "grpcTLS", byClients},
		{"xdsAddr", c.XDSAddr, c.XDSTLS, "xdsTLS", byClients},
		{"httpAddr", c.HTTPAddr, c.HTTPTLS, "httpTLS", byClients},
		{"modulesAddr", c.ModulesAddr, c.ModulesTLS, "modulesTLS", byCertificate},
		{"natsListen", c.NATSListen, c.NATSTLS, "natsTLS", byClients},
		{"imagehub.addr", c.ImageHub.Addr, TLS{Insecure: c.ImageHub.Insecure}, "imagehub", byNothing},
	}
}

// open says whether others than this machine can connect without what the listener needs then.
func (l listener) open() bool {
	safe := l.tls.CertFile != "" && l.tls.KeyFile != "" && (l.tls.ClientCAFile != "" || l.secured == byCertificate)
	return l.addr != "" && !loopback(l.addr) && !safe
}

// lacks says what an open listener does without.
func (l listener) lacks() string {
	if l.secured == byCertificate {
		return "TLS"
	}
	return "TLS and client certificates"
}

// Warnings are sentences about settings that are allowed and dangerous.
func (c Config) Warnings() []string {
	var w []string
	for _, l := range c.listeners() {
		if l.open() && l.tls.Insecure {
			w = append(w, fmt.Sprintf("%s %s takes connections from everybody who can reach it, without %s, because %s.insecure is true",
				l.key, l.addr, strings.TrimPrefix(l.lacks(), "TLS and "), l.insecureAt))
		}
	}
	if c.AllowUnauthenticated {
		w = append(w, "everybody who can reach grpcAddr may change what proxies run, because allowUnauthenticated is true")
	}
	if c.StoreURL != "" && c.SealKey.Name == "" {
		w = append(w, "kubeconfigs and Image Hub's key in the store can be opened by this adapter only, because sealKey is not set")
	}
	if k := c.ImageHub.Key; k.Name != "" && k != (SecretRef{"imagehub", "token-key"}) {
		if _, ok := c.Secrets["imagehub"]["token-key"]; ok {
			w = append(w, "the secret imagehub/token-key is not used, because imagehub.key names another")
		}
	}
	if allowed := List(c.KubeconfigAllow); len(allowed) > 0 && c.Clusters != "own" {
		w = append(w, fmt.Sprintf("whoever may ask for operations uses what is the adapter's by kubeconfigs with %s, because of kubeconfigAllow", strings.Join(allowed, ", ")))
	}
	if u, err := url.Parse(c.MesheryServer); err == nil && c.Meshery.TokenFile != "" && u.Scheme == "http" && !loopback(net.JoinHostPort(u.Hostname(), "80")) {
		w = append(w, "the network sees Meshery's token, and may change the filters that are kept there, because mesheryServer is http://")
	}
	if c.AllowLoopbackModules {
		w = append(w, "modules may be fetched from this machine's own ports, because allowLoopbackModules is true")
	}
	return w
}

func (c Config) mistakes() (mistakes []problem.Field) {
	fail := func(path, remedy, cause string, args ...any) {
		mistakes = append(mistakes, problem.Field{Path: path, Cause: fmt.Sprintf(cause, args...), Remedy: remedy})
	}
	taken := map[string]string{}
	for _, l := range c.listeners() {
		if l.addr == "" && (l.key == "natsListen" || l.key == "modulesAddr") {
			continue
		}
		host, port, err := net.SplitHostPort(l.addr)
		n, portErr := strconv.ParseUint(port, 10, 16)
		if err != nil || portErr != nil {
			fail(l.key, "write HOST:PORT, such as 127.0.0.1:10014", "%q is not an address to listen on", redact(l.addr))
			continue
		}
		if other, twice := taken[net.JoinHostPort(host, port)]; twice && n != 0 {
			fail(l.key, "give each listener its own", "%s is the address of %s, too", l.addr, other)
		}
		taken[net.JoinHostPort(host, port)] = l.key
		if l.open() && !l.tls.Insecure {
			set := map[secured]string{byClients: "set certFile, keyFile and clientCAFile under " + l.insecureAt + ", ",
				byCertificate: "set certFile and keyFile under " + l.insecureAt + ", "}[l.secured]
			fail(l.key, fmt.Sprintf("listen on 127.0.0.1, %sor set %s.insecure to true", set, l.insecureAt),
				"%s is open to other machines, without %s", l.addr, l.lacks())
		}
		if (l.tls.CertFile == "") != (l.tls.KeyFile == "") {
			fail(l.insecureAt, "set both, or neither", "certFile and keyFile go together")
		} else if l.tls.ClientCAFile != "" && l.tls.CertFile == "" {
			fail(l.insecureAt+".clientCAFile", "set certFile and keyFile, too", "client certificates need TLS")
		}
	}
	if c.StateDir == "" {
		fail("stateDir", "name a folder", "there is no place to keep state")
	}
	for _, n := range []struct{ path, urls, creds string }{{"storeURL", c.StoreURL, "storeCredsFile"}, {"natsURL", c.NATSURL, "natsCredsFile"}} {
		for u := range strings.SplitSeq(n.urls, ",") {
			if n.urls != "" {
				checkURL(n.path, strings.TrimSpace(u), []string{"nats", "tls", "ws", "wss"}, "put them in "+n.creds, fail)
			}
		}
	}
	if !slices.Contains([]string{"always", "interval"}, c.Sync) {
		fail("sync", "write always or interval", "%q is not a way to keep things", c.Sync)
	}
	if c.ModulesURL != "" {
		checkURL("modulesURL", c.ModulesURL, []string{"http", "https"}, "take them out", fail)
		if strings.ContainsAny(c.ModulesURL, "?#") {
			fail("modulesURL", "take it out", "modules are below a path, and it has a query or a fragment")
		}
		if c.ModulesAddr == "" {
			fail("modulesURL", "set modulesAddr, too", "nothing listens for those who come to that address")
		}
	}
	if c.MesheryServer != "" {
		checkURL("mesheryServer", c.MesheryServer, []string{"http", "https"}, "use meshery.tokenFile", fail)
	} else if c.Meshery.Events {
		fail("meshery.events", "set mesheryServer, too", "there is no server to send events to")
	}
	if _, err := c.callback(); err != nil {
		fail("meshery.adapterAddr", "write HOST:PORT, such as 10.0.0.7:10014", "%q is not an address that a server can reach", redact(c.Meshery.AdapterAddr))
	}
	if !cookieForm.MatchString(c.Meshery.Provider) {
		fail("meshery.provider", "write it as Meshery shows it, such as Layer5", "it is not a provider's name")
	}
	for _, n := range []struct {
		path       string
		value, max int
	}{
		{"limits.queue", c.Limits.Queue, 1_000_000},
		{"limits.workers", c.Limits.Workers, 1000},
		{"limits.callRate", c.Limits.CallRate, 1_000_000},
		{"limits.callsPerClient", c.Limits.CallsPerClient, 1_000_000},
		{"limits.calls", c.Limits.Calls, 1_000_000},
		{"limits.streamsPerClient", c.Limits.StreamsPerClient, 1_000_000},
		{"limits.streams", c.Limits.Streams, 1_000_000},
		{"limits.connectionsPerAddress", c.Limits.ConnectionsPerAddress, 1_000_000},
		{"limits.connections", c.Limits.Connections, 1_000_000},
		{"limits.proxiesPerClient", c.Limits.ProxiesPerClient, 1_000_000},
		{"limits.proxies", c.Limits.Proxies, 1_000_000},
		{"limits.proxyRequestRate", c.Limits.ProxyRequestRate, 1_000_000},
		{"limits.requestRate", c.Limits.RequestRate, 1_000_000},
		{"limits.moduleBytes", c.Limits.ModuleBytes, maxModule},
	} {
		if n.value < 1 || n.value > n.max {
			fail(n.path, fmt.Sprintf("use 1 to %d", n.max), "%d is out of range", n.value)
		}
	}
	for path, d := range map[string]time.Duration{"limits.moduleTimeout": c.Limits.ModuleTimeout, "shutdownTimeout": c.ShutdownTimeout} {
		if d <= 0 || d > time.Hour {
			fail(path, "use more than 0s and at most 1h", "%s is out of range", d)
		}
	}
	if d := c.Limits.ModuleKeep; d < time.Second || d > 30*24*time.Hour {
		fail("limits.moduleKeep", "use 1s to 720h", "%s is out of range", d)
	}
	if !slices.Contains([]string{"kubeconfigs", "own"}, c.Clusters) {
		fail("clusters", "write kubeconfigs or own", "%q names no clusters", c.Clusters)
	}
	for _, word := range List(c.KubeconfigAllow) {
		if !slices.Contains(kubeconfigWords, word) {
			fail("kubeconfigAllow", "write any of "+strings.Join(kubeconfigWords, ", "), "%q is nothing that a kubeconfig may have", word)
		}
	}
	if !slices.Contains([]string{"text", "json"}, c.LogFormat) {
		fail("logFormat", "write text or json", "%q is not a form of the log", c.LogFormat)
	}
	for path, image := range map[string]string{"imagehub.apiImage": c.ImageHub.APIImage, "imagehub.webImage": c.ImageHub.WebImage, "imagehub.image": c.ImageHub.Image} {
		if !imageForm.MatchString(image) && (image != "" || path != "imagehub.image") {
			fail(path, "write REGISTRY/NAME:TAG", "%q is not an image's name", image)
		}
	}
	if !hostForm.MatchString(c.ImageHub.Host) || len(c.ImageHub.Host) > 253 {
		fail("imagehub.host", "write a name such as imagehub.example.com", "%q is not a host's name", c.ImageHub.Host)
	}
	if !slices.Contains([]string{"auto", "istio", "gateway-api"}, c.ImageHub.Gateway) {
		fail("imagehub.gateway", "write auto, istio or gateway-api", "%q names no gateway", c.ImageHub.Gateway)
	}
	if !slices.Contains([]string{"auto", "envoy", "consul"}, c.ImageHub.Mesh) {
		fail("imagehub.mesh", "write auto, envoy or consul", "%q is nothing that Image Hub can stand behind", c.ImageHub.Mesh)
	}
	if c.ImageHub.Mesh == "consul" && c.Consul.Addr == "" {
		fail("imagehub.mesh", "set consul.addr, or write envoy", "there is no Consul")
	}
	if a, err := netip.ParseAddrPort(c.ImageHub.SidecarAddr); err != nil || !a.Addr().IsLoopback() || a.Port() == 0 {
		fail("imagehub.sidecarAddr", "write IP:PORT, such as 127.0.0.1:10019", "%q is no loopback address, and there is no TLS", c.ImageHub.SidecarAddr)
	}
	if c.Consul.Addr != "" {
		checkURL("consul.addr", c.Consul.Addr, []string{"http", "https"}, "use consul.token", fail)
	}
	if (c.Consul.CertFile == "") != (c.Consul.KeyFile == "") {
		fail("consul", "set both, or neither", "certFile and keyFile go together")
	}
	for _, addr := range List(c.Consul.Admin) {
		if host, port, err := net.SplitHostPort(addr); err != nil || host == "" || port == "" {
			fail("consul.admin", "write HOST:PORT, such as 127.0.0.1:19000", "%q is not an address", redact(addr))
		}
	}
	if p := c.Consul.LocalPath; p != "" && !filepath.IsAbs(p) {
		fail("consul.localPath", "write the whole path", "proxies do not know what %q is relative to", p)
	}
	for name, keys := range c.Secrets {
		for key, s := range keys {
			at := "secrets." + name + "." + key
			if name == "" || key == "" {
				fail(at, "give it one", "a secret has no name or no key")
			}
			if (s.Env == "") == (s.File == "") {
				fail(at, "set env: VARIABLE or file: PATH", "a secret is in one place")
			} else if s.Env != "" && !variable.MatchString(s.Env) {
				// Not quoted: it may be the value itself, in the wrong place.
				fail(at+".env", "name the variable that holds the value", "it is not a variable's name")
			}
		}
	}
	for path, k := range map[string]SecretRef{"imagehub.key": c.ImageHub.Key, "sealKey": SecretRef(c.SealKey), "consul.token": SecretRef(c.Consul.Token)} {
		if (k.Name == "") != (k.Key == "") {
			fail(path, "set both, or neither", "name and key go together")
		} else if _, ok := c.Secrets[k.Name][k.Key]; k.Name != "" && !ok {
			fail(path, "add it under secrets", "there is no secret %s/%s", k.Name, k.Key)
		}
	}
	slices.SortStableFunc(mistakes, func(a, b problem.Field) int { return strings.Compare(a.Path, b.Path) })
	return mistakes
}

// checkURL never quotes the address: what cannot be read may hold a password.
func checkURL(path, text string, schemes []string, credentials string, fail func(path, remedy, cause string, args ...any)) {
	if strings.Contains(text, "@") {
		fail(path, credentials, "an address must not carry credentials")
	} else if u, err := url.Parse(text); err != nil || u.Host == "" || !slices.Contains(schemes, u.Scheme) {
		fail(path, "write "+schemes[0]+"://HOST:PORT", "it is not an address of %s", strings.Join(schemes, ", "))
	}
}

// Callback is where Meshery Server reaches the adapter's gRPC, HOST:PORT: what meshery.adapterAddr says, or else grpcAddr
// with the port that it really has, and with the name of this machine where it names no interface.
func (c Config) Callback(listening net.Addr, hostname string) (string, error) {
	addr, err := c.callback()
	if err != nil {
		return "", err
	}
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		return "", err
	}
	if _, at, err := net.SplitHostPort(c.GRPCAddr); err == nil && port == at { // which may be 0: any that is free
		if _, port, err = net.SplitHostPort(listening.String()); err != nil {
			return "", err
		}
	}
	if ip, err := netip.ParseAddr(host); host == "" || err == nil && ip.IsUnspecified() {
		host = hostname
	}
	return net.JoinHostPort(host, port), nil
}

// callback is meshery.adapterAddr, with the port of grpcAddr where it has none.
func (c Config) callback() (string, error) {
	addr := c.Meshery.AdapterAddr
	if addr == "" {
		return c.GRPCAddr, nil
	}
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		if _, port, err = net.SplitHostPort(c.GRPCAddr); err != nil {
			return "", err
		}
		host = strings.Trim(addr, "[]")
	}
	if _, err := strconv.ParseUint(port, 10, 16); err != nil || host == "" || strings.ContainsAny(host, "/@ ") {
		return "", fmt.Errorf("%q is not HOST:PORT", redact(addr))
	}
	return net.JoinHostPort(host, port), nil
}

// loopback says whether an address can be reached from this machine only.
func loopback(addr string) bool {
	host, _, err := net.SplitHostPort(addr)
	if err != nil {
		return false
	}
	ip, err := netip.ParseAddr(host)
	return host == "localhost" || err == nil && ip.Unmap().IsLoopback()
}

// Secret reads a secret's value from where Secrets says it is. The error, problem.SecretMissing, names the secret and
// neither its value nor its place.
func (c Config) Secret(name, key string) (string, error) {
	s, ok := c.Secrets[name][key]
	if !ok {
		return "", problem.SecretMissing.New("%s/%s is not in the adapter's configuration", name, key)
	}
	if s.Env != "" {
		if v := os.Getenv(s.Env); v != "" {
			return v, nil
		}
		return "", problem.SecretMissing.New("%s/%s: its environment variable is not set", name, key)
	}
	data, err := readFile(s.File)
	if err != nil {
		return "", problem.SecretMissing.New("%s/%s: its file cannot be read", name, key)
	}
	v := strings.TrimSuffix(strings.TrimSuffix(string(data), "\n"), "\r")
	if v == "" {
		return "", problem.SecretMissing.New("%s/%s: its file is empty", name, key)
	}
	return v, nil
}
