package main

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"github.com/layer5io/meshery-adapter-library/meshes"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/meshery/meshery-filters/internal/server/filterspb"
)

// adapter is the program as a process of its own.
type adapter struct {
	process
	conn      *grpc.ClientConn
	addresses struct{ GRPC, XDS, HTTP string }
}

// startAdapter returns once the adapter is ready, and how long that took.
func startAdapter(ctx context.Context, program, state string, args ...string) (a *adapter, took time.Duration, err error) {
	args = append([]string{"serve", "--grpc-addr", "127.0.0.1:0", "--xds-addr", "127.0.0.1:0", "--http-addr", "127.0.0.1:0", "--state-dir", state}, args...)
	began := time.Now()
	a = &adapter{}
	if a.process, err = startProcess(exec.Command(program, args...), state+".log"); err != nil {
		return nil, 0, err
	}
	err = a.ready(ctx, state)
	took = time.Since(began)
	if err == nil {
		a.conn, err = grpc.NewClient("passthrough:///"+a.addresses.GRPC, grpc.WithTransportCredentials(insecure.NewCredentials()))
	}
	if err != nil {
		return nil, 0, a.failed(err)
	}
	return a, took, nil
}

// ready waits for addresses.json and for /readyz to answer ok.
func (a *adapter) ready(ctx context.Context, state string) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	for {
		data, err := os.ReadFile(filepath.Join(state, "addresses.json"))
		if err == nil {
			if err := json.Unmarshal(data, &a.addresses); err != nil {
				return err
			}
			if status, err := get(a.addresses.HTTP, "/readyz"); err == nil && status == http.StatusOK {
				return nil
			}
		}
		if pause(ctx, time.Millisecond) != nil {
			return errors.New("the adapter does not get ready")
		}
	}
}

func (a *adapter) addr() string               { return a.addresses.XDS }
func (a *adapter) grpcConn() *grpc.ClientConn { return a.conn }

func (a *adapter) stop() error {
	if a.conn != nil {
		a.conn.Close()
	}
	return a.interrupt()
}

// prepare has nothing to do: a group that nobody put anything on has an empty chain.
func (a *adapter) prepare(context.Context, string) error { return nil }

// put makes the limiter all that the group runs.
func (a *adapter) put(ctx context.Context, group string, _ int, config string) error {
	operation := "apply_filter"
	if config == "" {
		operation = "remove_filter"
	}
	return a.operate(ctx, operation, document(group, config))
}

// operate sends an operation as Meshery does, and follows it to its last event.
func (a *adapter) operate(ctx context.Context, operation, body string) error {
	_, err := a.story(ctx, operation, body)
	return err
}

// story returns what an operation, in the clusters of the kubeconfigs if there are any, tells when it succeeds.
func (a *adapter) story(ctx context.Context, operation, body string, kubeconfigs ...string) (told []*filterspb.Event, err error) {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	id := "bench-" + rand.Text()
	if _, err := meshes.NewMeshServiceClient(a.conn).ApplyOperation(ctx, &meshes.ApplyRuleRequest{OpName: operation, OperationId: id, CustomBody: body, KubeConfigs: kubeconfigs}); err != nil {
		return nil, err
	}
	stream, err := filterspb.NewFilterServiceClient(a.conn).Watch(ctx, &filterspb.WatchRequest{OperationId: id})
	if err != nil {
		return nil, err
	}
	for {
		r, err := stream.Recv()
		if err != nil {
			return nil, err
		}
		e := r.GetEvent()
		told = append(told, e)
		switch {
		case e.GetLast() && e.GetType() == filterspb.Event_ERROR:
			return nil, fmt.Errorf("%s failed: %s: %s", operation, e.GetSummary(), e.GetDetails())
		case e.GetLast():
			return told, nil
		}
	}
}
