package cli

import (
	"context"
	"log/slog"
	"os"

	"github.com/spf13/cobra"

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

// consulFlags say which Consul a command asks by itself.
type consulFlags struct {
	own  bool
	file string // the adapter's configuration
}

func (k *consulFlags) flags(cmd *cobra.Command) {
	cmd.Flags().BoolVar(&k.own, "consul", false, "go to the Consul that the adapter's configuration names, without an adapter")
	cmd.Flags().StringVar(&k.file, "config", "", "the adapter's configuration `file`, for --consul; environment variables count, too")
	_ = cmd.MarkFlagFilename("config", "yaml", "yml")
}

// given says whether it is meant, and no cluster.
func (k *consulFlags) given(cluster kubeconfigFlags) (bool, error) {
	switch {
	case k.file != "" && !k.own:
		return false, usage("--config goes with --consul")
	case k.own && cluster.given():
		return false, usage("--consul is the adapter's own Consul, and no cluster")
	}
	return k.own, nil
}

// open is the Consul, with the secrets of the configuration. Whoever opens it closes it.
func (k *consulFlags) open(a *app) (c consulled, err error) {
	conf, err := config.Load(k.file, a.Env, map[string]string{"stateDir": os.TempDir()}) // which is not used
	if err != nil {
		return c, err
	}
	if conf.Consul.Addr == "" {
		return c, usage("no Consul is configured; name the adapter's configuration with --config FILE, or set $MESHERY_FILTERS_CONSUL_ADDR")
	}
	c.secret = func(name, key string) (string, error) {
		if own := conf.ImageHub.Key; name == hubSecret && key == hubToken && own.Name != "" {
			name, key = own.Name, own.Key
		}
		return conf.Secret(name, key)
	}
	c.Client, err = openConsul(&operation.Options{Log: slog.New(slog.DiscardHandler)}, conf)
	return c, err
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
