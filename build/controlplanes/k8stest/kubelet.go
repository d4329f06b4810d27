package k8stest

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"time"

	"k8s.io/cri-streaming/pkg/streaming/portforward"
)

// Forward says where the port of a Pod really is, host:port, or that nothing listens there.
type Forward func(namespace, pod string, port int) (address string, err error)

// Kubelet is a node's, as far as it forwards ports: whoever makes a Pod with spec.nodeName Node reaches, through the API
// server, what Forward says. It runs no Pods. Whoever started it calls Stop.
type Kubelet struct {
	Node string

	server *httptest.Server
}

// StartKubelet makes a Node of that name, on the loopback interface.
func (s *Server) StartKubelet(ctx context.Context, node string, forward Forward) (*Kubelet, error) {
	k := &Kubelet{Node: node}
	k.server = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		parts := strings.Split(strings.TrimPrefix(r.URL.Path, "/portForward/"), "/")
		options, err := portforward.NewV4Options(r)
		if len(parts) < 2 || err != nil {
			http.Error(w, fmt.Sprintf("%s: %v", r.URL.Path, err), http.StatusBadRequest)
			return
		}
		portforward.ServePortForward(w, r, forwarder{forward, parts[0]}, parts[1], "", options, time.Minute, 10*time.Second, portforward.SupportedProtocols)
	}))
	k.server.EnableHTTP2 = false // an upgrade is for HTTP/1.1 only
	k.server.StartTLS()
	port := k.server.Listener.Addr().(*net.TCPAddr).Port
	object := map[string]any{"apiVersion": "v1", "kind": "Node", "metadata": map[string]any{"name": node}}
	err := s.Send(ctx, http.MethodPost, "/api/v1/nodes", object)
	if err == nil {
		object["status"] = map[string]any{
			"addresses":       []any{map[string]any{"type": "InternalIP", "address": "127.0.0.1"}},
			"daemonEndpoints": map[string]any{"kubeletEndpoint": map[string]any{"Port": port}},
			"conditions":      []any{map[string]any{"type": "Ready", "status": "True"}},
		}
		err = s.Send(ctx, http.MethodPatch, "/api/v1/nodes/"+node+"/status", object)
	}
	if err == nil { // a new Node is marked as not ready, until the controller that watches them finds it is
		err = s.Send(ctx, http.MethodPatch, "/api/v1/nodes/"+node, map[string]any{"spec": map[string]any{"taints": nil}})
	}
	if err != nil {
		k.Stop()
		return nil, fmt.Errorf("make node %s: %w", node, err)
	}
	return k, nil
}

// Stop ends the server and every connection that it forwards. The Node stays.
func (k *Kubelet) Stop() {
	k.server.CloseClientConnections()
	k.server.Close()
}

// Send makes a request as Admin. A PATCH is a merge patch, or with fieldManager in its path a server-side apply.
func (s *Server) Send(ctx context.Context, method, path string, object any) error {
	_, err := s.exchange(ctx, method, path, object)
	return err
}

// Get reads an object as Admin.
func (s *Server) Get(ctx context.Context, path string, object any) error {
	answer, err := s.exchange(ctx, http.MethodGet, path, nil)
	if err != nil {
		return err
	}
	return json.Unmarshal(answer, object)
}

func (s *Server) exchange(ctx context.Context, method, path string, object any) ([]byte, error) {
	data, err := json.Marshal(object)
	if err != nil {
		return nil, err
	}
	req, err := http.NewRequestWithContext(ctx, method, s.URL+path, bytes.NewReader(data))
	if err != nil {
		return nil, err
	}
	req.Header.Set("Authorization", "Bearer "+s.Token(Admin))
	req.Header.Set("Content-Type", "application/json")
	switch {
	case method == http.MethodPatch && strings.Contains(path, "fieldManager="):
		req.Header.Set("Content-Type", "application/apply-patch+yaml")
	case method == http.MethodPatch:
		req.Header.Set("Content-Type", "application/merge-patch+json")
	}
	resp, err := s.client.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	if err == nil && resp.StatusCode >= http.StatusMultipleChoices {
		err = fmt.Errorf("%s %s: %s: %s", method, path, resp.Status, answer)
	}
	return answer, err
}

// forwarder copies between a stream and the port of a Pod in one namespace.
type forwarder struct {
	forward   Forward
	namespace string
}

func (f forwarder) PortForward(ctx context.Context, pod, _ string, port int32, stream io.ReadWriteCloser) error {
	address, err := f.forward(f.namespace, pod, int(port))
	if err != nil {
		return err
	}
	conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", address)
	if err != nil {
		return fmt.Errorf("port %s of pod %s: %w", strconv.Itoa(int(port)), pod, err)
	}
	defer conn.Close()
	there := make(chan struct{})
	go func() {
		defer close(there)
		_, _ = io.Copy(conn, stream)
		_ = conn.(*net.TCPConn).CloseWrite()
	}()
	_, err = io.Copy(stream, conn)
	_ = stream.Close()
	<-there
	return err
}
