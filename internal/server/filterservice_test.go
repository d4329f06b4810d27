package server_test

import (
	"context"
	"io"
	"reflect"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/meshery/meshery-filters/internal/event"
	"github.com/meshery/meshery-filters/internal/filter"
	"github.com/meshery/meshery-filters/internal/operation"
	"github.com/meshery/meshery-filters/internal/plan"
	"github.com/meshery/meshery-filters/internal/problem"
	"github.com/meshery/meshery-filters/internal/server"
)

func TestListShowsChainsInOrderWithTheirProxies(t *testing.T) {
	f := start(t)
	chain := func(group string, filters ...filter.Filter) filter.Chain {
		return filter.Chain{Mesh: "envoy", Target: filter.Target{Kind: filter.ProxyGroup, Name: group}, Filters: filters}
	}
	f.ops.list = func(context.Context) ([]operation.Status, error) {
		return []operation.Status{
			{Chain: chain("web"), Version: "v9", Problem: "no such secret"},
			{Version: "v7", Chain: chain("edge",
				filter.Filter{Key: filter.Key{Namespace: "shop", Name: "limit"}, Labels: map[string]string{"team": "a"},
					Spec: filter.Spec{Module: filter.Module{Builtin: "ratelimit", SHA256: "3f2a"}, Phase: filter.Authz, Priority: -5, FailurePolicy: filter.FailClosed}},
				filter.Filter{Key: filter.Key{Namespace: "shop", Name: "own"}, Spec: filter.Spec{Module: filter.Module{SHA256: "77aa"}}}),
				Loaded: plan.Loaded{Proxies: []plan.ProxyStatus{
					{Proxy: plan.Proxy{ID: "a", Version: "1.40.0"}, State: plan.Running, Expected: true},
					{Proxy: plan.Proxy{ID: "b"}, State: plan.Rejected, Detail: "no such field \xff"}}}},
		}, nil
	}
	want := decode(t, join(
		nested(1, text(1, "envoy"), nested(2, text(1, "ProxyGroup"), text(3, "edge"), text(6, "ProxyGroup edge")), text(3, "v7"),
			nested(4, text(1, "shop"), text(2, "limit"), nested(3, text(1, "team"), text(2, "a")), text(4, "builtin ratelimit"),
				text(5, "3f2a"), text(6, "authz"), number(7, ^uint64(4)), text(8, "closed")),
			nested(4, text(1, "shop"), text(2, "own"), text(4, "inline"), text(5, "77aa")),
			nested(5, text(1, "a"), text(2, "1.40.0"), text(3, "running"), number(4, 1)),
			nested(5, text(1, "b"), text(3, "rejected"), text(5, "no such field \uFFFD"))),
		nested(1, text(1, "envoy"), nested(2, text(1, "ProxyGroup"), text(3, "web"), text(6, "ProxyGroup web")), text(3, "v9"), text(6, "no such secret"))))
	if got := mustCall(t, f.conn, filterService+"List"); got.String() != want.String() {
		t.Errorf("List answered\n%v, want\n%v", got, want)
	}
}

func TestPlanAsksForTheOperationAndShowsWhatItWouldDo(t *testing.T) {
	f := start(t)
	f.ops.plan = func(context.Context, operation.Request) ([]operation.Preview, error) {
		return []operation.Preview{{Target: filter.Target{Kind: filter.ProxyGroup, Name: "edge"}, Mesh: "envoy", Version: "v7",
			Order: []string{"shop/a", "shop/b"}, YAML: "name: x\n",
			Losses: []plan.Loss{{Filter: filter.Key{Namespace: "shop", Name: "a"}, Field: "spec.force", Reason: "no owner"}}}}, nil
	}
	got := mustCall(t, f.conn, filterService+"Plan", text(1, "apply_filter"), text(2, "shop"), text(3, "kind: Filter"), number(4, 1))
	want := decode(t, nested(1, text(1, "envoy"), text(2, "ProxyGroup edge"), text(3, "v7"), text(4, "shop/a"), text(4, "shop/b"),
		text(5, "name: x\n"), nested(6, text(1, "shop/a"), text(2, "spec.force"), text(3, "no owner"))))
	if got.String() != want.String() {
		t.Errorf("Plan answered %v, want %v", got, want)
	}
	request := operation.Request{Operation: "apply_filter", Namespace: "shop", Body: "kind: Filter", Delete: true}
	asked := f.ops.last(t)
	request.Caller = asked.Caller // which has a test of its own
	if !reflect.DeepEqual(asked, request) {
		t.Errorf("the request is %+v, want %+v", asked, request)
	}
}

func TestWatchFollowsOneOperationToItsEnd(t *testing.T) {
	f := start(t)
	at := time.Date(2026, 7, 1, 12, 0, 0, 500, time.UTC)
	emit(t, f.hub, event.Event{Operation: "mine", Sequence: 1, Time: at, Summary: "first"})
	emit(t, f.hub, event.Event{Operation: "other", Sequence: 1, Summary: "not mine", Last: true})
	events := follow(t, f.conn, filterService+"Watch", text(1, "mine"))
	emit(t, f.hub, event.Event{Operation: "mine", Sequence: 2, Time: at, Type: event.Error, Summary: "second", Details: "d", Code: "c", Cause: "pc", Remedy: "sr", Last: true})
	for i, want := range []raw{
		join(text(1, "mine"), number(2, 1), nested(3, number(1, uint64(at.Unix())), number(2, 500)), text(5, "first"),
			text(10, component), text(11, "meshery-filters")),
		join(text(1, "mine"), number(2, 2), nested(3, number(1, uint64(at.Unix())), number(2, 500)), number(4, 2), text(5, "second"),
			text(6, "d"), text(7, "c"), text(8, "pc"), text(9, "sr"), text(10, component), text(11, "meshery-filters"), number(12, 1)),
	} {
		got := events.next(t)
		if e := got.messages(t, 2)[0]; e.String() != decode(t, want).String() {
			t.Errorf("event %d is %v, want %v", i, e, decode(t, want))
		}
		if got.text(1) == "" {
			t.Errorf("event %d has no cursor", i)
		}
	}
	if err := events.fails(t); err != io.EOF {
		t.Errorf("the watch ended with %v, want OK", err)
	}
}

func TestWatchContinuesBehindACursor(t *testing.T) {
	f := start(t)
	for i := range 5 {
		emit(t, f.hub, event.Event{Operation: "op", Summary: numbered("step", i)})
	}
	first := follow(t, f.conn, filterService+"Watch")
	first.next(t)
	cursor := first.next(t).text(1)
	first.close()
	again := follow(t, f.conn, filterService+"Watch", text(2, cursor))
	for i := 2; i < 5; i++ {
		if got := again.next(t).messages(t, 2)[0].text(5); got != numbered("step", i) {
			t.Errorf("behind the cursor comes %q, want %q", got, numbered("step", i))
		}
	}
	now := follow(t, f.conn, filterService+"Watch", number(3, 1))
	emit(t, f.hub, event.Event{Operation: "op", Summary: "new"})
	if got := now.next(t).messages(t, 2)[0].text(5); got != "new" {
		t.Errorf("from now on comes %q, want the new event", got)
	}
}

func TestWatchSaysWhenEventsWereSkipped(t *testing.T) {
	hub := event.NewHub(2, 0)
	f := start(t, func(o *server.Options) { o.Events = hub })
	emit(t, hub, event.Event{Operation: "op", Summary: "0"})
	first := follow(t, f.conn, filterService+"Watch")
	cursor := first.next(t).text(1)
	first.close()
	for range 5 {
		emit(t, hub, event.Event{Operation: "op", Summary: "more"})
	}
	other := start(t)
	for reason, c := range map[string]struct {
		f      *fixture
		cursor string
	}{
		"the hub let go of what follows the cursor":   {f, cursor},
		"the cursor is of an adapter that ran before": {other, cursor},
	} {
		err := open(t, c.f.conn, filterService+"Watch", text(2, c.cursor)).fails(t)
		if status.Code(err) != codes.ResourceExhausted || status.Convert(err).Message() == "" {
			t.Errorf("%s: %v, want %s", reason, err, problem.EventsMissed.Code)
		}
	}
}

func TestASurveyCarriesWhatNothingExplains(t *testing.T) {
	f := start(t)
	s := mustCall(t, f.conn, filterService+"Survey")
	if s.number(2) != 3 || s.number(3) != 2 || s.text(4) != "one is silent" || s.text(5) != "/opt/a.wasm" {
		t.Errorf("%v", s)
	}
	if o := s.messages(t, 1)[0]; o.text(1) != "api at 127.0.0.1:19000" || o.text(2) != "f" || o.text(3) != "a" || o.text(4) != "inline" {
		t.Errorf("orphan %v", o)
	}
}

func TestHistoryCarriesWhatAFilterWas(t *testing.T) {
	f := start(t)
	revisions := mustCall(t, f.conn, filterService+"History", text(1, "shop"), text(2, "audit")).messages(t, 1)
	if len(revisions) != 1 {
		t.Fatalf("%d revisions", len(revisions))
	}
	r := revisions[0]
	if r.number(1) != 7 || r.text(3) != "changed" || r.messages(t, 4)[0].text(6) != "ProxyGroup edge" {
		t.Errorf("revision %v", r)
	}
	if was := r.messages(t, 5)[0]; was.text(1) != "shop" || was.text(2) != "audit" || was.number(7) != 3 {
		t.Errorf("filter %v", was)
	}
	if _, err := call(t, f.conn, filterService+"History", text(2, "none")); status.Code(err) != codes.NotFound {
		t.Errorf("of a filter that is none: %v", err)
	}
}
