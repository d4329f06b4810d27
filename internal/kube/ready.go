package kube

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"time"

	"k8s.io/apimachinery/pkg/runtime/schema"

	"github.com/meshery/meshery-filters/internal/plan"
	"github.com/meshery/meshery-filters/internal/problem"
)

const (
	maxEvent   = 4 << 20          // bytes of one event of a watch
	watchAgain = 5 * time.Second  // before a watch that ended is begun again
	watchFor   = 10 * time.Minute // the server ends it then
)

// How long Pods that restart are waited for at most: with what they were given, without which nothing that needs it may be
// written, and with what they had before, after which nothing waits.
const (
	restartTimeout  = 10 * time.Minute
	restoredTimeout = 30 * time.Second // below what taking a chain back may take
)

// awaitRestarts waits for the Pods of the user's objects that restart, or did when the run before was cut off.
func (c *Cluster) awaitRestarts(ctx context.Context, ch *change, steps []*step) error {
	ctx, cancel := context.WithTimeout(ctx, restartTimeout)
	defer cancel()
	err := c.await(ctx, slices.DeleteFunc(slices.Clone(steps), func(s *step) bool {
		return !s.item.Shared || s.action != plan.Restarted && ch.had.Version != ""
	}))
	if errors.Is(err, problem.NotReady) {
		return problem.RolloutFailed.New("%s", problem.Of(err).Details)
	}
	return err
}

// awaitRestored waits for the Pods of the user's objects that got back what they had. Where they take longer, or nobody may
// look, the change says so: what it needed is done.
func (c *Cluster) awaitRestored(ctx context.Context, steps []*step) {
	ctx, cancel := context.WithTimeout(ctx, restoredTimeout)
	defer cancel()
	for _, s := range steps {
		if s.item.Shared && s.action == plan.Restarted {
			if err := c.await(ctx, []*step{s}); err != nil {
				s.action += plan.Action("; they were not seen to be back: " + problem.Of(err).Details + byHand(s.kind.GroupKind(), s.live))
			}
		}
	}
}

// byHand is what somebody has to do for an object whose Pods did not get ready with its template before: a StatefulSet with
// Pods in an order waits for such a Pod for ever, whatever its template is now.
func byHand(kind schema.GroupKind, o map[string]any) string {
	if policy := descend(o, []string{"spec"})["podManagementPolicy"]; kind.Kind != "StatefulSet" || policy == "Parallel" {
		return ""
	}
	return "; a StatefulSet does not replace a Pod that never got ready: delete that Pod"
}

// await waits until every object is ready, those of one kind and namespace by one request.
func (c *Cluster) await(ctx context.Context, steps []*step) error {
	waiting := map[string][]*step{}
	var order []string
	for _, s := range steps {
		if s.live == nil || pending(s.kind.GroupKind(), s.live) == "" {
			continue
		}
		key := s.kind.String() + "|" + s.item.Namespace
		if waiting[key] == nil {
			order = append(order, key)
		}
		waiting[key] = append(waiting[key], s)
	}
	for _, key := range order {
		if err := c.awaitReady(ctx, waiting[key]); err != nil {
			return err
		}
	}
	return nil
}

// awaitReady watches objects of one kind and namespace until they are ready.
func (c *Cluster) awaitReady(ctx context.Context, steps []*step) error {
	for {
		err := c.watch(ctx, steps)
		if still := unready(steps); still == nil {
			return nil
		} else if s := stuck(steps); s != nil {
			return problem.NotReady.New("%s: %s", s.item, pending(s.kind.GroupKind(), s.live))
		} else if errors.Is(ctx.Err(), context.Canceled) {
			return ctx.Err()
		} else if ctx.Err() != nil {
			return problem.NotReady.New("%s: %s", still.item, pending(still.kind.GroupKind(), still.live))
		}
		if _, expired := refusedWith(err, http.StatusGone); err != nil && !expired {
			return c.problemOf(err)
		}
		// The watch has ended, or what it was to begin with is forgotten: what it missed is read.
		for _, s := range steps {
			if err := c.get(ctx, s); err != nil && ctx.Err() == nil {
				return err
			}
			if s.live == nil && ctx.Err() == nil {
				return problem.NotReady.New("%s was deleted while it was waited for", s.item)
			}
		}
		if unready(steps) != nil {
			_ = sleep(ctx, watchAgain)
		}
	}
}

func unready(steps []*step) *step {
	for _, s := range steps {
		if pending(s.kind.GroupKind(), s.live) != "" {
			return s
		}
	}
	return nil
}

// stuck is an object of the user's that has given up getting ready.
func stuck(steps []*step) *step {
	for _, s := range steps {
		if s.item.Shared && seen(s.live) && conditionOf(s.live, "Progressing")["status"] == "False" {
			return s
		}
	}
	return nil
}

// tryWatch finds out whether an object may be watched, before its Pods restart and are waited for.
func (c *Cluster) tryWatch(ctx context.Context, s *step) error {
	k := s.call(http.MethodGet, "watch")
	k.name = ""
	k.query = url.Values{"watch": {"true"}, "timeoutSeconds": {"1"}, "fieldSelector": {"metadata.name=" + s.item.Name}, "resourceVersion": {revision(s.live)}}
	_, _, err := c.do(ctx, k)
	return c.problemOf(err)
}

// watch follows the objects' changes until all are ready, or the watch ends.
func (c *Cluster) watch(ctx context.Context, steps []*step) error {
	ctx, cancel := context.WithTimeout(ctx, watchFor)
	defer cancel()
	k := steps[0].call(http.MethodGet, "watch")
	k.name = ""
	k.query = url.Values{"watch": {"true"}, "timeoutSeconds": {fmt.Sprint(int(watchFor / time.Second))}}
	if len(steps) == 1 {
		k.query.Set("fieldSelector", "metadata.name="+steps[0].item.Name)
	}
	// From the oldest version that is known, so that nothing is missed.
	version := revision(steps[0].live)
	for _, s := range steps {
		if v := revision(s.live); len(v) < len(version) || len(v) == len(version) && v < version {
			version = v
		}
	}
	k.query.Set("resourceVersion", version)
	req, err := c.request(ctx, k)
	if err != nil {
		return err
	}
	resp, err := c.client.Do(req)
	if err != nil {
		return c.unreachable(ctx, err)
	}
	defer resp.Body.Close()
	lines := bufio.NewScanner(resp.Body)
	lines.Buffer(nil, maxEvent)
	if resp.StatusCode != http.StatusOK {
		lines.Scan()
		return &refusal{call: k, code: resp.StatusCode, status: statusOf(lines.Bytes())}
	}
	for unready(steps) != nil && stuck(steps) == nil && lines.Scan() {
		var event struct {
			Type   string          `json:"type"`
			Object json.RawMessage `json:"object"`
		}
		if err := json.Unmarshal(lines.Bytes(), &event); err != nil {
			return problem.ClusterAnswer.New("%s: an event of a watch cannot be read", c.Host)
		}
		if event.Type == "ERROR" {
			s := statusOf(event.Object)
			if s == nil {
				return problem.ClusterAnswer.New("%s: an event of a watch cannot be read", c.Host)
			}
			return &refusal{call: k, code: int(s.Code), status: s}
		}
		o, err := decode(event.Object)
		if err != nil {
			return problem.ClusterAnswer.New("%s: an event of a watch cannot be read", c.Host)
		}
		for _, s := range steps {
			if uid(o) != s.item.UID {
				continue
			}
			if event.Type == "DELETED" {
				return problem.NotReady.New("%s was deleted while it was waited for", s.item)
			}
			s.live = o
		}
	}
	if errors.Is(lines.Err(), bufio.ErrTooLong) {
		return problem.ClusterAnswer.New("%s: %w", c.Host, errTooLarge)
	}
	return nil // however it ended, what was missed is read next
}

// takesTime says whether objects of the kind are there before they are ready.
func takesTime(kind schema.GroupKind) bool {
	return pending(kind, map[string]any{}) != ""
}

// pending says why an object is not ready; empty when it is, as those of most kinds are as soon as they are there.
func pending(kind schema.GroupKind, o map[string]any) string {
	number := func(path ...string) int64 {
		n, _ := descend(o, path[:len(path)-1])[path[len(path)-1]].(int64)
		return n
	}
	switch kind {
	case schema.GroupKind{Kind: "Namespace"}:
		if phase, _ := descend(o, []string{"status"})["phase"].(string); phase != "Active" {
			return "its phase is " + clean(phase, 100)
		}
	case schema.GroupKind{Group: "apps", Kind: "Deployment"}:
		want := int64(1)
		if n, ok := descend(o, []string{"spec"})["replicas"].(int64); ok {
			want = n
		}
		switch {
		case !seen(o):
			return unseen
		case number("status", "updatedReplicas") < want || number("status", "availableReplicas") < want,
			number("status", "replicas") > number("status", "updatedReplicas"):
			why := fmt.Sprintf("%d of %d replicas are available", number("status", "availableReplicas"), want)
			for _, condition := range []string{"ReplicaFailure", "Progressing"} {
				if m := conditionOf(o, condition); m["status"] == "True" == (condition == "ReplicaFailure") && m != nil {
					text, _ := m["message"].(string)
					why += "; " + clean(text, maxText)
				}
			}
			return why
		}
	case schema.GroupKind{Group: "apps", Kind: "StatefulSet"}:
		want := int64(1)
		if n, ok := descend(o, []string{"spec"})["replicas"].(int64); ok {
			want = n
		}
		switch {
		case !seen(o):
			return unseen
		case number("status", "updatedReplicas") < want || number("status", "readyReplicas") < want:
			return fmt.Sprintf("%d of %d replicas are updated, and %d are ready", number("status", "updatedReplicas"), want, number("status", "readyReplicas"))
		}
	case schema.GroupKind{Group: "apps", Kind: "DaemonSet"}:
		want := number("status", "desiredNumberScheduled")
		switch {
		case !seen(o):
			return unseen
		case number("status", "updatedNumberScheduled") < want || number("status", "numberReady") < want:
			return fmt.Sprintf("%d of %d Pods are updated, and %d are ready", number("status", "updatedNumberScheduled"), want, number("status", "numberReady"))
		}
	}
	return ""
}

const unseen = "its controller has not seen it yet"

// seen says whether its controller knows the object as it is.
func seen(o map[string]any) bool {
	generation, _ := descend(o, []string{"metadata"})["generation"].(int64)
	observed, _ := descend(o, []string{"status"})["observedGeneration"].(int64)
	return observed >= generation && observed > 0
}

func conditionOf(o map[string]any, name string) map[string]any {
	list, _ := descend(o, []string{"status"})["conditions"].([]any)
	for _, v := range list {
		if m, ok := v.(map[string]any); ok && m["type"] == name {
			return m
		}
	}
	return nil
}
