package consultest

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/meshery/meshery-filters/build/controlplanes/stack"
	"github.com/meshery/meshery-filters/internal/envoy"
)

// ServiceOptions say what a service is like.
type ServiceOptions struct {
	// Name of the service. It must be set.
	Name string
	// ID tells its instances apart. Default: Name.
	ID string
	// At is where it answers already, host:port. Default: a server of this process.
	At string
	// Handler answers its requests. Default: one that says method and path.
	Handler http.Handler
	// Upstreams are the services that it calls, which have to be registered before.
	Upstreams []string
	// Late has others reach it when its sidecar serves, as Consul has Pods. Default: as soon as it is registered.
	Late bool
}

// Service is a service of this process behind a sidecar.
type Service struct {
	Name, ID string
	// Addr is where it answers itself, without the sidecar: http://127.0.0.1:PORT.
	Addr string
	// Upstreams are where its sidecar takes requests for other services, http://127.0.0.1:PORT by their names.
	Upstreams map[string]string
	// Envoy is the sidecar.
	Envoy *envoy.Process

	server *httptest.Server
	public string // port of the sidecar, by which others call it
}

// Service registers one and runs its sidecar until that serves.
func (c *Consul) Service(ctx context.Context, o ServiceOptions) (_ *Service, err error) {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	handler := o.Handler
	if handler == nil {
		handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { fmt.Fprintf(w, "%s %s\n", r.Method, r.URL.Path) })
	}
	s := &Service{Name: o.Name, ID: cmp.Or(o.ID, o.Name)}
	if o.At != "" {
		s.Addr = "http://" + o.At
	} else {
		s.server = httptest.NewServer(handler)
		s.Addr = s.server.URL
	}
	defer func() {
		if err != nil {
			s.close()
		}
	}()
	for n := 1; ; n++ {
		err := c.sidecar(ctx, s, o)
		if err == nil {
			break
		}
		if n == attempts || ctx.Err() != nil {
			return nil, fmt.Errorf("the sidecar of %s: %w; Consul's log ends:\n%s", o.Name, err, c.Log())
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.services = append(c.services, s)
	return s, nil
}

// sidecar registers the service with ports that are free, and starts its Envoy.
func (c *Consul) sidecar(ctx context.Context, s *Service, o ServiceOptions) error {
	ports, err := stack.FreePorts(1 + len(o.Upstreams))
	if err != nil {
		return err
	}
	s.Upstreams, s.public = map[string]string{}, ports[0]
	var calls []any
	for i, u := range o.Upstreams {
		port, _ := strconv.Atoi(ports[i+1])
		calls = append(calls, map[string]any{"DestinationName": u, "LocalBindAddress": "127.0.0.1", "LocalBindPort": port})
		s.Upstreams[u] = "http://127.0.0.1:" + ports[i+1]
	}
	_, own, _ := strings.Cut(strings.TrimPrefix(s.Addr, "http://"), ":")
	port, _ := strconv.Atoi(own)
	public, _ := strconv.Atoi(ports[0])
	// With the default check of the sidecar's port every change of its listeners takes the service out of rotation.
	checks := []any{}
	if o.Late {
		checks = append(checks, map[string]any{"CheckID": "ready-" + s.ID, "Name": "ready", "TTL": "24h", "Status": "critical"})
	}
	err = c.Send(ctx, http.MethodPut, "/v1/agent/service/register?replace-existing-checks=true", map[string]any{
		"Name": s.Name, "ID": s.ID, "Port": port, "Address": "127.0.0.1", "Checks": checks,
		"Connect": map[string]any{"SidecarService": map[string]any{
			"Port": public, "Address": "127.0.0.1", "Checks": []any{map[string]any{"AliasService": s.ID}},
			"Proxy": map[string]any{"LocalServiceAddress": "127.0.0.1", "LocalServicePort": port, "Upstreams": calls,
				"Config": map[string]any{"bind_address": "127.0.0.1"}},
		}}}, nil)
	if err != nil {
		return err
	}
	if s.Envoy, err = c.envoy(ctx, s.ID, "-sidecar-for", s.ID); err != nil {
		return err
	}
	listening, cancel := context.WithTimeout(ctx, startTimeout/attempts)
	defer cancel()
	err = s.Envoy.Ready(listening)
	for i := 0; err == nil && i < len(ports); i++ {
		err = s.bound(listening, ports[i])
	}
	if err == nil && o.Late {
		err = c.Send(ctx, http.MethodPut, "/v1/agent/check/pass/ready-"+s.ID, nil, nil)
	}
	if err != nil {
		_ = s.Envoy.Stop(context.WithoutCancel(ctx))
	}
	return err
}

// envoy starts one for what is registered, as Consul's own command line has it begin.
func (c *Consul) envoy(ctx context.Context, id string, args ...string) (*envoy.Process, error) {
	cmd := exec.CommandContext(ctx, c.program, append([]string{"connect", "envoy", "-bootstrap",
		"-http-addr", c.Addr, "-grpc-addr", c.grpc, "-admin-bind", "127.0.0.1:0"}, args...)...)
	cmd.Env = append(cmd.Environ(), "CONSUL_HTTP_TOKEN="+c.token)
	var problems bytes.Buffer
	cmd.Stderr = &problems
	bootstrap, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("make its bootstrap: %w: %s", err, &problems)
	}
	return envoy.Start(ctx, c.binary, envoy.ProcessOptions{Bootstrap: bootstrap, Concurrency: 1, Dir: filepath.Join(c.dir, id),
		Args: []string{"--drain-strategy", "immediate", "--drain-time-s", "20"}})
}

// Outside makes a service of what answers by TLS outside of the mesh, at host:port, with a terminating gateway before it: that
// speaks TLS with it, as the authority in caFile says of the name, and sidecars reach it as they do any other.
func (c *Consul) Outside(ctx context.Context, service, at, caFile, name string) (err error) {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	host, text, _ := strings.Cut(at, ":")
	port, _ := strconv.Atoi(text)
	ports, err := stack.FreePorts(1)
	if err != nil {
		return err
	}
	public, _ := strconv.Atoi(ports[0])
	gateway := &Service{Name: "outside-" + service, ID: "outside-" + service, public: ports[0]}
	for path, o := range map[string]map[string]any{
		"/v1/catalog/register": {"Node": gateway.ID, "Address": host, "NodeMeta": map[string]any{"external-node": "true"},
			"Service": map[string]any{"Service": service, "Address": host, "Port": port}},
		"/v1/config": {"Kind": "terminating-gateway", "Name": gateway.Name,
			"Services": []any{map[string]any{"Name": service, "CAFile": caFile, "SNI": name}}},
		"/v1/agent/service/register": {"Kind": "terminating-gateway", "Name": gateway.Name, "ID": gateway.ID, "Address": "127.0.0.1", "Port": public},
	} {
		if err := c.Send(ctx, http.MethodPut, path, o, nil); err != nil {
			return err
		}
	}
	if gateway.Envoy, err = c.envoy(ctx, gateway.ID, "-gateway", "terminating", "-proxy-id", gateway.ID); err != nil {
		return err
	}
	if err = gateway.bound(ctx, ports[0]); err != nil {
		gateway.close()
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.services = append(c.services, gateway)
	return nil
}

// bound waits until the sidecar listens on a port.
func (s *Service) bound(ctx context.Context, port string) error {
	for {
		r, err := fetch(ctx, "http://"+s.Envoy.AdminAddr()+"/listeners")
		if err == nil && strings.Contains(r.Body, "127.0.0.1:"+port+"\n") {
			return nil
		}
		select {
		case <-s.Envoy.Done():
			return s.Envoy.Err()
		case <-ctx.Done():
			return fmt.Errorf("it does not listen on port %s: %w", port, ctx.Err())
		case <-time.After(pollInterval):
		}
	}
}

// Withdraw takes a service away: it ends when no other sidecar has it among its endpoints any more.
func (c *Consul) Withdraw(ctx context.Context, s *Service) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	if err := c.Send(ctx, http.MethodPut, "/v1/agent/service/deregister/"+s.ID, nil, nil); err != nil {
		return err
	}
	c.mu.Lock()
	c.services = slices.DeleteFunc(slices.Clone(c.services), func(o *Service) bool { return o == s })
	others := c.services
	c.mu.Unlock()
	defer s.close()
	for _, o := range others {
		for {
			r, err := fetch(ctx, "http://"+o.Envoy.AdminAddr()+"/clusters")
			if err != nil || !strings.Contains(r.Body, "::127.0.0.1:"+s.public+"::") { // one that ended has none
				break
			}
			select {
			case <-ctx.Done():
				return fmt.Errorf("%s has still %s among its endpoints: %w", o.ID, s.ID, ctx.Err())
			case <-time.After(pollInterval):
			}
		}
	}
	return nil
}

func (s *Service) close() {
	if s.Envoy != nil {
		_ = s.Envoy.Stop(context.Background()) // one that cannot be stopped ends with this process
	}
	if s.server != nil {
		s.server.Close()
	}
}

// Get calls another service through the sidecar, by a connection of its own: an older one stays on the chain that it began
// with.
func (s *Service) Get(ctx context.Context, upstream, path string) (Response, error) {
	return fetch(ctx, s.Upstreams[upstream]+path)
}

// Response is an answer to a request.
type Response struct {
	Status int
	Header http.Header
	Body   string // at most 64 KiB of it
}

func fetch(ctx context.Context, url string) (Response, error) {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return Response{}, err
	}
	resp, err := (&http.Transport{DisableKeepAlives: true}).RoundTrip(req)
	if err != nil {
		return Response{}, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, 64<<10))
	return Response{resp.StatusCode, resp.Header, string(body)}, err
}

// Load is requests without a pause, one after the other.
type Load struct {
	cancel context.CancelFunc
	done   chan struct{}

	requests int
	failed   []string
}

// Load calls another service until End, which says how it went.
func (s *Service) Load(ctx context.Context, upstream string) *Load {
	ctx, cancel := context.WithCancel(ctx)
	l := &Load{cancel: cancel, done: make(chan struct{})}
	go func() {
		defer close(l.done)
		for ctx.Err() == nil {
			r, err := s.Get(ctx, upstream, "/load")
			if ctx.Err() != nil {
				return
			}
			l.requests++
			if err != nil || r.Status != http.StatusOK {
				l.failed = append(l.failed, fmt.Sprintf("%s %d %q %v %v", time.Now().Format("05.000"), r.Status, r.Body, r.Header, err))
			}
		}
	}()
	return l
}

// End ends the load. Failed are the answers that were not 200.
func (l *Load) End() (requests int, failed []string) {
	l.cancel()
	<-l.done
	return l.requests, l.failed
}

// Reaches calls another service until it answers 200.
func (s *Service) Reaches(ctx context.Context, upstream, path string) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	for {
		r, err := s.Get(ctx, upstream, path)
		if err == nil && r.Status == http.StatusOK {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%s does not reach %s: %d %w", s.ID, upstream, r.Status, errors.Join(err, ctx.Err()))
		case <-time.After(pollInterval):
		}
	}
}
