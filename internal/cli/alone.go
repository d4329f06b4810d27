package cli

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"time"

	"github.com/layer5io/meshery-adapter-library/meshes"
	"golang.org/x/sync/errgroup"

	"github.com/meshery/meshery-filters/filters"
	"github.com/meshery/meshery-filters/internal/event"
	"github.com/meshery/meshery-filters/internal/module"
	"github.com/meshery/meshery-filters/internal/operation"
	"github.com/meshery/meshery-filters/internal/problem"
	"github.com/meshery/meshery-filters/internal/store"
)

// aloneGrace bounds how long an operation that is interrupted may take to bring the cluster into a state that is whole.
const aloneGrace = 10 * time.Second

// alone runs an operation on the cluster or Consul that w names in this process, as an adapter would, and tells its events until the
// last. What is kept of it is there: whoever comes next, from here or an adapter, goes on from its inventories.
func (a *app) alone(ctx context.Context, w waiting, q *meshes.ApplyRuleRequest) error {
	if w.noWait {
		return usage("--no-adapter does it here and now, so --no-wait has no meaning")
	}
	if !w.cluster.given() && !w.consul.own {
		return usage("say in which cluster with --kubeconfig FILE, or with --consul that it is in Consul; without an adapter there are no plain Envoys")
	}
	if err := a.checkServedAt(); err != nil {
		return err
	}
	return a.withoutAdapter(ctx, &w.cluster, &w.consul, func(here adapterHere) error { return a.operate(ctx, w, q, here) })
}

// operate runs an operation to its last event.
func (a *app) operate(ctx context.Context, w waiting, q *meshes.ApplyRuleRequest, here adapterHere) (err error) {
	running, stop := context.WithCancel(ctx)
	outlive, end := context.WithCancel(context.WithoutCancel(ctx))
	var g errgroup.Group
	g.Go(func() error {
		defer end()
		return here.runner.Run(running)
	})
	g.Go(func() error { return here.events.Run(outlive) })
	defer func() {
		stop()
		err = errors.Join(err, g.Wait())
	}()
	id, err := here.runner.Submit(ctx, operation.Request{Operation: q.GetOpName(), Namespace: q.GetNamespace(), Username: a.env("USER"), Body: q.GetCustomBody()})
	if err != nil {
		return err
	}
	if w.timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeoutCause(ctx, w.timeout, errTimeout)
		defer cancel()
	}
	sub := here.hub.Subscribe(here.hub.Oldest(), id)
	for {
		e, err := sub.Next(ctx)
		switch {
		case ctx.Err() != nil && errors.Is(context.Cause(ctx), errTimeout):
			return exitError{fmt.Errorf("no end after %s; applying it again goes on from here", w.timeout), exitTimeout}
		case ctx.Err() != nil:
			return exitError{errors.New("stopped; applying it again goes on from here"), exitInterrupted}
		case err != nil:
			return err
		}
		view := viewOf(e)
		if err := a.progress(view); err != nil {
			return err
		}
		if view.Last {
			return view.outcome()
		}
	}
}

// withoutAdapter does something with as much of an adapter as the cluster or Consul takes that flags name.
func (a *app) withoutAdapter(ctx context.Context, k *kubeconfigFlags, own *consulFlags, do func(adapterHere) error) (err error) {
	var at func(*operation.Options)
	if own.own {
		c, err := own.open(a)
		if err != nil {
			return err
		}
		defer c.Close()
		at = func(o *operation.Options) { o.Consul, o.Secret = c, c.secret }
	} else {
		c, err := k.open()
		if err != nil {
			return err
		}
		defer c.Close()
		at = func(o *operation.Options) { o.Own = operated{c} }
	}
	here, err := a.adapterHere(ctx, at)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, here.close()) }()
	return do(here)
}

// adapterHere is as much of an adapter as one cluster or Consul takes. What it keeps on disk goes with close.
type adapterHere struct {
	runner *operation.Runner
	events *event.Log
	hub    *event.Hub
	close  func() error
}

func (a *app) adapterHere(ctx context.Context, at func(*operation.Options)) (_ adapterHere, err error) {
	dir, err := os.MkdirTemp("", "meshery-filters-")
	if err != nil {
		return adapterHere{}, err
	}
	end := func() error { return os.RemoveAll(dir) }
	defer func() {
		if err != nil {
			err = errors.Join(err, end())
		}
	}()
	state, err := store.Open(ctx, store.Options{StateDir: dir, SyncInterval: time.Hour})
	if err != nil {
		return adapterHere{}, err
	}
	hub := event.NewHub(0, 0)
	end = func() error {
		hub.Close()
		return errors.Join(state.Close(), os.RemoveAll(dir))
	}
	events, err := event.NewLog(ctx, state.Log(), hub)
	if err != nil {
		return adapterHere{}, err
	}
	quiet := slog.New(slog.DiscardHandler)
	o := operation.Options{
		AllowWideTargets: true, // with the rights of whoever runs this
		Modules:          module.New(module.Options{Blobs: state.Blobs(), Builtin: filters.Builtin, BuiltinNames: filters.Names(), ServedAt: a.servedAt, Log: quiet}),
		ModuleNames:      filters.Names(), Records: state.Records(), Queue: state.Queue(), Events: events, Workers: 1, Grace: aloneGrace, Log: quiet,
		Secret: func(name, key string) (string, error) {
			return "", problem.SecretMissing.New("%s/%s: without an adapter there are no secrets", name, key)
		},
	}
	at(&o)
	runner, err := operation.NewRunner(o)
	return adapterHere{runner, events, hub, end}, err
}
