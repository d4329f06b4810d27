package istiod

import (
	"bufio"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/meshery/meshery-filters/internal/plan"
	"github.com/meshery/meshery-filters/internal/problem"
)

const (
	monitoringPort = 15014 // of istiod; its debug endpoints take everybody for a friend who comes by port-forward
	adminPort      = 15000 // of a proxy

	askTimeout = 15 * time.Second // of one Pod, for all that it is asked at once, however much it says
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

// list finds the target's Pods and, side by side, istiod's: an API server may let one who asks for what is there now wait a
// while.
func (w *watch) list(ctx context.Context) error {
	var target, istiods error
	var g sync.WaitGroup
	g.Go(func() { target = w.listTarget(ctx) })
	g.Go(func() { istiods = w.listIstiods(ctx) })
	g.Wait()
	if err := cmp.Or(target, istiods); err != nil {
		return err
	}
	w.listed = time.Now()
	return nil
}

func (w *watch) listTarget(ctx context.Context) (err error) {
	if w.pods, err = w.cluster.Pods(ctx, w.plan.Proxies.Namespace, w.plan.Proxies.Labels); err != nil {
		return fmt.Errorf("find the target's Pods: %w", err)
	}
	if only := w.plan.Proxies.Only; only != nil {
		w.pods = slices.DeleteFunc(w.pods, func(p plan.Pod) bool { return p != *only })
	}
	return nil
}

func (w *watch) listIstiods(ctx context.Context) (err error) {
	if w.istiods, err = w.cluster.Pods(ctx, w.root, map[string]string{"app": "istiod"}); err != nil {
		return fmt.Errorf("find istiod: %w", err)
	}
	if len(w.istiods) == 0 {
		return fmt.Errorf("no istiod runs in namespace %s", w.root)
	}
	return nil
}

// connected finds the proxies that are connected. The Pods are listed again once in a while, and when what was known does
// not hold any more: an istiod does not answer, or a proxy has gone.
func (w *watch) connected(ctx context.Context) (map[plan.Pod]connection, error) {
	if time.Since(w.listed) < listAgain {
		all, err := w.ask(ctx)
		if err == nil && !w.misses(all) {
			return all, nil
		}
	}
	if err := w.list(ctx); err != nil {
		return nil, err
	}
	return w.ask(ctx)
}

// misses says whether a proxy that was there is not.
func (w *watch) misses(all map[plan.Pod]connection) bool {
	for pod, p := range w.proxies {
		if _, ok := all[pod]; p.there && !ok {
			return true
		}
	}
	return false
}

// ask asks every istiod for the proxies of the plan's kind and namespace. Without Pods nobody is asked.
func (w *watch) ask(ctx context.Context) (map[plan.Pod]connection, error) {
	all := map[plan.Pod]connection{}
	if len(w.pods) == 0 {
		return all, nil
	}
	for _, istiod := range w.istiods {
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

// visit is what the proxy says of itself.
func (w *watch) visit(ctx context.Context, pod plan.Pod) (*view, error) {
	w.mu.Lock()
	err := w.silent[pod.Namespace]
	w.mu.Unlock()
	if err != nil {
		return nil, err
	}
	v := &view{all: w.all}
	err = w.converse(ctx, pod, adminPort, func(get getter) error {
		*v = view{all: w.all}
		for _, q := range []struct {
			path string
			most int64
			read func([]byte) error
		}{
			{"/config_dump?resource=dynamic_listeners", maxDump, v.readListeners},
			{"/config_dump?resource=ecds_filters", maxDump, v.readExtensions},
			// After the dump, so that what is accepted is never older than what is shown.
			{"/stats?filter=" + url.QueryEscape(`^wasm\.(wasm_vm_count|remote_load)|^server\.concurrency$|^extension_config_discovery\..*\.update_time$`), maxStats, v.readStats},
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

// endpoint is a port of a Pod.
type endpoint struct {
	plan.Pod
	port int
}

// line is a connection to one.
type line struct {
	net.Conn
	in      *bufio.Reader
	silence *time.Timer // runs while an answer is waited for
	quiet   time.Duration
	ended   bool // after the last answer
}

// Read has the silence begin anew.
func (l *line) Read(p []byte) (int, error) {
	n, err := l.Conn.Read(p)
	l.silence.Reset(l.quiet)
	return n, err
}

// errSilent is a Pod that takes a connection and says nothing.
var errSilent = errors.New("does not answer")

func silent(d time.Duration) error { return fmt.Errorf("it %w within %s", errSilent, d) }

// ended says why a conversation ended too early.
func ended(ctx context.Context) error {
	err := context.Cause(ctx)
	if errors.Is(err, context.DeadlineExceeded) {
		return fmt.Errorf("it has not answered yet: %w", err)
	}
	return err
}

// converse asks a Pod over one connection: the one of the look before, if it still holds. One that says nothing for a while
// is errSilent.
func (w *watch) converse(ctx context.Context, pod plan.Pod, port int, talk func(getter) error) error {
	ctx, cancel := context.WithTimeoutCause(ctx, askTimeout, silent(askTimeout))
	defer cancel()
	at := endpoint{pod, port}
	if l := w.take(at); l != nil {
		if err := w.over(ctx, at, l, talk); err == nil || ctx.Err() != nil || errors.Is(err, errSilent) {
			return err
		}
	}
	dialing, stop := context.WithTimeoutCause(ctx, w.silence, silent(w.silence))
	defer stop()
	conn, err := w.cluster.Dial(dialing, pod.Namespace, pod.Name, port)
	if err != nil && dialing.Err() != nil {
		return ended(dialing)
	}
	if err != nil {
		return err
	}
	l := &line{Conn: conn, quiet: w.silence}
	l.in = bufio.NewReader(l)
	return w.over(ctx, at, l, talk)
}

// over talks over a connection, which is kept when that went well.
func (w *watch) over(ctx context.Context, at endpoint, l *line, talk func(getter) error) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	// The connection knows no deadlines.
	whole := context.AfterFunc(ctx, func() { _ = l.Close() })
	l.silence = time.AfterFunc(l.quiet, func() { cancel(silent(l.quiet)) })
	err := talk(func(path string, most int64) (int, []byte, error) {
		l.silence.Reset(l.quiet)
		defer l.silence.Stop() // what is made of the answer may take its time
		return l.exchange(ctx, path, most)
	})
	l.silence.Stop()
	if !whole() || err != nil || l.ended || !w.keep(at, l) {
		_ = l.Close()
	}
	if err != nil && ctx.Err() != nil {
		return ended(ctx)
	}
	return err
}

// take gives the connection that is kept, if there is one.
func (w *watch) take(at endpoint) *line {
	w.mu.Lock()
	defer w.mu.Unlock()
	l := w.lines[at]
	delete(w.lines, at)
	return l
}

// keep keeps a connection for the next look, unless there are many.
func (w *watch) keep(at endpoint, l *line) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.lines[at] != nil || len(w.lines) >= mostLines {
		return false
	}
	w.lines[at] = l
	return true
}

// hangUp ends the connection that is kept.
func (w *watch) hangUp(at endpoint) {
	if l := w.take(at); l != nil {
		_ = l.Close()
	}
}

// close ends every connection.
func (w *watch) close() {
	w.mu.Lock()
	defer w.mu.Unlock()
	for at, l := range w.lines {
		_ = l.Close()
		delete(w.lines, at)
	}
}

func (l *line) exchange(ctx context.Context, path string, most int64) (int, []byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://localhost"+path, nil)
	if err != nil {
		return 0, nil, err
	}
	if err := req.Write(l); err != nil {
		return 0, nil, err
	}
	resp, err := http.ReadResponse(l.in, req)
	if err != nil {
		return 0, nil, err
	}
	defer resp.Body.Close()
	l.ended = resp.Close
	body, err := io.ReadAll(io.LimitReader(resp.Body, most+1))
	if err == nil && int64(len(body)) > most {
		err = fmt.Errorf("its answer to %s has more than %d MiB", path, most>>20)
	}
	return resp.StatusCode, body, err
}
