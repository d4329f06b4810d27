package kube

import (
	"errors"
	"net/http"
	"regexp"
	"strings"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/meshery/meshery-filters/internal/problem"
)

// forbidden is how every authorizer's refusal ends. The verb may be another than the request's: server-side apply of
// what is not there needs create besides patch.
var forbidden = regexp.MustCompile(`cannot ([a-z]+) resource "([a-z0-9./-]+)"`)

// problemOf says in the project's words why a request was refused. Other errors stay as they are.
func (c *Cluster) problemOf(err error) error {
	var r *refusal
	if !errors.As(err, &r) {
		return err
	}
	k := r.call
	switch r.code {
	case http.StatusUnauthorized:
		return problem.ClusterUnauthenticated.New("%s: %w", c.Host, r)
	case http.StatusForbidden:
		if terminating(r) {
			return problem.NamespaceUnavailable.New("%s: namespace %s is being deleted", k.subject(), k.namespace)
		}
		if m := forbidden.FindStringSubmatch(r.message()); m != nil {
			return problem.RightMissing.New("%s: verb %s, resource %s, %s", c.Host, m[1], groupResource(m[2], k.kind.Group), scope(k.namespace))
		}
		if k.raw != "" {
			return problem.RightMissing.New("%s: verb %s, path %s", c.Host, k.verb, k.raw)
		}
		if r.status == nil {
			return problem.RightMissing.New("%s: verb %s, resource %s, %s", c.Host, k.verb, groupResource(k.kind.plural, k.kind.Group), scope(k.namespace))
		}
	case http.StatusNotFound:
		if r.about("namespaces") && k.kind.plural != "namespaces" {
			return problem.NamespaceUnavailable.New("%s: there is no namespace %s", k.subject(), k.namespace)
		}
		of, _, _ := strings.Cut(k.kind.plural, "/") // less a subresource
		if r.reason() == metav1.StatusReasonNotFound && !r.about(of) && k.raw == "" {
			c.forget(k.kind.Group)
			return problem.KindNotServed.New("%s: %s %s", c.Host, k.kind.GroupVersion(), k.kind.Kind)
		}
	case http.StatusConflict:
		if fields := conflicts(r); fields != "" {
			return problem.FieldConflict.New("%s: %s", k.subject(), fields)
		}
		return problem.ChainChanged.New("%s: %s", k.subject(), r.message())
	case http.StatusInternalServerError:
		// The server's own fault is not meant: so it says that the schema does not have a field.
		if strings.Contains(r.message(), "failed to create typed patch object") {
			return problem.ObjectRefused.New("%s: %s", k.subject(), r.message())
		}
	case http.StatusTooManyRequests, http.StatusServiceUnavailable:
		return problem.ClusterBusy.New("%s put off %s %s for the %d. time: %s", c.Host, k.verb, k.subject(), r.retries+1, r.message())
	}
	if r.status == nil || r.code >= 500 || r.code < 400 {
		return problem.ClusterAnswer.New("%s answered %s %s with %d: %s", c.Host, k.verb, k.subject(), r.code, r.message())
	}
	return problem.ObjectRefused.New("%s: %s", k.subject(), r.message())
}

func terminating(r *refusal) bool {
	for _, cause := range r.causes() {
		if cause.Type == "NamespaceTerminating" {
			return true
		}
	}
	return false
}

// conflicts lists the fields that others own, by manager.
func conflicts(r *refusal) string {
	var lines []string
	for _, cause := range r.causes() {
		if cause.Type == metav1.CauseTypeFieldManagerConflict {
			// conflict with "kubectl" using v1
			lines = append(lines, clean(cause.Field, maxText)+": "+clean(cause.Message, maxText))
		}
	}
	return strings.Join(lines, "\n")
}

func groupResource(plural, group string) string { return strings.TrimSuffix(plural+"."+group, ".") }

func scope(namespace string) string {
	if namespace == "" {
		return "the whole cluster"
	}
	return "namespace " + namespace
}
