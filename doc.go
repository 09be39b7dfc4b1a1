// Package mesh is real-time presence for WebSocket servers: who is in a room,
// live, across any number of servers that share one Redis.
//
// An app makes a [Server], says with [Server.TrackPresence] which rooms have
// presence, starts it and mounts it as an http.Handler. Clients speak the Mesh
// wire protocol, so the JavaScript client of the TypeScript server works
// unmodified. Apps that upgrade WebSockets themselves hand them to
// [Server.ServeConn]; those with a transport of their own use a
// [PresenceManager] alone. Connections can publish ephemeral state (typing,
// away, a cursor) and carry metadata (user id, name, avatar). Presence is per
// connection: a user with two tabs is present twice.
//
// A room is a name. One that a rule of [Server.TrackPresence] matches is
// tracked: it has presence events and states. Others can be joined too, and
// only have members. Joining a room does not subscribe to it, and subscribing
// does not join it.
//
// # Promises
//
//  1. Bounded leave. A connection that falls silent on a living server leaves
//     TTL after its last frame, within a second. What a server that dies leaves
//     behind is gone LeaseTTL + 1 s after it last renewed its lease at the
//     latest, sooner where an entry's TTL is shorter and Redis's expired event
//     arrives. All subscribers on all servers see it, with keyspace
//     notifications on, off, forbidden, late or lost. While Redis itself is
//     away nothing can be told; the bounds then count from its return, and one
//     LeaseTTL of patience.
//  2. Exactly one leave per departure and subscriber, however many servers
//     watch; the same for the end of a state. After a failover that lost
//     acknowledged writes, subscribers converge by repair.
//  3. Nobody stays stale. A subscriber gets a snapshot and then every later
//     change in order. A server that missed something notices and repairs its
//     subscribers with exactly the difference.
//  4. Self-healing. When Redis loses data, the servers rebuild it within one
//     heartbeat (LeaseTTL/3), and no connection that stayed is told to have left.
//     A single key that is lost is found at the next heartbeat and restored; a
//     server with very many rooms and connections may take one heartbeat longer.
//  5. No resurrection. Nothing late (a refresh, a join that sat in a proxy, a
//     state, a server that woke up) brings back what ended.
//  6. Guards hold on every path. A connection that a guard refuses learns nothing
//     about the room. A guard that errors, panics or takes too long refuses. If
//     too many calls of one rule's guards hang, they are not asked: connections
//     that had a yes keep it until the guards can be asked, others are refused.
//  7. No one stalls another. A slow socket, guard, hook or Redis call delays
//     only the connection that it belongs to. Queues are bounded; what happens
//     at the bound is documented, counted and logged.
//
// The promises hold on a Redis that evicts nothing (maxmemory-policy noeviction).
// If it evicts, keys of members come back within two heartbeats, without leaves of
// connections that stayed. Until then reads lack those members. Metadata of rooms,
// which no server holds, is lost. Start logs a warning.
//
// Redis processes are told apart by their run_id. A server that has none in its
// INFO (Dragonfly, Kvrocks) is told apart by its process id, port, replication id
// and uptime. If INFO tells none of these, Start logs a warning: after a failover
// expired events may not arrive, and promise 1 rests on leases alone.
//
// # How it works
//
// A room is one hash in Redis, connection id to record. Each change is one Lua
// script call that changes the record and publishes the event, so data and
// events cannot differ; callers that wait together go together. A server
// mirrors the rooms that somebody on it watches, applies events in the order
// of their numbers, and reads the room again where one does not fit. Each
// server holds a lease; when it runs out another server ends its entries,
// found through an index by server. Expired events of keys with a TTL make
// that faster where they arrive, and nothing rests on them.
//
// # Stopping
//
// [http.Server.Shutdown] knows nothing of WebSockets. Call [Server.Shutdown]
// first, then that of the http.Server, then close the Redis client. Before all
// of them, [Server.Drain] sends clients to the other servers one after the
// other; [Server.Ready] fails from then on, which takes the server out of a
// load balancer's rotation.
package mesh
