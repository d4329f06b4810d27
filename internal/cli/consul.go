package cli

import (
	"context"

	"github.com/meshery/meshery-filters/config"
	"github.com/meshery/meshery-filters/internal/consul"
	"github.com/meshery/meshery-filters/internal/filter"
	"github.com/meshery/meshery-filters/internal/operation"
)

// consulled is the adapter's own Consul as operations want it. Secrets are the adapter's, as on plain Envoys.
type consulled struct {
	*consul.Client
	secret func(name, key string) (string, error)
}

var (
	_ operation.Cluster  = consulled{}
	_ operation.Folder   = consulled{}
	_ operation.HubAgent = consulled{}
)

// Secret is one of the adapter's configuration.
func (c consulled) Secret(_ context.Context, _, name, key string) (string, error) {
	return c.secret(name, key)
}

// Target reads what holds on a target.
func (c consulled) Target(ctx context.Context, mesh string, t filter.Target) (operation.ClusterTarget, error) {
	read, err := c.Client.Target(ctx, mesh, t)
	if err != nil {
		return nil, err // and no target that is not nil
	}
	return read, nil
}

// Targets reads what holds on every target.
func (c consulled) Targets(ctx context.Context) (operation.ClusterTargets, error) {
	read, err := c.Client.Targets(ctx)
	if err != nil {
		return nil, err
	}
	return consulTargets{read}, nil
}

type consulTargets struct{ *consul.Targets }

func (t consulTargets) Target(mesh string, of filter.Target) operation.ClusterTarget {
	return t.Targets.Target(mesh, of)
}

// openConsul makes a client of the configured Consul.
func openConsul(o *operation.Options, c config.Config) (*consul.Client, error) {
	options := consul.Options{Addr: c.Consul.Addr, Namespace: c.Consul.Namespace, Partition: c.Consul.Partition, Admin: config.List(c.Consul.Admin),
		Folder: c.Consul.LocalPath, Log: o.Log}
	if t := c.Consul.Token; t.Name != "" {
		options.Token = func() (string, error) { return c.Secret(t.Name, t.Key) }
		if _, err := options.Token(); err != nil {
			return nil, err
		}
	}
	var err error
	if options.TLS, err = c.Consul.TLS(); err != nil {
		return nil, err
	}
	return consul.New(options)
}
