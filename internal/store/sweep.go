package store

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/meshery/meshery-filters/internal/problem"
)

// unused is a blob that nothing referred to, or bytes that belong to none.
type unused struct {
	sequence uint64 // of its description, which each Touch makes another; of bytes, how many chunks they are
	since    time.Time
}

// Swept is what a Sweep did.
type Swept struct {
	Deleted []string // digests
	Freed   uint64   // bytes
}

func blobSubject(digest string) string {
	return "$O." + blobsBucket + ".M." + base64.URLEncoding.EncodeToString([]byte(digest))
}

// blobInfo reads the description of a blob; nil when there is none.
func (b *blobsInObjects) info(ctx context.Context, digest string) (info *jetstream.ObjectInfo, sequence uint64, err error) {
	m, err := b.store.last(ctx, b.stream, blobSubject(digest))
	if err != nil || m == nil {
		return nil, 0, err
	}
	if err := json.Unmarshal(m.Data, &info); err != nil {
		return nil, 0, problem.StateDamaged.New("the description of module %s in %s: %w", digest, b.where, err)
	}
	return info, m.Sequence, nil
}

// describe replaces the description of a blob, unless another has since it was read.
func (b *blobsInObjects) describe(ctx context.Context, digest string, info *jetstream.ObjectInfo, after uint64) (uint64, error) {
	data, err := json.Marshal(info)
	if err != nil {
		return 0, problem.Internal.New("describe module %s: %w", digest, err)
	}
	return b.store.write(ctx, b.stream, &nats.Msg{Subject: blobSubject(digest), Data: data,
		Header: nats.Header{jetstream.MsgRollup: {jetstream.MsgRollupSubject}}}, after)
}

// Touch writes a blob's description again, which makes it another than the one that a Sweep may be about to delete.
func (b *blobsInObjects) Touch(ctx context.Context, digest string) (there bool, err error) {
	for {
		b.mu.Lock()
		fresh := time.Since(b.touched[digest]) < b.keep/4 && !b.touched[digest].IsZero()
		b.mu.Unlock()
		if fresh {
			return true, nil
		}
		info, sequence, err := b.info(ctx, digest)
		if err != nil || info == nil || info.Deleted {
			return false, err
		}
		_, err = b.describe(ctx, digest, info, sequence)
		if errors.Is(err, ErrStale) {
			continue
		}
		if err == nil {
			b.mu.Lock()
			b.touched[digest] = time.Now()
			b.mu.Unlock()
		}
		return err == nil, err
	}
}

const chunkSubject = "$O." + blobsBucket + ".C." // and the NUID of the object

// Sweep deletes the blobs that referred did not name, now and at each Sweep since KeepBlobs ago, and that nobody has put
// or touched since. referred is asked after the blobs were listed. Several adapters may sweep at once. It also deletes the
// bytes that a Put left which ended too soon.
func (s *Store) Sweep(ctx context.Context, referred func(context.Context) (map[string]bool, error)) (swept Swept, err error) {
	b := s.blobs.(*blobsInObjects)
	// Bytes come before what describes them, so these are listed first.
	bytes, err := try(ctx, s, func(ctx context.Context) (*jetstream.StreamInfo, error) {
		return b.stream.Info(ctx, jetstream.WithSubjectFilter(chunkSubject+">"))
	})
	if err != nil {
		return swept, storeFailed("listing the bytes of modules", err)
	}
	list, err := try(ctx, s, func(ctx context.Context) ([]*jetstream.ObjectInfo, error) {
		list, err := b.objects.List(ctx)
		if errors.Is(err, jetstream.ErrNoObjectsFound) {
			return nil, nil
		}
		return list, err
	})
	if err != nil {
		return swept, storeFailed("listing the modules", err)
	}
	needed, err := referred(ctx)
	if err != nil {
		return swept, err
	}
	before := s.unused
	s.unused = map[string]unused{}
	loose := bytes.State.Subjects // chunks by subject
	for _, o := range list {
		digest := o.Name
		delete(loose, chunkSubject+o.NUID)
		if needed[digest] {
			continue
		}
		info, sequence, err := b.info(ctx, digest)
		if err != nil {
			return swept, err
		}
		if info == nil || info.Deleted {
			continue
		}
		was := before[digest]
		if was.sequence != sequence {
			was = unused{sequence, time.Now()}
		}
		if time.Since(was.since) < b.keep {
			s.unused[digest] = was
			continue
		}
		gone, err := b.delete(ctx, digest, info, sequence)
		if err != nil {
			return swept, err
		}
		if gone {
			swept.Deleted, swept.Freed = append(swept.Deleted, digest), swept.Freed+info.Size
		}
	}
	for subject, chunks := range loose {
		was := before[subject]
		if was.sequence != chunks {
			was = unused{chunks, time.Now()}
		}
		if time.Since(was.since) < max(b.keep, b.longestPut) {
			s.unused[subject] = was
			continue
		}
		if _, err := try(ctx, s, func(ctx context.Context) (struct{}, error) {
			return struct{}{}, b.stream.Purge(ctx, jetstream.WithPurgeSubject(subject))
		}); err != nil {
			return swept, storeFailed("deleting bytes that no module has", err)
		}
		s.log.Info("bytes that no module has are deleted", "chunks", chunks)
	}
	return swept, nil
}

// delete marks a blob as deleted, unless it was put or touched meanwhile, and then lets go of its bytes.
func (b *blobsInObjects) delete(ctx context.Context, digest string, info *jetstream.ObjectInfo, sequence uint64) (bool, error) {
	chunks := chunkSubject + info.NUID
	marked := *info
	marked.Deleted, marked.Size, marked.Chunks, marked.Digest = true, 0, 0, ""
	mark, err := b.describe(ctx, digest, &marked, sequence)
	if errors.Is(err, ErrStale) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	b.mu.Lock()
	delete(b.shared, digest)
	delete(b.touched, digest)
	b.mu.Unlock()
	_, err = try(ctx, b.store, func(ctx context.Context) (struct{}, error) {
		err := b.stream.Purge(ctx, jetstream.WithPurgeSubject(chunks))
		if err == nil { // the mark itself, and not what has been put since
			err = b.stream.Purge(ctx, jetstream.WithPurgeSubject(blobSubject(digest)), jetstream.WithPurgeSequence(mark+1))
		}
		return struct{}{}, err
	})
	if err != nil {
		return true, storeFailed("deleting module "+digest, err)
	}
	return true, nil
}
