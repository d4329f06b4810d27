// Package audit writes down who asked the adapter for what, and what came of it: one JSON object a line, in a file that
// only grows to a bound.
//
// The promise: when Accepted or Ended returns nil, the line is on disk, and is there once, whatever ended the process in
// between and however often it is called for one operation. The limits: a line is there for as long as the files are
// that hold it, of which the oldest is deleted; and calls that were refused are written within a second, those that are
// alike within a minute as one line with their number, so that a flood of them leaves room for the rest.
package audit

import (
	"encoding/json"
	"net"
	"time"
	"unicode/utf8"
)

// Result is what became of a request.
type Result string

const (
	Accepted  Result = "accepted"  // it will run, and end with one of the next two
	Succeeded Result = "succeeded" // it did what was asked
	Failed    Result = "failed"    // it did not; Code says why
	Refused   Result = "refused"   // it was not accepted; Code says why
	Repeated  Result = "repeated"  // it was accepted before, and this changes nothing
)

// Entry is one line. It holds no secret: neither a body nor a kubeconfig, and of a failure its code only.
type Entry struct {
	Result    Result    `json:"result"`
	Operation string    `json:"operation,omitempty"` // its id
	Accepted  time.Time `json:"accepted,omitzero"`   // when it was accepted, which tells it from others of the same id
	Time      time.Time `json:"time"`                // of the line
	Code      string    `json:"code,omitempty"`      // of the problem
	Problem   string    `json:"problem,omitempty"`   // what the code means
	Count     int       `json:"count,omitempty"`     // how many more like it there were since the line before
	Call      string    `json:"call,omitempty"`      // the gRPC method, where it was refused unread
	Key       string    `json:"key,omitempty"`       // of the catalogue of operations
	Delete    bool      `json:"delete,omitempty"`
	Documents []string  `json:"documents,omitempty"` // names of the filters it is about
	Targets   []string  `json:"targets,omitempty"`   // where they go, or are taken from
	Who       Who       `json:"who"`
}

// Who asked.
type Who struct {
	Verified        bool   `json:"verified"`              // by a client certificate
	Certificate     string `json:"certificate,omitempty"` // its name
	Serial          string `json:"serial,omitempty"`      // its serial number, in hexadecimal
	ClaimedUsername string `json:"claimedUsername,omitempty"`
	Remote          string `json:"remote,omitempty"` // address and port
}

const (
	maxNames = 100 // documents or targets in a line
	maxText  = 256 // bytes of every text in it
)

// line is the entry as it is written.
func (e Entry) line() ([]byte, error) {
	e.Time = e.Time.UTC()
	e.Documents, e.Targets = bounded(e.Documents), bounded(e.Targets)
	for _, text := range []*string{&e.Operation, &e.Code, &e.Problem, &e.Call, &e.Key, &e.Who.Certificate, &e.Who.Serial, &e.Who.ClaimedUsername, &e.Who.Remote} {
		*text = clip(*text)
	}
	data, err := json.Marshal(e)
	return append(data, '\n'), err
}

func bounded(names []string) []string {
	var out []string
	for i, n := range names {
		if i == maxNames {
			return append(out, "…")
		}
		out = append(out, clip(n))
	}
	return out
}

func clip(s string) string {
	if len(s) <= maxText {
		return s
	}
	cut := maxText
	for cut > 0 && !utf8.RuneStart(s[cut]) {
		cut--
	}
	return s[:cut] + "…"
}

// like is what entries have in common that are counted together.
func (e Entry) like() string {
	who := e.Who.Certificate
	if host, _, err := net.SplitHostPort(e.Who.Remote); who == "" && err == nil {
		who = host
	}
	return string(e.Result) + "|" + e.Code + "|" + clip(e.Call) + "|" + clip(e.Key) + "|" + clip(who)
}
