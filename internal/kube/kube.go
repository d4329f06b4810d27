// Package kube makes plans true in Kubernetes clusters through their own API, by server-side apply.
//
// The promise: everything is tried in a server-side dry run before anything is written, and only what differs is
// written; what we did not create is never deleted, nor is a kind that holds what others put into it; another field
// manager's field is taken over by force only; an object of the user's is changed under its resourceVersion and gets
// back exactly what it had; and the inventory, a ConfigMap for each target, knows of every object before it is made, so
// that a run that was cut off is taken up by the next one. The limit: an object belongs to one target, and what a
// server's webhooks do differently in a dry run is not foreseen.
package kube

import (
	"cmp"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/rest"

	"github.com/meshery/meshery-filters/internal/problem"
)

// Manager is the field manager of all that is written. Another name would orphan the fields of every object there is.
const Manager = "meshery-filters"

// defaultNamespace is where inventories are kept in clusters that others bring.
const defaultNamespace = "meshery-filters"

// Options say how a cluster is reached. Log must be set.
type Options struct {
	// Context is the kubeconfig's context. Default: its current one.
	Context string
	// Namespace is where the inventories are kept. It is made when it is not there. Default: meshery-filters, or with Own
	// the adapter's own.
	Namespace string
	// Allow is what a kubeconfig may have besides what is harmless. Default: nothing.
	Allow Allow
	// Timeout bounds one request, and not an operation. Default: 30 s.
	Timeout time.Duration
	Log     *slog.Logger
}

// Allow is what a kubeconfig may have. Each of these lets whoever writes kubeconfigs use what is the adapter's.
type Allow struct {
	Exec      bool // run a program that gives the credentials
	Files     bool // read certificates, keys and tokens from files, by absolute path
	Proxy     bool // connect through proxy-url, or through the proxy that the adapter's environment names
	Insecure  bool // http, or a certificate that is not verified
	LinkLocal bool // connect to link-local addresses and those of clouds' metadata services
}

// Cluster is one cluster, as one user of it. It is safe for concurrent use. Whoever made it calls Close.
type Cluster struct {
	// Host of the API server, for messages.
	Host string

	server    *url.URL
	client    *http.Client
	upgrading *http.Client // by HTTP/1.1, which alone can become something else
	transport *http.Transport
	opts      Options
	memory    time.Duration // of what is served

	mu      sync.Mutex
	served  map[string]known[served] // by the root of the API
	schemas map[schema.GroupVersion]known[fieldsOf]
}

// Open makes a Cluster of a kubeconfig, without a request. One that has what is not allowed is
// problem.KubeconfigRefused, with every such field.
func Open(kubeconfig []byte, o Options) (*Cluster, error) {
	config, err := parse(kubeconfig, o.Context, o.Allow)
	if err != nil {
		return nil, err
	}
	o.Namespace = cmp.Or(o.Namespace, defaultNamespace)
	return newCluster(config, o)
}

// OpenFile makes a Cluster of a kubeconfig file of whoever runs this program, which may have everything that is theirs:
// Options.Allow does not matter, and paths in it are relative to it.
func OpenFile(file string, o Options) (*Cluster, error) {
	o.Allow = Allow{Exec: true, Files: true, Proxy: true, Insecure: true, LinkLocal: true}
	loaded, err := loadFile(file)
	if err != nil {
		return nil, err
	}
	config, err := configOf(loaded, o.Context, o.Allow)
	if err != nil {
		return nil, err
	}
	o.Namespace = cmp.Or(o.Namespace, defaultNamespace)
	return newCluster(config, o)
}

// accountDir is where Kubernetes mounts a Pod's ServiceAccount.
const accountDir = "/var/run/secrets/kubernetes.io/serviceaccount"

// Own is the cluster that the adapter runs in, as the ServiceAccount of its Pod, whose token is read again as it is
// renewed. Outside of a cluster it is problem.KubeconfigRefused.
func Own(o Options) (*Cluster, error) {
	return own(accountDir, os.Getenv("KUBERNETES_SERVICE_HOST"), os.Getenv("KUBERNETES_SERVICE_PORT"), o)
}

func own(dir, host, port string, o Options) (*Cluster, error) {
	if host == "" || port == "" {
		return nil, problem.KubeconfigRefused.New("the adapter does not run in a Kubernetes Pod, so it has no ServiceAccount")
	}
	token := filepath.Join(dir, "token")
	if _, err := os.Stat(token); err != nil {
		return nil, problem.KubeconfigRefused.New("the Pod has no ServiceAccount token: %w", err)
	}
	if o.Namespace == "" {
		ns, err := os.ReadFile(filepath.Join(dir, "namespace"))
		if err != nil {
			return nil, problem.KubeconfigRefused.New("the Pod's namespace cannot be read: %w", err)
		}
		o.Namespace = strings.TrimSpace(string(ns))
	}
	return newCluster(&rest.Config{
		Host:            (&url.URL{Scheme: "https", Host: joinHostPort(host, port)}).String(),
		BearerTokenFile: token,
		TLSClientConfig: rest.TLSClientConfig{CAFile: filepath.Join(dir, "ca.crt")},
	}, o)
}

func newCluster(config *rest.Config, o Options) (*Cluster, error) {
	o.Timeout = cmp.Or(o.Timeout, 30*time.Second)
	config.UserAgent = Manager
	server, err := url.Parse(config.Host)
	if err != nil {
		return nil, problem.KubeconfigRefused.New("the server's address cannot be read")
	}
	// client-go would keep every transport it ever made, and kubeconfigs come with every operation.
	tls, err := rest.TLSConfigFor(config)
	if err != nil {
		return nil, problem.KubeconfigRefused.New("its certificates or its key cannot be used: %w", err)
	}
	t := &http.Transport{
		DialContext:            dialer(o.Allow),
		TLSClientConfig:        tls,
		TLSHandshakeTimeout:    10 * time.Second,
		ForceAttemptHTTP2:      true,
		MaxIdleConnsPerHost:    parallel,
		IdleConnTimeout:        time.Minute,
		MaxResponseHeaderBytes: 64 << 10,
		Proxy:                  config.Proxy,
	}
	upgrades := t.Clone()
	upgrades.ForceAttemptHTTP2 = false
	upgrades.Protocols = new(http.Protocols)
	upgrades.Protocols.SetHTTP1(true)
	c := &Cluster{
		Host: server.Host, server: server, transport: t, opts: o,
		memory: memory, served: map[string]known[served]{}, schemas: map[schema.GroupVersion]known[fieldsOf]{},
	}
	for _, of := range []struct {
		client    **http.Client
		transport *http.Transport
	}{{&c.client, t}, {&c.upgrading, upgrades}} {
		wrapped, err := rest.HTTPWrappersForConfig(config, of.transport)
		if err != nil {
			return nil, problem.KubeconfigRefused.New("its credentials cannot be used: %w", err)
		}
		*of.client = &http.Client{Transport: wrapped, CheckRedirect: func(*http.Request, []*http.Request) error { return errRedirect }}
	}
	return c, nil
}

var errRedirect = errors.New("it sends us to another address, as no API server does")

// Close ends the idle connections.
func (c *Cluster) Close() { c.transport.CloseIdleConnections() }

func (c *Cluster) String() string { return fmt.Sprintf("cluster %s", c.Host) }
