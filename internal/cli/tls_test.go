package cli

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"path/filepath"
	"testing"
	"time"
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
	a := newAdapter(t, "--grpc-tls-cert-file", cert, "--grpc-tls-key-file", key, "--grpc-tls-client-ca-file", ca.file)

	a.cli("list", "--tls-ca", ca.file, "--tls-cert", clientCert, "--tls-key", clientKey).want(t, exitOK, "No filter")
	a.cli("list").want(t, exitUnreachable, "does not answer")
	a.cli("list", "--tls-ca", ca.file).want(t, exitUnreachable, "does not answer")
	a.cli("list", "--tls-ca", other.file, "--tls-cert", clientCert, "--tls-key", clientKey).want(t, exitUnreachable, "certificate")
	a.cli("list", "--tls-ca", ca.file, "--tls-cert", otherCert, "--tls-key", otherKey).want(t, exitUnreachable, "does not answer")
	a.cli("list", "--tls-ca", ca.file, "--tls-cert", clientCert, "--tls-key", otherKey).want(t, exitUsage, "--tls-key")
}
