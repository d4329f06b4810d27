package meshery

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/meshery/meshery-filters/internal/problem"
)

// keeper plays /api/filter of a server: of the generation before names got capitals, or after.
type keeper struct {
	old     bool // names with underscores, and the answer to an upload says what was kept
	asText  bool // as some did: what is in the upload is kept as it is
	mu      sync.Mutex
	filters []kept // newest first
	asked   []string
	bodies  []string
}

type kept struct {
	id, name, config string
	data             []byte
}

func (k *keeper) json(f kept) map[string]any {
	resource, _ := json.Marshal(map[string]any{"displayName": "wasmfilter", "configuration": map[string]any{"config": f.config}})
	if k.old {
		return map[string]any{"id": f.id, "name": f.name, "filter_file": f.data, "visibility": "private", "filter_resource": string(resource), "user_id": nil, "updated_at": "2023-07-07T10:00:00Z"}
	}
	return map[string]any{"id": f.id, "name": f.name, "filterFile": f.data, "visibility": "public", "filterResource": string(resource), "userId": nil, "updatedAt": "2026-01-07T10:00:00Z"}
}

func (k *keeper) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, _ := io.ReadAll(r.Body)
	k.mu.Lock()
	defer k.mu.Unlock()
	k.asked = append(k.asked, r.Method+" "+r.URL.String())
	switch id, download := strings.CutPrefix(r.URL.Path, "/api/filter/download/"); {
	case download:
		for _, f := range k.filters {
			if f.id == id {
				w.Header().Set("Content-Type", "application/wasm")
				_, _ = w.Write(f.data)
				return
			}
		}
		http.Error(w, "record not found", http.StatusNotFound)
	case r.Method == http.MethodGet:
		page, _ := strconv.Atoi(r.URL.Query().Get("page"))
		size, _ := strconv.Atoi(r.URL.Query().Get("pagesize"))
		list := []any{}
		n := 0
		for _, f := range k.filters {
			if strings.Contains(f.name, r.URL.Query().Get("search")) {
				if n >= page*size && n < (page+1)*size {
					list = append(list, k.json(f))
				}
				n++
			}
		}
		_ = json.NewEncoder(w).Encode(map[string]any{"page": page, "total_count": n, "filters": list})
	default:
		k.bodies = append(k.bodies, string(body))
		var q struct {
			Save       bool
			Config     string
			FilterData struct {
				ID, Name string
				Old      json.RawMessage `json:"filter_file"`
				New      json.RawMessage `json:"filterFile"`
			} `json:"filter_data"`
		}
		if err := json.Unmarshal(body, &q); err != nil || !q.Save {
			http.Error(w, "Filter request body is corrupted.", http.StatusBadRequest)
			return
		}
		file := q.FilterData.New
		if k.old {
			file = q.FilterData.Old
		}
		f := kept{id: q.FilterData.ID, name: q.FilterData.Name, config: q.Config}
		if k.asText {
			var s string
			_ = json.Unmarshal(file, &s)
			f.data = []byte(s)
		} else if err := json.Unmarshal(file, &f.data); err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		if f.id == "" {
			f.id = fmt.Sprintf("00000000-0000-4000-8000-%012d", len(k.filters))
			k.filters = append([]kept{f}, k.filters...)
		} else {
			for i := range k.filters {
				if k.filters[i].id == f.id {
					k.filters[i] = f
				}
			}
		}
		answer := []any{} // the newest servers forget what to answer
		if k.old {
			answer = append(answer, k.json(f))
		}
		_ = json.NewEncoder(w).Encode(answer)
	}
}

// everyByte is no text in any encoding.
var everyByte = func() []byte {
	b := []byte("\x00asm\x01\x00\x00\x00")
	for i := range 256 {
		b = append(b, byte(i))
	}
	return b
}()

func TestAFilterIsKeptAndComesBackByteByByte(t *testing.T) {
	for name, k := range map[string]*keeper{"the newest servers": {}, "servers before": {old: true}} {
		t.Run(name, func(t *testing.T) {
			c := client(t, Options{Server: serve(t, k.ServeHTTP)})
			other, err := c.Save(t.Context(), Upload{Name: "limit.wasm", Bytes: []byte("\x00asm other")})
			if err != nil {
				t.Fatal(err)
			}
			f, err := c.Save(t.Context(), Upload{Name: "limit.wasm", Config: `{"rate": 10}`, Bytes: everyByte})
			if err != nil || f.ID == other.ID || !IsFilterID(f.ID) {
				t.Fatalf("saved as %+v, %v; the other one is %s", f, err, other.ID)
			}
			got, err := c.Download(t.Context(), strings.ToUpper(f.ID), 1000)
			if err != nil || !bytes.Equal(got, everyByte) {
				t.Errorf("%d bytes came back, %v", len(got), err)
			}
			all, err := c.Filters(t.Context(), "limit")
			if err != nil || len(all) != 2 || all[0].Size != len(everyByte) || all[0].Config != `{"rate": 10}` || all[0].Updated == "" || all[0].Visibility == "" {
				t.Errorf("the list is %+v, %v", all, err)
			}
			if _, err := c.Find(t.Context(), "limit.wasm"); !errors.Is(err, problem.InvalidRequest) || !strings.Contains(err.Error(), other.ID) {
				t.Errorf("a name that two have: %v", err)
			}
			if _, err := c.Find(t.Context(), "limit"); !errors.Is(err, problem.StoredFilterMissing) {
				t.Errorf("a part of a name: %v", err)
			}
			// Replaced in place.
			if again, err := c.Save(t.Context(), Upload{ID: f.ID, Name: "limit.wasm", Bytes: everyByte[:100]}); err != nil || again.ID != f.ID {
				t.Errorf("replaced as %+v, %v", again, err)
			}
			if _, err := c.Download(t.Context(), f.ID, 99); !errors.Is(err, problem.MesheryRefused) {
				t.Errorf("more than the limit: %v", err)
			}
			for _, id := range []string{"00000000-0000-4000-8000-00000000ffff", "../../system/sync", "", strings.Repeat("a", 1<<16)} {
				if _, err := c.Download(t.Context(), id, 1000); !errors.Is(err, problem.StoredFilterMissing) || len(err.Error()) > 300 {
					t.Errorf("%.40q: %.300v", id, err)
				}
			}
			var body struct {
				Data map[string]string `json:"filter_data"`
			}
			if err := json.Unmarshal([]byte(k.bodies[1]), &body); err != nil || body.Data["filter_file"] != base64.StdEncoding.EncodeToString(everyByte) || body.Data["filterFile"] != body.Data["filter_file"] {
				t.Errorf("the upload is %.300s", k.bodies[1])
			}
		})
	}
}

func TestAServerThatTakesBytesForTextIsFoundOut(t *testing.T) {
	k := &keeper{old: true, asText: true}
	c := client(t, Options{Server: serve(t, k.ServeHTTP)})
	_, err := c.Save(t.Context(), Upload{Name: "limit.wasm", Bytes: everyByte})
	if !errors.Is(err, problem.MesheryRefused) || !strings.Contains(err.Error(), "does not keep bytes as they are") {
		t.Error(err)
	}
}

func TestTheListIsReadPageByPage(t *testing.T) {
	k := &keeper{}
	for i := range 12 {
		k.filters = append(k.filters, kept{id: fmt.Sprintf("00000000-0000-4000-8000-%012d", i), name: fmt.Sprintf("f%d", i), data: everyByte})
	}
	c := client(t, Options{Server: serve(t, k.ServeHTTP)})
	if all, err := c.Filters(t.Context(), ""); err != nil || len(all) != 12 || len(k.asked) != 3 {
		t.Errorf("%d filters with %q, %v", len(all), k.asked, err)
	}
	// A server that knows no pages gives the same again and again.
	first, _ := json.Marshal(map[string]any{"filters": []any{k.json(k.filters[0]), k.json(k.filters[1]), k.json(k.filters[2]), k.json(k.filters[3]), k.json(k.filters[4])}})
	c = client(t, Options{Server: serve(t, func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(first) }), Timeout: time.Minute})
	if all, err := c.Filters(t.Context(), ""); err != nil || len(all) != 5 {
		t.Errorf("%d filters, %v", len(all), err)
	}
	for answer, says := range map[string]string{"<html>": "it is not JSON", `{"filters": "secret"}`: "JSON string", `{"filters": [`: "it is not JSON"} {
		c := client(t, Options{Server: serve(t, func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, answer) })})
		if _, err := c.Filters(t.Context(), ""); !errors.Is(err, problem.MesheryRefused) || !strings.Contains(err.Error(), says) || strings.Contains(err.Error(), "secret") {
			t.Errorf("%s: %v", answer, err)
		}
	}
}
