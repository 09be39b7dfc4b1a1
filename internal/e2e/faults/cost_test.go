package faults

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/internal/e2e/harness"
	"github.com/meshpresence/mesh/internal/store"
	"github.com/meshpresence/mesh/internal/testhook"
)

func costRoom(i int) string { return fmt.Sprintf("room%d", i%50) }

// TestCostOfOperations checks that an operation makes at most one script call.
func TestCostOfOperations(t *testing.T) {
	t.Parallel()
	ctx, w := t.Context(), harness.RealWorld(t)
	c := harness.NewCosts(t, w)
	defer c.Print()
	p := c.Manager(time.Hour, 0)
	join := func(i int) error { return p.Join(ctx, costRoom(i), harness.CostConn(i)) }
	leave := func(i int) error { _, err := p.Leave(ctx, costRoom(i), harness.CostConn(i)); return err }
	state := func(i int) error {
		return p.PublishState(ctx, costRoom(i), harness.CostConn(i), map[string]int{"n": i}, mesh.StateOptions{})
	}
	clearState := func(i int) error { return p.ClearState(ctx, costRoom(i), harness.CostConn(i)) }
	single := func(name string, do func(i int) error) {
		t.Helper()
		got := c.Measure(name, harness.CostConns, c.Each(do))
		require.LessOrEqual(t, got.Scripts(), harness.CostConns, "%s: one script call per operation", name)
		require.Zero(t, got["multi"]+got["exec"])
	}
	many := func(name string, do func(i int) error) {
		t.Helper()
		got := c.Measure(name+", all at once", harness.CostConns, c.Together(do))
		require.LessOrEqual(t, got.Scripts(), harness.CostConns, "%s: one script call per operation at most", name) // TestDrainAtOnce checks that it can be fewer
	}

	c.Connected(p)
	require.NoError(t, join(0)) // loads the scripts
	require.NoError(t, leave(0))
	single("join", join)
	got := c.Measure("join of a member", harness.CostConns, c.Each(join))
	require.Zero(t, got.All(), "nothing to write")
	single("state", state)
	single("clear state", clearState)
	single("leave", leave)
	many("join", join)
	many("state", state)
	many("clear state", clearState)
	many("leave", leave)
	rooms := make([]string, 200)
	for i := range rooms {
		rooms[i] = fmt.Sprint("doc-", i)
	}
	got = c.Measure("counts of 200 rooms", 1, func() {
		_, err := p.Counts(ctx, rooms...)
		require.NoError(t, err)
	})
	delete(got, "hello") // sent on a new connection
	require.Equal(t, harness.Tally{"hlen": 200}, got, "TestCounts checks that it is one round trip")
	got = c.Measure("disconnect, in a room, all at once", harness.CostConns, func() {
		c.Together(join)()
		c.Together(func(i int) error { return p.Disconnect(ctx, harness.CostConn(i)) })()
	})
	require.LessOrEqual(t, got.Scripts(), 3*harness.CostConns)
}

// TestCostOfWatching checks that a subscription to a watched room makes no call, that
// an event is one message, and that servers without watchers do not receive it.
func TestCostOfWatching(t *testing.T) {
	t.Parallel()
	ctx, w := t.Context(), harness.RealWorld(t)
	c := harness.NewCosts(t, w)
	defer c.Print()
	p, idle := c.Manager(time.Hour, 0), c.Manager(time.Hour, 0)
	require.NoError(t, idle.Ready(ctx))
	c.Connected(p)
	c.Together(func(i int) error { return p.Join(ctx, "lobby", harness.CostConn(i)) })()

	const subscribers = 200
	var watching, received sync.WaitGroup
	first := make(chan struct{}, subscribers)
	life, end := context.WithCancel(ctx)
	defer watching.Wait()
	defer end()
	received.Add(subscribers + 1)
	subscribe := func() {
		watching.Go(func() {
			for e, err := range p.Subscribe(life, "lobby", mesh.SubscribeOptions{}) {
				switch {
				case err != nil:
					return
				case e.Type == mesh.EventSnapshot:
					first <- struct{}{}
				case e.Type == mesh.EventState:
					received.Done()
				}
			}
		})
		<-first
	}
	got := c.Measure("subscribe, first on its server", 1, subscribe)
	require.LessOrEqual(t, got.Scripts(), 5)
	got = c.Measure("subscribe to a watched room", subscribers, func() {
		for range subscribers {
			subscribe()
		}
	})
	delete(got, "publish") // an echo per second while a room is watched
	require.Zero(t, got.All(), "%v", got)
	got = c.Measure("state for 201 subscribers", 1, func() {
		require.NoError(t, p.PublishState(ctx, "lobby", harness.CostConn(0), map[string]int{"n": 1}, mesh.StateOptions{}))
		received.Wait()
	})
	require.Equal(t, 1, got.Scripts(), "%v", got)
	require.LessOrEqual(t, got["publish"], 2, "the event, perhaps an echo")
	channels, err := c.Admin.PubSubNumSub(ctx, testhook.PartsOf(p).Keys.EventsPrefix()+"lobby").Result()
	require.NoError(t, err)
	for _, n := range channels {
		require.EqualValues(t, 1, n, "only the server with subscribers listens")
	}
}

// TestCostOfHeartbeats checks that a heartbeat is one script call, and one check with
// few commands per 512 rooms and connections. Entries with a TTL are refreshed in
// batches, other entries not at all.
func TestCostOfHeartbeats(t *testing.T) {
	t.Parallel()
	ctx, w := t.Context(), harness.RealWorld(t)
	c := harness.NewCosts(t, w)
	defer c.Print()

	const lease = 1500 * time.Millisecond
	heartbeats := 4
	p := c.Manager(lease, 0)
	c.Connected(p)
	c.Together(func(i int) error { return p.Join(ctx, costRoom(i), harness.CostConn(i)) })()
	w.Sleep(lease) // includes the first reconcile after the start
	began := time.Now()
	got := c.Measure("heartbeat, 1,000 connections in rooms", heartbeats, func() { w.Sleep(time.Duration(heartbeats) * lease / 3) })
	heartbeats = int(time.Since(began)/(lease/3)) + 1 // an upper limit for the time that has passed
	require.NotZero(t, got.Scripts())
	require.LessOrEqual(t, got.Scripts(), heartbeats+1, "one call per interval: %v", got)
	const checks = (harness.CostConns+50)/store.CheckSize + 1
	require.LessOrEqual(t, got["exists"], (heartbeats+1)*(checks+3), "one per check, one more for rooms, the fence and the format: %v", got)
	require.LessOrEqual(t, got["mget"], (heartbeats+1)*checks, "%v", got)
	require.LessOrEqual(t, got.All(), 16*(heartbeats+1), "%v", got)
	c.End(p)

	const ttl, rounds = 2 * time.Second, 3 // each takes a third of TTL + 1 s
	p = c.Manager(time.Hour, ttl)
	c.Connected(p)
	c.Together(func(i int) error { return p.Join(ctx, costRoom(i), harness.CostConn(i)) })()
	got = c.Measure("refresh of an entry with a TTL", rounds*harness.CostConns, func() {
		for began := time.Now(); time.Since(began) < rounds*(ttl+time.Second)/3; w.Sleep(250 * time.Millisecond) {
			for i := range harness.CostConns {
				require.NoError(t, p.Touch(harness.CostConn(i)))
			}
		}
	})
	require.GreaterOrEqual(t, got["pexpire"], (rounds-1)*harness.CostConns, "entries are not refreshed")
	// A call refreshes up to 128 entries. Entries that joined in different quarters of
	// a round are refreshed in different calls, and a call is made as soon as there is
	// something to write.
	require.LessOrEqual(t, got.Scripts(), (rounds+1)*2*(harness.CostConns/128+1), "%v", got)
	c.End(p)
}

// TestCostOfIdling checks that a server without connections sends at most two commands
// a second.
func TestCostOfIdling(t *testing.T) {
	t.Parallel()
	w := harness.RealWorld(t)
	s := w.Tracked()
	require.NoError(t, s.Ready(t.Context()))
	conn, err := net.Dial("tcp", w.Real.Addr())
	require.NoError(t, err)
	defer conn.Close()
	_, err = conn.Write([]byte("MONITOR\r\n"))
	require.NoError(t, err)
	const window = 4 * time.Second
	require.NoError(t, conn.SetReadDeadline(time.Now().Add(window)))
	var sent []string
	began := time.Now()
	for lines := bufio.NewScanner(conn); lines.Scan(); {
		if line := lines.Text(); line != "+OK" && !strings.Contains(line, " lua]") {
			sent = append(sent, line)
		}
	}
	t.Logf("idle: %d commands in %v", len(sent), window)
	require.NotEmpty(t, sent, "the server renews its lease")
	// On a slow machine, overdue commands may be sent in the window, too.
	require.LessOrEqual(t, len(sent), 2*int(time.Since(began)/time.Second)+6, "%s", strings.Join(sent, "\n"))
}
