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

var sentinelRuns = flag.Int("sentinel.runs", 1, "how many failovers of each kind TestSentinel makes")

const (
	// Sentinels need up to four seconds to tell all clients of a new master, one
	// after the other. A server that is still at the old one sees the leases of
	// those that have gone run out after two thirds of LeaseTTL.
	sentinelLease = 6 * time.Second
	sentinelTTL   = 3 * time.Second
	// sentinelBound is within what time of the switch everything is as it
	// should be. The switch is the moment at which the last of the sentinels
	// publishes +switch-master: until then the client library goes on where it
	// is, and what the old master takes is lost.
	sentinelBound = 5 * time.Second
	// afterSwitch is how long connections still come and go after it.
	afterSwitch = time.Second
)

// TestSentinel has three servers go through failovers while connections come
// and go. The master is replaced as planned, and lives on, or is killed.
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
					case i == *sentinelRuns-1: // nobody needs it any more
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

// switches is what several switches came to.
type switches struct {
	redis, told      []time.Duration // until Redis, and every subscriber, was right
	events, departed int
}

func (r *switches) String() string {
	worst := func(list []time.Duration) string {
		slices.Sort(list)
		return fmt.Sprintf("median %v, worst %v", ms(list[len(list)/2]), ms(list[len(list)-1]))
	}
	return fmt.Sprintf("%d switches, %d events, %d departures; after the switch Redis was right: %s; subscribers: %s",
		len(r.redis), r.events, r.departed, worst(r.redis), worst(r.told))
}

func ms(d time.Duration) time.Duration { return d.Round(time.Millisecond) }

// switchDrill is a drill that goes through one switch.
type switchDrill struct {
	*drill
	s       *redistest.Sentinel
	stay    []*harness.Peer
	markers []*marker

	visited sync.Mutex // guards visits
	visits  []visit
}

// marker is a connection that stays, and changes its state and metadata once,
// around the switch.
type marker struct {
	*harness.Peer
	on   *harness.Server
	room string
	meta string // "": none, or it is not known what came of it
}

// visit is the life of a connection that joined one room, left it, and is gone.
type visit struct {
	room, id    string
	came, asked time.Time // when it asked to join and to leave
	gone        time.Time // when it had an answer
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

// run goes through a switch. thorough has expired events tried out too.
func (d *switchDrill) run(change func(*redistest.Sentinel) redistest.Switch, thorough bool, all *switches) {
	d.settles(time.Now(), 10*time.Second)
	d.patient()
	d.churn(4)
	d.stir(4, d.visitor)
	d.Sleep(time.Second) // load, not synchronisation
	marked := d.mark()
	d.Sleep(300 * time.Millisecond)
	sw := change(d.s)
	marked()
	behind := d.behind()
	d.Sleep(afterSwitch)
	d.calm()
	redis, told := d.recovers(sw.Announced)
	d.expires(sw)
	d.T.Logf("master took writes after %v, announced after %v, %d entries behind then; right after that: Redis %v, subscribers %v; expired events %v",
		ms(sw.Writable.Sub(sw.Began)), ms(sw.Announced.Sub(sw.Began)), behind, ms(redis), ms(told), ms(time.Since(sw.Announced)))
	all.redis, all.told = append(all.redis, redis), append(all.told, told)
	d.aftermath(sw, thorough)
	all.departed += len(d.visits)
	for _, s := range d.streams {
		all.events += s.count()
	}
}

// aftermath goes on for a while, looks for what must not come, and checks what
// has been told through it all.
func (d *switchDrill) aftermath(sw redistest.Switch, thorough bool) {
	calm := time.Now()
	d.churn(4)
	d.stir(4, d.visitor)
	d.Sleep(500 * time.Millisecond)
	d.calm()
	d.settles(time.Now(), 5*time.Second)
	d.patient()
	if thorough {
		d.runsOut()
	}
	d.Sleep(sentinelLease) // for what must not come
	require.Empty(d.T, d.state())
	d.stayed(d.stay)
	d.departures(sw, calm)
	for _, s := range d.servers {
		require.Zero(d.T, s.Stats().Reregistered, "a living server was declared dead")
	}
	d.over()
}

// visitor lets one connection after the other join, perhaps have a state, and
// leave or just go.
func (d *switchDrill) visitor(s *harness.Server, room string) {
	for n := 0; ; n++ {
		select {
		case <-d.quiet:
			return
		default:
		}
		p := d.comer(s)
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

// mark has one marker after the other change, until the function that it
// returns is called: some of the changes are lost, whenever the switch comes.
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
