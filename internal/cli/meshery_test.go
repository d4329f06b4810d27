package cli

import (
	"bytes"
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/meshery/meshery-filters/filters"
)

const storedID = "1c9adbd4-c121-4fc0-9690-5bf88f477096"

// mesheryWith plays Meshery Server for a user who is signed in with the token, and keeps one filter. It returns the
// environment that leads there.
func mesheryWith(t *testing.T, token string) (env []string) {
	t.Helper()
	var mu sync.Mutex
	var name string
	var data []byte
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		mu.Lock()
		defer mu.Unlock()
		if c, err := r.Cookie("token"); err != nil || c.Value != token {
			http.Redirect(w, r, "/provider", http.StatusFound)
			return
		}
		switch {
		case r.Method == http.MethodPost:
			var q struct {
				Data struct {
					Name string
					File []byte `json:"filterFile"`
				} `json:"filter_data"`
			}
			if err := json.Unmarshal(body, &q); err != nil {
				http.Error(w, err.Error(), http.StatusBadRequest)
				return
			}
			name, data = q.Data.Name, q.Data.File
			_, _ = io.WriteString(w, "[]")
		case r.URL.Path == "/api/filter/download/"+storedID && data != nil:
			_, _ = w.Write(data)
		case r.URL.Path == "/api/filter":
			list := []any{}
			if data != nil && strings.Contains(name, r.URL.Query().Get("search")) {
				list = append(list, map[string]any{"id": storedID, "name": name, "filterFile": data, "visibility": "private", "updatedAt": "2026-01-07T10:00:00Z"})
			}
			_ = json.NewEncoder(w).Encode(map[string]any{"filters": list})
		default:
			http.Error(w, "record not found", http.StatusNotFound)
		}
	}))
	t.Cleanup(s.Close)
	file := put(t, t.TempDir(), "auth.json", `{"meshery-provider":"Meshery","token":"`+token+`"}`)
	return []string{"MESHERY_SERVER=" + s.URL, "MESHERY_FILTERS_MESHERY_TOKEN_FILE=" + file}
}

func TestFiltersInMesheryAreListedPulledAndPushed(t *testing.T) {
	env := mesheryWith(t, "abc.def")
	cli := func(args ...string) result {
		return runWith(t, "", env, append([]string{"meshery", "filters"}, args...)...)
	}
	cli("list").want(t, exitOK, "no filter is kept in Meshery")
	dir := t.TempDir()
	module, _ := filters.Builtin("headers")
	file := put(t, dir, "hello.wasm", string(module))
	cli("push", file, "--config", "{}").want(t, exitOK, "hello.wasm: ", " bytes, sha256 ", "module: {url: meshery://"+storedID+"}")
	cli("list").want(t, exitOK, "ID", "NAME", storedID, "hello.wasm", "private")
	if out := cli("list", "other", "-o", "json").want(t, exitOK).out; strings.TrimSpace(out) != "[]" {
		t.Errorf("no filter in JSON is %q", out)
	}
	back := filepath.Join(dir, "back.wasm")
	cli("pull", "hello.wasm", back).want(t, exitOK, "back.wasm: ")
	if got, err := os.ReadFile(back); err != nil || !bytes.Equal(got, module) {
		t.Errorf("%d bytes came back, %v", len(got), err)
	}
	if got := cli("pull", storedID, "-").want(t, exitOK).out; got != string(module) {
		t.Errorf("%d bytes came to standard output", len(got))
	}
	cli("pull", "nothing", back).want(t, exitFailed, "Meshery has no such filter", "meshery-filters-1134")
	cli("pull", "hello.wasm").want(t, exitUsage, "the file to write")
	cli("push", file, "--id", "1").want(t, exitUsage, "--id")
	cli("push", put(t, dir, "empty.wasm", "")).want(t, exitUsage, "is empty")
	env = append(env, "MESHERY_FILTERS_MESHERY_TOKEN_FILE="+put(t, dir, "old.json", `{"token":"expired"}`))
	cli("list").want(t, exitFailed, "signed in", "mesheryctl system login")
}

func TestAFilterInMesheryIsAppliedToARealProxy(t *testing.T) {
	realEnvoy(t)
	env := mesheryWith(t, "abc.def")
	module, _ := filters.Builtin("headers")
	file := put(t, t.TempDir(), "hello.wasm", string(module))
	runWith(t, "", env, "meshery", "filters", "push", file).want(t, exitOK)

	server, token := strings.TrimPrefix(env[0], "MESHERY_SERVER="), strings.TrimPrefix(env[1], "MESHERY_FILTERS_MESHERY_TOKEN_FILE=")
	a := newAdapter(t, "--meshery-server", server, "--meshery-token-file", token, "--meshery-register=false")
	_, url := a.proxy("edge-1", anUpstream(t))
	doc := func(more string) string {
		return put(t, t.TempDir(), "d.yaml", header("hello")+"spec:\n  target: {kind: ProxyGroup, name: edge}\n  config: {response: {x-stored: in Meshery}}\n  module: {url: 'meshery://"+storedID+"'"+more+"}\n")
	}
	a.cli("apply", "-f", doc("")).want(t, exitOK, "accepted its configuration in a dry run", "runs on ProxyGroup edge (1 of 1 proxy)")
	if got := fetch(t, url).Header.Get("x-stored"); got != "in Meshery" {
		t.Errorf("the response has %q", got)
	}
	a.cli("apply", "-f", doc(", sha256: "+strings.Repeat("ab", 32))).want(t, exitFailed, "digest is not the one", "meshery://"+storedID)
	if got := fetch(t, url).Header.Get("x-stored"); got != "in Meshery" {
		t.Errorf("after what is refused the response has %q", got)
	}
	if strings.Contains(a.err.String(), "abc.def") {
		t.Error("the log has the token")
	}
}
