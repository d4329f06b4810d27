package consul

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/meshery/meshery-filters/build/controlplanes/consultest"
	"github.com/meshery/meshery-filters/internal/filter"
)

// shared is the one Consul of this package's tests, which the first of them starts. No proxy is behind it.
var shared struct {
	dir    string
	consul *consultest.Consul
}

var startConsul = sync.OnceValues(func() (_ *consultest.Consul, err error) {
	if shared.dir, err = os.MkdirTemp("", "consul"); err != nil {
		return nil, err
	}
	shared.consul, err = consultest.Start(context.Background(), filepath.Join(shared.dir, "consul"), consultest.Options{})
	return shared.consul, err
})

func TestMain(m *testing.M) {
	code := m.Run()
	if shared.consul != nil {
		shared.consul.Stop()
	}
	if shared.dir != "" {
		os.RemoveAll(shared.dir)
	}
	os.Exit(code)
}

// newClient is a client of the shared Consul, where nothing is kept before a test and after it.
func newClient(t *testing.T, change ...func(*Options)) *Client {
	t.Helper()
	if testing.Short() {
		t.Skip("starts Consul")
	}
	s, err := startConsul()
	if err != nil {
		t.Fatal(err)
	}
	o := Options{Addr: s.Addr, Log: slog.New(slog.DiscardHandler)}
	for _, f := range change {
		f(&o)
	}
	c, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		c.Close()
		if err := s.Send(context.Background(), "DELETE", "/v1/kv/"+prefix+"?recurse=true", nil, nil); err != nil {
			t.Error(err)
		}
	})
	return c
}

// on is a target by its name, with one filter that has so much configuration.
func on(name string, config int) inventory {
	c := filter.Chain{Mesh: "consul", Target: filter.Target{Kind: filter.Service, Namespace: "default", Name: name}}
	c.Filters = []filter.Filter{{Key: filter.Key{Namespace: "default", Name: "f"}}}
	c.Filters[0].Spec.Config = filter.Value{V: fmt.Sprintf("%0*d", config, 0)}
	return inventory{Target: c.Target.String(), Chain: c, Version: "1", Entries: []string{"service-defaults/" + name}, Plugins: []string{plugins + "default.f"}}
}
