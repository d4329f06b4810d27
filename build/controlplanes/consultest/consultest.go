// Package consultest runs a real Consul agent and services behind sidecars of real Envoys that it configures, for tests.
// The programs are what `make controlplanes` and `make envoy` have built and installed.
//
// All is on the loopback interface. A service answers by a server of this process, and is called through the sidecar of
// another, by mutual TLS between the two, as in production.
package consultest

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/meshery/meshery-filters/build/controlplanes/stack"
	"github.com/meshery/meshery-filters/internal/envoy"
)

const (
	startTimeout = 3 * time.Minute // of the agent or a sidecar, on a machine that is busy with other things
	askTimeout   = 20 * time.Second
	pollInterval = 20 * time.Millisecond
	attempts     = 4 // a port that was free may be taken before it is used
)

// Options say what a Consul is like.
type Options struct {
	// ACL has the agent refuse what comes without a token. Management then is the token that may do everything.
	ACL bool
	// TLS, when set, has the agent answer by HTTPS, too, to clients with a certificate of the authority.
	TLS *TLS
}

// TLS are files in PEM: of an authority, and of the agent's certificate for 127.0.0.1 with its key.
type TLS struct{ CA, Cert, Key string }

// Management is the token that may do everything, where there are ACLs.
const Management = "11111111-2222-3333-4444-555555555555"

// Consul is a server with what was registered there. It is safe for concurrent use. Whoever started it calls Stop.
type Consul struct {
	// Addr is where its HTTP API answers: http://127.0.0.1:PORT.
	Addr string
	// Secure is where it answers by TLS, https://127.0.0.1:PORT; empty: nowhere.
	Secure string

	program string
	dir     string
	binary  envoy.Binary
	process *stack.Process
	grpc    string
	token   string

	mu       sync.Mutex
	services []*Service
}

// Start runs an agent in development mode until it has a leader. Files are kept in dir, which is made and not removed.
func Start(ctx context.Context, dir string, o Options) (*Consul, error) {
	folder, err := stack.Folder(ctx, "consul")
	if err != nil {
		return nil, err
	}
	binary, err := envoy.Find(ctx, "")
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	c := &Consul{program: filepath.Join(folder, "consul"), dir: dir, binary: binary}
	if o.ACL {
		c.token = Management
	}
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	for n := 1; ; n++ {
		err := c.start(ctx, o)
		if err == nil {
			return c, nil
		}
		if n == attempts || !strings.Contains(err.Error(), "address already in use") {
			return nil, err
		}
	}
}

func (c *Consul) start(ctx context.Context, o Options) error {
	ports, err := stack.FreePorts(5)
	if err != nil {
		return err
	}
	first := freePair()
	settings := map[string]any{
		"node_name": "machine", "bind_addr": "127.0.0.1", "client_addr": "127.0.0.1", "disable_update_check": true,
		"ports": map[string]any{"http": json.Number(ports[0]), "grpc": json.Number(ports[1]), "server": json.Number(ports[2]),
			"serf_lan": json.Number(ports[3]), "serf_wan": -1, "dns": -1, "https": -1, "grpc_tls": -1,
			"sidecar_min_port": first, "sidecar_max_port": first + 1},
	}
	if o.ACL {
		settings["acl"] = map[string]any{"enabled": true, "default_policy": "deny",
			"tokens": map[string]any{"initial_management": Management, "agent": Management}}
	}
	if o.TLS != nil {
		settings["ports"].(map[string]any)["https"] = json.Number(ports[4])
		settings["tls"] = map[string]any{"https": map[string]any{"ca_file": o.TLS.CA, "cert_file": o.TLS.Cert, "key_file": o.TLS.Key, "verify_incoming": true}}
		c.Secure = "https://127.0.0.1:" + ports[4]
	}
	data, err := json.Marshal(settings)
	if err != nil {
		return err
	}
	file := filepath.Join(c.dir, "agent.json")
	if err := os.WriteFile(file, data, 0o600); err != nil {
		return err
	}
	p, err := stack.Run(c.program, "consul", nil, "agent", "-dev", "-config-file", file, "-log-level", "warn")
	if err != nil {
		return err
	}
	c.process, c.Addr, c.grpc = p, "http://127.0.0.1:"+ports[0], "127.0.0.1:"+ports[1]
	if err := p.Await(ctx, c.ready); err != nil {
		p.Stop()
		return err
	}
	return nil
}

// freePair finds two ports in a row, for sidecars that come without one of their own. They are below those that the kernel
// gives to connections, whose neighbours are seldom free.
func freePair() (first int) {
	free := func(port int) bool {
		l, err := net.Listen("tcp", "127.0.0.1:"+strconv.Itoa(port))
		if err == nil {
			l.Close()
		}
		return err == nil
	}
	for range 1000 {
		if first = 20000 + rand.IntN(12000); free(first) && free(first+1) {
			break
		}
	}
	return first
}

// ready has the leader keep something: it answers before it can.
func (c *Consul) ready(ctx context.Context) error {
	if o := c.token; o != "" { // tokens come after the leader
		if err := c.Send(ctx, http.MethodGet, "/v1/acl/token/self", nil, nil); err != nil {
			return err
		}
	}
	return c.Send(ctx, http.MethodPut, "/v1/kv/consultest", "ready", nil)
}

// Command is one of Consul's own command line, as one who may do everything and with Envoy in the path.
func (c *Consul) Command(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, c.program, args...)
	cmd.Env = append(os.Environ(), "CONSUL_HTTP_ADDR="+c.Addr, "CONSUL_GRPC_ADDR="+c.grpc, "CONSUL_HTTP_TOKEN="+c.token,
		"PATH="+filepath.Dir(c.binary.Path)+string(os.PathListSeparator)+os.Getenv("PATH"))
	return cmd
}

// Stop ends every part, the last started first, and waits until they are gone.
func (c *Consul) Stop() {
	c.mu.Lock()
	services := c.services
	c.mu.Unlock()
	for _, s := range services {
		s.close()
	}
	c.process.Stop()
}

// Cut takes the agent away from the sidecars, for good.
func (c *Consul) Cut() { c.process.Stop() }

// Log is the end of the agent's.
func (c *Consul) Log() string { return c.process.Log() }

// Send asks Consul as one who may do everything, with in as JSON, and reads the answer into out; nil is neither.
func (c *Consul) Send(ctx context.Context, method, path string, in, out any) error {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	var body bytes.Buffer
	if in != nil {
		if err := json.NewEncoder(&body).Encode(in); err != nil {
			return err
		}
	}
	req, err := http.NewRequestWithContext(ctx, method, c.Addr+path, &body)
	if err != nil {
		return err
	}
	req.Header.Set("X-Consul-Token", c.token)
	resp, err := (&http.Transport{DisableKeepAlives: true}).RoundTrip(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(io.LimitReader(resp.Body, 8<<20))
	if err != nil {
		return err
	}
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("%s %s: status %d: %s", method, path, resp.StatusCode, answer)
	}
	if out == nil {
		return nil
	}
	return json.Unmarshal(answer, out)
}

// Write keeps a configuration entry, in place of the one of its kind and name.
func (c *Consul) Write(ctx context.Context, entry map[string]any) error {
	return c.Send(ctx, http.MethodPut, "/v1/config", entry, nil)
}

// Delete takes a configuration entry away.
func (c *Consul) Delete(ctx context.Context, kind, name string) error {
	return c.Send(ctx, http.MethodDelete, "/v1/config/"+kind+"/"+name, nil, nil)
}

// Entry reads a configuration entry, without what changes each time that it is written; nil where there is none.
func (c *Consul) Entry(ctx context.Context, kind, name string) (map[string]any, error) {
	var all []map[string]any
	if err := c.Send(ctx, http.MethodGet, "/v1/config/"+kind, nil, &all); err != nil {
		return nil, err
	}
	for _, e := range all {
		if e["Name"] == name {
			for _, key := range []string{"CreateIndex", "ModifyIndex", "Hash"} {
				delete(e, key)
			}
			return e, nil
		}
	}
	return nil, nil
}

// Token makes one that has the rights of a policy, in Consul's own words.
func (c *Consul) Token(ctx context.Context, name, rules string) (string, error) {
	if err := c.Send(ctx, http.MethodPut, "/v1/acl/policy", map[string]any{"Name": name, "Rules": rules}, nil); err != nil {
		return "", err
	}
	var made struct{ SecretID string }
	err := c.Send(ctx, http.MethodPut, "/v1/acl/token", map[string]any{"Policies": []any{map[string]any{"Name": name}}}, &made)
	return made.SecretID, err
}
