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
	"strings"
	"time"

	"k8s.io/apimachinery/pkg/runtime/schema"

	"github.com/meshery/meshery-filters/internal/filter"
	"github.com/meshery/meshery-filters/internal/mesh"
	"github.com/meshery/meshery-filters/internal/plan"
	"github.com/meshery/meshery-filters/internal/problem"
	"github.com/meshery/meshery-filters/templates"
)

// ImageHubIn is Image Hub as clusters get it.
type ImageHubIn struct {
	templates.ImageHub
	// Gateway says which gateways it stands behind. Default: Istio's where they are served, else those of the Gateway API.
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

// hubMesh is the mesh whose clusters Image Hub runs in.
var hubMesh = mesh.Istio{}.Name()

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
// plain Envoys.
func (r *Runner) limiter() useCase {
	u := r.prepared(opLimiter, "Image Hub rate limit filter", "removes the limiter", r.Limiter)
	u.clusters = true
	in := func(here, there func(context.Context, *job, Request) error) func(context.Context, *job, Request) error {
		return func(ctx context.Context, j *job, q Request) error {
			if !r.brings(q) {
				return here(ctx, j, q)
			}
			q.Body = r.hubLimiter
			return there(ctx, j, q)
		}
	}
	u.apply, u.remove = in(u.apply, r.readApply), in(u.remove, r.readRemove)
	return u
}

// readImageHub says where Image Hub is to run.
func (r *Runner) readImageHub(_ context.Context, j *job, q Request) error {
	if r.brings(q) {
		j.Meshes = []string{hubMesh}
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
	if places[0].cluster != nil {
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
	if j.Delete {
		stopped, err := r.ImageHub.Stop(ctx)
		if err != nil {
			return "", "", problem.ImageHubFailed.New("stop: %w", err)
		}
		if !stopped {
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

// deploy has Image Hub run in a namespace of a cluster, or not any more.
func (r *Runner) deploy(ctx context.Context, s *story, pl place, j job) (outcome, error) {
	target := hubTarget(j.Namespace)
	chain := filter.Chain{Mesh: hubMesh, Target: target}
	defer r.lock(pl.key(chain.ID()))()
	ctx, cancel := context.WithTimeout(ctx, cmp.Or(r.ImageHubIn.Patience, deployTimeout))
	defer cancel()
	p, through := plan.Plan{Chain: chain}, ""
	if !j.Delete {
		var err error
		if p, through, err = r.hubPlan(ctx, pl, chain); err != nil {
			return outcome{}, err
		}
	}
	if err := s.holds(ctx); err != nil {
		return outcome{}, err
	}
	t, err := pl.cluster.Target(ctx, chain.Mesh, target)
	if err != nil {
		return outcome{}, err
	}
	changes, err := t.Apply(ctx, p)
	if err == nil {
		err = t.Commit(ctx)
	}
	if err != nil {
		if !t.Written() {
			return outcome{}, err
		}
		half := *problem.Of(err)
		half.Err = err
		half.Details += "\nWhat was written stays. Sending the operation again goes on from there, and deleting takes it away."
		return outcome{}, &half
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
	at := fmt.Sprintf("http://%s/ from the namespace %s", r.ImageHubIn.Host, target.Namespace)
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

// hubKinds are those that a gateway of each family is made of.
var hubKinds = []struct {
	family HubGateway
	kinds  []schema.GroupKind
}{
	{HubIstio, []schema.GroupKind{{Group: "networking.istio.io", Kind: "Gateway"}, {Group: "networking.istio.io", Kind: "VirtualService"}}},
	{HubGatewayAPI, []schema.GroupKind{{Group: templates.GatewayAPI, Kind: "Gateway"}, {Group: templates.GatewayAPI, Kind: "HTTPRoute"}}},
}

// hubPlan plans Image Hub behind a gateway of a kind that the cluster serves, which through names.
func (r *Runner) hubPlan(ctx context.Context, pl place, chain filter.Chain) (p plan.Plan, through string, err error) {
	var reads plan.Reads
	for _, g := range hubKinds {
		reads.Kinds = append(reads.Kinds, g.kinds...)
	}
	served, err := pl.cluster.Read(ctx, reads)
	if err != nil {
		return p, "", err
	}
	h := r.ImageHubIn
	for _, g := range hubKinds {
		gateway, ok := served.Kind(g.kinds[0])
		_, route := served.Kind(g.kinds[1])
		if !ok || !route || h.Gateway != "" && h.Gateway != g.family {
			continue
		}
		key, err := r.hubKey(pl.cluster, chain.Target.Namespace)
		if err != nil {
			return p, "", err
		}
		objects, err := h.Objects(chain.Target.Namespace, gateway.GroupVersion().String(), key)
		if err != nil {
			return p, "", err
		}
		content, err := json.Marshal(objects)
		if err != nil {
			return p, "", fmt.Errorf("encode Image Hub's objects: %w", err)
		}
		sum := sha256.Sum256(content)
		p = plan.Plan{Chain: chain, Version: hex.EncodeToString(sum[:8])}
		for _, o := range objects {
			p.Objects = append(p.Objects, plan.Object{Content: o})
		}
		through = "through Gateway " + chain.Target.Namespace + "/imagehub"
		if g.family == HubIstio {
			through += " on the Pods with the label istio=ingressgateway"
		}
		return p, through, nil
	}
	var asked []string
	for _, g := range hubKinds {
		if h.Gateway == "" || h.Gateway == g.family {
			for _, k := range g.kinds {
				asked = append(asked, k.String())
			}
		}
	}
	return p, "", problem.HubGateway.New("%s does not serve %s", pl.name(), strings.Join(asked, ", "))
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
		limiter, _, err := r.remove(ctx, s, j)
		if err != nil && !errors.Is(err, problem.FilterNotFound) {
			return "", "", err
		}
		if err == nil {
			s.info(limiter, "")
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
	limiter, detail, err := r.runFilters(ctx, s, j)
	if err != nil {
		return "", "", err
	}
	s.info(limiter, detail)
	// mesheryctl waits for these very words.
	return "Image Hub and its rate limit are deployed", app + ". " + limiter + ". The mesh is now installed.", nil
}
