package cli

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"path/filepath"
	"testing"
	"time"

	"github.com/layer5io/meshery-adapter-library/meshes"
	"github.com/nats-io/nats.go"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
)

// authority signs certificates for 127.0.0.1.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	file string
}

// issue writes a certificate and its key, signed by by or by itself.
func issue(t *testing.T, dir, name string, by *authority) (certFile, keyFile string, a *authority) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		IsCA: by == nil, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}}
	parent, signer := template, key
	if by != nil {
		parent, signer = by.cert, by.key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, &key.PublicKey, signer)
	if err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	certFile = put(t, dir, name+".pem", string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})))
	keyFile = put(t, dir, name+"-key.pem", string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER})))
	return certFile, keyFile, &authority{cert, key, certFile}
}

func TestAnAdapterWithTLSLetsInWhoHasACertificate(t *testing.T) {
	dir := t.TempDir()
	_, _, ca := issue(t, dir, "ca", nil)
	cert, key, _ := issue(t, dir, "adapter", ca)
	clientCert, clientKey, _ := issue(t, dir, "client", ca)
	otherCert, otherKey, other := issue(t, filepath.Join(dir, "other"), "other", nil)
	a := newAdapter(t, "--grpc-tls-cert-file", cert, "--grpc-tls-key-file", key, "--grpc-tls-client-ca-file", ca.file, "--grpc-roles-read", "client")

	a.cli("list", "--tls-ca", ca.file, "--tls-cert", clientCert, "--tls-key", clientKey).want(t, exitOK, "No filter")
	a.cli("list").want(t, exitUnreachable, "does not answer")
	a.cli("list", "--tls-ca", ca.file).want(t, exitUnreachable, "does not answer")
	a.cli("list", "--tls-ca", other.file, "--tls-cert", clientCert, "--tls-key", clientKey).want(t, exitUnreachable, "certificate")
	a.cli("list", "--tls-ca", ca.file, "--tls-cert", otherCert, "--tls-key", otherKey).want(t, exitUnreachable, "does not answer")
	a.cli("list", "--tls-ca", ca.file, "--tls-cert", clientCert, "--tls-key", otherKey).want(t, exitUsage, "--tls-key")
}

func TestARunningAdapterShowsRenewedCertificatesOnEveryListenerAndKeepsItsConnections(t *testing.T) {
	dir := t.TempDir()
	_, _, ca := issue(t, dir, "ca", nil)
	clientCert, clientKey, _ := issue(t, dir, "client", ca)
	cert, key, before := issue(t, dir, "adapter", ca)
	flags := []string{"--nats-listen", "127.0.0.1:0", "--modules-addr", "127.0.0.1:0", "--grpc-roles-operate", "client"}
	for _, l := range []string{"grpc", "xds", "http", "modules", "nats"} {
		flags = append(flags, "--"+l+"-tls-cert-file", cert, "--"+l+"-tls-key-file", key, "--"+l+"-tls-client-ca-file", ca.file)
	}
	a := newAdapter(t, flags...)
	pair, err := tls.LoadX509KeyPair(clientCert, clientKey)
	if err != nil {
		t.Fatal(err)
	}
	client := &tls.Config{Certificates: []tls.Certificate{pair}, RootCAs: x509.NewCertPool()}
	client.RootCAs.AddCert(ca.cert)
	raw := func(addr string) func() (*big.Int, error) {
		return func() (*big.Int, error) {
			conf := client.Clone()
			conf.NextProtos = []string{"h2", "http/1.1"}
			c, err := tls.DialWithDialer(&net.Dialer{Timeout: patience}, "tcp", addr, conf)
			if err != nil {
				return nil, err
			}
			defer c.Close()
			return c.ConnectionState().PeerCertificates[0].SerialNumber, nil
		}
	}
	shown := map[string]func() (*big.Int, error){"gRPC": raw(a.at.GRPC), "xDS": raw(a.at.XDS), "HTTP": raw(a.at.HTTP), "modules": raw(a.at.Modules),
		"NATS": func() (*big.Int, error) {
			c, err := nats.Connect(a.at.NATS, nats.Secure(client), nats.Timeout(patience))
			if err != nil {
				return nil, err
			}
			defer c.Close()
			state, err := c.TLSConnectionState()
			if err != nil {
				return nil, err
			}
			return state.PeerCertificates[0].SerialNumber, nil
		}}
	for name, serial := range shown {
		if n, err := serial(); err != nil || n.Cmp(before.cert.SerialNumber) != 0 {
			t.Errorf("%s at first: certificate %v, %v", name, n, err)
		}
	}
	conn, err := grpc.NewClient("passthrough:///"+a.at.GRPC, grpc.WithTransportCredentials(credentials.NewTLS(client)))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 2*patience)
	defer cancel()
	stream, err := meshes.NewMeshServiceClient(conn).StreamEvents(ctx, &meshes.EventsRequest{})
	if err == nil {
		_, err = stream.Header()
	}
	if err != nil {
		t.Fatal(err)
	}

	_, _, after := issue(t, dir, "adapter", ca)
	for name, serial := range shown {
		var err error
		for deadline := time.Now().Add(patience); ; time.Sleep(50 * time.Millisecond) {
			var n *big.Int
			if n, err = serial(); err == nil && n.Cmp(after.cert.SerialNumber) == 0 {
				break
			}
			if time.Now().After(deadline) {
				t.Errorf("%s shows certificate %v after it was renewed: %v", name, n, err)
				break
			}
		}
	}
	// The stream of before is the one that hears what is done over a new connection.
	a.cli("run", "filters_status", "--tls-ca", ca.file, "--tls-cert", clientCert, "--tls-key", clientKey).want(t, exitOK)
	if e, err := stream.Recv(); err != nil || e.GetSummary() != "No filter is applied" {
		t.Errorf("the stream that was open: %v, %v", e, err)
	}
}
