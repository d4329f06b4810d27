package store

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"sync"
	"time"
	"unsafe"
	"weak"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/meshery/meshery-filters/internal/problem"
)

const (
	maxBlob    = 64 << 20 // bytes
	longestPut = 3 * patience
)

// blobsInObjects shares the bytes of a blob among everybody who holds them, and holds none itself.
type blobsInObjects struct {
	store   *Store
	objects jetstream.ObjectStore
	stream  jetstream.Stream // of the objects
	where   string
	keep    time.Duration // how long what nothing refers to is kept
	// longestPut bounds the time from a Put's first chunk to the description that makes it a blob.
	longestPut time.Duration

	mu      sync.Mutex
	shared  map[string]sharedBytes // by digest
	touched map[string]time.Time   // when this process last put or touched a blob, by digest
}

// sharedBytes is a slice that does not keep its bytes alive. The weak pointer is to the first of them, so any slice of
// them keeps all.
type sharedBytes struct {
	first weak.Pointer[byte]
	size  int
}

var _ Blobs = (*blobsInObjects)(nil)

var digestForm = regexp.MustCompile(`^[0-9a-f]{64}$`)

// Put of bytes that are damaged mends them.
func (b *blobsInObjects) Put(ctx context.Context, data []byte) (string, error) {
	if err := ctx.Err(); err != nil {
		return "", err
	}
	if len(data) == 0 || len(data) > maxBlob {
		return "", problem.StoreFailed.New("a module has %d bytes and may have 1 to %d", len(data), maxBlob)
	}
	sum := sha256.Sum256(data)
	digest := hex.EncodeToString(sum[:])
	// What is there is first kept from being deleted, and then looked at: bytes that others still hold tell nothing.
	there, err := b.Touch(ctx, digest)
	if err != nil && !errors.Is(err, problem.StateDamaged) {
		return "", err
	}
	if there {
		if _, err := b.Get(ctx, digest); err == nil {
			return digest, nil
		}
	}
	if err := b.put(ctx, digest, sum[:], data); err != nil {
		return "", err
	}
	b.mu.Lock()
	b.touched[digest] = time.Now()
	b.mu.Unlock()
	return digest, nil
}

// put writes the object as the client library does (ADR-20 of NATS), but one chunk after the other, each acknowledged:
// the library's own way publishes asynchronously, and leaves a goroutine behind when it ends too soon.
func (b *blobsInObjects) put(ctx context.Context, name string, sum, data []byte) error {
	const chunk = 128 << 10
	if err := b.store.ails(); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, longestPut)
	defer cancel()
	publish := func(m *nats.Msg) error {
		_, err := try(ctx, b.store, func(ctx context.Context) (*jetstream.PubAck, error) { return b.store.js.PublishMsg(ctx, m) })
		if err != nil {
			return storeFailed("storing module "+name, err)
		}
		return nil
	}
	info := jetstream.ObjectInfo{ObjectMeta: jetstream.ObjectMeta{Name: name, Opts: &jetstream.ObjectMetaOptions{ChunkSize: chunk}},
		Bucket: blobsBucket, NUID: rand.Text(), Size: uint64(len(data)), Digest: "SHA-256=" + base64.URLEncoding.EncodeToString(sum)}
	for part := range slices.Chunk(data, chunk) {
		// A chunk that comes twice would make the object another one: this id makes it come once.
		id := fmt.Sprintf("%s-%d", info.NUID, info.Chunks)
		if err := publish(&nats.Msg{Subject: chunkSubject + info.NUID, Data: part, Header: nats.Header{nats.MsgIdHdr: {id}}}); err != nil {
			return err
		}
		info.Chunks++
	}
	meta, err := json.Marshal(info)
	if err != nil {
		return problem.Internal.New("describe module %s: %w", name, err)
	}
	return publish(&nats.Msg{Subject: blobSubject(name), Data: meta,
		Header: nats.Header{jetstream.MsgRollup: {jetstream.MsgRollupSubject}}})
}

func (b *blobsInObjects) Get(ctx context.Context, digest string) ([]byte, error) {
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
	ctx, cancel := context.WithTimeout(ctx, 3*patience)
	defer cancel()
	// An answer of which a part does not come, since a server ended meanwhile, ends with its context only.
	each := 2 * time.Second
	longer := func() time.Duration { each *= 2; return each }
	data, err := tryFor(ctx, b.store, longer, func(ctx context.Context) ([]byte, error) {
		data, err := b.objects.GetBytes(ctx, digest)
		if errors.Is(err, jetstream.ErrObjectNotFound) || errors.Is(err, jetstream.ErrDigestMismatch) {
			return nil, final{err}
		}
		return data, err
	})
	if errors.Is(err, jetstream.ErrObjectNotFound) {
		return nil, problem.ModuleUnavailable.New("no module with the digest %s is stored in %s", digest, b.where)
	}
	if errors.Is(err, jetstream.ErrDigestMismatch) {
		return nil, b.damaged(digest)
	}
	if err != nil {
		return nil, storeFailed("reading module "+digest, err)
	}
	if sum := sha256.Sum256(data); hex.EncodeToString(sum[:]) != digest {
		return nil, b.damaged(digest)
	}
	if b.shared == nil {
		b.shared = map[string]sharedBytes{}
	}
	b.shared[digest] = sharedBytes{weak.Make(&data[0]), len(data)}
	return data, nil
}

func (b *blobsInObjects) damaged(digest string) error {
	return problem.StateDamaged.New("module %s in %s is damaged; restore the folder from a copy, or apply the filters that use it again, which mends it", digest, b.where)
}
