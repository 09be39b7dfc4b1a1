package harness

import (
	"context"
	"fmt"
	"regexp"
	"strings"
	"sync"
	"testing"
	"text/tabwriter"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
)

// costs measures the Redis commands of operations, and prints them as a table.
type costs struct {
	t     *testing.T
	w     *World
	Admin redis.UniversalClient
	out   strings.Builder
	table *tabwriter.Writer
}

// Tally is the number of executions by command, including commands in scripts.
type Tally map[string]int

// Scripts returns the number of script calls.
func (c Tally) Scripts() int { return c["evalsha"] + c["eval"] }

// All returns the number of commands, except for those of the measurement.
func (c Tally) All() int {
	n := 0
	for _, calls := range c {
		n += calls
	}
	return n
}

func NewCosts(t *testing.T, w *World) *costs {
	c := &costs{t: t, w: w, Admin: w.Client()}
	c.table = tabwriter.NewWriter(&c.out, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(c.table, "operation\toperations\tscript calls\tscript calls each\tcommands each\t")
	return c
}

// Measure runs do, which makes the given number of operations, and adds a row to the
// table.
func (c *costs) Measure(name string, operations int, do func()) Tally {
	c.t.Helper()
	require.NoError(c.t, c.Admin.ConfigResetStat(c.t.Context()).Err())
	do()
	info, err := c.Admin.Info(c.t.Context(), "commandstats").Result()
	require.NoError(c.t, err)
	got := Tally{}
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
	fmt.Fprintf(c.table, "%s\t%d\t%d\t%.3f\t%.2f\t\n", name, operations, got.Scripts(), each(got.Scripts()), each(got.All()))
	return got
}

func (c *costs) Print() {
	require.NoError(c.t, c.table.Flush())
	c.t.Log("\n" + c.out.String())
}

// Manager starts a PresenceManager that tracks every room. With a long lease
// it does nothing on its own for the length of a test.
func (c *costs) Manager(lease, ttl time.Duration) *mesh.PresenceManager {
	c.t.Helper()
	return c.ManagerOf(lease, mesh.PresenceOptions{TTL: ttl}, nil)
}

// ManagerOf is Manager with a rule and with Options.UserID.
func (c *costs) ManagerOf(lease time.Duration, rule mesh.PresenceOptions, userID func(mesh.Member) string) *mesh.PresenceManager {
	c.t.Helper()
	off := false
	p, err := mesh.NewPresenceManager(mesh.Options{Redis: c.w.Client(), LeaseTTL: lease, EnablePresenceExpirationEvents: &off, UserID: userID})
	require.NoError(c.t, err)
	require.NoError(c.t, p.TrackPresence(mesh.Regexp(regexp.MustCompile(".*")), rule))
	require.NoError(c.t, p.Start(c.t.Context()))
	c.t.Cleanup(func() { c.End(p) })
	return p
}

func (c *costs) End(p *mesh.PresenceManager) {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	require.NoError(c.t, p.Shutdown(ctx))
}

const CostConns = 1000

func CostConn(i int) string { return fmt.Sprintf("conn%d", i) }

// Each calls do for every connection, one after the other.
func (c *costs) Each(do func(i int) error) func() {
	return func() {
		for i := range CostConns {
			require.NoError(c.t, do(i))
		}
	}
}

// Together calls do for all connections at once.
func (c *costs) Together(do func(i int) error) func() {
	return func() {
		var wg sync.WaitGroup
		errs := make([]error, CostConns)
		for i := range CostConns {
			wg.Go(func() { errs[i] = do(i) })
		}
		wg.Wait()
		for _, err := range errs {
			require.NoError(c.t, err)
		}
	}
}

// Connected registers all connections and waits until Redis has them.
func (c *costs) Connected(p *mesh.PresenceManager) {
	c.t.Helper()
	c.Together(func(i int) error { return p.Connect(c.t.Context(), CostConn(i), map[string]int{"n": i}) })()
	c.w.Eventually(5*time.Second, func() bool { return p.Stats().Unwritten == 0 }, "the connections are registered")
}
