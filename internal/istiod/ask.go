package istiod

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/meshery/meshery-filters/internal/plan"
	"github.com/meshery/meshery-filters/internal/problem"
)

const (
	monitoringPort = 15014 // of istiod; its debug endpoints take everybody for a friend who comes by port-forward
	adminPort      = 15000 // of a proxy

	askTimeout = 15 * time.Second // of one Pod, for all that it is asked at once
	maxSync    = 32 << 20         // bytes of one istiod's states: 2 KiB for a proxy
	maxDump    = 64 << 20         // bytes of a proxy's listeners, with the modules that travel inside them
	maxStats   = 4 << 20
)

// synced is what istiod says of what it sent to one proxy. Two that are equal speak of the same.
type synced struct {
	listeners, extensions resourceState
}

type resourceState struct {
	Sent      string    `json:"sent"`
	Acked     string    `json:"acked"`
	SentTime  time.Time `json:"sentTime"`
	LastError string    `json:"lastError"`
}

// answered says whether the proxy has taken or refused the last that it was sent.
func (s resourceState) answered() bool { return s.Sent == s.Acked || s.LastError != "" }

// acknowledged says whether the proxy has taken the last of everything.
func (s synced) acknowledged() bool {
	return s.errors() == "" && s.listeners.Sent != "" && s.listeners.Sent == s.listeners.Acked && s.extensions.Sent == s.extensions.Acked
}

// errors are the proxy's own texts of what it refused last.
func (s synced) errors() string {
	return strings.TrimSpace(s.extensions.LastError + "\n" + s.listeners.LastError)
}

// connection is a proxy as one istiod knows it.
type connection struct {
	istiod plan.Pod
	synced
}

// connected asks every istiod for the proxies of the plan's kind and namespace.
func (w *watch) connected(ctx context.Context) (map[plan.Pod]connection, error) {
	istiods, err := w.cluster.Pods(ctx, w.root, map[string]string{"app": "istiod"})
	if err != nil {
		return nil, fmt.Errorf("find istiod: %w", err)
	}
	if len(istiods) == 0 {
		return nil, fmt.Errorf("no istiod runs in namespace %s", w.root)
	}
	all := map[plan.Pod]connection{}
	for _, istiod := range istiods {
		status, body, err := w.get(ctx, istiod, monitoringPort, "/debug/syncz?namespace="+url.QueryEscape(w.plan.Proxies.Namespace), maxSync)
		if err != nil {
			return nil, fmt.Errorf("ask istiod %s: %w", istiod, err)
		}
		var proxies []struct {
			Proxy     string                   `json:"proxy"`
			Type      string                   `json:"proxy_type"`
			Resources map[string]resourceState `json:"resources"`
		}
		if err := json.Unmarshal(body, &proxies); status != http.StatusOK || err != nil {
			return nil, fmt.Errorf("ask istiod %s: it answers %d to /debug/syncz, and nothing that istiod says", istiod, status)
		}
		for _, p := range proxies {
			dot := strings.LastIndex(p.Proxy, ".")
			if dot < 0 || p.Type != w.plan.Proxies.Role {
				continue
			}
			pod := plan.Pod{Namespace: p.Proxy[dot+1:], Name: p.Proxy[:dot]}
			c := connection{istiod, synced{p.Resources["type.googleapis.com/envoy.config.listener.v3.Listener"],
				p.Resources["type.googleapis.com/envoy.config.core.v3.TypedExtensionConfig"]}}
			// One that has just moved to another istiod is with both for a moment.
			if known, ok := all[pod]; !ok || known.listeners.SentTime.Before(c.listeners.SentTime) {
				all[pod] = c
			}
		}
	}
	return all, nil
}

// planned is what istiod would send the proxy now. A proxy that has left it meanwhile has nothing.
func (w *watch) planned(ctx context.Context, p *proxy) (*view, error) {
	query := url.Values{"proxyID": {p.pod.Name + "." + p.pod.Namespace}, "types": {"lds,ecds"}}
	status, body, err := w.get(ctx, p.istiod, monitoringPort, "/debug/config_dump?"+query.Encode(), maxDump)
	v := &view{}
	switch {
	case err != nil:
	case status == http.StatusNotFound:
		return v, nil
	case status != http.StatusOK:
		err = fmt.Errorf("it answers %d to /debug/config_dump", status)
	default:
		err = v.readPlanned(body)
	}
	if err != nil {
		return nil, fmt.Errorf("ask istiod %s about %s: %w", p.istiod, p.pod, err)
	}
	return v, nil
}

// ask is what the proxy says of itself.
func (w *watch) ask(ctx context.Context, pod plan.Pod) (*view, error) {
	w.mu.Lock()
	err := w.silent[pod.Namespace]
	w.mu.Unlock()
	if err != nil {
		return nil, err
	}
	v := &view{}
	err = w.converse(ctx, pod, adminPort, func(get getter) error {
		for _, q := range []struct {
			path string
			most int64
			read func([]byte) error
		}{
			{"/config_dump?resource=dynamic_listeners", maxDump, v.readListeners},
			{"/config_dump?resource=ecds_filters", maxDump, v.readExtensions},
			// After the dump, so that what is accepted is never older than what is shown.
			{"/stats?filter=" + url.QueryEscape(`^wasm\.(wasm_vm_count|remote_load)|^extension_config_discovery\..*\.update_time$`), maxStats, v.readStats},
		} {
			status, body, err := get(q.path, q.most)
			switch {
			case err != nil:
			case status == http.StatusNotFound: // there is nothing of that kind
			case status != http.StatusOK:
				err = fmt.Errorf("it answers %d to %s", status, q.path)
			default:
				err = q.read(body)
			}
			if err != nil {
				return err
			}
		}
		return nil
	})
	if errors.Is(err, problem.RightMissing) {
		w.mu.Lock()
		w.silent[pod.Namespace] = err
		w.mu.Unlock()
	}
	return v, err
}

// get asks a Pod for one page.
func (w *watch) get(ctx context.Context, pod plan.Pod, port int, path string, most int64) (status int, body []byte, err error) {
	err = w.converse(ctx, pod, port, func(get getter) error {
		status, body, err = get(path, most)
		return err
	})
	return status, body, err
}

// getter asks for one page of at most so many bytes.
type getter func(path string, most int64) (status int, body []byte, err error)

// converse asks a Pod over one connection.
func (w *watch) converse(ctx context.Context, pod plan.Pod, port int, talk func(getter) error) error {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	conn, err := w.cluster.Dial(ctx, pod.Namespace, pod.Name, port)
	if err != nil {
		return err
	}
	defer conn.Close()
	// The connection knows no deadlines.
	defer context.AfterFunc(ctx, func() { _ = conn.Close() })()
	in := bufio.NewReader(conn)
	err = talk(func(path string, most int64) (int, []byte, error) {
		return exchange(ctx, conn, in, path, most)
	})
	if err != nil && ctx.Err() != nil {
		return ctx.Err()
	}
	return err
}

func exchange(ctx context.Context, conn net.Conn, in *bufio.Reader, path string, most int64) (int, []byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://localhost"+path, nil)
	if err != nil {
		return 0, nil, err
	}
	if err := req.Write(conn); err != nil {
		return 0, nil, err
	}
	resp, err := http.ReadResponse(in, req)
	if err != nil {
		return 0, nil, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, most+1))
	if err == nil && int64(len(body)) > most {
		err = fmt.Errorf("its answer to %s has more than %d MiB", path, most>>20)
	}
	return resp.StatusCode, body, err
}
