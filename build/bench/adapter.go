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
	cmd       *exec.Cmd
	ended     chan error
	conn      *grpc.ClientConn
	addresses struct{ GRPC, XDS, HTTP string }
}

// startAdapter returns once the adapter is ready, and how long that took.
func startAdapter(ctx context.Context, program, state string) (a *adapter, took time.Duration, err error) {
	log, err := os.Create(state + ".log")
	if err != nil {
		return nil, 0, err
	}
	defer log.Close()
	cmd := exec.Command(program, "serve", "--grpc-addr", "127.0.0.1:0", "--xds-addr", "127.0.0.1:0", "--http-addr", "127.0.0.1:0", "--state-dir", state)
	cmd.Env = []string{"HOME=" + os.Getenv("HOME")} // the user's own settings would change the figures
	cmd.Stdout, cmd.Stderr = log, log
	a = &adapter{cmd: cmd, ended: make(chan error, 1)}
	began := time.Now()
	if err := cmd.Start(); err != nil {
		return nil, 0, err
	}
	go func() { a.ended <- cmd.Wait() }()
	err = a.ready(ctx, state)
	took = time.Since(began)
	if err == nil {
		a.conn, err = grpc.NewClient("passthrough:///"+a.addresses.GRPC, grpc.WithTransportCredentials(insecure.NewCredentials()))
	}
	if err != nil {
		text, _ := os.ReadFile(log.Name())
		return nil, 0, errors.Join(fmt.Errorf("%w; its log:\n%s", err, text), a.stop())
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

func (a *adapter) pid() int     { return a.cmd.Process.Pid }
func (a *adapter) addr() string { return a.addresses.XDS }

func (a *adapter) stop() error {
	if a.conn != nil {
		a.conn.Close()
	}
	_ = a.cmd.Process.Signal(os.Interrupt)
	select {
	case err := <-a.ended:
		if err != nil {
			return fmt.Errorf("the adapter ended: %w", err)
		}
		return nil
	case <-time.After(20 * time.Second):
		_ = a.cmd.Process.Kill()
		<-a.ended
		return errors.New("the adapter does not stop")
	}
}

// prepare has nothing to do: a group that nobody put anything on has an empty chain.
func (a *adapter) prepare(context.Context, string) error { return nil }

// put sends the operation as Meshery does, and follows it to its last event.
func (a *adapter) put(ctx context.Context, group string, _ int, config string) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	operation, id := "apply_filter", "bench-"+rand.Text()
	if config == "" {
		operation = "remove_filter"
	}
	_, err := meshes.NewMeshServiceClient(a.conn).ApplyOperation(ctx,
		&meshes.ApplyRuleRequest{OpName: operation, OperationId: id, CustomBody: document(group, config)})
	if err != nil {
		return err
	}
	stream, err := filterspb.NewFilterServiceClient(a.conn).Watch(ctx, &filterspb.WatchRequest{OperationId: id})
	if err != nil {
		return err
	}
	for {
		r, err := stream.Recv()
		if err != nil {
			return err
		}
		switch e := r.GetEvent(); {
		case e.GetLast() && e.GetType() == filterspb.Event_ERROR:
			return fmt.Errorf("%s failed: %s: %s", operation, e.GetSummary(), e.GetDetails())
		case e.GetLast():
			return nil
		}
	}
}
