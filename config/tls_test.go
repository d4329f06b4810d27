package config

import (
	"bufio"
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// identity is a certificate with its key.
type identity struct {
	cert    *x509.Certificate
	key     *ecdsa.PrivateKey
	certPEM []byte
	keyPEM  []byte
}

// certify makes an authority, or what one signs for 127.0.0.1.
func certify(t *testing.T, name string, by *identity) *identity {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		IsCA: by == nil, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}}
	id := &identity{key: key}
	parent, signer := template, key
	if by != nil {
		parent, signer = by.cert, by.key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, &key.PublicKey, signer)
	if err != nil {
		t.Fatal(err)
	}
	if id.cert, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	id.certPEM = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	id.keyPEM = pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER})
	return id
}

// client is a client with that certificate that believes the roots.
func (id *identity) client(t *testing.T, roots ...*identity) *tls.Config {
	t.Helper()
	pair, err := tls.X509KeyPair(id.certPEM, id.keyPEM)
	if err != nil {
		t.Fatal(err)
	}
	c := &tls.Config{Certificates: []tls.Certificate{pair}, RootCAs: x509.NewCertPool(), ClientSessionCache: tls.NewLRUClientSessionCache(10)}
	for _, r := range roots {
		c.RootCAs.AddCert(r.cert)
	}
	return c
}

// mounted is a folder of files as Kubernetes mounts one: each is a symbolic link through ..data, which is replaced in
// one step.
type mounted struct {
	t    *testing.T
	dir  string
	next int
}

func (m *mounted) swap(files map[string][]byte) {
	m.t.Helper()
	m.next++
	version := fmt.Sprintf("..version-%d", m.next)
	if err := os.Mkdir(filepath.Join(m.dir, version), 0o700); err != nil {
		m.t.Fatal(err)
	}
	for name, data := range files {
		if err := os.WriteFile(filepath.Join(m.dir, version, name), data, 0o600); err != nil {
			m.t.Fatal(err)
		}
	}
	link := filepath.Join(m.dir, "..data")
	if err := os.Symlink(version, link+".new"); err != nil {
		m.t.Fatal(err)
	}
	if err := os.Rename(link+".new", link); err != nil {
		m.t.Fatal(err)
	}
	for name := range files {
		if err := os.Symlink(filepath.Join("..data", name), filepath.Join(m.dir, name)); err != nil && !os.IsExist(err) {
			m.t.Fatal(err)
		}
	}
}

// lines is a log that can be read while it is written.
type lines struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

func (l *lines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

// echo answers each line of each connection with the same line.
func echo(t *testing.T, conf *tls.Config) (addr string) {
	t.Helper()
	l, err := tls.Listen("tcp", "127.0.0.1:0", conf)
	if err != nil {
		t.Fatal(err)
	}
	var serving sync.WaitGroup
	serving.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			serving.Go(func() { _, _ = io.Copy(c, c); c.Close() })
		}
	})
	t.Cleanup(func() { l.Close(); serving.Wait() })
	return l.Addr().String()
}

// talk opens a connection, says hello on it, and returns it with the serial number of the certificate that it was shown.
func talk(t *testing.T, addr string, conf *tls.Config) (*tls.Conn, *big.Int, error) {
	t.Helper()
	c, err := tls.DialWithDialer(&net.Dialer{Timeout: 20 * time.Second}, "tcp", addr, conf)
	if err != nil {
		return nil, nil, err
	}
	t.Cleanup(func() { c.Close() })
	return c, c.ConnectionState().PeerCertificates[0].SerialNumber, hello(c)
}

func hello(c *tls.Conn) error {
	if err := c.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
		return err
	}
	if _, err := fmt.Fprintln(c, "hello"); err != nil {
		return err
	}
	line, err := bufio.NewReader(c).ReadString('\n')
	if err == nil && line != "hello\n" {
		err = fmt.Errorf("got %q", line)
	}
	return err
}

// eventually waits until f returns nil.
func eventually(t *testing.T, what string, f func() error) {
	t.Helper()
	var err error
	for end := time.Now().Add(time.Minute); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		if err = f(); err == nil {
			return
		}
	}
	t.Fatalf("%s: %v", what, err)
}

func TestNewConnectionsSeeTheCertificatesThatTheFilesHoldNow(t *testing.T) {
	ca, otherCA := certify(t, "ca", nil), certify(t, "other", nil)
	first, second, third := certify(t, "adapter", ca), certify(t, "adapter", ca), certify(t, "adapter", ca)
	ours, theirs := certify(t, "client", ca), certify(t, "stranger", otherCA)
	m := &mounted{t: t, dir: t.TempDir()}
	m.swap(map[string][]byte{"tls.crt": first.certPEM, "tls.key": first.keyPEM, "ca.crt": append(ca.certPEM[:len(ca.certPEM):len(ca.certPEM)], otherCA.certPEM...)})
	var log lines
	conf, err := TLS{CertFile: filepath.Join(m.dir, "tls.crt"), KeyFile: filepath.Join(m.dir, "tls.key"), ClientCAFile: filepath.Join(m.dir, "ca.crt")}.
		Server(slog.New(slog.NewTextHandler(&log, nil)))
	if err != nil {
		t.Fatal(err)
	}
	addr := echo(t, conf)
	us, them := ours.client(t, ca), theirs.client(t, ca)
	old, serial, err := talk(t, addr, us)
	if err != nil || serial.Cmp(first.cert.SerialNumber) != 0 {
		t.Fatalf("at first: certificate %v, %v", serial, err)
	}
	stranger, _, err := talk(t, addr, them)
	if err != nil {
		t.Fatalf("a client of the other authority, while it is named: %v", err)
	}

	// The other authority is taken out, with a new certificate.
	m.swap(map[string][]byte{"tls.crt": second.certPEM, "tls.key": second.keyPEM, "ca.crt": ca.certPEM})
	shows := func(id *identity) func() error {
		return func() error {
			_, serial, err := talk(t, addr, us)
			if err == nil && serial.Cmp(id.cert.SerialNumber) != 0 {
				err = fmt.Errorf("certificate %v is shown, want %v", serial, id.cert.SerialNumber)
			}
			return err
		}
	}
	eventually(t, "the new certificate", shows(second))
	for range 3 { // also with what the client may remember of its session before
		if _, _, err := talk(t, addr, them); err == nil {
			t.Error("a client of the authority that was taken out is let in")
		}
	}
	for who, c := range map[string]*tls.Conn{"ours": old, "the stranger's": stranger} {
		if err := hello(c); err != nil {
			t.Errorf("the connection of before, %s: %v", who, err)
		}
	}

	// What cannot be used changes nothing, and is named once.
	m.swap(map[string][]byte{"tls.crt": third.certPEM, "tls.key": second.keyPEM, "ca.crt": ca.certPEM})
	eventually(t, "the log", func() error {
		if err := shows(second)(); err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(log.String(), "level=ERROR") {
			return fmt.Errorf("says nothing:\n%s", log.String())
		}
		return nil
	})
	for range 2 {
		time.Sleep(rereadAfter)
		if err := shows(second)(); err != nil {
			t.Fatal(err)
		}
	}
	if text := log.String(); strings.Count(text, "level=ERROR") != 1 || !strings.Contains(text, filepath.Join(m.dir, "tls.key")) {
		t.Errorf("the log does not name the broken pair once:\n%s", text)
	}

	// Mended, it is taken over.
	m.swap(map[string][]byte{"tls.crt": third.certPEM, "tls.key": third.keyPEM, "ca.crt": ca.certPEM})
	eventually(t, "the mended certificate", shows(third))
	if err := os.Remove(filepath.Join(m.dir, "..data")); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the log", func() error {
		if err := shows(third)(); err != nil {
			t.Fatal(err)
		}
		if strings.Count(log.String(), "level=ERROR") != 2 {
			return fmt.Errorf("does not say that a file is missing:\n%s", log.String())
		}
		return nil
	})
}
