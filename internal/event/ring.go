package event

import "unsafe"

// Bounds of a Hub.
const (
	DefaultMaxEvents = 10_000
	DefaultMaxBytes  = 16 << 20
)

// ring holds the newest events within bounds. Each has a position, counted from 0, that it keeps.
type ring struct {
	maxEvents, maxBytes int

	events []Event
	first  uint64 // position of events[0]
	bytes  int
}

func newRing(maxEvents, maxBytes int) ring {
	if maxEvents <= 0 {
		maxEvents = DefaultMaxEvents
	}
	if maxBytes <= 0 {
		maxBytes = DefaultMaxBytes
	}
	return ring{maxEvents: maxEvents, maxBytes: maxBytes}
}

// end is the position of the next event.
func (r *ring) end() uint64 { return r.first + uint64(len(r.events)) }

// push lets go of the oldest to make room. The newest event always fits.
func (r *ring) push(e Event) {
	r.events = append(r.events, e)
	r.bytes += size(e)
	for len(r.events) > 1 && (len(r.events) > r.maxEvents || r.bytes > r.maxBytes) {
		r.shift()
	}
}

// restart lets go of everything and goes on at a position.
func (r *ring) restart(position uint64) { r.events, r.bytes, r.first = nil, 0, position }

func (r *ring) shift() {
	r.bytes -= size(r.events[0])
	r.events[0] = Event{} // its texts are free at once; append leaves the room behind when it next grows
	r.events = r.events[1:]
	r.first++
}

// from returns what is held at and after a position. The slice is valid until the next push.
func (r *ring) from(position uint64) []Event {
	if position <= r.first {
		return r.events
	}
	return r.events[min(position-r.first, uint64(len(r.events))):]
}

func size(e Event) int {
	return int(unsafe.Sizeof(e)) + len(e.Operation) + len(e.Summary) + len(e.Details) + len(e.Code) + len(e.Cause) +
		len(e.Remedy) + len(e.Component) + len(e.Name)
}
