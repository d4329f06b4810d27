package store

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"

	"github.com/meshery/meshery-filters/internal/problem"
)

// The layout of a state directory.
const (
	lockName      = "lock"
	componentName = "component-id"
	streamsName   = "streams" // tells that the streams were made, so that a missing one is damage
	sealName      = "seal-key"
	jetStreamName = "jetstream"
	tempPrefix    = ".tmp-"
)

// Dir is a state folder that one process owns at a time. Folders that it makes are 0700, files 0600. A write is on disk
// when it returns, whole or not at all: it goes to a temporary file beside its place, which is synced and renamed.
type Dir struct {
	path   string   // absolute, for messages
	root   *os.Root // no name leads out of it, and it stays the same folder if a parent is renamed
	lock   *os.File
	temps  atomic.Uint64
	making sync.Mutex // of the component id
}

// OpenDir makes the folder if need be and takes it for this process until Close. problem.StoreFailed when another
// process has it, or when it cannot be written.
func OpenDir(path string) (*Dir, error) {
	path, err := filepath.Abs(path)
	if err != nil {
		return nil, problem.StoreFailed.New("finding the state directory: %w", err)
	}
	if err := os.MkdirAll(path, 0o700); err != nil {
		return nil, problem.StoreFailed.New("making the state directory (choose another with --state-dir): %w", err)
	}
	root, err := os.OpenRoot(path)
	if err != nil {
		return nil, problem.StoreFailed.New("opening the state directory (choose another with --state-dir): %w", err)
	}
	d := &Dir{path: path, root: root}
	if err := d.open(); err != nil {
		d.Close()
		return nil, err
	}
	return d, nil
}

func (d *Dir) open() error {
	if err := d.takeLock(); err != nil {
		return err
	}
	// So that the folders themselves survive a power cut. The parent may not be ours to open.
	if err := d.syncFolder("."); err != nil {
		return err
	}
	if parent, err := os.Open(filepath.Dir(d.path)); err == nil {
		_ = parent.Sync()
		_ = parent.Close()
	}
	// The lock is ours, so a temporary file is what a process left that died while writing.
	names, err := d.list(".")
	if err != nil {
		return err
	}
	for _, name := range names {
		if !strings.HasPrefix(name, tempPrefix) {
			continue
		}
		if err := d.root.Remove(name); err != nil {
			return d.failed("removing", name, err)
		}
	}
	return nil
}

// takeLock uses flock, which the kernel lets go of however the process ends.
func (d *Dir) takeLock() error {
	f, err := d.root.OpenFile(lockName, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return d.failed("opening", lockName, err)
	}
	d.lock = f
	err = syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
	if errors.Is(err, syscall.EWOULDBLOCK) {
		owner := ""
		if pid, err := io.ReadAll(io.LimitReader(f, 20)); err == nil && len(pid) > 0 {
			owner = ", process " + strings.TrimSpace(string(pid)) + ","
		}
		return problem.StateInUse.New("another adapter%s is using %s", owner, d.path)
	}
	if err != nil {
		return d.failed("locking", lockName, err)
	}
	// The process id only makes the refusal above helpful.
	if err := f.Truncate(0); err != nil {
		return d.failed("writing", lockName, err)
	}
	if _, err := fmt.Fprintln(f, os.Getpid()); err != nil {
		return d.failed("writing", lockName, err)
	}
	return nil
}

// Close gives the folder to whoever opens it next. Afterwards every use of the Dir fails.
func (d *Dir) Close() error {
	err := d.root.Close()
	if d.lock != nil {
		err = errors.Join(err, d.lock.Close())
	}
	return err
}

// Path is the folder's absolute path.
func (d *Dir) Path() string { return d.path }

var uuid = regexp.MustCompile(`^[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$`)

// ComponentID is the adapter's UUID: made up once, the same ever after.
func (d *Dir) ComponentID(ctx context.Context) (string, error) {
	if err := ctx.Err(); err != nil {
		return "", err
	}
	d.making.Lock()
	defer d.making.Unlock()
	data, err := d.read(componentName, 128)
	if err != nil {
		return "", err
	}
	if data != nil {
		id, whole := unchecked(string(data))
		if !uuid.MatchString(id) || !whole {
			return "", d.damaged(componentName, "it does not hold the UUID that was written", "delete it to get a new one")
		}
		return id, nil
	}
	var b [16]byte
	rand.Read(b[:]) // never fails
	b[6] = b[6]&0x0f | 0x40
	b[8] = b[8]&0x3f | 0x80
	id := fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
	if err := d.write(componentName, []byte(checked(id))); err != nil {
		return "", err
	}
	return id, nil
}

// checked is a line with the text and its checksum.
func checked(text string) string {
	sum := sha256.Sum256([]byte(text))
	return text + " " + hex.EncodeToString(sum[:8]) + "\n"
}

// unchecked takes the text out of such a line, and says whether it is the one that was written. A first version wrote
// none.
func unchecked(line string) (text string, whole bool) {
	text, sum, found := strings.Cut(strings.TrimSpace(line), " ")
	return text, !found || checked(text) == text+" "+sum+"\n"
}

// list names what is in a folder.
func (d *Dir) list(folder string) ([]string, error) {
	f, err := d.root.Open(folder)
	if err != nil {
		return nil, d.failed("opening", folder, err)
	}
	defer f.Close()
	names, err := f.Readdirnames(-1)
	if err != nil {
		return nil, d.failed("listing", folder, err)
	}
	return names, nil
}

// read returns a whole file, or nil when it is not there.
func (d *Dir) read(name string, limit int64) ([]byte, error) {
	f, err := d.root.Open(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, d.failed("opening", name, err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, d.failed("reading", name, err)
	}
	if info.Size() > limit {
		return nil, d.damaged(name, fmt.Sprintf("it has %d bytes and at most %d were ever written", info.Size(), limit), "delete it")
	}
	data := make([]byte, info.Size())
	if _, err := io.ReadFull(f, data); err != nil {
		return nil, d.failed("reading", name, err)
	}
	return data, nil
}

// write puts the parts into a file, in place of what it held.
func (d *Dir) write(name string, parts ...[]byte) error {
	folder := filepath.Dir(name)
	temp := filepath.Join(folder, fmt.Sprintf("%s%d", tempPrefix, d.temps.Add(1)))
	err := d.writeTemp(temp, parts)
	if err == nil {
		err = d.root.Rename(temp, name)
	}
	if err != nil {
		_ = d.root.Remove(temp) // else OpenDir will
		return d.failed("writing", name, err)
	}
	return d.syncFolder(folder)
}

func (d *Dir) writeTemp(temp string, parts [][]byte) (err error) {
	f, err := d.root.OpenFile(temp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	for _, part := range parts {
		if _, err := f.Write(part); err != nil {
			return err
		}
	}
	return f.Sync()
}

// syncFolder makes the names in a folder survive a power cut.
func (d *Dir) syncFolder(folder string) error {
	f, err := d.root.Open(folder)
	if err != nil {
		return d.failed("syncing", folder, err)
	}
	defer f.Close()
	if err := f.Sync(); err != nil {
		return d.failed("syncing", folder, err)
	}
	return nil
}

func (d *Dir) failed(doing, name string, err error) error {
	// The error's own path is relative to the folder, or that of a temporary file.
	var pathError *fs.PathError
	var linkError *os.LinkError
	switch {
	case errors.As(err, &pathError):
		err = pathError.Err
	case errors.As(err, &linkError):
		err = linkError.Err
	}
	return problem.StoreFailed.New("%s %s: %w", doing, filepath.Join(d.path, name), err)
}

func (d *Dir) damaged(name, why, remedy string) error {
	return problem.StateDamaged.New("%s is damaged: %s; restore it from a copy, or %s", filepath.Join(d.path, name), why, remedy)
}
