package module

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"syscall"
	"time"

	"github.com/meshery/meshery-filters/internal/address"
	"github.com/meshery/meshery-filters/internal/problem"
)

const maxRedirects = 5

// newClient makes a client for addresses that users write. Each connection is checked on the address that it is about
// to be made to, after the look-up, so that neither a redirect nor a name that resolves anew leads anywhere else.
func newClient(o Options) *http.Client {
	dialer := &net.Dialer{
		Timeout: 10 * time.Second,
		Control: func(_, at string, _ syscall.RawConn) error {
			to, err := netip.ParseAddrPort(at)
			if err != nil {
				return refusal("an address that cannot be read")
			}
			if why := address.Refused(to.Addr(), o.AllowLoopback); why != "" {
				if !o.AllowLoopback && address.Refused(to.Addr(), true) == "" {
					why += " that allowLoopbackModules is not set for"
				}
				return refusal(fmt.Sprintf("%s, %s", to.Addr(), why))
			}
			return nil
		},
	}
	return &http.Client{
		Transport: &http.Transport{
			// A proxy would make the connection in our place, unchecked.
			Proxy:                  nil,
			DialContext:            dialer.DialContext,
			TLSClientConfig:        &tls.Config{RootCAs: o.RootCAs, MinVersion: tls.VersionTLS12},
			TLSHandshakeTimeout:    10 * time.Second,
			DisableKeepAlives:      true,
			DisableCompression:     true, // the digest is of the bytes as they are served
			MaxResponseHeaderBytes: 64 << 10,
		},
		CheckRedirect: func(req *http.Request, via []*http.Request) error {
			switch {
			case len(via) > maxRedirects:
				return refusal(fmt.Sprintf("more than %d redirects", maxRedirects))
			case req.URL.Scheme != "https":
				return refusal("an address that is not https")
			case req.URL.User != nil:
				return refusal("an address with credentials")
			}
			req.Header.Del("Referer") // it would hand a pre-signed address on
			return nil
		},
	}
}

// newOwnClient makes a client for the adapter's own address, which may be one of this machine, and in clear. What answers
// there may send nobody anywhere else.
func newOwnClient(o Options) *http.Client {
	o.AllowLoopback = true
	c := newClient(o)
	c.CheckRedirect = func(*http.Request, []*http.Request) error { return refusal("another address") }
	return c
}

// fetch gets the bytes at u. Nothing that the server sent is part of an error.
func (r *Resolver) fetch(ctx context.Context, client *http.Client, u *url.URL) ([]byte, error) {
	caller := ctx
	ctx, cancel := context.WithTimeout(ctx, r.Timeout)
	defer cancel()
	began := time.Now()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	if err != nil {
		return nil, mistake("url", "it is not an address", "write https://HOST/PATH")
	}
	req.Header.Set("User-Agent", "meshery-filters")
	resp, err := client.Do(req)
	if err != nil {
		return nil, r.explain(caller, u, err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return nil, problem.ModuleUnavailable.New("%s answers with status %d %s", bare(u), resp.StatusCode, http.StatusText(resp.StatusCode))
	}
	if resp.ContentLength > r.MaxBytes {
		return nil, problem.ModuleUnavailable.New("%s has %d bytes, more than the %d allowed", bare(u), resp.ContentLength, r.MaxBytes)
	}
	data, err := io.ReadAll(io.LimitReader(resp.Body, r.MaxBytes+1))
	if err != nil {
		return nil, r.explain(caller, u, err)
	}
	if int64(len(data)) > r.MaxBytes {
		return nil, problem.ModuleUnavailable.New("%s has more than the %d bytes allowed", bare(u), r.MaxBytes)
	}
	r.Log.DebugContext(ctx, "module fetched", "url", bare(u), "bytes", len(data), "took", time.Since(began))
	return data, nil
}

// explain says why a fetch failed, in words of ours or of Go's network and TLS code. Texts of net/http may quote what
// the server sent, or a redirect's secret query, and are left out.
func (r *Resolver) explain(caller context.Context, u *url.URL, err error) error {
	if caller.Err() != nil {
		return fmt.Errorf("fetch module %s: %w", bare(u), caller.Err())
	}
	var (
		no   refusal
		cert *tls.CertificateVerificationError
		dns  *net.DNSError
		op   *net.OpError
	)
	switch {
	case errors.As(err, &no):
		return problem.ModuleUnavailable.New("%s leads to %w", bare(u), no)
	case errors.Is(err, context.DeadlineExceeded):
		return problem.ModuleUnavailable.New("%s did not give the module within %s", bare(u), r.Timeout)
	case errors.As(err, &cert):
		return problem.ModuleUnavailable.New("%s: the server's certificate is not accepted: %w", bare(u), cert.Err)
	case errors.As(err, &dns):
		return problem.ModuleUnavailable.New("%s: %w", bare(u), dns)
	case errors.As(err, &op):
		return problem.ModuleUnavailable.New("%s: %w", bare(u), op)
	case errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, io.EOF):
		return problem.ModuleUnavailable.New("%s ended its answer early", bare(u))
	}
	return problem.ModuleUnavailable.New("%s does not answer as an %s server does", bare(u), u.Scheme)
}

// refusal says where a fetch would have gone that it must not go.
type refusal string

func (r refusal) Error() string { return string(r) + ", where modules are not fetched from" }
