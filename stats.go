package mesh

import (
	"time"

	"github.com/meshpresence/mesh/internal/hub"
	"github.com/meshpresence/mesh/internal/socket"
	"github.com/meshpresence/mesh/internal/store"
	"github.com/meshpresence/mesh/internal/wire"
)

// Stats are what a server or manager holds now, and what has happened since
// it was made. They are taken one after the other, not at one single moment.
// Counts of this server alone: add those of all servers up for the whole.
// Counts never go down. Of a map every key that its comment names is there from
// the start, and no other; the maps are the caller's.
type Stats struct {
	// Held now, by this server.
	Connections   int   // open, sockets and those of an app's own transport
	Entries       int   // members of rooms: one for each room that one of those is in
	Rooms         int   // rooms that those are in
	Unwritten     int   // entries and connections whose last change Redis has not confirmed yet
	Watched       int   // rooms that somebody here watches, or did a few seconds ago, or that several just joined
	Subscriptions int   // watchers of those: one for each socket or iterator and room
	Stale         int   // watched rooms that may have missed something
	QueuedBytes   int64 // bytes that wait to be written, of all sockets together
	LongestQueue  int64 // bytes that wait on the socket where most do. Of one large frame half a queue counts at most

	// Events are changes of watched rooms that came from Redis and were applied,
	// each once, whoever is told: "join", "rejoin" (a connection that was in
	// already: its server wrote it anew), "leave", "state", "metadata".
	Events map[string]uint64
	// EventsIgnored are those that were not: "duplicate" (known already),
	// "stray" (nobody watches the room any more), "unreadable" (the room is read
	// again then).
	EventsIgnored map[string]uint64
	// EventsEarly are those that overtook another one and had to wait for it.
	EventsEarly uint64
	// Updates are what subscribers were told, each counted once, however many
	// there are: "join", "leave", "state". A room without subscribers counts none.
	Updates map[string]uint64
	// Deliveries are the same, counted once for each subscriber.
	Deliveries uint64
	// RepairUpdates are those of Updates that made good for missed ones.
	RepairUpdates uint64

	// FirstReads are rooms read from Redis because somebody began to watch them, or
	// because several connections joined them within a few seconds: the answers
	// to further joins come from memory.
	FirstReads uint64
	// Repairs are rooms read again, by what was amiss: "gap" (an event did not
	// come), "fork" (Redis went on from an older copy), "epoch" (Redis lost the
	// room), "resubscribed" (it stood elsewhere when the subscription was back,
	// after it was lost, or Redis away, or this server found deaf), "compare" (it
	// stood elsewhere at the regular comparison, or an event of this server's
	// own did not come), "overflow" (too many events waited for a "verify"),
	// "unreadable" (an event was), "inconsistent" (an event was about somebody who
	// is not in), "verify" (nothing, perhaps: before members that Redis lost are
	// told to have left). A lost connection after which nothing had been missed is
	// none.
	Repairs map[string]uint64
	// Overflows is how often too many events waited for a room that was being
	// read, for whatever cause, so that it had to be read once more.
	Overflows uint64
	// ReadsFailed are reads that Redis did not answer, and ReadsDiscarded those
	// that were of no use because too much happened meanwhile. Both are repeated.
	ReadsFailed, ReadsDiscarded uint64
	// ListenerLost is how often a connection that carries events ended.
	ListenerLost uint64
	// Deaf is how often this server did not hear its own heartbeat in time, so
	// that the connection that carries events was made anew.
	Deaf uint64

	// Leaves are entries that this server ended, by cause. Of its own: "left"
	// (the connection, or the app, asked), "closed" (the connection closed, or
	// the server shut down), "silent" (no frame for the TTL). Of others:
	// "server_lost" (their server died), "expired" (the key of an entry with a
	// TTL ran out, before the owner or its lease did). Each departure is counted
	// by one server, and by none where Redis's answer was lost or Redis had
	// forgotten the entry.
	Leaves map[string]uint64
	// StatesExpired are states of other servers' entries that this one ended
	// because their key had run out.
	StatesExpired uint64
	// ReapLagSilent is how late silent entries left: from when the connection had
	// been silent for its TTL until Redis had the leave. Promised is a second.
	// Entries that the app has cleaned up are not in it.
	ReapLagSilent Histogram
	// ReapLagLost is how late the entries of dead servers left: from the end of
	// the lease until Redis had the leave, of each entry that this server ended
	// after declaring its server dead itself. Promised is a second, and more
	// where Redis was away meanwhile.
	ReapLagLost Histogram
	Hints       uint64 // expired events that this server was first to act on
	HintsMissed uint64 // expired events dropped

	// Of the writing of this server's entries.
	Batches  uint64 // script calls
	Changes  uint64 // changes in them
	Retries  uint64 // batches whose outcome was unknown
	Rejoined uint64 // entries written anew: Redis had lost them, or this server was declared dead
	// StatesSuperseded are states that were not told because a newer one of the
	// same member came within StateInterval of [PresenceOptions].
	StatesSuperseded uint64

	// Closed are sockets that ended, by cause: "peer" (it sent a close frame),
	// "broken" (the network failed, or the peer went without a word), "closed"
	// (the app closed it, or Shutdown), "shutdown" (the context of ServeConn or
	// of the request ended), "silent" (no pong), "slow" (too much waited: a slow
	// consumer), "stuck" (a write took longer than WriteTimeout), "flood",
	// "too_large", "protocol".
	Closed    map[string]uint64
	Coalesced uint64 // states left out for a slow socket because a later one waited too
	Dropped   uint64 // frames thrown away with the connection they waited for
	Busy      uint64 // commands answered with EBUSY
	Limited   uint64 // commands answered with ELIMIT
	// SlowSubscriptions are subscriptions that ended because too much waited for
	// an iterator that lagged behind, or for a guard that was being asked.
	SlowSubscriptions uint64

	// Of the app's callbacks. Panics include calls of runtime.Goexit. Panics and
	// timeouts include those of Options.Logger and of methods that encode to JSON,
	// panics also those of the network connection under ServeConn and of the
	// http.ResponseWriter.
	CallbackErrors   uint64
	CallbackPanics   uint64
	CallbackTimeouts uint64
	GuardsRefused    uint64 // questions that a guard answered with no, or an error
	GuardsHanging    int64  // guards that go on after their time limit, now

	// Of Redis.
	RedisCalls uint64 // scripts, commands and pipelines, each one round trip
	// RedisFailures are calls that were not answered in time or refused, those
	// included that could not even be made because too many waited. Not among them
	// are calls that nobody waited for any more, because a client had gone.
	RedisFailures uint64
	// RedisLatency is how long calls took, or were waited for.
	RedisLatency Histogram
	// EventLag is how long this server's heartbeats took to Redis and, as a
	// message, back: an event that another server writes takes about as long to
	// those who watch. There is one heartbeat a second where rooms are watched
	// here, otherwise one for each renewal of the lease.
	EventLag Histogram
	// ExpiredEvents says that Redis's expired events were seen to arrive; false
	// where Options.EnablePresenceExpirationEvents is.
	ExpiredEvents bool

	// Of the lease.
	Incarnation   string        // of this server, as Redis knows it; empty before Start
	LeaseAge      time.Duration // since Redis last confirmed the lease; -1: never
	LeaseFailures uint64        // renewals that Redis did not answer
	MayJudge      bool          // this server has been in touch with Redis for long enough to declare others dead
	Reborn        uint64        // times that this server had been declared dead, or forgotten
	Buried        uint64        // servers that this one declared dead
	ClockSteps    uint64        // disagreements between Redis's clock and this machine's
}

// Stats returns the server's counts. It looks at every socket and every watched
// room, each for a moment, asks Redis nothing and holds up nobody: with 100,000
// sockets and 10,000 watched rooms it takes some twenty milliseconds of one
// core. Every few seconds is fine.
func (s *Server) Stats() Stats {
	st := s.n.stats()
	st.addSockets(s.sockets.Counts())
	return st
}

// Stats returns the manager's counts; those of sockets are zero.
func (p *PresenceManager) Stats() Stats {
	st := p.n.stats()
	var none socket.Stats
	st.addSockets(none.Counts())
	return st
}

func (st *Stats) addSockets(c socket.Counts) {
	st.Closed, st.Coalesced, st.Dropped, st.Busy, st.Limited = c.Closes, c.Coalesced, c.Dropped, c.Busy, c.Limited
	st.QueuedBytes, st.LongestQueue = c.Queued, c.Longest
	st.CallbackPanics += uint64(c.Panics)
}

func (n *node) stats() Stats {
	st := Stats{SlowSubscriptions: n.slow.Load()}
	st.addOwn(n)
	st.addHub(n.hub.Stats())
	st.addCallbacks(n)
	if n.running() == stateRunning {
		st.Incarnation = n.lease.Incarnation()
	}
	if n.expiry != nil {
		st.Hints, st.HintsMissed = n.hints.acted.Load(), n.hints.dropped.Load()
		st.ExpiredEvents = n.expiry.Working()
	}
	return st
}

// addOwn adds what the owner, the lease and the store have counted.
func (st *Stats) addOwn(n *node) {
	o, l, r := n.owner.Stats(), n.lease.Stats(), n.store.Stats()
	st.Connections, st.Entries, st.Rooms, st.Unwritten = o.Connections, o.Entries, o.Rooms, o.Unwritten
	st.Batches, st.Changes, st.Retries, st.Rejoined = o.Batches, o.Ops, o.Retries, o.Rejoined
	st.Leaves = map[string]uint64{
		"left": o.LeftAsked, "closed": o.LeftClosed, "silent": o.LeftSilent,
		"server_lost": r.Reaped.Dead, "expired": r.Reaped.Expired,
	}
	st.StatesExpired, st.StatesSuperseded = r.Reaped.States, o.Superseded
	st.ReapLagSilent, st.ReapLagLost = histogramOf(o.Late), histogramOf(l.Late)
	st.RedisCalls, st.RedisFailures, st.RedisLatency = r.Calls, r.Failures, histogramOf(r.Took)
	st.EventLag, st.Deaf = histogramOf(l.Trips), l.Deaf
	st.LeaseAge, st.LeaseFailures, st.MayJudge = l.LastRenewal, l.Failures, l.Patient
	st.Reborn, st.Buried, st.ClockSteps = l.Reborn, l.Buried, l.ClockSteps
}

func (st *Stats) addHub(h hub.Stats) {
	st.Watched, st.Subscriptions, st.Stale = h.Rooms, h.Sinks, h.Stale
	st.Events = map[string]uint64{
		"join": h.Events[store.Joined], "rejoin": h.Events[store.Replaced], "leave": h.Events[store.Left],
		"state": h.Events[store.State], "metadata": h.Events[store.Meta],
	}
	st.EventsIgnored = map[string]uint64{"duplicate": h.Duplicates, "stray": h.Strays, "unreadable": h.Garbled}
	st.EventsEarly = h.Held
	st.Updates = map[string]uint64{
		"join": h.Told[wire.UpdateJoin], "leave": h.Told[wire.UpdateLeave], "state": h.Told[wire.UpdateState],
	}
	st.Deliveries, st.RepairUpdates = h.Delivered, h.Repairs
	st.FirstReads = h.Snapshots[hub.CauseFirst]
	st.Repairs = make(map[string]uint64)
	for _, why := range hub.RepairCauses() {
		st.Repairs[why.String()] = h.Snapshots[why]
	}
	st.Overflows, st.ReadsFailed, st.ReadsDiscarded, st.ListenerLost = h.Overflows, h.Failures, h.Discarded, h.Lost
}

func (st *Stats) addCallbacks(n *node) {
	for _, c := range n.calls.stats() {
		st.CallbackErrors += c.Errors
		st.CallbackPanics += c.Panics
		st.CallbackTimeouts += c.Timeouts
	}
	l := n.logs.Counts()
	st.CallbackPanics += l.Panics
	st.CallbackTimeouts += l.Timeouts
	v := n.verdicts
	st.GuardsRefused, st.GuardsHanging = v.refused.Load()+v.busy.Load(), v.hanging.all.Load()
}
