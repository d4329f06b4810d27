package main

import (
	"context"
	"fmt"
	"net"
	"time"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/envoyproxy/go-control-plane/pkg/cache/types"
	"github.com/envoyproxy/go-control-plane/pkg/cache/v3"
	"github.com/envoyproxy/go-control-plane/pkg/resource/v3"
	xds "github.com/envoyproxy/go-control-plane/pkg/server/v3"
	"google.golang.org/grpc"
)

// bare is the least control plane that go-control-plane makes: its snapshot cache and its server.
type bare struct {
	cache  cache.SnapshotCache
	listen net.Listener
	server *grpc.Server
	served chan error
	// answers are what Envoys said to versions.
	answers chan answer
}

type answer struct{ version, problem string }

// byCluster gives a group's Envoys the same snapshot.
type byCluster struct{}

func (byCluster) ID(n *core.Node) string { return n.GetCluster() }

func startBare(ctx context.Context) (*bare, error) {
	b := &bare{cache: cache.NewSnapshotCache(true, byCluster{}, nil), server: grpc.NewServer(), served: make(chan error, 1), answers: make(chan answer, 100)}
	discovery.RegisterAggregatedDiscoveryServiceServer(b.server, xds.NewServer(ctx, b.cache, xds.CallbackFuncs{
		StreamRequestFunc: func(_ int64, r *discovery.DiscoveryRequest) error {
			if r.GetResponseNonce() == "" {
				return nil
			}
			select {
			case b.answers <- answer{r.GetVersionInfo(), r.GetErrorDetail().GetMessage()}:
			default: // this cache sends what was rejected again at once, and one rejection is enough
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

func (b *bare) prepare(ctx context.Context, group string) error { return b.put(ctx, group, 0, "") }

// put pushes the resource that the adapter would, and waits for its acknowledgements.
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
