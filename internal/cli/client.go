package cli

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"strings"
	"time"

	"github.com/layer5io/meshery-adapter-library/meshes"
	"github.com/spf13/cobra"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"

	"github.com/meshery/meshery-filters/internal/problem"
	"github.com/meshery/meshery-filters/internal/server/filterspb"
)

const (
	defaultServer = "127.0.0.1:10014"
	envServer     = "MESHERY_FILTERS_SERVER"

	dialTimeout = 5 * time.Second
	callTimeout = 30 * time.Second
	// planTimeout leaves room for fetching a module.
	planTimeout = 2 * time.Minute
	maxReply    = 32 << 20 // bytes
	maxPEM      = 1 << 20  // bytes of a file with certificates or a key
)

// address is where the adapter is, as flags give it.
type address struct {
	server        string
	ca, cert, key string // files
}

// adapterFlags gives a command the flags that say where the adapter is.
func (a *app) adapterFlags(cmd *cobra.Command) {
	server := a.env(envServer)
	if server == "" {
		server = defaultServer
	}
	f := cmd.Flags()
	f.StringVar(&a.adapter.server, "server", server, "gRPC `address` of the adapter; $"+envServer+" sets the default")
	f.StringVar(&a.adapter.ca, "tls-ca", "", "`file` with the certificates that the adapter's must be signed by; turns TLS on")
	f.StringVar(&a.adapter.cert, "tls-cert", "", "`file` with the client certificate; turns TLS on")
	f.StringVar(&a.adapter.key, "tls-key", "", "`file` with the client certificate's key")
}

func (a *app) namespaceFlag(cmd *cobra.Command, of string) {
	cmd.Flags().StringVarP(&a.namespace, "namespace", "n", "", of)
}

// client is a connection to the adapter. close must be called.
type client struct {
	conn    *grpc.ClientConn
	server  string
	meshes  meshes.MeshServiceClient
	filters filterspb.FilterServiceClient
}

func (c *client) close() { _ = c.conn.Close() }

// dial makes a client. It does not connect yet: the first call does.
func (a *app) dial() (*client, error) {
	if _, _, err := net.SplitHostPort(a.adapter.server); err != nil {
		return nil, usage("--server or $%s: %q is not HOST:PORT", envServer, a.adapter.server)
	}
	creds, err := a.adapter.credentials()
	if err != nil {
		return nil, err
	}
	conn, err := grpc.NewClient("passthrough:///"+a.adapter.server,
		grpc.WithTransportCredentials(creds),
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: backoff.DefaultConfig, MinConnectTimeout: dialTimeout}),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxReply)),
		// An adapter whose machine is gone says nothing; without this a wait for its events would never end.
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 30 * time.Second, Timeout: 10 * time.Second}),
	)
	if err != nil {
		return nil, usage("--server %q is not an address: %w", a.adapter.server, err)
	}
	return &client{conn, a.adapter.server, meshes.NewMeshServiceClient(conn), filterspb.NewFilterServiceClient(conn)}, nil
}

func (d address) credentials() (credentials.TransportCredentials, error) {
	if d.ca == "" && d.cert == "" && d.key == "" {
		return insecure.NewCredentials(), nil
	}
	if (d.cert == "") != (d.key == "") {
		return nil, usage("--tls-cert and --tls-key go together")
	}
	config := &tls.Config{MinVersion: tls.VersionTLS12}
	if d.ca != "" {
		pem, err := readFile(d.ca, maxPEM)
		if err != nil {
			return nil, usage("--tls-ca: %w", err)
		}
		config.RootCAs = x509.NewCertPool()
		if !config.RootCAs.AppendCertsFromPEM(pem) {
			return nil, usage("--tls-ca: %s holds no certificate in PEM form", d.ca)
		}
	}
	if d.cert != "" {
		cert, err := readFile(d.cert, maxPEM)
		if err != nil {
			return nil, usage("--tls-cert: %w", err)
		}
		key, err := readFile(d.key, maxPEM)
		if err != nil {
			return nil, usage("--tls-key: %w", err)
		}
		pair, err := tls.X509KeyPair(cert, key)
		if err != nil {
			return nil, usage("--tls-cert and --tls-key: %w", err)
		}
		config.Certificates = []tls.Certificate{pair}
	}
	return credentials.NewTLS(config), nil
}

// call makes one call that is no stream, within a limit.
func call[Req, Resp any](ctx context.Context, c *client, limit time.Duration, f func(context.Context, Req, ...grpc.CallOption) (Resp, error), req Req) (Resp, error) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	resp, err := f(ctx, req)
	return resp, c.failed(ctx, err)
}

// failed turns what a call ended with into an error that says what happened: the adapter's own problem, or that there
// is no adapter.
func (c *client) failed(ctx context.Context, err error) error {
	if err == nil {
		return nil
	}
	if ctx.Err() != nil && errors.Is(context.Cause(ctx), context.Canceled) {
		return context.Canceled
	}
	st, ok := status.FromError(err)
	if !ok {
		return err
	}
	if p := toProblem(st); p != nil {
		return p
	}
	switch st.Code() {
	case codes.Unavailable:
		return exitError{fmt.Errorf("the adapter at %s does not answer\n%s\nStart one with `meshery-filters serve`, or name another with --server or $%s; one with TLS needs the --tls flags.",
			c.server, st.Message(), envServer), exitUnreachable}
	case codes.DeadlineExceeded:
		return exitError{fmt.Errorf("the adapter at %s did not answer in time", c.server), exitTimeout}
	case codes.Unimplemented:
		return exitError{fmt.Errorf("what answers at %s is no adapter of meshery-filters, or another version of it\n%s", c.server, st.Message()), exitFailed}
	}
	return exitError{fmt.Errorf("the adapter at %s refused the call (%s)\n%s", c.server, st.Code(), st.Message()), exitFailed}
}

// toProblem rebuilds a problem from its status; nil when the status is of none. The mistakes of a document are lines of
// its details, so that the status's list of them is not needed.
func toProblem(st *status.Status) *problem.Problem {
	var info *errdetails.ErrorInfo
	for _, d := range st.Details() {
		if i, ok := d.(*errdetails.ErrorInfo); ok {
			info = i
		}
	}
	if info == nil || !strings.HasPrefix(info.GetReason(), "meshery-filters-") {
		return nil
	}
	remedy := info.GetMetadata()["remedy"]
	text := strings.TrimSuffix(st.Message(), fmt.Sprintf(" [%s] Remedy: %s", info.GetReason(), remedy))
	kind := kindOf(info.GetReason())
	if kind == nil { // of a newer adapter
		summary, details, _ := strings.Cut(text, ": ")
		kind = &problem.Kind{Code: info.GetReason(), Status: st.Code(), Summary: summary, Cause: info.GetMetadata()["cause"], Remedy: remedy}
		return &problem.Problem{Kind: kind, Details: details}
	}
	return &problem.Problem{Kind: kind, Details: strings.TrimPrefix(strings.TrimPrefix(text, kind.Summary), ": ")}
}

// kindOf finds a row of the table by its code; nil when there is none.
func kindOf(code string) *problem.Kind {
	for _, k := range problem.All() {
		if k.Code == code {
			return k
		}
	}
	return nil
}
