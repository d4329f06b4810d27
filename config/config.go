// Package config is the adapter's one typed configuration: defaults, then a YAML file, then the environment, then flags,
// later ones winning.
//
// It holds no secret: `secrets` says where values are, and Secret reads one when it is needed. What one place names
// wrong is reported together with everything else that is wrong, as problem.InvalidConfiguration.
//
// A scalar key such as limits.queue is the variable MESHERY_FILTERS_LIMITS_QUEUE and the flag --limits-queue: its
// words, divided at dots and before capitals. A variable that is empty counts as not set.
package config

import (
	"fmt"
	"log/slog"
	"net"
	"net/url"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"
)

// Config is everything that can be set. The comments of its fields are those of adapter.yaml, which a test compares.
type Config struct {
	// Where Meshery and the command line reach the adapter over gRPC.
	GRPCAddr string `yaml:"grpcAddr"`
	// TLS of the gRPC listener.
	GRPCTLS TLS `yaml:"grpcTLS"`
	// What client certificates may do over gRPC, where grpcTLS.clientCAFile asks for them: patterns of URI names (with ://)
	// and of common names, separated by commas, with * for any text. A certificate that is in none may ask for health only.
	GRPCRoles Roles `yaml:"grpcRoles"`
	// Take operations that use the adapter's own rights, as those on plain Envoys do, from other hosts without a client
	// certificate. grpcTLS.insecure alone lets other hosts look, and not change anything.
	AllowUnauthenticated bool `yaml:"allowUnauthenticated"`
	// Take documents whose target is a whole mesh, or in another namespace than the request's.
	AllowWideTargets bool `yaml:"allowWideTargets"`
	// Which clusters filters of a mesh in Kubernetes are applied to. kubeconfigs: those that a request brings kubeconfigs of.
	// own: the one that the adapter runs in, with its Pod's ServiceAccount, whatever a request brings.
	Clusters string `yaml:"clusters"`
	// What kubeconfigs of requests may have besides what is harmless, separated by commas. Each lets whoever sends one use
	// what is the adapter's: exec (run a program that gives the credentials), files (read certificates, keys and tokens from
	// files), proxy (connect through a proxy), insecure (http, or an unverified certificate), link-local (connect to
	// link-local addresses and those of clouds' metadata services). Empty: nothing.
	KubeconfigAllow string `yaml:"kubeconfigAllow"`
	// File that says who asked for which operation and what came of it, one JSON object a line: audit.jsonl in stateDir when
	// empty, - for standard output, off for none. It is replaced at 16 MiB, and 4 older ones are kept. Each adapter needs its
	// own.
	AuditFile string `yaml:"auditFile"`
	// Where Envoys fetch their filters over xDS.
	XDSAddr string `yaml:"xdsAddr"`
	// TLS of the xDS listener.
	XDSTLS TLS `yaml:"xdsTLS"`
	// Where the page in the browser, /healthz and /readyz answer over HTTP.
	HTTPAddr string `yaml:"httpAddr"`
	// TLS of the HTTP listener.
	HTTPTLS TLS `yaml:"httpTLS"`
	// Where the proxies of a cluster fetch modules over HTTP that are too large to travel with the configuration. Empty:
	// nowhere.
	ModulesAddr string `yaml:"modulesAddr"`
	// TLS of the listener for modules. Proxies bring no client certificate, so a certificate is enough on other interfaces
	// than loopback.
	ModulesTLS TLS `yaml:"modulesTLS"`
	// Address of the listener for modules as proxies reach it, http://HOST:PORT or https://HOST:PORT. Empty: modules are not
	// delivered from there.
	ModulesURL string `yaml:"modulesURL"`
	// Folder that keeps operations, events, chains and modules over restarts. Each adapter needs its own.
	StateDir string `yaml:"stateDir"`
	// When what is kept in stateDir is on disk. always: before anything is acknowledged, so that a power cut loses nothing.
	// interval: within a second, which is faster and can lose that second; a crash of the adapter alone loses nothing.
	Sync string `yaml:"sync"`
	// NATS servers with JetStream 2.11 or later that keep operations, events, chains and modules instead of stateDir,
	// nats://HOST:PORT, separated by commas. Empty: none.
	StoreURL string `yaml:"storeURL"`
	// Credentials file (.creds) for the servers of storeURL. Empty: none.
	StoreCredsFile string `yaml:"storeCredsFile"`
	// Address where the embedded NATS listens for clients that read events. Empty: nobody can connect.
	NATSListen string `yaml:"natsListen"`
	// TLS of the embedded NATS.
	NATSTLS TLS `yaml:"natsTLS"`
	// NATS servers that events are published to as well, nats://HOST:PORT, separated by commas. Empty: none.
	NATSURL string `yaml:"natsURL"`
	// Credentials file (.creds) for the servers of natsURL. Empty: none.
	NATSCredsFile string `yaml:"natsCredsFile"`
	// Secret that kubeconfigs in waiting operations and the key of imagehub are sealed with, of 16 bytes or more. Empty: a
	// key that is made up and kept in stateDir, which protects a store elsewhere and not copies of stateDir. Adapters that
	// share a store need the same one.
	SealKey SealKey `yaml:"sealKey"`
	// Image Hub, the sample application.
	ImageHub ImageHub `yaml:"imagehub"`
	// Consul, for filters of the mesh consul that come without a kubeconfig: those of virtual machines and Nomad.
	Consul Consul `yaml:"consul"`
	// Folder of Filter documents, each of which is an operation. Empty: operations.d beside the configuration file, if
	// there is one.
	OperationsDir string `yaml:"operationsDir"`
	// Bounds on what the adapter takes on.
	Limits Limits `yaml:"limits"`
	// How long a running operation may take to finish when the adapter is told to stop.
	ShutdownTimeout time.Duration `yaml:"shutdownTimeout"`
	// Log what developers want to see as well. Meshery's variable DEBUG sets it too.
	Debug bool `yaml:"debug"`
	// Form of the log: text or json.
	LogFormat string `yaml:"logFormat"`
	// Address of Meshery Server as the adapter reaches it, http://HOST:PORT or https://HOST:PORT. Empty: none. Meshery's
	// variable MESHERY_SERVER sets it too.
	MesheryServer string `yaml:"mesheryServer"`
	// What the adapter does at the server of mesheryServer.
	Meshery Meshery `yaml:"meshery"`
	// Let module addresses lead to this machine. Whoever may apply a filter can then reach every TLS port of it.
	AllowLoopbackModules bool `yaml:"allowLoopbackModules"`
	// Where the values are that {$secret: {name, key}} stands for: name, then key, then env or file.
	Secrets map[string]map[string]Source `yaml:"secrets"`
}

// Meshery is what the adapter does at Meshery Server.
type Meshery struct {
	// Register the adapter's components, without which Meshery UI lets nobody submit an operation.
	Register bool `yaml:"register"`
	// Address where the server reaches the adapter's gRPC, HOST:PORT. Empty: grpcAddr, where it names no interface with this
	// machine's name. Meshery's variable SERVICE_ADDR sets it too, with the port of grpcAddr where it has none.
	AdapterAddr string `yaml:"adapterAddr"`
	// Send every event to the server as well. It needs tokenFile, unless nobody has to sign in there.
	Events bool `yaml:"events"`
	// File with the token that signs the adapter in: what mesheryctl system login writes, or the token alone. It is read
	// whenever it is needed. Empty: none.
	TokenFile string `yaml:"tokenFile"`
	// Provider that the token is of, as Meshery's cookie meshery-provider has it. Empty: the one that is in tokenFile.
	Provider string `yaml:"provider"`
}

// TLS secures one listener.
type TLS struct {
	// PEM file with the certificate chain that the listener shows.
	CertFile string `yaml:"certFile"`
	// PEM file with the private key of that certificate.
	KeyFile string `yaml:"keyFile"`
	// PEM file with the authorities whose client certificates are let in. Empty: clients need none.
	ClientCAFile string `yaml:"clientCAFile"`
	// Listen on other interfaces than loopback even without TLS and client certificates.
	Insecure bool `yaml:"insecure"`
}

// Roles of client certificates.
type Roles struct {
	// Certificates that may ask for operations, and see all that those of read see.
	Operate string `yaml:"operate"`
	// Certificates that may see filters, plans, histories and events.
	Read string `yaml:"read"`
}

// ImageHub is the sample application.
type ImageHub struct {
	// Where Image Hub's API answers.
	Addr string `yaml:"addr"`
	// What Image Hub stands behind off Kubernetes. envoy: the plain Envoys of the group default. consul: sidecars of the
	// agent at consul.addr, which is on this machine. auto: consul where consul.addr is a loopback address, else envoy.
	Mesh string `yaml:"mesh"`
	// Where Image Hub answers through the sidecars of Consul: the one of imagehub-web listens there, on loopback only.
	SidecarAddr string `yaml:"sidecarAddr"`
	// Let Image Hub listen on other interfaces than loopback: it has no TLS.
	Insecure bool `yaml:"insecure"`
	// Secret that Image Hub's tokens are signed with, of 32 bytes or more. Empty: imagehub/token-key of secrets, else a
	// key that is made up once and kept sealed.
	Key SecretRef `yaml:"key"`
	// Image of Image Hub's API in clusters, whose tokens anybody can forge.
	APIImage string `yaml:"apiImage"`
	// Image of Image Hub's page in clusters.
	WebImage string `yaml:"webImage"`
	// Image of this program, as make image writes it, that runs in clusters instead of apiImage and webImage. Its tokens are
	// signed, with a key of each namespace. Empty: those two run.
	Image string `yaml:"image"`
	// Host that a cluster's gateway serves Image Hub for.
	Host string `yaml:"host"`
	// What of a cluster Image Hub stands behind. istio: Istio's Gateway, on Pods with the label istio=ingressgateway.
	// gateway-api: a Gateway of the Gateway API, of class istio, or consul where Consul is. auto: istio, or gateway-api where
	// only that is served.
	Gateway string `yaml:"gateway"`
	// Label the namespace of Image Hub in a cluster with istio-injection=enabled, and make it where it is missing. Otherwise
	// Image Hub's Pods alone ask for a sidecar.
	LabelNamespace bool `yaml:"labelNamespace"`
}

// OnConsul says whether Image Hub stands behind sidecars of Consul off Kubernetes.
func (c Config) OnConsul() bool {
	u, err := url.Parse(c.Consul.Addr)
	return c.ImageHub.Mesh == "consul" || c.ImageHub.Mesh == "auto" && err == nil && loopback(net.JoinHostPort(u.Hostname(), u.Port()))
}

// Consul is one Consul off Kubernetes.
type Consul struct {
	// Address of Consul's HTTP API, http://HOST:PORT or https://HOST:PORT. Empty: there is none.
	Addr string `yaml:"addr"`
	// ACL token. Empty: none is sent.
	Token ConsulToken `yaml:"token"`
	// PEM file with the authorities of Consul's certificate. Empty: those of the system.
	CAFile string `yaml:"caFile"`
	// PEM file with the client certificate that Consul is shown. Empty: none.
	CertFile string `yaml:"certFile"`
	// PEM file with the private key of that certificate.
	KeyFile string `yaml:"keyFile"`
	// Consul's namespace, where the server has them. Empty: the token's.
	Namespace string `yaml:"namespace"`
	// Consul's admin partition, where the server has them. Empty: the agent's.
	Partition string `yaml:"partition"`
	// Admin addresses of the proxies that may be asked what they run, HOST:PORT, separated by commas. Without them an operation
	// says that nothing was verified.
	Admin string `yaml:"admin"`
	// Folder on the proxies' machines where the adapter, which runs there too or has it mounted, puts modules as SHA256.wasm.
	// It has to be there. Empty: modules are delivered otherwise.
	LocalPath string `yaml:"localPath"`
}

// ConsulToken names an entry of Secrets.
type ConsulToken struct {
	// Name, under secrets, of Consul's token.
	Name string `yaml:"name"`
	// Key within the secret of Consul's token.
	Key string `yaml:"key"`
}

// SecretRef names an entry of Secrets.
type SecretRef struct {
	// Name, under secrets, of the secret that Image Hub's tokens are signed with.
	Name string `yaml:"name"`
	// Key within the secret that Image Hub's tokens are signed with.
	Key string `yaml:"key"`
}

// SealKey names an entry of Secrets.
type SealKey struct {
	// Name, under secrets, of the secret that kubeconfigs are sealed with.
	Name string `yaml:"name"`
	// Key within the secret that kubeconfigs are sealed with.
	Key string `yaml:"key"`
}

// Limits bound what the adapter takes on.
type Limits struct {
	// Operations that may wait; more are refused.
	Queue int `yaml:"queue"`
	// Operations that run side by side.
	Workers int `yaml:"workers"`
	// Calls and streams that one client, told by its certificate or else by its address, may begin a second over gRPC;
	// twice as many at once.
	CallRate int `yaml:"callRate"`
	// Calls of one client that may run at once over gRPC. Each may bring up to 32 MiB.
	CallsPerClient int `yaml:"callsPerClient"`
	// Calls of all clients that may run at once over gRPC.
	Calls int `yaml:"calls"`
	// Streams, such as those of events, that one client may have open over gRPC.
	StreamsPerClient int `yaml:"streamsPerClient"`
	// Streams that all clients may have open over gRPC.
	Streams int `yaml:"streams"`
	// Connections that one address may have to each of grpcAddr, httpAddr and modulesAddr.
	ConnectionsPerAddress int `yaml:"connectionsPerAddress"`
	// Connections that all may have to each of grpcAddr, httpAddr and modulesAddr.
	Connections int `yaml:"connections"`
	// Envoys that one client, told by its certificate or else by its address, may connect.
	ProxiesPerClient int `yaml:"proxiesPerClient"`
	// Envoys that may be connected.
	Proxies int `yaml:"proxies"`
	// Discovery requests a second of one Envoy; twice as many at once.
	ProxyRequestRate int `yaml:"proxyRequestRate"`
	// Discovery requests a second of all Envoys; twice as many at once.
	RequestRate int `yaml:"requestRate"`
	// Size of a module in bytes, at most 20971520.
	ModuleBytes int `yaml:"moduleBytes"`
	// Time to fetch a module, for the adapter and for those who fetch from modulesAddr.
	ModuleTimeout time.Duration `yaml:"moduleTimeout"`
	// How long a module is kept that no operation, no chain and none of its last 10 revisions refers to any more.
	ModuleKeep time.Duration `yaml:"moduleKeep"`
}

// Source says where a secret's value is: exactly one is set.
type Source struct {
	// Environment variable of the adapter.
	Env string `yaml:"env,omitempty"`
	// File whose content is the value, without the line break at its end.
	File string `yaml:"file,omitempty"`
}

// Defaults are the settings of an adapter that is told nothing.
func Defaults() Config {
	return Config{
		GRPCAddr:  "127.0.0.1:10014",
		GRPCRoles: Roles{Operate: "meshery-filters://role/operate", Read: "meshery-filters://role/read"},
		Clusters:  "kubeconfigs",
		XDSAddr:   "127.0.0.1:10015",
		HTTPAddr:  "127.0.0.1:10016",
		StateDir:  "~/.meshery/filters",
		Sync:      "always",
		ImageHub: ImageHub{Addr: "127.0.0.1:10017", Mesh: "auto", SidecarAddr: "127.0.0.1:10019", APIImage: "layer5/image-hub-api:latest", WebImage: "layer5/image-hub-web:latest",
			Host: "imagehub.localhost", Gateway: "auto"},
		Limits: Limits{Queue: 1000, Workers: 8, CallRate: 1000, CallsPerClient: 250, Calls: 500, StreamsPerClient: 2000, Streams: 4000,
			ConnectionsPerAddress: 4000, Connections: 8000, ProxiesPerClient: 20000, Proxies: 20000, ProxyRequestRate: 100, RequestRate: 50000,
			ModuleBytes: maxModule, ModuleTimeout: time.Minute, ModuleKeep: time.Hour},
		ShutdownTimeout: 30 * time.Second,
		LogFormat:       "text",
		Meshery:         Meshery{Register: true},
		Secrets:         map[string]map[string]Source{},
	}
}

// List gives the parts of a setting that holds several, separated by commas.
func List(s string) []string {
	var parts []string
	for part := range strings.SplitSeq(s, ",") {
		if part = strings.TrimSpace(part); part != "" {
			parts = append(parts, part)
		}
	}
	return parts
}

// String is the configuration as YAML. It shows no secret, not even one that stands where Validate refuses it.
func (c Config) String() string {
	c.StoreURL, c.NATSURL, c.MesheryServer, c.ModulesURL = redact(c.StoreURL), redact(c.NATSURL), redact(c.MesheryServer), redact(c.ModulesURL)
	c.Consul.Addr = redact(c.Consul.Addr)
	secrets := map[string]map[string]Source{}
	for name, keys := range c.Secrets {
		secrets[name] = map[string]Source{}
		for key, s := range keys {
			if s.Env != "" && !variable.MatchString(s.Env) {
				s.Env = "REDACTED"
			}
			secrets[name][key] = s
		}
	}
	c.Secrets = secrets
	type plain Config // without String
	text, err := yaml.Marshal(plain(c))
	if err != nil { // a struct of strings and numbers always encodes
		return fmt.Sprintf("configuration that cannot be shown: %v", err)
	}
	return string(text)
}

// GoString keeps %#v from showing what String does not.
func (c Config) GoString() string { return c.String() }

// LogValue keeps logs from showing what String does not.
func (c Config) LogValue() slog.Value { return slog.StringValue(c.String()) }

// redact hides an address that may carry credentials, well-formed or not.
func redact(s string) string {
	if strings.Contains(s, "@") {
		return "REDACTED"
	}
	return s
}
