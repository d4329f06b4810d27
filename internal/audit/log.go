package audit

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"github.com/meshery/meshery-filters/internal/problem"
)

const (
	// DefaultMaxBytes is the size at which a new file is begun, and DefaultKeep how many older ones are kept.
	DefaultMaxBytes = 16 << 20
	DefaultKeep     = 4

	maxLine = 128 << 10 // bytes that a line of this package stays under
	// rememberedEnds is how many operations that have ended are remembered, of those that may be reported again after a
	// crash: as many as ran then.
	rememberedEnds = 4096
	// rememberedAccepts bounds the operations that were accepted and have not ended, as far as this log knows: it does not
	// hear of the end of those that another adapter runs. As many again, accepted earlier, are remembered too.
	rememberedAccepts = 1 << 15
	// maxLikes bounds the kinds of refusals that are counted apart.
	maxLikes   = 256
	flushEvery = time.Second
	countFor   = time.Minute
)

// Options of a Log.
type Options struct {
	// File is written to; older ones are beside it, as File.1 and so on. It is this process's alone.
	File string
	// Stream, when set, is written to instead: nothing is known of what was written before, and nothing is synced.
	Stream io.Writer
	// MaxBytes and Keep bound what is kept. Default: DefaultMaxBytes, DefaultKeep.
	MaxBytes int64
	Keep     int
	Log      *slog.Logger
}

// Log writes entries.
type Log struct {
	opts Options

	mu       sync.Mutex
	next     *batch            // what is written next
	accepted map[string]*batch // lines of operations that have not ended; nil: it was there at the start
	before   map[string]*batch // the same of those that were accepted earlier
	ended    map[string]*batch // the same of those that have, the last of them
	ends     []string          // their keys, oldest first
	likes    map[string]*alike

	writing sync.Mutex // held while the file is written
	file    *os.File
	size    int64
	torn    bool // what is beyond size is to be cut off
}

// batch is lines that are written together. done and err are guarded by writing.
type batch struct {
	data []byte
	done bool
	err  error
}

// alike are entries that are counted together.
type alike struct {
	entry Entry // the newest
	more  int   // since the last line
}

// Open goes on with a file, or begins one. A line that was cut off at its end is cut away. problem.StoreFailed when the
// file cannot be used.
func Open(o Options) (*Log, error) {
	if o.MaxBytes == 0 {
		o.MaxBytes = DefaultMaxBytes
	}
	if o.Keep == 0 {
		o.Keep = DefaultKeep
	}
	l := &Log{opts: o, next: new(batch), accepted: map[string]*batch{}, ended: map[string]*batch{}, likes: map[string]*alike{}}
	if o.Stream != nil {
		return l, nil
	}
	for n := o.Keep; n > 0; n-- {
		if err := l.readOld(older(o.File, n)); err != nil {
			return nil, err
		}
	}
	if err := l.open(); err != nil {
		return nil, err
	}
	return l, nil
}

func older(file string, n int) string { return fmt.Sprintf("%s.%d", file, n) }

func (l *Log) failed(doing string, err error) error {
	return problem.StoreFailed.New("%s the audit log %s: %w", doing, l.opts.File, err)
}

func (l *Log) readOld(name string) error {
	f, err := os.Open(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return l.failed("reading", err)
	}
	defer f.Close()
	if _, err := l.scan(f); err != nil {
		return l.failed("reading", err)
	}
	return nil
}

// open takes the file for this process, and cuts off what was not written whole.
func (l *Log) open() error {
	if info, err := os.Stat(l.opts.File); err == nil && !info.Mode().IsRegular() {
		return l.failed("opening", errors.New("it is no file"))
	}
	f, err := os.OpenFile(l.opts.File, os.O_RDWR|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return l.failed("opening", err)
	}
	fail := func(doing string, err error) error {
		f.Close()
		return l.failed(doing, err)
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		return fail("opening", fmt.Errorf("another process has it: %w", err))
	}
	whole, err := l.scan(f)
	if err != nil {
		return fail("reading", err)
	}
	if err := f.Truncate(whole); err != nil {
		return fail("mending", err)
	}
	if err := syncFolder(l.opts.File); err != nil {
		return fail("opening", err)
	}
	l.file, l.size = f, whole
	return nil
}

func syncFolder(file string) error {
	d, err := os.Open(filepath.Dir(file))
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

// scan notes which operations the lines are of, and returns how many bytes are whole lines.
func (l *Log) scan(r io.Reader) (whole int64, err error) {
	in := bufio.NewReaderSize(r, maxLine)
	for {
		line, err := in.ReadSlice('\n')
		if errors.Is(err, io.EOF) {
			return whole, nil
		}
		if err != nil && !errors.Is(err, bufio.ErrBufferFull) { // a line of somebody else's
			return 0, err
		}
		whole += int64(len(line))
		l.note(line)
	}
}

// note reads the beginning of a line, whose form this package has written.
func (l *Log) note(line []byte) {
	field := func(prefix string) (value string, ok bool) {
		rest, ok := bytes.CutPrefix(line, []byte(prefix))
		if !ok {
			return "", false
		}
		text, rest, ok := bytes.Cut(rest, []byte(`"`))
		line = rest
		return string(text), ok
	}
	result, ok := field(`{"result":"`)
	if !ok || result != string(Accepted) && result != string(Succeeded) && result != string(Failed) {
		return
	}
	operation, ok := field(`,"operation":"`)
	if !ok {
		return
	}
	at, _ := field(`,"accepted":"`)
	key := operation + " " + at
	if result == string(Accepted) {
		l.accept(key, nil)
		return
	}
	l.forget(key)
	l.end(key, nil)
}

// accept remembers that the line of an operation that was accepted is in the batch, or was there at the start. The lock is
// held.
func (l *Log) accept(key string, b *batch) {
	if len(l.accepted) >= rememberedAccepts {
		l.accepted, l.before = map[string]*batch{}, l.accepted
	}
	l.accepted[key] = b
}

// wasAccepted is what accept was told. The lock is held.
func (l *Log) wasAccepted(key string) (b *batch, found bool) {
	if b, found = l.accepted[key]; !found {
		b, found = l.before[key]
	}
	return b, found
}

// forget takes back what accept was told. The lock is held.
func (l *Log) forget(key string) {
	delete(l.accepted, key)
	delete(l.before, key)
}

// end remembers that an operation's last line is in the batch, or was there at the start. The lock is held.
func (l *Log) end(key string, b *batch) {
	if _, known := l.ended[key]; !known {
		l.ends = append(l.ends, key)
	}
	l.ended[key] = b
	if len(l.ends) > rememberedEnds {
		delete(l.ended, l.ends[0])
		l.ends = l.ends[1:]
	}
}

// key tells an operation from others of the same id.
func (e Entry) key() string {
	at := ""
	if !e.Accepted.IsZero() {
		at = e.Accepted.Format(time.RFC3339Nano)
	}
	return e.Operation + " " + at
}

// Accepted writes that an operation was accepted, unless that is written.
func (l *Log) Accepted(e Entry) error {
	e.Result = Accepted
	return l.once(e)
}

// Ended writes what became of an operation, Succeeded or Failed, unless that is written.
func (l *Log) Ended(e Entry) error { return l.once(e) }

func (l *Log) once(e Entry) error {
	e.Accepted = e.Accepted.UTC()
	key := e.key()
	line, err := e.line()
	if err != nil {
		return l.failed("writing", err)
	}
	l.mu.Lock()
	b, written := l.ended[key]
	if !written && e.Result == Accepted {
		b, written = l.wasAccepted(key)
	}
	if !written {
		b = l.next
		b.data = append(b.data, line...)
		if e.Result == Accepted {
			l.accept(key, b)
		} else {
			l.end(key, b)
		}
	}
	l.mu.Unlock()
	if b == nil {
		return nil
	}
	err = l.commit(b)
	l.mu.Lock()
	defer l.mu.Unlock()
	accepted, _ := l.wasAccepted(key)
	switch {
	case err == nil && e.Result != Accepted:
		l.forget(key)
	case err != nil && l.ended[key] == b:
		delete(l.ended, key) // its place among ends stays until its turn comes
	case err != nil && accepted == b:
		l.forget(key)
	}
	return err
}

// commit writes a batch, or waits until somebody has.
func (l *Log) commit(b *batch) error {
	l.writing.Lock()
	defer l.writing.Unlock()
	if b.done {
		return b.err
	}
	l.mu.Lock()
	if l.next == b {
		l.next = new(batch)
	}
	data := b.data
	b.data = nil
	l.mu.Unlock()
	b.err, b.done = l.write(data), true
	return b.err
}

// write appends to the file and syncs it. writing is held.
func (l *Log) write(data []byte) error {
	if l.opts.Stream != nil {
		_, err := l.opts.Stream.Write(data)
		return err
	}
	if l.file == nil { // beginning another one failed
		l.mu.Lock()
		err := l.open()
		l.mu.Unlock()
		if err != nil {
			return err
		}
	}
	if l.torn {
		if err := l.file.Truncate(l.size); err != nil {
			return l.failed("mending", err)
		}
		l.torn = false
	}
	if l.size > 0 && l.size+int64(len(data)) > l.opts.MaxBytes {
		if err := l.rotate(); err != nil {
			return l.failed("beginning another file of", err)
		}
	}
	l.torn = true
	if _, err := l.file.Write(data); err != nil {
		return l.failed("writing", err)
	}
	if err := l.file.Sync(); err != nil {
		return l.failed("writing", err)
	}
	l.size += int64(len(data))
	l.torn = false
	return nil
}

// rotate begins another file, and deletes the oldest.
func (l *Log) rotate() error {
	for n := l.opts.Keep; n > 0; n-- {
		from := l.opts.File
		if n > 1 {
			from = older(l.opts.File, n-1)
		}
		if err := os.Rename(from, older(l.opts.File, n)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	f, err := os.OpenFile(l.opts.File, os.O_RDWR|os.O_CREATE|os.O_EXCL|os.O_APPEND, 0o600)
	if err == nil {
		err = syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
	}
	old := l.file
	l.file, l.size = f, 0
	return errors.Join(err, syncFolder(l.opts.File), old.Close())
}

// Count writes an entry down soon, unless one like it was written within a minute: then it is counted, and the number is
// written when the minute is over. It does not wait. Of more kinds than maxLikes only the codes are told apart, and nobody is
// named, since they are of many.
func (l *Log) Count(e Entry) {
	e.Time = time.Now()
	l.mu.Lock()
	defer l.mu.Unlock()
	like := e.like()
	a := l.likes[like]
	if a == nil && len(l.likes) >= maxLikes {
		e = Entry{Result: e.Result, Time: e.Time, Code: e.Code, Problem: e.Problem}
		like = e.like()
		a = l.likes[like]
	}
	if a != nil {
		a.entry, a.more = e, a.more+1
		return
	}
	l.likes[like] = &alike{entry: e}
	l.add(e)
}

// add puts an entry among those that are written next. The lock is held.
func (l *Log) add(e Entry) {
	if line, err := e.line(); err == nil { // an entry is text and numbers, which always encodes
		l.next.data = append(l.next.data, line...)
	}
}

// tally puts the numbers of what was counted among what is written next, and begins anew.
func (l *Log) tally() {
	l.mu.Lock()
	defer l.mu.Unlock()
	for like, a := range l.likes {
		if a.more == 0 {
			delete(l.likes, like)
			continue
		}
		e := a.entry
		e.Count, a.more = a.more, 0
		l.add(e)
	}
}

// flush writes what waits.
func (l *Log) flush() error {
	l.mu.Lock()
	b := l.next
	empty := len(b.data) == 0
	l.mu.Unlock()
	if empty {
		return nil
	}
	return l.commit(b)
}

// Run writes what Count was told until ctx ends.
func (l *Log) Run(ctx context.Context) error {
	flush, tally := time.NewTicker(flushEvery), time.NewTicker(countFor)
	defer flush.Stop()
	defer tally.Stop()
	failing := false
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tally.C:
			l.tally()
		case <-flush.C:
		}
		err := l.flush()
		if err != nil && !failing {
			l.opts.Log.Error("what was refused is not written down", "err", err)
		}
		failing = err != nil
	}
}

// Close writes what waits, with the numbers of what was counted so far.
func (l *Log) Close() error {
	l.tally()
	err := l.flush()
	l.writing.Lock()
	defer l.writing.Unlock()
	if l.file != nil {
		err = errors.Join(err, l.file.Close())
		l.file = nil
	}
	return err
}
