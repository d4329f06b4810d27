package consul

import (
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
	"sync"
	"syscall"
	"time"
	"unicode"

	"github.com/meshery/meshery-filters/internal/address"
	"github.com/meshery/meshery-filters/internal/problem"
)

const (
	maxAnswer = 16 << 20 // bytes of one of Consul's
	maxText   = 1 << 10  // bytes of its errors that are shown
	parallel  = 8        // proxies that are asked at once

	alertTimeout = 2 * time.Second
)

// Options say how Consul is reached. Addr and Log must be set.
type Options struct {
	// Addr of the HTTP API: http://HOST:PORT or https://HOST:PORT.
	Addr string
	// Token gives the ACL token, for each request anew. Default: none is sent.
	Token func() (string, error)
	// TLS of an https Addr. Default: the system's authorities.
	TLS *tls.Config
	// Namespace and Partition, where the server has them. Default: the token's.
	Namespace, Partition string
	// Admin are the admin addresses of proxies, HOST:PORT, that may be asked what they run.
	Admin []string
	// Folder is where the proxies' machines have modules that we write, by digest. Default: nowhere.
	Folder string
	// Timeout bounds one request. Default: 15 s.
	Timeout time.Duration
	Log     *slog.Logger
}

// Client is one Consul, as the owner of one token. It is safe for concurrent use. Whoever made it calls Close.
type Client struct {
	Options
	host      string
	http      *http.Client // follows nothing
	transport *http.Transport
	admins    *http.Client // asks proxies

	asking chan struct{} // holds whoever asks who answers there
	seen   crowd         // when somebody asked last

	folder sync.Mutex // held by whoever puts modules there or takes them away
}

// New makes a Client, without a request.
func New(o Options) (*Client, error) {
	u, err := url.Parse(o.Addr)
	if err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https" {
		return nil, problem.InvalidConfiguration.New("consul.addr is no address of Consul: write http://HOST:PORT or https://HOST:PORT")
	}
	o.Addr = u.Scheme + "://" + u.Host
	o.Timeout = cmp.Or(o.Timeout, 15*time.Second)
	dialer := &net.Dialer{Timeout: 10 * time.Second, Control: allowed}
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	t := &http.Transport{DialContext: dialer.DialContext, TLSClientConfig: o.TLS, TLSHandshakeTimeout: 10 * time.Second,
		MaxIdleConnsPerHost: parallel, IdleConnTimeout: time.Minute, MaxResponseHeaderBytes: 64 << 10,
		// By HTTP/2 a certificate that is refused would at times be told as a connection that did not come about.
		Protocols: protocols}
	stay := func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	return &Client{Options: o, host: u.Host, transport: t, http: &http.Client{Transport: t, CheckRedirect: stay}, asking: make(chan struct{}, 1),
		admins: &http.Client{CheckRedirect: stay, Transport: &http.Transport{DialContext: dialer.DialContext, DisableKeepAlives: true, DisableCompression: true,
			MaxResponseHeaderBytes: 64 << 10}}}, nil
}

// allowed keeps the adapter from connecting to where nobody's Consul or proxy is.
func allowed(_, at string, _ syscall.RawConn) error {
	a, err := netip.ParseAddrPort(at)
	if err != nil {
		return err
	}
	if why := address.Refused(a.Addr(), true); why != "" {
		return fmt.Errorf("it leads to %s", why)
	}
	return nil
}

// Close ends the idle connections.
func (c *Client) Close() { c.transport.CloseIdleConnections() }

func (c *Client) String() string { return "Consul " + c.host }

var errTooLarge = fmt.Errorf("more than %d MiB", maxAnswer>>20)

// call is one request.
type call struct {
	method, path string
	query        url.Values
	body         any
	global       bool // it is of no namespace
	whole        bool // an answer of which the token may not see all is none
}

// do gives Consul's answer; 404 to a reading is one without a body. Other refusals are problems.
func (c *Client) do(ctx context.Context, k call) (body []byte, err error) {
	ctx, cancel := context.WithTimeout(ctx, c.Timeout)
	defer cancel()
	query := k.query
	if query == nil {
		query = url.Values{}
	}
	if c.Namespace != "" && !k.global {
		query.Set("ns", c.Namespace)
	}
	if c.Partition != "" {
		query.Set("partition", c.Partition)
	}
	var in io.Reader
	if k.body != nil {
		data, err := json.Marshal(k.body)
		if err != nil {
			return nil, fmt.Errorf("encode what goes to %s: %w", k.path, err)
		}
		in = bytes.NewReader(data)
	}
	req, err := http.NewRequestWithContext(ctx, k.method, c.Addr+k.path+"?"+query.Encode(), in)
	if err != nil {
		return nil, fmt.Errorf("ask %s: %w", c, err)
	}
	if c.Token != nil {
		token, err := c.Token()
		if err != nil {
			return nil, err
		}
		req.Header.Set("X-Consul-Token", token)
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return nil, c.unreachable(ctx, err)
	}
	defer resp.Body.Close()
	body, err = io.ReadAll(io.LimitReader(resp.Body, maxAnswer+1))
	switch {
	case err != nil:
		return nil, c.unreachable(ctx, err)
	case len(body) > maxAnswer:
		return nil, problem.ConsulRefused.New("%s: its answer to %s has %w", c, k.path, errTooLarge)
	case k.whole && resp.Header.Get("X-Consul-Results-Filtered-By-Acls") == "true":
		return nil, problem.ConsulDenied.New("%s: %s %s: the token may not see all of the answer", c, k.method, k.path)
	case resp.StatusCode == http.StatusOK:
		return body, nil
	case resp.StatusCode == http.StatusNotFound && k.method == http.MethodGet:
		return nil, nil
	}
	text := clean(string(body))
	switch {
	case strings.Contains(text, "HTTP request to an HTTPS server"):
		return nil, problem.ConsulTLS.New("%s: consul.addr begins with http://, and it answers by https://", c)
	case resp.StatusCode == http.StatusForbidden || resp.StatusCode == http.StatusUnauthorized:
		return nil, problem.ConsulDenied.New("%s: %s %s: %s", c, k.method, k.path, text)
	case strings.Contains(text, "No cluster leader"), resp.StatusCode == http.StatusTooManyRequests, resp.StatusCode == http.StatusServiceUnavailable:
		return nil, problem.ConsulUnreachable.New("%s: %s", c, text)
	}
	if strings.Contains(text, "Enterprise feature") {
		text += "; leave consul.namespace and consul.partition out"
	}
	return nil, problem.ConsulRefused.New("%s: %s %s: status %d: %s", c, k.method, k.path, resp.StatusCode, text)
}

// unreachable is a request that got no answer. Its address has no secret in it.
func (c *Client) unreachable(ctx context.Context, err error) error {
	if errors.Is(ctx.Err(), context.Canceled) {
		return ctx.Err()
	}
	var u *url.Error
	if errors.As(err, &u) {
		err = u.Err
	}
	if errors.Is(err, syscall.EPIPE) || errors.Is(err, syscall.ECONNRESET) {
		err = cmp.Or(c.alert(ctx), err)
	}
	var unverified *tls.CertificateVerificationError
	var name x509.HostnameError
	var remote *net.OpError
	switch {
	case errors.As(err, &name):
		return problem.ConsulTLS.New("%s: its certificate is for another name than consul.addr: %w", c, err)
	case errors.As(err, &unverified):
		return problem.ConsulTLS.New("%s: consul.caFile does not have the authority of its certificate, or that has expired: %w", c, err)
	case errors.As(err, &remote) && remote.Op == "remote error" && (c.TLS == nil || len(c.TLS.Certificates) == 0): // an alert
		return problem.ConsulTLS.New("%s: it wants a client certificate, and consul.certFile and consul.keyFile are not set: %w", c, err)
	case errors.As(err, &remote) && remote.Op == "remote error":
		return problem.ConsulTLS.New("%s: it does not take the certificate of consul.certFile: %w", c, err)
	case errors.Is(err, http.ErrSchemeMismatch):
		return problem.ConsulTLS.New("%s: consul.addr begins with https://, and it answers by http://", c)
	}
	return problem.ConsulUnreachable.New("%s: %w", c, err)
}

// alert is why a server that speaks TLS ends connections, in its own words. Whoever has sent a request by then gets no more
// than that the connection has ended.
func (c *Client) alert(ctx context.Context) error {
	if !strings.HasPrefix(c.Addr, "https://") {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, alertTimeout)
	defer cancel()
	raw, err := c.transport.DialContext(ctx, "tcp", c.host)
	if err != nil {
		return nil
	}
	defer raw.Close()
	conf := &tls.Config{}
	if c.TLS != nil {
		conf = c.TLS.Clone()
	}
	conf.ServerName = (&url.URL{Host: c.host}).Hostname()
	conn := tls.Client(raw, conf)
	_ = raw.SetDeadline(time.Now().Add(alertTimeout))
	_, err = conn.Read(make([]byte, 1))
	var remote *net.OpError
	if errors.As(err, &remote) && remote.Op == "remote error" {
		return err
	}
	return nil
}

// get reads an answer into v, and says whether there was one.
func (c *Client) get(ctx context.Context, k call, v any) (found bool, err error) {
	k.method = http.MethodGet
	body, err := c.do(ctx, k)
	if err != nil || body == nil {
		return false, err
	}
	d := json.NewDecoder(bytes.NewReader(body))
	d.UseNumber() // what is the user's goes back as it came
	if err := d.Decode(v); err != nil {
		return false, problem.ConsulRefused.New("%s: what it says at %s cannot be read", c, k.path)
	}
	return true, nil
}

// swap makes a change that Consul makes only if nobody else has made one since, and says whether it did.
func (c *Client) swap(ctx context.Context, k call, index uint64) (done bool, err error) {
	k.query = url.Values{"cas": {fmt.Sprint(index)}}
	body, err := c.do(ctx, k)
	if err != nil {
		return false, err
	}
	return strings.TrimSpace(string(body)) == "true", nil
}

// ask is the Get of a proxy's admin interface.
func (c *Client) ask(addr string) Get {
	return func(ctx context.Context, path string, most int64) (int, []byte, error) {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+addr+path, nil)
		if err != nil {
			return 0, nil, err
		}
		resp, err := c.admins.Do(req)
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
}

// clean is a text of somebody else's in one line.
func clean(s string) string {
	s = strings.Map(func(r rune) rune {
		if unicode.IsControl(r) {
			return ' '
		}
		return r
	}, strings.TrimSpace(s[:min(len(s), maxText)]))
	return strings.ToValidUTF8(s, "?")
}
