package consul

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/meshery/meshery-filters/internal/problem"
)

func TestFilesThatNobodyNeedsGoIfTheAdapterWroteThem(t *testing.T) {
	folder := filepath.Join(t.TempDir(), `of [all] \ *?`) // which a pattern would take for something else
	if err := os.Mkdir(folder, 0o755); err != nil {
		t.Fatal(err)
	}
	c := newClient(t, func(o *Options) { o.Folder = folder })
	other := newClient(t, func(o *Options) { o.Folder, o.Addr = folder, strings.Replace(o.Addr, "127.0.0.1", "localhost", 1) })
	digest := func(text string) string { return fmt.Sprintf("%x", sha256.Sum256([]byte(text))) }
	put := func(c *Client, text string) {
		t.Helper()
		if err := c.PutModule(digest(text), []byte(text)); err != nil {
			t.Fatal(err)
		}
	}
	write := func(name, text string) {
		t.Helper()
		if err := os.WriteFile(c.ModulePath(digest(name)), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	write("theirs", "theirs")
	for _, text := range []string{"theirs", "needed", "fresh", "changed", "shared", "named", "old"} {
		put(c, text)
	}
	put(other, "shared")
	write("changed", "by somebody")
	// Such as what render showed, and somebody wrote.
	if err := shared.consul.Write(t.Context(), map[string]any{"Kind": "service-defaults", "Name": "api", "EnvoyExtensions": []any{map[string]any{"Name": "builtin/wasm",
		"Arguments": map[string]any{"Protocol": "http", "ListenerType": "inbound", "PluginConfig": map[string]any{
			"VmConfig": map[string]any{"Code": map[string]any{"Local": map[string]any{"Filename": c.ModulePath(digest("named"))}}}}}}}}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := shared.consul.Delete(context.Background(), "service-defaults", "api"); err != nil {
			t.Error(err)
		}
	})
	past := time.Now().Add(-2 * time.Hour)
	for _, text := range []string{"needed", "changed", "shared", "named", "old"} {
		if err := os.Chtimes(c.mark(digest(text), c.self()), past, past); err != nil {
			t.Fatal(err)
		}
	}
	sweep := func(c *Client, want ...string) {
		t.Helper()
		got, err := c.SweepModules(t.Context(), map[string]bool{digest("needed"): true}, time.Hour)
		if err != nil || !slices.Equal(got, want) {
			t.Errorf("it deletes %v, %v", got, err)
		}
	}
	is := func(text string, there bool) {
		t.Helper()
		if _, err := os.Stat(c.ModulePath(digest(text))); (err == nil) != there {
			t.Errorf("%s: %v", text, err)
		}
	}
	half := filepath.Join(folder, unfinished+"1")
	if err := errors.Join(os.WriteFile(half, []byte("hal"), 0o600), os.WriteFile(half+"2", []byte("hal"), 0o600), os.Chtimes(half, past, past)); err != nil {
		t.Fatal(err)
	}
	sweep(c, digest("old"))
	if halves, err := filepath.Glob(filepath.Join(filepath.Dir(folder), "*", unfinished+"*")); err != nil || !slices.Equal(halves, []string{half + "2"}) {
		t.Errorf("what was being written is %q, %v", halves, err)
	}
	if err := os.Remove(half + "2"); err != nil {
		t.Fatal(err)
	}
	for _, text := range []string{"theirs", "needed", "fresh", "changed", "shared", "named"} {
		is(text, true)
	}
	is("old", false)
	// It was needed a moment ago, and is so still when it is put there once more.
	sweep(c)
	put(c, "fresh")
	sweep(c)
	is("needed", true)
	if err := c.PutModule(digest("old"), nil); !errors.Is(err, problem.ModuleUnavailable) {
		t.Error(err)
	}
	if err := os.Chtimes(other.mark(digest("shared"), other.self()), past, past); err != nil {
		t.Fatal(err)
	}
	sweep(other, digest("shared")) // the last that needed it
	is("shared", false)
	// Of what was there before, and has no mark, that is told which nothing names.
	write("past", "past")
	kept := on("kept", 1)
	kept.Chain.Filters[0].Spec.Module.SHA256 = digest("past")
	if _, err := c.keep(t.Context(), kept); err != nil {
		t.Fatal(err)
	}
	left := []string{c.ModulePath(digest("theirs")), c.ModulePath(digest("changed"))}
	slices.Sort(left)
	if s, err := c.Survey(t.Context()); err != nil || !slices.Equal(s.Files, left) || s.Missed != "" || !strings.Contains(s.Left(), "\n  "+left[0]+"\n  "+left[1]) {
		t.Errorf("%q %v %v", s.Files, s, err)
	}
	entries, err := os.ReadDir(folder)
	if err != nil || len(entries) != 6+3 { // theirs, past, what was changed, and three with their marks
		t.Errorf("%v %v", entries, err)
	}
}
