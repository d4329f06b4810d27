package plan

import (
	"fmt"
	"slices"
	"strings"

	"github.com/meshery/meshery-filters/internal/filter"
)

// Survey is what proxies of a cluster run that nothing there explains, as far as they were looked at.
type Survey struct {
	Orphans []Orphan `json:"orphans"` // by proxy and name
	Proxies int      `json:"proxies"` // that there are
	Looked  int      `json:"looked"`  // of them, how many were looked at
	// Missed says why not all of them were; empty when all were.
	Missed string `json:"missed,omitempty"`
	// Files are modules where proxies read them that nothing names, and that nobody but a person may delete: whether an adapter
	// has put them there cannot be told.
	Files []string `json:"files,omitempty"`
}

// Orphan is a Wasm filter in a proxy, and nothing explains why it is there.
type Orphan struct {
	Proxy string `json:"proxy"` // its Pod: namespace/name
	WasmFilter
}

// WasmFilter is one that a proxy runs. What it says of its module is what the proxy shows.
type WasmFilter struct {
	Name   string `json:"filter"`           // as the proxy calls it
	SHA256 string `json:"sha256,omitempty"` // of the module; empty when the proxy does not tell
	Source string `json:"source,omitempty"` // a file, an address, or inline
}

func (o Orphan) String() string {
	var module []string
	if o.SHA256 != "" {
		module = append(module, "sha256 "+filter.ShortDigest(o.SHA256)+"…")
	}
	if o.Source != "" {
		module = append(module, o.Source)
	}
	text := o.Proxy + " runs " + o.Name
	if len(module) > 0 {
		text += " (" + strings.Join(module, ", ") + ")"
	}
	return text
}

// String is "looked at 40 of 400 proxies", and why not at all of them.
func (s Survey) String() string {
	text := fmt.Sprintf("looked at %d of %d proxies", s.Looked, s.Proxies)
	if s.Missed != "" {
		text += ": " + s.Missed
	}
	return text
}

// Left says what Files are, and names them, ten at most; empty where there are none.
func (s Survey) Left() string {
	const most = 10
	if len(s.Files) == 0 {
		return ""
	}
	lines := append([]string{"Nothing names these modules, and whether an adapter has put them there cannot be told; `rm` deletes those that nobody else needs:"},
		s.Files[:min(len(s.Files), most)]...)
	if more := len(s.Files) - most; more > 0 {
		lines = append(lines, fmt.Sprintf("and %d more", more))
	}
	return strings.Join(lines, "\n  ")
}

// And is this survey and another one of other proxies.
func (s Survey) And(other Survey) Survey {
	missed := slices.DeleteFunc([]string{s.Missed, other.Missed}, func(m string) bool { return m == "" })
	return Survey{Orphans: slices.Concat(s.Orphans, other.Orphans), Proxies: s.Proxies + other.Proxies, Looked: s.Looked + other.Looked,
		Missed: strings.Join(missed, "; "), Files: slices.Concat(s.Files, other.Files)}
}
