package store

import (
	"crypto/rand"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"

	"github.com/meshery/meshery-filters/internal/problem"
)

// ServerOptions says how the NATS server inside this process runs.
type ServerOptions struct {
	// Listen is the host:port that other programs may connect to; port 0 takes a free one. Empty opens no socket:
	// only this process can connect.
	Listen string
	// TLS, when set, must ask for client certificates. Without it Listen must be a loopback address.
	TLS *tls.Config
	// Insecure allows Listen on any interface without TLS.
	Insecure bool
	// Readable are the subjects that programs connected over the socket may subscribe to. They may publish to none,
	// so that what they read comes from this process.
	Readable []string
	// StoreDir is the folder of JetStream, which is off when it is empty. What JetStream acknowledged is on disk, unless
	// SyncInterval is set: then it is on disk that much later.
	StoreDir     string
	SyncInterval time.Duration
	// MaxStore bounds what JetStream keeps on disk, in bytes; 8 GiB when zero.
	MaxStore int64
	Logger   *slog.Logger // none when nil
}

// Server is a NATS server inside this process.
type Server struct {
	opts     *server.Options
	log      *slog.Logger
	listens  bool
	password string

	mu     sync.Mutex
	server *server.Server
}

// maxSubs bounds the subscriptions of one connection, which are in memory.
const maxSubs = 10_000

// insider is the user that this process connects as, outsider the one of everybody else.
const (
	insider  = "adapter"
	outsider = "reader"
)

// StartServer starts the server and returns when it takes connections. problem.InvalidConfiguration when the address
// is not one that may be listened on or is taken, problem.StoreFailed when JetStream does not start.
func StartServer(o ServerOptions) (*Server, error) {
	logger := o.Logger
	if logger == nil {
		logger = slog.New(slog.DiscardHandler)
	}
	s := &Server{log: logger, listens: o.Listen != "", password: rand.Text()}
	opts := &server.Options{
		ServerName:             "meshery-filters",
		DontListen:             !s.listens,
		NoSigs:                 true,
		DisableJetStreamBanner: true,
		NoAuthUser:             outsider,
		MaxSubs:                maxSubs,
		Users: []*server.User{
			{Username: insider, Password: s.password},
			{Username: outsider, Password: rand.Text(), Permissions: &server.Permissions{
				Publish:   &server.SubjectPermission{Deny: []string{">"}},
				Subscribe: readable(o.Readable),
			}},
		},
	}
	if s.listens {
		if err := listen(opts, o); err != nil {
			return nil, err
		}
		if o.Insecure && !loopback(opts.Host) && o.TLS == nil {
			logger.Warn("NATS is open to every machine that reaches it, without encryption", "address", o.Listen)
		}
	}
	if o.StoreDir != "" {
		opts.JetStream, opts.StoreDir, opts.SyncAlways, opts.SyncInterval = true, o.StoreDir, o.SyncInterval == 0, o.SyncInterval
		opts.MaxPayload, opts.MaxPending = maxValue+64<<10, 4*maxValue
		opts.JetStreamMaxMemory, opts.JetStreamMaxStore = 64<<20, o.MaxStore
		if opts.JetStreamMaxStore == 0 {
			opts.JetStreamMaxStore = 8 << 30
		}
	}
	s.opts = opts
	if err := s.start(); err != nil {
		return nil, err
	}
	if s.listens { // where it will listen again
		_, port, err := net.SplitHostPort(strings.TrimPrefix(s.ClientURL(), "nats://"))
		if number, perr := strconv.Atoi(port); err == nil && perr == nil {
			opts.Port = number
		}
	}
	return s, nil
}

func (s *Server) start() (err error) {
	if s.server, err = server.NewServer(s.opts.Clone()); err != nil {
		return problem.InvalidConfiguration.New("NATS: %w", err)
	}
	log := &natsLogger{Logger: s.log}
	s.server.SetLogger(log, false, false)
	s.server.Start()
	if fatal := log.fatal(); fatal != "" {
		s.shutdown()
		if s.opts.JetStream && !s.server.JetStreamEnabled() {
			return problem.StoreFailed.New("starting NATS JetStream in %s: %s", s.opts.StoreDir, fatal)
		}
		return problem.InvalidConfiguration.New("NATS: %s", fatal)
	}
	if !s.server.ReadyForConnections(10 * time.Second) {
		s.shutdown()
		return problem.Internal.New("NATS did not take connections within 10s")
	}
	return nil
}

// Restart ends the server and starts it again where it was. JetStream does not take anything into a stream after a write
// to disk has failed, until then. Connections with the options of Connect come back by themselves.
func (s *Server) Restart() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.shutdown()
	return s.start()
}

// Health says what is wrong with JetStream, as the server itself does: a stream that could not be read at its start, or
// not be written since. nil when nothing is.
func (s *Server) Health() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.opts.JetStream {
		return nil
	}
	for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		h := s.server.Healthz(&server.HealthzOptions{})
		if h.StatusCode == http.StatusOK {
			return nil
		}
		// It gives itself a millisecond to find that it takes connections, which a busy machine may not.
		if !strings.HasPrefix(h.Error, "failed to be ready") || time.Now().After(deadline) {
			return errors.New(h.Error)
		}
	}
}

// InProcessConn connects through memory to the server as it is now.
func (s *Server) InProcessConn() (net.Conn, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.server.InProcessConn()
}

func readable(subjects []string) *server.SubjectPermission {
	if len(subjects) == 0 {
		return &server.SubjectPermission{Deny: []string{">"}}
	}
	return &server.SubjectPermission{Allow: subjects}
}

func listen(opts *server.Options, o ServerOptions) error {
	refuse := func(format string, args ...any) error {
		return problem.InvalidConfiguration.WithFields("", []problem.Field{{Path: "nats.listen",
			Cause: fmt.Sprintf("%q ", o.Listen) + fmt.Sprintf(format, args...)}})
	}
	host, port, err := net.SplitHostPort(o.Listen)
	if err != nil {
		return refuse("is not host:port")
	}
	number, err := strconv.ParseUint(port, 10, 16)
	if err != nil {
		return refuse("has no port from 0 to 65535")
	}
	if host == "" {
		host = "0.0.0.0"
	}
	opts.Host, opts.Port = host, int(number)
	if number == 0 {
		opts.Port = server.RANDOM_PORT
	}
	switch {
	case o.TLS != nil:
		if o.TLS.ClientAuth != tls.RequireAndVerifyClientCert {
			return refuse("has TLS without client certificates; name the authority that signs them")
		}
		opts.TLS, opts.TLSVerify, opts.TLSConfig, opts.TLSTimeout = true, true, o.TLS, 5
	case !loopback(host) && !o.Insecure:
		return refuse("is reachable from other machines; use 127.0.0.1, give it TLS with client certificates, " +
			"or say insecure: true to have it open")
	}
	return nil
}

func loopback(host string) bool {
	ip := net.ParseIP(host)
	return host == "localhost" || ip != nil && ip.IsLoopback()
}

// Connect are the options with which this process connects: through memory, and with every right.
func (s *Server) Connect() []nats.Option {
	return []nats.Option{nats.InProcessServer(s), nats.UserInfo(insider, s.password)}
}

// ClientURL is what other programs connect to; empty when no socket is open.
func (s *Server) ClientURL() string {
	if !s.listens {
		return ""
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.server.ClientURL()
}

// Shutdown closes every connection and returns when the server has ended.
func (s *Server) Shutdown() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.shutdown()
}

func (s *Server) shutdown() {
	s.server.Shutdown()
	s.server.WaitForShutdown()
}

// natsLogger hands the server's log on. What the server calls fatal is kept for StartServer's error.
type natsLogger struct {
	*slog.Logger
	mu    sync.Mutex
	first string
}

var _ server.Logger = (*natsLogger)(nil)

func (l *natsLogger) Noticef(format string, v ...any) {
	l.Debug("NATS", "message", fmt.Sprintf(format, v...))
}
func (l *natsLogger) Debugf(string, ...any) {}
func (l *natsLogger) Tracef(string, ...any) {}
func (l *natsLogger) Warnf(format string, v ...any) {
	switch {
	case strings.HasPrefix(format, "Plaintext passwords"):
		return // about this process's own, which is made up at each start and never leaves memory
	case strings.HasPrefix(format, "Maximum payloads"):
		return // about what modules need, and nobody can change
	}
	l.Warn("NATS", "message", fmt.Sprintf(format, v...))
}
func (l *natsLogger) Errorf(format string, v ...any) {
	l.Error("NATS", "message", fmt.Sprintf(format, v...))
}
func (l *natsLogger) Fatalf(format string, v ...any) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.first == "" {
		l.first = fmt.Sprintf(format, v...)
	}
}

func (l *natsLogger) fatal() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.first
}
