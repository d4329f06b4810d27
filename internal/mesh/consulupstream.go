package mesh

import (
	"fmt"
	"slices"
	"strings"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"github.com/meshery/meshery-filters/internal/filter"
	"github.com/meshery/meshery-filters/internal/plan"
	"github.com/meshery/meshery-filters/internal/problem"
)

// ConsulUpstreams is the annotation of Pods that lists their sidecars' upstreams: SERVICE:PORT with commas between.
const ConsulUpstreams = "consul.hashicorp.com/connect-service-upstreams"

// upstreamsNote is an annotation of what makes Pods. It has what we have put among the upstreams of the Pods, and after
// " for " the target whose filters asked for it, so that those of another target do not rely on it.
const upstreamsNote = "filters.meshery.io/upstreams"

// upstream is one that a filter asks for.
type upstream struct {
	by      filter.Key
	service string
	port    int
}

func (u upstream) String() string { return fmt.Sprintf("%s:%d", u.service, u.port) }

// asks is the upstream that a filter asks for, if it does.
func asks(f filter.Filter) (upstream, bool) {
	d := f.Spec.Delivery
	return upstream{f.Key, d.Service, d.UpstreamPort}, d.UpstreamPort != 0
}

// withUpstreams are what makes the target's Pods, with the upstreams that filters ask for and that it has not from its
// user. restarts are those of which that restarts the Pods.
func withUpstreams(t filter.Target, wanted []upstream, c plan.Cluster) (objects []plan.Object, restarts []string, err error) {
	refuse := func(format string, args ...any) ([]plan.Object, []string, error) {
		return nil, nil, problem.UpstreamRefused.New("%s: %s: %s", wanted[0].by, wanted[0], fmt.Sprintf(format, args...))
	}
	o, _ := c.Object(plan.Ref{GroupKind: service, Namespace: t.Namespace, Name: t.Name})
	selector, _, _ := unstructured.NestedStringMap(o.Content, "spec", "selector")
	if len(selector) == 0 {
		return refuse("no Service %s/%s selects the Pods that would get it", t.Namespace, t.Name)
	}
	var pods []*unstructured.Unstructured
	makers := map[string]map[string]string{} // the labels of their Pods, by plan.Object.String
	var found []plan.Object
	for _, o := range c.Objects {
		u := &unstructured.Unstructured{Object: o.Content}
		gk := u.GroupVersionKind().GroupKind()
		template, _, _ := unstructured.NestedStringMap(o.Content, "spec", "template", "metadata", "labels")
		switch {
		case u.GetNamespace() != t.Namespace:
		case gk == schema.GroupKind{Kind: "Pod"} && has(selector, u.GetLabels()):
			pods = append(pods, u)
		case slices.Contains(workloads, gk) && has(selector, template):
			makers[o.String()] = template
			found = append(found, o)
		}
	}
	injected := func(u *unstructured.Unstructured) bool { return u.GetLabels()[injectedLabel] == "injected" }
	for _, pod := range pods {
		made := slices.ContainsFunc(found, func(o plan.Object) bool { return has(makers[o.String()], pod.GetLabels()) })
		if injected(pod) && !made {
			return refuse("Pod %s/%s is made by no Deployment, StatefulSet or DaemonSet", pod.GetNamespace(), pod.GetName())
		}
	}
	for _, o := range found {
		of := slices.DeleteFunc(slices.Clone(pods), func(u *unstructured.Unstructured) bool { return !has(makers[o.String()], u.GetLabels()) })
		if len(of) > 0 && !slices.ContainsFunc(of, injected) {
			continue // Consul has nothing to do with it
		}
		next, changes, err := upstreamed(o, t, wanted)
		if err != nil {
			return refuse("%s: %v", o, err)
		}
		if next.Content == nil {
			continue
		}
		objects = append(objects, next)
		if changes {
			restarts = append(restarts, o.String())
		}
	}
	if len(found) == 0 {
		return refuse("no Deployment, StatefulSet or DaemonSet makes Pods that Service %s/%s selects", t.Namespace, t.Name)
	}
	return objects, restarts, nil
}

// upstreamed is an object with the upstreams in the annotation of its Pods, and whether it had others before. It is empty
// where the user has them all.
func upstreamed(o plan.Object, t filter.Target, wanted []upstream) (next plan.Object, changes bool, err error) {
	template := []string{"spec", "template", "metadata", "annotations"}
	notes, _, _ := unstructured.NestedStringMap(o.Content, "metadata", "annotations")
	annotations, _, _ := unstructured.NestedStringMap(o.Content, template...)
	ours, of, noted := strings.Cut(notes[upstreamsNote], " for ")
	if noted && of != t.String() {
		return next, false, fmt.Errorf("it has upstreams for the filters of %s, which would take them away when they go", of)
	}
	had := annotations[ConsulUpstreams]
	var theirs []string
	if had != "" {
		theirs = strings.Split(had, ",")
	}
	if noted {
		own := strings.Split(ours, ",")
		theirs = slices.DeleteFunc(theirs, func(s string) bool { return slices.Contains(own, strings.TrimSpace(s)) })
	}
	var added, by []string
	services, ports := map[string]bool{}, map[string]bool{}
	for _, s := range theirs {
		parts := strings.Split(strings.TrimSpace(s), ":")
		if len(parts) == 2 { // those of other datacenters have more, and prepared queries too
			services[strings.TrimSuffix(parts[0], ".svc")] = true
		}
		for _, p := range parts[1:] {
			ports[p] = true
		}
	}
	for _, u := range wanted {
		by = append(by, u.by.String())
		if services[u.service] {
			continue
		}
		port := fmt.Sprint(u.port)
		if ports[port] {
			return next, false, fmt.Errorf("another of its upstreams has port %s: %s", port, strings.Join(append(theirs, added...), ","))
		}
		ports[port], services[u.service] = true, true
		added = append(added, u.String())
	}
	if added == nil {
		return next, false, nil
	}
	paused, _, _ := unstructured.NestedBool(o.Content, "spec", "paused")
	strategy, _, _ := unstructured.NestedString(o.Content, "spec", "updateStrategy", "type")
	partition, partial, _ := unstructured.NestedFieldNoCopy(o.Content, "spec", "updateStrategy", "rollingUpdate", "partition")
	text := strings.Join(append(theirs, added...), ",")
	if changes = text != had; changes && (paused || strategy == "OnDelete" || partial && fmt.Sprint(partition) != "0") {
		return next, false, fmt.Errorf("it does not make all of its Pods anew when they change: it is paused, or its updateStrategy is OnDelete or has a partition")
	}
	u := (&unstructured.Unstructured{Object: o.Content}).DeepCopy()
	if err := unstructured.SetNestedField(u.Object, text, append(template, ConsulUpstreams)...); err != nil {
		return next, false, err
	}
	for name, note := range map[string]string{upstreamsNote: strings.Join(added, ",") + " for " + t.String(), filterAnnotation: strings.Join(by, listSeparator)} {
		if err := unstructured.SetNestedField(u.Object, note, "metadata", "annotations", name); err != nil {
			return next, false, err
		}
	}
	return plan.Object{Content: u.Object, Shared: true, Read: o.Content}, changes, nil
}

// has says whether the labels have all of the selector's.
func has(selector, labels map[string]string) bool {
	for k, v := range selector {
		if labels[k] != v {
			return false
		}
	}
	return true
}
