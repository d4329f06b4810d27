package proof

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// onAnotherClock builds the program with a wall clock that can be set while it runs; set says how far it is off. The
// monotonic clock stays, as when a machine's clock is set.
func onAnotherClock(t *testing.T) (program string, set func(off time.Duration)) {
	t.Helper()
	root, err := exec.Command("go", "list", "-f", "{{.Dir}}", "time", "github.com/meshery/meshery-filters").Output()
	if err != nil {
		t.Fatal(err)
	}
	std, module, _ := strings.Cut(strings.TrimSpace(string(root)), "\n")
	source, err := os.ReadFile(filepath.Join(std, "time.go"))
	if err != nil {
		t.Fatal(err)
	}
	const reads = "func Now() Time {\n\tsec, nsec, mono := runtimeNow()\n"
	text := strings.Replace(string(source), reads, reads+"\tsec += proofOff.Load()\n", 1)
	if text == string(source) {
		t.Fatal("time.Now is another than this test knows")
	}
	dir := t.TempDir()
	file := filepath.Join(dir, "off")
	replace := map[string]string{}
	for target, text := range map[string]string{
		filepath.Join(std, "time.go"): text,
		filepath.Join(std, "proof.go"): `package time

import "sync/atomic"

var proofOff atomic.Int64

// ProofOff says how many seconds the clock is off.
func ProofOff(seconds int64) { proofOff.Store(seconds) }
`,
		filepath.Join(module, "proof.go"): `package main

import (
	"os"
	"strconv"
	"time"
)

func init() {
	look := func() {
		if text, err := os.ReadFile(` + strconv.Quote(file) + `); err == nil {
			if off, err := strconv.ParseInt(string(text), 10, 64); err == nil {
				time.ProofOff(off)
			}
		}
	}
	look()
	go func() {
		for {
			time.Sleep(10 * time.Millisecond)
			look()
		}
	}()
}
`} {
		f := filepath.Join(dir, strconv.Itoa(len(replace))+".go")
		if err := os.WriteFile(f, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		replace[target] = f
	}
	overlay, err := json.Marshal(map[string]any{"Replace": replace})
	if err != nil {
		t.Fatal(err)
	}
	list := filepath.Join(dir, "overlay.json")
	if err := os.WriteFile(list, overlay, 0o600); err != nil {
		t.Fatal(err)
	}
	program = filepath.Join(dir, "meshery-filters")
	if out, err := exec.Command("go", "build", "-overlay", list, "-o", program, "github.com/meshery/meshery-filters").CombinedOutput(); err != nil {
		t.Fatalf("build the program: %v\n%s", err, out)
	}
	return program, func(off time.Duration) {
		t.Helper()
		if err := os.WriteFile(file+".new", []byte(strconv.Itoa(int(off.Seconds()))), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(file+".new", file); err != nil {
			t.Fatal(err)
		}
	}
}

// TestAClockThatIsSetCostsNothing sets the adapter's clock back and forth while operations are asked for, and while it is
// down.
func TestAClockThatIsSetCostsNothing(t *testing.T) {
	onRealParts(t)
	t.Parallel()
	program, set := onAnotherClock(t)
	set(0)
	x := newTorture(t, newSubscriber(t))
	x.program = program
	x.start()
	x.ready()
	x.startProxies()
	stop := x.load()
	for range rounds(t, 1) {
		for _, off := range []time.Duration{-2 * time.Hour, 0, 3 * time.Hour, -30 * 24 * time.Hour, 0} {
			pause(300)
			set(off)
			pause(300)
			x.ended(patience)
			x.process.end(t, syscall.SIGKILL)
			set(off - time.Hour)
			x.start()
			x.ready()
			x.ended(patience)
		}
	}
	stop()
	x.ended(patience)
	x.check()
	t.Logf("%d operations, %d events came again", len(x.accepted), x.heard.again())
	x.process.end(t, syscall.SIGTERM)
	x.audited()
}
