package mesh

import "time"

// Stats are what a server or manager holds now, and what has happened since
// it was made. They are taken one after the other, not at one single moment.
// Counts of this server alone: add those of all servers up for the whole.
type Stats struct {
	// Of this server.
	Connections   int // open, sockets and those of an app's own transport
	Entries       int // presences of those in rooms
	Rooms         int // rooms that those are in
	Unwritten     int // entries and connections whose last change Redis has not confirmed yet
	Watched       int // rooms that somebody here watches
	Subscriptions int
	Stale         int // watched rooms that may have missed something

	// What came and went.
	Batches     uint64 // script calls for changes of this server's entries
	Changes     uint64 // changes in them
	Retries     uint64 // batches whose outcome was unknown
	Rejoined    uint64 // entries written anew: Redis had lost them, or this server was declared dead
	LeftAsked   uint64 // leaves because the connection, or the app, asked
	LeftClosed  uint64 // … because the connection closed
	LeftSilent  uint64 // … because it was silent for its TTL
	LeftReaped  uint64 // entries of other servers that this one ended
	Updates     uint64 // events told to subscribers, each to all of its room
	Repairs     uint64 // those of them that made good for missed ones
	Snapshots   uint64 // rooms read from Redis
	Hints       uint64 // expired events that this server was first to act on
	HintsMissed uint64 // expired events dropped

	// Of sockets.
	Closed    map[string]int64 // connections that ended, by cause
	Coalesced int64            // states left out for a slow socket because a later one waited too
	Dropped   int64            // frames thrown away with the connection they waited for
	Busy      int64            // commands answered with EBUSY
	Limited   int64            // commands answered with ELIMIT

	// Of the app's callbacks.
	CallbackErrors   uint64
	CallbackPanics   uint64
	CallbackTimeouts uint64
	GuardsRefused    uint64 // questions that a guard answered with no, or an error
	GuardsHanging    int64  // guards that go on after their time limit, now

	// Of the lease and Redis.
	Incarnation   string        // of this server, as Redis knows it
	LeaseAge      time.Duration // since Redis last confirmed the lease; -1: never
	Reborn        uint64        // times that this server had been declared dead, or forgotten
	Buried        uint64        // servers that this one declared dead
	ClockSteps    uint64        // disagreements between Redis's clock and this machine's
	RedisCalls    uint64
	RedisFailures uint64
	// ExpiredEvents says that Redis's expired events were seen to arrive.
	ExpiredEvents bool
}

// Stats returns the server's counts. It looks at every connection's entries
// and every watched room: once in some seconds is fine.
func (s *Server) Stats() Stats {
	st := s.n.stats()
	c := s.sockets.Counts()
	st.Closed = make(map[string]int64, len(c.Closes))
	for cause, n := range c.Closes {
		st.Closed[cause.String()] = n
	}
	st.Coalesced, st.Dropped, st.Busy, st.Limited = c.Coalesced, c.Dropped, c.Busy, c.Limited
	return st
}

// Stats returns the manager's counts; those of sockets are zero.
func (p *PresenceManager) Stats() Stats { return p.n.stats() }

func (n *node) stats() Stats {
	o, h, l := n.owner.Stats(), n.hub.Stats(), n.lease.Stats()
	st := Stats{
		Connections: o.Connections, Entries: o.Entries, Rooms: o.Rooms, Unwritten: o.Unwritten,
		Watched: h.Rooms, Subscriptions: h.Sinks, Stale: h.Stale,
		Batches: o.Batches, Changes: o.Ops, Retries: o.Retries, Rejoined: o.Rejoined,
		LeftAsked: o.LeftAsked, LeftClosed: o.LeftClosed, LeftSilent: o.LeftSilent,
		LeftReaped: n.reaped.Load(), Updates: h.Updates, Repairs: h.Repairs,
		LeaseAge: l.LastRenewal, Reborn: l.Reborn, Buried: l.Buried, ClockSteps: l.ClockSteps,
	}
	for _, count := range h.Snapshots {
		st.Snapshots += count
	}
	for _, c := range n.calls.stats() {
		st.CallbackErrors += c.Errors
		st.CallbackPanics += c.Panics
		st.CallbackTimeouts += c.Timeouts
	}
	v := n.verdicts.stats()
	st.GuardsRefused, st.GuardsHanging = v.Refused+v.Busy, v.Strays
	if n.running() == stateRunning {
		st.Incarnation = n.lease.Incarnation()
	}
	st.RedisCalls, st.RedisFailures = n.store.Calls()
	if n.expiry != nil {
		st.Hints, st.HintsMissed = n.hints.acted.Load(), n.hints.dropped.Load()
		st.ExpiredEvents = n.expiry.Working()
	}
	return st
}
