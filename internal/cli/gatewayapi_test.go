package cli

import (
	"strings"
	"testing"

	"github.com/meshery/meshery-filters/build/controlplanes/istiotest"
)

func TestProxiesOfTheGatewayAPIOnIstioGetFilters(t *testing.T) {
	m := startIstio(t)
	a := newAdapter(t)
	t.Run("a gateway", func(t *testing.T) { gatewayGetsAFilter(t, m, a) })
	t.Run("a waypoint", func(t *testing.T) { waypointGetsAFilter(t, m, a) })
}

func gatewayGetsAFilter(t *testing.T, m *istioMesh, a *adapter) {
	m.add(t, istiotest.ProxyOptions{Namespace: "shop", Pod: "web-1", GatewayAPI: "web", Agent: true})
	gateway := istioMesh{m.Mesh, m.proxies[:1]}
	m.add(t, istiotest.ProxyOptions{Namespace: "shop", Pod: "api-1", Labels: map[string]string{"app": "api"}})
	dir, whole := t.TempDir(), m.as(t, wholeUser)
	file := probeFile(t, dir)
	for kind, delivery := range map[string]string{"EnvoyFilter": "", "TrafficExtension": "delivery: {mode: local, localPath: " + dir + "}\n"} {
		doc := func(value string) string {
			return put(t, t.TempDir(), "d.yaml", istioDocument("x", "mesh: istio\ntarget: {kind: Gateway, name: web}\nmodule: {file: "+file+"}\n"+delivery+"config: {stamp: {header: x-stamp, value: "+value+"}}"))
		}
		for _, step := range []struct {
			before, after string
			args          []string
			word          string
		}{
			{"", "one", []string{"apply", "-f", doc("one")}, kind + "/shop/x-web-"},
			{"one", "two", []string{"apply", "-f", doc("two")}, "updated"},
			{"two", "", []string{"remove", "shop/x"}, "removed from Gateway shop/web"},
		} {
			gateway.during(t, kind+" "+strings.Join(step.args, " "), step.before, step.after, func() result {
				return a.cli(append(step.args, "--kubeconfig", whole)...).want(t, exitOK, step.word, "1 of 1 proxy")
			})
			istioMesh{m.Mesh, m.proxies[1:]}.stamped(t, kind+" on another proxy", "")
		}
	}
}
