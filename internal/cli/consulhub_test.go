package cli

import (
	"errors"
	"fmt"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/meshery/meshery-filters/build/controlplanes/consultest"
	"github.com/meshery/meshery-filters/build/controlplanes/stack"
)

// hubRights are what docs/consul.md gives the adapter's token for Image Hub.
const hubRights = `service_prefix "" {
  policy = "write"
  intentions = "write"
}
node_prefix "" { policy = "read" }
key_prefix "meshery-filters/" { policy = "write" }`

// agentHolds is what a Consul has of services and entries.
func agentHolds(t *testing.T, c *consultest.Consul) map[string]any {
	t.Helper()
	all := map[string]any{}
	var services map[string]any
	if err := c.Send(t.Context(), http.MethodGet, "/v1/agent/services", nil, &services); err != nil {
		t.Fatal(err)
	}
	for _, s := range services {
		// The agent learns the service's virtual address from the servers, when it happens to.
		if tagged, ok := s.(map[string]any)["TaggedAddresses"].(map[string]any); ok {
			delete(tagged, "consul-virtual")
		}
	}
	maps.Copy(all, services)
	for _, kind := range []string{"service-defaults", "service-intentions"} {
		var entries []map[string]any
		if err := c.Send(t.Context(), http.MethodGet, "/v1/config/"+kind, nil, &entries); err != nil {
			t.Fatal(err)
		}
		for _, e := range entries {
			all[fmt.Sprint(kind, "/", e["Name"])] = e
		}
	}
	return all
}

// sidecars starts what an event says, on admin ports that are free.
func sidecars(t *testing.T, c *consultest.Consul, said string, admin []string) {
	t.Helper()
	started := 0
	for line := range strings.Lines(said) {
		_, command, found := strings.Cut(strings.TrimSpace(line), "consul connect envoy ")
		if !found {
			continue
		}
		args := append([]string{"connect", "envoy"}, strings.Fields(command)...)
		if at := slices.Index(args, "-admin-bind"); at < 0 || started == len(admin) {
			t.Fatalf("%q", line)
		} else {
			args[at+1] = admin[started]
		}
		args = append(args, "--concurrency", "1", "--log-level", "warn")
		cmd := c.Command(t.Context(), args...)
		var log text
		cmd.Stdout, cmd.Stderr = &log, &log
		cmd.Cancel, cmd.WaitDelay = func() error { return cmd.Process.Signal(syscall.SIGTERM) }, 20*time.Second
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { // by then the test's context has ended
			_ = cmd.Wait()
			if t.Failed() {
				t.Logf("%s\n%s", line, log.String())
			}
		})
		started++
	}
	if started != 2 {
		t.Fatalf("%d sidecars are to be started by:\n%s", started, said)
	}
}

func TestImageHubAnswersBehindSidecarsOfTheLocalAgent(t *testing.T) {
	if testing.Short() {
		t.Skip("starts Consul and Envoys")
	}
	c, err := consultest.Start(t.Context(), t.TempDir(), consultest.Options{ACL: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Stop)
	token, err := c.Token(t.Context(), "meshery-filters", hubRights)
	if err != nil {
		t.Fatal(err)
	}
	ports, err := stack.FreePorts(4)
	if err != nil {
		t.Fatal(err)
	}
	admin := []string{"127.0.0.1:" + ports[1], "127.0.0.1:" + ports[2]}
	dir, folder := t.TempDir(), t.TempDir()
	file, config := filepath.Join(dir, "token"), filepath.Join(dir, "adapter.yaml")
	if err := errors.Join(os.Chmod(folder, 0o755), os.WriteFile(file, []byte(token), 0o600), os.WriteFile(config, fmt.Appendf(nil,
		"consul: {addr: %q, token: {name: consul, key: token}, admin: %q, localPath: %q}\nsecrets: {consul: {token: {file: %q}}}\n",
		c.Addr, strings.Join(admin, ","), folder, file), 0o600)); err != nil {
		t.Fatal(err)
	}
	state := t.TempDir()
	adapter := func(mesh string) *adapter {
		t.Helper()
		return newAdapterIn(t, state, "--config", config, "--imagehub-sidecar-addr", "127.0.0.1:"+ports[0], "--imagehub-mesh", mesh, "--xds-addr", "127.0.0.1:"+ports[3])
	}
	a := adapter("auto")
	// The user's own entry, which has nothing to do with it.
	theirs := map[string]any{"Kind": "service-defaults", "Name": "theirs", "Protocol": "http"}
	if err := c.Write(t.Context(), theirs); err != nil {
		t.Fatal(err)
	}
	before := agentHolds(t, c)

	at := "http://127.0.0.1:" + ports[0] + "/"
	said := a.cli("run", "imagehub").want(t, exitOK, "service imagehub-api created", "service imagehub-web created", "service-defaults/imagehub-api created",
		"Image Hub answers at "+at+" through the sidecars of Consul 127.0.0.1:").out
	sidecars(t, c, said, admin)
	deployed := agentHolds(t, c)
	a.cli("run", "imagehub").want(t, exitOK, "Image Hub is unchanged at "+at, "consul connect envoy -sidecar-for imagehub-web")
	if now := agentHolds(t, c); !reflect.DeepEqual(now, deployed) {
		t.Errorf("deploying again has changed\n%v\nto\n%v", deployed, now)
	}
	hub := hubClient{t, ports[0]}
	hub.until("Image Hub answers, and nothing limits it", answered(http.StatusOK))
	if status, page, err := hub.ask(http.MethodGet, "/", "", ""); err != nil || status != http.StatusOK || !strings.Contains(page, "<html") {
		t.Errorf("the page: %d %s %v", status, page, err)
	}
	ada := hub.login("ada")

	a.cli("run", "imagehub_rate_limit").want(t, exitOK, "runs on Service default/imagehub-api (1 of 1 proxy)")
	hub.until("the limiter wants a token", answered(http.StatusUnauthorized))
	hub.limited(ada, "")
	a.cli("run", "meshery-filters").want(t, exitOK, "Image Hub is unchanged at "+at, "is unchanged and runs on", "The mesh is now installed.\n  Consul starts no sidecars.")
	// What the adapter alone knows is not needed to take the limiter away without it.
	alone := []string{"--consul", "--config", config}
	run(t, append([]string{"status"}, alone...)...).want(t, exitDrift, "Service default/imagehub-api", "imagehub/token-key")
	run(t, append([]string{"remove", "imagehub-rate-limit", "--no-adapter"}, alone...)...).want(t, exitOK, "removed from Service default/imagehub-api (1 of 1 proxy)")
	hub.until("nothing limits it any more", answered(http.StatusOK))
	if got := hub.pull(ada); got != http.StatusOK {
		t.Errorf("without the limiter a pull is answered with %d", got)
	}

	// A limiter that outlives Image Hub has its entry, and takes it along.
	a.cli("run", "imagehub_rate_limit").want(t, exitOK)
	a.cli("run", "imagehub", "--delete").want(t, exitOK, "service imagehub-api removed", "service-defaults/imagehub-api updated", "Image Hub removed from Consul")
	a.cli("run", "meshery-filters", "--delete").want(t, exitOK, "Image Hub was removed before")
	if now := agentHolds(t, c); !reflect.DeepEqual(now, before) {
		t.Errorf("there was\n%v\nand is\n%v", before, now)
	}
	a.cli("run", "imagehub", "--delete").want(t, exitOK, "there was nothing to do")

	// Designs have the whole of it come and go, while the sidecars stay.
	conn := dialDesigner(t, a)
	for method, d := range designers {
		design := []string{
			d.component("WASMFilter", "hello", `{"mesh":"consul","target":{"kind":"Service","name":"imagehub-api"},"module":{"builtin":"headers"},"config":"{\"response\":{\"x-hello\":\"design\"}}"}`),
			d.component("ImageHub", "hub", `{"rateLimit":true}`),
		}
		lines := d.deploy(t, conn, false, nil, design...)
		if len(lines) != 3 || !strings.HasPrefix(lines[0], "ImageHub hub: Image Hub answers at "+at) || !strings.Contains(lines[0], "consul connect envoy -sidecar-for imagehub-api") ||
			!strings.HasPrefix(lines[1], "ImageHub hub: shop/imagehub-rate-limit (sha256 ") || !strings.HasPrefix(lines[2], "WASMFilter hello: shop/hello (sha256 ") ||
			!strings.Contains(lines[2], "1 of 1 proxy") {
			t.Errorf("%s says\n%s", method, strings.Join(lines, "\n"))
		}
		hub.until("the limiter wants a token", answered(http.StatusUnauthorized))
		hub.limited(hub.login("ada of "+method), "design")
		lines = d.deploy(t, conn, true, nil, design...)
		if len(lines) != 3 || !strings.HasPrefix(lines[0], "WASMFilter hello: shop/hello removed from ") || !strings.HasPrefix(lines[1], "ImageHub hub: shop/imagehub-rate-limit removed from ") ||
			!strings.HasPrefix(lines[2], "ImageHub hub: Image Hub removed from Consul") {
			t.Errorf("%s says of the removal\n%s", method, strings.Join(lines, "\n"))
		}
		if now := agentHolds(t, c); !reflect.DeepEqual(now, before) {
			t.Errorf("%s: there was\n%v\nand is\n%v", method, before, now)
		}
	}

	// Where imagehub.mesh was changed, what is left on the other mesh is named, and goes with the rest.
	restarted := func(mesh string) {
		t.Helper()
		a.interrupt()
		a.wait(t, patience)
		a = adapter(mesh)
	}
	left := func(said result, words ...string) {
		t.Helper()
		if n := strings.Count(said.want(t, exitOK, words...).err, "Image Hub's limiter is on another mesh, too"); n != 1 {
			t.Errorf("it is told %d times:\n%s", n, said.err)
		}
	}
	a.cli("run", "meshery-filters").want(t, exitOK, "1 of 1 proxy")
	hub.until("the limiter wants a token", answered(http.StatusUnauthorized))
	restarted("envoy")
	_, url := a.proxyOf("default", "plain-1", anUpstream(t))
	plain := hubClient{t, url[strings.LastIndex(url, ":")+1:]}
	plain.until("nothing limits the plain Envoy", answered(http.StatusOK))
	left(a.cli("run", "meshery-filters"), "Image Hub is elsewhere, too", "default/imagehub-rate-limit is on Service default/imagehub-api in Consul")
	plain.until("the plain Envoy's limiter wants a token", answered(http.StatusUnauthorized))
	hub.until("the sidecar's limiter wants a token still", answered(http.StatusUnauthorized))
	restarted("consul")
	left(a.cli("run", "meshery-filters"), "default/imagehub-rate-limit is on ProxyGroup default", "run imagehub_rate_limit --delete")
	a.cli("run", "meshery-filters", "--delete").want(t, exitOK, "Image Hub's limiter is removed from 2 targets", "Image Hub removed from Consul")
	plain.until("nothing limits the plain Envoy", answered(http.StatusOK))
	if now := agentHolds(t, c); !reflect.DeepEqual(now, before) {
		t.Errorf("there was\n%v\nand is\n%v", before, now)
	}
	a.cli("run", "imagehub_rate_limit", "--delete").want(t, exitFailed, "meshery-filters-1010")

	// What is the user's stays, whatever its name.
	mine := map[string]any{"Name": "imagehub-web", "ID": "imagehub-web", "Port": 1}
	if err := c.Send(t.Context(), http.MethodPut, "/v1/agent/service/register", mine, nil); err != nil {
		t.Fatal(err)
	}
	if err := c.Write(t.Context(), map[string]any{"Kind": "service-defaults", "Name": "imagehub-api", "Protocol": "http", "MaxInboundConnections": 9}); err != nil {
		t.Fatal(err)
	}
	before = agentHolds(t, c)
	a.cli("run", "imagehub").want(t, exitFailed, "meshery-filters-1105", "imagehub-web")
	a.cli("run", "imagehub", "--delete").want(t, exitOK, "Image Hub removed from Consul")
	if now := agentHolds(t, c); !reflect.DeepEqual(now, before) {
		t.Errorf("there was\n%v\nand is\n%v", before, now)
	}
}
