package store

import (
	"errors"
	"fmt"
	"testing"

	"github.com/meshery/meshery-filters/internal/problem"
)

// Whoever adds to a Problem copies it.
func TestWhatIsMadeOfAProblemThatIsAwayIsAway(t *testing.T) {
	for _, err := range []error{
		asAway(problem.StoreFailed.New("no space left on device")),
		asAway(fmt.Errorf("look: %w", problem.StoreFailed.New("no space left on device"))),
		away(errors.New("no answer")),
		storeFailed("writing x", errors.New("no answer")),
	} {
		p := *problem.Of(fmt.Errorf("read the chain: %w", err))
		p.Details = "filter-0: " + p.Details
		if !errors.Is(&p, ErrAway) || errors.Is(&p, ErrStale) {
			t.Errorf("%v", &p)
		}
	}
}
