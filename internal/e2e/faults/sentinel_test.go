package faults

import (
	"encoding/json"
	"flag"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/internal/e2e/harness"
	"github.com/meshpresence/mesh/internal/redistest"
)

var sentinelRuns = flag.Int("sentinel.runs", 1, "failovers of each kind in TestSentinel")

const (
	// Sentinels need up to four seconds to announce a new master to all clients, one
	// after the other. A server that still uses the old master sees the leases of the
	// other servers run out after two thirds of LeaseTTL.
	sentinelLease = 6 * time.Second
	sentinelTTL   = 3 * time.Second
	// sentinelBound is the time limit for the recovery after the switch. The switch is
	// the moment at which the last sentinel publishes +switch-master. Until then the
	// Redis client uses the old master, and writes to it are lost.
	sentinelBound = 5 * time.Second
	// afterSwitch is the time for which connections still join and leave after the
	// switch.
	afterSwitch = time.Second
)

// TestSentinel runs three servers through failovers while connections join and leave.
// The master is replaced as planned and stays up, or it is killed.
func TestSentinel(t *testing.T) {
	t.Parallel()
	harness.Long(t, "takes real seconds")
	for name, change := range map[string]func(s *redistest.Sentinel) redistest.Switch{
		"planned": (*redistest.Sentinel).Failover,
		"killed":  (*redistest.Sentinel).KillMaster,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := redistest.StartSentinel(t)
			var all switches
			for i := range *sentinelRuns {
				t.Run(fmt.Sprint(i), func(t *testing.T) {
					s := s.For(t)
					newSwitchDrill(t, s).run(change, i == 0, &all)
					switch {
					case i == *sentinelRuns-1: // the Sentinel is not used again
					case name == "killed":
						s.Revive()
					default:
						s.AwaitWhole()
					}
				})
				if t.Failed() {
					return
				}
			}
			t.Log(all.String())
		})
	}
}

// switches contains the results of several switches.
type switches struct {
	redis, streams []time.Duration // times until Redis, and every subscriber, had recovered
	events, visits int
}

func (r *switches) String() string {
	worst := func(list []time.Duration) string {
		slices.Sort(list)
		return fmt.Sprintf("median %v, worst %v", ms(list[len(list)/2]), ms(list[len(list)-1]))
	}
	return fmt.Sprintf("%d switches, %d events, %d visits; Redis recovered after the switch: %s; subscribers: %s",
		len(r.redis), r.events, r.visits, worst(r.redis), worst(r.streams))
}

func ms(d time.Duration) time.Duration { return d.Round(time.Millisecond) }

// switchDrill is a drill with one switch.
type switchDrill struct {
	*drill
	s       *redistest.Sentinel
	stay    []*harness.Peer
	markers []*marker

	visited sync.Mutex // guards visits
	visits  []visit
}

// marker is a connection that stays, and changes its state and metadata once, around
// the time of the switch.
type marker struct {
	*harness.Peer
	on   *harness.Server
	room string
	meta string // "" if not set, or if the call failed and the outcome is unknown
}

// visit is a connection that joined one room, left it, and closed.
type visit struct {
	room, id    string
	came, asked time.Time // times of the join and the leave
	gone        time.Time // time of the last answer
}

func newSwitchDrill(t *testing.T, s *redistest.Sentinel) *switchDrill {
	w := &harness.World{T: t, Watched: s}
	rooms := []string{"a", "b", "a, ttl", "b, ttl"}
	d := &switchDrill{s: s, drill: newDrill(w, 3, rooms, harness.LeaseOf(sentinelLease))}
	for _, srv := range d.servers {
		for _, room := range rooms[2:] {
			require.NoError(t, srv.TrackPresence(mesh.Exact(room), mesh.PresenceOptions{TTL: sentinelTTL}))
		}
	}
	d.stay = d.members(3)
	for i := range 60 {
		m := &marker{on: d.servers[i%3], room: rooms[i%4]}
		m.Peer = m.on.Dial()
		d.note(m.room, m.ID, m.In(m.room))
		d.markers = append(d.markers, m)
		d.stay = append(d.stay, m.Peer)
	}
	return d
}

// run tests one switch. thorough tests expired events, too.
func (d *switchDrill) run(change func(*redistest.Sentinel) redistest.Switch, thorough bool, all *switches) {
	d.settles(time.Now(), 10*time.Second)
	d.awaitContact()
	d.churn(4)
	d.runClients(4, d.visitor)
	d.Sleep(time.Second) // for load, not to synchronise
	stopMarking := d.mark()
	d.Sleep(300 * time.Millisecond)
	sw := change(d.s)
	stopMarking()
	behind := d.behind()
	d.Sleep(afterSwitch)
	d.stopChurn()
	redis, streams := d.recovers(sw.Announced)
	d.expires(sw)
	d.T.Logf("new master took writes after %v, announced after %v, %d entries missing then; recovered after that: Redis %v, subscribers %v, expired events %v",
		ms(sw.Writable.Sub(sw.Began)), ms(sw.Announced.Sub(sw.Began)), behind, ms(redis), ms(streams), ms(time.Since(sw.Announced)))
	all.redis, all.streams = append(all.redis, redis), append(all.streams, streams)
	d.aftermath(sw, thorough)
	all.visits += len(d.visits)
	for _, s := range d.streams {
		all.events += s.count()
	}
}

// aftermath runs more clients for a while, waits for unexpected updates, and checks all
// updates of the test.
func (d *switchDrill) aftermath(sw redistest.Switch, thorough bool) {
	calm := time.Now()
	d.churn(4)
	d.runClients(4, d.visitor)
	d.Sleep(500 * time.Millisecond)
	d.stopChurn()
	d.settles(time.Now(), 5*time.Second)
	d.awaitContact()
	if thorough {
		d.checkTTL()
	}
	d.Sleep(sentinelLease) // time for unexpected updates
	require.Empty(d.T, d.diff())
	d.stayed(d.stay)
	d.checkVisits(sw, calm)
	for _, s := range d.servers {
		require.Zero(d.T, s.Stats().Reregistered, "a living server was declared dead")
	}
	d.finish()
}

// visitor makes one connection after the other join, publish a state or not, and leave
// or just close.
func (d *switchDrill) visitor(s *harness.Server, room string) {
	for n := 0; ; n++ {
		select {
		case <-d.quiet:
			return
		default:
		}
		p := d.tryDial(s)
		if p == nil {
			return
		}
		v := visit{room: room, id: p.ID, came: time.Now()}
		p.In(room)
		switch n % 3 {
		case 0:
			p.States(room, n)
		case 1:
			_, _ = p.TryCall("mesh/publish-presence-state", map[string]any{
				"roomName": room, "state": map[string]any{"n": n}, "expireAfter": 100,
			})
		}
		time.Sleep(rand.N(250 * time.Millisecond))
		v.asked = time.Now()
		if n%2 == 0 {
			p.Out(room)
		}
		p.Close()
		v.gone = time.Now()
		d.visited.Lock()
		d.visits = append(d.visits, v)
		d.visited.Unlock()
	}
}

// mark changes one marker after the other until the returned function is called. So
// some changes are lost in the switch, whenever it happens.
func (d *switchDrill) mark() (stop func()) {
	quit := make(chan struct{})
	var work sync.WaitGroup
	work.Go(func() {
		pace := time.NewTicker(50 * time.Millisecond)
		defer pace.Stop()
		for i, m := range d.markers {
			select {
			case <-quit:
				return
			case <-pace.C:
			}
			work.Go(func() {
				meta := fmt.Sprintf(`{"n":%d}`, i)
				if m.on.Connections().SetMetadata(d.T.Context(), m.ID, json.RawMessage(meta), mesh.MetadataOptions{}) == nil {
					m.meta = meta
				}
				d.note(m.room, m.ID, m.States(m.room, i))
			})
		}
	})
	return func() {
		close(quit)
		work.Wait()
	}
}
