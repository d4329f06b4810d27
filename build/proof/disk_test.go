package proof

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/layer5io/meshery-adapter-library/meshes"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/meshery/meshery-filters/internal/server/filterspb"
)

// disk is a small file system that only the processes on it see: in a mount namespace, which root may make, and most
// others in a user namespace of their own.
type disk struct {
	t     *testing.T
	keeps *process // the namespace
	path  string   // in there
	enter []string // how to run something there
}

func newDisk(t *testing.T, megabytes int) *disk {
	t.Helper()
	d := &disk{t: t, path: t.TempDir()}
	unshare, enter := []string{"unshare", "--mount"}, []string{"nsenter", "--mount"}
	if os.Geteuid() != 0 {
		unshare = append(unshare, "--user", "--map-root-user")
		enter = append(enter, "--user", "--preserve-credentials")
	}
	d.keeps = launchCommand(t, exec.Command(unshare[0], append(unshare[1:], "sh", "-c",
		`mount -t tmpfs -o mode=0700,size="$1"m tmpfs "$0" && mkdir "$0/ready" && exec sleep infinity`, d.path, strconv.Itoa(megabytes))...))
	d.enter = append(enter, "--target", strconv.Itoa(d.keeps.cmd.Process.Pid))
	eventually(t, "the disk is there", func() error {
		select {
		case <-d.keeps.ended:
			t.Fatalf("a file system cannot be mounted in a namespace, which needs root or user namespaces: %v\n%s", d.keeps.err, d.keeps.log.String())
		default:
		}
		_, err := os.Stat(d.outside("ready"))
		return err
	})
	return d
}

// outside is where this process sees a file of the disk.
func (d *disk) outside(name string) string {
	return filepath.Join("/proc", strconv.Itoa(d.keeps.cmd.Process.Pid), "root", d.path, name)
}

// run runs a command on the disk.
func (d *disk) run(args ...string) {
	d.t.Helper()
	if out, err := exec.Command(d.enter[0], append(d.enter[1:], args...)...).CombinedOutput(); err != nil {
		d.t.Fatalf("%v: %v\n%s", args, err, out)
	}
}

// fill leaves no room, again if it must.
func (d *disk) fill() {
	d.t.Helper()
	f, err := os.OpenFile(d.outside("filler"), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		d.t.Fatal(err)
	}
	defer f.Close()
	for size := 1 << 20; size > 0; {
		if _, err := f.Write(make([]byte, size)); errors.Is(err, syscall.ENOSPC) {
			size /= 2
		} else if err != nil {
			d.t.Fatal(err)
		}
	}
}

func (d *disk) empty() {
	d.t.Helper()
	if err := os.Remove(d.outside("filler")); err != nil {
		d.t.Fatal(err)
	}
}

// refusedUnavailable asks for an operation that cannot be kept, and returns why not.
func (x *torture) refusedUnavailable() string {
	x.t.Helper()
	ctx, cancel := context.WithTimeout(x.t.Context(), patience)
	defer cancel()
	_, err := x.meshes.ApplyOperation(ctx, &meshes.ApplyRuleRequest{OpName: "apply_filter", Username: "torture",
		CustomBody: document("filter-9", map[string]any{"target": target(groupOf(0)), "module": map[string]any{"builtin": "headers"}})})
	if status.Code(err) != codes.Unavailable {
		x.t.Fatalf("an operation that cannot be kept: %v", err)
	}
	return err.Error()
}

// TestAFullDiskIsSaidAndCostsNothing fills the disk while operations are asked for, and makes room again: once while the
// adapter runs, and once after it was killed.
func TestAFullDiskIsSaidAndCostsNothing(t *testing.T) {
	onRealParts(t)
	t.Parallel()
	d := newDisk(t, 16)
	x := newTorture(t, newSubscriber(t))
	x.on(d)
	x.start()
	x.ready()
	x.startProxies()
	stop := x.load()
	for range rounds(t, 1) {
		for _, kill := range []bool{false, true} {
			pause(1000)
			d.fill()
			eventually(t, "the health service says that no operation is taken", func() error { return x.serves(false) })
			if text := x.refusedUnavailable(); !strings.Contains(text, "meshery-filters-1024") || !strings.Contains(text, x.state) || !strings.Contains(text, "no space left on device") {
				t.Errorf("the refusal does not help: %s", text)
			}
			if _, err := x.filters.List(t.Context(), &filterspb.ListRequest{}); err != nil {
				t.Errorf("the adapter does not answer: %v", err)
			}
			if kill { // what only asks is answered after a start too, and proxies get their chains
				x.process.end(t, syscall.SIGKILL)
				x.start()
				eventually(t, "the adapter is back and takes no operation", func() error {
					d.fill() // a start may make room, since it tidies up what the last one has left
					return x.serves(false)
				})
				x.refusedUnavailable()
			}
			d.empty()
			eventually(t, "the health service says that operations are taken", func() error { return x.serves(true) })
		}
	}
	pause(1000)
	stop()
	x.ended(patience)
	x.check()
	t.Logf("%d operations, %d events came again", len(x.accepted), x.heard.again())
}

// on has the adapter's state on the disk.
func (r *replica) on(d *disk) {
	state := filepath.Join(d.path, "state")
	for i, arg := range r.args {
		if arg == r.state {
			r.args[i] = state
		}
	}
	r.state, r.seen, r.within = state, d.outside("state"), d.enter
}

func TestAStateDirectoryThatCannotBeWrittenIsSaid(t *testing.T) {
	onRealParts(t)
	t.Parallel()
	d := newDisk(t, 16)
	x := newTorture(t, newSubscriber(t))
	x.on(d)
	x.start()
	x.ready()
	if err := x.submit(t.Context(), 0); err != nil {
		t.Fatal(err)
	}
	x.ended(patience)
	x.process.end(t, syscall.SIGKILL)
	if err := os.Remove(filepath.Join(x.seen, "addresses.json")); err != nil {
		t.Fatal(err)
	}
	d.run("mount", "-o", "remount,ro", d.path)
	x.start()
	if code := x.wait(t, patience); code == 0 || !strings.Contains(x.log.String(), x.state) || !strings.Contains(x.log.String(), "read-only file system") {
		t.Errorf("a start with a read-only state directory: exit code %d\n%s", code, x.log.String())
	}
	d.run("mount", "-o", "remount,rw", d.path)
	x.start()
	x.ready()
	x.check()
}

var damage = regexp.MustCompile(`(/\S+\.blk) is damaged (\d+) bytes from its beginning`)

// TestADamagedStateIsNamedAndHasAWayOut changes bytes in the middle of what is kept, and goes the documented way.
func TestADamagedStateIsNamedAndHasAWayOut(t *testing.T) {
	onRealParts(t)
	t.Parallel()
	x := newTorture(t, newSubscriber(t))
	x.start()
	x.ready()
	for i := range 5 {
		if err := x.submit(t.Context(), i); err != nil {
			t.Fatal(err)
		}
	}
	x.ended(patience)
	x.process.end(t, syscall.SIGTERM)
	block := filepath.Join(x.state, "jetstream", "jetstream", "$G", "streams", "KV_filters-records", "msgs", "1.blk")
	data, err := os.ReadFile(block)
	if err != nil {
		t.Fatal(err)
	}
	at := len(data) * 3 / 4
	for i := range 3 {
		data[at+i] ^= 0xff
	}
	if err := os.WriteFile(block, data, 0o600); err != nil {
		t.Fatal(err)
	}
	for range 2 { // a refusal changes nothing
		x.start()
		if code := x.wait(t, patience); code == 0 || !strings.Contains(x.log.String(), "meshery-filters-1053") {
			t.Fatalf("a start on damaged state: exit code %d\n%s", code, x.log.String())
		}
	}
	found := damage.FindStringSubmatch(x.log.String())
	if found == nil || found[1] != block {
		t.Fatalf("it does not say what is damaged:\n%s", x.log.String())
	}
	if now, err := os.ReadFile(block); err != nil || string(now) != string(data) {
		t.Fatalf("the damaged file was changed: %v", err)
	}
	for _, command := range [][]string{{"truncate", "--size", found[2], found[1]}, {"rm", filepath.Join(x.state, "marks")}} {
		if out, err := exec.Command(command[0], command[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%v: %v\n%s", command, err, out)
		}
	}
	x.start()
	x.ready()
	list, err := x.filters.List(t.Context(), &filterspb.ListRequest{})
	if err != nil {
		t.Fatal(err)
	}
	left := 0
	for _, c := range list.GetChains() {
		left += len(c.GetFilters())
	}
	if left == 0 || left > 4 {
		t.Errorf("%d filters are left", left)
	}
	// Applying what was lost again mends it.
	for i := range 4 {
		if err := x.submit(t.Context(), 10+i); err != nil {
			t.Fatal(err)
		}
	}
	x.ended(patience)
	x.check()
}
