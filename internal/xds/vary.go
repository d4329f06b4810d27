package xds

import (
	"time"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	filterchain "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/filter_chain/v3"
	httpwasm "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/wasm/v3"
	wasm "github.com/envoyproxy/go-control-plane/envoy/extensions/wasm/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"
)

// reloadBase is how long Envoy backs off before it reloads a crashed VM, unless it is told otherwise.
const reloadBase = time.Second

// vary returns the resources in other bytes, which depend on salt and mean the same to a proxy: Envoy's own default of
// the reload backoff is written out in the first filter, with salt as nanoseconds that Envoy does not count. What is no
// chain of Wasm filters stays as it is.
func vary(resources []*anypb.Any, salt uint32) []*anypb.Any {
	if len(resources) != 1 {
		return resources
	}
	var slot core.TypedExtensionConfig
	var chain filterchain.FilterChainConfig
	var filter httpwasm.Wasm
	if resources[0].UnmarshalTo(&slot) != nil || slot.GetTypedConfig().UnmarshalTo(&chain) != nil {
		return resources
	}
	filters := chain.GetDefaultFilterChain().GetFilters()
	if len(filters) == 0 || filters[0].GetTypedConfig().UnmarshalTo(&filter) != nil || filter.GetConfig().GetReloadConfig() != nil {
		return resources
	}
	filter.Config.ReloadConfig = &wasm.ReloadConfig{Backoff: &core.BackoffStrategy{
		BaseInterval: durationpb.New(reloadBase + time.Duration(salt%999_999+1))}}
	varied := new(anypb.Any)
	o := proto.MarshalOptions{Deterministic: true}
	if anypb.MarshalFrom(filters[0].TypedConfig, &filter, o) != nil || anypb.MarshalFrom(slot.TypedConfig, &chain, o) != nil ||
		anypb.MarshalFrom(varied, &slot, o) != nil {
		return resources
	}
	return []*anypb.Any{varied}
}
