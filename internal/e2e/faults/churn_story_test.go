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

// What happened to a connection, for when something is wrong with it.

// tell adds to the story of a connection. st.mu is held.
func (st *storm) tell(id, what string) {
	st.events[id] = append(st.events[id], fmt.Sprintf("%.3fs %s", time.Since(st.began).Seconds(), what))
}

// overhear adds what is published: it says why somebody left.
func (st *storm) overhear() {
	heard := st.admin.PSubscribe(st.T.Context(), testhook.NewKeys(harness.RedisPrefix, 0, 1, false).EventsPrefix()+"*")
	ended := make(chan struct{})
	st.T.Cleanup(func() {
		_ = heard.Close() // it has been cut off often enough to fail
		<-ended
	})
	go func() {
		defer close(ended)
		for m := range heard.Channel() {
			// type epoch tag prev time cause connection record
			if f := strings.SplitN(m.Payload, " ", 11); len(f) > 9 {
				st.mu.Lock()
				st.tell(f[6], fmt.Sprintf("Redis tells %s, cause %s, entry %s of %s, seq %s", f[0], f[5], f[7], f[8], f[9]))
				st.mu.Unlock()
			}
		}
	}()
}

// story returns what happened to a connection.
func (st *storm) story(id string) string {
	st.mu.Lock()
	defer st.mu.Unlock()
	return strings.Join(st.events[id], "\n")
}

var connectionIDs = regexp.MustCompile(`[A-Z2-7]{26}`)

// stories returns what happened to the connections that a text names, and what
// one watcher was told.
func (st *storm) stories(text string) string {
	ids := connectionIDs.FindAllString(text, 3)
	slices.Sort(ids)
	var all strings.Builder
	for _, id := range slices.Compact(ids) {
		for _, s := range st.souls {
			if s.p != nil && s.p.ID == id {
				fmt.Fprintf(&all, "at %s\n", s.post.name)
			}
		}
		fmt.Fprintf(&all, "%s\n%s\n%s was told:\n%s\n", id, st.story(id), st.ledgers()[0].where, st.ledgers()[0].about(st, id))
	}
	return all.String()
}

// about returns what a watcher was told of a connection.
func (l *ledger) about(st *storm, id string) string {
	l.p.Mu.Lock()
	defer l.p.Mu.Unlock()
	var told strings.Builder
	for i, u := range l.p.Updates {
		if u.ConnectionID == id {
			fmt.Fprintf(&told, "%.3fs %s %s repair %v, %s %d\n", l.p.Times[i].Sub(st.began).Seconds(), u.Type, u.State, u.Repair, u.Epoch, u.Seq)
		}
	}
	return told.String()
}
