package cli

import (
	"os"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"

	"github.com/meshery/meshery-filters/config"
)

func TestTheComposeFileConfiguresAnAdapterThatMesheryReaches(t *testing.T) {
	text, err := os.ReadFile("../../docs/meshery-compose.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var file struct {
		Services map[string]struct {
			Environment map[string]string
			Networks    []string
			Volumes     []string
		}
		Networks map[string]any
		Volumes  map[string]any
	}
	if err := yaml.Unmarshal(text, &file); err != nil {
		t.Fatal(err)
	}
	service := file.Services["meshery-filters"]
	env := []string{"HOME=/home/nonroot"}
	for name, value := range service.Environment {
		if rest, ok := strings.CutPrefix(value, "${"); ok { // with its default
			_, value, _ = strings.Cut(strings.TrimSuffix(rest, "}"), ":-")
		}
		env = append(env, name+"="+value)
	}
	c, err := config.Load("", env, nil)
	if err != nil {
		t.Fatal(err)
	}
	if c.MesheryServer != "http://meshery:8080" || !c.Meshery.Register || c.Meshery.AdapterAddr != "meshery-filters" {
		t.Errorf("the configuration is %s", c)
	}
	for _, e := range env {
		if name, _, _ := strings.Cut(e, "="); strings.HasPrefix(name, "MESHERY_FILTERS_") && !strings.Contains(allVariables(), " "+name+" ") {
			t.Errorf("there is no variable %s", name)
		}
	}
	for _, n := range service.Networks {
		if _, ok := file.Networks[n]; !ok {
			t.Errorf("there is no network %s", n)
		}
	}
	for _, v := range service.Volumes {
		name, at, _ := strings.Cut(v, ":")
		if _, ok := file.Volumes[name]; !ok || !strings.HasPrefix(c.StateDir, at) {
			t.Errorf("%s does not keep %s", v, c.StateDir)
		}
	}
}

func allVariables() string {
	all := " "
	for _, k := range config.Keys() {
		all += k.Env + " "
	}
	return all
}
