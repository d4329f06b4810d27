package kube

import (
	"context"
	"encoding/json"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"

	"k8s.io/apimachinery/pkg/runtime/schema"

	"github.com/meshery/meshery-filters/internal/plan"
	"github.com/meshery/meshery-filters/internal/problem"
)

const (
	podsAtOnce = 500   // of one answer
	maxPods    = 10000 // of one list
	namesOnly  = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"
)

var podKind = resource{GroupVersionKind: schema.GroupVersionKind{Version: "v1", Kind: "Pod"}, plural: "pods", namespaced: true}

// Pods lists the Pods that run in a namespace, or with none in all, and that have all of the labels, by name. Those that
// are being deleted are left out. Who may not is told problem.RightMissing; more than 10000 are problem.ClusterAnswer.
func (c *Cluster) Pods(ctx context.Context, namespace string, labels map[string]string) ([]plan.Pod, error) {
	var selector []string
	for _, k := range slices.Sorted(maps.Keys(labels)) {
		selector = append(selector, k+"="+labels[k])
	}
	return c.pods(ctx, namespace, strings.Join(selector, ","), podsAtOnce)
}

// Labelled is Pods for those that have a label, whatever its value is.
func (c *Cluster) Labelled(ctx context.Context, namespace, label string) ([]plan.Pod, error) {
	return c.pods(ctx, namespace, label, podsAtOnce)
}

func (c *Cluster) pods(ctx context.Context, namespace, selector string, atOnce int) (pods []plan.Pod, err error) {
	k := call{method: http.MethodGet, verb: "list", namespace: namespace, accept: namesOnly,
		kind: podKind, query: url.Values{"limit": {strconv.Itoa(atOnce)}, "fieldSelector": {"status.phase=Running"},
			"labelSelector": {selector}}}
	for {
		_, body, err := c.do(ctx, k)
		if err != nil {
			return nil, c.problemOf(err)
		}
		var list struct {
			Metadata struct {
				Continue string `json:"continue"`
			} `json:"metadata"`
			Items []struct {
				Metadata struct {
					Namespace string `json:"namespace"`
					Name      string `json:"name"`
					Deleted   string `json:"deletionTimestamp"`
				} `json:"metadata"`
			} `json:"items"`
		}
		if err := json.Unmarshal(body, &list); err != nil {
			return nil, problem.ClusterAnswer.New("%s: the list of Pods cannot be read", c.Host)
		}
		for _, i := range list.Items {
			if i.Metadata.Deleted == "" {
				pods = append(pods, plan.Pod{Namespace: i.Metadata.Namespace, Name: i.Metadata.Name})
			}
		}
		if list.Metadata.Continue == "" {
			return pods, nil
		}
		if len(pods) >= maxPods {
			return nil, problem.ClusterAnswer.New("%s has more than %d Pods with the labels %s", c.Host, maxPods, selector)
		}
		k.query.Set("continue", list.Metadata.Continue)
	}
}
