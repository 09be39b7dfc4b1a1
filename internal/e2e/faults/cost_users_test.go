package faults

import (
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/internal/e2e/harness"
)

// TestCostOfUsers checks that an operation is one script call with every feature of
// users, and the number of its commands. A feature that a rule or a connection does not
// use costs nothing.
func TestCostOfUsers(t *testing.T) {
	t.Parallel()
	ctx, w := t.Context(), harness.RealWorld(t)
	c := harness.NewCosts(t, w)
	defer c.Print()
	byNumber := mesh.UserIDField("n") // of harness.Connected: each connection is another user
	const many = 10_000
	for _, feature := range []struct {
		name  string
		rule  mesh.PresenceOptions
		users func(mesh.Member) string
		// The most commands of one operation. Every fiftieth joins an empty room, and
		// renewals of the lease may come in between.
		join, state, leave float64
	}{
		{"nothing", mesh.PresenceOptions{}, nil, 10.2, 10.1, 12.2},
		{"caps without users", mesh.PresenceOptions{MaxConnections: many}, nil, 10.2, 10.1, 12.2},
		{"Options.UserID, no connection has a user", mesh.PresenceOptions{}, mesh.UserIDField("no"), 10.2, 10.1, 12.2},
		{"users", mesh.PresenceOptions{}, byNumber, 12.2, 12.1, 15.2},
		{"users, MaxUsers", mesh.PresenceOptions{MaxUsers: many}, byNumber, 12.2, 12.1, 15.2},
		{"users, Grace", mesh.PresenceOptions{Grace: 10 * time.Minute}, byNumber, 12.2, 12.1, 15.2},
		{"users, Grace, caps", mesh.PresenceOptions{Grace: 10 * time.Minute, MaxConnections: many, MaxUsers: many}, byNumber, 12.2, 12.1, 15.2},
	} {
		p := c.ManagerOf(time.Hour, feature.rule, feature.users)
		c.Connected(p)
		join := func(i int) error { return p.Join(ctx, costRoom(i), harness.CostConn(i)) }
		leave := func(i int) error { _, err := p.Leave(ctx, costRoom(i), harness.CostConn(i)); return err }
		state := func(i int) error {
			return p.PublishState(ctx, costRoom(i), harness.CostConn(i), map[string]int{"n": i}, mesh.StateOptions{})
		}
		require.NoError(t, join(0)) // loads the scripts
		require.NoError(t, leave(0))
		single := func(name string, scripts int, most float64, do func(i int) error) {
			t.Helper()
			got := c.Measure(feature.name+": "+name, harness.CostConns, c.Each(do))
			assert.LessOrEqual(t, got.Scripts(), scripts*harness.CostConns+1, "%s: %s: script calls", feature.name, name)
			assert.LessOrEqual(t, float64(got.All()), most*harness.CostConns, "%s: %s: %v", feature.name, name, got)
		}
		single("join", 1, feature.join, join)
		single("state", 1, feature.state, state)
		single("leave, with the state", 1, feature.leave, leave)
		c.Measure(feature.name+": join, all at once", harness.CostConns, c.Together(join))
		c.Measure(feature.name+": leave, all at once", harness.CostConns, c.Together(leave))
		if feature.rule.Grace > 0 {
			c.Together(join)()
			disconnect := func(i int) error { return p.Disconnect(ctx, harness.CostConn(i)) }
			single("disconnect, the place is kept", 2, 22, disconnect)
			// The join of another connection takes the place.
			again := func(i int) string { return "again-" + harness.CostConn(i) }
			c.Together(func(i int) error { return p.Connect(ctx, again(i), map[string]int{"n": i}) })()
			w.Eventually(5*time.Second, func() bool { return p.Stats().Unwritten == 0 }, "the connections are registered")
			single("return", 1, 25, func(i int) error { return p.Join(ctx, costRoom(i), again(i)) })
			// A connection of the app's own transport comes back under its id. The first call
			// does not know that Redis has an entry of it.
			c.Together(func(i int) error { return p.Disconnect(ctx, again(i)) })()
			c.Together(func(i int) error { return p.Connect(ctx, again(i), map[string]int{"n": i}) })()
			w.Eventually(5*time.Second, func() bool { return p.Stats().Unwritten == 0 }, "the connections are registered")
			single("return under the same id", 2, 26, func(i int) error { return p.Join(ctx, costRoom(i), again(i)) })
			c.Together(func(i int) error { _, err := p.Leave(ctx, costRoom(i), again(i)); return err })()
		}
		c.End(p)
	}
}
