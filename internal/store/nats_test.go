package store

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"log/slog"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/meshery/meshery-filters/internal/problem"
)

func start(t *testing.T, o ServerOptions) *Server {
	t.Helper()
	s, err := StartServer(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Shutdown)
	return s
}

func connect(t *testing.T, url string, o ...nats.Option) *nats.Conn {
	t.Helper()
	nc, err := nats.Connect(url, o...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(nc.Close)
	return nc
}

// exchange publishes on one connection and expects the message on the other.
func exchange(t *testing.T, from, to *nats.Conn, subject string) {
	t.Helper()
	sub, err := to.SubscribeSync(subject)
	if err != nil {
		t.Fatal(err)
	}
	if err := to.Flush(); err != nil {
		t.Fatal(err)
	}
	if err := from.Publish(subject, []byte("hello")); err != nil {
		t.Fatal(err)
	}
	if m, err := sub.NextMsg(5 * time.Second); err != nil || string(m.Data) != "hello" {
		t.Fatalf("got %v, %v", m, err)
	}
}

func TestWithoutAnAddressOnlyThisProcessConnects(t *testing.T) {
	s := start(t, ServerOptions{})
	if url := s.ClientURL(); url != "" {
		t.Errorf("it has the address %s", url)
	}
	if addr := s.server.Addr(); addr != nil {
		t.Errorf("it listens on %v", addr)
	}
	exchange(t, connect(t, "", s.Connect()...), connect(t, "", s.Connect()...), "any.subject")
	s.Shutdown()
	s.Shutdown()
	if nc, err := nats.Connect("", s.Connect()...); err == nil {
		nc.Close()
		t.Error("a server that was shut down took a connection")
	}
}

func TestOthersReadWhatTheyMayAndPublishNothing(t *testing.T) {
	s := start(t, ServerOptions{Listen: "127.0.0.1:0", Readable: []string{"story.>"}})
	refusals := make(chan string, 10)
	outside := connect(t, s.ClientURL(), nats.ErrorHandler(func(_ *nats.Conn, _ *nats.Subscription, err error) { refusals <- err.Error() }))
	inside := connect(t, "", s.Connect()...)
	exchange(t, inside, outside, "story.of.one")

	forged, err := inside.SubscribeSync("story.>")
	if err != nil {
		t.Fatal(err)
	}
	if err := inside.Flush(); err != nil {
		t.Fatal(err)
	}
	if err := outside.Publish("story.of.one", []byte("forged")); err != nil {
		t.Fatal(err)
	}
	if _, err := outside.SubscribeSync("other"); err != nil {
		t.Fatal(err)
	}
	if err := outside.Flush(); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"publish to", "subscription to"} {
		select {
		case got := <-refusals:
			if !strings.Contains(strings.ToLower(got), want) {
				t.Errorf("%q does not refuse a %s", got, want)
			}
		case <-time.After(5 * time.Second):
			t.Fatalf("no refusal of %s", want)
		}
	}
	if err := inside.Publish("story.end", nil); err != nil {
		t.Fatal(err)
	}
	if m, err := forged.NextMsg(5 * time.Second); err != nil || m.Subject != "story.end" {
		t.Errorf("what others published arrived: %v, %v", m, err)
	}
	if nc, err := nats.Connect(s.ClientURL(), nats.UserInfo("adapter", "guess")); err == nil {
		nc.Close()
		t.Error("a wrong password was taken")
	}
}

func TestTheSubscriptionsOfAConnectionAreBounded(t *testing.T) {
	s := start(t, ServerOptions{Listen: "127.0.0.1:0", Readable: []string{"story.>"}})
	var refused atomic.Bool
	outside := connect(t, s.ClientURL(), nats.ErrorHandler(func(_ *nats.Conn, _ *nats.Subscription, err error) {
		if errors.Is(err, nats.ErrMaxSubscriptionsExceeded) {
			refused.Store(true)
		}
	}))
	for i := range maxSubs + 5000 {
		if _, err := outside.Subscribe(fmt.Sprint("story.", i), func(*nats.Msg) {}); err != nil {
			t.Fatal(err)
		}
	}
	if err := outside.Flush(); err != nil {
		t.Fatal(err)
	}
	if n := s.server.NumSubscriptions(); n > maxSubs+1000 { // the server's own are among them
		t.Errorf("there are %d subscriptions", n)
	}
	for end := time.Now().Add(5 * time.Second); !refused.Load(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("nobody was told")
		}
	}
	exchange(t, connect(t, "", s.Connect()...), connect(t, s.ClientURL()), "story.of.one")
}

func TestAStartWarnsOfNothingThatNobodyCanChange(t *testing.T) {
	var log bytes.Buffer
	s := start(t, ServerOptions{Listen: "127.0.0.1:0", StoreDir: t.TempDir(), Logger: slog.New(slog.NewTextHandler(&log, nil))})
	s.Shutdown()
	if log.Len() > 0 {
		t.Errorf("%s", log.String())
	}
}

func TestAnAddressIsRefusedWithItsReason(t *testing.T) {
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	for story, test := range map[string]struct {
		options ServerOptions
		words   string
	}{
		"every interface":       {ServerOptions{Listen: "0.0.0.0:0"}, "insecure: true"},
		"no host":               {ServerOptions{Listen: ":0"}, "insecure: true"},
		"a name":                {ServerOptions{Listen: "example.com:0"}, "insecure: true"},
		"no port":               {ServerOptions{Listen: "127.0.0.1"}, "host:port"},
		"a port too high":       {ServerOptions{Listen: "127.0.0.1:65536"}, "65535"},
		"no client certificate": {ServerOptions{Listen: "0.0.0.0:0", TLS: &tls.Config{}}, "client certificates"},
		"taken":                 {ServerOptions{Listen: taken.Addr().String()}, "address already in use"},
	} {
		t.Run(story, func(t *testing.T) {
			s, err := StartServer(test.options)
			if err == nil {
				s.Shutdown()
			}
			if !errors.Is(err, problem.InvalidConfiguration) || !strings.Contains(err.Error(), test.words) {
				t.Errorf("got %v", err)
			}
		})
	}
}

func TestAnOpenServerIsWarnedOf(t *testing.T) {
	var log bytes.Buffer
	s := start(t, ServerOptions{Listen: "0.0.0.0:0", Insecure: true, Readable: []string{">"}, Logger: slog.New(slog.NewTextHandler(&log, nil))})
	connect(t, strings.Replace(s.ClientURL(), "0.0.0.0", "127.0.0.1", 1))
	s.Shutdown()
	if !strings.Contains(log.String(), "level=WARN") || strings.Contains(log.String(), s.password) {
		t.Errorf("log: %s", log.String())
	}
}

func TestOverTLSOnlyThoseWithACertificateConnect(t *testing.T) {
	ca, leaf := certificates(t)
	s := start(t, ServerOptions{Listen: "127.0.0.1:0", Readable: []string{">"}, TLS: &tls.Config{
		Certificates: []tls.Certificate{leaf}, ClientCAs: ca, ClientAuth: tls.RequireAndVerifyClientCert}})
	inside := connect(t, "", s.Connect()...)
	exchange(t, inside, connect(t, s.ClientURL(), nats.Secure(&tls.Config{RootCAs: ca, Certificates: []tls.Certificate{leaf}})), "s")
	if nc, err := nats.Connect(s.ClientURL(), nats.Secure(&tls.Config{RootCAs: ca})); err == nil {
		nc.Close()
		t.Error("a client without a certificate was let in")
	}
	if nc, err := nats.Connect(strings.Replace(s.ClientURL(), "tls:", "nats:", 1)); err == nil {
		nc.Close()
		t.Error("a client without TLS was let in")
	}
}

func certificates(t *testing.T) (*x509.CertPool, tls.Certificate) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test"},
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		NotBefore:   time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	parsed, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AddCert(parsed)
	return pool, tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

func TestJetStreamKeepsWhatItAcknowledgedAcrossARestart(t *testing.T) {
	path := filepath.Join(t.TempDir(), "nats")
	for run := range 2 {
		s := start(t, ServerOptions{StoreDir: path})
		js, err := jetstream.New(connect(t, "", s.Connect()...))
		if err != nil {
			t.Fatal(err)
		}
		stream, err := js.CreateOrUpdateStream(t.Context(), jetstream.StreamConfig{Name: "kept", Subjects: []string{"kept"}})
		if err != nil {
			t.Fatal(err)
		}
		if held := stream.CachedInfo().State.Msgs; held != uint64(run) {
			t.Errorf("run %d finds %d messages", run, held)
		}
		if _, err := js.Publish(t.Context(), "kept", []byte("v")); err != nil {
			t.Fatal(err)
		}
		s.Shutdown()
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm()&0o077 != 0 {
		t.Errorf("%v, %v", info.Mode(), err)
	}
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if s, err := StartServer(ServerOptions{StoreDir: file}); !errors.Is(err, problem.StoreFailed) {
		if err == nil {
			s.Shutdown()
		}
		t.Errorf("a file as the folder: %v", err)
	}
}
