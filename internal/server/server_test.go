package server_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"math/big"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	reflectionpb "google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/descriptorpb"

	"github.com/meshery/meshery-filters/internal/operation"
	"github.com/meshery/meshery-filters/internal/problem"
	"github.com/meshery/meshery-filters/internal/server"
)

// plain is a connection that speaks through generated code, for services that are grpc's own.
func plain(t *testing.T, addr string) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient(addr, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

func TestHealthFollowsReadiness(t *testing.T) {
	f := start(t)
	health := healthpb.NewHealthClient(plain(t, f.addr))
	check := func(want healthpb.HealthCheckResponse_ServingStatus) {
		t.Helper()
		for _, service := range []string{"", "meshes.MeshService", "meshery.filters.v1.FilterService"} {
			got, err := health.Check(limited(t), &healthpb.HealthCheckRequest{Service: service})
			if err != nil || got.GetStatus() != want {
				t.Errorf("service %q: %v, %v, want %v", service, got.GetStatus(), err, want)
			}
		}
	}
	check(healthpb.HealthCheckResponse_NOT_SERVING)
	f.SetReady(true)
	check(healthpb.HealthCheckResponse_SERVING)
	f.SetReady(false)
	check(healthpb.HealthCheckResponse_NOT_SERVING)
}

func TestShutdownLetsCallsFinishAndEndsStreamsAtOnce(t *testing.T) {
	f := start(t)
	f.SetReady(true)
	running, finish := make(chan struct{}), make(chan struct{})
	f.ops.submit = func(ctx context.Context, r operation.Request) (string, error) {
		close(running)
		select {
		case <-finish:
			return r.ID, nil
		case <-ctx.Done():
			return "", ctx.Err()
		}
	}
	answered := make(chan error, 1)
	go func() {
		_, err := call(t, f.conn, meshService+"ApplyOperation", text(6, "x"))
		answered <- err
	}()
	<-running
	events := follow(t, f.conn, meshService+"StreamEvents")
	watch := follow(t, f.conn, filterService+"Watch")
	health, err := healthpb.NewHealthClient(plain(t, f.addr)).Watch(limited(t), &healthpb.HealthCheckRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if got, err := health.Recv(); err != nil || got.GetStatus() != healthpb.HealthCheckResponse_SERVING {
		t.Fatalf("health is %v, %v", got, err)
	}

	f.stop()
	for name, s := range map[string]stream{"StreamEvents": events, "Watch": watch} {
		err := s.fails(t)
		if status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), problem.ShuttingDown.Code) {
			t.Errorf("%s ended with %v, want %s", name, err, problem.ShuttingDown.Code)
		}
	}
	for {
		got, err := health.Recv()
		if err == nil && got.GetStatus() == healthpb.HealthCheckResponse_NOT_SERVING {
			continue
		}
		if status.Code(err) != codes.Unavailable {
			t.Errorf("the health watch ended with %v, %v", got, err)
		}
		break
	}
	until(t, "nothing new is accepted", func() bool {
		c, err := net.Dial("tcp", f.addr)
		if err == nil {
			c.Close()
		}
		return err != nil
	})
	select {
	case err := <-answered:
		t.Fatalf("the running call ended early: %v", err)
	case err := <-f.stopped:
		t.Fatalf("Serve returned %v while a call was running", err)
	default:
	}
	close(finish)
	if err := <-answered; err != nil {
		t.Errorf("the running call: %v", err)
	}
	if err := f.end(t); err != nil {
		t.Errorf("Serve: %v", err)
	}
}

func TestShutdownCutsOffWhatDoesNotFinishInTime(t *testing.T) {
	f := start(t, func(o *server.Options) { o.ShutdownTimeout = 50 * time.Millisecond })
	running := make(chan struct{})
	f.ops.submit = func(ctx context.Context, _ operation.Request) (string, error) {
		close(running)
		<-ctx.Done()
		return "", ctx.Err()
	}
	answered := make(chan error, 1)
	go func() {
		_, err := call(t, f.conn, meshService+"ApplyOperation")
		answered <- err
	}()
	<-running
	// A client that never says another word holds nothing up either.
	idle, err := reflectionpb.NewServerReflectionClient(plain(t, f.addr)).ServerReflectionInfo(limited(t))
	if err != nil {
		t.Fatal(err)
	}
	f.stop()
	if err := f.end(t); err != nil {
		t.Errorf("Serve: %v", err)
	}
	if err := <-answered; err == nil {
		t.Error("the call that did not finish succeeded")
	}
	if _, err := idle.Recv(); err == nil {
		t.Error("the idle stream goes on")
	}
}

func TestServeReportsAListenerThatBreaks(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
	f := start(t)
	if err := server.New(f.Options).Serve(t.Context(), l); err == nil {
		t.Error("Serve on a closed listener returned no error")
	}
}

func TestReflectionDescribesEveryCallThatIsServed(t *testing.T) {
	f := start(t)
	stream, err := reflectionpb.NewServerReflectionClient(plain(t, f.addr)).ServerReflectionInfo(limited(t))
	if err != nil {
		t.Fatal(err)
	}
	ask := func(r *reflectionpb.ServerReflectionRequest) *reflectionpb.ServerReflectionResponse {
		t.Helper()
		if err := stream.Send(r); err != nil {
			t.Fatal(err)
		}
		resp, err := stream.Recv()
		if err != nil {
			t.Fatal(err)
		}
		if e := resp.GetErrorResponse(); e != nil {
			t.Fatalf("%v: %v", r, e)
		}
		return resp
	}
	var services []string
	for _, s := range ask(&reflectionpb.ServerReflectionRequest{MessageRequest: &reflectionpb.ServerReflectionRequest_ListServices{}}).GetListServicesResponse().GetService() {
		services = append(services, s.GetName())
	}
	want := []string{"grpc.health.v1.Health", "grpc.reflection.v1.ServerReflection", "grpc.reflection.v1alpha.ServerReflection",
		"meshery.filters.v1.FilterService", "meshes.MeshService"}
	if slices.Sort(services); !slices.Equal(services, want) {
		t.Errorf("services %v, want %v", services, want)
	}
	described := map[string]string{} // by path of the call, its request's full name
	for _, service := range []string{"meshes.MeshService", "meshery.filters.v1.FilterService"} {
		resp := ask(&reflectionpb.ServerReflectionRequest{MessageRequest: &reflectionpb.ServerReflectionRequest_FileContainingSymbol{FileContainingSymbol: service}})
		for _, data := range resp.GetFileDescriptorResponse().GetFileDescriptorProto() {
			file := &descriptorpb.FileDescriptorProto{}
			if err := proto.Unmarshal(data, file); err != nil {
				t.Fatal(err)
			}
			for _, s := range file.GetService() {
				for _, m := range s.GetMethod() {
					described["/"+file.GetPackage()+"."+s.GetName()+"/"+m.GetName()] = strings.TrimPrefix(m.GetInputType(), ".")
				}
			}
		}
	}
	for _, call := range everyCall {
		request, ok := described[call]
		if !ok {
			t.Errorf("%s is not described", call)
			continue
		}
		ask(&reflectionpb.ServerReflectionRequest{MessageRequest: &reflectionpb.ServerReflectionRequest_FileContainingSymbol{FileContainingSymbol: request}})
	}
	if len(described) != len(everyCall) {
		t.Errorf("%d calls are described, want %d: %v", len(described), len(everyCall), described)
	}
	if err := stream.CloseSend(); err != nil {
		t.Fatal(err)
	}
}

func TestWithTLSOnlyAClientWithACertificateIsServed(t *testing.T) {
	cert, pool := certificate(t)
	f := start(t, func(o *server.Options) {
		o.TLS = &tls.Config{Certificates: []tls.Certificate{cert}, ClientCAs: pool, ClientAuth: tls.RequireAndVerifyClientCert}
		o.Roles = server.Roles{Read: []string{"test"}}
	})
	for reason, c := range map[string]struct {
		credentials credentials.TransportCredentials
		want        codes.Code
	}{
		"with a certificate":    {credentials.NewTLS(&tls.Config{RootCAs: pool, Certificates: []tls.Certificate{cert}}), codes.OK},
		"without a certificate": {credentials.NewTLS(&tls.Config{RootCAs: pool}), codes.Unavailable},
		"in clear":              {insecure.NewCredentials(), codes.Unavailable},
	} {
		conn, err := grpc.NewClient(f.addr, grpc.WithTransportCredentials(c.credentials), grpc.WithDefaultCallOptions(grpc.ForceCodec(rawCodec{})))
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		if _, err := call(t, conn, meshService+"MeshName"); status.Code(err) != c.want {
			t.Errorf("%s: %v, want %v", reason, err, c.want)
		}
	}
}

// certificate makes one that signs itself, for servers and clients on loopback.
func certificate(t *testing.T) (tls.Certificate, *x509.CertPool) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AddCert(leaf)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, pool
}
