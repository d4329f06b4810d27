package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"

	"github.com/meshery/meshery-filters/internal/server/filterspb"
)

// newEvents makes `events`.
func newEvents(a *app) *cobra.Command {
	var operation string
	var follow bool
	cmd := &cobra.Command{
		Use:   "events",
		Short: "Show what has happened, and with --follow what happens",
		Long: `Show the events that the adapter still holds, the oldest first, and with --follow those that are to come.

With --operation they are those of one operation; following ends with its last event. With -o json each event is one
line, with -o yaml one document.`,
		Example: `  meshery-filters events
  meshery-filters events --follow -o json
  meshery-filters events --operation DETHPVZOD2GWPZNVQKMAS7ZDOP --follow`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := a.dial()
			if err != nil {
				return err
			}
			defer c.close()
			q := &filterspb.WatchRequest{OperationId: operation}
			if follow {
				if err := a.begun(cmd.Context(), c, operation); err != nil {
					return err
				}
				return a.follow(cmd.Context(), c, q)
			}
			return a.held(cmd.Context(), c, q)
		},
	}
	cmd.Flags().StringVar(&operation, "operation", "", "show the events of the operation with this `id` only")
	cmd.Flags().BoolVar(&follow, "follow", false, "go on with what happens, until interrupted")
	a.outputFlag(cmd)
	a.adapterFlags(cmd)
	return cmd
}

var eventHeading = []string{"TIME", "OPERATION", "NO", "TYPE", "SUMMARY"}

// columns lines up events that are printed as they come.
const columns = "%-20s  %-26s  %-3s  %-7s  %s\n"

func (e eventView) row() []string {
	return []string{e.Time.UTC().Format(time.RFC3339), e.Operation, fmt.Sprint(e.Sequence), e.Type, e.Summary}
}

// begun says so when no event of an operation is held, which may be one that is still to begin or is misspelled: whoever
// follows it waits.
func (a *app) begun(ctx context.Context, c *client, operation string) error {
	if operation == "" {
		return nil
	}
	some := false
	err := a.watch(ctx, c, &filterspb.WatchRequest{OperationId: operation, UntilNow: true}, nil, func(eventView) error {
		some = true
		return nil
	})
	if err == nil && !some {
		fmt.Fprintf(a.Err, "No event of operation %s is held; it is waited for.\n", operation)
	}
	return err
}

// follow prints events until they end. Interrupting it is how it is used, and no failure.
func (a *app) follow(ctx context.Context, c *client, q *filterspb.WatchRequest) error {
	line := func(r []string) error {
		_, err := fmt.Fprintf(a.Out, columns, r[0], r[1], r[2], r[3], r[4])
		return err
	}
	if a.output == formTable {
		if err := line(eventHeading); err != nil {
			return err
		}
	}
	err := a.watch(ctx, c, q, nil, func(e eventView) error {
		if a.output != formTable {
			return a.printLine(e)
		}
		return line(e.row())
	})
	if errors.Is(err, context.Canceled) && ctx.Err() != nil {
		return nil
	}
	return err
}

// held prints the events that the adapter has.
func (a *app) held(ctx context.Context, c *client, q *filterspb.WatchRequest) error {
	q.UntilNow = true
	rows := [][]string{}
	err := a.watch(ctx, c, q, nil, func(e eventView) error {
		if a.output != formTable {
			return a.printLine(e)
		}
		rows = append(rows, e.row())
		return nil
	})
	switch {
	case err != nil || a.output != formTable:
		return err
	case len(rows) == 0 && q.OperationId != "":
		_, err := fmt.Fprintf(a.Out, "No event of operation %s is held.\n", q.OperationId)
		return err
	case len(rows) == 0:
		_, err := io.WriteString(a.Out, "No events are held.\n")
		return err
	}
	return table(a.Out, eventHeading, rows)
}
