// Package meshery speaks the REST API of Meshery Server: it registers the adapter's components there, and sends its
// events.
//
// The token that signs the adapter in goes into requests and nowhere else: no error, log or event has it. Whatever the
// server answers is bounded, redirects are not followed, and nothing is asked at link-local addresses or those of clouds'
// metadata services.
package meshery

import (
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"strings"
	"syscall"
	"time"

	"github.com/meshery/meshery-filters/internal/address"
	"github.com/meshery/meshery-filters/internal/problem"
)

// Options says where the server is, and who asks.
type Options struct {
	// Server is its address, http://HOST:PORT or https://HOST:PORT.
	Server string
	// TokenFile has the token: as mesheryctl writes it, or alone. It is read at each request. Empty: nobody is signed in.
	TokenFile string
	// Provider that the token is of. Default: the one in TokenFile.
	Provider string
	// Timeout bounds a request and its answer. Default: 30s.
	Timeout time.Duration
}

// Client asks one server. Any number of goroutines may use it.
type Client struct {
	base    *url.URL
	options Options
	http    *http.Client
}

// Cookies of Meshery Server.
const (
	tokenCookie    = "token"
	providerCookie = "meshery-provider"
)

const (
	maxToken  = 64 << 10 // bytes of the token's file
	maxAnswer = 500      // bytes of the server's text that an error has
)

// New makes a Client. problem.InvalidConfiguration when the address cannot be one.
func New(o Options) (*Client, error) {
	base, err := url.Parse(o.Server)
	if err != nil || base.Host == "" || base.Scheme != "http" && base.Scheme != "https" || base.User != nil {
		return nil, problem.InvalidConfiguration.WithFields("", []problem.Field{{Path: "mesheryServer",
			Cause: "it is not the address of a server", Remedy: "write http://HOST:PORT"}})
	}
	if o.Timeout <= 0 {
		o.Timeout = 30 * time.Second
	}
	dialer := &net.Dialer{Timeout: 10 * time.Second, Control: func(_, at string, _ syscall.RawConn) error {
		to, err := netip.ParseAddrPort(at)
		if err != nil {
			return fmt.Errorf("the address %s cannot be read", at)
		}
		if why := address.Refused(to.Addr(), true); why != "" {
			return fmt.Errorf("%s is %s", to.Addr(), why)
		}
		return nil
	}}
	return &Client{base: base, options: o, http: &http.Client{
		Timeout: o.Timeout,
		Transport: &http.Transport{
			Proxy:                  nil, // it would make the connection in our place, unchecked, and see the token
			DialContext:            dialer.DialContext,
			TLSClientConfig:        &tls.Config{MinVersion: tls.VersionTLS12},
			TLSHandshakeTimeout:    10 * time.Second,
			MaxResponseHeaderBytes: 64 << 10,
			MaxIdleConnsPerHost:    2,
			IdleConnTimeout:        30 * time.Second,
		},
		// A redirect leads to the page for signing in, and the token must not follow it elsewhere.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}}, nil
}

// Close ends connections that are idle.
func (c *Client) Close() { c.http.CloseIdleConnections() }

// Answer is what the server said.
type Answer struct {
	Status int
	Header http.Header
	Body   []byte // of an answer that is no success without the token
}

// Do asks for a path such as /api/filter, with its query. Of the answer's body it reads at most limit bytes; more is an
// error. An answer of 400 and above is an Answer and no error, unless it says that nobody is signed in.
//
// Errors are problem.MesheryUnreachable, problem.MesheryUnauthorized, problem.MesheryToken, problem.MesheryRefused for an
// answer that is too long, and ctx's.
func (c *Client) Do(ctx context.Context, method, path, contentType string, body []byte, limit int64) (*Answer, error) {
	path, query, _ := strings.Cut(path, "?")
	at := c.base.JoinPath(path)
	at.RawQuery = query
	req, err := http.NewRequestWithContext(ctx, method, at.String(), bytes.NewReader(body))
	if err != nil {
		return nil, problem.Internal.New("ask Meshery for %s: %w", path, err)
	}
	if contentType != "" {
		req.Header.Set("Content-Type", contentType)
	}
	token, err := c.signIn(req)
	if err != nil {
		return nil, err
	}
	resp, err := c.http.Do(req)
	if err != nil {
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		return nil, problem.MesheryUnreachable.New("%s %s: %w", method, path, without(token, err))
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(io.LimitReader(resp.Body, limit+1))
	switch {
	case ctx.Err() != nil:
		return nil, ctx.Err()
	case err != nil:
		return nil, problem.MesheryUnreachable.New("read the answer to %s %s: %w", method, path, without(token, err))
	case resp.StatusCode == http.StatusUnauthorized, resp.StatusCode == http.StatusForbidden, resp.StatusCode/100 == 3:
		return nil, problem.MesheryUnauthorized.New("%s %s was answered %d %s", method, path, resp.StatusCode, http.StatusText(resp.StatusCode))
	case int64(len(text)) > limit:
		return nil, problem.MesheryRefused.New("the answer to %s %s is longer than %d bytes", method, path, limit)
	}
	if token != "" && resp.StatusCode/100 != 2 { // a page about a mistake may repeat the request
		text = bytes.ReplaceAll(text, []byte(token), []byte("…"))
	}
	return &Answer{Status: resp.StatusCode, Header: resp.Header, Body: text}, nil
}

// Refusal is the error of an answer that is no success; nil where it is one.
func (a *Answer) Refusal(what string) error {
	if a.Status/100 == 2 {
		return nil
	}
	text := strings.ToValidUTF8(strings.TrimSpace(string(a.Body)), "?")
	if len(text) > maxAnswer {
		text = strings.ToValidUTF8(text[:maxAnswer], "") + "…"
	}
	return problem.MesheryRefused.New("%s was answered %d: %s", what, a.Status, text)
}

// without leaves out what url.Error repeats, and the token where a broken answer has it.
func without(token string, err error) error {
	if u := (*url.Error)(nil); errors.As(err, &u) {
		err = u.Err
	}
	if text := err.Error(); token != "" && strings.Contains(text, token) {
		return errors.New(strings.ReplaceAll(text, token, "…"))
	}
	return err
}

// signIn gives a request the cookies that mesheryctl sends, and returns the token.
func (c *Client) signIn(req *http.Request) (token string, err error) {
	provider := c.options.Provider
	if c.options.TokenFile != "" {
		f, err := readToken(c.options.TokenFile)
		if err != nil {
			return "", problem.MesheryToken.New("%s: %w", c.options.TokenFile, err)
		}
		token = f.Token
		if provider == "" {
			provider = f.Provider
		}
	}
	for name, value := range map[string]string{tokenCookie: token, providerCookie: provider} {
		if value != "" {
			req.AddCookie(&http.Cookie{Name: name, Value: value})
		}
	}
	return token, nil
}

type tokenFile struct {
	Token    string `json:"token"`
	Provider string `json:"meshery-provider"`
}

// readToken reads what mesheryctl writes, or a token alone. Errors do not quote the file.
func readToken(name string) (t tokenFile, err error) {
	info, err := os.Stat(name) // before it is opened, which may block for what is no file
	if err != nil {
		return t, errors.Unwrap(err) // the path is named already
	}
	if !info.Mode().IsRegular() {
		return t, errors.New("it is no file")
	}
	f, err := os.Open(name)
	if err != nil {
		return t, errors.Unwrap(err)
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxToken+1))
	if err != nil {
		return t, cmp.Or(errors.Unwrap(err), err)
	}
	if len(data) > maxToken {
		return t, errors.New("it is too large for a token")
	}
	text := strings.TrimSpace(string(data))
	if strings.HasPrefix(text, "{") {
		if json.Unmarshal([]byte(text), &t) != nil || t.Token == "" {
			return tokenFile{}, errors.New("it is JSON without a token")
		}
	} else {
		t.Token = text
	}
	for _, r := range t.Token {
		if r <= ' ' || r > '~' || strings.ContainsRune(`",;\`, r) {
			return tokenFile{}, errors.New("what it holds cannot be a token")
		}
	}
	if t.Token == "" {
		return t, errors.New("it is empty")
	}
	return t, nil
}
