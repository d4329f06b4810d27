package cli

import (
	"context"
	"iter"

	"github.com/meshery/meshery-filters/config"
	"github.com/meshery/meshery-filters/internal/consul"
	"github.com/meshery/meshery-filters/internal/filter"
	"github.com/meshery/meshery-filters/internal/istiod"
	"github.com/meshery/meshery-filters/internal/kube"
	"github.com/meshery/meshery-filters/internal/mesh"
	"github.com/meshery/meshery-filters/internal/operation"
	"github.com/meshery/meshery-filters/internal/plan"
	"github.com/meshery/meshery-filters/internal/problem"
	"github.com/meshery/meshery-filters/internal/survey"
)

// operated is a cluster as operations want it.
type operated struct{ *kube.Cluster }

var (
	_ operation.Cluster  = operated{}
	_ operation.Crowd    = operated{}
	_ operation.Surveyed = operated{}
	_ operation.Fetcher  = operated{}
)

// Target reads what holds on a target.
func (c operated) Target(ctx context.Context, mesh string, t filter.Target) (operation.ClusterTarget, error) {
	read, err := c.Cluster.Target(ctx, mesh, t)
	if err != nil {
		return nil, err // and no target that is not nil
	}
	return read, nil
}

// Targets reads what holds on every target.
func (c operated) Targets(ctx context.Context) (operation.ClusterTargets, error) {
	read, err := c.Cluster.Targets(ctx)
	if err != nil {
		return nil, err
	}
	return targets{read}, nil
}

// targets are a cluster's as operations want them.
type targets struct{ *kube.Targets }

func (t targets) Target(mesh string, of filter.Target) operation.ClusterTarget {
	return t.Targets.Target(mesh, of)
}

// Connected asks istiod.
func (c operated) Connected(ctx context.Context, p plan.Plan) ([]plan.Pod, error) {
	return istiod.Connected(ctx, c.Cluster, p, istiod.Silence)
}

// Before asks Consul's proxies.
func (c operated) Before(ctx context.Context, p plan.Plan) (map[string]plan.Fetching, error) {
	if p.Chain.Mesh == (mesh.Consul{}).Name() {
		return consul.Before(ctx, c.Cluster, p)
	}
	return nil, nil
}

// Loaded asks the proxies and, on Istio, istiod.
func (c operated) Loaded(ctx context.Context, p plan.Plan) iter.Seq2[plan.Loaded, error] {
	if p.Chain.Mesh == (mesh.Consul{}).Name() {
		return consul.InPods(ctx, c.Cluster, p)
	}
	return istiod.Loaded(ctx, c.Cluster, p, istiod.Silence)
}

// Survey looks at the proxies of every mesh.
func (c operated) Survey(ctx context.Context) (plan.Survey, error) {
	return surveyed(ctx, c.Cluster, "")
}

// surveyed looks for filters that nothing explains in the proxies of every mesh of a cluster, in a namespace or with none
// in all. Why one mesh could not be looked at is part of the survey; when none could, it is the error.
func surveyed(ctx context.Context, c *kube.Cluster, namespace string) (s plan.Survey, err error) {
	istio := istiod.ProxiesOf(c)
	defer istio.Close()
	meshes := []survey.Mesh{istio, consul.Sidecars{Cluster: c}}
	failed := 0
	for _, m := range meshes {
		var of plan.Survey
		if of, err = survey.Look(ctx, m, namespace); err != nil {
			failed++
			of = plan.Survey{Missed: problem.Of(err).Details}
		}
		s = s.And(of)
	}
	if failed == len(meshes) {
		return plan.Survey{}, err
	}
	return s, nil
}

// operateOn gives operations the Consul that is configured, and the clusters that requests bring or the one that the adapter
// runs in. close ends the connections to them.
func operateOn(o *operation.Options, c config.Config) (close func(), err error) {
	leave := func() {}
	if c.Consul.Addr != "" {
		client, err := openConsul(o, c)
		if err != nil {
			return nil, err
		}
		o.Consul, leave = consulled{client, o.Secret}, client.Close
	}
	options := kube.Options{Log: o.Log}
	if c.Clusters == "own" {
		c, err := kube.Own(options)
		if err != nil {
			return nil, problem.InvalidConfiguration.New("clusters: own: %s", problem.Of(err).Details)
		}
		o.Own = operated{c}
		return func() { c.Close(); leave() }, nil
	}
	for _, word := range config.List(c.KubeconfigAllow) {
		*map[string]*bool{"exec": &options.Allow.Exec, "files": &options.Allow.Files, "proxy": &options.Allow.Proxy,
			"insecure": &options.Allow.Insecure, "link-local": &options.Allow.LinkLocal}[word] = true
	}
	pool := kube.NewPool(options)
	o.Clusters = func(kubeconfig []byte) (operation.Cluster, error) {
		c, err := pool.Open(kubeconfig)
		if err != nil {
			return nil, err
		}
		return operated{c}, nil
	}
	return func() { pool.Close(); leave() }, nil
}
