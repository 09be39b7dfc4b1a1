package mesh

import (
	"encoding/json"
	"fmt"
	"iter"
	"math"
	"slices"
	"time"

	"github.com/meshpresence/mesh/internal/histogram"
	"github.com/meshpresence/mesh/internal/hub"
	"github.com/meshpresence/mesh/internal/socket"
	"github.com/meshpresence/mesh/internal/store"
	"github.com/meshpresence/mesh/internal/wire"
)

// Stats are the current values and the counts of a server or manager since it was
// created. They are read one after the other, not at one moment. They are about this
// server alone: add those of all servers for the whole group. Counts never decrease. A
// map always has every key that its comment names, and no other. The caller owns the
// maps.
type Stats struct {
	// Current values of this server.
	Connections   int   // open sockets and connections of an app's own transport
	Entries       int   // one for each room of each of those connections
	Rooms         int   // rooms with such entries
	Unwritten     int   // entries and connections with changes that Redis has not confirmed yet
	Watched       int   // rooms with a subscriber here now or a few seconds ago, or that several connections just joined
	Subscriptions int   // one for each socket or iterator and room
	Occupancies   int   // subscriptions to the numbers of rooms, one for each socket or iterator and room
	Stale         int   // watched rooms that may lack changes
	Disconnected  int   // places that rooms keep for ended connections of this server, as far as it knows
	QueuedBytes   int64 // bytes that wait to be written to all sockets
	LongestQueue  int64 // the largest number for one socket. A large frame counts at most half of the limit. Answers may exceed Limits.QueueBytes

	// Events are changes of watched rooms that came from Redis and were applied, each
	// counted once: "join", "rejoin" (the server of a member wrote its entry again),
	// "leave", "state", "metadata", "disconnect" (the connection ended and its place is
	// kept).
	Events map[string]uint64
	// EventsIgnored are events that were not applied: "duplicate" (already known),
	// "stray" (the room is not watched any more), "unreadable" (the room is then read
	// again).
	EventsIgnored map[string]uint64
	// EventsEarly are events that arrived before an earlier one and had to wait for it.
	EventsEarly uint64
	// Updates are the updates delivered to subscribers, each counted once regardless of
	// their number: "join", "leave", "state", "metadata", "disconnect", "reconnect".
	// Updates of a room without subscribers do not count.
	Updates map[string]uint64
	// Deliveries are updates, counted once for each subscriber, also for clients whose
	// level leaves the update out.
	Deliveries uint64
	// RepairUpdates are the updates that made up for missed ones.
	RepairUpdates uint64

	// FirstReads are rooms read from Redis because their first subscriber came, or
	// because several connections joined them within a few seconds. Further joins are
	// then answered from memory.
	FirstReads uint64
	// Repairs are rooms that were read again, by cause:
	//
	//   - "gap": an event did not arrive
	//   - "fork": Redis continued from an older copy
	//   - "epoch": Redis lost the room
	//   - "resubscribed": the position differed after a lost subscription, an outage of
	//     Redis, or a listener reset
	//   - "compare": the position differed at the regular comparison, or an event of
	//     this server itself did not arrive
	//   - "overflow": too many events waited for a "verify"
	//   - "unreadable": an event could not be decoded
	//   - "inconsistent": an event was about a connection that is not a member
	//   - "verify": a check before unconfirmed members are reported as left, possibly
	//     without a difference
	//
	// A lost connection to Redis that caused no missed event does not count.
	Repairs map[string]uint64
	// Overflows are rooms that had to be read once more because too many events waited
	// during the read.
	Overflows uint64
	// ReadsFailed are reads that Redis did not answer. ReadsDiscarded are reads that
	// were useless because too much changed during them. Both are repeated.
	ReadsFailed, ReadsDiscarded uint64
	// ListenerDisconnects are ends of a connection to Redis that receives events.
	ListenerDisconnects uint64
	// ListenerResets are new listener connections because the server did not receive
	// its own echo in time.
	ListenerResets uint64

	// Leaves are entries that this server ended, by cause. For its own entries: "left"
	// (the connection asked for it, or the app removed or closed the connection),
	// "closed" (the connection ended in another way, or the server shut down), "silent"
	// (no frame for the TTL). For entries of other servers: "server_lost" (their server
	// died), "expired" (the key of an entry with a TTL expired, and neither its owner
	// ended it nor the lease ran out before). A connection whose place is kept has not
	// departed. Each departure is counted by one server, or by none if Redis's answer was
	// lost or Redis had lost the entry.
	Leaves map[string]uint64
	// Returned are joins that took the place that a room had kept for their user, and
	// Replaced those that took the place of a connection that looked alive.
	Returned, Replaced uint64
	// GraceOver are kept places of any server that this server ended when their Grace was
	// over.
	GraceOver uint64
	// Full are joins that were refused because of a cap of the room.
	Full uint64
	// InvalidUserIDs are metadata for which Options.UserID returned no valid id.
	InvalidUserIDs uint64
	// StatesExpired are states in other servers' entries that this server ended because
	// their key had expired.
	StatesExpired uint64
	// LeaveDelaySilent is the time from the moment at which a connection had been
	// silent for its TTL until Redis had the leave. The promise is one second. Entries
	// that the app has cleaned up are not included.
	LeaveDelaySilent Histogram
	// LeaveDelayServerLost is the time from the end of the lease of a dead server until
	// Redis had the leave, for each entry that this server ended after it declared its
	// server dead. The promise is one second, or more if Redis was unavailable in that
	// time.
	LeaveDelayServerLost Histogram
	ExpiredEventsUsed    uint64 // expired events on which this server acted first
	ExpiredEventsDropped uint64 // expired events dropped, because too many waited or this server could not judge them

	// Writing of this server's entries.
	Batches  uint64 // script calls
	Changes  uint64 // changes in these batches
	Retries  uint64 // batches whose outcome was unknown
	Rejoined uint64 // entries written again because Redis had lost them or this server was declared dead
	// StatesSuperseded are states that were not delivered because a newer one of the
	// same member came within the StateInterval of [PresenceOptions], or while they
	// waited as commands.
	StatesSuperseded uint64

	// Closed are sockets that ended, by cause: "peer" (it sent a close frame), "broken"
	// (the network failed, or the peer ended without a close frame), "closed" (the app
	// or Shutdown closed it), "shutdown" (the context of ServeConn or of the request
	// ended), "silent" (no pong), "slow" (too much waited: a slow consumer), "stuck" (a
	// write took longer than WriteTimeout), "flood", "too_large", "protocol".
	Closed map[string]uint64
	// RefusedUpgrades are requests to ServeHTTP that were not upgraded, by the HTTP
	// status of the answer: "400", "401", "403", "404", "405", "429", "500", "503",
	// "505", "499" (the client went away before the answer, which is not a failure of
	// the server), "4xx" and "5xx" (other statuses that Options.Authenticate chose).
	RefusedUpgrades map[string]uint64
	Coalesced       uint64 // states and numbers omitted for a slow socket because later ones waited, too
	Dropped         uint64 // frames dropped with the connection for which they waited
	// Limited are commands that were answered with ELIMIT because of the rate. Each was
	// the last one of a flood, for which its connection was closed.
	Limited uint64
	// Delayed are commands that had to wait because of Limits.CommandsPerSecond.
	Delayed uint64
	// ReadsPaused are pauses in reading from a socket because its waiting commands
	// reached Limits.QueueBytes.
	ReadsPaused uint64
	// CommandsFailed are failed commands to publish or clear a state and to
	// unsubscribe, by the code of the error: "EINVALID", "ENOTFOUND", "EREFUSED",
	// "EUNAVAILABLE" …, and "other" for codes of the app. Clients at level 1 only got
	// false. Each reason is logged at Debug.
	CommandsFailed map[string]uint64
	// SlowSubscriptions are subscriptions that ended because too much waited for a slow
	// iterator, or for a guard that had not answered.
	SlowSubscriptions uint64

	// Callbacks of the app. Panics include calls of runtime.Goexit. Panics and timeouts
	// include those of Options.Logger and of methods that encode to JSON. Panics also
	// include those of the network connection under ServeConn and of the
	// http.ResponseWriter.
	CallbackErrors   uint64
	CallbackPanics   uint64
	CallbackTimeouts uint64
	GuardsRefused    uint64 // questions that a guard answered with a refusal or an error
	GuardsHanging    int64  // calls of guards that run after their time limit now

	// Redis.
	RedisCalls uint64 // scripts, commands and pipelines, each one round trip
	// RedisFailures are calls that were rejected or not answered in time. They include
	// calls that could not be made because too many waited, and exclude calls that were
	// given up because their client had gone.
	RedisFailures uint64
	// RedisLatency is the time until a call was answered or given up.
	RedisLatency Histogram
	// EventLag is the time that this server's echo took to Redis and back as a message.
	// An event of another server takes about as long. There is one echo a second if
	// rooms are watched here, otherwise one for each renewal of the lease.
	EventLag Histogram
	// ExpiredEventsWorking reports whether Redis's expired events arrive. It is false
	// if Options.EnablePresenceExpirationEvents is false.
	ExpiredEventsWorking bool

	// The lease.
	Incarnation         string        // of this server, as Redis knows it; empty before Start
	LeaseAge            time.Duration // since Redis last confirmed the lease; -1 if never
	LeaseFailures       uint64        // renewals that Redis did not answer
	CanDeclareDead      bool          // this server is in contact with Redis, so that it may declare others dead
	Reregistered        uint64        // new incarnations, because this server was declared dead or lost from Redis
	ServersDeclaredDead uint64        // servers that this one declared dead
	ClockSteps          uint64        // disagreements between Redis's clock and that of this machine
}

// Stats returns the values and counts of the server. It looks briefly at every socket
// and every watched room, makes no call to Redis and blocks nothing: with 100,000
// sockets and 10,000 watched rooms it takes about 20 ms of one core. A call every few
// seconds is fine.
func (s *Server) Stats() Stats {
	st := s.n.stats()
	st.addSockets(s.sockets.Counts())
	st.RefusedUpgrades = s.refused.counts()
	st.CommandsFailed = s.failed.counts()
	return st
}

// Stats returns the values and counts of the manager. Those of sockets are zero.
func (p *PresenceManager) Stats() Stats {
	st := p.n.stats()
	var none socket.Stats
	st.addSockets(none.Counts())
	st.RefusedUpgrades = new(refusedUpgrades).counts()
	st.CommandsFailed = new(failedCommands).counts()
	return st
}

func (st *Stats) addSockets(c socket.Counts) {
	st.Closed, st.Coalesced, st.Dropped = c.Closes, c.Coalesced, c.Dropped
	st.Limited, st.Delayed, st.ReadsPaused = c.Limited, c.Delayed, c.Paused
	st.StatesSuperseded += c.Superseded
	st.QueuedBytes, st.LongestQueue = c.Queued, c.Longest
	st.CallbackPanics += uint64(c.Panics)
}

func (n *core) stats() Stats {
	st := Stats{SlowSubscriptions: n.access.slow.Load()}
	st.addOwn(n)
	st.addHub(n.hub.Stats())
	st.Occupancies = n.counts.Stats().Watches
	st.addCallbacks(n)
	if n.checkRunning() == nil {
		st.Incarnation = n.lease.Incarnation()
	}
	if expired := n.redis.expired; expired != nil {
		hints := expired.Stats()
		st.ExpiredEventsUsed, st.ExpiredEventsDropped = hints.Used, hints.Dropped
		st.ExpiredEventsWorking = expired.listener.Working()
	}
	return st
}

// addOwn adds the counts of the local entries, the lease and the store.
func (st *Stats) addOwn(n *core) {
	o, l, r := n.local.Stats(), n.lease.Stats(), n.store.Stats()
	st.Connections, st.Entries, st.Rooms, st.Unwritten = o.Connections, o.Entries, o.Rooms, o.Unwritten
	st.Disconnected, st.Returned, st.Replaced, st.Full = o.Kept, o.Returned, o.Replaced, o.Full
	st.GraceOver = n.kept.Stats().GraceOver
	st.InvalidUserIDs = n.users.invalid.Load()
	st.Batches, st.Changes, st.Retries, st.Rejoined = o.Batches, o.Ops, o.Retries, o.Rejoined
	st.Leaves = map[string]uint64{
		"left": o.LeftAsked, "closed": o.LeftClosed, "silent": o.LeftSilent,
		"server_lost": r.CleanedUp.Dead, "expired": r.CleanedUp.Expired,
	}
	st.StatesExpired, st.StatesSuperseded = r.CleanedUp.States, o.Superseded
	st.LeaveDelaySilent, st.LeaveDelayServerLost = histogramOf(o.Late), histogramOf(l.Late)
	st.RedisCalls, st.RedisFailures, st.RedisLatency = r.Calls, r.Failures, histogramOf(r.Took)
	st.EventLag, st.ListenerResets = histogramOf(l.Trips), l.ListenerResets
	st.LeaseAge, st.LeaseFailures, st.CanDeclareDead = l.LastRenewal, l.Failures, l.InContact
	st.Reregistered, st.ServersDeclaredDead, st.ClockSteps = l.Reregistered, l.DeclaredDead, l.ClockSteps
}

func (st *Stats) addHub(h hub.Stats) {
	st.Watched, st.Subscriptions, st.Stale = h.Rooms, h.Sinks, h.Stale
	st.Events = map[string]uint64{
		"join": h.Events[store.Joined], "rejoin": h.Events[store.Replaced], "leave": h.Events[store.Left],
		"state": h.Events[store.State], "metadata": h.Events[store.Meta], "disconnect": h.Events[store.Disconnected],
	}
	st.EventsIgnored = map[string]uint64{"duplicate": h.Duplicates, "stray": h.Strays, "unreadable": h.Unreadable}
	st.EventsEarly = h.Early
	st.Updates = map[string]uint64{
		"join": h.Updates[wire.UpdateJoin], "leave": h.Updates[wire.UpdateLeave], "state": h.Updates[wire.UpdateState],
		"metadata": h.Updates[wire.UpdateMetadata], "disconnect": h.Updates[wire.UpdateDisconnect],
		"reconnect": h.Updates[wire.UpdateReconnect],
	}
	st.Deliveries, st.RepairUpdates = h.Delivered, h.Repairs
	st.FirstReads = h.Snapshots[hub.CauseFirst]
	st.Repairs = make(map[string]uint64)
	for _, why := range hub.RepairCauses() {
		st.Repairs[why.String()] = h.Snapshots[why]
	}
	st.Overflows, st.ReadsFailed, st.ReadsDiscarded, st.ListenerDisconnects = h.Overflows, h.Failures, h.Discarded, h.ListenerDisconnects
}

func (st *Stats) addCallbacks(n *core) {
	for _, c := range n.calls.Stats() {
		st.CallbackErrors += c.Errors
		st.CallbackPanics += c.Panics
		st.CallbackTimeouts += c.Timeouts
	}
	l := n.logs.Counts()
	st.CallbackPanics += l.Panics
	st.CallbackTimeouts += l.Timeouts
	v := n.access.guards.Stats()
	st.GuardsRefused, st.GuardsHanging = v.Refused+v.Busy, v.Hanging
}

// Histogram counts durations in fixed buckets. It is a copy that never changes, and
// safe for concurrent use. The zero Histogram has no buckets and is empty.
type Histogram struct {
	c     histogram.Counts
	total uint64
}

// NewHistogram returns a histogram for tests of code that shows [Stats]. [Server.Stats]
// returns those of a server. bounds are the upper bounds of the buckets, in ascending
// order. counts has the number of durations in each bucket alone, and one more number
// for durations above all bounds. sum is the sum of all durations. Both slices are
// copied. Errors wrap ErrInvalidOptions.
func NewHistogram(bounds []time.Duration, counts []uint64, sum time.Duration) (Histogram, error) {
	if len(counts) != len(bounds)+1 {
		return Histogram{}, fmt.Errorf("%w: histogram of %d bounds and %d counts", ErrInvalidOptions, len(bounds), len(counts))
	}
	for i := 1; i < len(bounds); i++ {
		if bounds[i] <= bounds[i-1] {
			return Histogram{}, fmt.Errorf("%w: bounds of a histogram do not ascend: %v", ErrInvalidOptions, bounds)
		}
	}
	return histogramOf(histogram.Counts{Bounds: slices.Clone(bounds), Buckets: slices.Clone(counts), Sum: sum}), nil
}

func histogramOf(c histogram.Counts) Histogram {
	h := Histogram{c: c}
	for _, n := range c.Buckets {
		h.total += n
	}
	return h
}

// Count returns the number of durations.
func (h Histogram) Count() uint64 { return h.total }

// Sum returns the sum of all durations. While the server is working, it may not include
// the last few that Count includes, or include a few more.
func (h Histogram) Sum() time.Duration { return h.c.Sum }

// Buckets yields each bound, in ascending order, with the number of durations up to
// that bound. Durations above the last bound are only in Count.
func (h Histogram) Buckets() iter.Seq2[time.Duration, uint64] {
	return func(yield func(time.Duration, uint64) bool) {
		var n uint64
		for i, bound := range h.c.Bounds {
			n += h.c.Buckets[i]
			if !yield(bound, n) {
				return
			}
		}
	}
}

// Quantile returns the bound below which the share q of the durations lies. For
// example, 0.5 is the median. It is as exact as the buckets: the true value is at most
// the result and above the previous bound. If it is above all bounds, the last bound is
// returned. Without durations the result is 0. q is limited to 0 … 1.
func (h Histogram) Quantile(q float64) time.Duration {
	if h.total == 0 || len(h.c.Bounds) == 0 {
		return 0
	}
	rank := uint64(math.Ceil(min(max(q, 0), 1) * float64(h.total)))
	for bound, n := range h.Buckets() {
		if n >= max(rank, 1) {
			return bound
		}
	}
	return h.c.Bounds[len(h.c.Bounds)-1]
}

// MarshalJSON encodes the histogram as {"count", "sum", "buckets": [{"le", "count"}]}.
// sum and le are in seconds, and count is cumulative as in Buckets.
func (h Histogram) MarshalJSON() ([]byte, error) {
	type bucket struct {
		LE    float64 `json:"le"`
		Count uint64  `json:"count"`
	}
	buckets := make([]bucket, 0, len(h.c.Bounds))
	for bound, n := range h.Buckets() {
		buckets = append(buckets, bucket{bound.Seconds(), n})
	}
	return json.Marshal(struct {
		Count   uint64   `json:"count"`
		Sum     float64  `json:"sum"`
		Buckets []bucket `json:"buckets"`
	}{h.total, h.c.Sum.Seconds(), buckets})
}
