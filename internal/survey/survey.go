// Package survey looks for Wasm filters that proxies of a cluster run and that nothing there explains: a proxy has lost its
// control plane, or holds on to a configuration that should have been replaced.
//
// The promise: what is named was in the proxy at each of several looks, for as long as the mesh may take to change a proxy,
// and there was no object for it all the while. The limits: a filter counts as explained by an object of its name, whatever
// version of it the proxy runs; and a look ends in time, even if not all proxies were looked at, which is then told.
package survey

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/meshery/meshery-filters/internal/plan"
	"github.com/meshery/meshery-filters/internal/problem"
)

const (
	lookTime = 30 * time.Second // of one look at all proxies
	askTime  = 5 * time.Second  // of one proxy
	parallel = 8                // proxies that are asked at once
	pause    = 2 * time.Second  // between two looks
	reasons  = 3                // that are told for not having looked at proxies
	maxText  = 500              // bytes of a proxy's text that are shown
)

// Mesh is what configures proxies, and what it makes that of.
type Mesh interface {
	// Proxies lists the Pods that have a proxy of the mesh, in a namespace or with none in all.
	Proxies(ctx context.Context, namespace string) ([]plan.Pod, error)
	// Running lists the Wasm filters that one of them runs.
	Running(context.Context, plan.Pod) ([]plan.WasmFilter, error)
	// Explained tells which of the filters there are objects for now.
	Explained(ctx context.Context, names []string) (map[string]bool, error)
	// Settling is how long a proxy may run what there is no object for any more, although all is well.
	Settling() time.Duration
}

var errLate = fmt.Errorf("the %s of a look were over", lookTime)

// Look asks the proxies of a mesh, in a namespace or with none in all. That the Pods or the objects cannot be listed is an
// error; that a proxy cannot be asked is part of the survey. It takes half a minute at most, and where something is found
// up to the mesh's settling time and another half longer.
func Look(ctx context.Context, m Mesh, namespace string) (s plan.Survey, err error) {
	pods, err := m.Proxies(ctx, namespace)
	if err != nil {
		return s, fmt.Errorf("find the proxies: %w", err)
	}
	s.Proxies = len(pods)
	found, failed := ask(ctx, m, pods)
	begun := time.Now()
	for {
		if ctx.Err() != nil {
			return s, ctx.Err()
		}
		if err := explain(ctx, m, found); err != nil {
			return s, fmt.Errorf("find what explains the proxies' filters: %w", err)
		}
		if len(found) == 0 || time.Since(begun) > m.Settling() {
			break
		}
		if err := sleep(ctx, pause); err != nil {
			return s, err
		}
		suspects := slices.DeleteFunc(slices.Clone(pods), func(p plan.Pod) bool { return found[p] == nil })
		again, silent := ask(ctx, m, suspects)
		for pod, filters := range found {
			if err := silent[pod]; err != nil {
				failed[pod] = err
			}
			if found[pod] = both(filters, again[pod]); found[pod] == nil {
				delete(found, pod)
			}
		}
	}
	for pod, filters := range found {
		for _, f := range filters {
			f.Name, f.Source = clean(f.Name), clean(f.Source)
			s.Orphans = append(s.Orphans, plan.Orphan{Proxy: pod.String(), WasmFilter: f})
		}
	}
	slices.SortFunc(s.Orphans, func(a, b plan.Orphan) int {
		return cmp.Or(strings.Compare(a.Proxy, b.Proxy), strings.Compare(a.Name, b.Name))
	})
	s.Looked, s.Missed = len(pods)-len(failed), why(pods, failed)
	return s, nil
}

// ask asks several proxies what they run, and says which did not answer.
func ask(ctx context.Context, m Mesh, pods []plan.Pod) (found map[plan.Pod][]plan.WasmFilter, failed map[plan.Pod]error) {
	ctx, cancel := context.WithTimeout(ctx, lookTime)
	defer cancel()
	found, failed = map[plan.Pod][]plan.WasmFilter{}, map[plan.Pod]error{}
	denied := map[string]error{} // namespaces whose proxies we may not ask
	var mu sync.Mutex
	var g errgroup.Group
	g.SetLimit(parallel)
	for _, pod := range pods {
		g.Go(func() error {
			mu.Lock()
			err := denied[pod.Namespace]
			mu.Unlock()
			var filters []plan.WasmFilter
			if err == nil {
				one, cancel := context.WithTimeout(ctx, askTime)
				filters, err = m.Running(one, pod)
				cancel()
			}
			mu.Lock()
			defer mu.Unlock()
			switch {
			case err == nil:
				if len(filters) > 0 {
					found[pod] = filters
				}
			case errors.Is(err, problem.RightMissing):
				denied[pod.Namespace] = err
				failed[pod] = err
			case ctx.Err() != nil:
				failed[pod] = errLate
			case errors.Is(err, context.DeadlineExceeded):
				failed[pod] = fmt.Errorf("it did not answer within %s", askTime)
			default:
				failed[pod] = err
			}
			return nil
		})
	}
	_ = g.Wait()
	return found, failed
}

// explain takes away the filters that there is an object for.
func explain(ctx context.Context, m Mesh, found map[plan.Pod][]plan.WasmFilter) error {
	var names []string
	for _, filters := range found {
		for _, f := range filters {
			names = append(names, f.Name)
		}
	}
	if len(names) == 0 {
		return nil
	}
	slices.Sort(names)
	explained, err := m.Explained(ctx, slices.Compact(names))
	if err != nil {
		return err
	}
	for pod, filters := range found {
		left := slices.DeleteFunc(filters, func(f plan.WasmFilter) bool { return explained[f.Name] })
		if found[pod] = left; len(left) == 0 {
			delete(found, pod)
		}
	}
	return nil
}

// both are the filters, as they are now, that were there before.
func both(before, now []plan.WasmFilter) (of []plan.WasmFilter) {
	for _, f := range now {
		if slices.ContainsFunc(before, func(b plan.WasmFilter) bool { return b.Name == f.Name }) {
			of = append(of, f)
		}
	}
	return of
}

// why says why proxies were not looked at: the reasons that most of them share first.
func why(pods []plan.Pod, failed map[plan.Pod]error) string {
	type reason struct {
		text  string
		count int
	}
	var all []*reason
	for _, pod := range pods {
		err := failed[pod]
		if err == nil {
			continue
		}
		text := fmt.Sprintf("%s: %v", pod, err)
		if errors.Is(err, problem.RightMissing) {
			text = problem.Of(err).Details
		} else if errors.Is(err, errLate) {
			text = err.Error()
		}
		if i := slices.IndexFunc(all, func(r *reason) bool { return r.text == text }); i >= 0 {
			all[i].count++
		} else {
			all = append(all, &reason{text, 1})
		}
	}
	slices.SortStableFunc(all, func(a, b *reason) int { return cmp.Compare(b.count, a.count) })
	var texts []string
	more := 0
	for i, r := range all {
		switch {
		case i >= reasons:
			more += r.count
		case r.count > 1:
			texts = append(texts, fmt.Sprintf("%s (%d proxies)", clean(r.text), r.count))
		default:
			texts = append(texts, clean(r.text))
		}
	}
	if more > 0 {
		texts = append(texts, fmt.Sprintf("and %d more proxies for other reasons", more))
	}
	return strings.Join(texts, "; ")
}

func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-t.C:
		return nil
	}
}
