// Package event carries the story of each operation from the Log, which keeps it, to whoever listens: gRPC streams
// through a Hub, and NATS.
//
// Within an operation events are in order and numbered from 1 without gaps. A reader that is slower than the events is
// told that it missed some; it never slows the writer or makes it grow.
package event

import (
	"strconv"
	"strings"
	"time"
	"unicode/utf8"
)

// Type is what an event tells: progress, something to look at, or a failure.
type Type int32

// The values are those of Meshery's protocol.
const (
	Info  Type = 0
	Warn  Type = 1
	Error Type = 2
)

// Event says what has happened, to what, by name. It holds no secret.
type Event struct {
	Operation string    `json:"operation_id"`
	Sequence  uint64    `json:"sequence"` // within the operation, from 1
	Time      time.Time `json:"time"`
	Type      Type      `json:"event_type"`
	Summary   string    `json:"summary"`
	Details   string    `json:"details,omitempty"`
	Code      string    `json:"error_code,omitempty"`
	Cause     string    `json:"probable_cause,omitempty"`
	Remedy    string    `json:"suggested_remediation,omitempty"`
	Component string    `json:"component"`      // the adapter's UUID
	Name      string    `json:"component_name"` // the adapter's name
	Last      bool      `json:"last"`           // nothing follows in this operation
}

// The most bytes that an event's texts have when they are delivered: even with every byte escaped in JSON an event stays
// under NATS's usual limit of 1 MiB.
const (
	maxDetails = 64 << 10
	maxText    = 16 << 10 // of each other text
)

// Bounded returns the event with its texts cut to what every reader takes, and made valid UTF-8.
func (e Event) Bounded() Event {
	e.Details = bound(e.Details, maxDetails)
	for _, text := range []*string{&e.Summary, &e.Cause, &e.Remedy} {
		*text = bound(*text, maxText)
	}
	return e
}

func bound(s string, limit int) string {
	if len(s) > limit {
		const note = 40 // bytes, enough for what is appended
		cut := limit - note
		for cut > 0 && !utf8.RuneStart(s[cut]) {
			cut--
		}
		s = s[:cut] + "… (" + strconv.Itoa(len(s)-cut) + " bytes more)"
	}
	return strings.ToValidUTF8(s, "?")
}
