package module

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"net/http"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/meshery/meshery-filters/internal/problem"
	"github.com/meshery/meshery-filters/internal/store"
)

// ServerOptions of a Server. Blobs and Live are required.
type ServerOptions struct {
	// Blobs has the bytes.
	Blobs store.Blobs
	// Live lists the digests of the modules that something uses.
	Live func(context.Context) (map[string]bool, error)
	// Log hears of what cannot be read. Default: nobody does.
	Log *slog.Logger
	// OnServed hears of each answer, and must not wait. Default: nobody hears.
	OnServed func(status int, bytes int64)
}

// Server gives proxies their modules: GET and HEAD of /modules/SHA256.wasm, whole or a range of it. It gives those that
// something uses, and for everything else the same 404, so that nobody learns what else is stored. A digest never stands
// for other bytes, so whoever has them may keep them for ever.
//
// Connections and the time that they take are bounded by whoever listens.
type Server struct {
	o   ServerOptions
	mux *http.ServeMux

	asking chan struct{} // held by the one who asks for what is live

	mu    sync.Mutex
	live  map[string]bool
	asked time.Time // when live was asked for
}

const (
	// believed is how long a digest is live once it was.
	believed = 5 * time.Second
	// pause is the least time between two questions for what is live: whoever asks for what is not makes one.
	pause = 50 * time.Millisecond
)

// NewServer makes a Server.
func NewServer(o ServerOptions) *Server {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.OnServed == nil {
		o.OnServed = func(int, int64) {}
	}
	s := &Server{o: o, mux: http.NewServeMux(), asking: make(chan struct{}, 1)}
	s.mux.HandleFunc("GET "+servedPath+"{file}", s.serve)
	return s
}

// servedPath is where modules are, below the server's address.
const servedPath = "/modules/"

var servedFile = regexp.MustCompile(`^([0-9a-f]{64})\.wasm$`)

// ServeHTTP answers one request.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	c := &counted{ResponseWriter: w, status: http.StatusOK}
	defer func() { s.o.OnServed(c.status, c.bytes) }()
	s.mux.ServeHTTP(c, r)
}

func (s *Server) serve(w http.ResponseWriter, r *http.Request) {
	file := servedFile.FindStringSubmatch(r.PathValue("file"))
	if file == nil {
		refuse(w, http.StatusNotFound)
		return
	}
	data, err := s.read(r.Context(), file[1])
	switch {
	case errors.Is(err, problem.ModuleUnavailable):
		refuse(w, http.StatusNotFound)
		return
	case err != nil:
		if r.Context().Err() == nil {
			s.o.Log.Warn("a module is not served", "sha256", file[1], "err", err)
		}
		w.Header().Set("Retry-After", "1")
		refuse(w, http.StatusServiceUnavailable)
		return
	}
	h := w.Header()
	h.Set("Content-Type", "application/wasm")
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("Cache-Control", "public, max-age=31536000, immutable")
	h.Set("ETag", strconv.Quote(file[1]))
	http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(data))
}

func refuse(w http.ResponseWriter, status int) {
	w.Header().Set("Cache-Control", "no-store")
	http.Error(w, strings.ToLower(http.StatusText(status)), status)
}

// read returns the bytes of a module that is live.
func (s *Server) read(ctx context.Context, digest string) ([]byte, error) {
	ok, err := s.isLive(ctx, digest)
	if err != nil {
		return nil, err
	}
	if !ok {
		return nil, problem.ModuleUnavailable.New("nothing uses it")
	}
	return s.o.Blobs.Get(ctx, digest)
}

// isLive says whether something uses a module now, or did a moment ago. One question answers all who came before it.
func (s *Server) isLive(ctx context.Context, digest string) (bool, error) {
	came := time.Now()
	known := func() (live, certain bool, since time.Duration) {
		s.mu.Lock()
		defer s.mu.Unlock()
		since = time.Since(s.asked)
		live = s.live[digest] && since < believed
		return live, live || s.asked.After(came), since
	}
	if live, certain, _ := known(); certain {
		return live, nil
	}
	select {
	case s.asking <- struct{}{}:
	case <-ctx.Done():
		return false, ctx.Err()
	}
	defer func() { <-s.asking }()
	live, certain, since := known()
	if certain {
		return live, nil
	}
	select {
	case <-time.After(pause - since):
	case <-ctx.Done():
		return false, ctx.Err()
	}
	asked := time.Now()
	all, err := s.o.Live(ctx)
	if err != nil {
		return false, err
	}
	s.mu.Lock()
	s.live, s.asked = all, asked
	s.mu.Unlock()
	return all[digest], nil
}

// counted remembers what was answered.
type counted struct {
	http.ResponseWriter
	status int
	bytes  int64
}

func (c *counted) WriteHeader(status int) {
	c.status = status
	c.ResponseWriter.WriteHeader(status)
}

func (c *counted) Write(p []byte) (int, error) {
	n, err := c.ResponseWriter.Write(p)
	c.bytes += int64(n)
	return n, err
}
