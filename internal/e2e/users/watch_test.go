package users

import (
	"context"
	"fmt"
	"regexp"
	"slices"
	"sync"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/internal/e2e/harness"
)

// about names the events of a type about a user in a room.
type about struct {
	kind       mesh.EventType
	room, user string
}

// watch is a server of its own that subscribes to rooms, and sums up what it is told of
// users.
type watch struct {
	*mesh.PresenceManager
	w     *harness.World
	rooms []string

	mu      sync.Mutex // guards the fields below
	arrived map[string]int
	left    map[string]int
	kinds   map[mesh.EventType]int
	reasons map[mesh.LeaveReason]int
	at      map[about][]time.Time // when events arrived
	faults  []error
}

// watchRooms starts the server and waits until it is subscribed to all rooms.
func watchRooms(w *harness.World, rooms []string, grace time.Duration, setup ...func(*mesh.Options)) *watch {
	w.T.Helper()
	h := &watch{
		PresenceManager: w.Manager(append(setup, harness.WithUsers)...), w: w, rooms: rooms,
		arrived: make(map[string]int), left: make(map[string]int), kinds: make(map[mesh.EventType]int),
		reasons: make(map[mesh.LeaveReason]int), at: make(map[about][]time.Time),
	}
	require.NoError(w.T, h.TrackPresence(mesh.Regexp(regexp.MustCompile(".*")), mesh.PresenceOptions{Grace: grace}))
	require.NoError(w.T, h.TrackPresence(mesh.Exact(harness.RoomPlain), mesh.PresenceOptions{}))
	ctx, cancel := context.WithCancel(context.Background())
	var following, subscribed sync.WaitGroup
	w.T.Cleanup(func() {
		cancel()
		following.Wait()
	})
	subscribed.Add(len(rooms))
	for _, room := range rooms {
		following.Go(func() {
			first := sync.OnceFunc(subscribed.Done)
			defer first()
			for e, err := range h.Subscribe(ctx, room, mesh.SubscribeOptions{}) {
				h.take(room, e, err)
				first()
			}
		})
	}
	subscribed.Wait()
	h.check()
	return h
}

func (h *watch) take(room string, e mesh.Event, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if err != nil {
		h.faults = append(h.faults, fmt.Errorf("%s: %w", room, err))
		return
	}
	h.kinds[e.Type]++
	switch {
	case e.UserArrived():
		h.arrived[e.UserID]++
	case e.UserLeft():
		h.left[e.UserID]++
	}
	if e.Type == mesh.EventLeave {
		h.reasons[e.Reason]++
	}
	if e.UserID != "" {
		key := about{e.Type, room, e.UserID}
		h.at[key] = append(h.at[key], time.Now())
	}
}

// times returns when the events of a type about a user arrived.
func (h *watch) times(kind mesh.EventType, room, user string) []time.Time {
	h.mu.Lock()
	defer h.mu.Unlock()
	return slices.Clone(h.at[about{kind, room, user}])
}

// count returns the number of events of a type.
func (h *watch) count(kind mesh.EventType) int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.kinds[kind]
}

// users returns the numbers of users that arrived and that left.
func (h *watch) users() (arrived, left int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	return len(h.arrived), len(h.left)
}

// check fails if a subscription ended or had to begin again.
func (h *watch) check() {
	h.w.T.Helper()
	h.mu.Lock()
	defer h.mu.Unlock()
	require.Empty(h.w.T, h.faults)
	require.Equal(h.w.T, len(h.rooms), h.kinds[mesh.EventSnapshot], "snapshots")
}

// await waits until every room has that many members, all connected.
func (h *watch) await(members int) {
	h.w.T.Helper()
	for _, room := range h.rooms {
		h.w.Eventually(30*time.Second, func() bool {
			list, err := h.Members(h.w.T.Context(), room)
			require.NoError(h.w.T, err)
			for _, m := range list {
				if m.Disconnected {
					return false
				}
			}
			return len(list) == members
		}, "%s has %d connected members", room, members)
	}
}
