package users

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/internal/e2e/harness"
)

// A cap holds for joins at the same moment on all servers: it admits exactly as many as
// it says. Each run has a room of its own.
func TestCapsOfManyJoins(t *testing.T) {
	onRedis(t, func(t *testing.T, w *harness.World) {
		const servers, joins, most = 8, 1000, 100
		runs := 20
		if harness.Light() {
			runs = 3
		}
		list := make([]*mesh.PresenceManager, servers)
		for i := range list {
			list[i] = w.Manager(harness.WithUsers)
			for expr, rule := range map[string]mesh.PresenceOptions{
				"^connections-": {MaxConnections: most},
				"^users-":       {MaxUsers: most},
				"^tabs-":        {MaxUsers: most / 2},
				"^both-":        {MaxConnections: most, MaxUsers: joins},
			} {
				require.NoError(t, list[i].TrackPresence(mesh.Regexp(regexp.MustCompile(expr)), rule))
			}
		}
		var connecting sync.WaitGroup
		for i := range joins {
			connecting.Go(func() {
				for _, kind := range []string{"one", "two"} {
					user := i
					if kind == "two" {
						user = i / 2 // each user has two connections, on two servers
					}
					err := list[i%servers].Connect(context.Background(), fmt.Sprint(kind, i), map[string]string{"userId": fmt.Sprint("user-", user)})
					assert.NoError(t, err)
				}
			})
		}
		connecting.Wait()

		for run := range runs {
			for _, c := range []struct {
				room, conn  string
				users       int // users in the room afterwards
				connections int
			}{
				{"connections", "one", most, most},
				{"users", "one", most, most},
				{"tabs", "two", most / 2, most}, // a further connection of a user is admitted
				{"both", "one", most, most},
			} {
				room := fmt.Sprintf("%s-%d", c.room, run)
				admitted := joinAtOnce(t, joins, func(i int) error {
					return list[i%servers].Join(context.Background(), room, fmt.Sprint(c.conn, i))
				})
				members, err := list[0].Members(t.Context(), room)
				require.NoError(t, err)
				users := make(map[string]bool)
				for _, m := range members {
					users[m.UserID] = true
				}
				require.Equal(t, []int{c.connections, c.connections, c.users}, []int{admitted, len(members), len(users)},
					"%s: admitted joins, members, users", room)
			}
		}
		t.Logf("%d runs of 4 × %d joins on %d servers: %d admitted each", runs, joins, servers, most)
	})
}

// joinAtOnce makes n joins at once and returns how many were admitted. All others must
// have been refused because the room is full. On a busy machine a join may be answered
// with ErrUnavailable, and is then made again.
func joinAtOnce(t *testing.T, n int, join func(i int) error) (admitted int) {
	t.Helper()
	var mu sync.Mutex
	var joining sync.WaitGroup
	begin := make(chan struct{})
	for i := range n {
		joining.Go(func() {
			<-begin
			err := join(i)
			for errors.Is(err, mesh.ErrUnavailable) {
				time.Sleep(100 * time.Millisecond)
				err = join(i)
			}
			mu.Lock()
			defer mu.Unlock()
			switch {
			case err == nil:
				admitted++
			case !errors.Is(err, mesh.ErrFull):
				t.Errorf("join %d: %v", i, err)
			}
		})
	}
	close(begin)
	joining.Wait()
	return admitted
}
