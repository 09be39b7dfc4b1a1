package meshprom

import (
	"math"

	"github.com/meshpresence/mesh"
)

// kind is a type of metric, by Prometheus's name for it.
type kind string

const (
	counter   kind = "counter"
	gauge     kind = "gauge"
	histogram kind = "histogram"
)

// metric is one metric, and how it is made of a mesh.Stats.
type metric struct {
	name   string // without the namespace
	help   string
	kind   kind
	label  string   // "": none
	values []string // all that the label has
	fields []string // of mesh.Stats
	number func(st *mesh.Stats, value string) float64
	spread func(st *mesh.Stats, value string) mesh.Histogram // of a histogram
}

// leftOut are the fields of mesh.Stats that are no metric, and why.
var leftOut = map[string]string{
	"Incarnation": "a name that changes with each life of a server: as a label it would never end",
}

// values of labels, as the comments of mesh.Stats have them.
var (
	eventTypes    = []string{"join", "rejoin", "leave", "state", "metadata"}
	ignoreReasons = []string{"duplicate", "stray", "unreadable"}
	updateTypes   = []string{"join", "leave", "state"}
	repairCauses  = []string{
		"gap", "fork", "epoch", "resubscribed", "compare", "overflow", "unreadable", "inconsistent", "verify",
	}
	leaveCauses = []string{"left", "closed", "silent", "server_lost", "expired"}
	closeCauses = []string{
		"peer", "broken", "closed", "shutdown", "silent", "slow", "stuck", "flood", "too_large", "protocol",
	}
)

// table returns all metrics, in the order of README.md.
func table() []metric {
	var all []metric
	for _, group := range [][]metric{held(), events(), repairs(), leaves(), sockets(), callbacks(), redis(), lease()} {
		all = append(all, group...)
	}
	return all
}

func held() []metric {
	return []metric{
		one(gauge, "connections", "Open connections of this server.", "Connections", func(s *mesh.Stats) int { return s.Connections }),
		one(gauge, "entries", "Members of rooms on this server, one for each room that a connection is in.", "Entries",
			func(s *mesh.Stats) int { return s.Entries }),
		one(gauge, "rooms", "Rooms that connections of this server are in.", "Rooms", func(s *mesh.Stats) int { return s.Rooms }),
		one(gauge, "unwritten_changes", "Entries and connections whose last change Redis has not confirmed yet.", "Unwritten",
			func(s *mesh.Stats) int { return s.Unwritten }),
		one(gauge, "watched_rooms", "Rooms that somebody on this server watches, or that several of its connections just joined.", "Watched", func(s *mesh.Stats) int { return s.Watched }),
		one(gauge, "subscriptions", "Watchers of rooms on this server.", "Subscriptions", func(s *mesh.Stats) int { return s.Subscriptions }),
		one(gauge, "stale_rooms", "Watched rooms that may have missed something.", "Stale", func(s *mesh.Stats) int { return s.Stale }),
		one(gauge, "queue_bytes", "Bytes that wait to be written to sockets.", "QueuedBytes", func(s *mesh.Stats) int64 { return s.QueuedBytes }),
		one(gauge, "longest_queue_bytes", "Bytes that wait on the socket where most do.", "LongestQueue",
			func(s *mesh.Stats) int64 { return s.LongestQueue }),
	}
}

func events() []metric {
	return []metric{
		many("events_total", "Changes of watched rooms that came from Redis and were applied.", "type", eventTypes, "Events",
			func(s *mesh.Stats) map[string]uint64 { return s.Events }),
		many("events_ignored_total", "Changes that came from Redis and were not applied.", "reason", ignoreReasons, "EventsIgnored",
			func(s *mesh.Stats) map[string]uint64 { return s.EventsIgnored }),
		one(counter, "events_early_total", "Changes that overtook another one and waited for it.", "EventsEarly",
			func(s *mesh.Stats) uint64 { return s.EventsEarly }),
		many("updates_total", "Updates told to the subscribers of a room, each counted once.", "type", updateTypes, "Updates",
			func(s *mesh.Stats) map[string]uint64 { return s.Updates }),
		one(counter, "deliveries_total", "Updates told, counted once for each subscriber.", "Deliveries",
			func(s *mesh.Stats) uint64 { return s.Deliveries }),
	}
}

func repairs() []metric {
	return []metric{
		many("repairs_total", "Watched rooms read again from Redis, by what was amiss.", "cause", repairCauses, "Repairs",
			func(s *mesh.Stats) map[string]uint64 { return s.Repairs }),
		one(counter, "repair_updates_total", "Updates that made good for missed ones.", "RepairUpdates",
			func(s *mesh.Stats) uint64 { return s.RepairUpdates }),
		one(counter, "first_reads_total", "Rooms read from Redis because somebody began to watch them.", "FirstReads",
			func(s *mesh.Stats) uint64 { return s.FirstReads }),
		one(counter, "event_overflows_total", "Times that too many events waited for a room that was being read.", "Overflows",
			func(s *mesh.Stats) uint64 { return s.Overflows }),
		one(counter, "room_reads_failed_total", "Reads of rooms that Redis did not answer.", "ReadsFailed",
			func(s *mesh.Stats) uint64 { return s.ReadsFailed }),
		one(counter, "room_reads_discarded_total", "Reads of rooms that were of no use because too much happened meanwhile.", "ReadsDiscarded",
			func(s *mesh.Stats) uint64 { return s.ReadsDiscarded }),
		one(counter, "listener_lost_total", "Connections that carry events and ended.", "ListenerLost",
			func(s *mesh.Stats) uint64 { return s.ListenerLost }),
		one(counter, "deaf_total", "Times that this server did not hear its own heartbeat.", "Deaf", func(s *mesh.Stats) uint64 { return s.Deaf }),
	}
}

func leaves() []metric {
	return []metric{
		many("leaves_total", "Entries that this server ended, its own and those of others.", "cause", leaveCauses, "Leaves",
			func(s *mesh.Stats) map[string]uint64 { return s.Leaves }),
		one(counter, "states_expired_total", "States of other servers' entries that this one ended.", "StatesExpired",
			func(s *mesh.Stats) uint64 { return s.StatesExpired }),
		{
			name: "reap_lag_seconds", kind: histogram, label: "cause", values: []string{"silent", "server_lost"},
			help:   "How long after their deadline entries left that were silent, or whose server was lost.",
			fields: []string{"ReapLagSilent", "ReapLagLost"},
			spread: func(s *mesh.Stats, cause string) mesh.Histogram {
				if cause == "silent" {
					return s.ReapLagSilent
				}
				return s.ReapLagLost
			},
		},
		one(counter, "hints_total", "Expired events that this server was first to act on.", "Hints", func(s *mesh.Stats) uint64 { return s.Hints }),
		one(counter, "hints_missed_total", "Expired events dropped.", "HintsMissed", func(s *mesh.Stats) uint64 { return s.HintsMissed }),
		one(counter, "batches_total", "Script calls that wrote this server's entries.", "Batches", func(s *mesh.Stats) uint64 { return s.Batches }),
		one(counter, "changes_total", "Changes of this server's entries in those calls.", "Changes",
			func(s *mesh.Stats) uint64 { return s.Changes }),
		one(counter, "batch_retries_total", "Batches whose outcome was unknown, so that they were made anew.", "Retries",
			func(s *mesh.Stats) uint64 { return s.Retries }),
		one(counter, "states_superseded_total", "States not told because a newer one of the member came within the rule's StateInterval.", "StatesSuperseded",
			func(s *mesh.Stats) uint64 { return s.StatesSuperseded }),
		one(counter, "rejoined_entries_total", "Entries written anew: Redis had lost them, or this server was declared dead.", "Rejoined",
			func(s *mesh.Stats) uint64 { return s.Rejoined }),
	}
}

func sockets() []metric {
	return []metric{
		many("connections_closed_total", "Sockets that ended.", "cause", closeCauses, "Closed",
			func(s *mesh.Stats) map[string]uint64 { return s.Closed }),
		one(counter, "states_coalesced_total", "States left out for a slow socket because a later one waited too.", "Coalesced",
			func(s *mesh.Stats) uint64 { return s.Coalesced }),
		one(counter, "frames_dropped_total", "Frames thrown away with the connection they waited for.", "Dropped",
			func(s *mesh.Stats) uint64 { return s.Dropped }),
		{
			name: "commands_refused_total", kind: counter, label: "code", values: []string{"EBUSY", "ELIMIT"},
			help:   "Commands of clients that were refused for their number.",
			fields: []string{"Busy", "Limited"},
			number: func(s *mesh.Stats, code string) float64 {
				if code == "EBUSY" {
					return float64(s.Busy)
				}
				return float64(s.Limited)
			},
		},
		one(counter, "slow_subscriptions_total", "Subscriptions that ended because too much waited.", "SlowSubscriptions",
			func(s *mesh.Stats) uint64 { return s.SlowSubscriptions }),
	}
}

func callbacks() []metric {
	return []metric{
		{
			name: "callback_failures_total", kind: counter, label: "kind", values: []string{"error", "panic", "timeout"},
			help:   "Guards, hooks and handlers of the app that failed.",
			fields: []string{"CallbackErrors", "CallbackPanics", "CallbackTimeouts"},
			number: func(s *mesh.Stats, kind string) float64 {
				return float64(map[string]uint64{"error": s.CallbackErrors, "panic": s.CallbackPanics, "timeout": s.CallbackTimeouts}[kind])
			},
		},
		one(counter, "guard_refusals_total", "Questions that a guard answered with no, or an error.", "GuardsRefused",
			func(s *mesh.Stats) uint64 { return s.GuardsRefused }),
		one(gauge, "hanging_guards", "Guards that go on after their time limit.", "GuardsHanging",
			func(s *mesh.Stats) int64 { return s.GuardsHanging }),
	}
}

func redis() []metric {
	return []metric{
		one(counter, "redis_calls_total", "Calls to Redis, each one round trip.", "RedisCalls", func(s *mesh.Stats) uint64 { return s.RedisCalls }),
		one(counter, "redis_call_failures_total", "Calls that Redis did not answer in time, or refused.", "RedisFailures",
			func(s *mesh.Stats) uint64 { return s.RedisFailures }),
		durations("redis_call_duration_seconds", "How long calls to Redis took, or were waited for.", "RedisLatency",
			func(s *mesh.Stats) mesh.Histogram { return s.RedisLatency }),
		durations("event_lag_seconds", "How long this server's heartbeats took to Redis and, as a message, back.", "EventLag",
			func(s *mesh.Stats) mesh.Histogram { return s.EventLag }),
		yes("expired_events_working", "1 where Redis's expired events were seen to arrive.", "ExpiredEvents",
			func(s *mesh.Stats) bool { return s.ExpiredEvents }),
	}
}

func lease() []metric {
	return []metric{
		{
			name: "lease_age_seconds", kind: gauge, fields: []string{"LeaseAge"},
			help: "Time since Redis last confirmed this server's lease; NaN before the first time.",
			number: func(s *mesh.Stats, _ string) float64 {
				if s.LeaseAge < 0 {
					return math.NaN()
				}
				return s.LeaseAge.Seconds()
			},
		},
		one(counter, "lease_failures_total", "Renewals of the lease that Redis did not answer.", "LeaseFailures",
			func(s *mesh.Stats) uint64 { return s.LeaseFailures }),
		yes("may_judge", "1 where this server may declare others dead.", "MayJudge", func(s *mesh.Stats) bool { return s.MayJudge }),
		one(counter, "reborn_total", "Times that this server had been declared dead, or forgotten.", "Reborn",
			func(s *mesh.Stats) uint64 { return s.Reborn }),
		one(counter, "buried_servers_total", "Servers that this one declared dead.", "Buried", func(s *mesh.Stats) uint64 { return s.Buried }),
		one(counter, "clock_steps_total", "Disagreements between Redis's clock and this machine's.", "ClockSteps",
			func(s *mesh.Stats) uint64 { return s.ClockSteps }),
	}
}

// one is a metric without label.
func one[N int | int64 | uint64](k kind, name, help, field string, read func(*mesh.Stats) N) metric {
	return metric{name: name, help: help, kind: k, fields: []string{field},
		number: func(s *mesh.Stats, _ string) float64 { return float64(read(s)) }}
}

// many is a counter for each value of a label.
func many(name, help, label string, values []string, field string, read func(*mesh.Stats) map[string]uint64) metric {
	return metric{name: name, help: help, kind: counter, label: label, values: values, fields: []string{field},
		number: func(s *mesh.Stats, value string) float64 { return float64(read(s)[value]) }}
}

// yes is a gauge that is 1 or 0.
func yes(name, help, field string, read func(*mesh.Stats) bool) metric {
	return one(gauge, name, help, field, func(s *mesh.Stats) int {
		if read(s) {
			return 1
		}
		return 0
	})
}

// durations is a histogram without label.
func durations(name, help, field string, read func(*mesh.Stats) mesh.Histogram) metric {
	return metric{name: name, help: help, kind: histogram, fields: []string{field},
		spread: func(s *mesh.Stats, _ string) mesh.Histogram { return read(s) }}
}
