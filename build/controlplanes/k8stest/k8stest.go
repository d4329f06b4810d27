// Package k8stest runs a real Kubernetes API server with its etcd, and on request its controller manager, for tests. The
// program is what `make controlplanes` has built; nothing here builds it.
//
// There are no nodes: Pods are objects only, and nothing brings them to life.
package k8stest

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/hex"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/meshery/meshery-filters/build/controlplanes/stack"
)

const (
	startTimeout = 3 * time.Minute // of all parts together, on a machine that is busy with other things
	pollInterval = 20 * time.Millisecond
	attempts     = 4 // a port that was free may be taken before it is used
	// Issuer of the tokens that the server takes from service accounts.
	Issuer = "https://kubernetes.default.svc"
	// Admin is a user who may do everything.
	Admin = "admin"
)

// Options say what runs.
type Options struct {
	// Users are the names of further users, who may do nothing until a role is bound to them.
	Users []string
	// ControllerManager finishes the deletion of namespaces, collects garbage, and runs Deployments as far as ReplicaSets
	// and Pods.
	ControllerManager bool
	// APIServerArgs are further arguments.
	APIServerArgs []string
}

// Server is a running API server. Whoever started it calls Stop.
type Server struct {
	// URL of the API server: https://127.0.0.1:PORT.
	URL string
	// CA is the certificate, in PEM, that the server's is signed by.
	CA []byte
	// ServiceAccountKey signs the tokens of service accounts.
	ServiceAccountKey *ecdsa.PrivateKey

	dir    string
	tokens map[string]string
	client *http.Client
	parts  []*stack.Process
}

// Start runs the parts until the server says that it is ready. Everything is kept in dir, which is made and not removed.
// The error of a part that ends carries the end of its log.
func Start(ctx context.Context, dir string, o Options) (*Server, error) {
	folder, err := stack.Folder(ctx, "kubernetes")
	if err != nil {
		return nil, err
	}
	program := filepath.Join(folder, "kubernetes")
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	for n := 1; ; n++ {
		s, err := start(ctx, program, filepath.Join(dir, strconv.Itoa(n)), o)
		if err == nil || n == attempts || !strings.Contains(err.Error(), "address already in use") {
			return s, err
		}
	}
}

func start(ctx context.Context, program, dir string, o Options) (_ *Server, err error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	ports, err := stack.FreePorts(4)
	if err != nil {
		return nil, err
	}
	address := func(n int) string { return "127.0.0.1:" + ports[n] }
	s := &Server{URL: "https://" + address(2), dir: dir, tokens: map[string]string{}}
	defer func() {
		if err != nil {
			s.Stop()
		}
	}()
	if err := s.writeSecrets(append([]string{Admin}, o.Users...)); err != nil {
		return nil, err
	}
	file := func(name string) string { return filepath.Join(dir, name) }

	if err := s.run(program, "etcd",
		"--name=test", "--data-dir="+file("etcd"), "--unsafe-no-fsync", "--log-level=warn",
		"--listen-client-urls=http://"+address(0), "--advertise-client-urls=http://"+address(0),
		"--listen-peer-urls=http://"+address(1), "--initial-advertise-peer-urls=http://"+address(1),
		"--initial-cluster=test=http://"+address(1)); err != nil {
		return nil, err
	}
	if err := s.await(ctx, "http://"+address(0)+"/health"); err != nil {
		return nil, err
	}
	if err := s.run(program, "kube-apiserver", append([]string{
		"--etcd-servers=http://" + address(0),
		"--bind-address=127.0.0.1", "--advertise-address=127.0.0.1", "--secure-port=" + ports[2],
		"--tls-cert-file=" + file("server.crt"), "--tls-private-key-file=" + file("server.key"),
		"--client-ca-file=" + file("ca.crt"), "--token-auth-file=" + file("tokens.csv"), "--authorization-mode=RBAC",
		"--service-account-issuer=" + Issuer, "--service-account-key-file=" + file("accounts.key"),
		"--service-account-signing-key-file=" + file("accounts.key"),
		"--service-cluster-ip-range=10.96.0.0/16", "--endpoint-reconciler-type=none",
		"--disable-admission-plugins=ServiceAccount", "--allow-privileged=true",
		// It would log each slow request, and on a busy machine all are.
		"--v=0"}, o.APIServerArgs...)...); err != nil {
		return nil, err
	}
	if err := s.await(ctx, s.URL+"/readyz"); err != nil {
		return nil, err
	}
	if !o.ControllerManager {
		return s, nil
	}
	if err := os.WriteFile(file("manager.kubeconfig"), s.Kubeconfig(s.Token(Admin)), 0o600); err != nil {
		return nil, err
	}
	if err := s.run(program, "kube-controller-manager",
		"--kubeconfig="+file("manager.kubeconfig"), "--leader-elect=false",
		"--bind-address=127.0.0.1", "--secure-port="+ports[3], "--cert-dir="+file("manager"),
		"--authorization-always-allow-paths=/healthz",
		"--controllers=namespace-controller,garbage-collector-controller,deployment-controller,replicaset-controller,statefulset-controller,daemonset-controller,endpointslice-controller,serviceaccount-controller"); err != nil {
		return nil, err
	}
	return s, s.await(ctx, "https://"+address(3)+"/healthz")
}

// Token is what a user of Options.Users, or Admin, authenticates with; empty for anybody else.
func (s *Server) Token(user string) string { return s.tokens[user] }

// Kubeconfig is for whoever has the token.
func (s *Server) Kubeconfig(token string) []byte {
	return fmt.Appendf(nil, `apiVersion: v1
kind: Config
clusters:
- name: test
  cluster: {server: %q, certificate-authority-data: %q}
users:
- name: test
  user: {token: %q}
contexts:
- name: test
  context: {cluster: test, user: test}
current-context: test
`, s.URL, base64.StdEncoding.EncodeToString(s.CA), token)
}

// Stop ends every part, the last started first, and waits until they are gone.
func (s *Server) Stop() {
	for i := len(s.parts) - 1; i >= 0; i-- {
		s.parts[i].Stop()
	}
	if s.client != nil {
		s.client.CloseIdleConnections()
	}
}

func (s *Server) run(program, part string, args ...string) error {
	p, err := stack.Run(program, part, nil, args...)
	if err == nil {
		s.parts = append(s.parts, p)
	}
	return err
}

// await polls an address until it answers 200, or the part that was started last ends.
func (s *Server) await(ctx context.Context, url string) error {
	return s.parts[len(s.parts)-1].Await(ctx, func(ctx context.Context) error { return s.ask(ctx, url) })
}

func (s *Server) ask(ctx context.Context, url string) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	req.Header.Set("Authorization", "Bearer "+s.Token(Admin))
	resp, err := s.client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, 4<<10))
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s", resp.Status, body)
	}
	return err
}

// writeSecrets makes the certificates, keys and tokens.
func (s *Server) writeSecrets(users []string) error {
	authority, authorityKey, err := certificate("test authority", nil, nil)
	if err != nil {
		return err
	}
	server, serverKey, err := certificate("kube-apiserver", authority, authorityKey)
	if err != nil {
		return err
	}
	if s.ServiceAccountKey, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
		return err
	}
	s.CA = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: authority.Raw})
	files := map[string][]byte{
		"ca.crt":     s.CA,
		"server.crt": pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Raw}),
	}
	for name, key := range map[string]*ecdsa.PrivateKey{"server.key": serverKey, "accounts.key": s.ServiceAccountKey} {
		der, err := x509.MarshalECPrivateKey(key)
		if err != nil {
			return err
		}
		files[name] = pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: der})
	}
	var tokens bytes.Buffer
	for _, user := range users {
		token := make([]byte, 16)
		if _, err := rand.Read(token); err != nil {
			return err
		}
		s.tokens[user] = hex.EncodeToString(token)
		fmt.Fprintf(&tokens, "%s,%s,%s", s.tokens[user], user, user)
		if user == Admin {
			tokens.WriteString(",system:masters")
		}
		tokens.WriteByte('\n')
	}
	files["tokens.csv"] = tokens.Bytes()
	for name, data := range files {
		if err := os.WriteFile(filepath.Join(s.dir, name), data, 0o600); err != nil {
			return err
		}
	}
	// The controller manager signs a certificate of its own, and there is nobody but us on the loopback interface.
	s.client = &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}}
	return nil
}

// certificate makes an authority, or what the authority signs for 127.0.0.1.
func certificate(name string, authority *x509.Certificate, signer *ecdsa.PrivateKey) (*x509.Certificate, *ecdsa.PrivateKey, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	template := &x509.Certificate{
		SerialNumber:          big.NewInt(time.Now().UnixNano()),
		Subject:               pkix.Name{CommonName: name},
		NotBefore:             time.Now().Add(-time.Hour),
		NotAfter:              time.Now().Add(24 * time.Hour),
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageDigitalSignature,
	}
	if authority == nil {
		authority, signer = template, key
		template.IsCA, template.KeyUsage = true, x509.KeyUsageCertSign
	} else {
		template.IPAddresses = []net.IP{net.IPv4(127, 0, 0, 1)}
		template.DNSNames = []string{"localhost"}
		template.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
	}
	der, err := x509.CreateCertificate(rand.Reader, template, authority, &key.PublicKey, signer)
	if err != nil {
		return nil, nil, err
	}
	c, err := x509.ParseCertificate(der)
	return c, key, err
}
