package consul

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io"
	"io/fs"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/meshery/meshery-filters/internal/plan"
	"github.com/meshery/meshery-filters/internal/problem"
)

// ModulePath is where proxies read a module of that digest, once it is there; empty where no folder is named.
func (c *Client) ModulePath(digest string) string {
	if c.Folder == "" {
		return ""
	}
	return filepath.Join(c.Folder, digest+".wasm")
}

// PutModule writes a module to its ModulePath, unless it is there. Without bytes it only makes sure that it is. What it wrote
// has a mark beside it, one of each Consul that the module was put there for; what others wrote has none.
func (c *Client) PutModule(digest string, data []byte) error {
	c.folder.Lock()
	defer c.folder.Unlock()
	path := c.ModulePath(digest)
	there, err := holds(path, digest)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return problem.ModuleNotWritten.New("%w", err)
	}
	if there {
		lie, err := c.list()
		if err == nil && lie.marks[digest] != nil {
			err = c.putMark(digest)
		}
		if err != nil {
			return problem.ModuleNotWritten.New("%w", err)
		}
		return nil
	}
	if data == nil {
		return problem.ModuleUnavailable.New("%s is not there, and the adapter does not have the module any more", path)
	}
	// Renamed into place, so that no proxy reads half of it; proxies may run as another user.
	f, err := os.CreateTemp(c.Folder, unfinished+"*")
	if err != nil {
		return problem.ModuleNotWritten.New("%w", err)
	}
	defer os.Remove(f.Name())
	_, err = f.ReadFrom(bytes.NewReader(data))
	err = errors.Join(err, f.Chmod(0o644), f.Sync(), f.Close())
	if err == nil {
		err = c.putMark(digest) // before the file, so that none is without
	}
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		return problem.ModuleNotWritten.New("%w", err)
	}
	return nil
}

// holds says whether a file is the module of a digest.
func holds(path, digest string) (bool, error) {
	f, err := os.Open(path)
	if err != nil {
		return false, err
	}
	defer f.Close()
	sum := sha256.New()
	if _, err := io.Copy(sum, f); err != nil {
		return false, err
	}
	return hex.EncodeToString(sum.Sum(nil)) == digest, nil
}

// mark is the file whose time says when a module was last needed by a Consul.
func (c *Client) mark(digest, by string) string {
	return filepath.Join(c.Folder, "."+digest+"."+by)
}

var (
	moduleForm = regexp.MustCompile(`^([0-9a-f]{64})\.wasm$`)
	markForm   = regexp.MustCompile(`^\.([0-9a-f]{64})\.([0-9a-f]{16})$`)
)

// unfinished begins the names of files that PutModule writes to.
const unfinished = ".module-"

// lying is what the folder has.
type lying struct {
	modules []string            // digests
	halves  []string            // names of files that are written to, or were when somebody was cut off
	marks   map[string][]string // by digest: what self is of the Consuls that have needed it
}

func (c *Client) list() (lie lying, err error) {
	files, err := os.ReadDir(c.Folder)
	if errors.Is(err, fs.ErrNotExist) { // which whoever wants to put something there is told
		err = nil
	}
	lie.marks = map[string][]string{}
	for _, f := range files {
		if m := moduleForm.FindStringSubmatch(f.Name()); m != nil && f.Type().IsRegular() {
			lie.modules = append(lie.modules, m[1])
		}
		if strings.HasPrefix(f.Name(), unfinished) && f.Type().IsRegular() {
			lie.halves = append(lie.halves, f.Name())
		}
		if m := markForm.FindStringSubmatch(f.Name()); m != nil {
			lie.marks[m[1]] = append(lie.marks[m[1]], m[2])
		}
	}
	return lie, err
}

// self tells this Consul apart from others that use the same folder.
func (c *Client) self() string {
	sum := sha256.Sum256([]byte(c.Addr + "|" + c.Namespace + "|" + c.Partition))
	return hex.EncodeToString(sum[:8])
}

func (c *Client) putMark(digest string) error {
	path, now := c.mark(digest, c.self()), time.Now()
	f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	return errors.Join(f.Close(), os.Chtimes(path, now, now))
}

// SweepModules deletes from the folder the modules that PutModule wrote and that nobody has needed for the time of grace, in
// which a proxy may still begin with a configuration that names them. A file that has other contents stays, and so does one
// that an entry names: somebody may have written that without us. It deletes none when the token may not see all entries.
func (c *Client) SweepModules(ctx context.Context, needed map[string]bool, grace time.Duration) (deleted []string, err error) {
	if c.Folder == "" {
		return nil, nil
	}
	lie, err := c.list()
	if err != nil {
		return nil, err
	}
	for _, name := range lie.halves {
		path := filepath.Join(c.Folder, name)
		if at, err := os.Stat(path); err == nil && time.Since(at.ModTime()) > grace {
			if err := os.Remove(path); err != nil {
				return nil, err
			}
		}
	}
	marked := slices.DeleteFunc(slices.Sorted(maps.Keys(lie.marks)), func(digest string) bool { return !slices.Contains(lie.marks[digest], c.self()) })
	if len(marked) == 0 {
		return nil, nil
	}
	named, err := c.named(ctx)
	if err != nil {
		return nil, err
	}
	for _, digest := range marked {
		gone, failed := c.sweepModule(digest, needed[digest] || named(digest), grace)
		if err = errors.Join(err, failed); gone {
			deleted = append(deleted, digest)
		}
	}
	return deleted, err
}

// named tells which modules entries name now, whoever has written them.
func (c *Client) named(ctx context.Context) (func(digest string) bool, error) {
	var entries []byte
	for _, kind := range kinds {
		all, err := c.do(ctx, call{method: http.MethodGet, path: "/v1/config/" + kind, global: kind == "proxy-defaults", whole: true})
		if err != nil {
			return nil, err
		}
		entries = append(entries, all...)
	}
	return func(digest string) bool { return bytes.Contains(entries, []byte(digest+".wasm")) }, nil
}

// leftFiles are the modules in the folder that neither a chain of this Consul nor a revision or an entry names, and that
// stay since they have no mark: somebody else has put them there, or an adapter that made no marks yet.
func (c *Client) leftFiles(ctx context.Context) (paths []string, err error) {
	if c.Folder == "" {
		return nil, nil
	}
	lie, err := c.list()
	if err != nil {
		return nil, err
	}
	left := slices.DeleteFunc(lie.modules, func(digest string) bool { return lie.marks[digest] != nil })
	if len(left) == 0 {
		return nil, nil
	}
	all, damaged, err := c.inventories(ctx)
	if err != nil || len(damaged) > 0 { // what those have is not known
		return nil, err
	}
	named, err := c.named(ctx)
	if err != nil {
		return nil, err
	}
	needed := map[string]bool{}
	for _, v := range all {
		for _, had := range append(v.Revisions, plan.Past{Filters: v.Chain.Filters}) {
			for _, f := range had.Filters {
				needed[f.Spec.Module.SHA256] = true
			}
		}
	}
	for _, digest := range left {
		if !needed[digest] && !named(digest) {
			paths = append(paths, c.ModulePath(digest))
		}
	}
	return paths, nil
}

func (c *Client) sweepModule(digest string, needed bool, grace time.Duration) (deleted bool, err error) {
	c.folder.Lock() // somebody may be about to need it again
	defer c.folder.Unlock()
	if needed {
		return false, c.putMark(digest)
	}
	own := c.mark(digest, c.self())
	at, err := os.Stat(own)
	if err != nil || time.Since(at.ModTime()) < grace {
		return false, err
	}
	lie, err := c.list()
	if err != nil {
		return false, err
	}
	if len(lie.marks[digest]) > 1 { // others need it
		return false, os.Remove(own)
	}
	if is, err := holds(c.ModulePath(digest), digest); is && err == nil {
		if err := os.Remove(c.ModulePath(digest)); err != nil {
			return false, err
		}
		deleted = true
	}
	return deleted, os.Remove(own)
}
