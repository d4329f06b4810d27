package demo

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/meshery/meshery-filters/internal/envoy"
	"github.com/meshery/meshery-filters/templates"
)

// PlainEnvoy is the Stage of Envoys that the adapter serves by its own xDS, and of the Image Hub that the adapter runs.
type PlainEnvoy struct {
	Binary envoy.Binary

	hub string // Image Hub's own address
}

var _ Stage = (*PlainEnvoy)(nil)

// Opening has the adapter start Image Hub, and Envoys with a slot.
func (p *PlainEnvoy) Opening(d *Demo) []Step {
	return []Step{
		{"The adapter starts, with its embedded NATS", func(ctx context.Context) error {
			return d.StartAdapter(ctx, "--imagehub-addr", "127.0.0.1:0")
		}},
		{"Image Hub is deployed", func(ctx context.Context) error {
			last, err := d.Operate(ctx, "imagehub", "")
			if err != nil {
				return err
			}
			_, p.hub, _ = strings.Cut(last.GetSummary(), "http://")
			return nil
		}},
		{"Two Envoys start in front of it", func(ctx context.Context) error {
			for i := range 2 {
				if err := p.start(ctx, d, i+1); err != nil {
					return err
				}
			}
			return nil
		}},
	}
}

func (p *PlainEnvoy) start(ctx context.Context, d *Demo, n int) error {
	dir := filepath.Join(d.Dir, fmt.Sprintf("envoy-%d", n))
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	bootstrap, err := envoy.Bootstrap{Group: "default", NodeID: fmt.Sprintf("demo-%d", n), XDSAddr: d.Addresses.XDS,
		Listen: "127.0.0.1:0", Upstream: p.hub, Admin: "127.0.0.1:0"}.YAML()
	if err != nil {
		return err
	}
	process, err := envoy.Start(ctx, p.Binary, envoy.ProcessOptions{Bootstrap: bootstrap, Dir: dir, Concurrency: 2})
	if err != nil {
		return err
	}
	if err := process.Ready(ctx); err != nil { // the listener opens once the chain is there
		return errors.Join(err, process.Stop(ctx))
	}
	addr, err := process.ListenerAddr(ctx, envoy.ListenerName)
	if err == nil {
		err = d.AddEnvoy(ctx, process, addr)
	}
	if err != nil {
		return errors.Join(err, process.Stop(ctx))
	}
	return nil
}

// Place is the group default.
func (p *PlainEnvoy) Place() Place {
	return Place{Namespace: "default", Refusals: `extension_config_discovery.*\.config_fail`, OneFirst: true}
}

// Limiter is Image Hub's, by the operation that has no body of its own.
func (p *PlainEnvoy) Limiter() (operation, document string) {
	document, _ = templates.ImageHubLimiter("envoy")
	return "imagehub_rate_limit", document
}

// Running is what the slot holds.
func (p *PlainEnvoy) Running(ctx context.Context, e *Envoy) (version string, filters []envoy.SlotFilter, err error) {
	slot, err := e.Admin().SlotConfig(ctx)
	return slot.Version, slot.Filters, err
}

// Invite says how to put the limiter back, and where everything is.
func (p *PlainEnvoy) Invite(d *Demo) string {
	a, b := d.Envoys[0], d.Envoys[1]
	return fmt.Sprintf(`  export MESHERY_FILTERS_SERVER=%s
  %s run imagehub_rate_limit
  %[2]s status
  curl -i http://%s/pull
  curl -i http://%s/pull
Image Hub's page through the first Envoy is http://%[3]s, the adapter's page http://%[5]s.
Image Hub itself is http://%[6]s, NATS %[7]s, the Envoys' admin http://%[8]s and http://%[9]s.`,
		d.Addresses.GRPC, d.Program, a.Addr, b.Addr, d.Addresses.HTTP, p.hub, d.Addresses.NATS, a.AdminAddr(), b.AdminAddr())
}

// Close has nothing to do: the adapter runs Image Hub, and the demo stops the Envoys.
func (p *PlainEnvoy) Close() {}
