package meshery

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/meshery/meshery-filters/internal/problem"
)

// Filter is one that a user keeps in Meshery, without its bytes.
type Filter struct {
	ID         string `json:"id"`
	Name       string `json:"name"`
	Visibility string `json:"visibility,omitempty"` // private, public or published
	Updated    string `json:"updated,omitempty"`    // RFC 3339
	Size       int    `json:"size,omitempty"`       // of its bytes, where the server's list has them
	Config     string `json:"config,omitempty"`     // that the user keeps with it
}

// Upload is a filter to keep in Meshery.
type Upload struct {
	ID     string // of the filter that it replaces; empty makes another
	Name   string
	Config string
	Bytes  []byte
}

var idForm = regexp.MustCompile(`^[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}$`)

// IsFilterID says whether s can be the id of a stored filter.
func IsFilterID(s string) bool { return idForm.MatchString(s) }

const (
	filtersPath = "/api/filter"
	// pageSize is small since the list has every filter's bytes, and a page is held in memory.
	pageSize   = 5
	maxFilters = 1000
	maxFilter  = 28 << 20 // bytes of one in a list: a module of 20 MiB in base64
	maxPage    = pageSize * maxFilter
)

// wireFilter is a filter as the servers write it: those before 2025 with underscores.
type wireFilter struct {
	ID          string `json:"id"`
	Name        string `json:"name"`
	Visibility  string `json:"visibility"`
	Updated     string `json:"updatedAt"`
	Resource    string `json:"filterResource"`
	File        length `json:"filterFile"`
	OldUpdated  string `json:"updated_at"`
	OldResource string `json:"filter_resource"`
	OldFile     length `json:"filter_file"`
}

func (w wireFilter) filter() Filter {
	f := Filter{ID: w.ID, Name: w.Name, Visibility: w.Visibility, Updated: cmp.Or(w.Updated, w.OldUpdated), Size: int(max(w.File, w.OldFile))}
	var resource struct {
		Configuration struct{ Config string } // a component definition
		Settings      struct{ Config string } // a service of a design, before
	}
	if json.Unmarshal([]byte(cmp.Or(w.Resource, w.OldResource)), &resource) == nil {
		f.Config = cmp.Or(resource.Configuration.Config, resource.Settings.Config)
	}
	return f
}

// length is how many bytes a text in base64 stands for; the text itself is not kept.
type length int

// UnmarshalJSON counts.
func (l *length) UnmarshalJSON(text []byte) error {
	text = bytes.Trim(text, `"`)
	*l = length(len(text)/4*3 - bytes.Count(text[max(0, len(text)-2):], []byte("=")))
	if string(text) == "null" {
		*l = 0
	}
	return nil
}

// Filters lists the user's filters whose names have a text in them, or all.
func (c *Client) Filters(ctx context.Context, search string) ([]Filter, error) {
	var all []Filter
	for page := 0; len(all) < maxFilters; page++ {
		query := url.Values{"page": {strconv.Itoa(page)}, "pagesize": {strconv.Itoa(pageSize)}, "search": {search}, "order": {"updated_at desc"}}
		answer, err := c.Do(ctx, http.MethodGet, filtersPath+"?"+query.Encode(), "", nil, maxPage)
		if err != nil {
			return nil, err
		}
		if err := answer.Refusal("the list of filters"); err != nil {
			return nil, err
		}
		var list struct {
			Filters []wireFilter `json:"filters"`
		}
		if err := json.Unmarshal(answer.Body, &list); err != nil {
			return nil, problem.MesheryRefused.New("the list of filters cannot be read: %w", unquoted(err))
		}
		fresh := false
		for _, w := range list.Filters {
			f := w.filter()
			if IsFilterID(f.ID) && !slices.ContainsFunc(all, func(o Filter) bool { return o.ID == f.ID }) {
				all, fresh = append(all, f), true
			}
		}
		// A server that ignores the page would give the first for ever.
		if len(list.Filters) < pageSize || !fresh {
			break
		}
	}
	return all, nil
}

// Find returns the one filter that has a name, or an id.
func (c *Client) Find(ctx context.Context, name string) (Filter, error) {
	if IsFilterID(name) {
		return Filter{ID: strings.ToLower(name), Name: name}, nil
	}
	all, err := c.Filters(ctx, name)
	if err != nil {
		return Filter{}, err
	}
	all = slices.DeleteFunc(all, func(f Filter) bool { return f.Name != name })
	switch len(all) {
	case 0:
		return Filter{}, problem.StoredFilterMissing.New("%q", name)
	case 1:
		return all[0], nil
	}
	ids := make([]string, len(all))
	for i, f := range all {
		ids[i] = f.ID
	}
	return Filter{}, problem.InvalidRequest.WithFields("", []problem.Field{{Path: "name", Cause: fmt.Sprintf("%d filters are called %q", len(all), name),
		Remedy: "give the id of the one that is meant: " + strings.Join(ids, ", ")}})
}

// Download returns the bytes of a stored filter, at most limit. problem.StoredFilterMissing when there is none of that id
// which the user may see.
func (c *Client) Download(ctx context.Context, id string, limit int64) ([]byte, error) {
	if !IsFilterID(id) {
		return nil, problem.StoredFilterMissing.New("%q is not the id of a filter in Meshery", clip(id))
	}
	answer, err := c.Do(ctx, http.MethodGet, filtersPath+"/download/"+strings.ToLower(id), "", nil, limit)
	switch {
	case err != nil:
		return nil, err
	case answer.Status == http.StatusNotFound:
		return nil, problem.StoredFilterMissing.New("%s", id)
	}
	if err := answer.Refusal("the filter " + id); err != nil {
		return nil, err
	}
	if len(answer.Body) == 0 {
		return nil, problem.MesheryRefused.New("the filter %s has no bytes", id)
	}
	return answer.Body, nil
}

// Save keeps a filter in Meshery, and reads it back: some servers take its bytes for text. problem.MesheryRefused when
// what is kept is something else.
func (c *Client) Save(ctx context.Context, u Upload) (Filter, error) {
	before, err := c.Filters(ctx, u.Name)
	if err != nil {
		return Filter{}, err
	}
	// Servers before 2025 know the bytes by the first name only, and those since then by the second.
	data := map[string]any{"name": u.Name, "config": u.Config, "filter_file": u.Bytes, "filterFile": u.Bytes}
	if u.ID != "" {
		data["id"] = u.ID
	}
	body, err := json.Marshal(map[string]any{"save": true, "config": u.Config, "filter_data": data})
	if err != nil {
		return Filter{}, fmt.Errorf("write the filter: %w", err)
	}
	answer, err := c.Do(ctx, http.MethodPost, filtersPath, "application/json", body, maxPage)
	if err != nil {
		return Filter{}, err
	}
	if err := answer.Refusal("the filter " + u.Name); err != nil {
		return Filter{}, err
	}
	f, err := c.saved(ctx, u, before, answer.Body)
	if err != nil {
		return Filter{}, err
	}
	kept, err := c.Download(ctx, f.ID, maxFilter)
	if err != nil {
		return Filter{}, fmt.Errorf("read the filter %s back: %w", f.ID, err)
	}
	if !bytes.Equal(kept, u.Bytes) {
		return Filter{}, problem.MesheryRefused.New("it does not keep bytes as they are: of %s, %d bytes, it has %d others as the filter %s", u.Name, len(u.Bytes), len(kept), f.ID)
	}
	return f, nil
}

// saved finds the filter that was just kept. Newer servers do not say its id.
func (c *Client) saved(ctx context.Context, u Upload, before []Filter, answer []byte) (Filter, error) {
	if u.ID != "" {
		return Filter{ID: strings.ToLower(u.ID), Name: u.Name, Size: len(u.Bytes), Config: u.Config}, nil
	}
	var told []wireFilter
	if json.Unmarshal(answer, &told) == nil && len(told) == 1 && IsFilterID(told[0].ID) {
		return told[0].filter(), nil
	}
	after, err := c.Filters(ctx, u.Name)
	if err != nil {
		return Filter{}, err
	}
	for _, f := range after { // the newest comes first
		if f.Name == u.Name && !slices.ContainsFunc(before, func(o Filter) bool { return o.ID == f.ID }) {
			return f, nil
		}
	}
	return Filter{}, problem.MesheryRefused.New("it took the filter %s, and does not list it", u.Name)
}

// unquoted is a mistake in JSON without what the server sent.
func unquoted(err error) error {
	var wrong *json.UnmarshalTypeError
	if errors.As(err, &wrong) {
		return fmt.Errorf("%s is a JSON %s", wrong.Field, strings.SplitN(wrong.Value, " ", 2)[0])
	}
	if errors.Is(err, io.ErrUnexpectedEOF) {
		return errors.New("it ends early")
	}
	return errors.New("it is not JSON")
}

func clip(s string) string {
	if len(s) > 80 {
		return s[:80] + "…"
	}
	return s
}
