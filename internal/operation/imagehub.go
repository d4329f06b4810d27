package operation

import (
	"cmp"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"k8s.io/apimachinery/pkg/runtime/schema"

	"github.com/meshery/meshery-filters/filters"
	"github.com/meshery/meshery-filters/internal/filter"
	"github.com/meshery/meshery-filters/internal/mesh"
	"github.com/meshery/meshery-filters/internal/plan"
	"github.com/meshery/meshery-filters/internal/problem"
	"github.com/meshery/meshery-filters/templates"
)

// ImageHubIn is Image Hub as clusters get it.
type ImageHubIn struct {
	templates.ImageHub
	// Gateway says which gateways it stands behind. Default: on Istio its own where they are served, else those of the Gateway
	// API, as on Consul.
	Gateway HubGateway
	// Patience bounds a deployment: its images have to be pulled. Default: 3 minutes.
	Patience time.Duration
}

// HubGateway is a family of gateways.
type HubGateway string

const (
	HubIstio      HubGateway = "istio"
	HubGatewayAPI HubGateway = "gateway-api"
)

// hubMeshes are those whose clusters Image Hub runs in. A cluster that shows several has it on the first.
var hubMeshes = []string{mesh.Istio{}.Name(), mesh.Consul{}.Name()}

// hubMesh picks one of those that a cluster shows. Default: the first, for clusters with no more of it than gateways.
func hubMesh(seen []string) string {
	for _, m := range hubMeshes {
		if slices.Contains(seen, m) {
			return m
		}
	}
	return hubMeshes[0]
}

// hubToken is what Image Hub's tokens are signed with, as the limiter's documents refer to it: in a cluster the entry of the
// Secret that is deployed with it.
var hubToken = filter.SecretRef{Name: "imagehub", Key: "token-key"}

// hubTarget is what Image Hub's inventory in a cluster is kept for: a chain without filters, and objects all the same.
func hubTarget(namespace string) filter.Target {
	return filter.Target{Kind: "ImageHub", Namespace: cmp.Or(namespace, "default"), Name: "imagehub"}
}

// brings says whether a request is about clusters. What came with the connection, whatever it was to ask for, counts only
// where there are no proxies of the adapter's own.
func (r *Runner) brings(q Request) bool {
	return r.Own != nil || r.Clusters != nil && len(q.Kubeconfigs) > 0 && (!q.Implied || len(r.Backends) == 0)
}

// limiter is the operation of Image Hub's limiter: in the clusters that a request brings in front of the API itself, else on
// the sidecars of Consul's agent or on plain Envoys.
func (r *Runner) limiter() useCase {
	u := r.prepared(opLimiter, "Image Hub rate limit filter", "removes the limiter", r.Limiter)
	u.clusters = true
	in := func(here, there func(context.Context, *job, Request) error) func(context.Context, *job, Request) error {
		return func(ctx context.Context, j *job, q Request) error {
			if !r.brings(q) {
				j.here = true
				return here(ctx, j, q)
			}
			shown, err := r.shown(ctx, q.Kubeconfigs)
			if errors.Is(err, problem.MeshAmbiguous) || errors.Is(err, problem.MeshNotSupported) {
				err = nil // what holds then for Image Hub does for its limiter
			}
			if err != nil {
				return err
			}
			q.Body, j.InClusters = r.hubLimiters[hubMesh([]string{shown})], true
			return there(ctx, j, q)
		}
	}
	u.apply, u.remove, u.run = in(u.apply, r.readApply), in(u.remove, r.readRemove), r.runLimiter
	return u
}

// limiterName is what the limiter's documents are called.
const limiterName = "imagehub-rate-limit"

// passed are the adapter's own places that a job of Image Hub is not for, and was before imagehub.mesh or clusters of the
// configuration was changed. Whoever brings a cluster may have Image Hub here besides.
func (r *Runner) passed(j job) (places []place) {
	if len(j.kubeconfigs) > 0 {
		return nil
	}
	own, _ := r.own(j)
	on := func(consul bool) bool {
		return slices.ContainsFunc(own, func(pl place) bool { return consul == (pl.cluster != nil) })
	}
	if len(r.Backends) > 0 && !on(false) {
		places = append(places, r.here())
	}
	if r.Consul != nil && !on(true) {
		places = append(places, r.inConsul())
	}
	return places
}

// runLimiter is runFilters for Image Hub's limiter. Where it was left it is named, and a deletion takes it from there, too.
func (r *Runner) runLimiter(ctx context.Context, s *story, j job) (summary, details string, err error) {
	if !j.Delete {
		r.warnOfLimiters(ctx, s, j)
		return r.runFilters(ctx, s, j)
	}
	summary, details, err = r.runFilters(ctx, s, j)
	if err != nil && !errors.Is(err, problem.FilterNotFound) {
		return "", "", err
	}
	var done outcomes
	if err == nil {
		done = outcomes{{summary, details}}
	}
	failed := r.leftLimiters(ctx, s, j, func(pl place, c filter.Chain, key filter.Key) error {
		o, err := r.takeFrom(ctx, s, pl, c, []filter.Key{key}, patience{j.Wait, j.Rollout})
		if err == nil {
			done = append(done, outcome{o.line + pl.suffix(), o.detail})
		}
		return err
	})
	switch {
	case failed != nil:
		return "", "", done.partly(failed, 0)
	case len(done) == 0:
		return "", "", err
	}
	summary, details = done.tell(fmt.Sprintf("Image Hub's limiter is removed from %d targets", len(done)))
	return summary, details, nil
}

// warnOfLimiters names where the limiter was left.
func (r *Runner) warnOfLimiters(ctx context.Context, s *story, j job) {
	_ = r.leftLimiters(ctx, s, j, func(pl place, c filter.Chain, key filter.Key) error {
		s.warn(problem.LimiterLeft.New("%s is on %s", key, pl.on(c.Target)))
		return nil
	})
}

// leftLimiters does something for each chain that has the limiter where it was left. That a place cannot be asked is a
// warning.
func (r *Runner) leftLimiters(ctx context.Context, s *story, j job, each func(place, filter.Chain, filter.Key) error) error {
	key := filter.Key{Namespace: cmp.Or(j.Namespace, "default"), Name: limiterName}
	for _, pl := range r.passed(j) {
		looking, cancel := context.WithTimeout(ctx, lookTimeout)
		chains, err := pl.holding(looking, key)
		cancel()
		if err != nil {
			s.warn(problem.Of(err))
		}
		for _, c := range chains {
			if err := each(pl, c, key); err != nil {
				return err
			}
		}
	}
	return nil
}

// readImageHub says where Image Hub is to run.
func (r *Runner) readImageHub(_ context.Context, j *job, q Request) error {
	if r.brings(q) {
		j.Meshes, j.InClusters = hubMeshes[:1], true // whichever mesh each cluster has
	} else if j.here = true; r.HubSidecar != "" {
		j.Meshes = []string{consulMesh}
	}
	return nil
}

// Bounds of starting and stopping Image Hub, here and in a cluster.
const (
	applicationTimeout = 15 * time.Second
	deployTimeout      = 3 * time.Minute
)

func (r *Runner) runImageHub(ctx context.Context, s *story, j job) (summary, details string, err error) {
	ctx, end := r.step(ctx, "image hub")
	defer func() { end(err) }()
	places, err := r.places(j)
	if err != nil {
		return "", "", err
	}
	r.warnOfLimiters(ctx, s, j)
	if places[0].cluster != nil && places[0].agent == nil {
		if r.Own != nil {
			if err := r.leftHere(ctx, s, j.Delete); err != nil {
				return "", "", err
			}
		}
		out, err := r.each(ctx, s, places, func(ctx context.Context, s *story, pl place) (outcomes, error) {
			o, err := r.deploy(ctx, s, pl, j)
			return outcomes{o}, err
		})
		if err != nil {
			return "", "", err
		}
		summary, details = out.tell(fmt.Sprintf("Image Hub is done in %d clusters", len(out)))
		return summary, details, nil
	}
	ctx, cancel := context.WithTimeout(ctx, applicationTimeout)
	defer cancel()
	if places[0].agent != nil {
		return r.hubBehindSidecars(ctx, s, places[0], j.Delete)
	}
	taken := r.leftInConsul(ctx, s, j.Delete)
	if j.Delete {
		stopped, err := r.ImageHub.Stop(ctx)
		if err != nil {
			return "", "", problem.ImageHubFailed.New("stop: %w", err)
		}
		if !stopped && !taken {
			return "Image Hub was removed before; there was nothing to do", "", nil
		}
		return "Image Hub removed", "its users and tokens are gone with it", nil
	}
	addr, started, err := r.ImageHub.Start(ctx)
	if err != nil {
		return "", "", problem.ImageHubFailed.New("start: %w", err)
	}
	if !started {
		return "Image Hub is running already at http://" + addr, "nothing was changed", nil
	}
	return "Image Hub runs at http://" + addr, "nothing limits pulls until imagehub_rate_limit is applied to the proxies in front of it", nil
}

// leftHere stops Image Hub inside the adapter and takes it away from the adapter's own Consul, where it was deployed before
// clusters was set to own, or warns that it is there.
func (r *Runner) leftHere(ctx context.Context, s *story, remove bool) error {
	ctx, cancel := context.WithTimeout(ctx, applicationTimeout)
	defer cancel()
	r.leftInConsul(ctx, s, remove)
	if !remove {
		if addr := r.ImageHub.Addr(); addr != "" {
			s.warn(problem.HubLeft.New("it runs inside the adapter, at http://%s", addr))
		}
		return nil
	}
	stopped, err := r.ImageHub.Stop(ctx)
	if err != nil {
		return problem.ImageHubFailed.New("stop: %w", err)
	}
	if stopped {
		s.info("Image Hub inside the adapter is stopped", "its users and tokens are gone with it")
	}
	return nil
}

// leftInConsul takes Image Hub away from the adapter's own Consul, where it was deployed before imagehub.mesh was changed, or
// warns that it is there. What Consul does not tell or do is a warning: Image Hub is not there any more.
func (r *Runner) leftInConsul(ctx context.Context, s *story, remove bool) (taken bool) {
	agent, ok := r.Consul.(HubAgent)
	if !ok {
		return false
	}
	there, err := agent.HasHub(ctx)
	switch {
	case err == nil && there && !remove:
		s.warn(problem.HubLeft.New("%s has its services", r.Consul))
	case err == nil && there:
		var changes []plan.Change
		changes, err = agent.RemoveHub(ctx)
		for _, c := range changes {
			if c.Action != plan.Unchanged {
				taken = true
				s.info(c.String(), "of Image Hub in "+r.Consul.String())
			}
		}
	}
	if err != nil {
		s.warn(problem.Of(err))
	}
	return taken
}

// hubSidecars are how the sidecars of Image Hub are started, as Consul's agent has it.
const hubSidecars = `Consul starts no sidecars. Unless they run, start both, each in a shell of its own, with Envoy in the path, and with CONSUL_GRPC_ADDR=127.0.0.1:8502 if the agent has -dev:
consul connect envoy -sidecar-for imagehub-api -admin-bind 127.0.0.1:19000 -ignore-envoy-compatibility -- --disable-hot-restart --drain-strategy immediate --drain-time-s 20
consul connect envoy -sidecar-for imagehub-web -admin-bind 127.0.0.1:19001 -ignore-envoy-compatibility -- --disable-hot-restart --drain-strategy immediate --drain-time-s 20`

// hubBehindSidecars is Image Hub in the adapter, registered with Consul's agent.
func (r *Runner) hubBehindSidecars(ctx context.Context, s *story, pl place, remove bool) (summary, details string, err error) {
	changed := false
	tell := func(changes []plan.Change) {
		for _, c := range changes {
			if c.Action != plan.Unchanged {
				changed = true
				s.info(c.String(), "of Image Hub in "+pl.name())
			}
		}
	}
	if remove {
		changes, err := pl.agent.RemoveHub(ctx)
		tell(changes)
		if err != nil {
			return "", "", err
		}
		stopped, err := r.ImageHub.Stop(ctx)
		switch {
		case err != nil:
			return "", "", problem.ImageHubFailed.New("stop: %w", err)
		case !stopped && !changed:
			return "Image Hub was removed before; there was nothing to do", "", nil
		}
		return "Image Hub removed from " + pl.name(), "its users and tokens are gone with it; what runs as its sidecars can be stopped", nil
	}
	addr, started, err := r.ImageHub.Start(ctx)
	if err != nil {
		return "", "", problem.ImageHubFailed.New("start: %w", err)
	}
	changes, err := pl.agent.AddHub(ctx, addr, r.HubSidecar)
	tell(changes)
	if err != nil {
		return "", "", err
	}
	at := " at http://" + r.HubSidecar + "/ through the sidecars of " + pl.name()
	if !started && !changed {
		return "Image Hub is unchanged" + at, hubSidecars, nil
	}
	return "Image Hub answers" + at, hubSidecars, nil
}

// deploy has Image Hub run in a namespace of a cluster, or not any more.
func (r *Runner) deploy(ctx context.Context, s *story, pl place, j job) (outcome, error) {
	target := hubTarget(j.Namespace)
	ctx, cancel := context.WithTimeout(ctx, cmp.Or(r.ImageHubIn.Patience, deployTimeout))
	defer cancel()
	var plans []plan.Plan
	at, through := "", ""
	if j.Delete {
		for _, m := range hubMeshes { // the cluster may have lost its mesh since
			plans = append(plans, plan.Plan{Chain: filter.Chain{Mesh: m, Target: target}})
		}
	} else {
		p, port, behind, err := r.hubPlan(ctx, pl, target)
		if err != nil {
			return outcome{}, err
		}
		plans, through = append(plans, p), behind
		at = fmt.Sprintf("http://%s%s/ from the namespace %s", r.ImageHubIn.Host, port, target.Namespace)
	}
	var changes []plan.Change
	for _, p := range plans {
		done, err := r.hold(ctx, s, pl, p)
		if err != nil {
			return outcome{}, err
		}
		changes = append(changes, done...)
	}
	changed, kept := false, ""
	for _, c := range changes {
		switch c.Action {
		case plan.Unchanged:
			continue
		case plan.Kept:
			kept = "; " + c.Subject + " stays, since others may use it"
		}
		changed = true
		s.info(c.String(), "of Image Hub in the namespace "+target.Namespace)
	}
	switch {
	case j.Delete && !changed:
		return outcome{"Image Hub was removed before from the namespace " + target.Namespace, "there was nothing to do"}, nil
	case j.Delete:
		return outcome{"Image Hub removed from the namespace " + target.Namespace, "its users and tokens are gone with it" + kept}, nil
	case !changed:
		return outcome{"Image Hub is unchanged at " + at, through}, nil
	}
	return outcome{"Image Hub runs at " + at, through + "; nothing limits pulls until imagehub_rate_limit is applied"}, nil
}

// hold makes a cluster hold Image Hub as one mesh has it.
func (r *Runner) hold(ctx context.Context, s *story, pl place, p plan.Plan) ([]plan.Change, error) {
	defer r.lock(pl.key(p.Chain.ID()))()
	if err := s.holds(ctx); err != nil {
		return nil, err
	}
	t, err := pl.cluster.Target(ctx, p.Chain.Mesh, p.Chain.Target)
	if err != nil {
		return nil, err
	}
	changes, err := t.Apply(ctx, p)
	if err == nil {
		err = t.Commit(ctx)
	}
	if err != nil && t.Written() {
		half := *problem.Of(err)
		half.Err = err
		half.Details += "\nWhat was written stays. Sending the operation again goes on from there, and deleting takes it away."
		return nil, &half
	}
	return changes, err
}

// hubGateways are the gateways that Image Hub stands behind on each mesh, the best first, and the kinds that each is made of.
var hubGateways = []struct {
	mesh   string
	family HubGateway
	kinds  []schema.GroupKind
	port   string // of the address that it answers at
	on     string // says what serves it
}{
	{hubMeshes[0], HubIstio, []schema.GroupKind{{Group: "networking.istio.io", Kind: "Gateway"}, {Group: "networking.istio.io", Kind: "VirtualService"}},
		"", " on the Pods with the label istio=ingressgateway"},
	{hubMeshes[0], HubGatewayAPI, gatewayAPI, "", ""},
	{hubMeshes[1], HubGatewayAPI, gatewayAPI, ":8080", " of Consul"},
}

var gatewayAPI = []schema.GroupKind{{Group: templates.GatewayAPI, Kind: "Gateway"}, {Group: templates.GatewayAPI, Kind: "HTTPRoute"}}

// hubPlan plans Image Hub on the mesh that the cluster shows, behind a gateway of a kind that it serves. It answers at the
// port, through what behind names.
func (r *Runner) hubPlan(ctx context.Context, pl place, target filter.Target) (p plan.Plan, port, behind string, err error) {
	reads := mesh.Signs()
	for _, g := range hubGateways {
		reads.Served = append(reads.Served, g.kinds...)
	}
	served, err := pl.cluster.Read(ctx, reads)
	if err != nil {
		return p, "", "", err
	}
	h, m := r.ImageHubIn, hubMesh(mesh.Seen(served))
	var asked []string
	for _, g := range hubGateways {
		if g.mesh != m || h.Gateway != "" && h.Gateway != g.family {
			continue
		}
		gateway, ok := served.Kind(g.kinds[0])
		_, route := served.Kind(g.kinds[1])
		if !ok || !route {
			for _, k := range g.kinds {
				asked = append(asked, k.String())
			}
			continue
		}
		in := templates.Place{Mesh: m, Namespace: target.Namespace, Gateway: gateway.GroupVersion().String()}
		if in.Key, err = r.hubKey(pl.cluster, target.Namespace); err != nil {
			return p, "", "", err
		}
		if in.Module, ok = filters.Builtin("ratelimit"); !ok {
			return p, "", "", problem.Internal.New("the program lacks a part of itself: the module ratelimit")
		}
		objects, err := h.Objects(in)
		if err != nil {
			return p, "", "", err
		}
		content, err := json.Marshal(objects)
		if err != nil {
			return p, "", "", fmt.Errorf("encode Image Hub's objects: %w", err)
		}
		sum := sha256.Sum256(content)
		p = plan.Plan{Chain: filter.Chain{Mesh: m, Target: target}, Version: hex.EncodeToString(sum[:8])}
		for _, o := range objects {
			p.Objects = append(p.Objects, plan.Object{Content: o})
		}
		return p, g.port, "through Gateway " + target.Namespace + "/imagehub" + g.on, nil
	}
	if len(asked) == 0 {
		return p, "", "", problem.HubGateway.New("%s has %s, where imagehub.gateway cannot be %s", pl.name(), m, h.Gateway)
	}
	return p, "", "", problem.HubGateway.New("%s does not serve %s", pl.name(), strings.Join(asked, ", "))
}

// hubKey is what Image Hub's tokens are signed with in a namespace of a cluster. It is made of the adapter's own key, so that
// it is the same each time, and whoever reads it there knows neither that nor the one of another place.
func (r *Runner) hubKey(c Cluster, namespace string) (string, error) {
	own, err := r.Secret(hubToken.Name, hubToken.Key)
	if err != nil {
		return "", err
	}
	mac := hmac.New(sha256.New, []byte(own))
	fmt.Fprintf(mac, "imagehub|%s|%s", c, namespace)
	key := hex.EncodeToString(mac.Sum(nil))
	r.hide(key)
	return key, nil
}

// runInstall is Image Hub and its limiter, one after the other; deleting takes the limiter away first.
func (r *Runner) runInstall(ctx context.Context, s *story, j job) (summary, details string, err error) {
	if j.Delete {
		limiter, about, err := r.runLimiter(ctx, s, j)
		if err != nil && !errors.Is(err, problem.FilterNotFound) {
			return "", "", err
		}
		if err == nil {
			s.info(limiter, about)
		}
		app, _, err := r.runImageHub(ctx, s, j)
		if err != nil {
			return "", "", err
		}
		return "Image Hub and its rate limit removed", app, nil
	}
	app, detail, err := r.runImageHub(ctx, s, j)
	if err != nil {
		return "", "", err
	}
	s.info(app, detail)
	limiter, about, err := r.runFilters(ctx, s, j)
	if err != nil {
		return "", "", err
	}
	s.info(limiter, about)
	// mesheryctl waits for these very words.
	details = app + ". " + limiter + ". The mesh is now installed."
	if detail == hubSidecars {
		details += "\n" + hubSidecars
	}
	return "Image Hub and its rate limit are deployed", details, nil
}
