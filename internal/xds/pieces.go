package xds

import (
	"bytes"
	"crypto/sha256"
	"runtime"
	"sync"
	"weak"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	filterchain "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/filter_chain/v3"
	httpwasm "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/wasm/v3"
	"google.golang.org/protobuf/types/known/anypb"
)

// pieces is a resource whose serialized bytes lie in several places, so that modules in it are not its own.
type pieces struct {
	typeURL string
	value   []*[]byte // in order
}

func (p pieces) size() (n int) {
	for _, v := range p.value {
		n += len(*v)
	}
	return n
}

// whole puts the resource together.
func (p pieces) whole() *anypb.Any {
	value := make([]byte, 0, p.size())
	for _, v := range p.value {
		value = append(value, *v...)
	}
	return &anypb.Any{TypeUrl: p.typeURL, Value: value}
}

// shelf holds each module once, for all resources that have it and for as long as there are any.
type shelf struct {
	mu      sync.Mutex
	modules map[[sha256.Size]byte]weak.Pointer[[]byte]
}

func (s *shelf) take(module []byte) *[]byte {
	sum := sha256.Sum256(module)
	s.mu.Lock()
	defer s.mu.Unlock()
	if m := s.modules[sum].Value(); m != nil {
		return m
	}
	m := new([]byte)
	*m = bytes.Clone(module)
	if s.modules == nil {
		s.modules = map[[sha256.Size]byte]weak.Pointer[[]byte]{}
	}
	s.modules[sum] = weak.Make(m)
	runtime.AddCleanup(m, s.drop, sum)
	return m
}

// drop forgets a module that nobody has any more, unless somebody has taken it anew.
func (s *shelf) drop(sum [sha256.Size]byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.modules[sum].Value() == nil {
		delete(s.modules, sum)
	}
}

// divide takes the modules out of resources. What is no chain of Wasm filters stays in one piece.
func (s *shelf) divide(resources []*anypb.Any) []pieces {
	all := make([]pieces, len(resources))
	for i, r := range resources {
		p, rest := pieces{typeURL: r.GetTypeUrl()}, r.GetValue()
		for _, m := range modulesOf(r) {
			before, after, found := bytes.Cut(rest, m)
			if !found {
				continue
			}
			own := bytes.Clone(before)
			p.value = append(p.value, &own, s.take(m))
			rest = after
		}
		own := bytes.Clone(rest)
		p.value = append(p.value, &own)
		all[i] = p
	}
	return all
}

func join(all []pieces) []*anypb.Any {
	resources := make([]*anypb.Any, len(all))
	for i, p := range all {
		resources[i] = p.whole()
	}
	return resources
}

// modulesOf lists the modules whose bytes are in a chain, in the order they are serialized in.
func modulesOf(r *anypb.Any) (modules [][]byte) {
	var slot core.TypedExtensionConfig
	var chain filterchain.FilterChainConfig
	if r.UnmarshalTo(&slot) != nil || slot.GetTypedConfig().UnmarshalTo(&chain) != nil {
		return nil
	}
	for _, f := range chain.GetDefaultFilterChain().GetFilters() {
		var w httpwasm.Wasm
		if f.GetTypedConfig().UnmarshalTo(&w) != nil {
			continue
		}
		if m := w.GetConfig().GetVmConfig().GetCode().GetLocal().GetInlineBytes(); len(m) > 0 {
			modules = append(modules, m)
		}
	}
	return modules
}
