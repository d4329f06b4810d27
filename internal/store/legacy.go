package store

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io/fs"
	"path/filepath"
	"strings"

	"github.com/meshery/meshery-filters/internal/problem"
)

// What the first version kept in files of the state directory.
const (
	oldRecords      = "records" // each with its key and checksum in the first line
	oldRecordSuffix = ".record"
	oldBlobs        = "modules" // each named for its digest
	oldBlobSuffix   = ".wasm"
	oldTemp         = ".tmp-"
)

// takeOver brings what the first version kept into the store, and deletes its folders once it is there. Nothing is
// deleted while a file of it cannot be read. A start that is cut off begins again.
func (s *Store) takeOver(ctx context.Context) error {
	blobs, err := s.dir.oldFiles(oldBlobs, oldBlobSuffix)
	if err != nil {
		return err
	}
	records, err := s.dir.oldFiles(oldRecords, oldRecordSuffix)
	if err != nil {
		return err
	}
	for _, name := range blobs {
		data, err := s.dir.read(name, maxBlob)
		if err != nil {
			return err
		}
		if digest := sha256.Sum256(data); hex.EncodeToString(digest[:])+oldBlobSuffix != filepath.Base(name) {
			return s.dir.damaged(name, "its content does not match its name", "delete it, and apply the filters that use this module again")
		}
		if _, err := s.blobs.Put(ctx, data); err != nil {
			return err
		}
	}
	for _, name := range records {
		key, value, err := s.dir.oldRecord(name)
		if err != nil {
			return err
		}
		there, err := s.records.Get(ctx, key)
		if err != nil {
			return err
		}
		if there != nil { // a start before this one was cut off, or another adapter of a shared store knows better
			continue
		}
		if err := s.records.Put(ctx, key, value); err != nil {
			return err
		}
	}
	for _, folder := range []string{oldRecords, oldBlobs} {
		if err := s.dir.root.RemoveAll(folder); err != nil {
			return s.dir.failed("removing", folder, err)
		}
	}
	if len(records)+len(blobs) > 0 {
		s.log.Info("what an earlier version kept was taken over", "records", len(records), "modules", len(blobs))
	}
	return s.dir.syncFolder(".")
}

// oldFiles lists a folder's files of that kind; other names in it are refused, since the folder goes.
func (d *Dir) oldFiles(folder, suffix string) ([]string, error) {
	if _, err := d.root.Stat(folder); errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	names, err := d.list(folder)
	if err != nil {
		return nil, err
	}
	var files []string
	for _, name := range names {
		switch {
		case strings.HasPrefix(name, oldTemp): // a write that never ended
		case strings.HasSuffix(name, suffix):
			files = append(files, filepath.Join(folder, name))
		default:
			return nil, problem.StoreFailed.New("%s is not a file of the adapter's; move it out of the state directory, whose %s folder is taken over and deleted",
				filepath.Join(d.path, folder, name), folder)
		}
	}
	return files, nil
}

// oldRecord reads and verifies a record's file.
func (d *Dir) oldRecord(name string) (key string, value []byte, err error) {
	const maxHeader = 8 << 10
	const way = "delete it to go on without what it held"
	data, err := d.read(name, maxHeader+maxValue)
	if err != nil {
		return "", nil, err
	}
	line, value, ok := bytes.Cut(data, []byte("\n"))
	var head struct {
		Key    string `json:"key"`
		SHA256 string `json:"sha256"` // of the value
	}
	if !ok || json.Unmarshal(line, &head) != nil {
		return "", nil, d.damaged(name, "its first line is not that of a record", way)
	}
	if digest := sha256.Sum256(value); hex.EncodeToString(digest[:]) != head.SHA256 {
		return "", nil, d.damaged(name, "its content does not match its checksum", way)
	}
	return head.Key, value, nil
}
