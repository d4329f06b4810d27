package config

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/meshery/meshery-filters/internal/problem"
)

// rereadAfter is how long files of a listener's TLS are believed. They are read for handshakes only.
const rereadAfter = time.Second

// Server is the TLS configuration of a listener, or nil without certFile. With clientCAFile, a client without a
// certificate of those authorities is turned away.
//
// New connections see what the files hold, at most a second later; connections that are open stay. Files that cannot be
// used, such as a certificate and a key that do not belong together, are logged once, and those before them stay in use.
func (t TLS) Server(log *slog.Logger) (*tls.Config, error) {
	if t.CertFile == "" {
		return nil, nil
	}
	r := &tlsFiles{tls: t, log: log}
	files, err := r.read()
	if err != nil {
		return nil, err
	}
	first, err := files.config(t)
	if err != nil {
		return nil, err
	}
	r.last, r.readAt = files, time.Now()
	r.current.Store(first)
	conf := first.Clone()
	conf.GetConfigForClient = func(*tls.ClientHelloInfo) (*tls.Config, error) { return r.config(), nil }
	return conf, nil
}

// tlsFiles follows the files of one listener.
type tlsFiles struct {
	tls     TLS
	log     *slog.Logger
	current atomic.Pointer[tls.Config]

	mu     sync.Mutex // held while the files are read
	readAt time.Time
	last   tlsContent // as read last, whether or not it could be used
	failed string     // what was logged last; empty while all is well
}

// config is what a handshake uses. One handshake at a time reads the files, so that a file system that hangs does not
// keep the others waiting.
func (r *tlsFiles) config() *tls.Config {
	if r.mu.TryLock() {
		if time.Since(r.readAt) >= rereadAfter {
			r.refresh()
			r.readAt = time.Now()
		}
		r.mu.Unlock()
	}
	return r.current.Load()
}

// refresh takes over what has changed. The lock is held.
func (r *tlsFiles) refresh() {
	files, err := r.read()
	if err == nil {
		if r.failed == "" && files.equal(r.last) {
			return
		}
		r.last = files
		var next *tls.Config
		if next, err = files.config(r.tls); err == nil {
			r.current.Store(next)
			r.failed = ""
			r.log.Info("TLS files were read again", "certificate", r.tls.CertFile, "clientAuthorities", r.tls.ClientCAFile,
				"expires", next.Certificates[0].Leaf.NotAfter)
			return
		}
	}
	if text := err.Error(); text != r.failed {
		r.failed = text
		r.log.Error("changed TLS files cannot be used; those before them stay in use", "err", err)
	}
}

// tlsContent is what the files hold.
type tlsContent struct{ cert, key, clientCA []byte }

func (c tlsContent) equal(o tlsContent) bool {
	return bytes.Equal(c.cert, o.cert) && bytes.Equal(c.key, o.key) && bytes.Equal(c.clientCA, o.clientCA)
}

func (r *tlsFiles) read() (c tlsContent, err error) {
	for _, f := range []struct {
		name string
		into *[]byte
	}{{r.tls.CertFile, &c.cert}, {r.tls.KeyFile, &c.key}, {r.tls.ClientCAFile, &c.clientCA}} {
		if f.name == "" {
			continue
		}
		if *f.into, err = readFile(f.name); err != nil {
			return c, problem.InvalidConfiguration.New("TLS: %w", err)
		}
	}
	return c, nil
}

func (c tlsContent) config(t TLS) (*tls.Config, error) {
	cert, err := tls.X509KeyPair(c.cert, c.key)
	if err != nil {
		return nil, problem.InvalidConfiguration.New("certificate %s with key %s: %w", t.CertFile, t.KeyFile, err)
	}
	conf := &tls.Config{Certificates: []tls.Certificate{cert}, MinVersion: tls.VersionTLS12}
	if t.ClientCAFile == "" {
		return conf, nil
	}
	conf.ClientCAs, conf.ClientAuth = x509.NewCertPool(), tls.RequireAndVerifyClientCert
	if !conf.ClientCAs.AppendCertsFromPEM(c.clientCA) {
		return nil, problem.InvalidConfiguration.New("client authorities: %s holds no PEM certificate", t.ClientCAFile)
	}
	// A session that is resumed is not asked for its certificate again, even when its authority is gone.
	conf.SessionTicketsDisabled = true
	return conf, nil
}

// TLS is the client's side of Consul's TLS; nil where nothing is named.
func (c Consul) TLS() (*tls.Config, error) {
	if c.CAFile == "" && c.CertFile == "" {
		return nil, nil
	}
	conf := &tls.Config{MinVersion: tls.VersionTLS12}
	if c.CAFile != "" {
		ca, err := readFile(c.CAFile)
		if err != nil {
			return nil, problem.InvalidConfiguration.New("consul.caFile: %w", err)
		}
		if conf.RootCAs = x509.NewCertPool(); !conf.RootCAs.AppendCertsFromPEM(ca) {
			return nil, problem.InvalidConfiguration.New("consul.caFile: %s holds no PEM certificate", c.CAFile)
		}
	}
	if c.CertFile != "" {
		cert, err := tls.LoadX509KeyPair(c.CertFile, c.KeyFile)
		if err != nil {
			return nil, problem.InvalidConfiguration.New("consul: certificate %s with key %s: %w", c.CertFile, c.KeyFile, err)
		}
		conf.Certificates = []tls.Certificate{cert}
	}
	return conf, nil
}
