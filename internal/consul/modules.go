package consul

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/meshery/meshery-filters/internal/problem"
)

// ModulePath is where proxies read a module of that digest, once it is there; empty where no folder is named.
func (c *Client) ModulePath(digest string) string {
	if c.Folder == "" {
		return ""
	}
	return filepath.Join(c.Folder, digest+".wasm")
}

// PutModule writes a module to its ModulePath, unless it is there. Without bytes it only makes sure that it is.
func (c *Client) PutModule(digest string, data []byte) error {
	path := c.ModulePath(digest)
	there, err := os.ReadFile(path)
	if err == nil {
		if sum := sha256.Sum256(there); hex.EncodeToString(sum[:]) == digest {
			return nil
		}
	} else if !errors.Is(err, fs.ErrNotExist) {
		return problem.ModuleNotWritten.New("%w", err)
	}
	if data == nil {
		return problem.ModuleUnavailable.New("%s is not there, and the adapter does not have the module any more", path)
	}
	// Renamed into place, so that no proxy reads half of it; proxies may run as another user.
	f, err := os.CreateTemp(c.Folder, ".module-*")
	if err != nil {
		return problem.ModuleNotWritten.New("%w", err)
	}
	defer os.Remove(f.Name())
	_, err = f.ReadFrom(bytes.NewReader(data))
	err = errors.Join(err, f.Chmod(0o644), f.Sync(), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		return problem.ModuleNotWritten.New("%w", err)
	}
	return nil
}
