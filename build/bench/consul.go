package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"

	"github.com/meshery/meshery-filters/build/controlplanes/consultest"
	"github.com/meshery/meshery-filters/filters"
	"github.com/meshery/meshery-filters/internal/filter"
	"github.com/meshery/meshery-filters/internal/mesh"
	"github.com/meshery/meshery-filters/internal/plan"
)

// Two services that are the same but for their names. The adapter changes the one, and a bare PUT the other.
const (
	throughService = "api-1"
	besideService  = "api-2"
)

// throughConsul changes what the sidecars of a service run as Meshery does.
type throughConsul struct{ *adapter }

func (t throughConsul) put(ctx context.Context, service string, _ int, config string) error {
	operation := "apply_filter"
	if config == "" {
		operation = "remove_filter"
	}
	return t.operate(ctx, operation, consulDocument(service, config))
}

// consulDocument is the limiter for a service; without a configuration it names what to remove.
func consulDocument(service, config string) string {
	doc := fmt.Sprintf("apiVersion: %s\nkind: %s\nmetadata: {name: bench-%s, namespace: %s}\n", filter.APIVersion, filter.Kind, service, shop)
	if config == "" {
		return doc
	}
	return doc + fmt.Sprintf("spec:\n  mesh: consul\n  target: {kind: Service, name: %s}\n  module: {builtin: ratelimit}\n  config: %s\n", service, config)
}

// byEntry changes the same by what `consul config write` comes to: one PUT of the entry. Starting consul is not counted.
type byEntry struct {
	*consultest.Consul
	modules string
}

func (byEntry) addr() string                          { return "" }
func (byEntry) prepare(context.Context, string) error { return nil }
func (e byEntry) put(ctx context.Context, service string, _ int, config string) error {
	entry, err := e.content(service, config)
	if err != nil {
		return err
	}
	return e.Write(ctx, entry)
}

// content is what the adapter makes of the service's entry.
func (e byEntry) content(service, config string) (map[string]any, error) {
	entry := map[string]any{"Kind": "service-defaults", "Name": service, "Protocol": "http"}
	if config == "" {
		return entry, nil
	}
	read, err := filter.Read([]byte(consulDocument(service, config)), shop)
	if err != nil {
		return nil, err
	}
	f, err := mesh.Consul{}.Complete(read[0])
	if err != nil {
		return nil, err
	}
	module, _ := filters.Builtin("ratelimit")
	sum := sha256.Sum256(module)
	f.Spec.Module.SHA256 = hex.EncodeToString(sum[:])
	theirs := plan.Object{Content: map[string]any{"apiVersion": "consul.hashicorp.com/v1alpha1", "kind": "ServiceDefaults",
		"metadata": map[string]any{"name": service, "namespace": shop}, "spec": map[string]any{"protocol": "http"}}}
	p, err := mesh.Consul{}.Plan(filter.Chain{Mesh: "consul", Target: f.Spec.Target}.With(f), plan.World{
		Modules: map[string]plan.Code{f.Spec.Module.SHA256: {Path: filepath.Join(e.modules, f.Spec.Module.SHA256+".wasm")}},
		Cluster: plan.Cluster{Objects: []plan.Object{theirs}}})
	if err != nil {
		return nil, err
	}
	if len(p.Objects) != 1 {
		return nil, fmt.Errorf("the plan has %d entries", len(p.Objects))
	}
	extensions, _, err := unstructured.NestedSlice(p.Objects[0].Content, "spec", "envoyExtensions")
	entry["EnvoyExtensions"] = extensions
	return entry, err
}

// sameEntries makes sure that both ways had Consul keep the same.
func (e byEntry) sameEntries(ctx context.Context) error {
	var texts [2][]byte
	for i, service := range []string{throughService, besideService} {
		entry, err := e.Entry(ctx, "service-defaults", service)
		if err != nil {
			return err
		}
		if texts[i], err = json.Marshal(entry); err != nil {
			return err
		}
	}
	if want := bytes.ReplaceAll(texts[1], []byte(besideService), []byte(throughService)); !bytes.Equal(texts[0], want) {
		return fmt.Errorf("Consul keeps %s and not %s", texts[0], want)
	}
	return nil
}

// measureConsul changes filters of sidecars of a real Consul through the adapter, and by writing the same entries.
func (b *bench) measureConsul(ctx context.Context) (err error) {
	b.say("starting Consul and three sidecars")
	c, err := consultest.Start(ctx, filepath.Join(b.dir, "consul"), consultest.Options{})
	if err != nil {
		return err
	}
	defer c.Stop()
	entries := byEntry{c, filepath.Join(b.dir, "consul-modules")}
	listeners, admin, err := b.startServices(ctx, entries)
	if err != nil {
		return err
	}
	a, _, err := startAdapter(ctx, b.program, b.state(), "--consul-addr", c.Addr, "--consul-local-path", entries.modules, "--consul-admin", admin)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, a.stop()) }()

	type turn struct {
		plane
		service string
	}
	through, beside := turn{throughConsul{a}, throughService}, turn{entries, besideService}
	times := map[turn][]series{through: make([]series, len(changes)), beside: make([]series, len(changes))}
	for pair := range b.pairs + 1 {
		order := []turn{through, beside}
		if pair%2 == 1 {
			slices.Reverse(order)
		}
		b.say("changes on Consul, pair %d of %d (0 warms up)", pair, b.pairs)
		for i, step := range changes {
			for _, o := range order {
				effect, end, err := measureChange(ctx, o, o.service, []*proxy{{listener: listeners[o.service]}}, step)
				if err != nil {
					return fmt.Errorf("%s, %s: %w", step.name, o.service, err)
				}
				if t := &times[o][i]; pair > 0 {
					t.effect, t.end = append(t.effect, ms(effect)), append(t.end, ms(end))
				}
			}
			if err := entries.sameEntries(ctx); err != nil {
				return fmt.Errorf("%s: %w", step.name, err)
			}
		}
	}
	s := section{Title: "Change a filter in a sidecar of a real Consul: until it answers new connections accordingly, and until its end is known",
		Columns: []string{"", "adapter", "bare PUT", "difference", "adapter, last event", "answered"}}
	most := figure{}
	for i, step := range changes {
		x, y := times[through][i], times[beside][i]
		share := figureOf("ms", combine(x.effect, y.effect, minus))
		if i == 0 || share.Median > most.Median {
			most = share
		}
		s.add(step.name, figureOf("ms", x.effect), figureOf("ms", y.effect), share, figureOf("ms", x.end), figureOf("ms", y.end))
	}
	b.report.Sections = append(b.report.Sections, s)
	b.verdict("the adapter's own share of a change on Consul", most, shareBar)
	b.note("beside the adapter on Consul stands the one PUT that `consul config write` makes for the same entry; consul's start is left out")
	return nil
}

// startServices runs the two services and one that calls them, and returns where its sidecar takes requests for each, and
// the admin address of the sidecar that the adapter changes.
func (b *bench) startServices(ctx context.Context, e byEntry) (listeners map[string]string, admin string, err error) {
	if err := os.Mkdir(e.modules, 0o755); err != nil {
		return nil, "", err
	}
	module, ok := filters.Builtin("ratelimit")
	if !ok {
		return nil, "", errors.New("there is no built-in ratelimit")
	}
	if err := os.WriteFile(filepath.Join(e.modules, fmt.Sprintf("%x.wasm", sha256.Sum256(module))), module, 0o644); err != nil {
		return nil, "", err
	}
	services := []string{throughService, besideService}
	for _, service := range services {
		allow := map[string]any{"Kind": "service-intentions", "Name": service, "Sources": []any{map[string]any{"Name": "web", "Action": "allow"}}}
		if err := errors.Join(e.put(ctx, service, 1, ""), e.Write(ctx, allow)); err != nil {
			return nil, "", err
		}
		s, err := e.Service(ctx, consultest.ServiceOptions{Name: service})
		if err != nil {
			return nil, "", err
		}
		if service == throughService {
			admin = s.Envoy.AdminAddr()
		}
	}
	web, err := e.Service(ctx, consultest.ServiceOptions{Name: "web", Upstreams: services})
	if err != nil {
		return nil, "", err
	}
	listeners = map[string]string{}
	for _, service := range services {
		listeners[service] = strings.TrimPrefix(web.Upstreams[service], "http://")
	}
	// What was just registered goes on changing the sidecars for a moment.
	begun := time.Now()
	for good := begun; time.Since(good) < 2*time.Second; {
		for _, service := range services {
			status, err := get(listeners[service], "/")
			if err == nil && status == http.StatusOK {
				continue
			}
			if good = time.Now(); good.Sub(begun) > time.Minute {
				return nil, "", fmt.Errorf("%s is not reached through the sidecars, status %d: %w", service, status, errors.Join(err, context.DeadlineExceeded))
			}
		}
		if err := pause(ctx, time.Millisecond); err != nil {
			return nil, "", err
		}
	}
	return listeners, admin, nil
}
