package kept

import (
	"log/slog"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh/internal/clock"
	"github.com/meshpresence/mesh/internal/keys"
	"github.com/meshpresence/mesh/internal/lease"
	"github.com/meshpresence/mesh/internal/store"
	"github.com/meshpresence/mesh/meshtest"
)

// node is a server with a real store, lease and Sweeper.
type node struct {
	*Sweeper
	store *store.Store
	lease *lease.Lease
	wheel *clock.Wheel
}

const leaseTTL = 6 * time.Second

func startNode(t *testing.T, mem *meshtest.Redis) *node {
	t.Helper()
	n := &node{store: store.New(mem.Client(), keys.Space{Prefix: "mesh:"}), wheel: clock.NewWheel(0)}
	n.lease = lease.New(lease.Config{
		Store: n.store, TTL: leaseTTL, OnRenew: func(lease.Renewed) { n.Renewed() },
		Kept: func(room, conn, entry string, until int64) { n.Add(room, conn, entry, until) },
	})
	n.Sweeper = New(Config{
		Store: n.store, Wheel: n.wheel, Buckets: 1, Bucket: func(string) int { return 0 },
		Clock: n.lease.Now, Proof: n.lease.ClockProof, ClockRefused: n.lease.ClockRefused,
		MayEnd:  func(bucket int, deadline int64) bool { return n.lease.MayEnd(n.store.Writes(bucket), deadline) },
		Enabled: func() bool { return true }, Logger: slog.New(slog.DiscardHandler),
	})
	n.wheel.Start()
	require.NoError(t, n.lease.Start(t.Context()))
	return n
}

// kill ends a node without resigning.
func (n *node) kill(t *testing.T) {
	require.NoError(t, n.lease.Stop(t.Context()))
	n.Stop()
	n.wheel.Stop()
	require.NoError(t, n.store.Wait(t.Context()))
}

// commit makes a user join and, if keep is set, disconnect. It returns the deadline.
func (n *node) commit(t *testing.T, number uint64, conn, user string, grace time.Duration, keep bool) (until int64) {
	t.Helper()
	ops := []store.Op{{Kind: store.OpJoin, Room: "r", Conn: conn, Entry: conn + "1", User: user, Grace: grace}}
	if keep {
		ops = append(ops, store.Op{Kind: store.OpLeave, Room: "r", Conn: conn, Entry: conn + "1", User: user, Cause: store.CauseLost, Keep: true})
	}
	results, err := n.store.Commit(t.Context(), 0, n.lease.Incarnation(), number, 0, ops)
	require.NoError(t, err)
	for _, r := range results {
		require.NoError(t, r.Err)
		until = r.KeptUntil
	}
	return until
}

// Sweepers on a real store: one place has a timer, one is found at a heartbeat, and one
// was of a server that died.
func TestSweepersOnAStore(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		mem := meshtest.StartRedis(t)
		a, b, c := startNode(t, mem), startNode(t, mem), startNode(t, mem)
		defer a.kill(t)
		defer b.kill(t)
		sub := mem.Client().Subscribe(t.Context(), a.store.Keys().EventsPrefix()+"r")
		defer func() { _ = sub.Close() }()
		_, err := sub.Receive(t.Context())
		require.NoError(t, err)

		time.Sleep(2 * leaseTTL)

		timed := a.commit(t, 1, "timed", "ann", 5*time.Second, true)
		a.Add("r", "timed", "timed1", timed)
		found := a.commit(t, 2, "found", "bob", 7*time.Second, true) // no server is told
		c.commit(t, 1, "dead", "cat", 20*time.Second, false)
		a.commit(t, 3, "stays", "dan", time.Second, false)
		c.kill(t)
		leaves := make(map[string]int64) // by connection: the time on the clock of Redis
		var died store.Event             // the hand-over of the entry of c
		for len(leaves) < 3 {
			m, err := sub.ReceiveMessage(t.Context())
			require.NoError(t, err)
			e, err := store.DecodeEvent(m.Payload)
			require.NoError(t, err)
			switch e.Type {
			case store.Left:
				require.NotContains(t, leaves, e.Conn, "a second leave")
				leaves[e.Conn] = e.At
			case store.Disconnected:
				died = e
			}
		}
		require.Equal(t, "dead", died.Conn)
		require.Equal(t, store.CauseServerLost, died.Cause)
		for conn, bounds := range map[string][2]int64{
			"timed": {timed, timed + 200}, "found": {found, found + (leaseTTL/3 + time.Second).Milliseconds()},
			"dead": {died.KeptUntil, died.KeptUntil + 200},
		} {
			require.GreaterOrEqual(t, leaves[conn], bounds[0], conn)
			require.LessOrEqual(t, leaves[conn], bounds[1], conn)
		}
		require.LessOrEqual(t, died.KeptUntil, died.At+20_000, "grace counts from the end of the lease")

		time.Sleep(time.Minute)
		require.EqualValues(t, 1, a.lease.Stats().PlacesKept+b.lease.Stats().PlacesKept)
		require.EqualValues(t, 3, a.Stats().GraceOver+b.Stats().GraceOver)
		first, err := a.store.NextKept(t.Context(), []int{0})
		require.NoError(t, err)
		require.Equal(t, []int64{0}, first)
		records, _, err := a.store.Some(t.Context(), "r", -1)
		require.NoError(t, err)
		require.Len(t, records, 1)
		require.Equal(t, "stays", records[0].Conn)
	})
}

// A kept place and an index of another type disturb nothing.
func TestIndexOfAnotherType(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		mem := meshtest.StartRedis(t)
		a := startNode(t, mem)
		defer a.kill(t)
		time.Sleep(2 * leaseTTL)
		until := a.commit(t, 1, "c", "ann", 5*time.Second, true)
		a.Add("r", "c", "c1", until)
		client := mem.Client()
		require.NoError(t, client.Set(t.Context(), a.store.Keys().Kept(0), "other", 0).Err())
		time.Sleep(10 * time.Second)
		records, _, err := a.store.Some(t.Context(), "r", -1)
		require.NoError(t, err)
		require.Empty(t, records)
		require.EqualValues(t, 1, a.Stats().GraceOver)

		// A room of another type keeps its place in the index, and costs little.
		require.NoError(t, client.Del(t.Context(), a.store.Keys().Kept(0)).Err())
		until = a.commit(t, 2, "d", "bob", time.Second, true)
		require.Positive(t, until)
		require.NoError(t, client.Set(t.Context(), a.store.Keys().Members("r"), "other", 0).Err())
		before := a.store.Stats().Calls
		time.Sleep(time.Minute)
		require.Less(t, a.store.Stats().Calls-before, uint64(4*60), "renewals and heartbeats are two calls in two seconds")
		require.EqualValues(t, 1, a.Stats().Pending)
		require.NoError(t, client.Del(t.Context(), a.store.Keys().Members("r")).Err())
		time.Sleep(2 * time.Minute)
		require.Zero(t, a.Stats().Pending)
		n, err := client.Exists(t.Context(), a.store.Keys().Kept(0)).Result()
		require.NoError(t, err)
		require.Zero(t, n)
	})
}
