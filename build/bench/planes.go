package main

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/envoyproxy/go-control-plane/pkg/cache/types"
	"github.com/envoyproxy/go-control-plane/pkg/cache/v3"
	"github.com/envoyproxy/go-control-plane/pkg/resource/v3"
	xds "github.com/envoyproxy/go-control-plane/pkg/server/v3"
	"github.com/layer5io/meshery-adapter-library/meshes"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/meshery/meshery-filters/filters"
	"github.com/meshery/meshery-filters/internal/filter"
	"github.com/meshery/meshery-filters/internal/mesh"
	"github.com/meshery/meshery-filters/internal/plan"
	"github.com/meshery/meshery-filters/internal/server/filterspb"
)

// plane changes what a group of Envoys runs.
type plane interface {
	addr() string // for the Envoys' xDS
	// put makes the limiter with this configuration, or nothing when it is empty, all that the group of n Envoys runs.
	// It returns once the plane knows that they do.
	put(ctx context.Context, group string, n int, config string) error
}

const filterName = "bench"

// document is the limiter as a user applies it; without a configuration it names what to remove.
func document(group, config string) string {
	doc := fmt.Sprintf("apiVersion: %s\nkind: %s\nmetadata: {name: %s}\n", filter.APIVersion, filter.Kind, filterName+"-"+group)
	if config == "" {
		return doc
	}
	return doc + fmt.Sprintf("spec:\n  target: {kind: ProxyGroup, name: %s}\n  module: {builtin: ratelimit}\n  phase: authz\n"+
		"  failurePolicy: reload\n  config: %s\n", group, config)
}

// planOf is what the adapter gives proxies for that document.
func planOf(group, config string) (plan.Plan, error) {
	wasm, ok := filters.Builtin("ratelimit")
	if !ok {
		return plan.Plan{}, errors.New("there is no built-in ratelimit")
	}
	digest := sha256.Sum256(wasm)
	chain := filter.Chain{Mesh: "envoy", Target: filter.Target{Kind: filter.ProxyGroup, Name: group}}
	if config != "" {
		read, err := filter.Read([]byte(document(group, config)), "default")
		if err != nil {
			return plan.Plan{}, err
		}
		f, err := mesh.Envoy{}.Complete(read[0])
		if err != nil {
			return plan.Plan{}, err
		}
		f.Spec.Module.SHA256 = hex.EncodeToString(digest[:])
		chain = chain.With(f)
	}
	return mesh.Envoy{}.Plan(chain, plan.World{Modules: map[string]plan.Code{hex.EncodeToString(digest[:]): {Inline: wasm}}})
}

// adapter is the program as a process of its own.
type adapter struct {
	cmd       *exec.Cmd
	ended     chan error
	conn      *grpc.ClientConn
	addresses struct{ GRPC, XDS, HTTP string }
}

// startAdapter returns once the adapter is ready, and how long that took.
func startAdapter(ctx context.Context, program, state string) (a *adapter, took time.Duration, err error) {
	log, err := os.Create(state + ".log")
	if err != nil {
		return nil, 0, err
	}
	defer log.Close()
	cmd := exec.Command(program, "serve", "--grpc-addr", "127.0.0.1:0", "--xds-addr", "127.0.0.1:0", "--http-addr", "127.0.0.1:0", "--state-dir", state)
	cmd.Env = []string{"HOME=" + os.Getenv("HOME")} // the user's own settings would change the figures
	cmd.Stdout, cmd.Stderr = log, log
	a = &adapter{cmd: cmd, ended: make(chan error, 1)}
	began := time.Now()
	if err := cmd.Start(); err != nil {
		return nil, 0, err
	}
	go func() { a.ended <- cmd.Wait() }()
	err = poll(ctx, func() error {
		data, err := os.ReadFile(filepath.Join(state, "addresses.json"))
		if err != nil {
			return err
		}
		if err := json.Unmarshal(data, &a.addresses); err != nil {
			return err
		}
		status, err := get(a.addresses.HTTP, "/readyz")
		if err == nil && status != http.StatusOK {
			err = fmt.Errorf("/readyz answers %d", status)
		}
		return err
	})
	took = time.Since(began)
	if err == nil {
		a.conn, err = grpc.NewClient("passthrough:///"+a.addresses.GRPC, grpc.WithTransportCredentials(insecure.NewCredentials()))
	}
	if err != nil {
		text, _ := os.ReadFile(log.Name())
		return nil, 0, errors.Join(fmt.Errorf("the adapter does not get ready: %w\n%s", err, lastLines(text, 10)), a.stop())
	}
	return a, took, nil
}

func (a *adapter) pid() int     { return a.cmd.Process.Pid }
func (a *adapter) addr() string { return a.addresses.XDS }

func (a *adapter) stop() error {
	if a.conn != nil {
		a.conn.Close()
	}
	_ = a.cmd.Process.Signal(os.Interrupt)
	select {
	case err := <-a.ended:
		if err != nil {
			return fmt.Errorf("the adapter ended: %w", err)
		}
		return nil
	case <-time.After(20 * time.Second):
		_ = a.cmd.Process.Kill()
		<-a.ended
		return errors.New("the adapter does not stop")
	}
}

// put sends the operation as Meshery does, and follows it to its last event.
func (a *adapter) put(ctx context.Context, group string, _ int, config string) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	operation, id := "apply_filter", "bench-"+rand.Text()
	if config == "" {
		operation = "remove_filter"
	}
	_, err := meshes.NewMeshServiceClient(a.conn).ApplyOperation(ctx,
		&meshes.ApplyRuleRequest{OpName: operation, OperationId: id, CustomBody: document(group, config)})
	if err != nil {
		return err
	}
	stream, err := filterspb.NewFilterServiceClient(a.conn).Watch(ctx, &filterspb.WatchRequest{OperationId: id})
	if err != nil {
		return err
	}
	for {
		r, err := stream.Recv()
		if err != nil {
			return err
		}
		switch e := r.GetEvent(); {
		case e.GetLast() && e.GetType() == filterspb.Event_ERROR:
			return fmt.Errorf("%s failed: %s: %s", operation, e.GetSummary(), e.GetDetails())
		case e.GetLast():
			return nil
		}
	}
}

// bare is the least control plane that go-control-plane makes: its snapshot cache and its server.
type bare struct {
	cache  cache.SnapshotCache
	listen net.Listener
	server *grpc.Server
	served chan error
	// answers are what Envoys said to versions. It holds more than a change of a group brings, and is read after each.
	answers chan answer
}

type answer struct{ version, problem string }

// byCluster gives a group's Envoys the same snapshot.
type byCluster struct{}

func (byCluster) ID(n *core.Node) string { return n.GetCluster() }

func startBare(ctx context.Context) (*bare, error) {
	b := &bare{cache: cache.NewSnapshotCache(true, byCluster{}, nil), server: grpc.NewServer(), served: make(chan error, 1), answers: make(chan answer, 1000)}
	discovery.RegisterAggregatedDiscoveryServiceServer(b.server, xds.NewServer(ctx, b.cache, xds.CallbackFuncs{
		StreamRequestFunc: func(_ int64, r *discovery.DiscoveryRequest) error {
			if r.GetResponseNonce() != "" {
				b.answers <- answer{r.GetVersionInfo(), r.GetErrorDetail().GetMessage()}
			}
			return nil
		}}))
	var err error
	if b.listen, err = net.Listen("tcp", "127.0.0.1:0"); err != nil {
		return nil, err
	}
	go func() { b.served <- b.server.Serve(b.listen) }()
	return b, nil
}

func (b *bare) addr() string { return b.listen.Addr().String() }

func (b *bare) stop() error {
	b.server.Stop()
	return <-b.served
}

func (b *bare) put(ctx context.Context, group string, n int, config string) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	p, err := planOf(group, config)
	if err != nil {
		return err
	}
	r, err := p.Resources[0].UnmarshalNew()
	if err != nil {
		return err
	}
	for len(b.answers) > 0 { // to what Envoys got when they connected
		<-b.answers
	}
	s, err := cache.NewSnapshot(p.Version, map[resource.Type][]types.Resource{resource.ExtensionConfigType: {r}})
	if err != nil {
		return err
	}
	if err := b.cache.SetSnapshot(ctx, group, s); err != nil {
		return err
	}
	for n > 0 {
		select {
		case a := <-b.answers:
			if a.problem != "" {
				return fmt.Errorf("an Envoy says: %s", a.problem)
			}
			if a.version == p.Version {
				n--
			}
		case <-ctx.Done():
			return fmt.Errorf("wait for %d acknowledgements: %w", n, ctx.Err())
		}
	}
	return nil
}
