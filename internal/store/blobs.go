package store

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"path/filepath"
	"regexp"
	"sync"
	"unsafe"
	"weak"

	"github.com/meshery/meshery-filters/internal/problem"
)

const (
	blobSuffix = ".wasm"
	maxBlob    = 64 << 20 // bytes
)

// blobs shares the bytes of a blob among everybody who holds them, and holds none itself.
type blobs struct {
	dir *Dir

	mu     sync.Mutex
	shared map[string]sharedBytes // by digest
}

// sharedBytes is a slice that does not keep its bytes alive. The weak pointer is to the first of them, so any slice of
// them keeps all.
type sharedBytes struct {
	first weak.Pointer[byte]
	size  int
}

var _ Blobs = (*blobs)(nil)

var digestForm = regexp.MustCompile(`^[0-9a-f]{64}$`)

func blobName(digest string) string { return filepath.Join(blobsName, digest+blobSuffix) }

// Put of bytes whose file is damaged mends the file.
func (b *blobs) Put(ctx context.Context, data []byte) (string, error) {
	if err := ctx.Err(); err != nil {
		return "", err
	}
	if len(data) == 0 || len(data) > maxBlob {
		return "", problem.StoreFailed.New("a module has %d bytes and may have 1 to %d", len(data), maxBlob)
	}
	sum := sha256.Sum256(data)
	digest := hex.EncodeToString(sum[:])
	if _, err := b.Get(ctx, digest); err == nil {
		return digest, nil
	}
	return digest, b.dir.write(blobName(digest), data)
}

func (b *blobs) Get(ctx context.Context, digest string) ([]byte, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if !digestForm.MatchString(digest) {
		return nil, problem.ModuleUnavailable.New("%.80q is not a SHA-256 digest in lower case hexadecimal", digest)
	}
	// Reading under the lock is what keeps two callers from holding the bytes twice.
	b.mu.Lock()
	defer b.mu.Unlock()
	if shared, ok := b.shared[digest]; ok {
		if first := shared.first.Value(); first != nil {
			return unsafe.Slice(first, shared.size), nil
		}
		delete(b.shared, digest)
	}
	name := blobName(digest)
	data, err := b.dir.read(name, maxBlob)
	if err != nil {
		return nil, err
	}
	if data == nil {
		return nil, problem.ModuleUnavailable.New("no module with the digest %s is stored in %s", digest, b.dir.path)
	}
	if sum := sha256.Sum256(data); hex.EncodeToString(sum[:]) != digest {
		return nil, b.dir.damaged(name, "its content does not match its name", "apply the filters that use this module again, which mends it")
	}
	if b.shared == nil {
		b.shared = map[string]sharedBytes{}
	}
	b.shared[digest] = sharedBytes{weak.Make(&data[0]), len(data)}
	return data, nil
}
