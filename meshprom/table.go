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

// metric is one metric, with the functions that read it from a mesh.Stats.
type metric struct {
	name   string // without the namespace
	help   string
	kind   kind
	label  string   // "": none
	values []string // all values of the label
	fields []string // of mesh.Stats
	number func(st *mesh.Stats, value string) float64
	spread func(st *mesh.Stats, value string) mesh.Histogram // of a histogram
}

// leftOut lists the fields of mesh.Stats that are not metrics, with the reasons.
var leftOut = map[string]string{
	"Incarnation": "it changes with each incarnation, so that as a label it would make new series without end",
}

// Values of labels, as the comments of mesh.Stats list them.
var (
	eventTypes    = []string{"join", "rejoin", "leave", "state", "metadata", "disconnect"}
	ignoreReasons = []string{"duplicate", "stray", "unreadable"}
	updateTypes   = []string{"join", "leave", "state", "metadata", "disconnect", "reconnect"}
	repairCauses  = []string{
		"gap", "fork", "epoch", "resubscribed", "compare", "overflow", "unreadable", "inconsistent", "verify",
	}
	leaveCauses = []string{"left", "closed", "silent", "server_lost", "expired"}
	failedCodes = []string{
		"EINVALID", "ETOOLARGE", "ELIMIT", "ENOTFOUND", "EREFUSED", "EBUSY", "EUNAVAILABLE", "ECONFLICT", "ETIMEOUT", "ECLOSED", "ESERVER", "other",
	}
	closeCauses = []string{
		"peer", "broken", "closed", "shutdown", "silent", "slow", "stuck", "flood", "too_large", "protocol",
	}
	refusedStatuses = []string{"400", "401", "403", "404", "405", "429", "499", "500", "503", "505", "4xx", "5xx"}
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
		one(gauge, "watched_rooms", "Rooms with a subscriber on this server, or that several of its connections just joined.", "Watched", func(s *mesh.Stats) int { return s.Watched }),
		one(gauge, "subscriptions", "Subscriptions of rooms on this server.", "Subscriptions", func(s *mesh.Stats) int { return s.Subscriptions }),
		one(gauge, "occupancies", "Subscriptions to the numbers of rooms on this server.", "Occupancies", func(s *mesh.Stats) int { return s.Occupancies }),
		one(gauge, "stale_rooms", "Watched rooms that may lack changes.", "Stale", func(s *mesh.Stats) int { return s.Stale }),
		one(gauge, "disconnected_members", "Places that rooms keep for ended connections of this server.", "Disconnected",
			func(s *mesh.Stats) int { return s.Disconnected }),
		one(gauge, "queue_bytes", "Bytes that wait to be written to sockets.", "QueuedBytes", func(s *mesh.Stats) int64 { return s.QueuedBytes }),
		one(gauge, "longest_queue_bytes", "Bytes that wait on the socket with the longest queue.", "LongestQueue",
			func(s *mesh.Stats) int64 { return s.LongestQueue }),
	}
}

func events() []metric {
	return []metric{
		many("events_total", "Events of watched rooms that came from Redis and were applied.", "type", eventTypes, "Events",
			func(s *mesh.Stats) map[string]uint64 { return s.Events }),
		many("events_ignored_total", "Events that came from Redis and were not applied.", "reason", ignoreReasons, "EventsIgnored",
			func(s *mesh.Stats) map[string]uint64 { return s.EventsIgnored }),
		one(counter, "events_early_total", "Events that arrived before an earlier one and waited for it.", "EventsEarly",
			func(s *mesh.Stats) uint64 { return s.EventsEarly }),
		many("updates_total", "Updates to the subscribers of a room, each counted once.", "type", updateTypes, "Updates",
			func(s *mesh.Stats) map[string]uint64 { return s.Updates }),
		one(counter, "deliveries_total", "Updates, counted once for each subscriber.", "Deliveries",
			func(s *mesh.Stats) uint64 { return s.Deliveries }),
	}
}

func repairs() []metric {
	return []metric{
		many("repairs_total", "Watched rooms read again from Redis, by cause.", "cause", repairCauses, "Repairs",
			func(s *mesh.Stats) map[string]uint64 { return s.Repairs }),
		one(counter, "repair_updates_total", "Updates that corrected missed ones.", "RepairUpdates",
			func(s *mesh.Stats) uint64 { return s.RepairUpdates }),
		one(counter, "first_reads_total", "Rooms read from Redis because a subscriber began to watch them.", "FirstReads",
			func(s *mesh.Stats) uint64 { return s.FirstReads }),
		one(counter, "event_overflows_total", "Times that too many events waited for a room that was being read.", "Overflows",
			func(s *mesh.Stats) uint64 { return s.Overflows }),
		one(counter, "room_reads_failed_total", "Reads of rooms that Redis did not answer.", "ReadsFailed",
			func(s *mesh.Stats) uint64 { return s.ReadsFailed }),
		one(counter, "room_reads_discarded_total", "Reads of rooms whose result was discarded because the room changed too much during the read.", "ReadsDiscarded",
			func(s *mesh.Stats) uint64 { return s.ReadsDiscarded }),
		one(counter, "listener_disconnects_total", "Listener connections that ended.", "ListenerDisconnects",
			func(s *mesh.Stats) uint64 { return s.ListenerDisconnects }),
		one(counter, "listener_resets_total", "Listener connections that were replaced because the server did not receive its own echo in time.", "ListenerResets", func(s *mesh.Stats) uint64 { return s.ListenerResets }),
	}
}

func leaves() []metric {
	return []metric{
		many("leaves_total", "Entries that this server ended, its own and those of others.", "cause", leaveCauses, "Leaves",
			func(s *mesh.Stats) map[string]uint64 { return s.Leaves }),
		one(counter, "returned_total", "Joins that took the place that the room had kept for their user.", "Returned",
			func(s *mesh.Stats) uint64 { return s.Returned }),
		one(counter, "replaced_total", "Joins that took the place of a connection that looked alive.", "Replaced",
			func(s *mesh.Stats) uint64 { return s.Replaced }),
		one(counter, "grace_over_total", "Kept places that this server ended because their time was over.", "GraceOver",
			func(s *mesh.Stats) uint64 { return s.GraceOver }),
		one(counter, "joins_full_total", "Joins that were refused because of a cap of the room.", "Full",
			func(s *mesh.Stats) uint64 { return s.Full }),
		one(counter, "invalid_user_ids_total", "Metadata for which Options.UserID returned no valid id.", "InvalidUserIDs",
			func(s *mesh.Stats) uint64 { return s.InvalidUserIDs }),
		one(counter, "states_expired_total", "States of other servers' entries that this one ended.", "StatesExpired",
			func(s *mesh.Stats) uint64 { return s.StatesExpired }),
		{
			name: "leave_delay_seconds", kind: histogram, label: "cause", values: []string{"silent", "server_lost"},
			help:   "Delay of the leaves of silent entries, or of entries of dead servers, after their deadline.",
			fields: []string{"LeaveDelaySilent", "LeaveDelayServerLost"},
			spread: func(s *mesh.Stats, cause string) mesh.Histogram {
				if cause == "silent" {
					return s.LeaveDelaySilent
				}
				return s.LeaveDelayServerLost
			},
		},
		one(counter, "expired_events_used_total", "Expired events that this server was first to act on.", "ExpiredEventsUsed", func(s *mesh.Stats) uint64 { return s.ExpiredEventsUsed }),
		one(counter, "expired_events_dropped_total", "Expired events that this server dropped because too many waited.", "ExpiredEventsDropped", func(s *mesh.Stats) uint64 { return s.ExpiredEventsDropped }),
		one(counter, "batches_total", "Batches of changes of this server's entries, each one script call.", "Batches", func(s *mesh.Stats) uint64 { return s.Batches }),
		one(counter, "changes_total", "Changes of this server's entries in those batches.", "Changes",
			func(s *mesh.Stats) uint64 { return s.Changes }),
		one(counter, "batch_retries_total", "Batches that were repeated because their outcome was unknown.", "Retries",
			func(s *mesh.Stats) uint64 { return s.Retries }),
		one(counter, "states_superseded_total", "States that were not delivered because a newer one of the member came within the rule's StateInterval.", "StatesSuperseded",
			func(s *mesh.Stats) uint64 { return s.StatesSuperseded }),
		one(counter, "rejoined_entries_total", "Entries that were written again because Redis had lost them or this server was declared dead.", "Rejoined",
			func(s *mesh.Stats) uint64 { return s.Rejoined }),
	}
}

func sockets() []metric {
	return []metric{
		many("upgrades_refused_total", "Requests that were not upgraded, by HTTP status. 499 means that the client disconnected first.", "status",
			refusedStatuses, "RefusedUpgrades", func(s *mesh.Stats) map[string]uint64 { return s.RefusedUpgrades }),
		many("connections_closed_total", "Sockets that ended.", "cause", closeCauses, "Closed",
			func(s *mesh.Stats) map[string]uint64 { return s.Closed }),
		one(counter, "states_coalesced_total", "States and numbers left out for a slow socket because newer ones waited too.", "Coalesced",
			func(s *mesh.Stats) uint64 { return s.Coalesced }),
		one(counter, "frames_dropped_total", "Frames that were discarded because their connection ended.", "Dropped",
			func(s *mesh.Stats) uint64 { return s.Dropped }),
		one(counter, "commands_refused_total", "Commands of clients that were refused with ELIMIT because of a flood.", "Limited",
			func(s *mesh.Stats) uint64 { return s.Limited }),
		one(counter, "commands_delayed_total", "Commands of clients that had to wait because of CommandsPerSecond.", "Delayed",
			func(s *mesh.Stats) uint64 { return s.Delayed }),
		one(counter, "reads_paused_total", "Pauses in reading from a socket because its waiting commands had reached QueueBytes.", "ReadsPaused",
			func(s *mesh.Stats) uint64 { return s.ReadsPaused }),
		many("commands_failed_total", "Commands to publish or clear a state and to unsubscribe that failed.", "code", failedCodes, "CommandsFailed",
			func(s *mesh.Stats) map[string]uint64 { return s.CommandsFailed }),
		one(counter, "slow_subscriptions_total", "Subscriptions that ended because too many updates waited.", "SlowSubscriptions",
			func(s *mesh.Stats) uint64 { return s.SlowSubscriptions }),
	}
}

func callbacks() []metric {
	return []metric{
		{
			name: "callback_failures_total", kind: counter, label: "kind", values: []string{"error", "panic", "timeout"},
			help:   "Calls of guards, hooks and command handlers of the app that failed.",
			fields: []string{"CallbackErrors", "CallbackPanics", "CallbackTimeouts"},
			number: func(s *mesh.Stats, kind string) float64 {
				return float64(map[string]uint64{"error": s.CallbackErrors, "panic": s.CallbackPanics, "timeout": s.CallbackTimeouts}[kind])
			},
		},
		one(counter, "guard_refusals_total", "Calls of guards that refused, failed or timed out.", "GuardsRefused",
			func(s *mesh.Stats) uint64 { return s.GuardsRefused }),
		one(gauge, "hanging_guards", "Calls of guards that still run after their time limit.", "GuardsHanging",
			func(s *mesh.Stats) int64 { return s.GuardsHanging }),
	}
}

func redis() []metric {
	return []metric{
		one(counter, "redis_calls_total", "Calls to Redis, each one round trip.", "RedisCalls", func(s *mesh.Stats) uint64 { return s.RedisCalls }),
		one(counter, "redis_call_failures_total", "Calls that Redis did not answer in time, or answered with an error.", "RedisFailures",
			func(s *mesh.Stats) uint64 { return s.RedisFailures }),
		durations("redis_call_duration_seconds", "Duration of calls to Redis, including calls that timed out.", "RedisLatency",
			func(s *mesh.Stats) mesh.Histogram { return s.RedisLatency }),
		durations("event_lag_seconds", "Time from sending an echo to Redis until the listener received it.", "EventLag",
			func(s *mesh.Stats) mesh.Histogram { return s.EventLag }),
		yes("expired_events_working", "1 if expired events of Redis arrive.", "ExpiredEventsWorking",
			func(s *mesh.Stats) bool { return s.ExpiredEventsWorking }),
	}
}

func lease() []metric {
	return []metric{
		{
			name: "lease_age_seconds", kind: gauge, fields: []string{"LeaseAge"},
			help: "Time since Redis last confirmed this server's lease. NaN before the first confirmation.",
			number: func(s *mesh.Stats, _ string) float64 {
				if s.LeaseAge < 0 {
					return math.NaN()
				}
				return s.LeaseAge.Seconds()
			},
		},
		one(counter, "lease_failures_total", "Renewals of the lease that Redis did not answer.", "LeaseFailures",
			func(s *mesh.Stats) uint64 { return s.LeaseFailures }),
		yes("can_declare_dead", "1 if this server may declare others dead.", "CanDeclareDead", func(s *mesh.Stats) bool { return s.CanDeclareDead }),
		one(counter, "reregistrations_total", "Times that this server registered again because it had been declared dead or Redis had lost it.", "Reregistered",
			func(s *mesh.Stats) uint64 { return s.Reregistered }),
		one(counter, "servers_declared_dead_total", "Servers that this server declared dead.", "ServersDeclaredDead", func(s *mesh.Stats) uint64 { return s.ServersDeclaredDead }),
		one(counter, "clock_steps_total", "Disagreements between Redis's clock and this machine's.", "ClockSteps",
			func(s *mesh.Stats) uint64 { return s.ClockSteps }),
	}
}

// one is a metric without label.
func one[N int | int64 | uint64](k kind, name, help, field string, read func(*mesh.Stats) N) metric {
	return metric{name: name, help: help, kind: k, fields: []string{field},
		number: func(s *mesh.Stats, _ string) float64 { return float64(read(s)) }}
}

// many is a counter with one label.
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
