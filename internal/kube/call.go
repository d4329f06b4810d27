package kube

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"path"
	"strconv"
	"strings"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/meshery/meshery-filters/internal/problem"
)

const (
	parallel    = 8                // requests of one operation at once
	maxBody     = 16 << 20         // bytes of one answer
	maxAttempts = 6                // of a request that the server puts off
	maxRetryIn  = 30 * time.Second // a server that asks for more patience is not waited for
	firstPause  = 100 * time.Millisecond
	maxText     = 1 << 10 // bytes of a server's message that are shown
)

// call is one request.
type call struct {
	method    string // of HTTP
	verb      string // that RBAC knows it by
	kind      resource
	namespace string
	name      string
	query     url.Values
	media     string // of the body; JSON by default
	body      []byte
	raw       string // the path, when it is not of an object
	accept    string // JSON by default
}

// path of the object or, without a name, of the collection.
func (k call) path() string {
	if k.raw != "" {
		return k.raw
	}
	parts := []string{"/apis", k.kind.Group, k.kind.Version}
	if k.kind.Group == "" {
		parts = []string{"/api", k.kind.Version}
	}
	if k.namespace != "" {
		parts = append(parts, "namespaces", k.namespace)
	}
	return path.Join(append(parts, k.kind.plural, k.name)...)
}

// subject names the object for messages: WasmPlugin/shop/rate-limit.
func (k call) subject() string {
	if k.raw != "" {
		return k.raw
	}
	return subject(k.kind.Kind, k.namespace, k.name)
}

func subject(kind, namespace, name string) string {
	parts := []string{kind}
	for _, p := range []string{namespace, name} {
		if p != "" {
			parts = append(parts, p)
		}
	}
	return strings.Join(parts, "/")
}

// refusal is a server's answer that is no success.
type refusal struct {
	call call
	code int
	// status is what the server says, when it speaks as an API server does; else it is nil.
	status *metav1.Status
	// retries is how often the request was put off before.
	retries int
}

func (r *refusal) Error() string {
	return fmt.Sprintf("%s %s: %d %s", r.call.verb, r.call.subject(), r.code, r.message())
}

// message is what the server says, made harmless. An answer that is not an API server's is not shown: the address may be
// of something else, whose answers are no business of whoever wrote the kubeconfig.
func (r *refusal) message() string {
	if r.status == nil {
		return "with an answer that no Kubernetes API gives"
	}
	return clean(r.status.Message, maxText)
}

func (r *refusal) reason() metav1.StatusReason {
	if r.status == nil {
		return ""
	}
	return r.status.Reason
}

func (r *refusal) causes() []metav1.StatusCause {
	if r.status == nil || r.status.Details == nil {
		return nil
	}
	return r.status.Details.Causes
}

// about says whether the refusal is about an object of that resource, and not about the one that was asked for.
func (r *refusal) about(plural string) bool {
	return r.status != nil && r.status.Details != nil && r.status.Details.Kind == plural
}

// refusedWith finds the refusal in err when it has that code.
func refusedWith(err error, code int) (*refusal, bool) {
	var r *refusal
	ok := errors.As(err, &r) && r.code == code
	return r, ok
}

// do makes the request, again when the server puts it off, and returns the code and the body of a success. Everything
// else is a *refusal or a problem.
func (c *Cluster) do(ctx context.Context, k call) (code int, body []byte, err error) {
	pause := firstPause
	for n := 0; ; n++ {
		var header http.Header
		code, header, body, err = c.attempt(ctx, k)
		if err != nil {
			return 0, nil, c.unreachable(ctx, err)
		}
		if code < 300 {
			return code, body, nil
		}
		wait, ok := putOff(code, header)
		if !ok || n == maxAttempts-1 || wait > maxRetryIn {
			return 0, nil, &refusal{call: k, code: code, status: statusOf(body), retries: n}
		}
		wait = max(wait, pause)
		pause *= 2
		c.opts.Log.DebugContext(ctx, "the cluster puts a request off", "cluster", c.Host, "verb", k.verb, "object", k.subject(), "code", code, "wait", wait)
		if err := sleep(ctx, wait); err != nil {
			return 0, nil, &refusal{call: k, code: code, status: statusOf(body), retries: n}
		}
	}
}

// putOff says how long the server asks us to wait before we ask again.
func putOff(code int, h http.Header) (time.Duration, bool) {
	if code != http.StatusTooManyRequests && code < http.StatusInternalServerError {
		return 0, false
	}
	seconds, err := strconv.Atoi(h.Get("Retry-After"))
	if err != nil {
		return 0, code == http.StatusTooManyRequests
	}
	if seconds < 0 || seconds > int(time.Hour/time.Second) {
		seconds = int(time.Hour / time.Second)
	}
	return time.Duration(seconds) * time.Second, true
}

func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-t.C:
		return nil
	}
}

// request makes the HTTP request of a call.
func (c *Cluster) request(ctx context.Context, k call) (*http.Request, error) {
	u := *c.server
	u.Path = path.Join("/", u.Path, k.path())
	u.RawQuery = k.query.Encode()
	req, err := http.NewRequestWithContext(ctx, k.method, u.String(), bytes.NewReader(k.body))
	if err != nil {
		return nil, err
	}
	req.Header.Set("Accept", cmp.Or(k.accept, "application/json"))
	if len(k.body) > 0 {
		req.Header.Set("Content-Type", cmp.Or(k.media, "application/json"))
	}
	return req, nil
}

func (c *Cluster) attempt(ctx context.Context, k call) (int, http.Header, []byte, error) {
	ctx, cancel := context.WithTimeout(ctx, c.opts.Timeout)
	defer cancel()
	req, err := c.request(ctx, k)
	if err != nil {
		return 0, nil, nil, err
	}
	resp, err := c.client.Do(req)
	if err != nil {
		return 0, nil, nil, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxBody+1))
	if err == nil && len(body) > maxBody {
		err = errTooLarge
	}
	return resp.StatusCode, resp.Header, body, err
}

var errTooLarge = fmt.Errorf("its answer has more than %d MiB", maxBody>>20)

// unreachable makes a problem of a request that got no answer.
func (c *Cluster) unreachable(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return ctx.Err()
	}
	// The outer error says the address with its query, which tells nobody anything.
	var outer *url.Error
	if errors.As(err, &outer) {
		err = outer.Err
	}
	var address errAddress
	switch {
	case errors.As(err, &address):
		return problem.KubeconfigRefused.New("cluster.server stands for %s", address.why)
	case errors.Is(err, errRedirect) || errors.Is(err, errTooLarge):
		return problem.ClusterAnswer.New("%s: %w", c.Host, err)
	case errors.Is(err, context.DeadlineExceeded):
		return problem.ClusterUnreachable.New("%s did not answer within %s", c.Host, c.opts.Timeout)
	}
	return problem.ClusterUnreachable.New("%s: %s", c.Host, clean(err.Error(), maxText))
}

// statusOf reads what an API server says about a failure, or nil when it is nothing that an API server says.
func statusOf(body []byte) *metav1.Status {
	var s metav1.Status
	if json.Unmarshal(body, &s) != nil || s.Kind != "Status" || s.APIVersion != "v1" {
		return nil
	}
	return &s
}

// clean makes a foreign text fit for a line of ours: valid, bounded, and without control characters.
func clean(s string, most int) string {
	if len(s) > most {
		s = s[:most] + "…"
	}
	return strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f || r >= 0x80 && r < 0xa0 || r == '\u2028' || r == '\u2029' {
			return ' '
		}
		return r
	}, strings.ToValidUTF8(s, "?"))
}
