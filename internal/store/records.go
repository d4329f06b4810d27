package store

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"path/filepath"
	"strings"
	"unicode/utf8"

	"github.com/meshery/meshery-filters/internal/problem"
)

const (
	recordSuffix = ".record"
	maxKey       = 512      // bytes
	maxRecord    = 32 << 20 // bytes of a value
	maxHeader    = 8 << 10  // bytes; a key may grow sixfold in JSON
	deleteRecord = "delete it to go on without what it held"
)

type records struct{ dir *Dir }

var _ Records = (*records)(nil)

// header is the first line of a record's file. The value follows as it is.
type header struct {
	Key    string `json:"key"`
	SHA256 string `json:"sha256"` // of the value
}

// recordName is safe on every file system, whatever the key holds: what can be read of the key for people, and its
// digest to tell apart.
func recordName(key string) string {
	readable := strings.Map(func(r rune) rune {
		switch {
		case r >= 'a' && r <= 'z', r >= '0' && r <= '9', r == '-':
			return r
		}
		return '_'
	}, key[:min(len(key), 64)])
	digest := sha256.Sum256([]byte(key))
	return filepath.Join(recordsName, readable+"."+hex.EncodeToString(digest[:])+recordSuffix)
}

func checkKey(ctx context.Context, key string) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if key == "" || len(key) > maxKey || !utf8.ValidString(key) {
		return problem.StoreFailed.New("the key %.*q is not 1 to %d bytes of UTF-8", maxKey, key, maxKey)
	}
	return nil
}

func (r *records) Get(ctx context.Context, key string) ([]byte, error) {
	if err := checkKey(ctx, key); err != nil {
		return nil, err
	}
	_, value, err := r.load(recordName(key))
	return value, err
}

func (r *records) Put(ctx context.Context, key string, value []byte) error {
	if err := checkKey(ctx, key); err != nil {
		return err
	}
	if len(value) > maxRecord {
		return problem.StoreFailed.New("the record %q has %d bytes and may have %d", key, len(value), maxRecord)
	}
	digest := sha256.Sum256(value)
	head, err := json.Marshal(header{Key: key, SHA256: hex.EncodeToString(digest[:])})
	if err != nil {
		return problem.StoreFailed.New("encoding the record %q: %w", key, err)
	}
	return r.dir.write(recordName(key), append(head, '\n'), value)
}

func (r *records) Delete(ctx context.Context, key string) error {
	if err := checkKey(ctx, key); err != nil {
		return err
	}
	return r.dir.remove(recordName(key))
}

func (r *records) All(ctx context.Context) (map[string][]byte, error) {
	names, err := r.dir.list(recordsName)
	if err != nil {
		return nil, err
	}
	all := make(map[string][]byte, len(names))
	for _, name := range names {
		if !strings.HasSuffix(name, recordSuffix) {
			continue
		}
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		key, value, err := r.load(filepath.Join(recordsName, name))
		if err != nil {
			return nil, err
		}
		if value != nil { // else it was deleted meanwhile
			all[key] = value
		}
	}
	return all, nil
}

// load reads and verifies a record's file. The value is nil only when the file is not there.
func (r *records) load(name string) (key string, value []byte, err error) {
	data, err := r.dir.read(name, maxHeader+maxRecord)
	if data == nil || err != nil {
		return "", nil, err
	}
	line, value, ok := bytes.Cut(data, []byte("\n"))
	var head header
	if !ok || json.Unmarshal(line, &head) != nil {
		return "", nil, r.dir.damaged(name, "its first line is not that of a record", deleteRecord)
	}
	if recordName(head.Key) != name {
		return "", nil, r.dir.damaged(name, "it holds the record of another key", deleteRecord)
	}
	if digest := sha256.Sum256(value); hex.EncodeToString(digest[:]) != head.SHA256 {
		return "", nil, r.dir.damaged(name, "its content does not match its checksum", deleteRecord)
	}
	return head.Key, value, nil
}
