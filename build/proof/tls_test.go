package proof

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/meshery/meshery-filters/internal/envoy"
)

// authority signs certificates for a test.
type authority struct {
	t    *testing.T
	dir  string
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	file string
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	a := &authority{t: t, dir: t.TempDir()}
	var err error
	if a.key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
		t.Fatal(err)
	}
	tmpl := template(t, pkix.Name{CommonName: "proof"})
	tmpl.IsCA, tmpl.BasicConstraintsValid, tmpl.KeyUsage = true, true, x509.KeyUsageCertSign
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, a.key.Public(), a.key)
	if err != nil {
		t.Fatal(err)
	}
	if a.cert, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	a.file = a.write("ca.pem", "CERTIFICATE", der)
	return a
}

func template(t *testing.T, subject pkix.Name) *x509.Certificate {
	t.Helper()
	serial, err := rand.Int(rand.Reader, big.NewInt(1<<62))
	if err != nil {
		t.Fatal(err)
	}
	return &x509.Certificate{SerialNumber: serial, Subject: subject, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}}
}

func (a *authority) write(name, kind string, der []byte) string {
	a.t.Helper()
	path := filepath.Join(a.dir, name)
	if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
		a.t.Fatal(err)
	}
	return path
}

// issue makes a certificate for 127.0.0.1 that names the groups that its owner may join.
func (a *authority) issue(name string, groups ...string) (certFile, keyFile string) {
	a.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		a.t.Fatal(err)
	}
	tmpl := template(a.t, pkix.Name{CommonName: name})
	tmpl.IPAddresses = []net.IP{net.IPv4(127, 0, 0, 1)}
	for _, g := range groups {
		tmpl.URIs = append(tmpl.URIs, &url.URL{Scheme: "meshery-filters", Host: "group", Path: "/" + g, RawPath: "/" + g})
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, a.cert, key.Public(), a.key)
	if err != nil {
		a.t.Fatal(err)
	}
	keyDER, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		a.t.Fatal(err)
	}
	return a.write(name+".pem", "CERTIFICATE", der), a.write(name+".key", "EC PRIVATE KEY", keyDER)
}

// client is the TLS configuration of a client with a certificate.
func (a *authority) client(certFile, keyFile string) *tls.Config {
	a.t.Helper()
	pair, err := tls.LoadX509KeyPair(certFile, keyFile)
	if err != nil {
		a.t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AddCert(a.cert)
	return &tls.Config{RootCAs: roots, Certificates: []tls.Certificate{pair}, MinVersion: tls.VersionTLS12}
}

func TestAClientCertificateSaysWhichGroupAnEnvoyMayJoin(t *testing.T) {
	onRealParts(t)
	t.Parallel()
	ca, stranger := newAuthority(t), newAuthority(t)
	cert, key := ca.issue("adapter")
	a := newAdapter(t, "--xds-tls-cert-file", cert, "--xds-tls-key-file", key, "--xds-tls-client-ca-file", ca.file)
	const group = "edge"
	backend := upstream(t)
	join := func(id string, by *authority, groups ...string) *proxy {
		c, k := by.issue(id, groups...)
		return startProxy(t, proxyOptions{id: id, group: group, upstream: backend, xds: a.addresses.XDS,
			tls: &envoy.TLS{CA: ca.file, Cert: c, Key: k}, closed: true})
	}
	a.apply(probe(t, "mark", group, stamp("in"), nil)) // waits for the first proxy
	refused := []*proxy{join("of-another-group", ca, "inner"), join("of-no-group", ca), join("of-another-authority", stranger, group)}
	admitted := []*proxy{join("of-the-group", ca, "inner", group), join("of-all", ca, "*")}
	a.allRun(group, 2)
	for _, p := range admitted {
		eventually(t, p.id+" serves", func() error {
			_, h, err := get(p.addr, "/", nil)
			if err == nil && h.Get("x-stamp") != "in" {
				t.Fatalf("%s serves without its chain", p.id)
			}
			return err
		})
	}
	for _, id := range []string{"of-another-group", "of-no-group"} {
		eventually(t, id+" is refused", func() error {
			for line := range strings.Lines(a.log.String()) {
				if strings.Contains(line, "proxy refused") && strings.Contains(line, "proxy="+id) {
					return nil
				}
			}
			return fmt.Errorf("the log does not say so")
		})
	}
	for _, p := range refused {
		if _, _, err := get(p.addr, "/", nil); err == nil {
			t.Errorf("%s serves", p.id)
		}
		if s, err := p.Admin().SlotConfig(t.Context()); err != nil || s.Version != "" || len(s.Filters) > 0 || s.RejectedVersion != "" {
			t.Errorf("%s was sent a chain: %+v, %v", p.id, s, err)
		}
	}
	a.allRun(group, 2)
}

func TestWithMutualTLSOnlyACertifiedCallerIsAnswered(t *testing.T) {
	onRealParts(t)
	t.Parallel()
	ca, stranger := newAuthority(t), newAuthority(t)
	cert, key := ca.issue("adapter")
	ownCert, ownKey := ca.issue("operator")
	otherCert, otherKey := stranger.issue("stranger")
	a := newTLSAdapter(t, ca.client(ownCert, ownKey), "--grpc-tls-cert-file", cert, "--grpc-tls-key-file", key, "--grpc-tls-client-ca-file", ca.file,
		"--grpc-roles-operate", "operator")
	list := func(flags ...string) (int, string) {
		return run(t, append([]string{"list", "--server", a.addresses.GRPC}, flags...)...)
	}
	if code, out := list("--tls-ca", ca.file, "--tls-cert", ownCert, "--tls-key", ownKey); code != 0 {
		t.Errorf("with a certificate: exit code %d\n%s", code, out)
	}
	for _, c := range []struct {
		why   string
		flags []string
	}{
		{"in clear", nil},
		{"without a client certificate", []string{"--tls-ca", ca.file}},
		{"with a certificate of another authority", []string{"--tls-ca", ca.file, "--tls-cert", otherCert, "--tls-key", otherKey}},
		{"not knowing the adapter's authority", []string{"--tls-ca", stranger.file, "--tls-cert", ownCert, "--tls-key", ownKey}},
	} {
		if code, out := list(c.flags...); code != 3 || !strings.Contains(out, "does not answer") {
			t.Errorf("%s: exit code %d, want 3\n%s", c.why, code, out)
		}
	}
}

func TestAListenerThatIsOpenToAllIsRefusedAtStart(t *testing.T) {
	onRealParts(t)
	t.Parallel()
	ca := newAuthority(t)
	cert, key := ca.issue("adapter")
	loopback := []string{"--grpc-addr", "127.0.0.1:0", "--xds-addr", "127.0.0.1:0", "--http-addr", "127.0.0.1:0", "--imagehub-addr", "127.0.0.1:0"}
	for _, c := range []struct {
		why, key string
		flags    []string
	}{
		{"gRPC", "grpcAddr", []string{"--grpc-addr", "0.0.0.0:0"}},
		{"xDS", "xdsAddr", []string{"--xds-addr", "0.0.0.0:0"}},
		{"xDS with TLS but no client certificates", "xdsAddr", []string{"--xds-addr", "0.0.0.0:0", "--xds-tls-cert-file", cert, "--xds-tls-key-file", key}},
		{"HTTP", "httpAddr", []string{"--http-addr", "[::]:0"}},
		{"NATS", "natsListen", []string{"--nats-listen", "0.0.0.0:0"}},
		{"Image Hub", "imagehub.addr", []string{"--imagehub-addr", "0.0.0.0:0"}},
	} {
		state := filepath.Join(t.TempDir(), "state")
		code, out := run(t, append(append([]string{"serve", "--state-dir", state}, loopback...), c.flags...)...)
		if code != 2 || !strings.Contains(out, c.key) || !strings.Contains(out, "open to other machines") || !strings.Contains(out, "127.0.0.1") {
			t.Errorf("%s: exit code %d, want 2 and a text that names %s and a remedy\n%s", c.why, code, c.key, out)
		}
		if _, err := os.Stat(state); err == nil {
			t.Errorf("%s: the refused adapter made its state directory", c.why)
		}
	}
}
