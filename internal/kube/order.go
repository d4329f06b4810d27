package kube

import (
	"slices"

	"k8s.io/apimachinery/pkg/runtime/schema"
)

// order is that in which kinds are written, by group and kind; those that are not listed come last, and deleting goes
// from the end. Each line is done before the next begins.
var order = [][]schema.GroupKind{
	{{Kind: "Namespace"}},
	{{Kind: "ServiceAccount"}, {Kind: "ConfigMap"}, {Kind: "Secret"}},
	{{Group: "rbac.authorization.k8s.io", Kind: "Role"}, {Group: "rbac.authorization.k8s.io", Kind: "ClusterRole"}},
	{{Group: "rbac.authorization.k8s.io", Kind: "RoleBinding"}, {Group: "rbac.authorization.k8s.io", Kind: "ClusterRoleBinding"}},
	{{Kind: "Service"}},
	{{Group: "apps", Kind: "Deployment"}, {Group: "apps", Kind: "StatefulSet"}, {Group: "apps", Kind: "DaemonSet"}},
}

// rank is a kind's place in the order.
func rank(kind schema.GroupKind) int {
	i := slices.IndexFunc(order, func(line []schema.GroupKind) bool { return slices.Contains(line, kind) })
	if i < 0 {
		return len(order)
	}
	return i
}

// holdsOthers says of a kind that deleting one takes away what others put into it, so that we never do.
func holdsOthers(kind schema.GroupKind) bool { return rank(kind) == 0 }
