// Command library is the least adapter that the adapter library's own runtime makes, to be measured beside this project's.
// It is a module of its own, since that runtime brings a hundred and sixty modules with it.
//
// Its one operation tells as many events as its body says, each with the time in nanoseconds as its details, and does
// nothing else.
package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"strconv"
	"time"

	"github.com/layer5io/meshery-adapter-library/adapter"
	"github.com/layer5io/meshery-adapter-library/api/grpc"
	"github.com/layer5io/meshery-adapter-library/config/provider"
	"github.com/layer5io/meshery-adapter-library/meshes"
	"github.com/layer5io/meshkit/logger"
	"github.com/layer5io/meshkit/utils/events"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "library:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) != 1 {
		return fmt.Errorf("usage: library PORT")
	}
	conf, err := provider.NewInMem(provider.Options{
		ServerConfig: map[string]string{"name": "library", "type": "adapter", "version": "none"},
		MeshSpec:     map[string]string{"name": "library"},
		Operations:   adapter.Operations{"tell": {Type: int32(meshes.OpCategory_CUSTOM), Description: "tell events"}},
	})
	if err != nil {
		return err
	}
	log, err := logger.New("library", logger.Options{Output: io.Discard})
	if err != nil {
		return err
	}
	streamer := events.NewEventStreamer()
	return grpc.Start(&grpc.Service{Name: "library", Port: args[0], StartedAt: time.Now(), EventStreamer: streamer,
		Handler: &teller{adapter.Adapter{Config: conf, Log: log, EventStreamer: streamer}}})
}

type teller struct{ adapter.Adapter }

func (t *teller) ApplyOperation(_ context.Context, q adapter.OperationRequest) error {
	n, err := strconv.Atoi(q.CustomBody)
	if err != nil {
		return fmt.Errorf("the body is no number of events: %w", err)
	}
	for i := range n {
		t.StreamInfo(&meshes.EventsResponse{OperationId: q.OperationID, Summary: fmt.Sprintf("event %d of %d", i+1, n),
			Details: strconv.FormatInt(time.Now().UnixNano(), 10), Component: "library"})
	}
	return nil
}

func (t *teller) ProcessOAM(context.Context, adapter.OAMRequest) (string, error) { return "", nil }
