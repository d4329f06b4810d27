package kube

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"unicode/utf8"

	"k8s.io/apimachinery/pkg/runtime/schema"

	"github.com/meshery/meshery-filters/internal/problem"
)

var secretKind = resource{GroupVersionKind: schema.GroupVersionKind{Version: "v1", Kind: "Secret"}, plural: "secrets", namespaced: true}

// Secret reads an entry of a Secret, which is kept nowhere. A Secret or an entry that is not there, or is no text, is
// problem.ClusterSecret, and a right that is missing problem.RightMissing; both name the Secret, and no error has a value.
func (c *Cluster) Secret(ctx context.Context, namespace, name, key string) (string, error) {
	item := Item{APIVersion: "v1", Kind: "Secret", Namespace: namespace, Name: name}
	if !item.fit() || namespace == "" {
		return "", problem.ClusterSecret.New("%s: %s can be the name of no Secret", c.Host, clean(item.String(), maxText))
	}
	_, body, err := c.do(ctx, call{method: http.MethodGet, verb: "get", kind: secretKind, namespace: namespace, name: name})
	if _, ok := refusedWith(err, http.StatusNotFound); ok {
		return "", problem.ClusterSecret.New("%s: there is no %s", c.Host, item)
	}
	if err != nil {
		err = c.problemOf(err)
		if errors.Is(err, problem.RightMissing) {
			err = problem.RightMissing.New("%s, for %s", problem.Of(err).Details, item)
		}
		return "", err
	}
	var secret struct {
		Data map[string][]byte `json:"data"`
	}
	if json.Unmarshal(body, &secret) != nil { // whose error could quote it
		return "", problem.ClusterAnswer.New("%s: %s cannot be read", c.Host, item)
	}
	value, ok := secret.Data[key]
	switch {
	case !ok:
		return "", problem.ClusterSecret.New("%s: %s has no key %s", c.Host, item, clean(key, maxText))
	case !utf8.Valid(value):
		return "", problem.ClusterSecret.New("%s: the key %s of %s is no text", c.Host, clean(key, maxText), item)
	}
	return string(value), nil
}
