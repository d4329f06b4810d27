package proof

import (
	"bytes"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

func decodeJSON(t *testing.T, r io.Reader, v any) {
	t.Helper()
	if err := json.NewDecoder(io.LimitReader(r, 64<<20)).Decode(v); err != nil {
		t.Fatal(err)
	}
}

// demoRun is one demo, which can be told from all others by what it leaves.
type demoRun struct {
	*process
	mark, temp, report string
}

func startDemo(t *testing.T, mesh string, args ...string) demoRun {
	t.Helper()
	d := demoRun{mark: "PROOF_MARK=" + rand.Text(), temp: t.TempDir(), report: filepath.Join(t.TempDir(), "demo.json")}
	cmd := exec.Command(program, "demo")
	if mesh != "envoy" {
		path, err := meshDemo()
		if err != nil {
			t.Fatal(err)
		}
		cmd = exec.Command(path, "--program", program, "--mesh", mesh)
	}
	cmd.Args = append(cmd.Args, append([]string{"--report", d.report}, args...)...)
	d.process = launchCommand(t, cmd, d.mark, "TMPDIR="+d.temp)
	return d
}

// meshDemo builds the demo on Istio and Consul beside the program.
var meshDemo = sync.OnceValues(func() (path string, err error) {
	path = filepath.Join(filepath.Dir(program), "demo-mesh")
	if out, err := exec.Command("go", "build", "-o", path, "../demo").CombinedOutput(); err != nil {
		return "", fmt.Errorf("build the demo on meshes: %w\n%s", err, out)
	}
	return path, nil
})

// onEachMesh runs a test of the demo on plain Envoys, on Istio and on Consul.
func onEachMesh(t *testing.T, test func(t *testing.T, mesh string)) {
	onRealParts(t)
	t.Parallel()
	for _, mesh := range []string{"envoy", "istio", "consul"} {
		t.Run(mesh, func(t *testing.T) {
			t.Parallel()
			test(t, mesh)
		})
	}
}

type demoReport struct {
	OK    bool
	Break string
	Steps []struct {
		Name, Problem string
		OK            bool
		Requests      []struct{ Status int }
		Envoys        []struct{ PIDBefore, PIDAfter int }
		Events        []struct{ Over string }
	}
}

// ends waits for the demo's end, checks that nothing is left of it, and reads its report.
func (d demoRun) ends(t *testing.T) (code int, r demoReport) {
	t.Helper()
	code = d.wait(t, 6*time.Minute)
	data, err := os.ReadFile(d.report)
	if err != nil {
		t.Fatalf("no report: %v\n%s", err, d.log.String())
	}
	decodeJSON(t, bytes.NewReader(data), &r)
	left, err := os.ReadDir(d.temp)
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range left {
		t.Errorf("the demo leaves %s behind", l.Name())
	}
	eventually(t, "no process of the demo is left", func() error { return marked(d.mark) })
	return code, r
}

// marked finds processes by a variable that they got from who started them.
func marked(variable string) error {
	files, err := filepath.Glob("/proc/[0-9]*/environ")
	if err != nil {
		return err
	}
	var found []error
	for _, f := range files {
		data, err := os.ReadFile(f)
		if err == nil && bytes.Contains(data, []byte(variable+"\x00")) {
			name, _ := os.ReadFile(filepath.Join(filepath.Dir(f), "comm"))
			found = append(found, fmt.Errorf("%s runs (%s)", filepath.Base(filepath.Dir(f)), bytes.TrimSpace(name)))
		}
	}
	return errors.Join(found...)
}

func TestTwoDemosAtOnceHoldAndLeaveNothingBehind(t *testing.T) {
	onEachMesh(t, func(t *testing.T, mesh string) {
		both := []demoRun{startDemo(t, mesh), startDemo(t, mesh)}
		eventually(t, "a demo's processes can be found", func() error {
			if marked(both[0].mark) == nil {
				return errors.New("not one is")
			}
			return nil
		})
		for _, d := range both {
			code, r := d.ends(t)
			if code != 0 || !r.OK || len(r.Steps) < 10 {
				t.Fatalf("the demo exits with %d, ok %t after %d steps:\n%s", code, r.OK, len(r.Steps), d.log.String())
			}
			over, requests := map[string]int{}, 0
			for _, s := range r.Steps {
				if !s.OK || s.Problem != "" {
					t.Errorf("%s: %s", s.Name, s.Problem)
				}
				requests += len(s.Requests)
				for _, e := range s.Events {
					over[e.Over]++
				}
			}
			if requests < 100 || over["gRPC"] < 10 || over["gRPC"] != over["NATS"] {
				t.Errorf("the report has %d requests and events %v", requests, over)
			}
			envoys := r.Steps[len(r.Steps)-1].Envoys
			if len(envoys) != 2 || envoys[0].PIDBefore != envoys[0].PIDAfter || envoys[1].PIDBefore != envoys[1].PIDAfter {
				t.Errorf("the report's Envoys are %+v", envoys)
			}
		}
	})
}

func TestASabotagedDemoFailsAtTheStepThatDoesNotHold(t *testing.T) {
	onEachMesh(t, func(t *testing.T, mesh string) {
		for _, c := range []struct {
			sabotage, step, problem string
		}{
			{"digest", "Apply filter", "meshery-filters-1012"},
			{"nofilter", "10 pulls", "15 pulls"},
			{"nack", "Apply filter", "meshery-filters-1016"},
		} {
			t.Run(c.sabotage, func(t *testing.T) {
				t.Parallel()
				d := startDemo(t, mesh, "--break", c.sabotage)
				code, r := d.ends(t)
				if code == 0 || r.OK || r.Break != c.sabotage || len(r.Steps) == 0 {
					t.Fatalf("the demo exits with %d, ok %t, broken by %q after %d steps:\n%s", code, r.OK, r.Break, len(r.Steps), d.log.String())
				}
				for i, s := range r.Steps {
					if last := i == len(r.Steps)-1; s.OK == last {
						t.Errorf("step %q: ok %t", s.Name, s.OK)
					}
				}
				last := r.Steps[len(r.Steps)-1]
				if !strings.Contains(last.Name, c.step) || !strings.Contains(last.Problem, c.problem) {
					t.Errorf("it failed at %q with %q, want one with %q and %q", last.Name, last.Problem, c.step, c.problem)
				}
			})
		}
	})
}

func TestAnInterruptedDemoLeavesNothingBehind(t *testing.T) {
	onEachMesh(t, func(t *testing.T, mesh string) {
		// While it starts what it needs, in the middle, and while it stays up.
		for _, at := range []string{" 1. ", "Nothing limits pulls", "stays up"} {
			t.Run(strings.TrimSpace(at), func(t *testing.T) {
				t.Parallel()
				d := startDemo(t, mesh, "--keep")
				eventually(t, "the demo gets there", func() error {
					if !strings.Contains(d.log.String(), at) {
						return errors.New(d.log.String())
					}
					return nil
				})
				if err := d.cmd.Process.Signal(os.Interrupt); err != nil {
					t.Fatal(err)
				}
				want := 130
				if at == "stays up" {
					want = 0
				}
				if code, _ := d.ends(t); code != want {
					t.Errorf("it exits with %d, want %d:\n%s", code, want, d.log.String())
				}
			})
		}
	})
}
