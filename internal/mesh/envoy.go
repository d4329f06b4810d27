package mesh

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"strconv"
	"strings"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	filterchain "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/filter_chain/v3"
	httpwasm "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/wasm/v3"
	wasm "github.com/envoyproxy/go-control-plane/envoy/extensions/wasm/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/meshery/meshery-filters/internal/filter"
	"github.com/meshery/meshery-filters/internal/plan"
	"github.com/meshery/meshery-filters/internal/problem"
)

// Slot is the name of the HTTP filter that an operator puts into an Envoy, and of the resource that fills it.
const Slot = "meshery.filters"

// DefaultGroup is the proxy group of filters that name no target.
const DefaultGroup = "default"

// minEnvoy is the first Envoy with the filter_chain extension, which lets one resource hold a whole chain.
var minEnvoy = [2]int{1, 39}

// Envoy translates for plain Envoys that get their chains from the adapter's own xDS: the whole chain is one resource
// of Envoy's filter_chain extension, so that a request meets either the old chain or the new one, never a mixture.
type Envoy struct{}

var _ Mesh = Envoy{}

// Name is envoy.
func (Envoy) Name() string { return "envoy" }

// OwnRights is true: proxies trust the adapter, whoever asks it.
func (Envoy) OwnRights() bool { return true }

// Complete puts a filter without a target on the default proxy group, and refuses other targets and TCP.
func (Envoy) Complete(f filter.Filter) (filter.Filter, error) {
	var m mistakes
	s := &f.Spec
	s.Mesh = "envoy"
	switch s.Target.Kind {
	case "":
		s.Target = filter.Target{Kind: filter.ProxyGroup, Name: DefaultGroup}
	case filter.ProxyGroup:
		if s.Target.Namespace != "" {
			m.refuse("spec.target.namespace", "groups of proxies stand outside of namespaces", "leave it out")
		}
		if s.Target.Partition != "" {
			m.refuse("spec.target.partition", "groups of proxies have no partitions", "leave it out")
		}
	default:
		m.refuse("spec.target.kind", fmt.Sprintf("plain Envoy has no %s", s.Target.Kind), "use kind ProxyGroup and the group's name")
	}
	if s.Protocol == filter.TCP {
		m.refuse("spec.protocol", "plain Envoy's slot holds http filters only", "use http")
	}
	if d := s.Delivery.Mode; d != filter.DeliverAuto && d != filter.DeliverInline && d != filter.DeliverLocal {
		m.refuse("spec.delivery.mode", fmt.Sprintf("plain Envoy cannot prove a module that is delivered %s", d), "use inline, or leave it out")
	}
	return f, problem.NotSupported.WithFields(f.Key.String(), m)
}

// Reads nothing: there is no cluster.
func (Envoy) Reads(filter.Chain) plan.Reads { return plan.Reads{} }

// Plan makes the one resource that fills the slot.
func (Envoy) Plan(c filter.Chain, w plan.World) (plan.Plan, error) {
	p := plan.Plan{Chain: c, Rollout: filter.RolloutAll}
	for _, px := range w.Proxies {
		if len(c.Filters) > 0 && tooOld(px.Version) {
			return plan.Plan{}, problem.ProxyTooOld.New("proxy %s of %s runs Envoy %s, and chains need %d.%d or later", px.ID, c.Target, px.Version, minEnvoy[0], minEnvoy[1])
		}
	}
	config := &filterchain.FilterChainConfig{}
	for _, f := range c.Filters {
		hf, err := envoyFilter(f, w)
		if err != nil {
			return plan.Plan{}, err
		}
		if config.DefaultFilterChain == nil {
			config.DefaultFilterChain = &filterchain.FilterChain{}
		}
		config.DefaultFilterChain.Filters = append(config.DefaultFilterChain.Filters, hf)
		p.Losses = append(p.Losses, envoyLosses(f)...)
	}
	inner, err := pack(config)
	if err != nil {
		return plan.Plan{}, err
	}
	resource, err := pack(&core.TypedExtensionConfig{Name: Slot, TypedConfig: inner})
	if err != nil {
		return plan.Plan{}, err
	}
	p.Resources = []*anypb.Any{resource}
	sum := sha256.Sum256(resource.Value)
	p.Version = hex.EncodeToString(sum[:8])
	return p, nil
}

func envoyFilter(f filter.Filter, w plan.World) (*core.TypedExtensionConfig, error) {
	s := f.Spec
	code, ok := w.Modules[s.Module.SHA256]
	if !ok {
		return nil, problem.ModuleUnavailable.New("%s: nothing is known of the module with sha256 %s", f.Key, s.Module.SHA256)
	}
	source := &core.DataSource{}
	switch {
	case s.Delivery.Mode == filter.DeliverLocal:
		source.Specifier = &core.DataSource_Filename{Filename: strings.TrimSuffix(s.Delivery.LocalPath, "/") + "/" + s.Module.SHA256 + ".wasm"}
	case code.Path != "":
		source.Specifier = &core.DataSource_Filename{Filename: code.Path}
	default:
		source.Specifier = &core.DataSource_InlineBytes{InlineBytes: code.Inline}
	}
	vm := &wasm.VmConfig{
		VmId:    s.VMID,
		Runtime: "envoy.wasm.runtime.v8",
		Code:    &core.AsyncDataSource{Specifier: &core.AsyncDataSource_Local{Local: source}},
	}
	for _, e := range s.Environment {
		if vm.EnvironmentVariables == nil {
			vm.EnvironmentVariables = &wasm.EnvironmentVariables{}
		}
		if e.Value == nil {
			vm.EnvironmentVariables.HostEnvKeys = append(vm.EnvironmentVariables.HostEnvKeys, e.Name)
			continue
		}
		if vm.EnvironmentVariables.KeyValues == nil {
			vm.EnvironmentVariables.KeyValues = map[string]string{}
		}
		vm.EnvironmentVariables.KeyValues[e.Name] = e.Value.Text()
	}
	config := &wasm.PluginConfig{
		Name:          f.Key.String(),
		RootId:        s.RootID,
		Vm:            &wasm.PluginConfig_VmConfig{VmConfig: vm},
		FailurePolicy: failurePolicies[s.FailurePolicy],
	}
	if !s.Config.IsZero() {
		text, err := pack(wrapperspb.String(s.Config.Text()))
		if err != nil {
			return nil, err
		}
		config.Configuration = text
	}
	typed, err := pack(&httpwasm.Wasm{Config: config})
	if err != nil {
		return nil, err
	}
	return &core.TypedExtensionConfig{Name: f.Key.String(), TypedConfig: typed}, nil
}

var failurePolicies = map[filter.FailurePolicy]wasm.FailurePolicy{
	filter.FailClosed: wasm.FailurePolicy_FAIL_CLOSED,
	filter.FailOpen:   wasm.FailurePolicy_FAIL_OPEN,
	filter.FailReload: wasm.FailurePolicy_FAIL_RELOAD,
}

// envoyLosses lists what the user set and plain Envoy has no word for.
func envoyLosses(f filter.Filter) (losses []plan.Loss) {
	lose := func(set bool, field, reason string) {
		if set {
			losses = append(losses, plan.Loss{Filter: f.Key, Field: field, Reason: reason})
		}
	}
	s := f.Spec
	lose(s.Match.Direction != "", "spec.match.direction", "a proxy's slot stands on one listener and has no direction")
	lose(len(s.Match.Ports) > 0, "spec.match.ports", "a proxy's slot stands where its operator put it, whatever the port")
	lose(s.Before != "", "spec.before", "a proxy's slot stands where its operator put it, and phase and priority order what is in it")
	lose(s.Force, "spec.force", "nobody else owns fields of a proxy's slot")
	return losses
}

// pack marshals deterministically, so that the same chain always has the same version.
func pack(m proto.Message) (*anypb.Any, error) {
	data, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
	if err != nil {
		return nil, fmt.Errorf("marshal %s: %w", m.ProtoReflect().Descriptor().FullName(), err)
	}
	return &anypb.Any{TypeUrl: "type.googleapis.com/" + string(m.ProtoReflect().Descriptor().FullName()), Value: data}, nil
}

// tooOld says whether a version such as 1.38.2 is known to lack what a chain needs. One that cannot be read is let
// through: the proxy itself will refuse.
func tooOld(version string) bool {
	parts := strings.SplitN(version, ".", 3)
	if len(parts) < 2 {
		return false
	}
	major, err1 := strconv.Atoi(parts[0])
	minor, err2 := strconv.Atoi(parts[1])
	return err1 == nil && err2 == nil && (major < minEnvoy[0] || major == minEnvoy[0] && minor < minEnvoy[1])
}
