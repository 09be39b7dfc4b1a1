//go:build unix

package faults

import (
	"fmt"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/meshpresence/mesh/internal/e2e/harness"
	"github.com/meshpresence/mesh/internal/testhook"
)

// Failure messages contain the history of a connection: its calls and the events about
// it.

// record adds a line to the history of a connection. The caller holds ct.mu.
func (ct *churnTest) record(id, line string) {
	ct.histories[id] = append(ct.histories[id], fmt.Sprintf("%.3fs %s", time.Since(ct.began).Seconds(), line))
}

// recordEvents adds the events that Redis publishes. They contain the cause of each
// leave.
func (ct *churnTest) recordEvents() {
	events := ct.admin.PSubscribe(ct.T.Context(), testhook.NewKeys(harness.RedisPrefix, 0, 1, false).EventsPrefix()+"*")
	ended := make(chan struct{})
	ct.T.Cleanup(func() {
		_ = events.Close() // may fail, because the connection was cut
		<-ended
	})
	go func() {
		defer close(ended)
		for m := range events.Channel() {
			// type epoch tag prev time cause connection record
			if f := strings.SplitN(m.Payload, " ", 11); len(f) > 9 {
				ct.mu.Lock()
				ct.record(f[6], fmt.Sprintf("event %s, cause %s, entry %s of %s, seq %s", f[0], f[5], f[7], f[8], f[9]))
				ct.mu.Unlock()
			}
		}
	}()
}

// historyOf returns the history of a connection.
func (ct *churnTest) historyOf(id string) string {
	ct.mu.Lock()
	defer ct.mu.Unlock()
	return strings.Join(ct.histories[id], "\n")
}

var connectionIDs = regexp.MustCompile(`[A-Z2-7]{26}`)

// historiesIn returns the histories of the connections that a text names, and the
// updates that one watcher received about them.
func (ct *churnTest) historiesIn(text string) string {
	ids := connectionIDs.FindAllString(text, 3)
	slices.Sort(ids)
	var all strings.Builder
	for _, id := range slices.Compact(ids) {
		for _, s := range ct.clients {
			if s.p != nil && s.p.ID == id {
				fmt.Fprintf(&all, "a connection of %s\n", s.slot.name)
			}
		}
		fmt.Fprintf(&all, "%s\n%s\n%s received:\n%s\n", id, ct.historyOf(id), ct.watchers()[0].name, ct.watchers()[0].about(ct, id))
	}
	return all.String()
}

// about returns the updates that a watcher received about a connection.
func (w *watcher) about(ct *churnTest, id string) string {
	w.p.Mu.Lock()
	defer w.p.Mu.Unlock()
	var list strings.Builder
	for i, u := range w.p.Updates {
		if u.ConnectionID == id {
			fmt.Fprintf(&list, "%.3fs %s %s repair %v, %s %d\n", w.p.Times[i].Sub(ct.began).Seconds(), u.Type, u.State, u.Repair, u.Epoch, u.Seq)
		}
	}
	return list.String()
}
