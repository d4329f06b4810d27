package server_test

import (
	"context"
	"io"
	"log/slog"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/meshery/meshery-filters/internal/event"
	"github.com/meshery/meshery-filters/internal/operation"
	"github.com/meshery/meshery-filters/internal/problem"
	"github.com/meshery/meshery-filters/internal/server"
	"github.com/meshery/meshery-filters/internal/store"
)

// startRunner serves the real Runner, which drives no mesh.
func startRunner(t *testing.T) *fixture {
	t.Helper()
	hub, log := event.NewHub(0, 0), slog.New(slog.DiscardHandler)
	kept, err := store.Open(t.Context(), store.Options{StateDir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { kept.Close() })
	events, err := event.NewLog(t.Context(), kept.Log(), hub)
	if err != nil {
		t.Fatal(err)
	}
	runner, err := operation.NewRunner(operation.Options{Queue: kept.Queue(), Events: events, Component: component, Workers: 2, Log: log})
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- runner.Run(ctx) }()
	t.Cleanup(func() {
		stop()
		if err := <-ended; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	f := start(t, func(o *server.Options) { o.Operations, o.Events = runner, hub })
	f.hub = hub
	return f
}

func TestAnOperationOfTheRealRunnerTellsItsStoryOnBothServices(t *testing.T) {
	f := startRunner(t)
	all := follow(t, f.conn, meshService+"StreamEvents")
	id := mustCall(t, f.conn, meshService+"ApplyOperation", text(1, "filters_status"), text(2, "default"), text(3, "meshery")).text(2)
	if id == "" {
		t.Fatal("no operation id was made up")
	}
	got := all.next(t)
	if got.text(4) != id || got.number(1) != uint64(event.Info) || got.text(2) != "No filter is applied" || got.text(8) != component || got.text(9) != "meshery-filters" {
		t.Errorf("StreamEvents gave %v", got)
	}
	one := follow(t, f.conn, filterService+"Watch", text(1, id))
	e := one.next(t).messages(t, 2)[0]
	if e.text(1) != id || e.number(2) != 1 || e.number(12) != 1 || len(e[3]) != 1 {
		t.Errorf("Watch gave %v", e)
	}
	if err := one.fails(t); err != io.EOF {
		t.Errorf("the watch ended with %v, want OK", err)
	}
}

func TestTheRealRunnerRefusesThroughTheEdge(t *testing.T) {
	f := startRunner(t)
	listed := map[string]bool{}
	for _, op := range mustCall(t, f.conn, meshService+"SupportedOperations").messages(t, 1) {
		listed[op.text(1)] = true
	}
	if !listed["custom"] || !listed["filters_status"] || !listed["meshery-filters"] {
		t.Errorf("SupportedOperations lists %v", listed)
	}
	const twoMistakes = "apiVersion: filters.meshery.io/v1alpha1\nkind: Filter\nmetadata: {name: x}\nspec: {phase: never, module: {builtin: ratelimit}, nope: 1}\n"
	for _, c := range []struct {
		reason  string
		request raw
		want    *problem.Kind
		says    []string
	}{
		{"an unknown key", text(1, "nope"), problem.UnknownOperation, []string{"nope"}},
		{"a key over a mile long", text(1, strings.Repeat("n", 1<<20)), problem.UnknownOperation, nil},
		{"no key", nil, problem.UnknownOperation, nil},
		{"no body", text(1, "apply_filter"), problem.BodyMissing, []string{"apply_filter"}},
		{"a body of two mistakes", join(text(1, "custom"), text(4, twoMistakes)), problem.InvalidDocument, []string{"spec.phase", "spec.nope"}},
		{"a body that is no YAML", join(text(1, "custom"), text(4, "{")), problem.InvalidDocument, nil},
		{"delete where there is nothing to", join(text(1, "filters_status"), number(5, 1)), problem.DeleteRefused, []string{"filters_status"}},
		{"an id with a blank", join(text(1, "filters_status"), text(6, "a b")), problem.InvalidRequest, []string{"operation_id"}},
		{"an id of 129 characters", join(text(1, "filters_status"), text(6, strings.Repeat("a", 129))), problem.InvalidRequest, []string{"operation_id"}},
		{"three bad fields at once", join(text(1, "filters_status"), text(2, "No Namespace"), text(3, strings.Repeat("u", 300)), text(6, "é")),
			problem.InvalidRequest, []string{"operation_id", "namespace", "username"}},
	} {
		_, err := call(t, f.conn, meshService+"ApplyOperation", c.request)
		st := status.Convert(err)
		if st.Code() != c.want.Status || !strings.Contains(st.Message(), c.want.Code) {
			t.Errorf("%s: %v, want %s", c.reason, err, c.want.Code)
		}
		for _, part := range c.says {
			if !strings.Contains(st.Message(), part) {
				t.Errorf("%s: the text lacks %q: %s", c.reason, part, st.Message())
			}
		}
		if len(st.Message()) > 4<<10 {
			t.Errorf("%s: a text of %d bytes", c.reason, len(st.Message()))
		}
	}
	for reason, request := range map[string]raw{"an unknown key": text(1, "nope"), "no body": text(1, "apply_filter")} {
		if _, err := call(t, f.conn, filterService+"Plan", request); status.Code(err) != codes.InvalidArgument {
			t.Errorf("Plan, %s: %v", reason, err)
		}
	}
}

func TestTheSameIDRunsOnceAndAnotherRequestMayNotTakeIt(t *testing.T) {
	f := startRunner(t)
	for range 2 {
		if got := mustCall(t, f.conn, meshService+"ApplyOperation", text(1, "filters_status"), text(6, "twice")).text(2); got != "twice" {
			t.Errorf("the id is %q", got)
		}
	}
	_, err := call(t, f.conn, meshService+"ApplyOperation", text(1, "filters_status"), text(2, "elsewhere"), text(6, "twice"))
	if status.Code(err) != codes.AlreadyExists {
		t.Errorf("%v, want AlreadyExists", err)
	}
}
