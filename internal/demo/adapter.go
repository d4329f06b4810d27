package demo

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/layer5io/meshery-adapter-library/meshes"
	"github.com/nats-io/nats.go"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/meshery/meshery-filters/internal/event"
	"github.com/meshery/meshery-filters/internal/server/filterspb"
)

const (
	startTimeout = 20 * time.Second // of a part
	callTimeout  = 30 * time.Second
	maxReply     = 32 << 20 // bytes
)

// Addresses are where the adapter listens, host:port but for NATS, as `serve` writes them into its state directory.
type Addresses struct{ GRPC, XDS, HTTP, NATS string }

// adapter is a connection to one.
type adapter struct {
	conn    *grpc.ClientConn
	meshes  meshes.MeshServiceClient
	filters filterspb.FilterServiceClient
}

// StartAdapter runs an adapter on free ports, with more flags, until it is ready, and listens to its events.
func (d *Demo) StartAdapter(ctx context.Context, flags ...string) error {
	state := filepath.Join(d.Dir, "state")
	pid, err := d.Start(ctx, "adapter", func([]byte) error {
		data, err := os.ReadFile(filepath.Join(state, "addresses.json"))
		if err != nil {
			return err
		}
		return json.Unmarshal(data, &d.Addresses)
	}, append([]string{"serve", "--grpc-addr", "127.0.0.1:0", "--xds-addr", "127.0.0.1:0", "--http-addr", "127.0.0.1:0",
		"--nats-listen", "127.0.0.1:0", "--state-dir", state}, flags...)...)
	if err != nil {
		return err
	}
	at := d.Addresses
	fmt.Fprintf(d.Out, "    PID %d: gRPC %s, xDS %s, NATS %s\n", pid, at.GRPC, at.XDS, at.NATS)
	conn, err := grpc.NewClient("passthrough:///"+at.GRPC, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxReply)))
	if err != nil {
		return err
	}
	d.adapter = adapter{conn, meshes.NewMeshServiceClient(conn), filterspb.NewFilterServiceClient(conn)}
	return d.listen()
}

// Start runs a command of the program until ready, which gets what it has written so far, gives no error. It ends with the
// demo, and when it ends before that, so does the demo.
func (d *Demo) Start(ctx context.Context, name string, ready func(log []byte) error, args ...string) (pid int, err error) {
	log, err := os.Create(filepath.Join(d.Dir, name+".log"))
	if err != nil {
		return 0, err
	}
	cmd := exec.CommandContext(d.running, d.Program, args...)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.WaitDelay = 20 * time.Second
	if err := cmd.Start(); err != nil {
		return 0, errors.Join(fmt.Errorf("start the %s: %w", name, err), log.Close())
	}
	failed := func(what string, err error) error {
		text, _ := os.ReadFile(log.Name())
		return fmt.Errorf("the %s %s: %w\n%s", name, what, err, lastLines(text, 20))
	}
	ended := make(chan struct{})
	d.parts.Go(func() error {
		defer log.Close()
		defer close(ended)
		if err := cmd.Wait(); err != nil && d.running.Err() == nil {
			return failed("ended", err)
		}
		return nil
	})
	err = poll(ctx, startTimeout, func() error {
		select {
		case <-ended:
			return errors.New("it ended")
		default:
		}
		text, err := os.ReadFile(log.Name())
		if err != nil {
			return err
		}
		return ready(text)
	})
	if err != nil {
		return 0, failed("is not ready", err)
	}
	return cmd.Process.Pid, nil
}

// listen prints and keeps every event from gRPC and from NATS.
func (d *Demo) listen() error {
	ctx := d.running
	nc, err := nats.Connect(d.Addresses.NATS, nats.Name("meshery-filters demo"))
	if err != nil {
		return fmt.Errorf("connect to NATS: %w", err)
	}
	sub, err := nc.SubscribeSync(event.SubjectPrefix + ">")
	if err != nil {
		nc.Close()
		return fmt.Errorf("subscribe to NATS: %w", err)
	}
	if err := nc.FlushTimeout(5 * time.Second); err != nil {
		nc.Close()
		return fmt.Errorf("subscribe to NATS: %w", err)
	}
	d.parts.Go(func() error {
		defer nc.Close()
		for {
			m, err := sub.NextMsgWithContext(ctx)
			if err != nil {
				return ignoreCanceled(ctx.Err())
			}
			var envelope struct{ Object event.Event }
			if err := json.Unmarshal(m.Data, &envelope); err != nil {
				return fmt.Errorf("an event over NATS: %w", err)
			}
			e := envelope.Object
			d.hear(heardEvent{"NATS", e.Operation, meshes.EventType(e.Type).String(), e.Summary, e.Details, e.Code})
		}
	})
	stream, err := d.adapter.meshes.StreamEvents(ctx, &meshes.EventsRequest{})
	if err != nil {
		return fmt.Errorf("stream events: %w", err)
	}
	if _, err := stream.Header(); err != nil { // it comes when the adapter listens to this stream
		return fmt.Errorf("stream events: %w", err)
	}
	d.parts.Go(func() error {
		defer d.adapter.conn.Close()
		for {
			e, err := stream.Recv()
			if err != nil {
				if ctx.Err() != nil {
					return nil
				}
				return fmt.Errorf("stream events: %w", err)
			}
			d.hear(heardEvent{"gRPC", e.GetOperationId(), e.GetEventType().String(), e.GetSummary(), e.GetDetails(), e.GetErrorCode()})
		}
	})
	return nil
}

func (d *Demo) hear(e heardEvent) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.step != nil {
		d.step.Events = append(d.step.Events, e)
	}
	d.heard[e.Over+"\x00"+e.Operation+"\x00"+e.Summary]++
	fmt.Fprintf(d.Out, "    %s  %-5s %s\n", e.Over, e.Type, e.Summary)
}

// allHeard wants every event of the run to have come both ways.
func (d *Demo) allHeard(ctx context.Context) error {
	return poll(ctx, 5*time.Second, func() error {
		d.mu.Lock()
		defer d.mu.Unlock()
		var errs []error
		for key, n := range d.heard {
			over, rest, _ := strings.Cut(key, "\x00")
			other := map[string]string{"gRPC": "NATS", "NATS": "gRPC"}[over]
			if d.heard[other+"\x00"+rest] != n {
				_, summary, _ := strings.Cut(rest, "\x00")
				errs = append(errs, fmt.Errorf("%q came %d times over %s and not over %s", summary, n, over, other))
			}
		}
		if len(d.heard) == 0 {
			errs = append(errs, errors.New("no event came at all"))
		}
		return errors.Join(errs...)
	})
}

// Operate sends one operation as Meshery does and waits for its last event, which must be no failure.
func (d *Demo) Operate(ctx context.Context, key, body string) (*filterspb.Event, error) {
	last, err := d.end(ctx, key, body)
	if err == nil && last.GetType() == filterspb.Event_ERROR {
		err = fmt.Errorf("%s failed: %s [%s]\n%s", key, last.GetSummary(), last.GetErrorCode(), last.GetDetails())
	}
	return last, err
}

// end sends one operation and returns its last event.
func (d *Demo) end(ctx context.Context, key, body string) (*filterspb.Event, error) {
	id, place := "demo-"+rand.Text(), d.stage.Place()
	call, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	_, err := d.adapter.meshes.ApplyOperation(call, &meshes.ApplyRuleRequest{OpName: key, Username: "demo", Namespace: place.Namespace,
		CustomBody: body, OperationId: id, KubeConfigs: place.Kubeconfigs})
	if err != nil {
		return nil, refusal(key, err)
	}
	stream, err := d.adapter.filters.Watch(ctx, &filterspb.WatchRequest{OperationId: id})
	if err != nil {
		return nil, refusal(key, err)
	}
	for {
		r, err := stream.Recv()
		if err != nil {
			return nil, refusal(key, err)
		}
		if r.GetEvent().GetLast() {
			return r.GetEvent(), nil
		}
	}
}

func refusal(key string, err error) error {
	return fmt.Errorf("%s: %s: %s", key, status.Code(err), status.Convert(err).Message())
}

// refused sends the custom operation and wants it to end with that code.
func (d *Demo) refused(ctx context.Context, code, body string) error {
	last, err := d.end(ctx, "custom", body)
	if err != nil {
		return err
	}
	if last.GetType() != filterspb.Event_ERROR || last.GetErrorCode() != code {
		return fmt.Errorf("the operation ended with %q [%s], want a failure with %s", last.GetSummary(), last.GetErrorCode(), code)
	}
	fmt.Fprintf(d.Out, "    the reason: %s\n", strings.ReplaceAll(last.GetDetails(), "\n", "\n      "))
	return nil
}

// poll tries until there is no error, and returns the last one when the time is up.
func poll(ctx context.Context, limit time.Duration, try func() error) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		err := try()
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return err
		case <-tick.C:
		}
	}
}

func lastLines(data []byte, n int) string {
	all := strings.Split(strings.TrimSpace(string(data)), "\n")
	return strings.Join(all[max(0, len(all)-n):], "\n")
}
