package server_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"io"
	"math/big"
	"net"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"

	"github.com/meshery/meshery-filters/internal/audit"
	"github.com/meshery/meshery-filters/internal/event"
	"github.com/meshery/meshery-filters/internal/problem"
	"github.com/meshery/meshery-filters/internal/server"
)

// authority signs certificates for a test's server and clients.
type authority struct {
	t    *testing.T
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	pool *x509.CertPool
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	self, pool := certificate(t)
	leaf, err := x509.ParseCertificate(self.Certificate[0])
	if err != nil {
		t.Fatal(err)
	}
	return &authority{t, leaf, self.PrivateKey.(*ecdsa.PrivateKey), pool}
}

func (a *authority) issue(commonName string, uris ...string) tls.Certificate {
	a.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		a.t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: commonName},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}}
	for _, text := range uris {
		u, err := url.Parse(text)
		if err != nil {
			a.t.Fatal(err)
		}
		template.URIs = append(template.URIs, u)
	}
	der, err := x509.CreateCertificate(rand.Reader, template, a.cert, &key.PublicKey, a.key)
	if err != nil {
		a.t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// dial connects to a server of the authority with a client certificate.
func (a *authority) dial(addr string, cert tls.Certificate, more ...grpc.DialOption) *grpc.ClientConn {
	a.t.Helper()
	conn, err := grpc.NewClient(addr, append(more, grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{RootCAs: a.pool, Certificates: []tls.Certificate{cert}})))...)
	if err != nil {
		a.t.Fatal(err)
	}
	a.t.Cleanup(func() { conn.Close() })
	return conn
}

// serving changes a server's options to ask for client certificates of the authority.
func (a *authority) serving(o *server.Options) {
	o.TLS = &tls.Config{Certificates: []tls.Certificate{a.issue("adapter")}, ClientCAs: a.pool, ClientAuth: tls.RequireAndVerifyClientCert}
	o.Roles = server.Roles{Operate: []string{"meshery-filters://role/operate", "spiffe://example.org/ns/*/sa/meshery", "operators-*"},
		Read: []string{"meshery-filters://role/read", "auditor"}}
}

const reflectionMethod = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"

// outcome is what a call of the method ends with; of a stream, what it ends with before anything is received.
func (f *fixture) outcome(t *testing.T, conn *grpc.ClientConn, method string) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	s, err := conn.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true, ClientStreams: true}, method)
	if err != nil {
		t.Fatal(err)
	}
	request := raw{}
	if method == reflectionMethod {
		request = text(7, "") // list_services
	}
	if err := s.SendMsg(&request); err != nil && !errors.Is(err, io.EOF) {
		t.Fatal(err)
	}
	if err := s.CloseSend(); err != nil {
		t.Fatal(err)
	}
	if method == meshService+"StreamEvents" {
		if _, err := s.Header(); err == nil {
			emit(t, f.hub, event.Event{Operation: "op", Sequence: 1, Summary: "something happened"})
		}
	}
	var resp raw
	return s.RecvMsg(&resp)
}

func TestACertificateMayDoWhatItsRoleAllows(t *testing.T) {
	a := newAuthority(t)
	f := start(t, a.serving)
	f.SetReady(true)
	raw := grpc.WithDefaultCallOptions(grpc.ForceCodec(rawCodec{}))
	reads := []string{meshService + "MeshName", meshService + "MeshVersions", meshService + "ComponentInfo", meshService + "SupportedOperations",
		meshService + "StreamEvents", filterService + "List", filterService + "Plan", filterService + "History", filterService + "Watch", reflectionMethod}
	operates := []string{meshService + "ApplyOperation", meshService + "ProcessOAM", meshService + "Provision", meshService + "CreateMeshInstance"}
	for _, c := range []struct {
		why           string
		cert          tls.Certificate
		read, operate bool
	}{
		{"the URI name of the role operate", a.issue("someone", "meshery-filters://role/operate"), true, true},
		{"a URI name that a pattern is of", a.issue("", "spiffe://example.org/ns/mesh/sa/meshery"), true, true},
		{"a common name that a pattern is of", a.issue("operators-berlin"), true, true},
		{"one role of several names", a.issue("x", "https://example.org/", "meshery-filters://role/read", "meshery-filters://role/operate"), true, true},
		{"the URI name of the role read", a.issue("someone", "meshery-filters://role/read"), true, false},
		{"a common name of the role read", a.issue("auditor"), true, false},
		{"a group of proxies", a.issue("edge-1", "meshery-filters://group/edge"), false, false},
		{"no name of a role", a.issue("someone"), false, false},
		{"a pattern as its name", a.issue("x", "meshery-filters://role/*"), false, false},
		{"more than the pattern's end", a.issue("x", "spiffe://example.org/ns/mesh/sa/meshery/more"), false, false},
		{"a role's URI name as its common name", a.issue("meshery-filters://role/operate"), false, false},
		{"a common name's pattern as a URI name", a.issue("x", "operators-berlin"), false, false},
	} {
		conn := a.dial(f.addr, c.cert, raw)
		check := func(methods []string, allowed bool, role string) {
			for _, m := range methods {
				err := f.outcome(t, conn, m)
				if denied := status.Code(err) == codes.PermissionDenied; denied == allowed {
					t.Errorf("%s: %s: %v", c.why, m, err)
				} else if denied && (!strings.Contains(err.Error(), problem.RoleMissing.Code) || !strings.Contains(err.Error(), "needs the role "+role) ||
					!strings.Contains(err.Error(), "meshery-filters://role/operate")) {
					t.Errorf("%s: %s does not say which role is missing and how to get it: %v", c.why, m, err)
				}
			}
		}
		check(reads, c.read, "read")
		check(operates, c.operate, "operate")
		h, err := healthpb.NewHealthClient(a.dial(f.addr, c.cert)).Check(limited(t), &healthpb.HealthCheckRequest{})
		if err != nil || h.GetStatus() != healthpb.HealthCheckResponse_SERVING {
			t.Errorf("%s: health: %v, %v", c.why, h, err)
		}
	}
	if len(f.ops.seen) == 0 {
		t.Error("nothing came through at all")
	}
}

func TestAPlanSaysWhetherItsCallerMayOnlyLook(t *testing.T) {
	a := newAuthority(t)
	f := start(t, a.serving)
	raw := grpc.WithDefaultCallOptions(grpc.ForceCodec(rawCodec{}))
	for name, reader := range map[string]bool{"auditor": true, "operators-berlin": false} {
		mustCall(t, a.dial(f.addr, a.issue(name), raw), filterService+"Plan", text(1, "apply_filter"))
		if got := f.ops.last(t).Caller.Reader; got != reader {
			t.Errorf("%s: %v", name, got)
		}
	}
}

// refusals are what the audit log is told.
type refusals struct {
	mu   sync.Mutex
	seen []audit.Entry
}

func (r *refusals) Count(e audit.Entry) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.seen = append(r.seen, e)
}

func TestARefusedCallIsRefusedWhateverItsDeadlineAndWrittenDown(t *testing.T) {
	a := newAuthority(t)
	told := &refusals{}
	f := start(t, a.serving, func(o *server.Options) { o.Audit = told })
	conn := a.dial(f.addr, a.issue("nobody"), grpc.WithDefaultCallOptions(grpc.ForceCodec(rawCodec{})))
	for _, deadline := range []time.Duration{0, patience, 1000 * time.Hour} {
		ctx, cancel := context.Background(), func() {}
		if deadline > 0 {
			ctx, cancel = context.WithTimeout(ctx, deadline)
		}
		var resp raw
		err := conn.Invoke(ctx, meshService+"ApplyOperation", &raw{}, &resp)
		cancel()
		if status.Code(err) != codes.PermissionDenied {
			t.Errorf("with a deadline in %s: %v", deadline, err)
			continue
		}
		var info *errdetails.ErrorInfo
		for _, d := range status.Convert(err).Details() {
			if i, ok := d.(*errdetails.ErrorInfo); ok {
				info = i
			}
		}
		if info.GetReason() != problem.RoleMissing.Code {
			t.Errorf("with a deadline in %s the code is %q", deadline, info.GetReason())
		}
	}
	if n := len(f.ops.seen); n > 0 {
		t.Errorf("%d refused calls came through", n)
	}
	if len(told.seen) != 3 {
		t.Fatalf("%d refusals are written down", len(told.seen))
	}
	for _, e := range told.seen {
		if e.Result != audit.Refused || e.Code != problem.RoleMissing.Code || e.Call != meshService+"ApplyOperation" || !e.Who.Verified ||
			e.Who.Certificate != "CN=nobody" || !strings.HasPrefix(e.Who.Remote, "127.0.0.1:") {
			t.Errorf("written down is %+v", e)
		}
	}
}

// elsewhere gives connections another remote address than the one they have.
type elsewhere struct {
	net.Listener
	addr net.Addr
}

type distant struct {
	net.Conn
	addr net.Addr
}

func (e elsewhere) Accept() (net.Conn, error) {
	c, err := e.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return distant{c, e.addr}, nil
}

func (d distant) RemoteAddr() net.Addr { return d.addr }

func TestARequestSaysWhoAsks(t *testing.T) {
	far := &net.TCPAddr{IP: net.IPv4(192, 0, 2, 7), Port: 4242}
	a := newAuthority(t)
	cert := a.issue("operators-berlin")
	for _, c := range []struct {
		why         string
		tls         bool
		from        net.Addr
		certificate string
		foreign     bool
	}{
		{"on this host", false, nil, "", false},
		{"on this host, over IPv6", false, &net.TCPAddr{IP: net.IPv6loopback, Port: 1}, "", false},
		{"on another host", false, far, "", true},
		{"on another host, with a certificate", true, far, "CN=operators-berlin", false},
		{"from who knows where", false, &net.UnixAddr{Name: "@"}, "", true},
	} {
		f := startFrom(t, c.from, func(o *server.Options) {
			if c.tls {
				a.serving(o)
			}
		})
		conn := f.conn
		if c.tls {
			conn = a.dial(f.addr, cert, grpc.WithDefaultCallOptions(grpc.ForceCodec(rawCodec{})))
		}
		mustCall(t, conn, meshService+"ApplyOperation", text(1, "apply_filter"), text(3, "me"), text(6, "x"))
		applied := f.ops.last(t).Caller
		mustCall(t, conn, filterService+"Plan", text(1, "apply_filter"))
		for call, got := range map[string]any{"ApplyOperation": applied, "Plan": f.ops.last(t).Caller} {
			if got != any(applied) {
				t.Errorf("%s: %s tells %+v", c.why, call, got)
			}
		}
		if applied.Certificate != c.certificate || applied.Foreign != c.foreign || c.from != nil && applied.Remote != c.from.String() ||
			applied.Remote == "" || (applied.Serial != "") != c.tls {
			t.Errorf("%s: %+v", c.why, applied)
		}
	}
}
