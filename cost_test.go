package mesh

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"strings"
	"sync"
	"testing"
	"text/tabwriter"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh/internal/store"
)

// costs counts what operations cost Redis, and is printed as a table.
type costs struct {
	t     *testing.T
	w     *world
	admin redis.UniversalClient
	out   strings.Builder
	table *tabwriter.Writer
}

// tally is how often each command ran, those in scripts included.
type tally map[string]int

// scripts is how many script calls there were.
func (c tally) scripts() int { return c["evalsha"] + c["eval"] }

// all is how many commands ran, but for those that measure.
func (c tally) all() int {
	n := 0
	for _, calls := range c {
		n += calls
	}
	return n
}

func newCosts(t *testing.T, w *world) *costs {
	c := &costs{t: t, w: w, admin: w.client()}
	c.table = tabwriter.NewWriter(&c.out, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(c.table, "operation\toperations\tscript calls\tscript calls each\tcommands each\t")
	return c
}

// measure runs do, which does so many operations, and adds a row.
func (c *costs) measure(name string, operations int, do func()) tally {
	c.t.Helper()
	require.NoError(c.t, c.admin.ConfigResetStat(c.t.Context()).Err())
	do()
	info, err := c.admin.Info(c.t.Context(), "commandstats").Result()
	require.NoError(c.t, err)
	got := tally{}
	for line := range strings.Lines(info) {
		rest, ok := strings.CutPrefix(line, "cmdstat_")
		if !ok {
			continue
		}
		command, stats, _ := strings.Cut(rest, ":calls=")
		var calls int
		_, err := fmt.Sscanf(stats, "%d,", &calls)
		require.NoError(c.t, err, line)
		if !strings.HasPrefix(command, "config") && command != "info" {
			got[command] += calls
		}
	}
	each := func(n int) float64 { return float64(n) / float64(operations) }
	fmt.Fprintf(c.table, "%s\t%d\t%d\t%.3f\t%.2f\t\n", name, operations, got.scripts(), each(got.scripts()), each(got.all()))
	return got
}

func (c *costs) print() {
	require.NoError(c.t, c.table.Flush())
	c.t.Log("\n" + c.out.String())
}

// manager starts a PresenceManager that tracks every room. With a long lease
// it does nothing on its own for the length of a test.
func (c *costs) manager(lease, ttl time.Duration) *PresenceManager {
	c.t.Helper()
	off := false
	p, err := NewPresenceManager(Options{Redis: c.w.client(), LeaseTTL: lease, EnablePresenceExpirationEvents: &off})
	require.NoError(c.t, err)
	require.NoError(c.t, p.TrackPresence(Regexp(mustCompile(".*")), PresenceOptions{TTL: ttl}))
	require.NoError(c.t, p.Start(c.t.Context()))
	c.t.Cleanup(func() { c.end(p) })
	return p
}

func (c *costs) end(p *PresenceManager) {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	require.NoError(c.t, p.Shutdown(ctx))
}

const costConns = 1000

func costConn(i int) string { return fmt.Sprintf("conn%d", i) }
func costRoom(i int) string { return fmt.Sprintf("room%d", i%50) }

// each does something for every connection, one after the other.
func (c *costs) each(do func(i int) error) func() {
	return func() {
		for i := range costConns {
			require.NoError(c.t, do(i))
		}
	}
}

// together does it for all of them at once.
func (c *costs) together(do func(i int) error) func() {
	return func() {
		var wg sync.WaitGroup
		errs := make([]error, costConns)
		for i := range costConns {
			wg.Go(func() { errs[i] = do(i) })
		}
		wg.Wait()
		for _, err := range errs {
			require.NoError(c.t, err)
		}
	}
}

// connected registers all connections and waits until Redis has them.
func (c *costs) connected(p *PresenceManager) {
	c.t.Helper()
	c.together(func(i int) error { return p.Connect(c.t.Context(), costConn(i), map[string]int{"n": i}) })()
	c.w.eventually(5*time.Second, func() bool { return p.Stats().Unwritten == 0 }, "connections registered")
}

// TestCostOfOperations: one script call at most, and one for many callers who
// wait together.
func TestCostOfOperations(t *testing.T) {
	t.Parallel()
	ctx, w := t.Context(), realWorld(t)
	c := newCosts(t, w)
	defer c.print()
	p := c.manager(time.Hour, 0)
	join := func(i int) error { return p.Join(ctx, costRoom(i), costConn(i)) }
	leave := func(i int) error { _, err := p.Leave(ctx, costRoom(i), costConn(i)); return err }
	state := func(i int) error {
		return p.PublishState(ctx, costRoom(i), costConn(i), map[string]int{"n": i}, StateOptions{})
	}
	clear := func(i int) error { return p.ClearState(ctx, costRoom(i), costConn(i)) }
	single := func(name string, do func(i int) error) {
		t.Helper()
		got := c.measure(name, costConns, c.each(do))
		require.LessOrEqual(t, got.scripts(), costConns, "%s: one script call each", name)
		require.Zero(t, got["multi"]+got["exec"])
	}
	many := func(name string, do func(i int) error) {
		t.Helper()
		got := c.measure(name+", all at once", costConns, c.together(do))
		require.LessOrEqual(t, got.scripts(), costConns/10, "%s: those who wait together go together", name)
	}

	c.connected(p)
	require.NoError(t, join(0)) // Redis learns the scripts
	require.NoError(t, leave(0))
	single("join", join)
	got := c.measure("join, in already", costConns, c.each(join))
	require.Zero(t, got.all(), "nothing to write")
	single("state", state)
	single("clear state", clear)
	single("leave", leave)
	many("join", join)
	many("state", state)
	many("clear state", clear)
	many("leave", leave)
	got = c.measure("disconnect, in a room, all at once", costConns, func() {
		c.together(join)()
		c.together(func(i int) error { return p.Disconnect(ctx, costConn(i)) })()
	})
	require.LessOrEqual(t, got.scripts(), 3*costConns/10)
}

// TestCostOfWatching: a room that is watched already costs nothing, an event
// is one message, and none goes where nobody watches.
func TestCostOfWatching(t *testing.T) {
	t.Parallel()
	ctx, w := t.Context(), realWorld(t)
	c := newCosts(t, w)
	defer c.print()
	p, idle := c.manager(time.Hour, 0), c.manager(time.Hour, 0)
	require.NoError(t, idle.Ready(ctx))
	c.connected(p)
	c.together(func(i int) error { return p.Join(ctx, "lobby", costConn(i)) })()

	const subscribers = 200
	var watching, told sync.WaitGroup
	first := make(chan struct{}, subscribers)
	life, end := context.WithCancel(ctx)
	defer watching.Wait()
	defer end()
	told.Add(subscribers + 1)
	subscribe := func() {
		watching.Go(func() {
			for e, err := range p.Subscribe(life, "lobby", SubscribeOptions{}) {
				switch {
				case err != nil:
					return
				case e.Type == EventSnapshot:
					first <- struct{}{}
				case e.Type == EventState:
					told.Done()
				}
			}
		})
		<-first
	}
	got := c.measure("subscribe, first on its server", 1, subscribe)
	require.LessOrEqual(t, got.scripts(), 5)
	got = c.measure("subscribe, room watched already", subscribers, func() {
		for range subscribers {
			subscribe()
		}
	})
	delete(got, "publish") // a beat a second, since a room is watched
	require.Zero(t, got.all(), "%v", got)
	got = c.measure("state told to 201 subscribers", 1, func() {
		require.NoError(t, p.PublishState(ctx, "lobby", costConn(0), map[string]int{"n": 1}, StateOptions{}))
		told.Wait()
	})
	require.Equal(t, 1, got.scripts(), "%v", got)
	require.LessOrEqual(t, got["publish"], 2, "the event, perhaps a beat")
	channels, err := c.admin.PubSubNumSub(ctx, p.n.keys.EventsPrefix()+"lobby").Result()
	require.NoError(t, err)
	for _, n := range channels {
		require.EqualValues(t, 1, n, "only the server with watchers listens")
	}
}

// TestCostOfLiving: a heartbeat is one script call whatever there is to keep, and
// one check of few commands per 512 rooms and connections. Entries with a TTL are
// refreshed many at a time, others not at all.
func TestCostOfLiving(t *testing.T) {
	t.Parallel()
	ctx, w := t.Context(), realWorld(t)
	c := newCosts(t, w)
	defer c.print()

	const lease, beats = 1500 * time.Millisecond, 4
	p := c.manager(lease, 0)
	c.connected(p)
	c.together(func(i int) error { return p.Join(ctx, costRoom(i), costConn(i)) })()
	w.sleep(lease) // after its start a server compares everything once
	got := c.measure("heartbeat, 1,000 connections in rooms", beats, func() { w.sleep(beats * lease / 3) })
	require.InDelta(t, beats, got.scripts(), 1, "one call per interval: %v", got)
	const checks = (costConns+50)/store.CheckSize + 1
	require.LessOrEqual(t, got["exists"], (beats+1)*(checks+3), "one per check, one more for rooms, the fence and the format: %v", got)
	require.LessOrEqual(t, got["mget"], (beats+1)*checks, "%v", got)
	require.LessOrEqual(t, got.all(), 16*(beats+1), "%v", got)
	c.end(p)

	const ttl, rounds = 2 * time.Second, 3 // a third of TTL + 1 s each
	p = c.manager(time.Hour, ttl)
	c.connected(p)
	c.together(func(i int) error { return p.Join(ctx, costRoom(i), costConn(i)) })()
	got = c.measure("refresh of an entry with a TTL", rounds*costConns, func() {
		for began := time.Now(); time.Since(began) < rounds*(ttl+time.Second)/3; w.sleep(250 * time.Millisecond) {
			for i := range costConns {
				require.NoError(t, p.Touch(costConn(i)))
			}
		}
	})
	require.GreaterOrEqual(t, got["pexpire"], (rounds-1)*costConns, "they are refreshed")
	// 128 to a call; entries that joined in different quarters of a round stay
	// apart, and a call goes as soon as there is something to write.
	require.LessOrEqual(t, got.scripts(), (rounds+1)*2*(costConns/128+1), "%v", got)
	c.end(p)
}

// TestCostOfIdling: a server without connections sends at most two commands a
// second.
func TestCostOfIdling(t *testing.T) {
	t.Parallel()
	w := realWorld(t)
	s := w.tracked()
	require.NoError(t, s.Ready(t.Context()))
	conn, err := net.Dial("tcp", w.real.Addr())
	require.NoError(t, err)
	defer conn.Close()
	_, err = conn.Write([]byte("MONITOR\r\n"))
	require.NoError(t, err)
	const window = 4 * time.Second
	require.NoError(t, conn.SetReadDeadline(time.Now().Add(window)))
	var sent []string
	for lines := bufio.NewScanner(conn); lines.Scan(); {
		if line := lines.Text(); line != "+OK" && !strings.Contains(line, " lua]") {
			sent = append(sent, line)
		}
	}
	t.Logf("idle: %d commands in %v", len(sent), window)
	require.NotEmpty(t, sent, "it renews its lease")
	require.LessOrEqual(t, len(sent), 2*int(window/time.Second), "%s", strings.Join(sent, "\n"))
}
