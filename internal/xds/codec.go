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
// connection is noticed within a minute. A stream's headers, which are held as long as it is open, are small.
func ServerOptions() []grpc.ServerOption {
	return []grpc.ServerOption{
		grpc.ForceServerCodecV2(codec{encoding.GetCodecV2("proto")}),
		grpc.MaxHeaderListSize(64 << 10),
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: 30 * time.Second, Timeout: 20 * time.Second}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 5 * time.Second, PermitWithoutStream: true}),
	}
}

// message is a discovery response and the resources that it carries, in pieces.
type message struct {
	response  *discovery.DiscoveryResponse
	resources []pieces
}

// codec is gRPC's own for protobuf, except that a message is put together from a head and the resources' bytes where they
// lie, and not copied.
type codec struct{ encoding.CodecV2 }

func (c codec) Marshal(v any) (mem.BufferSlice, error) {
	m, ok := v.(*message)
	if !ok {
		return c.CodecV2.Marshal(v)
	}
	out, err := c.CodecV2.Marshal(m.response)
	if err != nil {
		return nil, err
	}
	for _, r := range m.resources {
		size := r.size()
		head := protowire.AppendTag(nil, 2, protowire.BytesType)
		head = protowire.AppendVarint(head, uint64(protowire.SizeTag(1)+protowire.SizeBytes(len(r.typeURL))+protowire.SizeTag(2)+protowire.SizeBytes(size)))
		head = protowire.AppendString(protowire.AppendTag(head, 1, protowire.BytesType), r.typeURL)
		head = protowire.AppendVarint(protowire.AppendTag(head, 2, protowire.BytesType), uint64(size))
		out = append(out, mem.SliceBuffer(head))
		for _, v := range r.value {
			out = append(out, mem.SliceBuffer(*v))
		}
	}
	return out, nil
}
