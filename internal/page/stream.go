package page

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"time"

	"github.com/meshery/meshery-filters/internal/event"
)

// stream writes server-sent events.
type stream struct {
	w http.ResponseWriter
	c *http.ResponseController
}

func (s stream) send(text string) error {
	_ = s.c.SetWriteDeadline(time.Now().Add(writeLimit))
	if _, err := io.WriteString(s.w, text); err != nil {
		return err
	}
	return s.c.Flush()
}

// sendEvent sends one as JSON, which has no line breaks.
func (s stream) sendEvent(id string, e event.Event) error {
	data, err := json.Marshal(e)
	if err != nil {
		return fmt.Errorf("encode an event: %w", err)
	}
	return s.send("id: " + id + "\ndata: " + string(data) + "\n\n")
}
