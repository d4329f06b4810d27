package consul

import (
	"errors"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"testing"

	"github.com/meshery/meshery-filters/internal/filter"
	"github.com/meshery/meshery-filters/internal/problem"
)

func TestWhatIsNoConsulDoesNotPassForAnotherWriter(t *testing.T) {
	other := httptest.NewServer(http.NotFoundHandler())
	t.Cleanup(other.Close)
	c, err := New(Options{Addr: other.URL, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	_, err = c.keep(t.Context(), inventory{Chain: filter.Chain{Mesh: "consul", Filters: []filter.Filter{{}}}, Entries: []string{"service-defaults/api"}})
	if !errors.Is(err, problem.ConsulRefused) {
		t.Error(err)
	}
}
