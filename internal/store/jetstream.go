package store

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"log/slog"
	"path/filepath"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/meshery/meshery-filters/internal/problem"
)

// Names in JetStream. What an external server shares with others begins with filters.
const (
	eventsStream     = "filters-events"
	eventsSubject    = "filters.events."
	operationsStream = "filters-operations"
	entrySubject     = "filters.operations.entry."
	claimSubject     = "filters.operations.claim."
	recordsBucket    = "filters-records"
	cursorsBucket    = "filters-cursors"
	blobsBucket      = "filters-modules"
)

const (
	history       = 10       // values of each record
	maxValue      = 32 << 20 // bytes of one message in the embedded server
	eventsAge     = 7 * 24 * time.Hour
	eventsBytes   = 256 << 20
	rememberedIDs = 24 * time.Hour // for how long a repeated id is recognised after its operation's end
)

// Options say where a Store keeps things.
type Options struct {
	// StateDir is the folder that one adapter holds at a time: of the embedded JetStream, and of what is this adapter's own.
	StateDir string
	// URL of an external JetStream (2.11 or later), several servers separated by commas. Empty: the embedded one.
	URL string
	// Connect adds to how the external one is connected to: TLS, credentials.
	Connect []nats.Option
	// SyncInterval, when set, has the embedded JetStream write to disk that often. Default: before anything is
	// acknowledged.
	SyncInterval time.Duration
	// Listen, TLS, Insecure and Readable are those of ServerOptions, for others who read events.
	Listen   string
	TLS      *tls.Config
	Insecure bool
	Readable []string
	// Queue is how many entries may wait or run; DefaultQueueLength when zero.
	Queue int
	// Lease is how long the claim of an adapter that is not heard of stands in an external store. Default: 15s.
	Lease time.Duration
	// KeepBlobs is how long a blob that nothing refers to is kept; adapters that share a store need the same. Default: 1h.
	KeepBlobs time.Duration
	Logger    *slog.Logger // none when nil
}

// Store is one adapter's connection to what survives it.
type Store struct {
	dir    *Dir
	server *Server
	nc     *nats.Conn
	js     jetstream.JetStream
	log    *slog.Logger

	shared bool          // by several adapters
	owner  string        // of the claims of this process
	lease  time.Duration // of claims and cursors
	id     string

	records Records
	blobs   Blobs
	queue   *queue
	events  *eventLog
	cursors jetstream.KeyValue
	closed  chan struct{} // of the connection

	keepBlobs time.Duration
	unused    map[string]unused // blobs, by digest, of Sweep

	syncs   bool   // the embedded JetStream has on disk what it acknowledged
	marked  []byte // what the file of marks holds
	ailing  atomic.Pointer[ailment]
	suspect chan struct{} // holds one token when Watch is to look at once
}

var (
	// ErrStale says that a subject has another last record than the writer knew of.
	ErrStale = errors.New("another has written since")
	// ErrLost says that another adapter has what was claimed.
	ErrLost = errors.New("another adapter has taken over")
	// ErrAway says that the store does not answer, or cannot keep anything now: what failed may be tried again later.
	ErrAway = errors.New("the store cannot keep anything now")
)

// passing is an error that is also ErrAway.
type passing struct{ error }

func (p passing) Unwrap() error        { return p.error }
func (p passing) Is(target error) bool { return target == ErrAway }

// asAway makes an error one that is ErrAway, and so is whatever is made of its Problem.
func asAway(err error) error {
	p := *problem.Of(err)
	p.Err = passing{err}
	return &p
}

// Open takes the state directory, starts or connects to JetStream, and takes over what an earlier version kept in
// the directory. problem.StoreFailed when a part is missing or damaged, or when the external server does not answer
// within 30 s.
func Open(ctx context.Context, o Options) (_ *Store, err error) {
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.Lease <= 0 {
		o.Lease = 15 * time.Second
	}
	if o.KeepBlobs <= 0 {
		o.KeepBlobs = time.Hour
	}
	if o.Queue <= 0 {
		o.Queue = DefaultQueueLength
	}
	s := &Store{log: o.Logger, shared: o.URL != "", owner: rand.Text(), lease: o.Lease, keepBlobs: o.KeepBlobs, closed: make(chan struct{}), suspect: make(chan struct{}, 1)}
	if s.dir, err = OpenDir(o.StateDir); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.Close())
		}
	}()
	so := ServerOptions{Listen: o.Listen, TLS: o.TLS, Insecure: o.Insecure, Readable: o.Readable, Logger: o.Logger}
	if !s.shared {
		if err := s.dir.verify(ctx); err != nil {
			return nil, err
		}
		so.StoreDir, so.SyncInterval = filepath.Join(s.dir.Path(), jetStreamName), o.SyncInterval
		s.syncs = o.SyncInterval == 0
	}
	if s.server, err = StartServer(so); err != nil {
		return nil, err
	}
	if err := s.server.Health(); err != nil { // it starts without a stream that it cannot read
		return nil, problem.StateDamaged.New("%s: %w; restore the folder from a copy, or move it away to begin anew", s.dir.Path(), err)
	}
	url, connect := o.URL, o.Connect
	if !s.shared {
		url, connect = "", s.server.Connect()
	}
	s.nc, err = nats.Connect(url, append([]nats.Option{
		nats.Name("meshery-filters"), nats.MaxReconnects(-1), nats.RetryOnFailedConnect(true), nats.ReconnectWait(250 * time.Millisecond),
		nats.IgnoreAuthErrorAbort(), nats.ClosedHandler(func(*nats.Conn) { close(s.closed) }),
		nats.ErrorHandler(func(_ *nats.Conn, _ *nats.Subscription, err error) { o.Logger.Debug("store", "error", err) }),
	}, connect...)...)
	if err != nil {
		return nil, problem.InvalidConfiguration.New("storeURL: %w", err)
	}
	if s.js, err = jetstream.New(s.nc); err != nil {
		return nil, problem.Internal.New("JetStream: %w", err)
	}
	opening, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	if err := s.open(opening, o.Queue); err != nil {
		if opening.Err() != nil && ctx.Err() == nil {
			err = s.unanswered(err)
		}
		return nil, err
	}
	return s, s.takeOver(ctx)
}

// unanswered explains an answer that did not come in time.
func (s *Store) unanswered(err error) error {
	if s.shared {
		return away(err)
	}
	return problem.StoreFailed.New("the JetStream in %s does not answer: %w", s.where(), passing{err})
}

// open finds the streams, or makes them where they may be made.
func (s *Store) open(ctx context.Context, length int) error {
	made, err := s.dir.read(streamsName, 64)
	if err != nil {
		return err
	}
	mayMake := made == nil || s.shared
	replicas := 1
	if s.shared {
		replicas = 3 // where there are as many
	}
	events, err := s.stream(ctx, mayMake, jetstream.StreamConfig{Name: eventsStream, Subjects: []string{eventsSubject + "*"},
		Description: "What operations told, one subject each.", MaxAge: eventsAge, MaxBytes: eventsBytes, AllowDirect: true, Replicas: replicas})
	if err != nil {
		return err
	}
	operations, err := s.stream(ctx, mayMake, jetstream.StreamConfig{Name: operationsStream, Subjects: []string{entrySubject + "*", claimSubject + "*"},
		Description: "Accepted operations, and who runs them.", MaxMsgsPerSubject: 1, AllowMsgTTL: true, AllowDirect: true, Replicas: replicas})
	if err != nil {
		return err
	}
	records, err := bucket(ctx, s, mayMake, recordsBucket, history, replicas)
	if err != nil {
		return err
	}
	if s.cursors, err = bucket(ctx, s, mayMake, cursorsBucket, 1, replicas); err != nil {
		return err
	}
	objects, err := try(ctx, s, func(ctx context.Context) (jetstream.ObjectStore, error) {
		o, err := s.js.ObjectStore(ctx, blobsBucket)
		if err != nil && mayMake && errors.Is(err, jetstream.ErrBucketNotFound) {
			o, err = create(replicas, func(n int) (jetstream.ObjectStore, error) {
				return s.js.CreateObjectStore(ctx, jetstream.ObjectStoreConfig{Bucket: blobsBucket, Replicas: n})
			})
		}
		return o, err
	})
	if err != nil {
		return s.missing(blobsBucket, err)
	}
	if made == nil && !s.shared {
		if err := s.dir.write(streamsName, []byte("1\n")); err != nil {
			return err
		}
	}
	info := events.CachedInfo()
	s.id = strconv.FormatInt(info.Created.UnixNano(), 36)
	values, err := try(ctx, s, func(ctx context.Context) (jetstream.Stream, error) { return s.js.Stream(ctx, "KV_"+recordsBucket) })
	if err != nil {
		return s.missing(recordsBucket, err)
	}
	s.records = &recordsInKV{store: s, kv: records, stream: values, revisions: map[string]uint64{}, own: map[string]uint64{}, opened: values.CachedInfo().State.LastSeq}
	held, err := try(ctx, s, func(ctx context.Context) (jetstream.Stream, error) { return s.js.Stream(ctx, "OBJ_"+blobsBucket) })
	if err != nil {
		return s.missing(blobsBucket, err)
	}
	s.blobs = &blobsInObjects{store: s, objects: objects, stream: held, where: s.where(), keep: s.keepBlobs, longestPut: longestPut, touched: map[string]time.Time{}}
	s.events = &eventLog{store: s, stream: events}
	s.queue, err = openQueue(ctx, s, operations, length)
	return err
}

func (s *Store) where() string {
	if s.shared {
		return "the external store"
	}
	return s.dir.path
}

// missing explains why something that should be there is not.
func (s *Store) missing(name string, err error) error {
	if errors.Is(err, jetstream.ErrStreamNotFound) || errors.Is(err, jetstream.ErrBucketNotFound) {
		return problem.StateDamaged.New("%s in %s is gone or cannot be read, and held what was kept; restore the folder from a copy, or move it away to begin anew", name, s.where())
	}
	return storeFailed("opening "+name, err)
}

func (s *Store) stream(ctx context.Context, mayMake bool, c jetstream.StreamConfig) (jetstream.Stream, error) {
	c.Storage = jetstream.FileStorage
	stream, err := try(ctx, s, func(ctx context.Context) (jetstream.Stream, error) {
		stream, err := s.js.Stream(ctx, c.Name)
		if err != nil && mayMake && errors.Is(err, jetstream.ErrStreamNotFound) {
			stream, err = create(c.Replicas, func(n int) (jetstream.Stream, error) {
				c.Replicas = n
				return s.js.CreateStream(ctx, c)
			})
		}
		return stream, err
	})
	if err != nil {
		return nil, s.missing(c.Name, err)
	}
	return stream, nil
}

func bucket(ctx context.Context, s *Store, mayMake bool, name string, history uint8, replicas int) (jetstream.KeyValue, error) {
	kv, err := try(ctx, s, func(ctx context.Context) (jetstream.KeyValue, error) {
		kv, err := s.js.KeyValue(ctx, name)
		if err != nil && mayMake && errors.Is(err, jetstream.ErrBucketNotFound) {
			kv, err = create(replicas, func(n int) (jetstream.KeyValue, error) {
				return s.js.CreateKeyValue(ctx, jetstream.KeyValueConfig{Bucket: name, History: history, Replicas: n, MaxValueSize: -1})
			})
		}
		return kv, err
	})
	if err != nil {
		return nil, s.missing(name, err)
	}
	return kv, nil
}

// create makes something with as many replicas as there can be: a server that is not one of a cluster of that many
// refuses.
func create[T any](replicas int, make func(int) (T, error)) (made T, err error) {
	for n := replicas; n > 0; n -= 2 {
		if made, err = make(n); err == nil || !noPeers(err) {
			return made, err
		}
	}
	return made, err
}

func noPeers(err error) bool {
	var api *jetstream.APIError
	const notClustered, noSuitablePeers = 10074, 10005
	return errors.As(err, &api) && (api.ErrorCode == notClustered || api.ErrorCode == noSuitablePeers)
}

// try repeats what fails because a server is away, until ctx ends. What a server refused is final.
func try[T any](ctx context.Context, s *Store, do func(context.Context) (T, error)) (T, error) {
	each := 10 * time.Second // a disk under load may take long
	if s.shared {
		each = 2 * time.Second
	}
	return tryFor(ctx, s, func() time.Duration { return each }, do)
}

// tryFor is try with a limit for each attempt.
func tryFor[T any](ctx context.Context, s *Store, limit func() time.Duration, do func(context.Context) (T, error)) (T, error) {
	for {
		if err := s.ails(); err != nil && s.shared {
			var none T
			return none, err
		}
		once, cancel := context.WithTimeout(ctx, limit())
		v, err := do(once)
		cancel()
		if err == nil || isFinal(err) || ctx.Err() != nil || errors.Is(err, nats.ErrConnectionClosed) {
			return v, err
		}
		var api *jetstream.APIError
		errors.As(err, &api)
		if !s.shared && api == nil && !errors.Is(err, context.DeadlineExceeded) {
			return v, err // nothing but this process is in between
		}
		if err := s.ails(); err != nil {
			return v, err
		}
		wait := time.NewTimer(100 * time.Millisecond)
		select {
		case <-wait.C:
		case <-ctx.Done():
		}
		wait.Stop()
	}
}

// isFinal says whether trying again would not change an error.
func isFinal(err error) bool {
	var api *jetstream.APIError
	return errors.As(err, &api) && api.Code < 500 || errors.As(err, &final{}) || errors.Is(err, nats.ErrMaxPayload)
}

// final is an error that trying again does not change.
type final struct{ error }

func (f final) Unwrap() error { return f.error }

// patience bounds how long a single write waits for a server that is away or a disk that is full.
const patience = 20 * time.Second

// write publishes a message whose subject must have the last sequence after. It returns ErrStale when it has another,
// unless that is the message of an earlier try whose answer was lost.
func (s *Store) write(ctx context.Context, stream jetstream.Stream, m *nats.Msg, after uint64, more ...jetstream.PublishOpt) (sequence uint64, err error) {
	if err := s.ails(); err != nil {
		return 0, err
	}
	waiting, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	tries := 0
	ack, err := try(waiting, s, func(ctx context.Context) (*jetstream.PubAck, error) {
		tries++
		ack, err := s.js.PublishMsg(ctx, m, append([]jetstream.PublishOpt{jetstream.WithExpectLastSequencePerSubject(after),
			jetstream.WithRetryAttempts(0)}, more...)...)
		if err != nil && !conflict(err) {
			select { // have Watch look
			case s.suspect <- struct{}{}:
			default:
			}
		}
		return ack, err
	})
	if err == nil {
		return ack.Sequence, nil
	}
	if !conflict(err) {
		if err := s.ails(); err != nil {
			return 0, err // it was found out meanwhile
		}
		if waiting.Err() != nil && ctx.Err() == nil {
			err = s.unanswered(err)
		}
		return 0, storeFailed("writing "+m.Subject, err)
	}
	if tries > 1 {
		last, err := s.last(ctx, stream, m.Subject)
		if err == nil && last != nil && last.Sequence > after && bytes.Equal(last.Data, m.Data) && last.Header.Get(digestHeader) == m.Header.Get(digestHeader) {
			return last.Sequence, nil
		}
	}
	return 0, ErrStale
}

func conflict(err error) bool {
	var api *jetstream.APIError
	return errors.As(err, &api) && (api.ErrorCode == jetstream.JSErrCodeStreamWrongLastSequence || api.ErrorCode == jetstream.JSErrCodeStreamWrongLastSequenceConstant)
}

// last is the newest message of a subject, or nil.
func (s *Store) last(ctx context.Context, stream jetstream.Stream, subject string) (*jetstream.RawStreamMsg, error) {
	waiting, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	m, err := try(waiting, s, func(ctx context.Context) (*jetstream.RawStreamMsg, error) {
		m, err := stream.GetLastMsgForSubject(ctx, subject)
		if errors.Is(err, jetstream.ErrMsgNotFound) {
			return nil, nil
		}
		return m, err
	})
	if err != nil {
		if waiting.Err() != nil && ctx.Err() == nil {
			err = s.unanswered(err)
		}
		return nil, storeFailed("reading "+subject, err)
	}
	return m, nil
}

// Blobs keeps each blob as an object that is named for its digest.
func (s *Store) Blobs() Blobs { return s.blobs }

// Sizes are the bytes on disk by what is kept there: operations, events, chains and the like, cursors, modules. Of
// replicas one is counted. What cannot be told now, since the store does not answer before ctx ends, is left out.
func (s *Store) Sizes(ctx context.Context) map[string]uint64 {
	sizes := map[string]uint64{}
	for kind, name := range map[string]string{"operations": operationsStream, "events": eventsStream, "records": "KV_" + recordsBucket,
		"cursors": "KV_" + cursorsBucket, "modules": "OBJ_" + blobsBucket} {
		if stream, err := s.js.Stream(ctx, name); err == nil {
			sizes[kind] = stream.CachedInfo().State.Bytes
		}
	}
	return sizes
}

// Records keeps the last 10 values of each key.
func (s *Store) Records() Records { return s.records }

// Queue holds the operations.
func (s *Store) Queue() Queue { return s.queue }

// Log holds the events of at most 7 days and 256 MiB.
func (s *Store) Log() Log { return s.events }

// Shared says whether other adapters may use the store too.
func (s *Store) Shared() bool { return s.shared }

// ID is the same for as long as positions in the Log mean the same.
func (s *Store) ID() string { return s.id }

// ComponentID is this adapter's UUID: made up once, the same ever after.
func (s *Store) ComponentID(ctx context.Context) (string, error) { return s.dir.ComponentID(ctx) }

// Server is the NATS server inside this process.
func (s *Store) Server() *Server { return s.server }

// Close ends the connection and the server, and gives the state directory to whoever opens it next.
func (s *Store) Close() error {
	if s.queue != nil {
		s.queue.stop()
	}
	if s.blobs != nil && !s.shared && s.server.Health() == nil {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		if err := s.mark(ctx); err != nil {
			s.log.Warn("how far the streams have come is not noted", "error", err)
		}
		cancel()
	}
	if s.nc != nil {
		s.nc.Close()
		<-s.closed
	}
	if s.server != nil {
		s.server.Shutdown()
	}
	return s.dir.Close()
}

func storeFailed(doing string, err error) error {
	var p *problem.Problem
	if errors.As(err, &p) || errors.Is(err, context.Canceled) {
		return err
	}
	if errors.Is(err, nats.ErrMaxPayload) {
		return problem.StoreFailed.New("%s: it is larger than the NATS server's max_payload; raise that: %w", doing, err)
	}
	if !isFinal(err) {
		err = passing{err}
	}
	return problem.StoreFailed.New("%s: %w", doing, err)
}

// keepTrying waits a moment after an error of the background, and says whether to go on.
func keepTrying(ctx context.Context) bool {
	wait := time.NewTimer(250 * time.Millisecond)
	defer wait.Stop()
	select {
	case <-wait.C:
		return true
	case <-ctx.Done():
		return false
	}
}
