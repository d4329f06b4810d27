package xds

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"math/big"
	"net"
	"net/url"
	"strings"
	"testing"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/envoyproxy/go-control-plane/pkg/resource/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"
)

// authority signs certificates.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	pool *x509.CertPool
}

func certificate(t *testing.T, by *authority, uris ...string) (tls.Certificate, *x509.Certificate, *ecdsa.PrivateKey) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	c := &x509.Certificate{SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: "test"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth}}
	for _, s := range uris {
		u, err := url.Parse(s)
		if err != nil {
			t.Fatal(err)
		}
		c.URIs = append(c.URIs, u)
	}
	parent, signer := c, key
	if by != nil {
		parent, signer = by.cert, by.key
	} else {
		c.IsCA, c.BasicConstraintsValid, c.KeyUsage = true, true, x509.KeyUsageCertSign
	}
	der, err := x509.CreateCertificate(rand.Reader, c, parent, key.Public(), signer)
	if err != nil {
		t.Fatal(err)
	}
	parsed, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, parsed, key
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	_, cert, key := certificate(t, nil)
	a := &authority{cert: cert, key: key, pool: x509.NewCertPool()}
	a.pool.AddCert(cert)
	return a
}

func TestACertificateSaysWhichGroupsAProxyMayJoin(t *testing.T) {
	t.Parallel()
	ca := newAuthority(t)
	serverCert, _, _ := certificate(t, ca)
	r := newRig(t, func(o *Options) { o.Admit = AdmitCertified })
	listen := func(auth tls.ClientAuthType) string {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		s := grpc.NewServer(append(ServerOptions(), grpc.Creds(credentials.NewTLS(&tls.Config{
			Certificates: []tls.Certificate{serverCert}, ClientCAs: ca.pool, ClientAuth: auth})))...)
		r.b.Register(s)
		served := make(chan struct{})
		go func() { defer close(served); _ = s.Serve(l) }()
		t.Cleanup(func() { s.Stop(); <-served })
		return l.Addr().String()
	}
	strict, lax := listen(tls.RequireAndVerifyClientCert), listen(tls.VerifyClientCertIfGiven)
	for _, c := range []struct {
		name, addr string
		cert       bool
		uris       []string
		code       codes.Code
	}{
		{"the group that it names", strict, true, []string{"spiffe://x/y", "meshery-filters://group/edge"}, codes.OK},
		{"any group", strict, true, []string{"meshery-filters://group/*"}, codes.OK},
		{"another group", strict, true, []string{"meshery-filters://group/edge2"}, codes.PermissionDenied},
		{"no group", strict, true, nil, codes.PermissionDenied},
		{"no certificate", lax, false, nil, codes.Unauthenticated},
	} {
		t.Run(c.name, func(t *testing.T) {
			config := &tls.Config{RootCAs: ca.pool}
			if c.cert {
				cert, _, _ := certificate(t, ca, c.uris...)
				config.Certificates = []tls.Certificate{cert}
			}
			conn, err := grpc.NewClient(c.addr, grpc.WithTransportCredentials(credentials.NewTLS(config)))
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { conn.Close() })
			s := r.open(conn)
			s.send(&discovery.DiscoveryRequest{Node: node("a"), TypeUrl: resource.ExtensionConfigType, ResourceNames: []string{Slot}})
			if c.code == codes.OK {
				s.next()
				return
			}
			<-s.ended
			if status.Code(s.err) != c.code {
				t.Fatal(s.err)
			}
		})
	}
	t.Run("a connection in clear", func(t *testing.T) {
		s := r.open(r.conn())
		s.send(&discovery.DiscoveryRequest{Node: node("a"), TypeUrl: resource.ExtensionConfigType, ResourceNames: []string{Slot}})
		<-s.ended
		if status.Code(s.err) != codes.Unauthenticated || !strings.Contains(s.err.Error(), "client certificate") {
			t.Fatal(s.err)
		}
	})
}
