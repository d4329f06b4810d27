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

// upstreamsNote is an annotation of what makes Pods. It tells people what we have put among the upstreams of the Pods, and
// after " for " the target whose filters asked for it.
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

// keepsUpstreams refuses a chain with a filter that fetches through an upstream which the Pods have since a filter of the
// chain before asked for it, and that no filter asks for any more: it would be taken away.
func keepsUpstreams(fetched []plan.Source, next, held filter.Chain) error {
	asking := func(c filter.Chain, service string) (by filter.Key, ok bool) {
		i := slices.IndexFunc(c.Filters, func(f filter.Filter) bool { u, ok := asks(f); return ok && u.service == service })
		if i < 0 {
			return by, false
		}
		return c.Filters[i].Key, true
	}
	for _, s := range fetched {
		f, _ := next.Find(s.Filter)
		service := f.Spec.Delivery.Service
		by, before := asking(held, service)
		if _, now := asking(next, service); before && !now {
			return problem.UpstreamNeeded.New("%s fetches through %s, which %s asked for", f.Key, service, by)
		}
	}
	return nil
}

// needed are the services whose upstreams the sidecars need as long as an entry is what it is, with the filters of ours that
// fetch through them.
func needed(entry plan.Object) map[string][]string {
	by := map[string][]string{}
	extensions, _, _ := unstructured.NestedSlice(entry.Content, "spec", "envoyExtensions")
	for _, e := range extensions {
		namespace, name, ok := strings.Cut(strings.TrimPrefix(extensionPlugin(e), ConsulPlugin), ".")
		m, _ := e.(map[string]any)
		service, _ := valueAt(m["arguments"], "pluginConfig", "vmConfig", "code", "remote", "httpURI", "service", "name").(string)
		if ownExtension(e) && ok && service != "" {
			by[service] = append(by[service], filter.Key{Namespace: namespace, Name: name}.String())
		}
	}
	return by
}

// given are what makes a target's Pods, with upstreams.
type given struct {
	objects  []plan.Object
	restarts []string // those of objects whose Pods restart with that
	again    []string // and those that have an upstream of a chain before
}

// withUpstreams are what makes the target's Pods, with the upstreams that filters ask for and that it has not from its
// user, and with those of ours that are still needed.
func withUpstreams(t filter.Target, wanted []upstream, needed map[string][]string, c plan.Cluster) (g given, err error) {
	refuse := func(format string, args ...any) (given, error) {
		return given{}, problem.UpstreamRefused.New("%s: %s: %s", wanted[0].by, wanted[0], fmt.Sprintf(format, args...))
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
		next, changes, kept, err := upstreamed(o, t, wanted, needed)
		if err != nil {
			return refuse("%s: %v", o, err)
		}
		if next.Content == nil {
			continue
		}
		g.objects = append(g.objects, next)
		if changes {
			g.restarts = append(g.restarts, o.String())
		}
		if kept {
			g.again = append(g.again, o.String())
		}
	}
	if len(found) == 0 {
		return refuse("no Deployment, StatefulSet or DaemonSet makes Pods that Service %s/%s selects", t.Namespace, t.Name)
	}
	return g, nil
}

// template is where the annotations of Pods are in what makes them.
var template = []string{"spec", "template", "metadata", "annotations"}

// upstreamsOf are the entries of the annotation of an object's Pods.
func upstreamsOf(content map[string]any) []string {
	annotations, _, _ := unstructured.NestedStringMap(content, template...)
	if annotations[ConsulUpstreams] == "" {
		return nil
	}
	return strings.Split(annotations[ConsulUpstreams], ",")
}

// lent are the upstreams of an object's Pods that are ours, and the target for whose filters they are: as the inventories
// know, or where nobody has looked there, as the object's own annotation says, which anybody may have changed.
func lent(o plan.Object) (ours []string, of string) {
	if o.Bare == nil {
		notes, _, _ := unstructured.NestedStringMap(o.Content, "metadata", "annotations")
		text, of, noted := strings.Cut(notes[upstreamsNote], " for ")
		if !noted {
			return nil, ""
		}
		return strings.Split(text, ","), of
	}
	bare := upstreamsOf(o.Bare)
	for _, s := range upstreamsOf(o.Content) {
		if !slices.Contains(bare, s) {
			ours = append(ours, strings.TrimSpace(s))
		}
	}
	return ours, o.For
}

// upstreamed is an object with the upstreams in the annotation of its Pods, whether it had others before, and whether it has
// some only until those that are needed are others. It is empty where the user has them all.
func upstreamed(o plan.Object, t filter.Target, wanted []upstream, needed map[string][]string) (next plan.Object, changes, kept bool, err error) {
	refuse := func(format string, args ...any) (plan.Object, bool, bool, error) {
		return plan.Object{}, false, false, fmt.Errorf(format, args...)
	}
	ours, of := lent(o)
	if of != "" && of != t.String() {
		return refuse("it has upstreams for the filters of %s, which would take them away when they go", of)
	}
	own := func(s string) bool { return slices.Contains(ours, strings.TrimSpace(s)) }
	had := upstreamsOf(o.Content)
	services, ports := map[string]bool{}, map[string]bool{}
	for _, s := range had {
		if own(s) {
			continue
		}
		parts := strings.Split(strings.TrimSpace(s), ":")
		if len(parts) == 2 { // those of other datacenters have more, and prepared queries too
			services[strings.TrimSuffix(parts[0], ".svc")] = true
		}
		for _, p := range parts[1:] {
			ports[p] = true
		}
	}
	var added, by []string
	for _, u := range wanted {
		by = append(by, u.by.String())
		if services[u.service] {
			continue
		}
		port := fmt.Sprint(u.port)
		if ports[port] {
			theirs := slices.DeleteFunc(slices.Clone(had), own)
			return refuse("another of its upstreams has port %s: %s", port, strings.Join(append(theirs, added...), ","))
		}
		ports[port], services[u.service] = true, true
		added = append(added, u.String())
	}
	for _, s := range ours {
		service, port, _ := strings.Cut(s, ":")
		if needed[service] == nil || services[service] {
			continue
		}
		if ports[port] {
			return refuse("its upstream %s has that port, and stays until no sidecar needs it any more: give upstreamPort another one", s)
		}
		ports[port], services[service], kept = true, true, true
		added = append(added, s)
		by = append(by, slices.DeleteFunc(slices.Clone(needed[service]), func(k string) bool { return slices.Contains(by, k) })...)
	}
	if added == nil {
		return plan.Object{}, false, false, nil
	}
	list := slices.DeleteFunc(slices.Clone(had), func(s string) bool { return own(s) && !slices.Contains(added, strings.TrimSpace(s)) })
	for _, s := range added {
		if !slices.ContainsFunc(list, func(h string) bool { return strings.TrimSpace(h) == s }) {
			list = append(list, s)
		}
	}
	paused, _, _ := unstructured.NestedBool(o.Content, "spec", "paused")
	strategy, _, _ := unstructured.NestedString(o.Content, "spec", "updateStrategy", "type")
	partition, partial, _ := unstructured.NestedFieldNoCopy(o.Content, "spec", "updateStrategy", "rollingUpdate", "partition")
	if changes = !slices.Equal(list, had); changes && (paused || strategy == "OnDelete" || partial && fmt.Sprint(partition) != "0") {
		return refuse("it does not make all of its Pods anew when they change: it is paused, or its updateStrategy is OnDelete or has a partition")
	}
	u := (&unstructured.Unstructured{Object: o.Content}).DeepCopy()
	if err := unstructured.SetNestedField(u.Object, strings.Join(list, ","), append(slices.Clone(template), ConsulUpstreams)...); err != nil {
		return refuse("%w", err)
	}
	for name, note := range map[string]string{upstreamsNote: strings.Join(added, ",") + " for " + t.String(), filterAnnotation: strings.Join(by, listSeparator)} {
		if err := unstructured.SetNestedField(u.Object, note, "metadata", "annotations", name); err != nil {
			return refuse("%w", err)
		}
	}
	return plan.Object{Content: u.Object, Shared: true, Read: o.Content}, changes, kept, nil
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
