package store

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/minio/highwayhash"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/meshery/meshery-filters/internal/problem"
)

// marksName is the file that says how far each stream has come, so that one which ends before is found to be cut off.
const marksName = "marks"

// streams are those of JetStream that must be whole.
var streams = []string{eventsStream, operationsStream, "KV_" + recordsBucket, "KV_" + cursorsBucket, "OBJ_" + blobsBucket}

// floorMark is where the file of marks notes the sequence before which every entry of the queue is done.
const floorMark = "first operation"

const (
	maxMarks = 4 << 10
	maxBlock = 256 << 20 // bytes of a file of JetStream's; it begins another after 8 MiB, but for a large message
)

// verify looks at the embedded JetStream's files before the server does, which would leave out what is damaged, and cut
// off what follows it, without a word. problem.StateDamaged names the file.
func (d *Dir) verify(ctx context.Context) error {
	marks, err := d.marks()
	if err != nil {
		return err
	}
	for _, stream := range streams {
		folder := filepath.Join(jetStreamName, "jetstream", "$G", "streams", stream, "msgs")
		if _, err := d.root.Stat(folder); errors.Is(err, fs.ErrNotExist) {
			continue // its absence is noticed where it is opened
		}
		names, err := d.list(folder)
		if err != nil {
			return err
		}
		var blocks []int
		for _, name := range names {
			if n, err := strconv.Atoi(strings.TrimSuffix(name, ".blk")); err == nil && strings.HasSuffix(name, ".blk") {
				blocks = append(blocks, n)
			}
		}
		slices.Sort(blocks)
		last := uint64(0)
		for i, n := range blocks {
			if err := ctx.Err(); err != nil {
				return err
			}
			name := filepath.Join(folder, strconv.Itoa(n)+".blk")
			data, err := d.read(name, maxBlock)
			if err != nil {
				return err
			}
			end, good := records(data, blockKey(stream, n), func(sequence uint64) { last = max(last, sequence) })
			// What a process was writing when it ended is incomplete, was never acknowledged, and has nothing after it.
			torn := i == len(blocks)-1 && !anyRecord(data[end:], blockKey(stream, n))
			if !good && !torn || len(data) == 0 && i < len(blocks)-1 {
				return problem.StateDamaged.New("%s is damaged %d bytes from its beginning, after record %d of %s; restore the folder from a copy, or do without: %s",
					filepath.Join(d.path, name), end, last, stream, "docs/durability.md says how")
			}
		}
		if mark := marks[stream]; last < mark {
			return problem.StateDamaged.New("%s ends with record %d of %s, and there were %d: the rest is gone; restore the folder from a copy, or delete %s to go on without",
				filepath.Join(d.path, folder), last, stream, mark, filepath.Join(d.path, marksName))
		}
	}
	return nil
}

// The layout of a record in JetStream's files: length (with a bit for headers), sequence, time, length of the subject;
// subject, length of the headers, headers, data, checksum.
const (
	recordHead     = 22
	recordChecksum = 8
	headersBit     = 1 << 31
	sequenceBits   = 1<<62 - 1 // the others tell a record that was erased, or stands for one that was
)

func blockKey(stream string, n int) [32]byte {
	return sha256.Sum256(fmt.Appendf(nil, "%s-%d", stream, n))
}

// records reads the records of a file. It returns where it stopped, and whether that is at the end.
func records(data []byte, key [32]byte, visit func(sequence uint64)) (end int, good bool) {
	for end < len(data) {
		length, sequence, ok := readRecord(data[end:], key)
		if !ok {
			return end, false
		}
		visit(sequence)
		end += length
	}
	return end, true
}

// readRecord reads the record at the beginning of the data.
func readRecord(data []byte, key [32]byte) (length int, sequence uint64, ok bool) {
	if len(data) < recordHead {
		return 0, 0, false
	}
	size := binary.LittleEndian.Uint32(data)
	length = int(size &^ headersBit)
	subject := int(binary.LittleEndian.Uint16(data[20:]))
	body := recordHead + subject
	if size&headersBit != 0 {
		body += 4
	}
	if length > len(data) || body+recordChecksum > length {
		return 0, 0, false
	}
	h, err := highwayhash.New64(key[:])
	if err != nil {
		return 0, 0, false // the key has the right length
	}
	h.Write(data[4:20])
	h.Write(data[recordHead : recordHead+subject])
	h.Write(data[body : length-recordChecksum])
	return length, binary.LittleEndian.Uint64(data[4:]) & sequenceBits, bytes.Equal(h.Sum(nil), data[length-recordChecksum:length])
}

// anyRecord says whether a whole record begins anywhere in the data but at its beginning.
func anyRecord(data []byte, key [32]byte) bool {
	for i := 1; i+recordHead+recordChecksum <= len(data); i++ {
		if _, _, ok := readRecord(data[i:], key); ok {
			return true
		}
	}
	return false
}

// marks reads how far the streams had come.
func (d *Dir) marks() (map[string]uint64, error) {
	data, err := d.read(marksName, maxMarks)
	if data == nil || err != nil {
		return nil, err
	}
	marks := map[string]uint64{}
	if err := json.Unmarshal(data, &marks); err != nil {
		return nil, d.damaged(marksName, "it does not say how far the streams have come", "delete it")
	}
	return marks, nil
}

// mark notes how far the embedded JetStream's streams have come.
func (s *Store) mark(ctx context.Context) error {
	marks := map[string]uint64{}
	for _, name := range streams {
		stream, err := try(ctx, s, func(ctx context.Context) (jetstream.Stream, error) { return s.js.Stream(ctx, name) })
		if err != nil {
			return storeFailed("reading "+name, err)
		}
		marks[name] = stream.CachedInfo().State.LastSeq
	}
	marks[floorMark] = s.queue.first()
	data, err := json.Marshal(marks)
	if err != nil {
		return problem.Internal.New("how far the streams have come: %w", err)
	}
	if data = append(data, '\n'); bytes.Equal(data, s.marked) {
		return nil
	}
	if err := s.dir.write(marksName, data); err != nil {
		return err
	}
	s.marked = data
	return nil
}
