// Package page is what one looks at during a rollout: a page in the browser that shows every target with its chain,
// its proxies and what has drifted, and the events as they happen. It only reads.
//
// Routes: / is the page, /api/state the state as JSON, /api/events the events as server-sent events. There is no log-in
// here. Who may connect is decided by the listener, and a page from elsewhere is kept out by what browsers tell: on
// loopback the Host must be this machine's, and the API answers its own page only.
package page

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"embed"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/meshery/meshery-filters/internal/event"
	"github.com/meshery/meshery-filters/internal/operation"
	"github.com/meshery/meshery-filters/internal/problem"
)

//go:embed files
var files embed.FS

// policy lets the page load its own files and call its own API, and nothing else.
const policy = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; " +
	"base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"

// Options are a Page's parts. Groups, Chains and Events are needed.
type Options struct {
	// Groups tells how every group of proxies stands.
	Groups func() []Group
	// Chains tells every chain and how far its proxies are, with secrets hidden.
	Chains func(context.Context) ([]operation.Status, error)
	// Events are shown as they happen.
	Events *event.Hub
	// Version and Component name the adapter: its version, and its UUID.
	Version, Component string
	// Loopback says that the page is served on this machine only: then it is refused under any other name, which is
	// how a foreign page would reach it (DNS rebinding).
	Loopback bool
	// MaxStreams bounds how many browsers hear events at once; 64 by default. One more is answered with 503.
	MaxStreams int
	// Heartbeat is how often a stream without events says that it lives; 15 seconds by default.
	Heartbeat time.Duration
	// Log gets what cannot be shown. Nil discards.
	Log *slog.Logger
}

// Page is an http.Handler. It is safe for concurrent use.
type Page struct {
	Options
	mux     *http.ServeMux
	state   *cache
	streams chan struct{} // one per stream
	boot    string        // tells positions of this process's events from those of an earlier one
}

var _ http.Handler = (*Page)(nil)

// New makes a Page.
func New(o Options) (*Page, error) {
	if o.MaxStreams <= 0 {
		o.MaxStreams = 64
	}
	if o.Heartbeat <= 0 {
		o.Heartbeat = 15 * time.Second
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	p := &Page{Options: o, mux: http.NewServeMux(), streams: make(chan struct{}, o.MaxStreams), boot: rand.Text()}
	p.state = newCache(p.read)
	for route, f := range map[string]struct{ name, kind string }{
		"/{$}":      {"index.html", "text/html; charset=utf-8"},
		"/page.css": {"page.css", "text/css; charset=utf-8"},
		"/page.js":  {"page.js", "text/javascript; charset=utf-8"},
		"/icon.svg": {"icon.svg", "image/svg+xml"},
	} {
		data, err := files.ReadFile("files/" + f.name)
		if err != nil {
			return nil, fmt.Errorf("read the page: %w", err)
		}
		p.mux.HandleFunc("GET "+route, func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", f.kind)
			_, _ = w.Write(data) // fails only when the client has left
		})
	}
	p.mux.HandleFunc("GET /api/state", own(p.serveState))
	p.mux.HandleFunc("GET /api/events", own(p.serveEvents))
	return p, nil
}

// Handle answers a pattern of http.ServeMux beside the page, with its headers and for the same readers.
func (p *Page) Handle(pattern string, h http.Handler) { p.mux.Handle(pattern, h) }

// Streams counts the browsers that listen to events.
func (p *Page) Streams() int { return len(p.streams) }

// ServeHTTP answers one request.
func (p *Page) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	h := w.Header()
	h.Set("Cache-Control", "no-store")
	h.Set("Content-Security-Policy", policy)
	h.Set("Cross-Origin-Opener-Policy", "same-origin")
	h.Set("Cross-Origin-Resource-Policy", "same-origin")
	h.Set("Referrer-Policy", "no-referrer")
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("X-Frame-Options", "DENY")
	if p.Loopback && !local(r.Host) {
		http.Error(w, "this page is served to this machine only: open it at localhost or 127.0.0.1", http.StatusMisdirectedRequest)
		return
	}
	p.mux.ServeHTTP(w, r)
}

// local says whether a Host header names this machine in a way that no name server has a say in.
func local(host string) bool {
	if h, _, err := net.SplitHostPort(host); err == nil {
		host = h
	}
	host = strings.TrimSuffix(strings.TrimPrefix(host, "["), "]")
	if strings.EqualFold(host, "localhost") {
		return true
	}
	ip, err := netip.ParseAddr(host)
	return err == nil && ip.Unmap().IsLoopback()
}

// own refuses what a browser says that another site's page asked for.
func own(h http.HandlerFunc) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if site := r.Header.Get("Sec-Fetch-Site"); site != "" && site != "same-origin" && site != "none" {
			http.Error(w, "other sites' pages may not read this", http.StatusForbidden)
			return
		}
		h(w, r)
	}
}

func (p *Page) serveState(w http.ResponseWriter, r *http.Request) {
	body, err := p.state.get(r.Context())
	if err != nil {
		p.Log.Error("the page's state cannot be read", "err", err)
		http.Error(w, "the state cannot be read; look into the adapter's log", http.StatusInternalServerError)
		return
	}
	sum := sha256.Sum256(body)
	tag := `"` + hex.EncodeToString(sum[:12]) + `"`
	w.Header().Set("ETag", tag)
	if slices.Contains(r.Header.Values("If-None-Match"), tag) {
		w.WriteHeader(http.StatusNotModified)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	_, _ = w.Write(body)
}

// replayed is how many past events a new stream begins with.
const replayed = 100

// writeLimit bounds how long a browser may take to take what it is sent; one that does not read is let go.
const writeLimit = 10 * time.Second

// serveEvents sends the latest events, then "event: now", then each as it happens. An id is a position; a browser that
// comes back with the last one goes on there.
func (p *Page) serveEvents(w http.ResponseWriter, r *http.Request) {
	select {
	case p.streams <- struct{}{}:
		defer func() { <-p.streams }()
	default:
		w.Header().Set("Retry-After", "5")
		http.Error(w, "too many pages listen to events; close one", http.StatusServiceUnavailable)
		return
	}
	now := p.Events.Cursor()
	from := max(p.Events.Oldest(), now-min(now, replayed))
	last := r.Header.Get("Last-Event-ID")
	if last == "" {
		last = r.URL.Query().Get("after")
	}
	if boot, position, ok := strings.Cut(last, "-"); ok && boot == p.boot {
		if n, err := strconv.ParseUint(position, 10, 64); err == nil {
			from = n
		}
	}
	w.Header().Set("Content-Type", "text/event-stream")
	s := stream{w: w, c: http.NewResponseController(w)}
	// The server's timeouts are for requests that end. A writer without deadlines, as tests have, is as good.
	_ = s.c.SetReadDeadline(time.Time{})

	sub := p.Events.Subscribe(from, "")
	caughtUp := false
	for {
		if !caughtUp && sub.Cursor() >= now {
			caughtUp = true
			if err := s.send("event: now\ndata: now\n\n"); err != nil {
				return
			}
		}
		beat, cancel := context.WithTimeout(r.Context(), p.Heartbeat)
		e, err := sub.Next(beat)
		cancel()
		switch {
		case err == nil:
			err = s.sendEvent(fmt.Sprintf("%s-%d", p.boot, sub.Cursor()), e)
		case errors.Is(err, problem.EventsMissed):
			err = s.send("event: missed\ndata: missed\n\n")
		case errors.Is(err, context.DeadlineExceeded) && r.Context().Err() == nil:
			err = s.send(": alive\n\n")
		}
		if err != nil {
			return
		}
	}
}
