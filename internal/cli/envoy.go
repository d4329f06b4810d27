package cli

import (
	"io"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"github.com/meshery/meshery-filters/internal/envoy"
	"github.com/meshery/meshery-filters/internal/problem"
)

// newEnvoy makes `envoy` and what is below it.
func newEnvoy(a *app) *cobra.Command {
	cmd := &cobra.Command{
		Use:     "envoy",
		Short:   "Prepare a plain Envoy for filters",
		Long:    `Prepare a plain Envoy for filters: with a configuration of its own, or with an addition to one that you have.`,
		Example: `  meshery-filters envoy bootstrap --upstream 127.0.0.1:10017 > edge.yaml`,
	}
	return parent(cmd, newBootstrap(a), newSlot(a))
}

func newBootstrap(a *app) *cobra.Command {
	var b envoy.Bootstrap
	var t envoy.TLS
	cmd := &cobra.Command{
		Use:   "bootstrap",
		Short: "Write a complete configuration for an Envoy in front of one upstream",
		Long: `Write a complete configuration for an Envoy that listens at one address, hands requests to one upstream, and gets its
filters from the adapter. It needs Envoy ` + envoy.MinVersion + ` or later.

Every Envoy of a group runs the filters whose target is {kind: ProxyGroup, name: GROUP}.`,
		Example: `  meshery-filters envoy bootstrap --group edge --listen 0.0.0.0:8080 --upstream 127.0.0.1:10017 > edge.yaml
  envoy -c edge.yaml`,
		Args: noArgs,
		RunE: func(*cobra.Command, []string) error {
			if t != (envoy.TLS{}) {
				b.XDSTLS = &t
			}
			text, err := b.YAML()
			if err != nil {
				return inFlags(err)
			}
			return write(a.Out, text, "")
		},
	}
	host, err := os.Hostname()
	if err != nil || host == "" {
		host = "envoy"
	}
	f := cmd.Flags()
	f.StringVar(&b.Group, "group", "default", "`name` of the group of proxies it belongs to")
	f.StringVar(&b.NodeID, "node-id", "", "`name` of this proxy, unlike every other of its group (default: the machine's name)")
	f.StringVar(&b.XDSAddr, "xds-addr", envoy.DefaultXDSAddr, "`address` at which the adapter answers proxies (its --xds-addr)")
	f.StringVar(&b.Listen, "listen", "127.0.0.1:8080", "IP `address` and port where requests come in")
	f.StringVar(&b.Upstream, "upstream", "127.0.0.1:10017", "`address` that requests go to")
	f.StringVar(&b.Admin, "admin", "127.0.0.1:9901", "IP `address` and port of Envoy's admin interface; whoever reaches it can stop the proxy")
	f.IntVar(&b.Concurrency, "concurrency", 0, "worker threads; 0 is one for each CPU")
	f.StringVar(&t.CA, "xds-tls-ca", "", "`file` on the proxy's machine with what the adapter's certificate is signed by")
	f.StringVar(&t.Cert, "xds-tls-cert", "", "`file` on the proxy's machine with the proxy's certificate")
	f.StringVar(&t.Key, "xds-tls-key", "", "`file` on the proxy's machine with the certificate's key")
	cmd.PreRun = func(*cobra.Command, []string) {
		if b.NodeID == "" {
			b.NodeID = host
		}
	}
	return cmd
}

// bootstrapFlags are the flags of fields that are not called like them.
var bootstrapFlags = strings.NewReplacer("nodeID", "node-id", "xdsAddr", "xds-addr", "xdsTLS.", "xds-tls-")

// inFlags tells the mistakes of a bootstrap by its flags.
func inFlags(err error) error {
	p := problem.Of(err)
	if len(p.Fields) == 0 {
		return err
	}
	var lines []string
	for _, m := range p.Fields {
		m.Path = "--" + bootstrapFlags.Replace(m.Path)
		lines = append(lines, m.String())
	}
	return usage("%s", strings.Join(lines, "\n"))
}

func newSlot(a *app) *cobra.Command {
	var group string
	cmd := &cobra.Command{
		Use:   "slot",
		Short: "Write what to add to an Envoy configuration that you have",
		Long: `Write what to add to an Envoy configuration that you have, so that the adapter can fill filters into one of its
listeners. Comments say where each part goes.`,
		Example: `  meshery-filters envoy slot --group edge`,
		Args:    noArgs,
		RunE: func(*cobra.Command, []string) error {
			if !envoy.ValidGroup(group) {
				return usage("--group: %q will not do; use %s", group, envoy.GroupRule)
			}
			_, err := io.WriteString(a.Out, envoy.Slot(group))
			return err
		},
	}
	cmd.Flags().StringVar(&group, "group", "default", "`name` of the group of proxies it belongs to")
	return cmd
}
