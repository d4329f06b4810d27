package istiotest

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"

	"github.com/meshery/meshery-filters/build/controlplanes/stack"
)

const (
	// enter gives the agent a /var/lib of its own, where it keeps modules: $0 is that folder.
	enter = `set -e; mkdir -p "$0/istio/data"; mount --bind "$0" /var/lib; cd "$0"; exec "$@"`
	// envoyScript has the kernel end the Envoy with its agent.
	envoyScript = "#!/bin/sh\nexec setpriv --pdeathsig KILL %q \"$@\"\n"
)

// agent starts Istio's agent, which starts the Envoy, and says where its admin interface is.
func (m *Mesh) agent(ctx context.Context, dir string, o ProxyOptions, labels map[string]string, ip, xds string) (process, string, error) {
	ports, err := stack.FreePorts(4)
	if err != nil {
		return nil, "", err
	}
	lib := filepath.Join(dir, "lib")
	if err := os.MkdirAll(lib, 0o700); err != nil {
		return nil, "", err
	}
	script := filepath.Join(dir, "envoy.sh")
	if err := os.WriteFile(script, fmt.Appendf(nil, envoyScript, m.binary.Path), 0o700); err != nil {
		return nil, "", err
	}
	template, err := os.ReadFile(filepath.Join(m.folder, "envoy_bootstrap.json"))
	if err != nil {
		return nil, "", err
	}
	// A waypoint would learn of its peers by an extension of Istio's own Envoy.
	template = bytes.ReplaceAll(template, []byte("{{- if .metadata_discovery }}"), []byte("{{- if false }}"))
	bootstrap := filepath.Join(dir, "bootstrap.json")
	if err := os.WriteFile(bootstrap, template, 0o600); err != nil {
		return nil, "", err
	}
	options := map[string]any{
		"binaryPath": script, "configPath": filepath.Join(dir, "etc"), "discoveryAddress": xds, "controlPlaneAuthPolicy": "NONE",
		"proxyAdminPort": json.Number(ports[0]), "statusPort": json.Number(ports[1]), "concurrency": 1,
		"proxyBootstrapTemplatePath": bootstrap,
		"terminationDrainDuration":   "0.1s", "drainDuration": "1s",
	}
	if o.Told {
		options["proxyStatsMatcher"] = map[string]any{"inclusionRegexps": []string{".*extension_config_discovery.*"}}
	}
	config, err := json.Marshal(options)
	if err != nil {
		return nil, "", err
	}
	names, err := json.Marshal(labels)
	if err != nil {
		return nil, "", err
	}
	env := []string{"PROXY_CONFIG=" + string(config), "INSTANCE_IP=" + ip, "POD_NAME=" + o.Pod, "POD_NAMESPACE=" + o.Namespace,
		"ISTIO_META_CLUSTER_ID=Kubernetes", "ISTIO_META_MESH_ID=cluster.local", "ISTIO_META_INTERCEPTION_MODE=NONE",
		"FILE_MOUNTED_CERTS=true", // so that it asks nobody for one
		"ISTIO_METAJSON_LABELS=" + string(names), "ENVOY_STATUS_PORT=" + ports[2], "ENVOY_PROMETHEUS_PORT=" + ports[3]}
	p, err := stack.Run("unshare", "unshare", env, "--mount", "--map-root-user", "sh", "-c", enter, lib,
		filepath.Join(m.folder, "pilot-agent"), "proxy", o.kind(), "--domain", o.Namespace+".svc.cluster.local")
	if err != nil {
		return nil, "", err
	}
	admin := "127.0.0.1:" + ports[0]
	if err := p.Await(ctx, func(ctx context.Context) error { return ready(ctx, "http://"+admin+"/ready") }); err != nil {
		p.Stop()
		return nil, "", err
	}
	return agent{p}, admin, nil
}

// agent is Istio's agent with its Envoy.
type agent struct{ *stack.Process }

func (a agent) Stop() error { a.Process.Stop(); return nil }
