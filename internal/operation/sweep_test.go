package operation_test

import (
	"context"
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"testing"
	"time"

	"github.com/meshery/meshery-filters/filters"
	"github.com/meshery/meshery-filters/internal/module"
	"github.com/meshery/meshery-filters/internal/operation"
	"github.com/meshery/meshery-filters/internal/store"
)

// variant is the headers module with a section that makes it another.
func variant(t *testing.T, n int) string {
	t.Helper()
	data, ok := filters.Builtin("headers")
	if !ok {
		t.Fatal("there is no module headers")
	}
	section := append([]byte{7}, fmt.Sprintf("v%06d", n)...) // the length of the name, the name, and nothing else
	data = append(append(append([]byte{}, data...), 0, byte(len(section))), section...)
	return base64.StdEncoding.EncodeToString(data)
}

func TestModulesOfAChainThatWasTakenFromTheAdaptersOwnClusterAreNotLiveAnyMore(t *testing.T) {
	ours := func(o *operation.Options) {
		s, err := startServer()
		if err != nil {
			t.Fatal(err)
		}
		if o.Own, err = o.Clusters(s.Kubeconfig(s.Token(adapterUser))); err != nil {
			t.Fatal(err)
		}
	}
	c := newClusterRig(t, ours)
	// The cluster has chains of other tests, too.
	inline := variant(t, time.Now().Nanosecond())
	data, err := base64.StdEncoding.DecodeString(inline)
	if err != nil {
		t.Fatal(err)
	}
	digest := fmt.Sprintf("%x", sha256.Sum256(data))
	live := func() bool {
		t.Helper()
		digests, err := c.runner.LiveModules(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return digests[digest]
	}
	c.ok(c.apply(on("web", "hello", "module: {inline: "+inline+"}")))
	// Somebody without this adapter's store, such as the command line.
	other := newClusterRig(t, ours)
	other.ns = c.ns
	other.ok(other.request("remove_filter", doc("hello")))
	if !live() {
		t.Fatal("it is known before it was looked for")
	}
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		c.runner.SweepModules(ctx, 5*time.Millisecond, c.rig.dir.Sweep)
	}()
	defer func() { stop(); <-ended }()
	for deadline := time.Now().Add(20 * time.Second); live(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("a module is live that no chain has")
		}
	}
	c.ok(c.apply(on("web", "again", "module: {inline: "+inline+"}")))
	for range 20 { // what is there stays so
		if !live() {
			t.Fatal("a module is not live that a chain has")
		}
		time.Sleep(10 * time.Millisecond)
	}
}

func TestModulesOfRevisionsAreKeptAndThoseBeforeThemAreNot(t *testing.T) {
	r := startRigOn(t, store.Options{StateDir: t.TempDir(), SyncInterval: time.Hour, KeepBlobs: 10 * time.Millisecond})
	r.ok(apply(doc("x", "module: {inline: "+variant(t, 1)+"}")))
	list, err := r.runner.List(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	first := list[0].Chain.Filters[0].Spec.Module.SHA256
	r.ok(apply(doc("x")))
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan struct{})
	sweeps := make(chan store.Swept, 1)
	go func() {
		defer close(ended)
		r.runner.SweepModules(ctx, 5*time.Millisecond, func(ctx context.Context, referred func(context.Context) (map[string]bool, error)) (store.Swept, error) {
			swept, err := r.dir.Sweep(ctx, referred)
			select {
			case sweeps <- swept:
			case <-ctx.Done():
			}
			return swept, err
		})
	}()
	defer func() { stop(); <-ended }()
	for range 10 {
		if swept := <-sweeps; len(swept.Deleted) > 0 {
			t.Fatalf("%v was deleted", swept.Deleted)
		}
	}
	history, err := r.runner.History(t.Context(), "default", "x")
	if err != nil {
		t.Fatal(err)
	}
	r.ok(undo("x", history[0].Number)) // to the first module, which is there
	r.ok(remove(doc("x")))
	for i := range 10 { // changes, after which the first is in no revision
		r.ok(apply(doc("x", fmt.Sprintf("priority: %d", i+1))))
	}
	deadline := time.After(30 * time.Second)
	for {
		select {
		case swept := <-sweeps:
			if len(swept.Deleted) == 0 {
				continue
			}
			if len(swept.Deleted) != 1 || swept.Deleted[0] != first || swept.Freed < 100_000 {
				t.Errorf("%+v, want %s", swept, first)
			}
		case <-deadline:
			t.Error("it is never deleted")
		}
		break
	}
	r.ok(apply(doc("x", "module: {inline: "+variant(t, 1)+"}"))) // it comes again
}

func TestModulesAreLiveWhileAChainOrAnOperationUsesThem(t *testing.T) {
	r := newRig(t)
	live := func() map[string]bool {
		t.Helper()
		digests, err := r.runner.LiveModules(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return digests
	}
	builtin := module.New(module.Options{Builtin: filters.Builtin, BuiltinNames: filters.Names()}).Shipped()["headers"]
	if len(live()) != 0 {
		t.Fatalf("%v is live on a new adapter", live())
	}
	own := variant(t, 1)
	r.ok(apply(doc("x", "module: {inline: "+own+"}")))
	list, err := r.runner.List(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	digest := list[0].Chain.Filters[0].Spec.Module.SHA256
	if l := live(); !l[digest] || l[builtin] {
		t.Errorf("with a chain of %s: %v", digest, l)
	}
	// An operation that waits for its proxy.
	r.proxy("silent", "default", always(ignore))
	if _, err := r.runner.Submit(t.Context(), apply(doc("x", "wait: {timeout: 30s}"))); err != nil {
		t.Fatal(err)
	}
	if l := live(); !l[digest] || !l[builtin] {
		t.Errorf("while another module is on its way: %v", l)
	}
}

func TestModulesOfARemovedFilterAreKeptAndNotLive(t *testing.T) {
	r := newRig(t)
	r.ok(apply(doc("x")))
	r.ok(remove(doc("x")))
	if l, err := r.runner.LiveModules(t.Context()); err != nil || len(l) != 0 {
		t.Errorf("%v, %v", l, err)
	}
}
