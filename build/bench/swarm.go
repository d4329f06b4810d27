package main

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	typev3 "github.com/envoyproxy/go-control-plane/envoy/type/v3"
	"github.com/envoyproxy/go-control-plane/pkg/resource/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/encoding"
	_ "google.golang.org/grpc/encoding/proto" // registers the codec that this one falls back to
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"

	"github.com/meshery/meshery-filters/internal/xds"
)

// swarm is simulated proxies that acknowledge whatever they are sent, at once.
type swarm struct {
	cancel  context.CancelFunc
	group   sync.WaitGroup
	conns   []*grpc.ClientConn
	acks    atomic.Int64
	failure atomic.Pointer[error]
}

// perConn is how many proxies share a connection, which costs this machine less than one for each.
const perConn = 250

// startSwarm connects n proxies, the ith to the group that group names.
func startSwarm(ctx context.Context, addr string, n int, group func(i int) string) (*swarm, error) {
	ctx, cancel := context.WithCancel(ctx)
	s := &swarm{cancel: cancel}
	for i := range n {
		if i%perConn == 0 {
			conn, err := grpc.NewClient("passthrough:///"+addr, grpc.WithTransportCredentials(insecure.NewCredentials()),
				grpc.WithDefaultCallOptions(grpc.ForceCodecV2(glance{encoding.GetCodecV2("proto")})))
			if err != nil {
				return nil, errors.Join(err, s.stop())
			}
			s.conns = append(s.conns, conn)
		}
		stream, err := discovery.NewAggregatedDiscoveryServiceClient(s.conns[len(s.conns)-1]).StreamAggregatedResources(ctx)
		if err == nil {
			err = stream.Send(&discovery.DiscoveryRequest{Node: nodeOf(fmt.Sprintf("swarm-%05d", i), group(i)),
				TypeUrl: resource.ExtensionConfigType, ResourceNames: []string{xds.Slot}})
		}
		if err != nil {
			return nil, errors.Join(err, s.stop())
		}
		s.group.Go(func() {
			for {
				m, err := stream.Recv()
				if err == nil {
					err = stream.Send(&discovery.DiscoveryRequest{TypeUrl: resource.ExtensionConfigType, ResourceNames: []string{xds.Slot},
						ResponseNonce: m.GetNonce(), VersionInfo: m.GetVersionInfo()})
				}
				if ctx.Err() != nil {
					return
				}
				if err != nil {
					s.failure.CompareAndSwap(nil, &err)
					return
				}
				s.acks.Add(1)
			}
		})
	}
	return s, nil
}

// acknowledges waits until the proxies together have sent so many acknowledgements.
func (s *swarm) acknowledges(ctx context.Context, n int) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	for s.acks.Load() < int64(n) {
		if err := s.failure.Load(); err != nil {
			return fmt.Errorf("a simulated proxy: %w", *err)
		}
		if err := pause(ctx, time.Millisecond); err != nil {
			return fmt.Errorf("%d of %d acknowledgements: %w", s.acks.Load(), n, err)
		}
	}
	return nil
}

func (s *swarm) stop() error {
	s.cancel()
	s.group.Wait()
	for _, c := range s.conns {
		c.Close()
	}
	if err := s.failure.Load(); err != nil {
		return fmt.Errorf("a simulated proxy: %w", *err)
	}
	return nil
}

// nodeOf is what an Envoy says of itself, in short.
func nodeOf(id, group string) *core.Node {
	return &core.Node{Id: id, Cluster: group, UserAgentName: "envoy", UserAgentVersionType: &core.Node_UserAgentBuildVersion{
		UserAgentBuildVersion: &core.BuildVersion{Version: &typev3.SemanticVersion{MajorNumber: 1, MinorNumber: 40}}}}
}

// glance is gRPC's own codec, except that of a discovery response only what an acknowledgement takes is read: the time
// that this process takes is taken from the adapter.
type glance struct{ encoding.CodecV2 }

func (g glance) Unmarshal(data mem.BufferSlice, v any) error {
	r, ok := v.(*discovery.DiscoveryResponse)
	if !ok {
		return g.CodecV2.Unmarshal(data, v)
	}
	buffer := data.MaterializeToBuffer(mem.DefaultBufferPool())
	defer buffer.Free()
	for b := buffer.ReadOnlyData(); len(b) > 0; {
		number, kind, n := protowire.ConsumeTag(b)
		if n < 0 {
			return protowire.ParseError(n)
		}
		b = b[n:]
		if n = protowire.ConsumeFieldValue(number, kind, b); n < 0 {
			return protowire.ParseError(n)
		}
		switch text, _ := protowire.ConsumeBytes(b[:n]); number {
		case 1:
			r.VersionInfo = string(text)
		case 5:
			r.Nonce = string(text)
		}
		b = b[n:]
	}
	return nil
}
