package cli

import (
	"cmp"
	"context"
	"log/slog"
	"net"
	"os"
	"time"

	"github.com/meshery/meshery-filters/config"
	"github.com/meshery/meshery-filters/internal/meshery"
	"github.com/meshery/meshery-filters/internal/operation"
	"github.com/meshery/meshery-filters/internal/problem"
	"github.com/meshery/meshery-filters/internal/store"
	"github.com/meshery/meshery-filters/oam"
)

// mesheryAnswer bounds a request to Meshery Server. It is less than an adapter's claim to send events lasts, so that no
// other sends what is on its way.
const mesheryAnswer = 10 * time.Second

func mesheryClient(c config.Config) (*meshery.Client, error) {
	return meshery.New(meshery.Options{Server: c.MesheryServer, TokenFile: c.Meshery.TokenFile, Provider: c.Meshery.Provider, Timeout: mesheryAnswer})
}

// mesherySink sends events to Meshery Server.
func mesherySink(ctx context.Context, c config.Config, kept *store.Store, log *slog.Logger) (*meshery.Sink, error) {
	client, err := mesheryClient(c)
	if err != nil {
		return nil, err
	}
	return meshery.NewSink(ctx, meshery.SinkOptions{Client: client, Events: kept.Log(), Cursor: kept.Cursor("meshery " + c.MesheryServer), Log: log})
}

// mesheryRegistrar has Meshery Server know the adapter, which listens for gRPC at an address.
func mesheryRegistrar(c config.Config, listening net.Addr, component string, records store.Records, log *slog.Logger) (*meshery.Registrar, error) {
	client, err := mesheryClient(c)
	if err != nil {
		return nil, err
	}
	hostname, _ := os.Hostname()
	at, err := c.Callback(listening, cmp.Or(hostname, "localhost"))
	if err != nil {
		return nil, problem.InvalidConfiguration.New("meshery.adapterAddr: %w", err)
	}
	definitions, err := oam.Definitions(envoyVersions, at)
	if err != nil {
		return nil, err
	}
	return meshery.NewRegistrar(meshery.RegistrarOptions{Client: client, Definitions: definitions, Name: operation.ComponentName,
		Component: component, Addr: at, Records: records, Log: log})
}
