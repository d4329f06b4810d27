package xds

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"unicode"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	extension "github.com/envoyproxy/go-control-plane/envoy/service/extension/v3"
	"github.com/envoyproxy/go-control-plane/pkg/cache/v3"
	"github.com/envoyproxy/go-control-plane/pkg/log"
	"github.com/envoyproxy/go-control-plane/pkg/resource/v3"
	"github.com/envoyproxy/go-control-plane/pkg/server/sotw/v3"
	"github.com/envoyproxy/go-control-plane/pkg/server/stream/v3"
	"golang.org/x/time/rate"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/meshery/meshery-filters/internal/filter"
	"github.com/meshery/meshery-filters/internal/limit"
	"github.com/meshery/meshery-filters/internal/plan"
)

// What a node may ask for and say about itself; Envoy stays far below.
const (
	maxNodeID   = 253      // bytes
	maxMetadata = 64 << 10 // bytes
	maxNames    = 100      // resource names in a request
	maxTypes    = 20       // type URLs on a stream
	maxText     = 1 << 10  // bytes of a type URL, of a version and of a nonce
)

var (
	errDelta = status.Error(codes.Unimplemented, "incremental xDS is not offered: use api_type GRPC (state of the world)")
	errFetch = status.Error(codes.Unimplemented, "polling is not offered: use api_type GRPC")
)

// service is what gRPC calls.
type service struct{ b *Backend }

var (
	_ discovery.AggregatedDiscoveryServiceServer      = service{}
	_ extension.ExtensionConfigDiscoveryServiceServer = service{}
)

func (s service) StreamAggregatedResources(str discovery.AggregatedDiscoveryService_StreamAggregatedResourcesServer) error {
	return s.b.serve(str, resource.AnyType)
}

func (s service) DeltaAggregatedResources(discovery.AggregatedDiscoveryService_DeltaAggregatedResourcesServer) error {
	return errDelta
}

func (s service) StreamExtensionConfigs(str extension.ExtensionConfigDiscoveryService_StreamExtensionConfigsServer) error {
	return s.b.serve(str, resource.ExtensionConfigType)
}

func (s service) DeltaExtensionConfigs(extension.ExtensionConfigDiscoveryService_DeltaExtensionConfigsServer) error {
	return errDelta
}

func (s service) FetchExtensionConfigs(context.Context, *discovery.DiscoveryRequest) (*discovery.DiscoveryResponse, error) {
	return nil, errFetch
}

// extensionConfigs is the service of extension configurations, where polling is a stream, too: a call that is none would wait
// for its request, which may never come, outside of all limits.
func extensionConfigs() *grpc.ServiceDesc {
	d := extension.ExtensionConfigDiscoveryService_ServiceDesc
	for _, m := range d.Methods {
		d.Streams = append(slices.Clone(d.Streams), grpc.StreamDesc{StreamName: m.MethodName, ClientStreams: true,
			Handler: func(any, grpc.ServerStream) error { return errFetch }})
	}
	d.Methods = nil
	return &d
}

// serve runs one stream. The protocol is go-control-plane's; a server of its own for each stream ties the library's
// callbacks and watches to the proxy without a table of streams.
func (b *Backend) serve(str stream.Stream, typeURL string) error {
	release, err := b.streams.Take(client(str.Context()))
	if err != nil {
		return b.tooMuch(err)
	}
	defer release()
	s := &session{b: b, ctx: str.Context(), types: map[string]struct{}{}, requests: limiter(b.opts.ProxyRate)}
	err = sotw.NewServer(b.ctx, s, s, sotw.WithLogger(log.LoggerFuncs{})).StreamHandler(sender{str, s}, typeURL)
	if err == nil && b.ctx.Err() != nil {
		return status.Error(codes.Unavailable, "the adapter is shutting down")
	}
	return err
}

// limiter allows n a second, and twice as many at once; any number when n is 0.
func limiter(n int) *rate.Limiter {
	if n == 0 {
		return rate.NewLimiter(rate.Inf, 0)
	}
	return rate.NewLimiter(rate.Limit(n), 2*n)
}

// tooMuch ends a stream that goes beyond a bound. Envoy connects again, a little later each time.
func (b *Backend) tooMuch(why error) error {
	b.refusals.Do(func() { b.opts.Log.Warn("discovery streams are refused", "reason", why) })
	st := status.New(codes.ResourceExhausted, why.Error()+"; try again later")
	if hinted, err := st.WithDetails(&errdetails.RetryInfo{RetryDelay: durationpb.New(limit.Retry)}); err == nil {
		st = hinted
	}
	return st.Err()
}

// refuse logs that a proxy may not join, unless that has been logged a lot.
func (b *Backend) refuse(args ...any) {
	if b.refused.Allow() {
		b.opts.Log.Info("proxy refused", args...)
	}
}

// sender sends the library's responses with the resources that belong to them.
type sender struct {
	stream.Stream
	session *session
}

func (s sender) Send(r *discovery.DiscoveryResponse) error {
	return s.SendMsg(&message{r, s.session.proxy.carried})
}

// session is one stream: what go-control-plane's server calls for it, always from the stream's goroutine.
type session struct {
	b     *Backend
	ctx   context.Context
	types map[string]struct{}
	group string
	proxy *proxy // nil before the first request
	// requests bounds those of this stream.
	requests *rate.Limiter
}

var (
	_ cache.ConfigWatcher = (*session)(nil)
	_ sotw.Callbacks      = (*session)(nil)
)

func (s *session) OnStreamOpen(context.Context, int64, string) error { return nil }

// OnStreamClosed is called however the stream ended.
func (s *session) OnStreamClosed(int64, *core.Node) {
	s.b.mu.Lock()
	defer s.b.mu.Unlock()
	s.unsubscribe()
}

// OnStreamRequest sees every request, those with a stale nonce included, before CreateWatch.
func (s *session) OnStreamRequest(_ int64, r *discovery.DiscoveryRequest) error {
	switch {
	case !s.requests.Allow():
		return s.b.tooMuch(fmt.Errorf("the proxy sends more than %d discovery requests a second", s.b.opts.ProxyRate))
	case !s.b.requests.Allow():
		return s.b.tooMuch(fmt.Errorf("all proxies together send more than %d discovery requests a second", s.b.opts.Rate))
	}
	for _, text := range []string{r.GetTypeUrl(), r.GetVersionInfo(), r.GetResponseNonce()} {
		if len(text) > maxText {
			return status.Errorf(codes.InvalidArgument, "a type URL, a version and a nonce may each have %d bytes", maxText)
		}
	}
	s.types[r.GetTypeUrl()] = struct{}{}
	if len(r.GetResourceNames()) > maxNames || len(s.types) > maxTypes {
		return status.Errorf(codes.InvalidArgument, "a request may name %d resources and a stream %d types", maxNames, maxTypes)
	}
	if s.proxy == nil {
		if err := s.identify(r.GetNode()); err != nil {
			return err
		}
	}
	defer strip(r)
	if r.GetTypeUrl() != resource.ExtensionConfigType {
		return nil
	}
	s.b.mu.Lock()
	var rejected, late bool
	if g := s.proxy.group; g != nil {
		rejected, late = g.answer(s.proxy, r)
		if rejected {
			s.b.countRejection(g)
		}
	}
	rejection := LateRejection{Version: s.proxy.refused, Proxy: s.proxy.Proxy, Text: s.proxy.text}
	s.b.mu.Unlock()
	if rejected && s.b.rejected.Allow() {
		s.b.opts.Log.Warn("proxy rejected a chain", "group", s.group, "proxy", rejection.Proxy.ID, "version", rejection.Version, "late", late)
	}
	if late && s.b.opts.OnLateRejection != nil && s.b.late.Allow() {
		rejection.Target = filter.Target{Kind: filter.ProxyGroup, Name: s.group}
		s.b.opts.OnLateRejection(rejection)
	}
	return nil
}

// strip lets go of what nobody needs of a request any more. The library holds on to it and to its node, which may be large:
// they would be most of what a proxy costs.
func strip(r *discovery.DiscoveryRequest) {
	needed := &discovery.DiscoveryRequest{TypeUrl: r.GetTypeUrl(), VersionInfo: r.GetVersionInfo(), ResponseNonce: r.GetResponseNonce()}
	if slices.Contains(r.GetResourceNames(), Slot) {
		needed.ResourceNames = []string{Slot}
	}
	proto.Reset(r.GetNode())
	proto.Reset(r)
	proto.Merge(r, needed)
}

// identify reads who the proxy is and which group it belongs to.
func (s *session) identify(n *core.Node) error {
	refuse := func(format string, args ...any) error {
		reason := fmt.Sprintf(format, args...)
		s.b.refuse("reason", reason)
		return status.Error(codes.InvalidArgument, reason)
	}
	id := n.GetId()
	if id == "" || len(id) > maxNodeID || !printable(id) {
		return refuse("node.id must have 1 to %d bytes of printable characters", maxNodeID)
	}
	if size := proto.Size(n.GetMetadata()); size > maxMetadata {
		return refuse("node %s: its metadata has %d bytes, and %d is the limit", id, size, maxMetadata)
	}
	name := n.GetCluster()
	if v, ok := n.GetMetadata().GetFields()[s.b.opts.GroupMetadataKey]; ok {
		name = v.GetStringValue() // empty for another type, and then refused
	} else if name == "" {
		name = defaultGroup
	}
	if !filter.IsGroupName(name) {
		return refuse("node %s: %.200q does not name a proxy group", id, name)
	}
	if s.b.opts.Admit != nil {
		if err := s.b.opts.Admit(s.ctx, name); err != nil {
			s.b.refuse("proxy", id, "group", name, "reason", err)
			return err
		}
	}
	s.group = name
	s.proxy = &proxy{Proxy: plan.Proxy{ID: id, Version: envoyVersion(n)}, nodeID: id}
	return nil
}

// CreateWatch takes the channel that the stream now reads responses from. It is not called for a request with a stale
// nonce, after which the earlier channel stays in use.
func (s *session) CreateWatch(r *cache.Request, _ cache.Subscription, out chan cache.Response) (func(), error) {
	lg := s.b.opts.Log.With("proxy", s.proxy.nodeID, "group", s.group)
	if r.GetTypeUrl() != resource.ExtensionConfigType {
		lg.Debug("nothing is served for this type", "type", r.GetTypeUrl())
		return nil, nil
	}
	s.b.mu.Lock()
	defer s.b.mu.Unlock()
	if !slices.Contains(r.GetResourceNames(), Slot) {
		lg.Debug("nothing is served for these names")
		s.unsubscribe()
		return nil, nil
	}
	s.proxy.out, s.proxy.request = out, r
	if s.proxy.group == nil {
		s.b.group(s.group).join(s.proxy)
		lg.Debug("proxy joined", "version", s.proxy.Version)
	}
	s.proxy.push()
	return nil, nil
}

// CreateDeltaWatch is never called, since the incremental streams are refused.
func (s *session) CreateDeltaWatch(*cache.DeltaRequest, cache.Subscription, chan cache.DeltaResponse) (func(), error) {
	return nil, errDelta
}

// OnStreamResponse is called right before a response goes out, which may no longer be the one that is wanted.
func (s *session) OnStreamResponse(_ context.Context, _ int64, _ *discovery.DiscoveryRequest, r *discovery.DiscoveryResponse) {
	s.b.mu.Lock()
	defer s.b.mu.Unlock()
	p := s.proxy
	p.sent, _ = told(r.GetVersionInfo())
	p.nonce, p.answered = r.GetNonce(), false
	p.push()
}

// unsubscribe must be called with the lock held.
func (s *session) unsubscribe() {
	if s.proxy == nil || s.proxy.group == nil {
		return
	}
	g := s.proxy.group
	g.leave(s.proxy)
	s.b.forget(g)
	s.b.opts.Log.Debug("proxy left", "proxy", s.proxy.nodeID, "group", s.group)
}

// response is one version on its way to one proxy.
type response struct {
	request   *discovery.DiscoveryRequest
	version   *version
	proxy     *proxy
	resources []pieces // the version's, in one form or another
	salt      uint32
}

// GetDiscoveryResponse makes a message of its own for each proxy, because the library writes the nonce into it. The
// resources are not in it; sender adds them where they lie.
func (r *response) GetDiscoveryResponse() (*discovery.DiscoveryResponse, error) {
	r.proxy.carried, r.proxy.salt = r.resources, r.salt
	return &discovery.DiscoveryResponse{
		VersionInfo: r.info(),
		TypeUrl:     resource.ExtensionConfigType,
	}, nil
}

// info is the version as the proxy is told it, with the salt of its bytes: whoever connects again says it, and gets the same
// bytes, of which Envoy makes nothing new.
func (r *response) info() string {
	if r.salt == 0 {
		return r.version.id
	}
	return r.version.id + saltMark + strconv.FormatUint(uint64(r.salt), 36)
}

// saltMark stands between a version and its salt.
const saltMark = "~"

// told reads what info has written; salt is 0 where there is none that could be.
func told(info string) (version string, salt uint32) {
	version, text, _ := strings.Cut(info, saltMark)
	n, err := strconv.ParseUint(text, 36, 32)
	if err != nil {
		n = 0
	}
	return version, uint32(n)
}

func (r *response) GetRequest() *discovery.DiscoveryRequest { return r.request }
func (r *response) GetVersion() (string, error)             { return r.info(), nil }
func (r *response) GetResponseVersion() string              { return r.info() }
func (r *response) GetReturnedResources() map[string]string {
	return map[string]string{Slot: r.info()}
}
func (r *response) GetContext() context.Context { return context.Background() }

func printable(s string) bool {
	for _, r := range s {
		if r == unicode.ReplacementChar || !unicode.IsPrint(r) {
			return false
		}
	}
	return true
}

// envoyVersion reads 1.40.0 from a node, or nothing when it does not say.
func envoyVersion(n *core.Node) string {
	v := n.GetUserAgentBuildVersion().GetVersion()
	if v == nil {
		return plainText(n.GetUserAgentVersion())
	}
	return fmt.Sprintf("%d.%d.%d", v.GetMajorNumber(), v.GetMinorNumber(), v.GetPatch())
}
