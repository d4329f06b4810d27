package server_test

import (
	"context"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"

	"github.com/meshery/meshery-filters/internal/event"
	"github.com/meshery/meshery-filters/internal/limit"
	"github.com/meshery/meshery-filters/internal/operation"
	"github.com/meshery/meshery-filters/internal/problem"
	"github.com/meshery/meshery-filters/internal/server"
)

// The two generations' forms of a component, and of a request with several.
func oamComponent(kind, name, settings string) string {
	return fmt.Sprintf(`{"kind":"Component","apiVersion":"core.oam.dev/v1alpha2","metadata":{"name":%q,"namespace":"shop","creationTimestamp":null},"spec":{"type":%q,"settings":%s,"parameters":null}}`, name, kind, settings)
}

func declaration(kind, name, settings string) string {
	return fmt.Sprintf(`{"displayName":%q,"component":{"kind":%q,"version":"filters.meshery.io/v1alpha1","schema":""},"configuration":{"metadata":{"namespace":"shop"},%s}`, name, kind, strings.TrimPrefix(settings, "{"))
}

type generation struct {
	method    string
	component func(kind, name, settings string) string
	request   func(remove bool, components ...string) raw
}

var generations = []generation{
	{"ProcessOAM", oamComponent, func(remove bool, components ...string) raw {
		request := join(text(1, "meshery"), text(4, `{"metadata":{"creationTimestamp":null},"spec":{"Components":null}}`), text(7, "config one"), text(7, "config two"))
		if remove {
			request = join(request, number(2, 1))
		}
		for _, c := range components {
			request = join(request, text(3, c))
		}
		return request
	}},
	{"Provision", declaration, func(remove bool, components ...string) raw {
		request := join(text(1, "meshery"), text(4, "config one"), text(4, "config two"))
		if remove {
			request = join(request, number(2, 1))
		}
		for _, c := range components {
			request = join(request, text(3, c))
		}
		return request
	}},
}

const hub, limiter, hello = `{"rateLimit":false}`, `{"module":{"builtin":"ratelimit"}}`, `{"module":{"builtin":"headers"}}`

var uuidForm = regexp.MustCompile(`^[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$`)

// ends has each operation end as soon as it is accepted: the n-th, from 0, with what the function gives.
func (f *fixture) ends(t *testing.T, end func(n int, q operation.Request) []event.Event) {
	n := 0
	f.ops.submit = func(_ context.Context, q operation.Request) (string, error) {
		for i, e := range end(n, q) {
			e.Operation, e.Sequence = q.ID, uint64(i+1)
			emit(t, f.hub, e)
		}
		n++
		return q.ID, nil
	}
}

func TestADesignIsDoneInOrderAndUndoneInReverse(t *testing.T) {
	for _, g := range generations {
		t.Run(g.method, func(t *testing.T) {
			f := start(t)
			f.ends(t, func(n int, q operation.Request) []event.Event {
				return []event.Event{{Summary: "begun"}, {Type: event.Warn, Summary: "watch out: for this", Details: "for this"}, {Type: event.Warn, Summary: "beware", Details: "of\nthis"},
					{Summary: fmt.Sprintf("end %d", n), Details: q.Operation, Last: true}}
			})
			components := []string{g.component("WASMFilter", "limiter", limiter), g.component("ImageHub", "hub", hub), g.component("WASMFilter", "hello", hello)}
			resp := mustCall(t, f.conn, meshService+g.method, g.request(false, components...))
			want := strings.Join([]string{
				"ImageHub hub: warning: watch out: for this", "ImageHub hub: warning: beware; of; this", "ImageHub hub: end 0; imagehub",
				"WASMFilter limiter: warning: watch out: for this", "WASMFilter limiter: warning: beware; of; this", "WASMFilter limiter: end 1; apply_filter",
				"WASMFilter hello: warning: watch out: for this", "WASMFilter hello: warning: beware; of; this", "WASMFilter hello: end 2; apply_filter"}, "\n")
			if got := resp.text(1); got != want {
				t.Errorf("the message is\n%s\nwant\n%s", got, want)
			}
			resp = mustCall(t, f.conn, meshService+g.method, g.request(true, components...))
			if got := resp.text(1); !strings.HasPrefix(got, "WASMFilter hello: ") || !strings.HasSuffix(got, "ImageHub hub: end 5; imagehub") {
				t.Errorf("the message of the removal is\n%s", got)
			}
			ids := map[string]bool{}
			for i, q := range f.ops.seen {
				if q.Delete != (i > 2) || q.Namespace != "shop" || q.Username != "meshery" || strings.Join(q.Kubeconfigs, " ") != "config one config two" || q.Implied ||
					q.Caller.Remote == "" || !uuidForm.MatchString(q.ID) || ids[q.ID] {
					t.Errorf("request %d is %+v", i, q)
				}
				ids[q.ID] = true
			}
		})
	}
}

func TestTheKubeconfigOfAConnectionIsForDesignsToo(t *testing.T) {
	f := start(t)
	f.ends(t, func(int, operation.Request) []event.Event { return []event.Event{{Summary: "done", Last: true}} })
	mustCall(t, f.conn, meshService+"CreateMeshInstance", text(1, "kubeconfig"))
	mustCall(t, f.conn, meshService+"ProcessOAM", text(3, oamComponent("WASMFilter", "hello", hello)))
	if q := f.ops.last(t); len(q.Kubeconfigs) != 1 || q.Kubeconfigs[0] != "kubeconfig" || !q.Implied {
		t.Errorf("the request has %q, %v", q.Kubeconfigs, q.Implied)
	}
}

func TestADesignThatFailsSaysOfEachComponentWhatBecameOfIt(t *testing.T) {
	for _, g := range generations {
		t.Run(g.method, func(t *testing.T) {
			f := start(t)
			f.ends(t, func(n int, q operation.Request) []event.Event {
				if n == 1 {
					return []event.Event{{Type: event.Error, Summary: problem.ProxyRejected.Summary, Details: "edge-1 does not like it", Code: problem.ProxyRejected.Code, Last: true}}
				}
				return []event.Event{{Summary: "done", Last: true}}
			})
			components := []string{g.component("WASMFilter", "one", hello), g.component("WASMFilter", "two", hello), g.component("WASMFilter", "three", hello)}
			_, err := call(t, f.conn, meshService+g.method, g.request(false, components...))
			text := status.Convert(err).Message()
			want := "WASMFilter one: done\nWASMFilter two: failed: " + problem.ProxyRejected.Summary + ": edge-1 does not like it [" + problem.ProxyRejected.Code + "] " + problem.ProxyRejected.Remedy + "\nWASMFilter three: not begun"
			if status.Code(err) != codes.FailedPrecondition || !strings.Contains(text, want) || !strings.Contains(text, problem.DesignFailed.Code) || len(f.ops.seen) != 2 {
				t.Errorf("after %d requests: %v, want\n%s", len(f.ops.seen), err, want)
			}
			// A removal goes on.
			f.ends(t, func(n int, _ operation.Request) []event.Event {
				if n == 0 {
					return []event.Event{{Type: event.Error, Summary: "no", Details: "unreachable", Code: problem.ClusterUnreachable.Code, Last: true}}
				}
				return []event.Event{{Summary: "removed", Last: true}}
			})
			_, err = call(t, f.conn, meshService+g.method, g.request(true, components...))
			if text := status.Convert(err).Message(); !strings.Contains(text, "WASMFilter two: removed\nWASMFilter one: removed") || len(f.ops.seen) != 5 {
				t.Errorf("the removal, after %d requests: %s", len(f.ops.seen), text)
			}
			// What is gone is no failure of a removal.
			f.ends(t, func(int, operation.Request) []event.Event {
				return []event.Event{{Type: event.Error, Summary: "no", Details: "shop/three", Code: problem.FilterNotFound.Code, Last: true}}
			})
			if got := mustCall(t, f.conn, meshService+g.method, g.request(true, components[2])).text(1); got != "WASMFilter three: shop/three was removed before, or is another component's; there was nothing to do" {
				t.Errorf("what is gone: %q", got)
			}
			// Of a single one the failure is the answer, with its own status.
			f.ends(t, func(int, operation.Request) []event.Event {
				return []event.Event{{Type: event.Error, Summary: "no", Details: "unreachable", Code: problem.ClusterUnreachable.Code, Last: true}}
			})
			_, err = call(t, f.conn, meshService+g.method, g.request(false, components[0]))
			if status.Code(err) != problem.ClusterUnreachable.Status || !strings.Contains(err.Error(), "WASMFilter one: unreachable") {
				t.Errorf("a single one: %v", err)
			}
			f.ops.submit = func(context.Context, operation.Request) (string, error) {
				return "", problem.CallerUnknown.New("it is")
			}
			_, err = call(t, f.conn, meshService+g.method, g.request(false, components[0]))
			if status.Code(err) != problem.CallerUnknown.Status || !strings.Contains(err.Error(), "WASMFilter one: it is") {
				t.Errorf("one that is refused: %v", err)
			}
		})
	}
}

func TestNothingIsDoneOfADesignThatIsRefused(t *testing.T) {
	for _, g := range generations {
		f := start(t)
		for reason, c := range map[string]struct {
			request raw
			says    string
		}{
			"a foreign component":   {g.request(false, g.component("WASMFilter", "a", hello), g.component("VirtualService", "route", `{"a":1}`)), `"route" is of the type "VirtualService"`},
			"a mistake in the last": {g.request(false, g.component("WASMFilter", "a", hello), g.component("WASMFilter", "b", `{"phase":"never"}`)), "settings.phase"},
			"no component":          {g.request(false), "no component"},
			"a large kubeconfig":    {join(g.request(false, g.component("WASMFilter", "a", hello)), text(map[string]protowire.Number{"ProcessOAM": 7, "Provision": 4}[g.method], strings.Repeat("k", 1<<20+1))), "kube_configs[2]"},
		} {
			_, err := call(t, f.conn, meshService+g.method, c.request)
			if status.Code(err) != codes.InvalidArgument || !strings.Contains(err.Error(), c.says) {
				t.Errorf("%s, %s: %.500v", g.method, reason, err)
			}
		}
		if len(f.ops.seen) != 0 {
			t.Errorf("%s: %d operations were asked for", g.method, len(f.ops.seen))
		}
	}
}

func TestTheAnswerWaitsForTheEndAndNotForEver(t *testing.T) {
	for _, g := range generations {
		t.Run(g.method, func(t *testing.T) {
			f := start(t)
			accepted := make(chan string, 1)
			f.ops.submit = func(_ context.Context, q operation.Request) (string, error) { accepted <- q.ID; return q.ID, nil }
			answered := make(chan error, 1)
			request := g.request(false, g.component("WASMFilter", "one", hello))
			go func() {
				_, err := call(t, f.conn, meshService+g.method, request)
				answered <- err
			}()
			id := <-accepted
			emit(t, f.hub, event.Event{Operation: "another", Summary: "done", Last: true})
			emit(t, f.hub, event.Event{Operation: id, Sequence: 1, Summary: "on its way"})
			select {
			case err := <-answered:
				t.Fatalf("it answered before the end: %v", err)
			case <-time.After(50 * time.Millisecond):
			}
			emit(t, f.hub, event.Event{Operation: id, Sequence: 2, Summary: "done", Last: true})
			if err := <-answered; err != nil {
				t.Error(err)
			}

			f = start(t, func(o *server.Options) { o.DesignTimeout = 50 * time.Millisecond })
			f.ops.submit = func(_ context.Context, q operation.Request) (string, error) { return q.ID, nil }
			_, err := call(t, f.conn, meshService+g.method, g.request(false, g.component("WASMFilter", "one", hello), g.component("WASMFilter", "two", hello)))
			if text := status.Convert(err).Message(); !strings.Contains(text, problem.DesignGoesOn.Code) || !strings.Contains(text, f.ops.last(t).ID) || !strings.Contains(text, "WASMFilter two: not begun") {
				t.Errorf("after its time: %v", err)
			}

			// The adapter stops: what is accepted is done when it is back.
			f = start(t)
			f.ops.submit = func(_ context.Context, q operation.Request) (string, error) { f.hub.Close(); return q.ID, nil }
			_, err = call(t, f.conn, meshService+g.method, g.request(true, g.component("WASMFilter", "one", hello), g.component("WASMFilter", "two", hello)))
			if text := status.Convert(err).Message(); !strings.Contains(text, problem.ShuttingDown.Code) || !strings.Contains(text, "WASMFilter one: not begun") {
				t.Errorf("while it stops: %v", err)
			}
		})
	}
}

func TestADesignWhoseEventsWereLetGoOfBeforeItReadThemIsAnswered(t *testing.T) {
	for _, g := range generations {
		t.Run(g.method, func(t *testing.T) {
			hub := event.NewHub(3, 0)
			var mu sync.Mutex
			stories := map[string][]event.Event{}
			f := start(t, func(o *server.Options) {
				o.Events = hub
				o.Story = func(_ context.Context, operation string) ([]event.Event, uint64, error) {
					mu.Lock()
					defer mu.Unlock()
					return stories[operation], 0, nil
				}
			})
			tell := func(id string, events ...event.Event) {
				mu.Lock()
				for i := range events {
					events[i].Operation, events[i].Sequence = id, uint64(len(stories[id])+1)
					stories[id] = append(stories[id], events[i])
				}
				mu.Unlock()
				for _, e := range events {
					emit(t, hub, e)
				}
			}
			others := []event.Event{{Summary: "a"}, {Summary: "b"}, {Summary: "c"}, {Summary: "d", Last: true}}
			accepted := make(chan string, 2)
			f.ops.submit = func(_ context.Context, q operation.Request) (string, error) {
				tell(q.ID, event.Event{Type: event.Warn, Summary: "beware", Details: "of this"})
				if len(accepted) > 0 { // the second component has ended before anybody listens
					tell(q.ID, event.Event{Summary: "done", Details: "second", Last: true})
				}
				tell("others-"+q.ID, slices.Clone(others)...)
				accepted <- q.ID
				return q.ID, nil
			}
			request := g.request(false, g.component("WASMFilter", "one", hello), g.component("WASMFilter", "two", hello))
			type answer struct {
				raw
				err error
			}
			answered := make(chan answer, 1)
			go func() {
				m, err := call(t, f.conn, meshService+g.method, request)
				answered <- answer{m, err}
			}()
			until(t, "the first is accepted", func() bool { return len(f.ops.requests()) == 1 && len(accepted) == 1 })
			tell(f.ops.requests()[0].ID, event.Event{Summary: "done", Details: "first", Last: true})
			want := "WASMFilter one: warning: beware; of this\nWASMFilter one: done; first\nWASMFilter two: warning: beware; of this\nWASMFilter two: done; second"
			got := <-answered
			if got.err != nil || decode(t, got.raw).text(1) != want {
				t.Errorf("the answer is %v\n%s\nwant\n%s", got.err, got.raw, want)
			}
		})
	}
}

func TestDesignsThatWaitDoNotUseUpTheCallsOfTheirClient(t *testing.T) {
	for _, g := range generations {
		t.Run(g.method, func(t *testing.T) {
			f := start(t, func(o *server.Options) { o.Calls = limit.Bounds{PerClient: 2, Total: 2} })
			accepted := make(chan string)
			f.ops.submit = func(_ context.Context, q operation.Request) (string, error) { accepted <- q.ID; return q.ID, nil }
			answered := make(chan error)
			deploy := func(names ...string) string {
				var components []string
				for _, n := range names {
					components = append(components, g.component("WASMFilter", n, hello))
				}
				for deadline := time.Now().Add(patience); ; {
					go func() {
						_, err := call(t, f.conn, meshService+g.method, g.request(false, components...))
						answered <- err
					}()
					select {
					case id := <-accepted:
						return id
					case err := <-answered: // one before it has a place for a moment after it was accepted
						if !tooMuch(err) || time.Now().After(deadline) {
							t.Fatalf("%v is answered: %v", names, err)
						}
					}
				}
			}
			ids := []string{deploy("one"), deploy("two"), deploy("three"), deploy("four")}
			until(t, "another call has a place", func() bool { _, err := call(t, f.conn, meshService+"MeshName"); return err == nil })
			// Of those that still have something to do there are only so many.
			ids = append(ids, deploy("five", "six"), deploy("seven", "eight"))
			if _, err := call(t, f.conn, meshService+"MeshName"); !tooMuch(err) {
				t.Errorf("with two designs that go on: %v", err)
			}
			for i, id := range ids {
				emit(t, f.hub, event.Event{Operation: id, Sequence: 1, Summary: "done", Last: true})
				if i > 3 { // the second component
					emit(t, f.hub, event.Event{Operation: <-accepted, Sequence: 1, Summary: "done", Last: true})
				}
				if err := <-answered; err != nil {
					t.Error(err)
				}
			}
		})
	}
}
