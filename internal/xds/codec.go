package xds

import (
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/encoding"
	_ "google.golang.org/grpc/encoding/proto" // registers the codec that this one falls back to
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"
)

// ServerOptions are for the grpc.Server that a Backend is registered on: responses share the bytes of their chain, so
// that a chain of megabytes for thousands of proxies is in memory once; and a proxy that vanished without closing its
// connection is noticed within a minute.
func ServerOptions() []grpc.ServerOption {
	return []grpc.ServerOption{
		grpc.ForceServerCodecV2(codec{encoding.GetCodecV2("proto")}),
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: 30 * time.Second, Timeout: 20 * time.Second}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 5 * time.Second, PermitWithoutStream: true}),
	}
}

// codec is gRPC's own for protobuf, except that a discovery response is put together from a head and the resources'
// bytes where they lie, and not copied.
type codec struct{ encoding.CodecV2 }

func (c codec) Marshal(v any) (mem.BufferSlice, error) {
	r, ok := v.(*discovery.DiscoveryResponse)
	if !ok || r.GetCanary() || r.GetControlPlane() != nil || len(r.GetResourceErrors()) > 0 {
		return c.CodecV2.Marshal(v)
	}
	var out mem.BufferSlice
	var head []byte
	text := func(field protowire.Number, s string) {
		if s != "" {
			head = protowire.AppendString(protowire.AppendTag(head, field, protowire.BytesType), s)
		}
	}
	text(1, r.GetVersionInfo())
	text(4, r.GetTypeUrl())
	text(5, r.GetNonce())
	for _, res := range r.GetResources() {
		size := protowire.SizeTag(1) + protowire.SizeBytes(len(res.GetTypeUrl())) +
			protowire.SizeTag(2) + protowire.SizeBytes(len(res.GetValue()))
		head = protowire.AppendVarint(protowire.AppendTag(head, 2, protowire.BytesType), uint64(size))
		head = protowire.AppendString(protowire.AppendTag(head, 1, protowire.BytesType), res.GetTypeUrl())
		head = protowire.AppendVarint(protowire.AppendTag(head, 2, protowire.BytesType), uint64(len(res.GetValue())))
		out = append(out, mem.SliceBuffer(head), mem.SliceBuffer(res.GetValue()))
		head = nil
	}
	if head != nil {
		out = append(out, mem.SliceBuffer(head))
	}
	return out, nil
}
